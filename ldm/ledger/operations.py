"""What a ledger does with its model: make shifts for it, prove what it says, and tell what that took."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from torch import nn

from ldm.config.concepts import Concept
from ldm.config.methods import METHODS, NO_GATE, GateConfig, MethodConfig, NullSpaceConfig
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.erase import erase
from ldm.erasure.leakage import changes_only, leakage
from ldm.erasure.merge import applied
from ldm.erasure.protection import Protection
from ldm.erasure.shift import WeightShift
from ldm.io.paths import ArtifactPaths
from ldm.io.tensors import check_base_model
from ldm.ledger.ledger import Ledger

_FROM_A_COPY = "get the ledger and its shifts back from a copy"


def create_shifts(
    ledger: Ledger,
    model: DiffusionModel,
    concepts: Sequence[Concept],
    config: MethodConfig,
    null_space: NullSpaceConfig,
    image_dir: Path,
    gate: GateConfig = NO_GATE,
) -> dict[int, dict[str, Any]]:
    """Make the shifts that erase `concepts`, and return their records by concept, for `Ledger.append`.

    The files lie under the number of the ledger's next entry, so that no file that an entry names is ever written
    again. Each shift protects all that the ledger protects, and its other concepts. `image_dir` has a folder of images
    per concept, for a method that trains on them. In a record, `seconds` and `peak_gib` are of all concepts together,
    the memory that of the whole process, or on a GPU of its tensors.

    Raises ValueError for another model than the ledger's.
    """
    check_base_model(ledger.header, model.digests, ledger.path)
    start = time.perf_counter()
    category, next_index = ledger.header["category"], len(ledger.entries) + 1
    artifacts = ArtifactPaths(ledger.root / "shifts", config.name, model.name, category, 0, next_index)
    protection = Protection(ledger.concepts, null_space, extra_prompts=ledger.header["protected"])
    erase(model, artifacts, concepts, config, protection, image_dir, gate)
    seconds, peak_gib = round(time.perf_counter() - start, 1), round(peak_memory() / 2**30, 2)
    embeds = model.embed_prompts(ledger.prompts)
    records = {}
    for concept in concepts:
        shift, record = shift_record(ledger, artifacts, concept)
        other_embeds = {prompt: rows for prompt, rows in embeds.items() if prompt != concept.prompt}
        record["max_leakage_others"] = _max_leakage(model, shift, other_embeds)
        record["seconds"] = seconds
        record["peak_gib"] = peak_gib
        records[concept.index] = record
    return records


def _max_leakage(model: DiffusionModel, shift: WeightShift, embeds: dict[str, torch.Tensor]) -> float | None:
    """Return the largest leakage of a shift on prompts' embeddings (tokens, d).

    None for a shift of other layers too, of whose effect keys and values do not say all.
    """
    layers = text_layers(model.unet)
    if not changes_only(shift, layers):
        return None
    return max(row["leakage"] for row in leakage(layers, {"": shift}, embeds))


def shift_record(ledger: Ledger, artifacts: ArtifactPaths, concept: Concept) -> tuple[WeightShift, dict[str, Any]]:
    """Return a concept's shift in `artifacts`, which lie below the ledger's root, and its record for the ledger."""
    path = artifacts.shift(concept.index)
    shift = WeightShift.load(path)
    record = {
        "concept": concept.name,
        "method": artifacts.method,
        "shift": path.relative_to(ledger.root).as_posix(),
        "rank": shift.rank,
        "bytes": path.stat().st_size,
        "iterations": shift.metadata["iterations"],
    }
    return shift, record


def verify(ledger: Ledger, model: DiffusionModel) -> pd.DataFrame:
    """Return a row for each thing that was checked: item, sha256 (its beginning), check.

    These are the history's chain of digests (as it was read), the base model's digest, that of each shift that was ever
    active, that each shift's own metadata and effect, measured anew, are those that its entry says, and that all active
    shifts can be merged and removed again and leave the very bits of the base model.

    Raises ValueError, naming what is wrong, for the first that fails.
    """
    rows = []

    def add(item: str, sha256: str, check: str) -> None:
        rows.append({"item": item, "sha256": sha256[:12], "check": check})

    add("history", ledger.last_hash, f"{len(ledger.entries)} changes, none altered or missing")
    check_base_model(ledger.header, model.digests, ledger.path)
    add(f"base {ledger.header['base_model']}", model.digest, "the model that the ledger was begun with")
    shifts: dict[str, WeightShift] = {}
    embeds = model.embed_prompts(ledger.prompts)
    for entry in ledger.entries:
        for record in entry.erase.values():
            digest = record["digest"]
            if digest not in shifts:
                shifts[digest] = ledger.load(record)
                shifts[digest].check(model.digests, model.unet)
                add(record["shift"], digest, _check_shift(ledger, model, record, shifts[digest], embeds))
    active = [shifts[record["digest"]] for record in ledger.active_shifts().values()]
    base_hash = weights_hash(model.unet)
    with applied(model.unet, active):
        merged_hash = weights_hash(model.unet)
    if weights_hash(model.unet) != base_hash:
        raise ValueError(
            "the weights without shifts are not the base model's: this is a fault of the program, report it"
        )
    add(f"{len(active)} shifts merged", merged_hash, "the present weights, from the history alone")
    add("no shift", base_hash, "the base model, bit for bit")
    return pd.DataFrame(rows)


def _check_shift(
    ledger: Ledger,
    model: DiffusionModel,
    record: Mapping[str, Any],
    shift: WeightShift,
    embeds: Mapping[str, torch.Tensor],
) -> str:
    """Return what a shift does on prompts' embeddings (tokens, d), by its own metadata and measured anew.

    Raises ValueError when its entry, `record`, or its own metadata say something else.
    """
    path, metadata = record["shift"], shift.metadata
    for name in ("concept", "method"):
        if metadata.get(name) != record[name]:
            raise ValueError(f"{path} says {name} {metadata.get(name)}, and its entry {record[name]}: {_FROM_A_COPY}")
    found = {
        "rank": shift.rank,
        "bytes": (ledger.root / path).stat().st_size,
        "iterations": metadata.get("iterations"),
    }
    for name, value in found.items():
        if name in record and record[name] != value:
            raise ValueError(f"{path} has {name} {value}, and its entry says {record[name]}: {_FROM_A_COPY}")
    own = metadata.get("prompt")
    unprotected = set(ledger.header["protected"]) - {own} - set(metadata.get("protected", []))
    if METHODS[record["method"]].needs_null_space and unprotected:
        raise ValueError(f"{path} does not protect '{min(unprotected)}', which the ledger protects: {_FROM_A_COPY}")
    text = f"erases {record['concept']} from that base"
    others = _max_leakage(model, shift, {prompt: rows for prompt, rows in embeds.items() if prompt != own})
    if others is None or not isinstance(own, str) or own not in embeds:
        return text
    own_change = _max_leakage(model, shift, {own: embeds[own]})
    measured = {"target_change": own_change, "max_leakage_others": others}
    for name, said in (
        ("target_change", metadata.get("target_change")),
        ("max_leakage_others", record.get("max_leakage_others")),
    ):
        if said is not None and not math.isclose(said, measured[name], rel_tol=0.05, abs_tol=1e-4):
            raise ValueError(f"{path}: {name} is {measured[name]:.1e}, and was said to be {said:.1e}: {_FROM_A_COPY}")
    return f"{text}: its own prompt changes by {own_change:.1e}, the others by at most {others:.1e}"


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: of its tensors on a GPU if it has used one, else of all."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows, where psutil knows
        return psutil.Process().memory_info()._asdict()["peak_wset"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def weights_hash(unet: nn.Module) -> str:
    """Return the SHA-256 of the names and bits of all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
