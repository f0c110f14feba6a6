"""From a method's name and concepts to saved shifts: what each method is given, and the recipe that goes into the file."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ldm.attention import kv_layers
from ldm.checkpoint import file_digest, recipe_of
from ldm.concepts import Concept, get_concept, said, watermarks
from ldm.images import atomic
from ldm.latents import from_folder, sampled
from ldm.losses import METHODS, JointErasure
from ldm.model import TextToImage
from ldm.null_space import BASIS, NullSpaceBasis, factor, without_each
from ldm.share import Share
from ldm.shift import SHIFT, base_norms, leaks
from ldm.store import Store
from ldm.training import COLUMNS, learn


def solve(model: TextToImage, store: Store, concepts: Sequence[Concept], others: Sequence[int], tolerance: float, method: str,
          templates: int = 0, always: float = 1.0, share: Share = Share(),
          also: Sequence[str] = ()) -> Iterator[tuple[Concept, NullSpaceBasis]]:
    """For each concept the basis in which it can be erased, kept in `store`: it protects the blank prompt, the watermarks, the
    prompts `also` and the concepts `others`, less the erased one, each by its bare name and its first `templates` captions. Above
    1 `always` weighs what is no concept more, in the spectrum and wherever a leak costs.

    What the bases have in common is decomposed once; of several processes each finds its `share`. Raises ValueError when the
    protected prompts leave no room.
    """
    fixed = list(dict.fromkeys(["", *watermarks(), *also]))
    said_by = {concept.index: said(concept, 0 if concept.watermark else templates)
               for concept in (get_concept(store.category, other) for other in others)}
    embeddings = {prompt: model.tokens(model.encode_prompt([prompt]))[0]
                  for prompt in dict.fromkeys([*fixed, *itertools.chain(*said_by.values())])}
    blocks = {index: torch.cat([embeddings[prompt] for prompt in prompts]) for index, prompts in said_by.items()}
    inside = [concept for concept in concepts if concept.index in blocks]
    rest = torch.cat([*(always * embeddings[prompt] for prompt in fixed),
                      *(block for index, block in blocks.items() if index not in {concept.index for concept in inside})])
    rows = without_each([blocks[concept.index] for concept in inside], rest) if inside else iter(())
    whole = factor(rest, *(blocks[concept.index] for concept in inside)) if len(inside) < len(concepts) else None
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
        kept = recipe_of(store.basis(concept.index), BASIS)
        if kept | {"largest_leak": basis.recipe["largest_leak"]} != basis.recipe:  # whose last digits depend on the machine
            basis.save(store.basis(concept.index))
        yield concept, basis


@dataclass(frozen=True)
class Effort:
    """How a step is computed, which is not what it computes: `second` is a device for the passes without gradient,
    `checkpointing` runs blocks again for their gradient, instead of keeping what they put out."""

    second: torch.device | None = None
    checkpointing: bool = False


def make_shifts(model: TextToImage, store: Store, concepts: Sequence[Concept], given: Mapping, data: Path,
                effort: Effort = Effort(), share: Share = Share()) -> list[dict]:
    """Learn and save the shift of each concept by the method of `store`, but for those that are there from the same
    inputs already; returns a row for each that was learnt.

    `given` holds the method's settings, `seed` among them; `data` has a folder of pictures per concept, which nobody asks for
    when there is nothing to learn (`iter_break` 0). A curve goes beside each shift as CSV. Of several processes each makes
    its `share`. Raises ValueError for a missing basis or folder.
    """
    kind = METHODS[store.method]
    if not given["iter_break"] and given.get("init") != "closed-form":
        raise ValueError("--iter_break 0 learns nothing: it goes with --init closed-form, which SRS_ME.py has")
    concepts = list(concepts) if kind.joint else share.of(concepts)
    if kind.joint and share.rank:
        return []  # one process learns them, since they are learnt at once
    if kind.null_space:
        for concept in concepts:
            _basis(model, store, concept)  # before any work, so that one that is missing costs none
    recipes = {concept.index: _recipe(model, store, concept, given, data) for concept in concepts}
    if kind.joint:
        for recipe in recipes.values():
            recipe["together"] = [concept.index for concept in concepts]
    missing = [concept for concept in concepts
               if not recipes[concept.index].items() <= recipe_of(store.shift(concept.index), SHIFT).items()]
    for concept in concepts:
        if concept not in missing:
            print(f"{concept.name}: {store.shift(concept.index)} is there already, from the same inputs")
    rounds = [[concept] for concept in missing]
    if kind.joint and missing:
        rounds = [list(concepts)]
    seen = _Seen(model)
    return [row for together in tqdm(rounds, desc="shifts", unit="shift", disable=bool(given["iter_break"]))
            for row in _learn(model, store, together, given, data, recipes, effort, seen)]


class _Seen:
    """What the layers see of prompts, and how much they make of it, each computed once."""

    def __init__(self, model: TextToImage):
        self.model, self.embeddings, self.norms = model, {}, {}

    def of(self, prompts: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The embeddings (tokens, d) of the prompts, and the `base_norms` of these."""
        prompts = list(dict.fromkeys(prompts))
        new = self.model.seen(prompt for prompt in prompts if prompt not in self.embeddings)
        if new:
            self.embeddings |= new
            self.norms |= base_norms(kv_layers(self.model.unet), new)
        return {prompt: self.embeddings[prompt] for prompt in prompts}, self.norms


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
    if METHODS[store.method].pictures and given["iter_break"]:
        recipe["data_digest"] = file_digest(data / concept.name)
    else:
        recipe |= model.drawn_by
    return recipe


