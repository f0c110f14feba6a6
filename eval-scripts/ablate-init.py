"""Compare the closed form with training: erasure in closed form, by gradient from zero, and by gradient from that form.

Beside accuracies and distances on concept names it measures held-out templates, and what is generated instead of an
erased concept: `fd_reference` is the Frechet distance of the erased prompts' images to rendered ones that show no
concept of the category; the original model's own images without a concept, of the empty prompt, are the row to compare
with. Writes init.csv and init.md into SAVE_PATH/CATEGORY.
"""

from ldm.cli import arguments, output
from ldm.cli.experiment import add_experiment, add_targets, artifacts_dir, make_ablation, srsme_config, target_indexes
from ldm.cli.run import run
from ldm.config.concepts import get_concept


def main() -> None:
    parser = arguments.make_parser(__doc__)
    add_experiment(parser, "ablations")
    add_targets(parser, "0,1,2")
    text = "rendered images that show no concept"
    parser.option("num_rendered", type=arguments.positive_int, default=500, help=text)
    args = parser.parse_args()
    erased = target_indexes(args)
    from ldm.experiments.ablations import compare_initializations, save_tables

    experiment = make_ablation(args)
    experiment.folder, experiment.held_out = experiment.folder / "init", True
    config = srsme_config(args, experiment)
    table, means = compare_initializations(experiment, artifacts_dir(args), erased, config, args.num_rendered)
    path = args.save_path / args.category / "init"
    names = ", ".join(get_concept(args.category, index).name for index in erased)
    save_tables(table, means, path)
    output.show_table(means, title=f"{names}:")
    print(f"-> {path}.md, .csv")


if __name__ == "__main__":
    run(main)
