"""The closed form against learning: concepts erased by the closed form, by gradient from zero, and by gradient from the closed form.

Beside accuracies and distances on bare names it measures held-out templates, and what an erased prompt draws instead: `world`
is the Frechet distance of the erased prompts' pictures to painted ones that show no concept of the category; the original model's
own pictures without a concept, of the blank prompt, are the row to compare with. Writes init.csv and init.md into
SAVE_PATH/CATEGORY.
"""

import pandas as pd

from ldm import ablation, cli, cli_experiment
from ldm.ablation import Variant
from ldm.concepts import parse_erased
from ldm.images import Case, atomic, image_name, read_cases, write_text
from ldm.metrics.compare import to_markdown
from ldm.metrics.frechet import features, frechet
from ldm.mini.paint import paint_folder
from ldm.shift import WeightShift
from ldm.store import Store

KINDS = {"closed form": ("closed-form", False), "gradient": ("zero", True), "closed form, then gradient": ("closed-form", True)}


def main() -> None:
    parser = cli.parser(__doc__)
    cli_experiment.add_experiment(parser, "ablations")
    parser.add_argument("--erased_index", default="0,1,2", help="concepts to erase and merge, such as 0,1,2")
    parser.add_argument("--num_painted", type=cli.positive, default=500, help="painted pictures that show no concept")
    args = parser.parse_args()
    concepts = parse_erased(args.erased_index, args.erase_cat)
    erased = [concept.index for concept in concepts]
    tried = cli_experiment.experiment(args)
    tried.folder, tried.held_out = tried.folder / "init", True
    device = tried.model.device
    painted = tried.folder / "painted"
    paint_folder(None, args.erase_cat, [Case("", k, k) for k in range(args.num_painted)], painted, {"made_by": "ablate-init.py"})
    world = features(sorted(painted.glob("*.png")), device, args.inception_path)
    names = {concept.prompt for concept in concepts}

    def far(folder, prompts) -> float:
        """The distance of a folder's pictures of some prompts to the painted ones."""
        cases = [case for case in read_cases(folder / "prompts.csv") if case.prompt in prompts]
        return frechet(features([folder / image_name(case.number, 0) for case in cases], device, args.inception_path), world)

    given, steps = cli_experiment.srs_me(args, tried), cli_experiment.steps(args, tried)
    variants = [Variant(name.replace(" ", "-").replace(",", ""), given | {"init": init, "iter_break": steps * learns}, erased)
                for name, (init, learns) in KINDS.items()]
    table = ablation.ablate(tried, args.shifts_path, "init", erased, variants)
    held = {template.format(concept.prompt) for concept in concepts for template in concept.held_out}
    original = tried.images({}, "")
    rows = [{"start": "the original, blank prompt", "world": far(original, {""})},
            {"start": "the original, the concepts", "world": far(original, names)}]
    for variant, name in zip(variants, KINDS):
        store = Store(args.shifts_path / f"init-{variant.value}", "SRS-ME", tried.model.name, args.erase_cat, 0, 0)
        shifts = {str(index): WeightShift.load(store.shift(index)) for index in erased}
        part = table[table.value == variant.value]
        others = part[part.status == "regular"]
        rows.append({"start": name, "steps": part.steps.iloc[0], "erased": part[part.prompt.isin(names)].accuracy_after.mean(),
                     "held-out": part[part.prompt.isin(held)].accuracy_after.mean(), "regular before": others.accuracy_before.mean(),
                     "regular": others.accuracy_after.mean(), "least regular": others.accuracy_after.min(), "regular LPIPS": others.lpips.mean(),
                     "protected LPIPS": part[part.status == "protected"].lpips.mean(),
                     "world": far(tried.images(shifts, f"init-{variant.value}"), names)})
    means, path = pd.DataFrame(rows), tried.folder.parent / "init"
    with atomic(path.with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False)
    write_text(path.with_suffix(".md"), to_markdown(means) + "\n")
    print(f"{', '.join(concept.name for concept in concepts)}:\n{to_markdown(means)}\n-> {path}.md, .csv")


if __name__ == "__main__":
    cli.run(main)
