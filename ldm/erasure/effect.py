"""How far a shift takes the prompts that say its concept towards their anchors: whether it erases, told without images.

With x (tokens, d) the rows of a prompt's embedding, y those of its anchor, W the weights of the text layers and z what
a shift adds to their outputs for the prompt, the effect on the prompt is

    <z, (y - x) W^T> / |(y - x) W^T|^2

over all layers: 0 where nothing of the name is gone, 1 where as much is gone as of the anchor. The anchor is the same
prompt with a neutral word, or with the concept's own anchor, instead of the name. Where the closed form takes all
prompts to one, such as the empty prompt, the way to that counts too, on the prompts that it was fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ldm.config.concepts import Concept
from ldm.config.methods import EditConfig, MethodConfig, SRSMEConfig
from ldm.config.peers import PeerConfig
from ldm.config.templates import load_template_set
from ldm.diffusion.edits import edit_embeddings
from ldm.diffusion.text_model import TextModel
from ldm.diffusion.tokenizer import read_whole
from ldm.erasure.layer_rows import row_weight
from ldm.erasure.leakage import changes_only
from ldm.erasure.merge import by_form, gated_prompts
from ldm.erasure.shift import EmbeddingShift, WeightShift
from ldm.erasure.targets import replaces_name, target_prompts
from ldm.io.errors import notify

# Of 317 linear shifts of nine concepts of mini-sd and mini-sd-minilm, weak and strong, by ridges, scales and what is
# protected, 20 images each: of 80 that left more than 15 % of the images the concept's these limits call none erased
# (at most 0.69), protected prompts that say the concept aside, which are refused. Of 200 that left less they
# call 70 not erased, of which two were made with a model's own settings (mini-sd-minilm's, whose own form is gated).
LEAST_EFFECT = EditConfig().least_effect  # 0.7
LEAST_PROMPT_EFFECT = 0.38
# Of 77 shifts by gates of six concepts of mini-sd-minilm, weak and strong: 15 that left more than 15 % have at most
# 0.54. Of 62 that left less it calls about 20 not erased, all of them weakened; its own settings have 0.83 and more.
LEAST_GATED_EFFECT = 0.6
# Of a trained shift, which goes no straight way, the change of the outputs for its own prompt tells when nothing is
# erased, relative to `anchor_change`: of a style 0.21 left 85 % and 0.36 nothing on mini-sd, and 0.29 nothing on
# mini-sd-minilm. More than this is not judged.
LEAST_CHANGE = 0.25
_ANCHOR_CHANGE = 0.4  # where a shift of an older version does not say it
NEUTRAL, ANCHOR = "neutral", "anchor"
_NUM_FITTED, _NUM_HELD_OUT = 6, 6  # templates, beside the name alone
_SHOWN = 3  # concepts that a message names
_SPARED = 0.15  # of the prompts that do not count for the least effect, but never the name alone


@dataclass(frozen=True)
class Effect:
    """The effect of a shift on prompts that say its concept, the name alone first; NaN where text layers do not say it.

    The way goes `towards` neutral prompts, or to the one anchor of all. A concept is erased where the mean is at least
    `LEAST_EFFECT`, and the least of the name's and of all but the lowest 15 % of the prompts' `LEAST_PROMPT_EFFECT`.
    """

    on_prompts: Mapping[str, float]
    towards: str = NEUTRAL

    @property
    def mean(self) -> float:
        """The mean over the prompts."""
        return sum(self.on_prompts.values()) / len(self.on_prompts)

    @property
    def least(self) -> float:
        """The effect on the name alone, or that which all but the lowest 15 % of the prompts have, if it is less."""
        values = list(self.on_prompts.values())
        return min(values[0], sorted(values)[math.floor(_SPARED * len(values))])

    @property
    def lowest_prompt(self) -> str:
        """The prompt with the lowest effect."""
        return min(self.on_prompts, key=lambda prompt: self.on_prompts[prompt])

    @property
    def is_erased(self) -> bool | None:
        """Whether the concept may be called erased by a change of weights; None where this measure cannot tell."""
        return judge({"effects": {"linear": self.to_dict()}}, "linear")[0]

    def to_dict(self) -> dict[str, Any]:
        """Return what a shift's metadata say of its effect; nothing where it is not known."""
        if math.isnan(self.mean):
            return {}
        said = {"mean": self.mean, "least": self.least, "lowest_prompt": self.lowest_prompt}
        return said | ({"towards": self.towards} if self.towards != NEUTRAL else {})


