"""Compare what two checkouts write for the same commands: tensors bit by bit, images pixel by pixel, tables number by number.

    python tests/bench/compare_checkouts.py run CHECKOUT OUTPUT     # the walk below, by the code of CHECKOUT
    python tests/bench/compare_checkouts.py compare OUTPUT OUTPUT   # what differs between two such walks

The walk is the README's on nine styles in the original's flags: bases, shifts, images of five merges, exports in five formats,
one shift of each other method, and the ledger's export. Names in headers and tables may differ; numbers may not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors.torch import load_file

DRAW = "eval-scripts/generate-images-merge.py --prompts_path data/style_classify.csv"
WALK = (
    "train-scripts/SRSME_Solution.py --erase_cat style --erased_index 0,1,2 --em_indexes 0,1,2 --scenei 1 --timei 0 --shifts_path {out}/shifts",
    "train-scripts/SRS_ME.py --erase_cat style --erased_index 0,1,2 --scenei 1 --timei 0 --shifts_path {out}/shifts",
    f"{DRAW} --shifts_path {{out}}/shifts --save_path {{out}}/images",
    f"{DRAW} --shifts_path {{out}}/shifts --merge 0,1,2 --save_path {{out}}/images",
    f"{DRAW} --shifts_path {{out}}/shifts --merge 0,2 --save_path {{out}}/images",
    "eval-scripts/compare.py --path1 {out}/images/ori-merge --path2 {out}/images/012-merge",
    "eval-scripts/lpips_eval.py --path1 {out}/images/ori-merge --path2 {out}/images/012-merge",
    "eval-scripts/FID_eval.py --path1 {out}/images/ori-merge --path2 {out}/images/012-merge",
    "eval-scripts/styleloss.py --path1 {out}/images/ori-merge --path2 {out}/images/012-merge",
    "train-scripts/Merge_model.py --merge 0,1,2 --shifts_path {out}/shifts --save_path {out}/merged --format compvis,diffusers,unet,lora,kohya",
    "train-scripts/Merge_model.py --merge 1 --shifts_path {out}/shifts --save_path {out}/half --format unet,lora --dtype float16 --rank 2",
    "eval-scripts/generate-images-merge.py --merge 0,1,2 --shifts_path {out}/shifts --prompts_path data/watermark.csv --save_path {out}/watermark",
    "train-scripts/SRSME_Solution.py --erase_cat style --erased_index 0,1,2 --em_indexes 0-8 --scenei 2 --timei 0 --shifts_path {out}/shifts",
    "train-scripts/SRS_ME.py --erase_cat style --erased_index 0,1,2 --scenei 2 --timei 0 --shifts_path {out}/shifts",
    f"{DRAW} --shifts_path {{out}}/shifts --merge 0,1,2 --scenei 2 --save_path {{out}}/protected",
    "eval-scripts/generate-data.py --prompt Cezanne --model_name 0 --num_seeds 20 --save_path {out}/data",
    "eval-scripts/generate-data.py --prompt Picasso --model_name 0 --num_seeds 20 --save_path {out}/data",
    "eval-scripts/generate-data.py --model_name paint --erase_cat object --prompt church --num_seeds 20 --save_path {out}/painted",
    "train-scripts/FMN.py --erased_index 0 --iter_break 6 --data_path {out}/data --shifts_path {out}/shifts",
    "train-scripts/Abconcept.py --erased_index 0 --iter_break 6 --data_path {out}/data --shifts_path {out}/shifts",
    "train-scripts/Esd.py --erased_index 0 --iter_break 4 --shifts_path {out}/shifts",
    "train-scripts/CiE.py --erased_index 0 --iter_break 6 --data_path {out}/data --shifts_path {out}/shifts",
    "train-scripts/SRS_ME.py --erased_index 0,2 --joint --iter_break 6 --data_path {out}/data --shifts_path {out}/shifts",
    "train-scripts/SRS_ME.py --erased_index 0 --scenei 2 --init zero --iter_break 12 --batch_size 2 --reg_beta 1e-5 --threshold -1 --data_path {out}/data "
    "--shifts_path {out}/shifts",
    "train-scripts/capacity.py --erased_index 0-8 --save_path {out}/capacity",
    "train-scripts/ledger.py init --root {out}/ledger --erase_cat style",
    "train-scripts/ledger.py erase VanGogh Picasso --root {out}/ledger",
    "train-scripts/ledger.py restore Picasso --root {out}/ledger",
    "train-scripts/ledger.py export --format unet,lora --root {out}/ledger",
)


def run(checkout: Path, out: Path) -> None:
    """Run the walk by the code of a checkout, its output in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1"}
    for line in WALK:
        command = line.format(out=out.resolve()).split()
        done = subprocess.run([sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{line}: {done.stderr[-2000:]}")
        print(f"{line}", flush=True)


def compare(first: Path, second: Path) -> int:
    """Print what differs, kind by kind; return how many files do."""
    counts, different = {}, []
    for path in sorted(first.rglob("*")):
        name = path.relative_to(first)
        if path.suffix not in (".safetensors", ".png", ".csv"):
            continue
        counts[path.suffix] = counts.get(path.suffix, 0) + 1
        other = second / name
        if not other.is_file():
            different.append(f"{name} is missing")
        elif path.suffix == ".safetensors" and not _same_tensors(path, other):
            different.append(f"{name}: tensors")
        elif (
            path.suffix == ".png"
            and not np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(other)))
            and "capacity" not in name.parts
        ):
            different.append(f"{name}: pixels")
        elif path.suffix == ".csv" and not _same_numbers(path, other):
            different.append(f"{name}: numbers")
    extra = [
        path for path in second.rglob("*") if path.suffix in counts and not (first / path.relative_to(second)).exists()
    ]
    different += [f"{path.relative_to(second)} is new" for path in extra]
    print(", ".join(f"{count} {suffix}" for suffix, count in counts.items()), f"compared, {len(different)} different")
    print("\n".join(different))
    return len(different)


def _same_tensors(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    if a.keys() != b.keys():
        return False
    return all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and bool((a[name] == b[name]).all())
        for name in a
    )


def _same_numbers(first: Path, second: Path) -> bool:
    a, b = (pd.read_csv(path, keep_default_na=False).to_numpy().tolist() for path in (first, second))
    return a == b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "compare"))
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args()
    if args.action == "run":
        run(args.first, args.second)
    else:
        sys.exit(bool(compare(args.first, args.second)))


if __name__ == "__main__":
    main()
