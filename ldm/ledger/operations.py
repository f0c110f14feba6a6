"""What a ledger does with its model: make shifts for it, prove what it says, and tell what that took."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from torch import nn

from ldm.config.concepts import OWN, Concept, erasable_concepts
from ldm.config.methods import METHODS, NO_GATE, GateConfig, MethodConfig, NullSpaceConfig
from ldm.config.models import load_model_config
from ldm.diffusion.edits import remember_embeddings
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.contradictions import check_contradictions
from ldm.erasure.effect import judge, stated_effects
from ldm.erasure.erase import erase
from ldm.erasure.gate_fitter import NoGatesError
from ldm.erasure.leakage import EmbeddingCache, base_norms, changes_only, leakage
from ldm.erasure.merge import applied
from ldm.erasure.protection import Protection, concept_metadata
from ldm.erasure.shift import WeightShift
from ldm.io.errors import notify
from ldm.io.files import stream_digest
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
) -> dict[str, dict[str, Any]]:
    """Make the shifts that erase `concepts`, and return their records by label, for `Ledger.append`.

    The files lie under the number of the ledger's next entry, so that no file that an entry names is ever written
    again. Each shift protects all that the ledger protects, and its other concepts. `image_dir` has a folder of images
    per concept, for a method that trains on them. In a record, `seconds` and `peak_gib` are of all concepts together,
    the memory that of the whole process, or on a GPU of its tensors.

    Raises ValueError for another model than the ledger's, and where what is protected says one of the concepts.
    """
    check_base_model(ledger.header, model, ledger.path)
    start = time.perf_counter()
    check_contradictions(model, concepts, ledger.asked_for)
    protection = Protection(ledger.concepts, null_space, extra_prompts=ledger.header["protected"])
    form = load_model_config(model).edit.form if gate.gate else "linear"  # in which the shifts act by default
    placed: dict[str, ArtifactPaths] = {}
    leakages: dict[str, Mapping[str, float]] = {}  # of each shift that was made, on the prompts that it protects
    with remember_embeddings(model):
        for category in dict.fromkeys([ledger.category, OWN]):
            together = [concept for concept in concepts if concept.is_own == (category == OWN)]
            artifacts = ArtifactPaths(
                ledger.root / "shifts", config.name, model.name, category, 0, len(ledger.entries) + 1
            )
            if together:
                retained = _retained(ledger), ledger.retain
                try:
                    made = erase(model, artifacts, together, config, protection, image_dir, gate, *retained)
                    leakages |= {summary.concept: summary.leakage for summary in made}
                except NoGatesError as error:
                    notify(str(error))
                    concepts = [concept for concept in concepts if concept.label not in error.reasons]
                    together = [concept for concept in together if concept.label not in error.reasons]
            placed |= dict.fromkeys((concept.label for concept in together), artifacts)
        seconds, peak_gib = round(time.perf_counter() - start, 1), round(peak_memory() / 2**30, 2)
        prompts = ledger.prompts
        known = [leakages.get(concept.name, {}).keys() | {concept.prompt} for concept in concepts]
        others = [concept for concept, said in zip(concepts, known, strict=True) if not said >= set(prompts)]
        measure = Measure(model, prompts if others else ())
    records: dict[str, dict[str, Any]] = {}
    for concept in concepts:
        shift, record = shift_record(ledger, placed[concept.label], concept)
        found = measure.changes(shift) if concept in others else leakages[concept.name]
        changes = {prompt: found[prompt] for prompt in prompts if math.isfinite(found.get(prompt, math.nan))}
        record["max_leakage_others"] = _largest(changes, leave_out=concept.prompt)
        is_erased, said = judge(shift.metadata, form)
        if is_erased is not None:
            record |= {"effect": said["mean"], "is_erased": is_erased}
        if config.solves_null_space:
            record["null_space"] = null_space.to_dict()
        records[concept.label] = record | {"seconds": seconds, "peak_gib": peak_gib}
    return records


def _retained(ledger: Ledger) -> list[Concept]:
    """Return the concepts that an erasure should change little: the ledger's, and what else its category lists."""
    listed = [concept for concept in erasable_concepts(ledger.category) if ledger.find(concept.name) is None]
    return [*ledger.concepts, *listed]


