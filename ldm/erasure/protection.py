"""What an erasure protects, and its null spaces: solved for each concept, saved with what is known of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.config.concepts import Concept, always_protected_prompts
from ldm.config.methods import NullSpaceConfig
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_model import TextModel
from ldm.erasure.null_space import BASIS_FILE_TYPE, NullSpaceBasis, leave_one_out_factors, qr_factor
from ldm.io.legacy import upgrade_digests
from ldm.io.paths import ArtifactPaths
from ldm.io.sharding import Shard
from ldm.io.tensors import CREATED_BY, read_metadata


@dataclass(frozen=True)
class Protection:
    """What an erasure leaves alone beside the empty prompt and watermarks: concepts, and further prompts."""

    concepts: Sequence[Concept]
    null_space: NullSpaceConfig
    extra_prompts: Sequence[str] = ()


@dataclass(frozen=True)
class BasisSummary:
    """What is known of a basis that was solved: how much it protects and what it leaves free."""

    concept: Concept
    path: Path
    num_protected: int
    rank: int
    width: int
    nullity: int
    max_leakage: float


class ProtectedRows:
    """The embeddings of everything that is protected, and for each concept a `qr_factor` of all but its own.

    `prompts` maps each protected concept, by label, to its prompts; `fixed` are the prompts that are always protected,
    whose rows are multiplied by `weight`.
    """

    def __init__(
        self,
        embeds: Mapping[str, torch.Tensor],
        fixed: Sequence[str],
        prompts: Mapping[str, Sequence[str]],
        weight: float,
    ):
        self.fixed, self.prompts = list(fixed), prompts
        self.fixed_rows = [weight * embeds[prompt] for prompt in fixed]
        self.blocks = {label: torch.cat([embeds[prompt] for prompt in own]) for label, own in prompts.items()}

    def leave_one_out(self, concepts: Sequence[Concept]) -> Iterator[torch.Tensor]:
        """Yield for each concept a `qr_factor` (at most d, d) of the rows of everything protected but itself.

        What these have in common is decomposed once.
        """
        own = [concept for concept in concepts if concept.label in self.blocks]
        own_labels = {concept.label for concept in own}
        others = [block for label, block in self.blocks.items() if label not in own_labels]
        rest = torch.cat([*self.fixed_rows, *others])
        own_blocks = [self.blocks[concept.label] for concept in own]
        factors = leave_one_out_factors(own_blocks, rest) if own else iter(())
        every_factor = qr_factor(rest, *own_blocks) if len(own) < len(concepts) else None
        for concept in concepts:
            if concept.label in own_labels:
                yield next(factors)
            elif every_factor is not None:
                yield every_factor

    def without(self, concept: Concept) -> list[str]:
        """Return the prompts that are protected when `concept` is erased, once each."""
        others = [prompts for label, prompts in self.prompts.items() if label != concept.label]
        return list(dict.fromkeys([*self.fixed, *itertools.chain(*others)]))


def solve_null_spaces(
    model: TextModel,
    artifacts: ArtifactPaths,
    targets: Sequence[Concept],
    protection: Protection,
    shard: Shard = Shard(),
) -> list[BasisSummary]:
    """Save, for each concept of `targets`, the basis in which it can be erased, and return what is known of each.

    A basis protects the empty prompt, the watermarks and what `protection` names, less the erased concept: each concept
    by its name and its first `protected_templates` captions. Of several processes each solves its `shard`. Raises
    ValueError when the protected prompts leave no dimension free.
    """
    targets = list(dict.fromkeys(targets))
    config = protection.null_space
    fixed = list(dict.fromkeys([*always_protected_prompts(), *protection.extra_prompts]))
    prompts = {}
    for concept in protection.concepts:
        prompts[concept.label] = concept.prompts(0 if concept.is_watermark else config.protected_templates)
    embeds = model.embed_prompts(dict.fromkeys([*fixed, *itertools.chain(*prompts.values())]))  # (tokens, d) each
    check_apart(model, targets, {prompt: embeds[prompt] for prompt in fixed})
    rows = ProtectedRows(embeds, fixed, prompts, config.always_protected_weight)
    if isinstance(model, DiffusionModel) and model.adapter.samples_by_call:  # which may read negative prompts otherwise
        rows.fixed_rows.append(config.always_protected_weight * model.layer_inputs(model.encode_uncond())[0])
    local_targets = shard.select(targets)
    summaries = []
    progress = targets if len(targets) < 10 else tqdm(targets, desc="null spaces", unit="basis")
    for concept, factor in zip(progress, rows.leave_one_out(targets), strict=True):
        if concept not in local_targets:
            continue
        protected = rows.without(concept)
        basis = NullSpaceBasis.fit(
            [embeds[prompt] for prompt in protected],
            protected,
            config.rank_rtol,
            config.null_space_method,
            factor,
            model.streams,
        )
        made_for = {
            "created_by": CREATED_BY,
            "base_model": model.name,
            **model.encoded_as,
            "category": artifacts.category,
            **concept_metadata(concept),
            "always_protected_weight": config.always_protected_weight,
        }
        basis = replace(basis, metadata=made_for | basis.metadata)
        _save_if_changed(basis, artifacts.basis(concept.label), model)
        summaries.append(_summarize(concept, basis, artifacts.basis(concept.label)))
    return summaries


def concept_metadata(concept: Concept) -> dict[str, Any]:
    """Return what a basis and a shift say of the concept that they are for: its index, or else its other spellings."""
    if not concept.is_own:
        return {"concept_index": concept.index, "concept": concept.name}
    return {"concept": concept.name, "aliases": list(concept.aliases), "concept_kind": concept.kind}


def check_apart(model: TextModel, concepts: Sequence[Concept], protected: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError when a concept's name is protected too, as the model reads it, or is nothing to it.

    `protected` are the embeddings (tokens, d) of the protected prompts.
    """
    tokenizer = model.tokenizers[0]
    for concept in concepts:
        if not set(tokenizer(concept.prompt).input_ids) - set(tokenizer.all_special_ids):
            raise ValueError(
                f"'{concept.prompt}' is nothing to the model, whose tokenizer keeps none of it: name it in other words"
            )
        own = model.embed_prompts([concept.prompt])[concept.prompt]  # (tokens, d)
        for prompt, rows in protected.items():
            if torch.equal(rows, own):
                raise ValueError(
                    f"'{prompt}' is {concept.name} to the model, which cannot be erased and protected at once: leave "
                    "it out of one of both"
                )


def _save_if_changed(basis: NullSpaceBasis, path: Path, model: TextModel) -> None:
    """Keep a file that was made from the same inputs, whose last digits depend on the machine."""
    said = upgrade_digests(read_metadata(path, BASIS_FILE_TYPE), model.digests)
    anew = {name: basis.metadata[name] for name in ("max_leakage", "created_by")}
    if said.get("base_digest") in model.digests[:1]:  # by an older version, which named the whole model
        said.pop("base_digest")
        anew["text_digest"] = model.text_digest
    if said | anew != basis.metadata:
        basis.save(path)


def _summarize(concept: Concept, basis: NullSpaceBasis, path: Path) -> BasisSummary:
    metadata = basis.metadata
    num_protected, nullity = len(metadata["protected"]), len(basis.vectors)
    return BasisSummary(
        concept, path, num_protected, metadata["rank"], metadata["width"], nullity, metadata["max_leakage"]
    )
