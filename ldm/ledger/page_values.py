"""What the live page's widgets show, by their names: the arguments that make them, and that change them later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from PIL import Image

from ldm.ledger import demo_words as words
from ldm.ledger.demo import Comparison, DemoSession
from ldm.ledger.demo_state import LedgerState, example_prompts

Values = dict[str, dict[str, Any]]


def ledger_values(demo: DemoSession) -> Values:
    """Return what the page shows as the ledger stands: what it is, what can be chosen, and an example."""
    state = demo.state  # read once: another visitor may read the ledger anew meanwhile
    prompt, comparison = demo.example(state)
    examples = example_prompts(state)
    values: Values = {
        "overview": {"value": words.overview(state)},
        "prompt": {"value": prompt},
        "examples": {"samples": [[text] for text in examples.values()], "sample_labels": list(examples)},
        "names": _choices(demo, state),
        "table": {"value": words.concepts_table(state)},
    }
    values |= comparison_values(comparison, prompt, state.erased)
    return values | others_values(demo, state.erased)


def _choices(demo: DemoSession, state: LedgerState) -> dict[str, Any]:
    """Return what a visitor chooses from: what is erased, or of many concepts what is not as in the ledger."""
    if not demo.has_switches:
        return {"choices": list(state.shifts), "value": list(state.erased)}
    return {"choices": list(state.switches.items()), "value": []}


def comparison_values(comparison: Comparison, prompt: str, names: Sequence[str]) -> Values:
    """Return what the page shows for a prompt's images by the original model and without the concepts `names`."""
    without, said = words.list_names(names, words.MAX_TITLE_NAMES), prompt or "the empty prompt"
    differs = comparison.max_difference > 0
    return {
        "original": {
            "value": _of_its_own(comparison.original),
            "label": "Original model",
            "alt_text": f"Image of the original model for: {said}",
        },
        "edited": {
            "value": _of_its_own(comparison.edited),
            "label": f"Without {without}" if names else "Nothing erased",
            "alt_text": f"Image of the model without {without} for: {said}",
        },
        "difference": {
            "value": _of_its_own(comparison.scaled_difference) if differs else None,
            "label": words.describe_scale(comparison),
            "alt_text": f"Difference of the two images, multiplied by {comparison.scale}",
            "visible": differs,
        },
        "equal": {"visible": not differs},
        "message": {"value": words.describe_comparison(comparison, names)},
        "others": {"value": words.MEASURING},
    }


def _of_its_own(image: Image.Image) -> Image.Image:
    """Return an image whose PNG is like no other: Gradio overwrites an equal one while another visitor fetches it."""
    image = image.copy()
    image.info["answer"] = uuid4().hex
    return image


def others_values(demo: DemoSession, names: Sequence[str]) -> Values:
    """Return what the page says about prompts that say none of the concepts `names`."""
    return {"others": {"value": words.describe_others(demo.measure_others(names), names)}}
