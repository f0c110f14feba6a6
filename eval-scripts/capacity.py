"""How many concepts fit: what the protected prompts' spectrum leaves free at several tolerances, and what each would cost.

Erases every concept of --erased_index in closed form, each by its own shift that protects all the others, the blank prompt and
the watermarks, without drawing anything. Writes SAVE_PATH/capacity.csv and .png, and leaks.csv with the leak on every
protected prompt and held-out template.
"""

from pathlib import Path

from ldm import cli
from ldm.erasure.capacity import DEFAULT_TOLERANCES, measure_capacity
from ldm.config.concepts import EMPTY_PROMPT_LABEL, parse_erase_targets
from ldm.io.paths import REPO_ROOT
from ldm.io.files import atomic_write
from ldm.metrics.tables import to_markdown
from ldm.config.models import load_model_config
from ldm.experiments.plots import plot_spectrum


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_model(parser)
    cli.add_category(parser)
    parser.add_argument("--erased_index", required=True, help="all concepts that will ever be erased, such as 0-8")
    parser.add_argument("--tolerances", default=",".join(map(str, DEFAULT_TOLERANCES)), help="what counts as zero, relatively")
    parser.add_argument("--templates", type=cli.from_zero, default=None,
                        help="caption templates to protect beside each bare name (default: the model's config)")
    parser.add_argument("--save_path", type=Path, default=REPO_ROOT / "evaluation_folder" / "capacity")
    cli.add_device(parser)
    args = parser.parse_args()
    concepts, tolerances = parse_erase_targets(args.erased_index, args.erase_cat), cli.parse_numbers(args.tolerances, "--tolerances", 1)
    if not all(0 < tolerance < 1 for tolerance in tolerances):
        raise ValueError(f"--tolerances {args.tolerances}: give numbers between 0 and 1, such as 1e-7,1e-3")
    model = cli.load_model(args, cli.parse_devices(args.device)[0])
    own = load_model_config(model.base)
    cli.fill(args, own.solution)
    found = measure_capacity(model, concepts, args.templates, own.solution.always, sorted(tolerances), own.erasure["SRS-ME"])
    print("spectrum: " + ", ".join(f"{number}: {found.values[number - 1]:.1e}" for number in (1, 2, 5, 10, 20, 50, 100, 200, 500)
                                   if number <= model.width) + f", {model.width}: {found.values[-1]:.1e}")
    for name, table in (("capacity", found.table), ("leaks", found.leaks)):
        with atomic_write(args.save_path / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
    plot_spectrum(found.values.tolist(), found.table, args.save_path / "capacity.png")
    worst = found.leaks.pivot(index="prompt", columns="tolerance", values="leak")
    few = worst.loc[worst.max(axis=1).sort_values(ascending=False).index[:20]].rename(index={"": EMPTY_PROMPT_LABEL}).reset_index()
    few.columns = ["the most moved prompts", *(f"leak at {tolerance:g}" for tolerance in worst.columns)]
    print(f"{to_markdown(found.table)}\n\n{to_markdown(few)}\n-> capacity.csv, capacity.png and leaks.csv in {args.save_path}")


if __name__ == "__main__":
    cli.run(main)
