"""The live page's words: what the model is, what is erased, and what that changes, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ldm.ledger.demo import Comparison, OtherPrompt
from ldm.ledger.demo_state import LedgerState
from ldm.ledger.ledger import status_table
from ldm.metrics.compare import UNCHANGED_MAX_DIFF
from ldm.metrics.tables import format_cell

MAX_LISTED_NAMES = 12  # of concepts in a sentence; the table has all
MAX_TITLE_NAMES = 3  # in a title, and in what stands above an image
# A difference up to this is called not visible: one step of 8 bits, which rounding alone makes, and no screen shows.
MAX_INVISIBLE_DIFFERENCE = UNCHANGED_MAX_DIFF
EQUAL = "<p>No difference: the two images are equal in every pixel.</p>"
MEASURING = "<p>Changes on other prompts: being measured…</p>"
_STATE_WORDS = {
    "erased": "Erased",
    "too_weak": "Erased, but too weakly",
    "restored": "Restored",
    "never_erased": "Never erased",
}
_COLUMNS = {
    "concept": "Concept",
    "state": "State",
    "since": "Since (UTC)",
    "method": "Method",
    "effect": "Effect (0 none, 1 all)",
    "max_leakage_others": "Largest leakage on other prompts",
}


def list_names(names: Sequence[str], limit: int = MAX_LISTED_NAMES) -> str:
    """Return names as a sentence has them: the first, and how many more there are; nothing for none."""
    if not names:
        return "nothing"
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def page_title(state: LedgerState) -> str:
    """Return what a page about a ledger is called."""
    model = state.ledger.header["base_model"]
    if not state.erased:
        return f"{model}, of which nothing is erased"
    return f"{model} without {list_names(state.erased, MAX_TITLE_NAMES)}"


def overview(state: LedgerState) -> str:
    """Return which model a page is about, what one sees and can do there, and what is erased now."""
    header = state.ledger.header
    rows = {"Model": f"{header['base_model']}, digest {header['base_digest'][:12]}"}
    for word, names in state.names_by_state.items():
        if names or word == "Erased":
            rows["Erased now" if word == "Erased" else word] = list_names(names)
    items = "".join(f"<div><dt>{escape(word)}</dt><dd>{escape(text)}</dd></div>" for word, text in rows.items())
    return (
        f"<h1>{escape(page_title(state))}</h1>"
        "<p>The same prompt, from the same noise: by the original model, and by the one from which concepts are "
        "erased. Type a prompt or take an example, and choose what is erased: your choice is yours alone, and changes "
        "neither the ledger nor what others see.</p>"
        f"<dl>{items}</dl>"
    )


def concepts_table(state: LedgerState) -> str:
    """Return a row for each concept: its state, since when, and its shift's method, effect and leakage."""
    table = status_table(state.ledger)[list(_COLUMNS)]
    table["state"] = table["state"].map(_STATE_WORDS)
    table["since"] = table["since"].str.slice(0, 16).str.replace("T", " ")
    for column in ("effect", "max_leakage_others"):
        table[column] = table[column].map(format_cell)
    return table.rename(columns=_COLUMNS).to_html(index=False, escape=True, border=0, classes="concepts")


def describe_difference(max_difference: int) -> str:
    """Return in words, and as it was measured, by how much two images differ."""
    if not max_difference:
        return "unchanged, equal in every pixel"
    word = "no visible change" if max_difference <= MAX_INVISIBLE_DIFFERENCE else "changed"
    return f"{word}, largest pixel difference {max_difference} of 255"


def describe_scale(comparison: Comparison) -> str:
    """Return by what the image of a difference was multiplied."""
    return f"Difference x {comparison.scale}"


def describe_comparison(comparison: Comparison, names: Sequence[str]) -> str:
    """Return what erasing the concepts `names` changes for the prompt that is shown."""
    return (
        f"<p><strong>This prompt: {describe_difference(comparison.max_difference)}.</strong> Erased here: "
        f"{escape(list_names(names))}. Leakage {comparison.leakage:.2g} (the change of what the prompt tells the "
        "denoiser, relative to all that it tells: 0 is none).</p>"
    )


def describe_others(others: Sequence[OtherPrompt], names: Sequence[str]) -> str:
    """Return what erasing `names` changes on prompts that say none of these: in a sentence, and for each prompt."""
    if not names:
        return "<p><strong>Changes on other prompts: none, since nothing is erased.</strong></p>"
    items = ""
    for other in others:
        kind = "protected" if other.is_protected else "not protected"
        said = f"“{escape(other.prompt)}”" if other.prompt else "the empty prompt"
        difference = describe_difference(other.max_difference)
        items += f"<li>{said} ({kind}): {difference}; leakage {other.leakage:.2g}</li>"
    return (
        f"<p><strong>Changes on other prompts: {_sum_up(others)}.</strong></p>"
        f"<details><summary>The {len(others)} prompts that were measured, "
        f"without {escape(list_names(names, MAX_TITLE_NAMES))}</summary><ul>{items}</ul></details>"
    )


def _sum_up(others: Sequence[OtherPrompt]) -> str:
    """Return whether any image of prompts changes visibly: of the protected ones, and of all others."""
    visible = [other for other in others if other.max_difference > MAX_INVISIBLE_DIFFERENCE]
    protected = [other for other in others if other.is_protected]
    largest = f"largest pixel difference {max((other.max_difference for other in others), default=0)} of 255"
    if not visible:
        return f"none visible, {largest}"
    if any(other.is_protected for other in visible):
        return f"visible on {len(visible)} of {len(others)}, {largest}"
    unprotected = len(others) - len(protected)
    return (
        f"none visible on the {len(protected)} that the ledger protects; visible on {len(visible)} of {unprotected} "
        f"that nothing protects, {largest}"
    )