class Measure:
    """The leakage of shifts on prompts whose embeddings, and outputs of the base model, are computed once."""

    def __init__(self, model: DiffusionModel, prompts: Sequence[str]):
        self.model, self.layers = model, model.text_layers
        self._cache = EmbeddingCache(model)
        self.embeds = model.embed_prompts(dict.fromkeys(prompts))  # (tokens, d) each
        self.norms = base_norms(self.layers, self.embeds)

    def changes(self, shift: WeightShift) -> dict[str, float]:
        """Return a shift's leakage on each prompt.

        Nothing for a shift of other layers too, of whose effect keys and values do not say all.
        """
        if not changes_only(shift, self.layers):
            return {}
        if shift.gated and shift.is_gate_alone:
            return self._cache.gate_leakage(shift.gated, self.embeds)
        return {row["prompt"]: row["leakage"] for row in leakage(self.layers, {"": shift}, self.embeds, self.norms)}


def _largest(changes: Mapping[str, float], leave_out: str | None) -> float | None:
    """Return the largest leakage on prompts other than one; None where none is known."""
    return max((value for prompt, value in changes.items() if prompt != leave_out), default=None)


def leakage_on_added(ledger: Ledger, model: DiffusionModel, concepts: Sequence[Concept]) -> pd.DataFrame:
    """Return how much the shifts made so far change the prompts of `concepts`, which they do not protect.

    A row for each concept that was ever erased, by its last shift, and each of `concepts`: label, shift, added,
    leakage. None for a shift of other layers too, whose effect leakage would not say.
    """
    check_base_model(ledger.header, model, ledger.path)
    measure = Measure(model, [concept.prompt for concept in concepts])
    rows = []
    for concept in ledger.concepts:
        record = ledger.last_shift(concept.label)
        changes = measure.changes(ledger.load(record)) if record else {}
        for added in concepts:
            if added.prompt in changes:
                row = {"label": concept.label, "shift": concept.name, "added": added.name}
                rows.append(row | {"leakage": changes[added.prompt]})
    return pd.DataFrame(rows, columns=["label", "shift", "added", "leakage"])


def shift_record(ledger: Ledger, artifacts: ArtifactPaths, concept: Concept) -> tuple[WeightShift, dict[str, Any]]:
    """Return a concept's shift in `artifacts`, which lie below the ledger's root, and its record for the ledger."""
    path = artifacts.shift(concept.label)
    shift = WeightShift.load(path)
    record = {
        "concept": concept.name,
        "method": artifacts.method,
        "shift": path.relative_to(ledger.root).as_posix(),
        "rank": shift.rank,
        "bytes": path.stat().st_size,
        "iterations": shift.metadata["iterations"],
    }
    if "target_change" in shift.metadata:
        record["target_change"] = shift.metadata["target_change"]
    return shift, record


def verify(ledger: Ledger, model: DiffusionModel) -> pd.DataFrame:
    """Return a row for each thing that was checked: item, sha256 (its beginning), check.

    These are the history's chain of digests (as it was read), the base model's digest, that of each shift that was ever
    active, that each shift's own metadata, with its effect, and the changes of outputs, measured anew, are those that
    its entry says, and that all active shifts can be merged and removed again and leave the very bits of the base
    model.

    Raises ValueError, naming what is wrong, for the first that fails.
    """
    rows = []

    def add(item: str, sha256: str, check: str) -> None:
        rows.append({"item": item, "sha256": sha256[:12], "check": check})

    add("history", ledger.last_hash, f"{len(ledger.entries)} changes, none altered or missing")
    if "migrated_from" in ledger.header:
        add(*_check_migration(ledger))
    check_base_model(ledger.header, model, ledger.path)
    add(f"base {ledger.header['base_model']}", model.digest, "the model that the ledger was begun with")
    shifts: dict[str, WeightShift] = {}
    measure = Measure(model, ledger.prompts)
    for entry in ledger.entries:
        known = set(ledger.prompts_after(entry.index))
        for label, record in entry.erase.items():
            digest = record["digest"]
            if digest not in shifts:
                shifts[digest] = ledger.load(record)
                shifts[digest].check(model)
                _check_concept(ledger, label, record, shifts[digest].metadata)
                changes = measure.changes(shifts[digest])
                add(record["shift"], digest, _check_shift(ledger, record, shifts[digest], changes, known))
    active = [shifts[record["digest"]] for record in ledger.active_shifts().values()]
    base_hash = weights_hash(model.denoiser)
    with applied(model.denoiser, active):
        merged_hash = weights_hash(model.denoiser)
    if weights_hash(model.denoiser) != base_hash:
        raise ValueError(
            "the weights without shifts are not the base model's: this is a fault of the program, report it"
        )
    add(f"{len(active)} shifts merged", merged_hash, "the present weights, from the history alone")
    add("no shift", base_hash, "the base model, bit for bit")
    return pd.DataFrame(rows)


