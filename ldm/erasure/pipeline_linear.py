"""The linear form of `ConceptEraser(pipe)`: concepts are erased in the weights of the pipeline's text layers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from ldm.config.concepts import Concept, always_protected_prompts
from ldm.config.methods import SRSMEConfig
from ldm.config.models import SettingsSource, load_model_config
from ldm.config.templates import fill_anchor, load_template_set
from ldm.diffusion.families import base_pipeline
from ldm.diffusion.in_place import InPlaceWeights, Weights
from ldm.diffusion.pipeline_encoder import PipelineEncoder
from ldm.diffusion.pipeline_model import PipelineModel
from ldm.erasure.initial_shift import initial_shift
from ldm.erasure.merge import SummedShifts
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.pipeline_eraser import Kept, PipelineEraser, Reports
from ldm.erasure.protection import check_apart
from ldm.erasure.retain import RetainSet
from ldm.erasure.shift import WeightShift
from ldm.erasure.targets import anchor_embeds, held_out_prompts, replaces_name, target_prompts
from ldm.io.files import SETTINGS_FILE

_MARK = "_erased_concepts"  # of a denoiser, whose weights are edited: by what texts
_QUIET_SECONDS = 1.5  # before a progress bar shows


class LinearPipelineEraser(PipelineEraser):
    """A pipeline and the concepts that are erased from it by shifts of its text layers' weights, in closed form.

    The weights are changed where they lie, under a LoRA too, and copies of them are kept on the CPU: `restore` puts
    back the very bits. Whoever else uses the denoiser has the concepts erased too, and a pipeline is saved as it is.
    Shifts leave the protected prompts alone; `config` says how they are made, and `null_space` how exactly.
    """

    form: ClassVar[str] = "linear"
    measured: ClassVar[tuple[str, ...]] = ("target_change", "max_leakage_protected", "distance_left")

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__(pipe)
        own = Path(str(getattr(pipe, "name_or_path", "") or "")) / SETTINGS_FILE  # of the folder that it was read from
        source = SettingsSource(base_pipeline(pipe), own if own.is_file() else None)
        defaults = load_model_config(source)
        settings = defaults.methods[SRSMEConfig.name]
        assert isinstance(settings, SRSMEConfig)
        self.config, self.null_space = settings, defaults.null_space
        self._weights = InPlaceWeights(pipe, self._encoder.adapter.denoiser)
        self._made_for: Hashable = None  # what the shifts depend on beside the concepts
        self._shifts: dict[Concept, WeightShift] = {}
        self._reports: dict[Concept, dict[str, float]] = {}
        self._retain: tuple[Hashable, RetainSet] | None = None  # for text encoders in one state, and prompts
        self._active: list[WeightShift] = []
        self._merged: tuple[list[WeightShift], Weights, Weights] = [], {}, {}  # shifts, weights without and with them

    def _fit(self, concepts: Mapping[str, Concept], kept: Kept) -> Reports:
        if self.config.trains:
            raise ValueError("a pipeline's weights are changed in closed form: set `mode` closed_form in `config`")
        self._check_own()
        if not self._concepts:
            self._weights.forget()  # what they were at an earlier time
        fingerprint = PipelineEncoder.of(self._pipe).fingerprint()
        made_for = fingerprint, kept, self.config, self.null_space
        if made_for != self._made_for or not set(concepts.values()) <= set(self._shifts):
            with self.original():
                self._weights.base()  # before any work, so that weights out of reach cost none
                self._make(PipelineModel.of(self._pipe), fingerprint, list(concepts.values()), kept)
            self._made_for = made_for
        return {text: self._reports[concept] for text, concept in concepts.items()}

    def _sync(self) -> None:
        active = [] if self._originals else [self._shifts[concept] for concept in self._concepts.values()]
        if active != self._active:
            self._weights.write(self._merge(active) if active else None)
            self._active = active
            if not self._concepts:
                self._weights.forget()
                self._merged = [], {}, {}
        if self._concepts:
            setattr(self._weights.denoiser, _MARK, tuple(self._concepts))
        else:
            vars(self._weights.denoiser).pop(_MARK, None)

    def _check_own(self) -> None:
        """Raise ValueError where another pipeline's eraser has changed the denoiser that this one has too."""
        found = vars(self._weights.denoiser).get(_MARK)
        if found and not self._concepts:
            raise ValueError(
                f"the denoiser of this pipeline is another one's too, from which {', '.join(found)} are erased: erase "
                "from that pipeline, or restore them there"
            )

    def _merge(self, shifts: list[WeightShift]) -> Weights:
        """Return the weights with the shifts in them, rounded once to their dtype."""
        base = self._weights.base()
        if self._merged[0] != shifts or self._merged[1] is not base:
            summed = SummedShifts(shifts, self._weights.layers())
            merged = {name: summed.merged(weight, f"{name}.weight") for name, weight in base.items()}
            self._merged = shifts, base, merged
        return self._merged[2]

    def _make(self, model: PipelineModel, fingerprint: Hashable, concepts: Sequence[Concept], kept: Kept) -> None:
        """Make the shifts of all concepts, each of which leaves the others alone, and measure what they do together.

        The pipeline is without any of them meanwhile.
        """
        prompts = list(dict.fromkeys([*always_protected_prompts(), *kept.protected]))
        protected = model.embed_prompts(prompts)  # (tokens, d) each
        check_apart(model, concepts, protected)
        if not model.adapter.reads_negatives_alike:
            protected["the empty negative prompt"] = model.layer_inputs(model.encode_uncond())[0]
        settings = self.null_space.rank_rtol, self.null_space.null_space_method
        basis = NullSpaceBasis.fit(list(protected.values()), list(protected), *settings, streams=model.streams)
        retained_by = fingerprint, kept.retained
        if self._retain is None or self._retain[0] != retained_by:
            self._retain = retained_by, RetainSet(model, concepts, kept.retained)
        retain = self._retain[1]
        retain.others = concepts
        shifts: dict[Concept, WeightShift] = {}
        for concept in tqdm(concepts, desc="shifts", unit="shift", delay=_QUIET_SECONDS, leave=False):
            shifts[concept] = initial_shift(model, concept, self.config, basis, retain)
        merged = self._merge(list(shifts.values()))
        leakage = float(self._leakage(merged, torch.stack(list(protected.values())).cpu()).max())
        reports: dict[Concept, dict[str, float]] = {}
        for concept in concepts:
            reports[concept] = self._measure(model, concept, merged) | {
                "max_leakage_protected": float(f"{leakage:.2g}")
            }
        self._shifts, self._reports = shifts, reports

    def _measure(self, model: PipelineModel, concept: Concept, merged: Weights) -> dict[str, float]:
        """Return how much the outputs of a concept's held-out prompts change, and how much of the way to their anchors'
        is left, as `embedding_map.mean_distance_left` says it of embeddings: here it is of the text layers' outputs.
        """
        base, tokenizer, neutral = self._weights.base(), model.tokenizers[0], load_template_set(concept.kind).neutral
        anchors = target_prompts(concept, self.config, tokenizer)
        templates = held_out_prompts(concept, tokenizer)
        if templates and replaces_name(concept, self.config):
            anchors = {text: fill_anchor(template, concept.anchor, neutral) for text, template in templates.items()}
        elif templates:
            anchors = dict.fromkeys(templates, next(iter(anchors.values())))
        embeds = torch.stack(list(model.embed_prompts(anchors).values())).cpu()  # (P, tokens, d)
        aims = anchor_embeds(model, anchors, replaces_name(concept, self.config)).cpu().expand_as(embeds)
        way, remaining = torch.zeros(len(embeds)), torch.zeros(len(embeds))  # of all layers, for each prompt
        layers = self._weights.layers()
        for name, weight in base.items():
            base_weight, merged_weight = (layers.as_rows(name, each.float()) for each in (weight, merged[name]))
            before = (embeds - aims) @ base_weight.T  # (P, rows, out)
            after = embeds @ merged_weight.T - aims @ base_weight.T
            way += before.square().sum((1, 2))
            remaining += (before * after).sum((1, 2))
        left = remaining[way > 0] / way[way > 0]
        return {
            "target_change": round(float(self._leakage(merged, embeds).mean()), 3),
            "distance_left": round(float(left.mean()), 3) if len(left) else 1.0,
        }

    def _leakage(self, merged: Weights, rows: torch.Tensor) -> torch.Tensor:
        """Return the relative change of all layers' outputs for prompts with rows (P, T + 1, d + p), (P,)."""
        layers, changed, norms = self._weights.layers(), torch.zeros(len(rows)), torch.zeros(len(rows))
        for name, weight in self._weights.base().items():
            base_weight, merged_weight = (layers.as_rows(name, each.float()) for each in (weight, merged[name]))
            norms += (rows @ base_weight.T).square().sum((1, 2))
            changed += (rows @ (merged_weight - base_weight).T).square().sum((1, 2))
        return (changed / norms).sqrt()
