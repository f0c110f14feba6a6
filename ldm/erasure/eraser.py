"""The Python API: a model whose concepts are erased and restored by name."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from diffusers import DiffusionPipeline

from ldm.config.concept_lists import make_concept, read_prompts
from ldm.config.concepts import Concept, erasable_concepts, find_by_name
from ldm.config.methods import METHODS, NO_GATE, EditConfig, ExportConfig, SamplingConfig
from ldm.config.models import ModelConfig, load_model_config
from ldm.config.settings import did_you_mean
from ldm.diffusion.load import load_model
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.api import export, find_label, generate, make_own_shifts
from ldm.erasure.contradictions import check_contradictions
from ldm.erasure.effect import advice_on_weak, notify_of_weak
from ldm.erasure.erase import erase
from ldm.erasure.export import Export
from ldm.erasure.merge import check_unedited, edited
from ldm.erasure.pipeline_concepts import names_all
from ldm.erasure.pipeline_eraser import PipelineEraser
from ldm.erasure.pipeline_gated import GatedPipelineEraser
from ldm.erasure.pipeline_linear import LinearPipelineEraser
from ldm.erasure.protection import Protection
from ldm.erasure.shift import WeightShift
from ldm.erasure.summary import ErasureSummary
from ldm.io.paths import ArtifactPaths, merge_name

if TYPE_CHECKING:
    from PIL import Image


class ConceptEraser:
    """A model and the concepts of a category that are erased from it. The base weights are never changed.

    Shifts are kept below `artifacts_dir` and made once: a concept that is erased again gets the same one. Each leaves
    all other concepts of the category alone, or of the user's own the others of these, the empty prompt and the
    watermarks. In the `form` gated they act on the
    prompts that say the concepts and on no other, in the form linear on the weights; by default as the model's config.

    Given a pipeline of diffusers instead of a model, this is the `PipelineEraser` of it: the one that has erased
    something from it now, or a new one, whose `form` is gated where none is given.
    """

    @overload
    def __new__(cls, model: DiffusionPipeline, *, form: Literal["linear"]) -> LinearPipelineEraser: ...

    @overload
    def __new__(cls, model: DiffusionPipeline, *, form: Literal["gated"] = "gated") -> GatedPipelineEraser: ...

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
        if args or kwargs.keys() - {"form"}:
            raise ValueError(
                "with a pipeline `ConceptEraser` takes nothing but a `form`: concepts are named when they are erased"
            )
        return _pipeline_eraser(model, kwargs.get("form"))

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
        return [str(shift.metadata["concept"]) for shift in self.shifts.values()]

    def erase(
        self,
        *names: str | Sequence[str],
        method: str = "SRS-ME",
        image_dir: Path | str = "data",
        protect: Sequence[str] | str = (),
        retain: Sequence[str] | str = (),
        **options: Any,
    ) -> list[ErasureSummary]:
        """Erase concepts by name, and return what each new shift took and its measured leakage.

        A name of the category is its concept, whose shift leaves all others of the category alone. Any other is a
        concept of the user's own, which is erased as by `ldm.erase`, with further `options`. `protect` are prompts that
        stay as they are too, and `retain` those that change little, as in `ldm.erase`. `image_dir` has a folder of
        images per concept, for a method that trains on them. Raises ValueError, and erases nothing, for an unknown
        method, a watermark, and what contradicts itself.
        """
        if method not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(f"'{method}' is no method{did_you_mean(method, list(METHODS))}: choose from {known}")
        texts = _flat(names)
        listed = [concept for concept in map(self._listed, texts) if concept is not None]
        own = [name for name in texts if self._listed(name) is None]
        if options and not own:
            raise ValueError(
                f"`{next(iter(options))}` goes with concepts of your own: {', '.join(texts)} is of the category "
                f"{self.category}, which the model's config has settings for"
            )
        protected = [protect] if isinstance(protect, str) else list(protect)
        retained = [retain] if isinstance(retain, str) else list(retain)
        kept = read_prompts(protected), read_prompts(retained, "retain")
        shifts, summaries = self._make_listed(list(dict.fromkeys(listed)), *kept, method, Path(image_dir))
        if own:
            options = {"gate": self.form == "gated", **options}
            options |= {"method": method, "artifacts_dir": self.artifacts_dir, "training_image_dir": image_dir}
            options["retain"] = retained
            own_shifts, took = make_own_shifts(self.model, own, [*protected, *self._own_concepts()], **options)
            shifts, summaries = shifts | own_shifts, summaries + took
        shifts = self.shifts | shifts
        labels = sorted((label for label in shifts if label.isdigit()), key=int)
        labels += [label for label in shifts if not label.isdigit()]
        self.shifts = {label: shifts[label] for label in labels}
        return summaries

    def _make_listed(
        self, concepts: Sequence[Concept], prompts: Sequence[str], retain: Sequence[str], method: str, image_dir: Path
    ) -> tuple[dict[str, WeightShift], list[ErasureSummary]]:
        """Return a shift for each of some concepts of the category, by label, and what each new one took."""
        if not concepts:
            return {}, []
        check_unedited(self.model)
        check_contradictions(self.model, concepts, prompts)
        artifacts = ArtifactPaths(self.artifacts_dir, method, self.model.name, self.category, 1, 0)  # as the scripts do
        protection = Protection(erasable_concepts(self.category), self.config.null_space, prompts)
        gate = self.config.gate if self.form == "gated" else NO_GATE
        settings = self.config.methods[method], protection, image_dir, gate
        summaries = erase(self.model, artifacts, concepts, *settings, retain=retain)
        shifts: dict[str, WeightShift] = {}
        for concept in concepts:
            shift = WeightShift.load(artifacts.shift(concept.label)).in_memory()
            shift.check(self.model)
            shifts[concept.label] = shift.on(self.model.text_layers)
        edit = self.config.edit.with_changes(form=self.form)
        notify_of_weak(shifts, edit, advice_on_weak(self.config.methods[method]))
        return shifts, summaries

    def restore(self, *names: str | Sequence[str]) -> None:
        """Restore concepts by name, or `all`: leave their shifts out. Raises ValueError for one that is not erased."""
        texts = _flat(names)
        texts = self.erased if names_all(texts, find_label(self.shifts, "all")) else texts
        labels = {find_label(self.shifts, name): name for name in texts}
        for label, name in labels.items():
            if label is None:
                near = did_you_mean(name, self.erased)
                raise ValueError(f"{name} is not erased{near}: erased are {', '.join(self.erased) or 'none'}")
        self.shifts = {label: shift for label, shift in self.shifts.items() if label not in labels}

    @contextmanager
    def applied(self) -> Generator[None]:
        """While the block runs, let `model` be without the erased concepts; then it is the base model, bit for bit."""
        if self.shifts and self.model.edited_by == tuple(self.shifts):  # by a block around this one
            yield
            return
        with edited(self.model, self.shifts, self.form):
            yield

    def generate(
        self, prompt: str, seeds: Sequence[int] = (0,), sampling: SamplingConfig | None = None
    ) -> list[Image.Image]:
        """Return an image of the prompt for each seed, by the model as it stands."""
        with self.applied():
            return generate(self.model, prompt, seeds, sampling or self.config.sampling)

    def export(self, output_dir: Path | str, config: ExportConfig = ExportConfig()) -> Export:
        """Write the model as it stands below `output_dir`, in the formats of `config`.

        Raises ValueError when nothing is erased.
        """
        if not self.shifts:
            raise ValueError("nothing is erased: the weights are the base model's")
        target = Path(output_dir) / f"{self.model.name}-{merge_name(self.shifts)}"
        prompts = [concept.prompt for concept in erasable_concepts(self.category)]
        return export(self.model, self.shifts, target, config, prompts)

    def _own_concepts(self) -> list[Concept]:
        """Return the user's own concepts that are erased, which the shifts of further ones leave alone."""
        concepts = []
        for label, shift in self.shifts.items():
            if not label.isdigit():
                metadata = shift.metadata
                concepts.append(
                    make_concept(metadata["concept"], metadata.get("concept_kind"), metadata.get("aliases", ()))
                )
        return concepts

    def _listed(self, name: str) -> Concept | None:
        """Return the concept of the category that a text names; None for none. Raises ValueError for a watermark."""
        concept = find_by_name(self.category, str(name))
        if concept is not None and concept.is_watermark:
            raise ValueError(f"'{name}' is a watermark, which every shift protects: erase another concept")
        return concept


def _flat(names: Sequence[str | Sequence[str]]) -> list[str]:
    """Return the names of which some may be in lists."""
    flat: list[str] = []
    for name in names:
        flat += [name] if isinstance(name, str) else name
    return flat


def _pipeline_eraser(pipe: DiffusionPipeline, form: str | None) -> PipelineEraser:
    """Return the eraser of a pipeline: the one that has erased something from it now, or a new one.

    Raises ValueError for one of another form, and for a pipeline that does not encode prompts as a known family does.
    """
    form = form if form is None else EditConfig(form).form
    existing = PipelineEraser.of(pipe)
    if existing is None:
        return LinearPipelineEraser(pipe) if form == "linear" else GatedPipelineEraser(pipe)
    if form not in (None, existing.form):
        raise ValueError(
            f"{', '.join(existing.erased)} are erased from this pipeline in the `form` {existing.form}: restore them "
            f"before you erase in the `form` {form}"
        )
    return existing