def stated_effects(metadata: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what a shift's metadata say of its effect, by form, as `Effect.to_dict` made it.

    Raises ValueError for what it did not make, as in a file that was altered.
    """
    effects = metadata.get("effects", {})
    is_whole = isinstance(effects, Mapping) and all(isinstance(said, Mapping) for said in effects.values())
    for said in filter(None, effects.values()) if is_whole else ():
        numbers = [said.get(name) for name in ("mean", "least")]
        is_number = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        is_whole = is_whole and is_number and isinstance(said.get("lowest_prompt"), str)
    if not is_whole:
        raise ValueError(f"the shift of {metadata.get('concept')} says no effect that it could have: erase it anew")
    return dict(effects)


def judge(
    metadata: Mapping[str, Any], form: str, least_effect: float = LEAST_EFFECT
) -> tuple[bool | None, dict[str, Any]]:
    """Return whether what a shift's metadata say of its effect in a form lets its concept be called erased, and that.

    None where they say nothing of it, as those of trained shifts, unless these change hardly anything. A shift without
    a gate acts on the weights in the form gated too. `least_effect` is the least mean of those, with which the other
    limits go up and down, those of gates too; those that count are `limit` and `least_limit`.
    """
    effects = stated_effects(metadata)
    if metadata.get("unchanged"):  # streams of the prompt, by which the model may know the concept still
        return None, {}
    used = next((name for name in (form, "linear", "gated") if effects.get(name)), "")
    said = effects.get(used)
    if not said:
        change, whole = metadata.get("target_change"), metadata.get("anchor_change", _ANCHOR_CHANGE)
        are_numbers = all(isinstance(value, float) and math.isfinite(value) for value in (change, whole))
        if not are_numbers or whole <= 0:
            return None, {}
        limit, own = LEAST_CHANGE * whole * least_effect / LEAST_EFFECT, str(metadata.get("prompt", ""))
        if change >= limit:
            return None, {}
        return False, {"mean": change, "least": change, "lowest_prompt": own, "limit": limit, "least_limit": limit}
    mean, least = said["mean"], said["least"]
    limit = least_effect
    if used == "gated":
        limit *= LEAST_GATED_EFFECT / LEAST_EFFECT
    least_limit = limit * LEAST_PROMPT_EFFECT / LEAST_EFFECT
    return mean >= limit and least >= least_limit, {**said, "limit": limit, "least_limit": least_limit}


def describe_miss(said: Mapping[str, Any]) -> str:
    """Return in a few words by how much the effect that `judge` found misses its limits."""
    missed: list[str] = []
    if said["mean"] < said["limit"]:
        missed.append(f"{round_down(said['mean'])} of {said['limit']:.2f} on average")
    if said["least"] < said["least_limit"]:
        lowest = f"{round_down(said['least'])} of {said['least_limit']:.2f} on the lowest prompts"
        missed.append(f"{lowest}, such as '{said['lowest_prompt']}'")
    return " and ".join(missed)


def round_down(value: float) -> str:
    """Return a number with two digits, rounded down, so that what misses a limit is never written as the limit."""
    return f"{math.floor(value * 100) / 100:.2f}"


def weak_effects(metadata: Iterable[Mapping[str, Any]], edit: EditConfig) -> str:
    """Return which concepts what shifts' metadata say lets not be called erased, with their effects; empty for none."""
    weak: list[str] = []
    for each in metadata:
        is_erased, said = judge(each, edit.form, edit.least_effect)
        if is_erased is False:
            weak.append(f"{each.get('concept')} ({describe_miss(said)})")
    if not weak:
        return ""
    more = f" and {len(weak) - _SHOWN} more" if len(weak) > _SHOWN else ""
    return (
        f"{', '.join(weak[:_SHOWN])}{more}: prompts that say it go less of the way to what takes its place than is "
        "called erased (`least_effect`)"
    )


def notify_of_weak(shifts: Mapping[str, WeightShift], edit: EditConfig, advice: str) -> None:
    """Say which shifts do too little to their concepts, in the form in which they act, to call these erased."""
    weak = weak_effects([shift.metadata for shift in shifts.values()], edit)
    if weak:
        notify(f"not erased: {weak}: {advice}")


def advice_on_weak(config: MethodConfig, protecting: str = "`protect`") -> str:
    """Return what to do about too small an effect; `protecting` are the settings that say what is protected."""
    if isinstance(config, PeerConfig):
        return f"take `rows` end, which edits more of what says a concept, or protect less ({protecting})"
    if config.trains:
        return f"train with a larger `lr` or `basis_scale` or more `max_steps`, or protect less ({protecting})"
    settings = "a larger `rank_rtol`, or a smaller `ridge_weight` or `neutral_preserve_scale` (of gates `map_ridge`)"
    return f"protect less ({protecting}), or take {settings}"


def least_effect_met(metadata: Mapping[str, Any], form: str) -> float:
    """Return the largest `least_effect` with which `judge` does not call a shift too weak; infinity where it cannot."""
    is_erased, said = judge(metadata, form)
    if is_erased is None:
        return math.inf
    return LEAST_EFFECT * min(said["mean"] / said["limit"], said["least"] / said["least_limit"])


def judged_form(metadata: Mapping[str, Any], effect: float | None) -> str:
    """Return the form in which a shift was judged of which a ledger says this mean effect; gated where none has it."""
    forms = (form for form, said in stated_effects(metadata).items() if said and said["mean"] == effect)
    return next(forms, "gated")


def effect_prompts(concept: Concept, config: SRSMEConfig, tokenizer: Any) -> dict[str, str]:
    """Return prompts that say a concept by its name, and the anchor of each: the name alone, which comes first.

    Then some that an erasure is fitted on, and held-out ones, as far as the model reads all of them. `config` says
    whose templates say the concept.
    """
    plain = replace(concept, name=concept.prompt, aliases=())
    neutral = config.with_changes(anchor="neutral", target_templates=len(_all_templates(concept)))
    fitted = target_prompts(plain, neutral, tokenizer)
    held_out: dict[str, str] = {}
    templates = _held_out_templates(concept, config)
    if templates:
        as_own = neutral.with_changes(template_set="category", target_templates=len(templates))
        held_out = target_prompts(replace(plain, templates=templates), as_own, tokenizer)
    chosen = [concept.prompt, *_evenly(fitted, concept, tokenizer, _NUM_FITTED)]
    chosen += _evenly(held_out, concept, tokenizer, _NUM_HELD_OUT)
    anchors = held_out | fitted
    return {prompt: anchors[prompt] for prompt in chosen}


def _all_templates(concept: Concept) -> tuple[str, ...]:
    return (*concept.templates, *load_template_set(concept.kind).templates)


def _held_out_templates(concept: Concept, config: SRSMEConfig) -> tuple[str, ...]:
    """Return the held-out templates of the concept's kind, or its own where the model is fitted on its own."""
    if config.template_set == "kind":
        return load_template_set(concept.kind).held_out_templates
    return tuple(text.replace(concept.prompt, "{}", 1) for text in concept.held_out_prompts)


def _evenly(prompts: Iterable[str], concept: Concept, tokenizer: Any, num: int) -> list[str]:
    """Return at most `num` of the prompts that say more than the name and are not cut, evenly spaced."""
    longer = [text for text in prompts if text != concept.prompt]
    read = read_whole(tokenizer, longer)
    whole = [text for text in longer if text in read]
    return whole[:: max(1, -(-len(whole) // num))]


def measure_effect(
    model: TextModel, concept: Concept, shift: WeightShift, config: SRSMEConfig, form: str = "linear"
) -> Effect:
    """Return the effect of a concept's shift, in the `form` in which it acts, on `effect_prompts`.

    In the form gated a prompt that does not trip the gate has none. Of two ways it is that to the one anchor, unless
    only the other erases. Takes well below a second for a bundled model: two dozen prompts are embedded. Raises
    ValueError for a gate that does not fit the model.
    """
    anchors, layers = effect_prompts(concept, config, model.tokenizers[0]), model.text_layers
    gated, linear = by_form({"": shift}, form)
    if linear and not changes_only(shift, layers):
        return Effect(dict.fromkeys(anchors, math.nan))
    crossed = _crossed(model, layers, shift) if linear else None
    found = Effect(_on_prompts(model, anchors, True, gated, crossed))
    if crossed is None or replaces_name(concept, config):
        return found
    plain = replace(concept, name=concept.prompt, aliases=())
    fitted = target_prompts(plain, config, model.tokenizers[0])
    chosen = [concept.prompt, *_evenly(fitted, concept, model.tokenizers[0], _NUM_FITTED)]
    own = Effect(_on_prompts(model, {prompt: fitted[prompt] for prompt in chosen}, False, gated, crossed), ANCHOR)
    return found if found.is_erased and not own.is_erased else own


def _on_prompts(
    model: TextModel,
    anchors: Mapping[str, str],
    is_aligned: bool,
    gated: Mapping[str, WeightShift],
    crossed: torch.Tensor | None,
) -> dict[str, float]:
    """Return the effect on each prompt: of gates, or of a shift whose `dW^T W` over all layers is `crossed` (d, d)."""
    embeds = _embed(model, [*anchors, *anchors.values()])
    before = torch.stack([embeds[prompt] for prompt in anchors])
    aims = torch.stack([embeds[anchor] for anchor in anchors.values()])
    ways = aims - before  # (P, tokens, d)
    if is_aligned:
        for number, rows in enumerate(model.align_rows(list(anchors), list(anchors.values()))):
            ways[number] = aims[number, rows] - before[number]
    gram = model.output_gram
    squares = ((ways @ gram) * ways).sum((1, 2))  # of the ways through all layers
    if crossed is not None:
        products = ((before @ crossed) * ways).sum((1, 2))
    else:
        with edit_embeddings(model, gated_prompts(model, gated)):
            changed = model.layer_inputs(model.encode_prompt(list(anchors)))
        changes = changed.cpu().double() - before
        products = ((changes @ gram) * ways).sum((1, 2))
    return dict(zip(anchors, (products / squares).tolist(), strict=True))


def anchor_change(model: TextModel, concept: Concept) -> float:
    """Return how much the outputs for a concept's name would change if it became the neutral word of its kind.

    Relative to these outputs, as `target_change` is: about 1 for mini-sd and 0.5 for mini-sd-minilm.
    """
    neutral = load_template_set(concept.kind).neutral
    embeds, gram = _embed(model, [concept.prompt, neutral]), model.output_gram
    before = embeds[concept.prompt]
    [rows] = model.align_rows([concept.prompt], [neutral])
    way = embeds[neutral][rows] - before
    return math.sqrt(float(((way @ gram) * way).sum() / ((before @ gram) * before).sum()))


def _crossed(model: TextModel, layers: Mapping[str, nn.Linear], shift: WeightShift) -> torch.Tensor:
    """Return the sum over layers of `dW^T W`, (d, d), float64."""
    if isinstance(shift, EmbeddingShift):
        return shift.on(layers).embedding_change().T @ model.output_gram
    total: torch.Tensor | float = 0.0
    bound = shift.on(layers)
    for name in layers:
        if f"{name}.weight" in shift.parameter_names:
            total = total + bound.row_delta(f"{name}.weight").T @ row_weight(layers, name).cpu().double()
    assert isinstance(total, torch.Tensor)
    return total


def _embed(model: TextModel, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return what text layers see of each prompt, (T + 1, d + p), float64 on the CPU; all are embedded in one pass.

    Those that the model remembers are not embedded again.
    """
    known = dict(model.remembered or {})
    lacking = list(dict.fromkeys(prompt for prompt in prompts if prompt not in known))
    if lacking:
        embeds = model.layer_inputs(model.encode_with_states(lacking, {})[0])
        known |= dict(zip(lacking, embeds, strict=True))
    return {prompt: known[prompt].cpu().double() for prompt in prompts}
