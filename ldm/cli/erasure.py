"""The erasure that the training scripts share: its devices, what it prints, and what is said where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ldm.cli import output
from ldm.cli.arguments import Namespace, spelled, typed, typed_settings
from ldm.cli.concepts import category_of, named_concepts, named_protection
from ldm.cli.devices import init_distributed, parse_devices
from ldm.cli.session import artifact_paths, fill_settings, load_model, method_config, print_export, report_unused
from ldm.config.concept_lists import read_prompts
from ldm.config.concepts import Concept, always_protected_prompts
from ldm.config.methods import (
    NO_GATE,
    EditConfig,
    ExecutionConfig,
    ExportConfig,
    GateConfig,
    JointSRSMEConfig,
    MethodConfig,
    NullSpaceConfig,
    SRSMEConfig,
)
from ldm.config.models import LEARNING_SETTINGS, ModelConfig, describe_sources, load_model_config
from ldm.diffusion import load
from ldm.diffusion.family import LAST, STATES_KEY
from ldm.diffusion.load_text import load_text_model
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_model import TextModel
from ldm.erasure.contradictions import check_contradictions
from ldm.erasure.effect import advice_on_weak, weak_effects
from ldm.erasure.null_space import BASIS_FILE_TYPE
from ldm.erasure.protection import BasisSummary, Protection, solve_null_spaces
from ldm.erasure.shift import SHIFT_FILE_TYPE, WeightShift
from ldm.io.errors import NotErasedError, notify
from ldm.io.legacy import upgrade_digests
from ldm.io.paths import ArtifactPaths, merge_name
from ldm.io.sharding import Shard
from ldm.io.tensors import read_metadata
from ldm.ledger.lines import some_of

if TYPE_CHECKING:
    import pandas as pd

# What goes with a denoiser, and not with a text encoder alone.
_OF_A_DENOISER = ("model", "ckpt_path", "config_path", "variant", "unet_dtype", "check", "export", "joint", "devices")
_OF_A_DENOISER += ("frozen_device", "gradient_checkpointing", "estimate_memory")


def run_erasure(args: Namespace, method: str) -> None:
    """Erase the concepts that the arguments name by a method: null spaces, shifts, a table, exports.

    Raises NotErasedError, when all is written, where a shift's own effect was not found.
    """
    from ldm.erasure.erase import erase_concepts
    from ldm.erasure.methods import check_settings
    from ldm.erasure.summary import summary_table

    for name, owner in (("clip_path", "check"), ("export_dir", "export"), ("retain_preserve_scale", "retain")):
        if name in typed and not getattr(args, owner):
            raise ValueError(f"`{name}` goes with `{owner}`: give that too, or leave it out")
    concepts = named_concepts(args)
    protected, prompts = named_protection(args, concepts)
    retain = read_prompts(getattr(args, "retain", []), "retain")
    device, frozen_device = _devices(args)
    device, shard = init_distributed(device)
    execution = ExecutionConfig(str(frozen_device) if frozen_device else None, args.gradient_checkpointing)
    model = _load(args, device)
    model_config = load_model_config(model)
    config = method_config(args, model_config, method)
    sections = [f"methods.{method}"]
    sections += ["null_space"] if config.solves_null_space else []
    sections += ["gate"] if isinstance(config, SRSMEConfig) else []
    print(describe_sources(model_config, sections, spelled | _implied(config, model_config.methods[method])))
    check_settings(model, config)  # before any work
    report_unused(args, config)
    artifacts = artifact_paths(args, model.name, method, category_of(args, concepts))
    check_contradictions(model, concepts, prompts)
    if config.solves_null_space:
        protection = Protection(protected, fill_settings(args, model_config.null_space), prompts)
        _solve_null_spaces(args, model, artifacts, concepts, protection, shard)
    gate = _gate_config(args, model_config) if isinstance(config, SRSMEConfig) else NO_GATE
    others = protected if concepts[0].is_own else None
    image_dir = args.training_image_dir
    kept = others, retain, prompts, protected
    summaries = erase_concepts(model, artifacts, concepts, config, image_dir, execution, shard, gate, *kept)
    has_others = getattr(args, "export", None) or getattr(args, "check", None)  # tables, which JSON tells apart
    if summaries:
        output.show_table(summary_table(summaries, model), "shifts" if has_others else "")
    made = concepts if config.is_joint else shard.select(concepts)
    edit = fill_settings(args, model_config.edit)  # in whose form shifts act where no command says otherwise
    edit = edit if gate.gate else edit.with_changes(form="linear")
    shifts = _load_made(artifacts, concepts) if has_others and shard.rank == 0 else {}
    said = ["", *(concept.prompt for concept in concepts), *prompts]
    if getattr(args, "check", None) and shifts and isinstance(model, DiffusionModel):
        kept = [concept.prompt for concept in protected if concept not in concepts]
        groups = {"erased": [concept.prompt for concept in concepts], "protected": [*prompts, *kept, ""]}
        _check_images(args, model, shifts, edit.form, groups)
    _check_erased(artifacts, made, config, edit, "; nothing is exported" if getattr(args, "export", None) else "")
    if getattr(args, "export", None) and shifts and isinstance(model, DiffusionModel):
        _export(args, model, shifts, said)


def _load(args: Namespace, device: torch.device) -> TextModel:
    """Return the model that the arguments name, or the text encoder alone that --text_encoder of SRS_ME.py names."""
    if getattr(args, "text_encoder", None) is None:
        if getattr(args, "pooled", False):
            raise ValueError(
                "`pooled` is of a text encoder alone, named by `text_encoder`: a model has its own streams"
            )
        return load_model(args, device, getattr(args, "unet_dtype", "float32"))
    given = [name for name in _OF_A_DENOISER if name in typed]
    if given:
        raise ValueError(f"`text_encoder` is read without a denoiser, for which `{given[0]}` is: leave one of both out")
    return load_text_model(args.text_encoder, device, args.pooled)


def _check_erased(
    artifacts: ArtifactPaths, concepts: Sequence[Concept], config: MethodConfig, edit: EditConfig, so: str
) -> None:
    """Raise NotErasedError where a shift has not the effect by which its concept may be called erased.

    `so` is what follows from that for the whole command.
    """
    metadata = [read_metadata(artifacts.shift(concept.label), SHIFT_FILE_TYPE) for concept in concepts]
    weak = weak_effects(metadata, edit)
    if not weak and config.trains and isinstance(config, SRSMEConfig):
        notify("whether what was trained erases is not judged without images: `check` 4 shows some")
    if weak:
        advice = advice_on_weak(config, "`protect`, `em_indexes`")
        raise NotErasedError(f"{weak}. The shifts are kept{so}: {advice}")


def _implied(config: MethodConfig, base: MethodConfig) -> dict[str, str]:
    """Return, by name, the settings that another flag asked for, with that flag: --lr asks for the mode learn."""
    asking = [flag for name, flag in spelled.items() if name in (*LEARNING_SETTINGS, "init")]
    learns = asking and "mode" not in spelled and getattr(config, "mode", None) != getattr(base, "mode", None)
    return {"mode": asking[0]} if learns else {}


def _export(args: Namespace, model: DiffusionModel, shifts: Mapping[str, WeightShift], prompts: Sequence[str]) -> None:
    """Write the model without the concepts in the formats of --export, and print what was measured on the prompts."""
    from ldm.erasure.export import export

    folder = args.export_dir or args.artifacts_dir / "merged"
    config = ExportConfig(formats=args.export)
    try:
        print_export(export(model, shifts, folder / f"{model.name}-{merge_name(shifts)}", config, prompts))
    except ValueError as error:
        raise ValueError(str(error).replace("`save_path`", "`export_dir`")) from error


def _load_made(artifacts: ArtifactPaths, concepts: Sequence[Concept]) -> dict[str, WeightShift]:
    """Return the shifts of concepts by label. Raises ValueError for one that another process has not made yet."""
    shifts: dict[str, WeightShift] = {}
    for concept in concepts:
        path = artifacts.shift(concept.label)
        if not path.is_file():
            raise ValueError(f"{path} is not there yet: run this again when all processes have ended")
        shifts[concept.label] = WeightShift.load(path)
    return shifts


def _check_images(
    args: Namespace,
    model: DiffusionModel,
    shifts: Mapping[str, WeightShift],
    form: str,
    groups: Mapping[str, Sequence[str]],
) -> None:
    """Generate images of groups of prompts, before and after, into a grid and a table beside the shifts."""
    from ldm.experiments.check import CheckRequest, check_erasure

    sampling = load_model_config(model).sampling
    folder = args.artifacts_dir / "checks" / f"{model.name}-{merge_name(shifts)}"
    request = CheckRequest(args.check, folder, sampling, args.clip_path)
    output.show_table(check_erasure(model, shifts, form, groups, request), "check")
    print(f"-> {folder}")


def show_plan(args: Namespace, method: str) -> None:
    """Print what an erasure would make, from what and in how much memory. Nothing is loaded or written."""
    import pandas as pd

    concepts = named_concepts(args)
    protected, prompts = named_protection(args, concepts)
    retain = read_prompts(getattr(args, "retain", []), "retain")
    source = getattr(args, "text_encoder", None) or args.ckpt_path or args.model
    name = load.resolve_names(source, args.config_path)[0]
    artifacts = artifact_paths(args, name, method, category_of(args, concepts))
    rows = []
    for concept in concepts:
        path = artifacts.shift(concept.label)
        rows.append(
            {
                "concept": concept.name,
                "kind": concept.kind,
                "spellings": ", ".join(dict.fromkeys(concept.spellings)),
                "anchor": concept.anchor or "",
                "shift": str(path),
                "there": "yes, and kept if from the same inputs" if path.is_file() else "",
            }
        )
    output.show_table(pd.DataFrame(rows), "shifts")
    always = [repr(prompt) for prompt in always_protected_prompts()]
    others = [concept.name for concept in protected]
    print(
        f"protected: {', '.join([*always, *map(repr, prompts)])}; the concepts {', '.join(others)}, each but by its own"
    )
    if retain:
        print(f"changed little: {some_of(map(repr, retain))}")
    if getattr(args, "export", None):
        print(f"exported: {', '.join(args.export)} -> {args.export_dir or args.artifacts_dir / 'merged'}")
    if getattr(args, "text_encoder", None) is None:
        output.show_table(memory_table(args, method), "memory", title="predicted peak memory, GiB:")


def _solve_null_spaces(
    args: Namespace,
    model: TextModel,
    artifacts: ArtifactPaths,
    concepts: Sequence[Concept],
    protection: Protection,
    shard: Shard,
) -> None:
    """Solve the null spaces of concepts, or keep those that SRSME_Solution.py made where nothing asks for others."""
    typed_protection = {"protect", "em_indexes", *typed_settings(args, NullSpaceConfig)} & set(typed)
    paths = [artifacts.basis(concept.label) for concept in concepts]
    are_there = not typed_protection and all(path.is_file() for path in paths)
    if are_there and _are_enough(model, paths, concepts, protection):
        for path in paths:
            said = read_metadata(path, BASIS_FILE_TYPE)  # which is empty for a damaged file
            if "rank_rtol" in said:
                print(
                    f"{said['concept']}: the null space {path} is kept, {len(said['protected'])} prompts protected, "
                    f"rank_rtol {said['rank_rtol']:g}: a flag of what is protected, or of a null space, solves it anew"
                )
        return
    one = Shard() if artifacts.method == JointSRSMEConfig.name else shard  # whose shifts one process trains
    for summary in solve_null_spaces(model, artifacts, concepts, protection, one):
        print(describe_basis(summary))


def _are_enough(model: TextModel, paths: Sequence[Path], concepts: Sequence[Concept], protection: Protection) -> bool:
    """Return whether bases that are there are of this model, and protect the other concepts that a user names."""
    if not concepts[0].is_own:
        return True  # what they protect was said by index, and is the user's choice
    for path, concept in zip(paths, concepts, strict=True):
        said = upgrade_digests(read_metadata(path, BASIS_FILE_TYPE), model.digests)
        is_own = said.get("text_digest") == model.text_digest and said.get(STATES_KEY, LAST) == model.kind
        is_own = is_own or said.get("base_digest") in model.digests[:1]
        others = {other.prompt for other in protection.concepts if other != concept}
        if not is_own or not others <= set(said.get("protected", [])):
            return False
    return True


def describe_basis(summary: BasisSummary) -> str:
    """Return a line about a null space that was solved."""
    concept = summary.concept
    name = concept.name if concept.is_own else f"{concept.index} {concept.name}"
    return (
        f"{name}: {summary.num_protected} prompts protected, rank {summary.rank} of {summary.width}, {summary.nullity} "
        f"directions free, max leakage {summary.max_leakage:.1e} -> {summary.path}"
    )


def _gate_config(args: Namespace, model_config: ModelConfig) -> GateConfig:
    """Return how gates are fitted: without --gate only for a model on which shifts act by them."""
    config = fill_settings(args, model_config.gate)
    return config if "gate" in typed or model_config.edit.form == "gated" else config.with_changes(gate=False)


def _devices(args: Namespace) -> tuple[torch.device, torch.device | None]:
    """Return the device of the model, and that of the passes without gradient if it is another one."""
    if args.devices and (args.device or args.frozen_device):
        raise ValueError(f"`devices` {args.devices} says both devices: leave `device` and `frozen_device` out")
    devices = parse_devices(args.devices or args.device)
    frozen = devices[1] if len(devices) > 1 else None
    if args.frozen_device:
        frozen = parse_devices(args.frozen_device)[0]
    return devices[0], frozen


def memory_table(args: Namespace, method: str) -> pd.DataFrame:
    """Return the table of `estimate_memory` for what the arguments say."""
    from ldm.erasure.memory import estimate_memory

    source = args.ckpt_path or args.model
    try:
        folder = load.resolve_config_dir(source, args.config_path, args.variant)
        model_config = load_model_config(load.settings_source(source, args.config_path, args.variant))
        config = method_config(args, model_config, method)
        assert isinstance(config, SRSMEConfig)
        return estimate_memory(folder, _devices(args)[0], config.train_batch_size, config.max_directions)
    except (OSError, KeyError) as error:
        raise ValueError(
            f"no configs of a model in '{source}': pass `model` a diffusers folder, or `ckpt_path` a checkpoint"
        ) from error


@contextmanager
def explain_oom(args: Namespace, method: str) -> Iterator[None]:
    """While the block runs, let running out of memory end in the table of `memory_table` and a ValueError."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        output.show_table(memory_table(args, method), title="predicted peak memory, GiB:")
        raise ValueError(
            "out of memory, and nothing was lost: choose a smaller row of the table, such as `unet_dtype` bfloat16 "
            "with `gradient_checkpointing`, or a smaller `train_batch_size`, or another `device`"
        ) from error
