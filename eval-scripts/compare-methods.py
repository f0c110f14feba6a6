"""Compare every method on one model: all concepts of a category but the restored ones are erased, each method in turn.

SRS-ME is there in its gated form; in its linear form, with the weights of its retain set multiplied by each of
--retain_factors; linear as it was without a retain set ("words alone"); and trained. Measured are the images of names,
held-out templates and compositions of the erased concepts, and of what should stay: restored and other concepts,
compositions with them, kin, captions, words, watermarks. Writes methods.csv, .md, .png (the plot) and
-grid.png into SAVE_PATH/CATEGORY. The same command resumes a stopped run: shifts and images are made once.
"""

from pathlib import Path

from ldm.cli import arguments, output
from ldm.cli.arguments import Namespace
from ldm.cli.concepts import category_indexes
from ldm.cli.experiment import (
    add_experiment,
    artifacts_dir,
    make_experiment,
    method_configs,
    parse_methods,
    trainable_methods,
)
from ldm.cli.run import run
from ldm.config.concepts import erasable_concepts
from ldm.config.everyday import COMPOSED_WITH
from ldm.config.methods import METHODS


def write(args: Namespace, table, comparison, path: Path) -> None:
    """Write the table, its summary, the plot and the grid, and print the summary."""
    from ldm.experiments.methods import PLOTTED, summarize, summary_markdown
    from ldm.experiments.plots import plot_tradeoff
    from ldm.io.files import atomic_write, write_text
    from ldm.io.images import save_image

    summary = summarize(table)
    with atomic_write(path.with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False)
    text = summary_markdown(summary)
    write_text(path.with_suffix(".md"), text + "\n")
    plotted = {column: label for column, label in PLOTTED.items() if column in summary}
    plot_tradeoff(
        summary[summary["line"] != "original"], ("left", "erased concepts left, %"), plotted, path.with_suffix(".png")
    )
    save_image(path.with_name("methods-grid.png"), comparison.grid())
    output.show_tables(text, {"": summary})
    print(f"-> {path}.png, .md, .csv, -grid.png")


def main() -> None:
    parser = arguments.make_parser(__doc__)
    add_experiment(parser, "methods")
    parser.set_defaults(seeds_per_prompt=2)
    parser.option("methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    text = "concepts that are not erased, by index such as 2, or by name in --category"
    parser.option("restored", nargs="*", default="2", help=text)
    text = "what the weights of SRS-ME's retain set are multiplied by, such as 0.1,1,10"
    parser.option("retain_factors", default="0.1,0.3,1,1.5,3", help=text)
    text = "prompts of each group that nobody protects, for each concept of the category"
    parser.option("prompts_per_concept", type=arguments.positive_int, default=4, help=text)
    args = parser.parse_args()
    methods, restored = parse_methods(args.methods), category_indexes(args.restored, args.category)
    erased = [concept.index for concept in erasable_concepts(args.category) if concept.index not in restored]
    if "form" in arguments.typed:
        raise ValueError("`form`: both forms are compared here, so leave it out")
    if not erased:
        raise ValueError("`restored` leaves no concept to erase: name fewer")
    factors = arguments.parse_numbers(args.retain_factors, "retain_factors", minimum=1)
    if min(factors) < 0:
        raise ValueError(f"`retain_factors` {args.retain_factors}: give numbers above 0, or 0")
    import pandas as pd

    from ldm.experiments.methods import MethodComparison, list_contenders, prompt_groups
    from ldm.metrics.classify import find_classifier

    experiment = make_experiment(args)
    configs = method_configs(args, experiment)
    contenders = list_contenders(trainable_methods(experiment, methods, configs), configs, factors)
    second = COMPOSED_WITH.get(args.category)
    second_classifier = find_classifier(second, None, experiment.model.device) if second else None
    groups = prompt_groups(args.category, erased, args.prompts_per_concept)
    comparison = MethodComparison(experiment, artifacts_dir(args), erased, groups, second_classifier)
    tables = []
    for number, contender in enumerate([None, *contenders]):
        print(f"{number} of {len(contenders)}: {contender.name if contender else 'the original model'}", flush=True)
        tables.append(comparison.measure(contender))
        write(args, pd.concat(tables, ignore_index=True), comparison, args.save_path / args.category / "methods")


if __name__ == "__main__":
    run(main)
