"""TODO ledger.operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import hashlib
import pandas as pd
from pathlib import Path
import psutil
import time
import torch
from torch import nn
from ldm.config.concepts import Concept
from ldm.config.models import load_model_config
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.erase import erase_concepts, solve_null_spaces
from ldm.erasure.leakage import leakage
from ldm.erasure.merge import applied
from ldm.erasure.methods import METHODS
from ldm.erasure.shift import SeparableShift, WeightShift
from ldm.io.paths import ArtifactPaths
from ldm.io.tensors import check_base_model
from ldm.ledger.ledger import Ledger


def create_shifts(ledger: Ledger, model: DiffusionModel, concepts: Sequence[Concept], method: str, given: Mapping,
         data: Path) -> dict[int, dict]:
    """The shifts that erase `concepts` by `method`, for `Ledger.append`: kept under the number of the next line, so that no file
    that a line names is ever written again. Each protects all that the ledger protects, and its other concepts. `seconds` and
    `peak_gib` are of all concepts together, the memory that of the whole process, or on a GPU of its tensors."""
    check_base_model(ledger.header, model.digest, ledger.path)
    begin = time.perf_counter()
    store = ArtifactPaths(ledger.root / "shifts", method, model.name, ledger.header["erase_cat"], 0, len(ledger.entries) + 1)
    if METHODS[method].null_space:
        own = load_model_config(model.base).solution
        for _ in solve_null_spaces(model, store, concepts, ledger.header["concepts"], own.tolerance, own.basis, own.templates, own.always,
                       also=ledger.header["protected"]):
            pass
    erase_concepts(model, store, concepts, given, data)
    spent = {"seconds": round(time.perf_counter() - begin, 1), "peak_gib": round(peak_memory() / 2**30, 2)}
    layers, seen, made = text_layers(model.unet), model.seen(ledger.prompts), {}
    for concept in concepts:
        shift, entry = shift_record(ledger, store, concept)
        moved = leakage(layers, {"": shift}, {prompt: rows for prompt, rows in seen.items() if prompt != concept.prompt})
        inside = set(shift.names) <= {f"{name}.weight" for name in layers}  # otherwise keys and values do not say all
        made[concept.index] = entry | {"leak": max(row["leak"] for row in moved) if inside else None} | spent
    return made


def shift_record(ledger: Ledger, store: ArtifactPaths, concept: Concept) -> tuple[WeightShift, dict]:
    """A concept's shift of this time in `store`, which lies below the ledger's root, and what is known of it, for `Ledger.append`."""
    path = store.shift(concept.index)
    shift = WeightShift.load(path)
    return shift, {"concept": concept.name, "method": store.method, "shift": path.relative_to(ledger.root).as_posix(),
                   "rank": len(shift.directions) if isinstance(shift, SeparableShift) else None, "bytes": path.stat().st_size,
                   "steps": shift.metadata["steps"]}


def verify(ledger: Ledger, model: DiffusionModel) -> pd.DataFrame:
    """A row for each thing proved: the history's chain of digests (as it was read), the base model's digest, that of each shift that
    was ever on, and that all shifts of the present state go on and off again and leave the very bits of the base.

    Raises ValueError, naming what is wrong, for the first that fails."""
    rows = [{"what": "history", "digest": ledger.head[:12], "proved": f"{len(ledger.entries)} changes, none altered or missing"}]
    check_base_model(ledger.header, model.digest, ledger.path)
    rows.append({"what": f"base {ledger.header['base']}", "digest": model.digest[:12], "proved": "the model that the ledger was begun with"})
    loaded = {}
    for change in ledger.entries:
        for index, entry in change.erase.items():
            if entry["digest"] not in loaded:
                loaded[entry["digest"]] = shift = ledger.load(entry)
                shift.check(model.digest, model.unet)
                rows.append({"what": entry["shift"], "digest": entry["digest"][:12], "proved": f"erases {entry['concept']} from that base"})
    before = weights_hash(model.unet)
    with applied(model.unet, [loaded[entry["digest"]] for entry in ledger.state().values()]):
        merged = weights_hash(model.unet)
    if weights_hash(model.unet) != before:
        raise ValueError("the weights without shifts are not the base model's: this is a fault of the program, report it")
    rows.append({"what": f"{len(ledger.state())} shifts merged", "digest": merged[:12], "proved": "the present weights, from the history alone"})
    rows.append({"what": "no shift", "digest": before[:12], "proved": "the base model, bit for bit"})
    return pd.DataFrame(rows)


def peak_memory() -> int:
    """The most bytes that this process has held so far: its tensors on a GPU if it has used one, else all of it (Linux' count)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows, where psutil knows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def weights_hash(unet: nn.Module) -> str:
    """SHA-256 of the names and bits of all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
