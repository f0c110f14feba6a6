"""TODO erasure.erase."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
import itertools
import pandas as pd
from pathlib import Path
import time
import torch
from tqdm import tqdm
from ldm.config.concepts import Concept, get_concept, said, watermark_prompts
from ldm.diffusion.latents import latents_from_folder, sampled_batches
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.leakage import base_norms, leakage
from ldm.erasure.losses import JointSRSMELoss
from ldm.erasure.methods import METHODS
from ldm.erasure.null_space import BASIS_FILE_TYPE, NullSpaceBasis, leave_one_out_factors, qr_factor
from ldm.erasure.shift import SHIFT_FILE_TYPE
from ldm.erasure.training import CURVE_COLUMNS, fit
from ldm.io.files import atomic_write, file_digest
from ldm.io.paths import ArtifactPaths
from ldm.io.sharding import Shard
from ldm.io.tensors import read_metadata


def solve_null_spaces(model: DiffusionModel, store: ArtifactPaths, concepts: Sequence[Concept], others: Sequence[int], tolerance: float, method: str,
          templates: int = 0, always: float = 1.0, share: Shard = Shard(),
          also: Sequence[str] = ()) -> Iterator[tuple[Concept, NullSpaceBasis]]:
    """For each concept the basis in which it can be erased, kept in `store`: it protects the blank prompt, the watermarks, the
    prompts `also` and the concepts `others`, less the erased one, each by its bare name and its first `templates` captions. Above
    1 `always` weighs what is no concept more, in the spectrum and wherever a leak costs.

    What the bases have in common is decomposed once; of several processes each finds its `share`. Raises ValueError when the
    protected prompts leave no room.
    """
    fixed = list(dict.fromkeys(["", *watermark_prompts(), *also]))
    said_by = {concept.index: said(concept, 0 if concept.watermark else templates)
               for concept in (get_concept(store.category, other) for other in others)}
    embeddings = {prompt: model.tokens(model.encode_prompt([prompt]))[0]
                  for prompt in dict.fromkeys([*fixed, *itertools.chain(*said_by.values())])}
    blocks = {index: torch.cat([embeddings[prompt] for prompt in prompts]) for index, prompts in said_by.items()}
    inside = [concept for concept in concepts if concept.index in blocks]
    rest = torch.cat([*(always * embeddings[prompt] for prompt in fixed),
                      *(block for index, block in blocks.items() if index not in {concept.index for concept in inside})])
    rows = leave_one_out_factors([blocks[concept.index] for concept in inside], rest) if inside else iter(())
    whole = qr_factor(rest, *(blocks[concept.index] for concept in inside)) if len(inside) < len(concepts) else None
    mine = share.of(concepts)
    for concept in tqdm(concepts, desc="null spaces", unit="basis", disable=len(concepts) < 10):
        triangle = next(rows) if concept in inside else whole
        if concept not in mine:
            continue
        protected = list(dict.fromkeys([*fixed, *itertools.chain(*(prompts for index, prompts in said_by.items()
                                                                    if index != concept.index))]))
        recipe = {"made_by": "SRSME_Solution.py", "base": model.name, "base_digest": model.digest,
                  "erase_cat": store.category, "erased_index": concept.index, "concept": concept.name, "always": always}
        basis = NullSpaceBasis.solve([embeddings[prompt] for prompt in protected], protected, tolerance, method, recipe, triangle)
        kept = read_metadata(store.basis(concept.index), BASIS_FILE_TYPE)
        if kept | {"largest_leak": basis.metadata["largest_leak"]} != basis.metadata:  # whose last digits depend on the machine
            basis.save(store.basis(concept.index))
        yield concept, basis


@dataclass(frozen=True)
class ExecutionConfig:
    """How a step is computed, which is not what it computes: `second` is a device for the passes without gradient,
    `checkpointing` runs blocks again for their gradient, instead of keeping what they put out."""

    second: torch.device | None = None
    checkpointing: bool = False


def erase_concepts(model: DiffusionModel, store: ArtifactPaths, concepts: Sequence[Concept], given: Mapping, data: Path,
                effort: ExecutionConfig = ExecutionConfig(), share: Shard = Shard()) -> list[dict]:
    """Learn and save the shift of each concept by the method of `store`, but for those that are there from the same
    inputs already; returns a row for each that was learnt.

    `given` holds the method's settings, `seed` among them; `data` has a folder of pictures per concept, which nobody asks for
    when there is nothing to learn (`iter_break` 0). A curve goes beside each shift as CSV. Of several processes each makes
    its `share`. Raises ValueError for a missing basis or folder.
    """
    kind = METHODS[store.method]
    if not given["iter_break"] and given.get("init") != "closed-form":
        raise ValueError("--iter_break 0 learns nothing: it goes with --init closed-form, which SRS_ME.py has")
    concepts = list(concepts) if kind.is_joint else share.of(concepts)
    if kind.is_joint and share.rank:
        return []  # one process learns them, since they are learnt at once
    if kind.null_space:
        for concept in concepts:
            _load_basis(model, store, concept)  # before any work, so that one that is missing costs none
    recipes = {concept.index: _build_metadata(model, store, concept, given, data) for concept in concepts}
    if kind.is_joint:
        for recipe in recipes.values():
            recipe["together"] = [concept.index for concept in concepts]
    missing = [concept for concept in concepts
               if not recipes[concept.index].items() <= read_metadata(store.shift(concept.index), SHIFT_FILE_TYPE).items()]
    for concept in concepts:
        if concept not in missing:
            print(f"{concept.name}: {store.shift(concept.index)} is there already, from the same inputs")
    rounds = [[concept] for concept in missing]
    if kind.is_joint and missing:
        rounds = [list(concepts)]
    seen = _EmbeddingCache(model)
    return [row for together in tqdm(rounds, desc="shifts", unit="shift", disable=bool(given["iter_break"]))
            for row in _train(model, store, together, given, data, recipes, effort, seen)]


class _EmbeddingCache:
    """What the layers see of prompts, and how much they make of it, each computed once."""

    def __init__(self, model: DiffusionModel):
        self.model, self.embeddings, self.norms = model, {}, {}

    def of(self, prompts: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The embeddings (tokens, d) of the prompts, and the `base_norms` of these."""
        prompts = list(dict.fromkeys(prompts))
        new = self.model.seen(prompt for prompt in prompts if prompt not in self.embeddings)
        if new:
            self.embeddings |= new
            self.norms |= base_norms(text_layers(self.model.unet), new)
        return {prompt: self.embeddings[prompt] for prompt in prompts}, self.norms


