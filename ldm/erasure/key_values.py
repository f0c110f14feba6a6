"""What UCE and SPEED read and edit: rows that stand for prompts, and the keys and values of cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ldm.config.concepts import Concept, always_protected_prompts
from ldm.config.everyday import retain_captions
from ldm.config.method import MethodConfig
from ldm.config.peers import PeerConfig, UCEConfig
from ldm.config.spellings import says
from ldm.config.templates import fill, load_template_set
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.tokenizer import read_whole

# What UCE's authors erase beside a name where prompts are expanded.
_PHRASES = {
    "style": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "other": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}
_LAYERS = {"values": ("attn2.to_v",), "keys": ("attn2.to_k",), "both": ("attn2.to_k", "attn2.to_v")}
_ITERATIONS = 20  # of k-means


def check_key_values(model: DiffusionModel, config: MethodConfig) -> None:
    """Raise ValueError for a denoiser without keys and values of cross-attention that see the prompt alone."""
    if not any(name.endswith(_LAYERS["both"]) for name in text_layers(model.denoiser)):
        raise ValueError(
            f"{config.name} edits keys and values of cross-attention that see the prompt alone, which "
            f"{type(model.denoiser).__name__} does not have: choose SRS-ME or ESD"
        )


def key_value_weights(model: DiffusionModel, layers: str = "both") -> dict[str, torch.Tensor]:
    """Return weights (out, d) of cross-attention by parameter name, float64 on the CPU: `values`, `keys` or `both`."""
    found: dict[str, torch.Tensor] = {}
    for name, layer in text_layers(model.denoiser).items():
        if name.endswith(_LAYERS[layers]):
            found[f"{name}.weight"] = layer.weight.detach().cpu().double()
    return found


def preserved_prompts(
    concept: Concept, config: MethodConfig, concepts: Sequence[Concept], prompts: Sequence[str], tokenizer: Any
) -> list[str]:
    """Return what UCE and SPEED preserve when they erase a concept: other `concepts`, `prompts`, what settings add.

    No other method preserves any. Prompts that say the concept are left out, and captions that would be cut.
    """
    if not isinstance(config, PeerConfig):
        return []
    found: list[str] = []
    for other in concepts:
        if other.label != concept.label:
            found += [other.prompt, *other.captions[: config.preserve_templates]]
    found += [*prompts, *(always_protected_prompts() if config.preserve_always else [])]
    captions = retain_captions(config.preserve_captions)
    whole = read_whole(tokenizer, captions)
    found += [caption for caption in captions if caption in whole]
    return [prompt for prompt in dict.fromkeys(found) if not says(prompt, concept.spellings)]


def guide_prompt(concept: Concept, anchor: str | None) -> str:
    """Return the prompt that takes a concept's place: its own anchor before all."""
    if concept.anchor is not None:
        return concept.anchor
    if anchor is None:
        return "art" if concept.kind == "style" else ""
    return {
        "empty": "",
        "category": concept.anchor_prompt,
        "neutral": load_template_set(concept.kind).neutral,
    }[anchor]


def concept_rows(model: DiffusionModel, concept: Concept, config: PeerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows that stand for a concept, and for each the guide's that takes its place, (n, d), float64.

    From the first row of each on they go together; where the guide's end, its last goes on.
    """
    prompts = [concept.prompt]
    if isinstance(config, UCEConfig) and config.expand_prompts:
        phrases = _PHRASES["style" if concept.kind == "style" else "other"]
        prompts += [fill(phrase, concept.prompt) for phrase in phrases]
    (guide,) = _rows(model, [guide_prompt(concept, config.anchor)], config.rows)
    erased = _rows(model, prompts, config.rows)
    guides = [guide[torch.arange(len(rows)).clamp(max=len(guide) - 1)] for rows in erased]
    return torch.cat(erased), torch.cat(guides)


def prompt_rows(model: DiffusionModel, prompts: Sequence[str], rows: str) -> torch.Tensor:
    """Return the `rows` that stand for prompts, `last`, `end` or `all` of each, (n, d), float64."""
    width = model.split(model.encode_uncond()).tokens.shape[-1]
    return torch.cat([torch.zeros(0, width, dtype=torch.float64), *_rows(model, prompts, rows)])


def _rows(model: DiffusionModel, prompts: Sequence[str], rows: str) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for prompt in prompts:
        tokens = model.split(model.embed_prompts([prompt])[prompt][None]).tokens[0].cpu().double()  # (tokens, d)
        ids = model.tokenizers[0](prompt, truncation=True, max_length=len(tokens)).input_ids
        last = max(0, len(ids) - 2)  # before the token that ends a prompt
        found.append({"last": tokens[last : last + 1], "end": tokens[last:], "all": tokens}[rows])
    return found


def invariant_rows(model: DiffusionModel, centroids: int) -> torch.Tensor:
    """Return the first row of the empty prompt, and `centroids` of its others by k-means, (m, d), float64."""
    rows = model.split(model.encode_prompt([""])).tokens[0].cpu().double()
    first, others = rows[:1], rows[1:]
    centers = others[torch.linspace(0, len(others) - 1, min(centroids, len(others))).long()]
    for _ in range(_ITERATIONS):
        nearest = torch.cdist(others, centers).argmin(dim=1)
        members = [others[nearest == k] for k in range(len(centers))]
        centers = torch.stack(
            [own.mean(0) if len(own) else center for own, center in zip(members, centers, strict=True)]
        )
    return torch.cat([first, centers])
