"""Merge any set of shifts into a copy of the base model and write it as a diffusers folder.

Reports how far each shift moves what the other concepts' prompts see. A concept left out of --merge is restored.
"""

from pathlib import Path

import pandas as pd

from ldm import cli
from ldm.attention import kv_layers
from ldm.concepts import ROOT, load_concepts
from ldm.images import RECIPE, atomic_folder, check_recipe, write_json
from ldm.metrics.compare import to_markdown
from ldm.model import save
from ldm.shift import applied, leaks


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_model(parser)
    cli.add_category(parser)
    cli.add_scene(parser)
    cli.add_merge(parser, required=True)
    parser.add_argument("--save_path", type=Path, default=ROOT / "models" / "merged", help="the folder NAME goes here")
    cli.add_device(parser)
    args = parser.parse_args()
    model = cli.load_model(args, cli.parse_devices(args.device)[0])
    shifts, name = cli.store(args, model.name, args.method).load_merge(args.merge)
    if not shifts:
        raise ValueError("--merge names no shift: give indexes such as 0,1,2, or shift files")
    layers, digest = kv_layers(model.unet), model.digest
    for shift in shifts.values():
        shift.check(digest, model.unet)
    prompts = ["", *(concept.prompt for concept in load_concepts(args.erase_cat))]
    table = pd.DataFrame(leaks(layers, shifts, {prompt: model.encode_prompt([prompt])[0] for prompt in prompts}))
    target = args.save_path / f"{model.name}-{name}"
    recipe = {"made_by": "Merge_model.py", "base": model.base, "base_digest": digest,
              "merged": {label: shift.recipe for label, shift in shifts.items()}}
    check_recipe(target, recipe)
    if not target.exists():
        with atomic_folder(target) as partial:
            with applied(model.unet, list(shifts.values())):
                save(model, partial)
            write_json(partial / RECIPE, recipe)
    print(to_markdown(table.pivot(index="prompt", columns="shift", values="leak").loc[prompts].reset_index()))
    print(f"-> {target}")


if __name__ == "__main__":
    cli.run(main)
