"""The Python API: a model whose concepts are erased and restored by name."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from diffusers import DiffusionPipeline

from ldm.config.concepts import Concept, erasable_concepts, find_by_name
from ldm.config.methods import METHODS, EditConfig, ExportConfig, SamplingConfig, did_you_mean
from ldm.config.models import ModelConfig, load_model_config
from ldm.diffusion.load import load_model
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import generate
from ldm.erasure.erase import ErasureSummary, erase
from ldm.erasure.export import Export, export
from ldm.erasure.merge import edited
from ldm.erasure.pipeline_eraser import PipelineEraser
from ldm.erasure.protection import Protection
from ldm.erasure.shift import WeightShift
from ldm.io.paths import ArtifactPaths, merge_name
from ldm.io.prompts import PromptCase

if TYPE_CHECKING:
    from PIL import Image


class ConceptEraser:
    """A model and the concepts of a category that are erased from it. The base weights are never changed.

    Shifts are kept below `artifacts_dir` and made once: a concept that is erased again gets the same one. Each leaves
    all other concepts of the category alone, the empty prompt and the watermarks. In the `form` gated they act on the
    prompts that say the concepts and on no other, in the form linear on the weights; by default as the model's config.

    Given a pipeline of diffusers instead of a model, this is the `PipelineEraser` of it.
    """

    @overload
    def __new__(cls, model: DiffusionPipeline) -> PipelineEraser: ...

    @overload
    def __new__(
        cls,
        model: DiffusionModel | str | Path,
        category: str = "style",
        artifacts_dir: Path | str = "artifacts",
        device: torch.device | str | None = None,
        form: str | None = None,
    ) -> Self: ...

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Self | PipelineEraser:
        """Return an eraser of the kind that goes with what it is given, which is nothing where one is copied."""
        if not isinstance(model, DiffusionPipeline):
            return super().__new__(cls)
        if args or kwargs:
            raise ValueError(
                "with a pipeline `ConceptEraser` takes nothing else: concepts are named when they are erased"
            )
        return PipelineEraser.of(model)

    def __init__(  # pyright: ignore[reportInconsistentConstructor] - which never sees a pipeline
        self,
        model: DiffusionModel | str | Path,
        category: str = "style",
        artifacts_dir: Path | str = "artifacts",
        device: torch.device | str | None = None,
        form: str | None = None,
    ):
        device = torch.device(device) if device else None
        self.model = model if isinstance(model, DiffusionModel) else load_model(model, device)
        self.category = category
        self.config: ModelConfig = load_model_config(self.model)
        self.form = EditConfig(form or self.config.edit.form).form
        self.artifacts_dir = Path(artifacts_dir)
        self.shifts: dict[str, WeightShift] = {}

    @property
    def erased(self) -> list[str]:
        """The names of the concepts that are erased now."""
        names = {str(concept.index): concept.name for concept in erasable_concepts(self.category)}
        return [names[label] for label in self.shifts]

    def erase(self, *names: str, method: str = "SRS-ME", image_dir: Path | str = "data") -> list[ErasureSummary]:
        """Erase concepts by name, and return what each new shift took and its measured leakage.

        `image_dir` has a folder of images per concept, for a method that trains on them. Raises ValueError for a name
        that is no concept of the category, and for an unknown method.
        """
        if method not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(f"'{method}' is no method{did_you_mean(method, list(METHODS))}: choose from {known}")
        concepts = list(dict.fromkeys(self._concept(name) for name in names))
        artifacts = ArtifactPaths(self.artifacts_dir, method, self.model.name, self.category, 1, 0)  # as the scripts do
        protection = Protection(erasable_concepts(self.category), self.config.null_space)
        settings = self.config.methods[method], protection, Path(image_dir), self.config.gate
        summaries = erase(self.model, artifacts, concepts, *settings)
        for concept in concepts:
            shift = WeightShift.load(artifacts.shift(concept.index))
            shift.check(self.model.digests, self.model.unet)
            self.shifts[str(concept.index)] = shift
        self.shifts = dict(sorted(self.shifts.items(), key=lambda item: int(item[0])))
        return summaries

    def restore(self, *names: str) -> None:
        """Restore concepts by name: their shifts are left out. Raises ValueError for one that is not erased."""
        labels = {str(self._concept(name).index): name for name in names}
        for label, name in labels.items():
            if label not in self.shifts:
                raise ValueError(f"{name} is not erased: erased are {', '.join(self.erased) or 'none'}")
        for label in labels:
            del self.shifts[label]

    @contextmanager
    def applied(self) -> Generator[None]:
        """While the block runs, let `model` be without the erased concepts; then it is the base model, bit for bit."""
        with edited(self.model, self.shifts, self.form):
            yield

    def generate(
        self, prompt: str, seeds: Sequence[int] = (0,), sampling: SamplingConfig | None = None
    ) -> list[Image.Image]:
        """Return an image of the prompt for each seed, by the model as it stands."""
        requests = [(PromptCase(prompt, seed, number), 0) for number, seed in enumerate(seeds)]
        with self.applied():
            return [image for _, _, image in generate(self.model, requests, sampling or self.config.sampling)]

    def export(self, output_dir: Path | str, config: ExportConfig = ExportConfig()) -> Export:
        """Write the model as it stands below `output_dir`, in the formats of `config`.

        Raises ValueError when nothing is erased.
        """
        if not self.shifts:
            raise ValueError("nothing is erased: the weights are the base model's")
        prompts = ["", *(concept.prompt for concept in erasable_concepts(self.category))]
        target = Path(output_dir) / f"{self.model.name}-{merge_name(self.shifts)}"
        rounds = config.save_dtype != "float32"  # which an export does to the model that it is given
        return export(deepcopy(self.model) if rounds else self.model, self.shifts, target, config, prompts)

    def _concept(self, name: str) -> Concept:
        concept = find_by_name(self.category, str(name))
        if concept is None or concept.is_watermark:
            names = ", ".join(known.name for known in erasable_concepts(self.category))
            raise ValueError(f"'{name}' is no {self.category} concept: choose from {names}")
        return concept
