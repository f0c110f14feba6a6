"""Erase concepts by SRS-ME: learn, for each, a weight shift inside the null space that SRSME_Solution.py found.

Writes shift-INDEX.safetensors and its curve shift-INDEX.csv. The base model is never changed; merge shifts with
generate-images-merge.py or Merge_model.py, and restore a concept by leaving its shift out.
"""

import itertools
import time
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from ldm import cli
from ldm.attention import kv_layers
from ldm.checkpoint import file_digest, recipe_of
from ldm.concepts import ROOT, parse_erased
from ldm.images import atomic
from ldm.latents import from_folder
from ldm.losses import SeparableErasure
from ldm.metrics.compare import to_markdown
from ldm.model import settings
from ldm.shift import SHIFT, NullSpaceBasis, WeightShift, leaks
from ldm.training import MomentumStop, erase


def learn(model, args, concept, basis, recipe, path) -> dict:
    """Learn and save one concept's shift; returns a row for the table."""
    prompts = [concept.prompt] + [template.format(concept.prompt) for template in concept.templates[:args.templates]]
    embeddings = model.encode_prompt(prompts)
    directions = basis.directions(embeddings, args.max_base)
    if args.max_base and args.max_base > len(directions):
        print(f"--max_base {args.max_base}: the basis has {len(directions)} directions, and all are used")
    layers = kv_layers(model.unet)
    shift = WeightShift.zeros(layers, directions, args.scale_factor)
    loss = SeparableErasure(model, layers, shift, embeddings, model.encode_prompt([""]), args.reg_beta)
    batches = from_folder(model, args.data_path / concept.name, args.batch_size, args.seed,
                          f"make it with python eval-scripts/generate-data.py --erase_cat {args.erase_cat} "
                          f"--prompt '{concept.name}' --model_name '0'")
    stop, curve, start = MomentumStop(args.threshold), [], time.perf_counter()
    with tqdm(total=args.iter_break, desc=f"erase {concept.name}", unit="step") as bar:
        for step in itertools.islice(erase(loss, shift.parameters(), batches, args.lr), args.iter_break):
            reached = stop.update(step)
            curve.append((step.number, step.loss, step.watched, stop.momentum))
            bar.set_postfix(momentum=f"{stop.momentum:.2e}", refresh=False)
            bar.update()
            if reached:
                break
        else:
            print(f"{concept.name}: --threshold {args.threshold} was not reached within --iter_break {args.iter_break}")
    seconds = time.perf_counter() - start
    table = pd.DataFrame(curve, columns=["step", "loss", "correlation", "momentum"])
    with atomic(path.with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False)
    seen = {prompt: model.encode_prompt([prompt])[0] for prompt in [concept.prompt, *basis.recipe["protected"]]}
    moved = {row["prompt"]: row["leak"] for row in leaks(layers, {"": shift}, seen)}
    own = moved.pop(concept.prompt)
    shift.save(path, recipe | {"steps": len(curve), "protected": basis.recipe["protected"],
                               "rank": basis.recipe["rank"], "tolerance": basis.recipe["tolerance"]})
    return {"concept": concept.name, "steps": len(curve), "seconds": round(seconds, 1), "momentum": stop.momentum,
            "moves own prompt": own, "moves protected": max(moved.values())}


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_model(parser)
    cli.add_category(parser)
    parser.add_argument("--erased_index", required=True, help="concepts to erase, one after the other, such as 0 or 0,1,2")
    cli.add_scene(parser)
    for flag, kind, text in (("--lr", float, "Adam's rate"), ("--scale_factor", float, "beta, the basis' scale"),
                             ("--threshold", float, "stop when the momentum of the correlation falls to it"),
                             ("--reg_beta", float, "weight of |dW|_1"), ("--iter_break", cli.positive, "most steps"),
                             ("--max_base", cli.positive, "most basis vectors, those that the concept reaches most"),
                             ("--batch_size", cli.positive, "latents a step"),
                             ("--templates", int, "caption templates to erase beside the bare name")):
        parser.add_argument(flag, type=kind, default=None, help=f"{text} (default: the model's config)")
    parser.add_argument("--data_path", type=Path, default=ROOT / "data", help="has a folder of images per concept")
    parser.add_argument("--seed", type=int, default=0)
    cli.add_device(parser, "--devices")
    args = parser.parse_args()
    concepts = parse_erased(args.erased_index, args.erase_cat)
    model = cli.load_model(args, cli.parse_devices(args.devices)[0])
    cli.fill(args, settings(model.base).erasure)
    store, rows = cli.store(args, model.name), []
    for concept in concepts:
        solve = (f"make it with python train-scripts/SRSME_Solution.py --erase_cat {args.erase_cat} "
                 f"--erased_index {concept.index} --scenei {args.scenei} --timei {args.timei} --em_indexes ...")
        source = store.basis(concept.index)
        basis = NullSpaceBasis.load(source, solve)
        basis.check(model.digest, model.text_encoder.config.hidden_size, source)
        chosen = ("lr", "scale_factor", "threshold", "reg_beta", "iter_break", "max_base", "batch_size", "templates", "seed")
        recipe = {"made_by": "SRS_ME.py", "base": model.name, "base_digest": model.digest, "erase_cat": args.erase_cat,
                  "erased_index": concept.index, "concept": concept.name, "prompt": concept.prompt,
                  "basis_digest": file_digest(source), "data_digest": file_digest(args.data_path / concept.name),
                  "arguments": {name: getattr(args, name) for name in chosen}}
        path = store.shift(concept.index)
        if recipe.items() <= recipe_of(path, SHIFT).items():
            print(f"{concept.name}: {path} is there already, from the same basis, pictures and arguments")
            continue
        rows.append(learn(model, args, concept, basis, recipe, path))
    if rows:
        print(to_markdown(pd.DataFrame(rows)))


if __name__ == "__main__":
    cli.run(main)
