"""The functions of the Python API: `from ldm import load_model, erase, applied, generate, export`.

Five lines from a model to an image and to a file. They call what the scripts call.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.config.concept_lists import read_concepts, read_prompts
from ldm.config.concepts import OWN, Concept, is_one_of
from ldm.config.methods import (
    ANCHORS,
    METHODS,
    NO_GATE,
    EditConfig,
    ExportConfig,
    MethodConfig,
    SamplingConfig,
)
from ldm.config.models import load_model_config, with_asked
from ldm.config.settings import did_you_mean
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import generate as sample
from ldm.erasure.contradictions import check_contradictions
from ldm.erasure.effect import advice_on_weak, notify_of_weak
from ldm.erasure.erase import erase as make_shifts
from ldm.erasure.export import Export
from ldm.erasure.export import export as write_formats
from ldm.erasure.merge import check_unedited, edited, spellings_of
from ldm.erasure.portable import take_shifts
from ldm.erasure.protection import Protection
from ldm.erasure.shift import WeightShift
from ldm.erasure.summary import ErasureSummary
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import PromptCase

if TYPE_CHECKING:
    from PIL import Image


def erase(
    model: DiffusionModel,
    concepts: Sequence[str | Concept] | str,
    protect: Sequence[str | Concept] | str = (),
    **options: Any,
) -> dict[str, WeightShift]:
    """Return a shift for each concept, by its label: what erases it from the model, which is not changed.

    A concept is a text, such as "Greg Rutkowski", or a .csv, .yaml or .txt file of them. They protect each other;
    `protect` are prompts, or files of them, or concepts, that stay as they are too. What was measured of each is in its
    `metadata`: `target_change`, `max_leakage_protected`, and in `effects`, by form, how far prompts that say it go to
    what takes its place. A notice names those for which that is too little to be called erased: they are in what is
    returned too. `options` are those of `make_own_shifts`. Raises ValueError for what contradicts itself.
    """
    return make_own_shifts(model, concepts, protect, **options)[0]


def make_own_shifts(
    model: DiffusionModel,
    concepts: Sequence[str | Concept] | str,
    protect: Sequence[str | Concept] | str = (),
    kind: str | None = None,
    anchor: str | None = None,
    method: str = "SRS-ME",
    artifacts_dir: Path | str = "artifacts",
    training_image_dir: Path | str = "data",
    retain: Sequence[str] | str = (),
    **settings: Any,
) -> tuple[dict[str, WeightShift], list[ErasureSummary]]:
    """Return what `erase` does, and what each new shift took.

    `kind` says what kind of thing the concepts are (style, object, person, brand, generic), `anchor` what takes their
    place: a text such as "a painting", or a setting (empty, category, neutral). `settings` are those of the `method`,
    or of its null spaces and gates, in place of the model's own: one of training, such as `lr`, asks for training.
    `retain` are prompts, or files of them, that shifts change little though nothing protects them exactly, by the
    setting `retain_preserve_scale`, and that trip no gate; those that say a concept are left out where it is erased.
    Shifts are kept below `artifacts_dir`, where one that is there from the same inputs is taken; `training_image_dir`
    has a folder of images per concept, for a method that trains on them.
    """
    if method not in METHODS:
        near = did_you_mean(method, list(METHODS))
        raise ValueError(f"'{method}' is no method{near}: choose from {', '.join(METHODS)}")
    _check_model(model)
    check_unedited(model)
    if anchor in ANCHORS:
        settings["anchor"], anchor = anchor, None
    named = _as_concepts(concepts, kind, anchor)
    given = [protect] if isinstance(protect, str) else list(protect)
    prompts = read_prompts([text for text in given if isinstance(text, str)])
    check_contradictions(model, named, prompts)
    labels = {concept.label for concept in named}
    others = [other for other in given if isinstance(other, Concept) and other.label not in labels]
    model_config = load_model_config(model)
    configs = [model_config.methods[method], model_config.null_space, model_config.gate]
    config, null_space, gate = _with_changes(configs, settings)
    if "gate" not in settings and model_config.edit.form != "gated":
        gate = NO_GATE
    artifacts = ArtifactPaths(Path(artifacts_dir), method, model.name, OWN, 1, 0)  # as the scripts do
    everything, retained = [*named, *others], read_prompts([retain] if isinstance(retain, str) else retain, "retain")
    protection = Protection(everything, null_space, prompts)
    image_dir = Path(training_image_dir)
    took = make_shifts(model, artifacts, named, config, protection, image_dir, gate, everything, retained)
    shifts: dict[str, WeightShift] = {}
    for concept in named:  # whole, since the same concept with other settings is written to the same file
        shift = WeightShift.load(artifacts.shift(concept.label)).in_memory()
        shifts[concept.label] = shift.on(model.text_layers)
    edit = model_config.edit if gate.gate else model_config.edit.with_changes(form="linear")
    notify_of_weak(shifts, edit, advice_on_weak(config))
    return shifts, took


def _as_concepts(concepts: Sequence[str | Concept] | str, kind: str | None, anchor: str | None) -> list[Concept]:
    """Return the concepts that texts and files name. Raises ValueError for none."""
    given = [concepts] if isinstance(concepts, str) else list(concepts)
    named = read_concepts([text for text in given if isinstance(text, str)], kind, anchor)
    named += [concept for concept in given if isinstance(concept, Concept)]
    if not named:
        raise ValueError("no concept to erase: give texts, such as 'Greg Rutkowski'")
    return named


def _with_changes(configs: Sequence[Any], settings: Mapping[str, Any]) -> list[Any]:
    """Return settings, each with those changes that it has a field for. Raises ValueError for one that none has."""
    known = [set(config.to_dict()) for config in configs]
    for name in settings:
        if not any(name in names for names in known):
            near = did_you_mean(name, sorted(set().union(*known)))
            raise ValueError(f"no setting {name}{near}: see configs/README.md for those that there are")
    changed = []
    for config, names in zip(configs, known, strict=True):
        own = {name: value for name, value in settings.items() if name in names}
        changed.append(with_asked(config, own) if isinstance(config, MethodConfig) else config.with_changes(**own))
    return changed


@contextmanager
def applied(model: DiffusionModel, shifts: Mapping[str, WeightShift], form: str | None = None) -> Generator[None]:
    """While the block runs, let the model be without what `shifts` erase; then it is the base model, bit for bit.

    In the `form` gated they act on the prompts that say the concepts and on no other, in the form linear on the
    weights; without one as the model's settings say. Raises ValueError for a shift of another model.
    """
    _check_model(model)
    taken = take_shifts(model, _checked_shifts(shifts))
    with edited(model, taken, EditConfig(form or load_model_config(model).edit.form).form):
        yield


def generate(
    model: DiffusionModel, prompt: str, seeds: Sequence[int] = (0,), sampling: SamplingConfig | None = None
) -> list[Image.Image]:
    """Return an image of the prompt for each seed, by the model as it stands: within `applied`, the edited one."""
    _check_model(model)
    requests = [(PromptCase(prompt, seed, number), 0) for number, seed in enumerate(seeds)]
    sampling = sampling or load_model_config(model).sampling
    return [image for _, _, image in sample(model, requests, sampling)]


def export(
    model: DiffusionModel,
    shifts: Mapping[str, WeightShift],
    output_dir: Path | str,
    formats: Sequence[str] | str | ExportConfig = ("diffusers",),
    prompts: Sequence[str] = (),
    **settings: Any,
) -> Export:
    """Write the model without what `shifts` erase, in `formats`: into `output_dir`, or `output_dir`-FORMAT.

    `formats` are names, or an `ExportConfig`; `settings` are further fields of that. The leakage of each shift is
    measured on the concepts' own names and on `prompts`, and a notice names concepts that their shifts do not erase.
    The model stays as it is. Raises ValueError for no shift, and for what a format cannot hold.
    """
    _check_model(model)
    shifts = take_shifts(model, _checked_shifts(shifts))
    names = [str(shift.metadata.get("prompt", "")) for shift in shifts.values()]
    if isinstance(formats, ExportConfig):
        config = formats.with_changes(**settings)
    else:
        config = ExportConfig((formats,) if isinstance(formats, str) else tuple(formats)).with_changes(**settings)
    # An export leaves the model that it is given in the dtype that it writes.
    is_kept = model.dtype == torch.float32 and config.save_dtype == "float32"
    measured = list(dict.fromkeys(["", *names, *prompts]))
    return write_formats(model if is_kept else deepcopy(model), shifts, Path(output_dir), config, measured)


def _check_model(model: Any) -> None:
    """Raise ValueError for what is no model, such as the path of one or a pipeline of diffusers."""
    if isinstance(model, (str, Path)):
        raise ValueError(f"{str(model)!r} is the path of a model and not a model: load it, load_model({str(model)!r})")
    if not isinstance(model, DiffusionModel):
        raise ValueError(
            f"{type(model).__name__} is no model that `load_model` returned: load one, or take `ConceptEraser` for a "
            "pipeline of diffusers"
        )


def _checked_shifts(shifts: Any) -> Mapping[str, WeightShift]:
    """Return shifts. Raises ValueError where they are not weight shifts by label."""
    if not isinstance(shifts, Mapping) or not all(isinstance(shift, WeightShift) for shift in shifts.values()):
        raise ValueError(
            "`shifts` are no shifts by label: pass what `erase` returned, or some of it as a dict, such as "
            "{'picasso': shifts['picasso']}"
        )
    return shifts


def find_label(shifts: Mapping[str, WeightShift], text: str) -> str | None:
    """Return the label of the shift whose concept a text names; None where there is none."""
    for label, shift in shifts.items():
        if is_one_of(text, spellings_of(shift.metadata)):
            return label
    return None
