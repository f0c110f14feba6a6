"""Compare what two checkouts write for the same commands: tensors bit by bit, images by pixels, tables by numbers.

    python tests/bench/compare_checkouts.py run CHECKOUT OUTPUT     # the walk below, by the code of CHECKOUT
    python tests/bench/compare_checkouts.py compare OUTPUT OUTPUT   # what differs between two such walks

The walk is the documents' on nine styles in the original's flags: bases, shifts, images of five merges, exports in five
formats, one shift of each other method, capacity, and the ledger's export. Names in headers and tables may differ;
numbers may not.
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

SOLVE = "train-scripts/SRSME_Solution.py --erase_cat style --erased_index 0,1,2 --timei 0 --shifts_path {out}/shifts"
ERASE = "train-scripts/SRS_ME.py --erase_cat style --shifts_path {out}/shifts"
TRAIN = "--data_path {out}/data --shifts_path {out}/shifts"
MERGE = "train-scripts/Merge_model.py --shifts_path {out}/shifts"
DRAW = "eval-scripts/generate-images-merge.py --shifts_path {out}/shifts"
STYLES = "--prompts_path data/style_classify.csv"
PAIR = "--path1 {out}/images/ori-merge --path2 {out}/images/012-merge"
DATA = "eval-scripts/generate-data.py --num_seeds 20"
WALK = (
    f"{SOLVE} --em_indexes 0,1,2 --scenei 1",
    f"{ERASE} --erased_index 0,1,2 --scenei 1 --timei 0",
    f"{DRAW} {STYLES} --save_path {{out}}/images",
    f"{DRAW} {STYLES} --merge 0,1,2 --save_path {{out}}/images",
    f"{DRAW} {STYLES} --merge 0,2 --save_path {{out}}/images",
    f"eval-scripts/compare.py {PAIR}",
    f"eval-scripts/lpips_eval.py {PAIR}",
    f"eval-scripts/FID_eval.py {PAIR}",
    f"eval-scripts/styleloss.py {PAIR}",
    f"{MERGE} --merge 0,1,2 --save_path {{out}}/merged --format compvis,diffusers,unet,lora,kohya",
    f"{MERGE} --merge 1 --save_path {{out}}/half --format unet,lora --dtype float16 --rank 2",
    f"{DRAW} --merge 0,1,2 --prompts_path data/watermark.csv --save_path {{out}}/watermark",
    f"{SOLVE} --em_indexes 0-8 --scenei 2",
    f"{ERASE} --erased_index 0,1,2 --scenei 2 --timei 0",
    f"{DRAW} {STYLES} --merge 0,1,2 --scenei 2 --save_path {{out}}/protected",
    f"{DATA} --prompt Cezanne --model_name 0 --save_path {{out}}/data",
    f"{DATA} --prompt Picasso --model_name 0 --save_path {{out}}/data",
    f"{DATA} --prompt church --erase_cat object --model_name paint --save_path {{out}}/painted",
    f"train-scripts/FMN.py --erased_index 0 --iter_break 6 {TRAIN}",
    f"train-scripts/Abconcept.py --erased_index 0 --iter_break 6 {TRAIN}",
    "train-scripts/Esd.py --erased_index 0 --iter_break 4 --shifts_path {out}/shifts",
    f"train-scripts/CiE.py --erased_index 0 --iter_break 6 {TRAIN}",
    f"train-scripts/SRS_ME.py --erased_index 0,2 --joint --iter_break 6 {TRAIN}",
    f"{ERASE} --erased_index 0 --scenei 2 --init zero --iter_break 12 --batch_size 2 --reg_beta 1e-5 --threshold -1 "
    "--data_path {out}/data",
    "capacity.py --erased_index 0-8 --save_path {out}/capacity",
    "train-scripts/ledger.py init --root {out}/ledger --erase_cat style",
    "train-scripts/ledger.py erase VanGogh Picasso --root {out}/ledger",
    "train-scripts/ledger.py restore Picasso --root {out}/ledger",
    "train-scripts/ledger.py export --format unet,lora --root {out}/ledger",
)


def run(checkout: Path, out: Path) -> None:
    """Run the walk by the code of a checkout, its output in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    checkout = checkout.resolve()
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    for line in WALK:
        command = line.format(out=out.resolve()).split()
        if not (checkout / command[0]).is_file():  # capacity.py has moved
            command[0] = str(next(checkout.glob(f"*-scripts/{command[0]}")))
        done = subprocess.run([sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{line}: {done.stderr[-2000:]}")
        print(f"{line}", flush=True)


def compare(first: Path, second: Path) -> int:
    """Print what differs, and return how many files do."""
    checks = {".safetensors": _same_tensors, ".png": _same_pixels, ".csv": _same_numbers}
    counts = dict.fromkeys(checks, 0)
    different = []
    for path in sorted(first.rglob("*")):
        name = path.relative_to(first)
        if path.suffix not in checks or (path.suffix == ".png" and "capacity" in name.parts):  # a plot has words in it
            continue
        counts[path.suffix] += 1
        if not (second / name).is_file():
            different.append(f"{name} is missing")
        elif not checks[path.suffix](path, second / name):
            different.append(f"{name} differs")
    others = [path.relative_to(second) for path in sorted(second.rglob("*")) if path.suffix in checks]
    different += [f"{name} is new" for name in others if not (first / name).exists()]
    counted = ", ".join(f"{count} {suffix}" for suffix, count in counts.items())
    print("\n".join([f"{counted} compared, {len(different)} different", *different]))
    return len(different)


def _same_pixels(first: Path, second: Path) -> bool:
    return np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))


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