def _learn(model: TextToImage, store: Store, concepts: Sequence[Concept], given: Mapping, data: Path,
           recipes: Mapping[int, dict], effort: Effort, prompts: _Seen) -> Iterator[dict]:
    null_space, start = METHODS[store.method].null_space, time.perf_counter()
    bases = {concept.index: _basis(model, store, concept) for concept in concepts if null_space}
    losses = [METHODS[store.method].of(model, concept, given, bases.get(concept.index)) for concept in concepts]
    protected = {concept.index: bases[concept.index].recipe["protected"] if null_space else ["", *watermarks()]
                 for concept in concepts}
    for concept, loss in zip(concepts, losses):
        if null_space and given["max_base"] and len(loss.shift().directions) < given["max_base"]:
            print(f"{concept.name}: it reaches {len(loss.shift().directions)} of the null space's directions, fewer than "
                  f"--max_base {given['max_base']}, and all are used")
    curve = pd.DataFrame(columns=COLUMNS)
    if given["iter_break"]:
        frozen = model.elsewhere(effort.second) if effort.second else model
        for loss in losses:
            loss.frozen, loss.checkpointing = frozen, effort.checkpointing
        batches = [_batches(model, store, concept, given, data, loss) for concept, loss in zip(concepts, losses)]
        if METHODS[store.method].joint:
            loss, batch = JointErasure(losses), (tuple(zip(*parts)) for parts in zip(*batches))
        else:
            loss, batch = losses[0], batches[0]
        prompts.of(itertools.chain(*protected.values(), (concept.prompt for concept in concepts)))
        model.park()
        start = time.perf_counter()
        curve = learn(loss, batch, given["lr"], given["iter_break"], given.get("threshold"),
                      "erase " + ", ".join(concept.name for concept in concepts))
    seconds, layers = time.perf_counter() - start, kv_layers(model.unet)
    for concept, own in zip(concepts, losses):
        shift, path = own.shift(), store.shift(concept.index)
        with atomic(path.with_suffix(".csv")) as partial:
            curve.to_csv(partial, index=False)
        seen, base = prompts.of([concept.prompt, *protected[concept.index]])
        moved = {row["prompt"]: row["leak"] for row in leaks(layers, {"": shift}, seen, base)}
        if not set(shift.names) <= {f"{name}.weight" for name in layers}:
            moved = dict.fromkeys(moved, float("nan"))  # keys and values do not say all
        within = {name: bases[concept.index].recipe[name] for name in ("protected", "rank", "tolerance")} if null_space else {}
        shift.save(path, recipes[concept.index] | {"steps": len(curve)} | within)
        yield {"concept": concept.name, "steps": len(curve), "seconds": round(seconds, 1),
               "momentum": curve.momentum.iloc[-1] if len(curve) else float("nan"), "moves own prompt": moved.pop(concept.prompt),
               "moves blank, watermarks, protected": max(moved.values())}


def _batches(model: TextToImage, store: Store, concept: Concept, given: Mapping, data: Path, loss) -> Iterator:
    if METHODS[store.method].pictures:
        return from_folder(model, data / concept.name, given["batch_size"], given["seed"],
                           f"make it with python eval-scripts/generate-data.py --erase_cat {store.category} "
                           f"--prompt '{concept.name}' --model_name '0'")
    return sampled(model, loss.concept, given["batch_size"], given["ddim_steps"], given["start_guidance"],
                   given["seed"], loss.active)