def _check_migration(ledger: Ledger) -> tuple[str, str, str]:
    """Return what is known of the file of an older version that a ledger was made of: its name, digest and state.

    Raises ValueError for one that was altered since.
    """
    name, sha256 = ledger.header["migrated_from"]["file"], ledger.header["migrated_from"]["sha256"]
    path = ledger.root / name
    if not path.is_file():
        return name, sha256, "the ledger before its migration, which is no longer there"
    if stream_digest(path) != sha256:
        raise ValueError(f"{path} is not the ledger that was migrated: get the file back from a copy")
    return name, sha256, "the ledger before its migration"


def _check_concept(ledger: Ledger, label: str, record: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Raise ValueError where a shift's metadata says another concept or method than its entry, or than the ledger."""
    path = record["shift"]
    for name in ("concept", "method"):
        if metadata.get(name) != record[name]:
            raise ValueError(f"{path} says {name} {metadata.get(name)}, and its entry {record[name]}: {_FROM_A_COPY}")
    if ledger.version == 1:
        return  # its concepts are what the category's list says today
    (concept,) = (concept for concept in ledger.concepts if concept.label == label)
    expected = {"concept": concept.name, "prompt": concept.prompt}
    if concept.is_own:
        expected = concept_metadata(concept) | expected | {"anchor": concept.anchor_prompt}
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise ValueError(f"{path} says {name} {metadata.get(name)}, and the ledger {value}: {_FROM_A_COPY}")


def _check_shift(
    ledger: Ledger,
    record: Mapping[str, Any],
    shift: WeightShift,
    changes: Mapping[str, float],
    known: Collection[str],
) -> str:
    """Return what a shift does, given its leakage on prompts, `changes`; those `known` were there when it was made.

    Raises ValueError when its entry, `record`, or its own metadata say something else.
    """
    path, metadata = record["shift"], shift.metadata
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
    stated = [said["mean"] for said in stated_effects(metadata).values() if said]
    stated.append(metadata.get("target_change"))  # by which a change of weights that was trained is judged
    if "effect" in record and record["effect"] not in stated:
        raise ValueError(f"{path} does not say the effect {record['effect']:g}, as its entry does: {_FROM_A_COPY}")
    text = f"erases {record['concept']} from that base"
    if not record.get("is_erased", True):
        text = f"changes {record['concept']} in that base, too weakly to erase it"
    if "effect" in record:
        text += f", effect {record['effect']:.2f}"
    at_first = {prompt: value for prompt, value in changes.items() if prompt in known}
    others = _largest(at_first, leave_out=own)
    if others is None or not isinstance(own, str) or own not in changes:
        return text
    measured = {"target_change": changes[own], "max_leakage_others": others}
    for name, said in (
        ("target_change", metadata.get("target_change")),
        ("target_change", record.get("target_change")),
        ("max_leakage_others", record.get("max_leakage_others")),
    ):
        if said is not None and not math.isclose(said, measured[name], rel_tol=0.05, abs_tol=1e-4):
            raise ValueError(f"{path}: {name} is {measured[name]:.1e}, and was said to be {said:.1e}: {_FROM_A_COPY}")
    now = _largest(changes, leave_out=own)
    return f"{text}: its own prompt changes by {changes[own]:.1e}, the others by at most {now:.1e}"


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
