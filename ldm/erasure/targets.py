"""The prompts that say a concept, as the closed form and training take them, and the anchor of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.config.concepts import Concept
from ldm.config.methods import SRSMEConfig
from ldm.config.templates import fill_anchor, fill_phrase, load_template_set, without_article
from ldm.diffusion.text_model import TextModel
from ldm.diffusion.tokenizer import last_token, read_whole


def target_prompts(concept: Concept, config: SRSMEConfig, tokenizer: Any) -> dict[str, str]:
    """Return the prompts that say a concept, and the prompt that the closed form makes of each.

    Of the templates of its kind those are left out with which the concept is longer than the model reads.
    """
    kind = load_template_set(concept.kind)  # whose neutral word stands for the name where the anchor is neutral
    of_kind = config.template_set == "kind" or (concept.is_own and not concept.templates)
    templates = [text for text in (kind.templates if of_kind else concept.templates) if text != "{}"]
    anchors: dict[str, str] = {}
    longer: dict[str, None] = {}  # prompts that may be cut
    of_own = concept.is_own and config.template_set != "kind"  # whose number is not that of a category's templates
    for template in ["{}", *(templates if of_own else templates[: config.target_templates])]:
        anchor = anchor_prompt(concept, config, template, kind.neutral)
        for spelling in concept.spellings if of_kind or concept.is_own else (concept.prompt,):
            prompt = fill_phrase(template, spelling)
            anchors[prompt] = anchor
            if template != "{}" and of_kind:
                longer[prompt] = None
    cut = set(longer) - read_whole(tokenizer, list(longer))
    return {prompt: anchor for prompt, anchor in anchors.items() if prompt not in cut}


def anchor_prompt(concept: Concept, config: SRSMEConfig, template: str, neutral: str) -> str:
    """Return what a prompt becomes that says a concept in a template: the concept's own anchor comes before all."""
    if concept.anchor is not None:
        return fill_anchor(template, concept.anchor, neutral)
    if config.anchor == "neutral":
        return fill_anchor(template, None, neutral)
    return concept.anchor_prompt if config.anchor == "category" else ""


def replaces_name(concept: Concept, config: SRSMEConfig) -> bool:
    """Return whether the anchor of a prompt differs from it in the concept's name alone."""
    return concept.anchor is not None or config.anchor == "neutral"


def held_out_prompts(concept: Concept, tokenizer: Any) -> dict[str, str]:
    """Return the prompts that say a concept by which an erasure is judged, and never fitted; with each its template.

    Those are left out in which its name is cut.
    """
    templates = [*load_template_set(concept.kind).held_out_templates, *concept.held_out_templates]
    found: dict[str, str] = {}
    for spelling in concept.spellings:
        for template in templates:
            prompt = fill_phrase(template, spelling)
            if last_token(tokenizer, prompt, without_article(spelling)) is not None:
                found.setdefault(prompt, template)
    return found


def anchor_embeds(model: TextModel, anchors: Mapping[str, str], is_aligned: bool) -> torch.Tensor:
    """Return the rows that text layers should see of prompts, (P, rows, d), or (1, rows, d) for all of them alike.

    `anchors` has the anchor of each prompt, which is aligned with it token by token where `replaces_name`.
    """
    embeds: dict[str, torch.Tensor] = {}
    for text in dict.fromkeys(anchors.values()):  # of which nobody is told that they are cut
        embeds[text] = model.layer_inputs(model.encode_with_states([text], {})[0])[0]  # (rows, d)
    if not is_aligned:
        return next(iter(embeds.values()))[None]
    aligned = model.align_rows(list(anchors), list(anchors.values()))
    return torch.stack([embeds[anchor][rows] for anchor, rows in zip(anchors.values(), aligned, strict=True)])
