"""From a method's name and concepts to saved shifts: what each method is given, and the recipe that goes into the file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.attention import kv_layers
from ldm.checkpoint import file_digest, recipe_of
from ldm.concepts import Concept, get_concept, watermarks
from ldm.images import atomic
from ldm.latents import from_folder, sampled
from ldm.losses import METHODS, JointErasure
from ldm.model import TextToImage
from ldm.shift import BASIS, SHIFT, NullSpaceBasis, leaks
from ldm.store import Store
from ldm.training import learn


def solve(model: TextToImage, store: Store, concept: Concept, others: Sequence[int], tolerance: float,
          method: str) -> NullSpaceBasis:
    """The basis in which `concept` can be erased, kept in `store`: it protects the blank prompt, the watermarks and the
    concepts `others`, less the erased one. Raises ValueError when they leave no room."""
    prompts = [get_concept(store.category, other).prompt for other in others if other != concept.index]
    protected = list(dict.fromkeys(["", *watermarks(), *prompts]))
    recipe = {"made_by": "SRSME_Solution.py", "base": model.name, "base_digest": model.digest,
              "erase_cat": store.category, "erased_index": concept.index, "concept": concept.name}
    basis = NullSpaceBasis.solve(model.tokens(model.encode_prompt(protected)), protected, tolerance, method, recipe)
    kept = recipe_of(store.basis(concept.index), BASIS)
    if kept | {"largest_leak": basis.recipe["largest_leak"]} != basis.recipe:  # whose last digits depend on the machine
        basis.save(store.basis(concept.index))
    return basis


@dataclass(frozen=True)
class Effort:
    """How a step is computed, which is not what it computes: `second` is a device for the passes without gradient,
    `checkpointing` runs blocks again for their gradient, instead of keeping what they put out."""

    second: torch.device | None = None
    checkpointing: bool = False


def make_shifts(model: TextToImage, store: Store, concepts: Sequence[Concept], given: Mapping, data: Path,
                effort: Effort = Effort()) -> list[dict]:
    """Learn and save the shift of each concept by the method of `store`, but for those that are there from the same
    inputs already; returns a row for each that was learnt.

    `given` holds the method's settings, `seed` among them; `data` has a folder of pictures per concept. A curve
    goes beside each shift as CSV. Raises ValueError for a missing basis or folder.
    """
    bases = {concept.index: _basis(model, store, concept) for concept in concepts if METHODS[store.method].null_space}
    recipes = {concept.index: _recipe(model, store, concept, given, data) for concept in concepts}
    if METHODS[store.method].joint:
        for recipe in recipes.values():
            recipe["together"] = [concept.index for concept in concepts]
    missing = [concept for concept in concepts
               if not recipes[concept.index].items() <= recipe_of(store.shift(concept.index), SHIFT).items()]
    for concept in concepts:
        if concept not in missing:
            print(f"{concept.name}: {store.shift(concept.index)} is there already, from the same inputs")
    rounds = [[concept] for concept in missing]
    if METHODS[store.method].joint and missing:
        rounds = [list(concepts)]
    return [row for together in rounds for row in _learn(model, store, together, given, data, bases, recipes, effort)]


def _basis(model: TextToImage, store: Store, concept: Concept) -> NullSpaceBasis:
    source = store.basis(concept.index)
    basis = NullSpaceBasis.load(source, f"make it with python train-scripts/SRSME_Solution.py --erase_cat {store.category} "
                                        f"--erased_index {concept.index} --scenei {store.scene} --timei {store.time} "
                                        "--em_indexes ...")
    basis.check(model.digest, model.width, source)
    return basis


def _recipe(model: TextToImage, store: Store, concept: Concept, given: Mapping, data: Path) -> dict:
    """What a shift's file says that it was made from, as far as it is known before it is learnt."""
    recipe = {"made_by": METHODS[store.method].script, "method": store.method, "base": model.name,
              "base_digest": model.digest, "erase_cat": store.category, "erased_index": concept.index,
              "concept": concept.name, "prompt": concept.prompt, "captions": concept.captions, "anchor": concept.anchor,
              "arguments": dict(given), "dtype": str(model.dtype)}
    if METHODS[store.method].null_space:
        recipe["basis_digest"] = file_digest(store.basis(concept.index))
    if METHODS[store.method].pictures:
        recipe["data_digest"] = file_digest(data / concept.name)
    else:
        recipe |= model.drawn_by
    return recipe


def _learn(model: TextToImage, store: Store, concepts: Sequence[Concept], given: Mapping, data: Path,
           bases: Mapping[int, NullSpaceBasis], recipes: Mapping[int, dict], effort: Effort) -> Iterator[dict]:
    losses = [METHODS[store.method].of(model, concept, given, bases.get(concept.index)) for concept in concepts]
    most = given.get("max_base")
    for concept in concepts:
        if most and most > len(bases[concept.index].vectors):
            print(f"{concept.name}: the basis has {len(bases[concept.index].vectors)} directions, fewer than --max_base {most}, "
                  "and all are used")
    frozen = model.elsewhere(effort.second) if effort.second else model
    for loss in losses:
        loss.frozen, loss.checkpointing = frozen, effort.checkpointing
    batches = [_batches(model, store, concept, given, data, loss) for concept, loss in zip(concepts, losses)]
    if METHODS[store.method].joint:
        loss = JointErasure(losses)
        batch = (tuple(zip(*parts)) for parts in zip(*batches))
    else:
        loss, batch = losses[0], batches[0]
    protected = {concept.index: bases[concept.index].recipe["protected"] if concept.index in bases else ["", *watermarks()]
                 for concept in concepts}
    seen = model.seen(dict.fromkeys(prompt for concept in concepts for prompt in (concept.prompt, *protected[concept.index])))
    model.park()
    start = time.perf_counter()
    curve = learn(loss, batch, given["lr"], given["iter_break"], given.get("threshold"),
                  "erase " + ", ".join(concept.name for concept in concepts))
    seconds, layers = time.perf_counter() - start, kv_layers(model.unet)
    for concept, own in zip(concepts, losses):
        basis, shift, path = bases.get(concept.index), own.shift(), store.shift(concept.index)
        with atomic(path.with_suffix(".csv")) as partial:
            curve.to_csv(partial, index=False)
        own_seen = {prompt: seen[prompt] for prompt in (concept.prompt, *protected[concept.index])}
        moved = {row["prompt"]: row["leak"] for row in leaks(layers, {"": shift}, own_seen)}
        if not set(shift.names) <= {f"{name}.weight" for name in layers}:
            moved = dict.fromkeys(moved, float("nan"))  # keys and values do not say all
        within = {name: basis.recipe[name] for name in ("protected", "rank", "tolerance")} if basis else {}
        shift.save(path, recipes[concept.index] | {"steps": len(curve)} | within)
        yield {"concept": concept.name, "steps": len(curve), "seconds": round(seconds, 1),
               "momentum": curve.momentum.iloc[-1], "moves own prompt": moved.pop(concept.prompt),
               "moves blank, watermarks, protected": max(moved.values())}


def _batches(model: TextToImage, store: Store, concept: Concept, given: Mapping, data: Path, loss) -> Iterator:
    if METHODS[store.method].pictures:
        return from_folder(model, data / concept.name, given["batch_size"], given["seed"],
                           f"make it with python eval-scripts/generate-data.py --erase_cat {store.category} "
                           f"--prompt '{concept.name}' --model_name '0'")
    return sampled(model, loss.concept, given["batch_size"], given["ddim_steps"], given["start_guidance"],
                   given["seed"], loss.active)
