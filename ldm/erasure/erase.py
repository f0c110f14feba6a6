"""The one way from concepts to shifts: solve a method's null spaces, erase, and save what was made and its metadata."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from ldm.config.concepts import OWN, OWN_INDEX, Concept, always_protected_prompts, erasable_concepts, image_folder
from ldm.config.methods import (
    NO_GATE,
    ExecutionConfig,
    GateConfig,
    MethodConfig,
    SelfSampledConfig,
    SRSMEConfig,
    TrainedConfig,
)
from ldm.diffusion.latents import latents_from_folder, sampled_batches
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_model import TextModel
from ldm.erasure.effect import anchor_change, measure_effect
from ldm.erasure.gate_fitter import InseparableError, NoGatesError
from ldm.erasure.gate_fitters import AnyGateFitter, make_gate_fitter
from ldm.erasure.gate_prompts import GatePrompts
from ldm.erasure.gated_edit import GatedEdit
from ldm.erasure.initial_shift import initial_shift
from ldm.erasure.key_values import preserved_prompts
from ldm.erasure.leakage import EmbeddingCache, leakage, notify_of_leakage
from ldm.erasure.losses import JointSRSMELoss, SingleConceptLoss, SRSMELoss
from ldm.erasure.methods import LOSSES, SOLVERS, check_settings, made_from
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.protection import Protection, concept_metadata, solve_null_spaces
from ldm.erasure.retain import RetainSet, notify_of_left_out
from ldm.erasure.shift import SHIFT_FILE_TYPE, DenseShift, EmbeddingShift, SeparableShift, WeightShift
from ldm.erasure.summary import OF_EMBEDDINGS, OF_OUTPUTS, ErasureSummary
from ldm.erasure.targets import target_prompts
from ldm.erasure.training import CURVE_COLUMNS, TrainableLoss, fit
from ldm.io.errors import MissingFileError, notify
from ldm.io.files import atomic_write, check_writable, file_digest
from ldm.io.legacy import upgrade_digests
from ldm.io.paths import ArtifactPaths
from ldm.io.sharding import Shard
from ldm.io.tensors import CREATED_BY, read_metadata


def erase(
    model: TextModel,
    artifacts: ArtifactPaths,
    concepts: Sequence[Concept],
    config: MethodConfig,
    protection: Protection,
    image_dir: Path,
    gate: GateConfig = NO_GATE,
    others: Sequence[Concept] | None = None,
    retain: Sequence[str] = (),
) -> list[ErasureSummary]:
    """Erase concepts by one method, solving the null spaces first where it needs them; what is there already is kept.

    The shifts lie at `artifacts.shift(concept.label)`. `image_dir` has a folder of images per concept, for a method
    that trains on them. Returns what `erase_concepts` does.
    """
    check_settings(model, config)  # before any work
    if config.solves_null_space:
        solve_null_spaces(model, artifacts, concepts, protection)
    given: dict[str, Any] = {"gate": gate, "others": others, "retain": retain, "protected": protection.extra_prompts}
    given["preserve"] = protection.concepts
    return erase_concepts(model, artifacts, concepts, config, image_dir, **given)


def erase_concepts(
    model: TextModel,
    artifacts: ArtifactPaths,
    concepts: Sequence[Concept],
    config: MethodConfig,
    image_dir: Path,
    execution: ExecutionConfig = ExecutionConfig(),
    shard: Shard = Shard(),
    gate: GateConfig = NO_GATE,
    others: Sequence[Concept] | None = None,
    retain: Sequence[str] = (),
    protected: Sequence[str] = (),
    preserve: Sequence[Concept] = (),
) -> list[ErasureSummary]:
    """Make and save each concept's shift, but for those that are there from the same inputs; return what each took.

    `image_dir` has a folder of images per concept, which is not asked for when nothing is trained on images. A learning
    curve goes beside each shift as CSV. SRS-ME's shifts get a gate too where `gate` says so. `others` are concepts that
    an erasure should change little unless it is their own: without them those of the category, or of concepts that a
    user names, `concepts` themselves; so are the prompts `retain` of SRS-ME's. No gate takes one of `protected` for its
    concept, prompts that null spaces keep where there are such; UCE and SPEED preserve
    these, and the concepts `preserve`, each but in its own erasure. Of several processes each makes its `shard`. Raises
    ValueError for a missing basis or folder, for settings that make nothing, and for training without a denoiser.
    """
    check_settings(model, config)
    if config.is_joint and shard.rank:
        return []  # one process trains them, since they are trained at once
    if others is None:
        others = concepts if artifacts.category == OWN else erasable_concepts(artifacts.category)
    concepts = list(dict.fromkeys(concepts))
    concepts = concepts if config.is_joint else shard.select(concepts)
    if config.makes_gates_alone:
        gate = gate.with_changes(gate=True)
    kept = RetainSet(model, others, retain), protected, preserve
    erasure = _Erasure(model, artifacts, config, image_dir, execution, gate, *kept)
    if config.solves_null_space:
        for concept in concepts:
            erasure.load_basis(concept)  # before any work, so that one that is missing costs none
    metadata = {concept.label: erasure.build_metadata(concept) for concept in concepts}
    if config.is_joint:
        for entry in metadata.values():
            entry["joint_with"] = [concept.label if concept.is_own else concept.index for concept in concepts]
    missing = []
    for concept in concepts:
        path = artifacts.shift(concept.label)
        existing = upgrade_digests(read_metadata(path, SHIFT_FILE_TYPE), model.digests)
        if made_from(metadata[concept.label], existing, config.name):
            print(f"{concept.name}: {path} is there already, from the same inputs")
        else:
            check_writable(path, "artifacts_dir")
            missing.append(concept)
    rounds = [[concept] for concept in missing]
    if config.is_joint and missing:
        rounds = [list(concepts)]
    if config.makes_gates_alone and missing:
        rounds = [missing]  # which are fitted in batches
    if isinstance(config, SRSMEConfig):
        notify_of_left_out(retain, missing)
    summaries: list[ErasureSummary] = []
    progress = rounds if config.trains or config.makes_gates_alone else tqdm(rounds, desc="shifts", unit="shift")
    for together in progress:
        summaries += erasure.run(together, metadata)
    if config.solves_null_space:
        notify_of_leakage({summary.concept: summary.leakage for summary in summaries})
    return summaries


class _Erasure:
    """One method at work on one model: everything that the concepts of a run share."""

    def __init__(
        self,
        model: TextModel,
        artifacts: ArtifactPaths,
        config: MethodConfig,
        image_dir: Path,
        execution: ExecutionConfig,
        gate: GateConfig,
        retain: RetainSet,
        protected: Sequence[str],
        preserve: Sequence[Concept],
    ):
        self.model, self.artifacts, self.config = model, artifacts, config
        self.image_dir, self.execution = image_dir, execution
        self.gate = gate if isinstance(config, SRSMEConfig) else gate.with_changes(gate=False)
        self.gate_fitter: AnyGateFitter | None = None
        self.retain, self.protected, self.preserve = retain, protected, preserve
        self.cache = EmbeddingCache(model)
        self.bases: dict[str, NullSpaceBasis] = {}

    def load_basis(self, concept: Concept) -> NullSpaceBasis:
        """Return the basis of a concept. Raises ValueError for one that is missing or made for another model."""
        path = self.artifacts.find_basis(concept.label)
        basis = NullSpaceBasis.load(path)
        try:
            basis.check(self.model, path)
            self._check_concept(basis, concept, path)
        except ValueError as error:
            raise MissingFileError(str(error), "basis", **self.artifacts.details(concept.label)) from error
        return basis

    def _check_concept(self, basis: NullSpaceBasis, concept: Concept, path: Path) -> None:
        """Raise ValueError for the basis of another concept, which may protect this one."""
        said = basis.metadata.get("category"), basis.metadata.get("concept_index", OWN_INDEX)
        is_named = not concept.is_own or concept.is_named(str(basis.metadata.get("concept")))
        if said != (self.artifacts.category, concept.index) or not is_named:
            raise ValueError(f"{path} is the basis of {basis.metadata.get('concept')}, not of {concept.name}")

    def build_metadata(self, concept: Concept) -> dict[str, Any]:
        """Return what a shift's file says that it was made from, as far as it is known before it is made."""
        metadata: dict[str, Any] = {
            "created_by": CREATED_BY,
            "method": self.config.name,
            "base_model": self.model.name,
            "category": self.artifacts.category,
            **concept_metadata(concept),
            "prompt": concept.prompt,
            "captions": concept.captions,
            "anchor": concept.anchor_prompt,
            "config": self.config.acting(),
            "dtype": str(self.model.dtype),
        }
        if self.model.digests:
            metadata["base_digest"] = self.model.digests[0]
        else:
            metadata["measured_on"] = "embeddings"
        if isinstance(self.config, SRSMEConfig) and not self.config.trains:
            metadata |= self.model.encoded_as  # to which alone a closed form is bound
        if isinstance(self.config, SRSMEConfig):
            targets = target_prompts(concept, self.config, self.model.tokenizers[0])
            metadata |= self.retain.metadata(targets, concept, self.config)
            if not self.retain.prompts:
                del metadata["config"]["retain_preserve_scale"]  # which weighs nothing
        if self.config.name in SOLVERS:
            metadata["preserved"] = self._preserved(concept)
        if self.gate.gate:
            metadata["gate_config"] = self.gate.to_dict()
            metadata["gate_prompts_digest"] = self._gate_prompts_digest
        if self.config.solves_null_space:
            metadata["basis_digest"] = file_digest(self.artifacts.basis(concept.label))
        if self.config.trains_on_images:
            metadata["data_digest"] = file_digest(image_folder(self.image_dir, concept))
        elif self.config.trains:
            metadata |= self._whole_model.generation_metadata
        return metadata

    @cached_property
    def _gate_prompts_digest(self) -> str:
        """The digest of the prompts that gates leave alone, as far as they are the same for all processes."""
        kept = [*self.protected, *self.retain.prompts]
        return GatePrompts(self.model.tokenizers[0], self.retain.others, kept, self.gate).digest

    @property
    def _whole_model(self) -> DiffusionModel:
        """The model with its denoiser, which training needs."""
        assert isinstance(self.model, DiffusionModel)
        return self.model

    def run(self, concepts: Sequence[Concept], metadata: Mapping[str, dict[str, Any]]) -> list[ErasureSummary]:
        """Make and save the shifts of concepts that are trained together, or of one."""
        start = time.perf_counter()
        if self.config.makes_gates_alone:
            return self._make_gates(concepts, metadata)
        if self.config.needs_null_space:
            self.bases = {concept.label: self.load_basis(concept) for concept in concepts}
        shifts: dict[str, WeightShift] = {}
        losses: dict[str, SingleConceptLoss] = {}
        for concept in concepts:
            initial = self._initial_shift(concept)
            if initial is not None:
                shifts[concept.label] = initial
            if self.config.trains:
                kind = LOSSES[self.config.name]
                arguments = (initial,) if initial is not None else ()
                losses[concept.label] = kind.from_config(self._whole_model, concept, self.config, *arguments)
        curve = pd.DataFrame(columns=CURVE_COLUMNS)
        if losses:
            curve, start = self._train(concepts, list(losses.values()))
            shifts = {index: loss.to_shift() for index, loss in losses.items()}
        seconds = time.perf_counter() - start
        return [
            self._save(concept, shifts[concept.label], metadata[concept.label], curve, seconds) for concept in concepts
        ]

    def _make_gates(self, concepts: Sequence[Concept], metadata: Mapping[str, dict[str, Any]]) -> list[ErasureSummary]:
        """Make and save shifts that are gates alone. Raises NoGatesError when all that can be made are saved."""
        summaries: list[ErasureSummary] = []
        reasons: dict[str, str] = {}
        fitter, start = self._fitter(), time.perf_counter()
        for concept, found in zip(tqdm(concepts, desc="gates", unit="gate"), fitter.fit_all(concepts), strict=True):
            if isinstance(found, ValueError):
                reasons[concept.label] = str(found)
                continue
            curve, shift = pd.DataFrame(columns=CURVE_COLUMNS), EmbeddingShift.none(found)
            summaries.append(self._save(concept, shift, metadata[concept.label], curve, 0.0))
        seconds = round((time.perf_counter() - start) / len(concepts), 1)
        summaries = [replace(summary, seconds=seconds) for summary in summaries]  # which are fitted some at a time
        if reasons:
            raise NoGatesError(reasons, len(summaries))
        return summaries

    def _fitter(self) -> AnyGateFitter:
        """Return what fits the gates of all concepts."""
        if self.gate_fitter is None:
            retained = [prompt for basis in self.bases.values() for prompt in basis.metadata["protected"]]
            retained += [*self.protected, *self.retain.prompts]
            self.gate_fitter = make_gate_fitter(self.model, self.retain.others, retained, self.gate)
        return self.gate_fitter

    def _gated_edit(self, concept: Concept) -> GatedEdit | None:
        """Return the gated edit that erases a concept; None where none is asked for, or no gate tells the concept."""
        if not self.gate.gate:
            return None
        try:
            return self._fitter().fit(concept)
        except InseparableError as error:
            notify(str(error))
            return None

    def _initial_shift(self, concept: Concept) -> SeparableShift | DenseShift | None:
        """Return what a method starts from, or stops at; None for one that starts from the model as it is."""
        if self.config.name in SOLVERS:
            return SOLVERS[self.config.name](self._whole_model, concept, self.config, self._preserved(concept))
        if not isinstance(self.config, SRSMEConfig):
            return None
        shift = initial_shift(self.model, concept, self.config, self.bases[concept.label], self.retain)
        if self.config.max_directions and shift.rank < self.config.max_directions:
            print(
                f"{concept.name}: its projection spans {shift.rank} of the null space's directions, fewer than the "
                f"maximum ({self.config.max_directions}), and all are used"
            )
        return shift

    def _train(self, concepts: Sequence[Concept], losses: Sequence[SingleConceptLoss]) -> tuple[pd.DataFrame, float]:
        """Learn, and return the learning curve and when the first iteration began."""
        second = self.execution.frozen_device
        model = self._whole_model
        frozen = model.replicate_denoiser(torch.device(second)) if second else model
        for loss in losses:
            loss.frozen, loss.checkpointing = frozen, self.execution.gradient_checkpointing
        batches: list[Iterator[Any]] = []
        for concept, loss in zip(concepts, losses, strict=True):
            batches.append(self._batches(concept, loss))
        trained: TrainableLoss = losses[0]
        together = batches[0]
        if self.config.is_joint:
            trained = JointSRSMELoss([loss for loss in losses if isinstance(loss, SRSMELoss)])
            together = (tuple(zip(*parts, strict=True)) for parts in zip(*batches, strict=False))
        for concept in concepts:
            self.cache.get([*self._protected(concept), concept.prompt])
        model.offload()
        start = time.perf_counter()
        title = "erase " + ", ".join(concept.name for concept in concepts)
        assert isinstance(self.config, TrainedConfig)
        return fit(trained, together, self.config, title), start

    def _batches(self, concept: Concept, loss: SingleConceptLoss) -> Iterator[Any]:
        config = self.config
        assert isinstance(config, TrainedConfig)
        if isinstance(config, SelfSampledConfig):
            scope: Any = loss.edited_model
            return sampled_batches(self._whole_model, loss.target_embeds, config, scope)
        details = {"category": self.artifacts.category, "concept": concept.name}
        folder = image_folder(self.image_dir, concept)
        return latents_from_folder(self._whole_model, folder, config.train_batch_size, config.seed, **details)

    def _preserved(self, concept: Concept) -> list[str]:
        return preserved_prompts(concept, self.config, self.preserve, self.protected, self.model.tokenizers[0])

    def _protected(self, concept: Concept) -> list[str]:
        if self.config.solves_null_space:
            return self.bases[concept.label].metadata["protected"]
        kept = [*self.protected, *self.retain.prompts] if self.config.makes_gates_alone else []
        return list(dict.fromkeys([*always_protected_prompts(), *kept, *self._preserved(concept)]))

    def _save(
        self, concept: Concept, shift: WeightShift, metadata: dict[str, Any], curve: pd.DataFrame, seconds: float
    ) -> ErasureSummary:
        """Write a shift and its learning curve, and return what it took and its measured leakage."""
        path = self.artifacts.shift(concept.label)
        with atomic_write(path.with_suffix(".csv")) as partial:
            curve.to_csv(partial, index=False)
        metadata = metadata | {"iterations": len(curve)}
        if self.config.solves_null_space:
            basis = self.bases[concept.label].metadata
            metadata |= {name: basis[name] for name in ("protected", "rank", "rank_rtol")}
        if self.config.makes_gates_alone:
            metadata["protected"] = self._protected(concept)
        else:
            start = time.perf_counter()
            shift.gated = self._gated_edit(concept)
            seconds += time.perf_counter() - start
        changes = self._measure(concept, shift)
        target_change = changes.pop(concept.prompt)
        max_leakage = max(changes.values())
        effects = self._effects(concept, shift)
        names = OF_OUTPUTS if self.model.digests else OF_EMBEDDINGS
        measured: dict[str, float] = dict(zip(names, (target_change, max_leakage), strict=True))
        if self.config.trains and isinstance(self.config, SRSMEConfig):
            measured["anchor_change"] = anchor_change(self.model, concept)
        metadata |= {name: value for name, value in measured.items() if math.isfinite(value)}
        shift.save(path, metadata | ({"effects": effects} if effects else {}))
        momentum = float(curve.momentum.iloc[-1]) if len(curve) else math.nan
        report = shift.gated.report if shift.gated else {}
        gap, alarms = report.get("gap", math.nan), report.get("false_alarms", [])[:2]
        counts = " of ".join(map(str, alarms))
        took = concept.name, len(curve), round(seconds, 1), momentum
        effect = (effects.get("gated") or effects.get("linear") or {}).get("mean", math.nan)
        return ErasureSummary(*took, effect, target_change, max_leakage, gap, counts, changes)

    def _effects(self, concept: Concept, shift: WeightShift) -> dict[str, dict[str, Any]]:
        """Return the effect of a shift in each form in which it can act; nothing where that is not known.

        A trained change of weights is not judged by it: it turns the outputs away, and not towards an anchor.
        """
        effects: dict[str, dict[str, Any]] = {}
        config, forms = self.config, ["gated"] if shift.gated else []
        if not isinstance(config, SRSMEConfig):
            return effects
        for form in [*(["linear"] if not config.trains and shift.rank else []), *forms]:
            said = measure_effect(self.model, concept, shift, config, form).to_dict()
            if said:
                effects[form] = said
        return effects

    def _measure(self, concept: Concept, shift: WeightShift) -> dict[str, float]:
        """Return the leakage of a shift on its own and the protected prompts; NaN where text layers do not say all."""
        if shift.gated and shift.is_gate_alone:
            own = EmbeddingCache(self.model).gate_leakage(shift.gated, [concept.prompt])  # not kept for the next one
            return self.cache.gate_leakage(shift.gated, self._protected(concept)) | own
        embeds, norms = self.cache.get([concept.prompt, *self._protected(concept)])
        rows = leakage(self.cache.layers, {"": shift}, embeds, norms)
        return {row["prompt"]: row["leakage"] for row in rows}