def _load_basis(model: DiffusionModel, store: ArtifactPaths, concept: Concept) -> NullSpaceBasis:
    source = store.basis(concept.index)
    basis = NullSpaceBasis.load(source, f"make it with python train-scripts/SRSME_Solution.py --erase_cat {store.category} "
                                        f"--erased_index {concept.index} --scenei {store.scene} --timei {store.time} "
                                        "--em_indexes ...")
    basis.check(model.digest, model.width, source)
    return basis


def _build_metadata(model: DiffusionModel, store: ArtifactPaths, concept: Concept, given: Mapping, data: Path) -> dict:
    """What a shift's file says that it was made from, as far as it is known before it is learnt."""
    recipe = {"made_by": METHODS[store.method].script, "method": store.method, "base": model.name,
              "base_digest": model.digest, "erase_cat": store.category, "erased_index": concept.index,
              "concept": concept.name, "prompt": concept.prompt, "captions": concept.captions, "anchor": concept.anchor,
              "arguments": dict(given), "dtype": str(model.dtype)}
    if METHODS[store.method].null_space:
        recipe["basis_digest"] = file_digest(store.basis(concept.index))
    if METHODS[store.method].needs_images and given["iter_break"]:
        recipe["data_digest"] = file_digest(data / concept.name)
    else:
        recipe |= model.generation_metadata
    return recipe


def _train(model: DiffusionModel, store: ArtifactPaths, concepts: Sequence[Concept], given: Mapping, data: Path,
           recipes: Mapping[int, dict], effort: ExecutionConfig, prompts: _EmbeddingCache) -> Iterator[dict]:
    null_space, start = METHODS[store.method].null_space, time.perf_counter()
    bases = {concept.index: _load_basis(model, store, concept) for concept in concepts if null_space}
    losses = [METHODS[store.method].of(model, concept, given, bases.get(concept.index)) for concept in concepts]
    protected = {concept.index: bases[concept.index].metadata["protected"] if null_space else ["", *watermark_prompts()]
                 for concept in concepts}
    for concept, loss in zip(concepts, losses):
        if null_space and given["max_base"] and len(loss.shift().directions) < given["max_base"]:
            print(f"{concept.name}: it reaches {len(loss.shift().directions)} of the null space's directions, fewer than "
                  f"--max_base {given['max_base']}, and all are used")
    curve = pd.DataFrame(columns=CURVE_COLUMNS)
    if given["iter_break"]:
        frozen = model.replicate_unet(effort.second) if effort.second else model
        for loss in losses:
            loss.frozen, loss.checkpointing = frozen, effort.checkpointing
        batches = [_batches(model, store, concept, given, data, loss) for concept, loss in zip(concepts, losses)]
        if METHODS[store.method].is_joint:
            loss, batch = JointSRSMELoss(losses), (tuple(zip(*parts)) for parts in zip(*batches))
        else:
            loss, batch = losses[0], batches[0]
        prompts.of(itertools.chain(*protected.values(), (concept.prompt for concept in concepts)))
        model.offload()
        start = time.perf_counter()
        curve = fit(loss, batch, given["lr"], given["iter_break"], given.get("threshold"),
                      "erase " + ", ".join(concept.name for concept in concepts))
    seconds, layers = time.perf_counter() - start, text_layers(model.unet)
    for concept, own in zip(concepts, losses):
        shift, path = own.shift(), store.shift(concept.index)
        with atomic_write(path.with_suffix(".csv")) as partial:
            curve.to_csv(partial, index=False)
        seen, base = prompts.of([concept.prompt, *protected[concept.index]])
        moved = {row["prompt"]: row["leak"] for row in leakage(layers, {"": shift}, seen, base)}
        if not set(shift.names) <= {f"{name}.weight" for name in layers}:
            moved = dict.fromkeys(moved, float("nan"))  # keys and values do not say all
        within = {name: bases[concept.index].metadata[name] for name in ("protected", "rank", "tolerance")} if null_space else {}
        shift.save(path, recipes[concept.index] | {"steps": len(curve)} | within)
        yield {"concept": concept.name, "steps": len(curve), "seconds": round(seconds, 1),
               "momentum": curve.momentum.iloc[-1] if len(curve) else float("nan"), "moves own prompt": moved.pop(concept.prompt),
               "moves blank, watermarks, protected": max(moved.values())}


def _batches(model: DiffusionModel, store: ArtifactPaths, concept: Concept, given: Mapping, data: Path, loss) -> Iterator:
    if METHODS[store.method].needs_images:
        return latents_from_folder(model, data / concept.name, given["batch_size"], given["seed"],
                           f"make it with python eval-scripts/generate-data.py --erase_cat {store.category} "
                           f"--prompt '{concept.name}' --model_name '0'")
    return sampled_batches(model, loss.concept, given["batch_size"], given["ddim_steps"], given["start_guidance"],
                   given["seed"], loss.active)
