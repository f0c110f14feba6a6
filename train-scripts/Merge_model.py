"""Merge any set of shifts into a copy of the base model, or write each as a LoRA, in the format that its user reads.

--format takes one or more of compvis, diffusers, unet (merged weights) and lora, kohya (a LoRA a concept, cut to --rank).
Reports how far each shift moves what the other concepts' prompts see. A concept left out of --merge is restored.
"""

from pathlib import Path

import pandas as pd
from tqdm import tqdm

from ldm import cli
from ldm.attention import kv_layers
from ldm.concepts import ROOT, load_concepts
from ldm.export import FORMATS, LORAS, cut, holding, leak_table
from ldm.images import RECIPE, atomic_folder, check_recipe, write_json
from ldm.metrics.compare import to_markdown
from ldm.shift import merge, rounded_leaks


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_model(parser)
    cli.add_category(parser)
    cli.add_scene(parser)
    cli.add_merge(parser, required=True)
    parser.add_argument("--format", type=cli.formats, default="diffusers", help=f"one or more of {','.join(FORMATS)}")
    parser.add_argument("--dtype", choices=cli.DTYPES, default="float32",
                        help="what the weights are written in; a compvis checkpoint keeps its own unless this is a half")
    parser.add_argument("--rank", type=cli.rank, default=None, help="directions that each shift keeps, or auto for the fewest with "
                        "--share of its effect (default: auto for lora and kohya, all for merged weights)")
    parser.add_argument("--share", type=float, default=0.85, help="of the effect on the concept's own prompts, for --rank auto")
    parser.add_argument("--save_path", type=Path, default=ROOT / "models" / "merged", help="the folder NAME or NAME-FORMAT goes here")
    cli.add_device(parser)
    args = parser.parse_args()
    dtype, loras = cli.DTYPES[args.dtype], [name for name in args.format if name in LORAS]
    model = cli.load_model(args, cli.parse_devices(args.device)[0])
    shifts, name = cli.store(args, model.name, args.method).load_merge(args.merge)
    if not shifts:
        raise ValueError("--merge names no shift: give indexes such as 0,1,2, or shift files")
    for shift in shifts.values():
        shift.check(model.digest, model.unet)
    report, few = [], shifts
    if loras or args.rank:
        few, report = cut(model, shifts, args.rank or "auto", args.share, dtype)
    layers = kv_layers(model.unet)
    prompts = model.seen(["", *(concept.prompt for concept in load_concepts(args.erase_cat))])
    whole = few if args.rank else shifts
    table = leak_table(layers, whole, prompts)
    merged = merge(model.unet, list(whole.values()), dtype)
    table[f"all, in {str(dtype).removeprefix('torch.')}"] = pd.Series(rounded_leaks(layers, merged, prompts))
    targets = []
    for kind in tqdm(args.format, desc="write", unit="format"):
        used = few if kind in LORAS else whole
        target = args.save_path / (f"{model.name}-{name}" + ("" if kind == "diffusers" else f"-{kind}"))
        recipe = {"made_by": "Merge_model.py", "base": model.base, "base_digest": model.digest,
                  "merged": {label: shift.recipe for label, shift in used.items()}}
        if str(dtype) != "torch.float32":
            recipe["dtype"] = str(dtype)
        check_recipe(target, recipe)
        if not target.exists():
            with atomic_folder(target) as partial, holding(model, merged, dtype):
                FORMATS[kind](model, used, partial, dtype)
                write_json(partial / RECIPE, recipe)
        targets.append(target)
    print(to_markdown(table.reset_index()))
    if report:
        print(f"\n{to_markdown(pd.DataFrame(report))}")
    for target in targets:
        print(f"-> {target}")


if __name__ == "__main__":
    cli.run(main)
