"""Run the paper's scenes through time with several methods: what is erased, restored and kept, side by side.

Writes into SAVE_PATH/CATEGORY, for each scene N: sceneN.csv and .md (every concept and time), sceneN-averages.csv and
.png, and the image grid sceneN.png. No shift of a scene is computed twice, and images are generated once for each set
of weights, so that the same command resumes a stopped run. Beside the category's prompts there are some of each group
that nothing protects: everyday captions, words, kin names, near misses and compositions. --protect_scope all lets
SRS-ME protect every concept of the category, not only those that the scene ever erases (sceneN-all.csv and so on).
"""

from ldm.cli import arguments, output
from ldm.cli.arguments import Namespace
from ldm.cli.experiment import (
    add_experiment,
    artifacts_dir,
    make_experiment,
    method_configs,
    parse_methods,
    parse_scenes,
    trainable_methods,
)
from ldm.cli.run import run
from ldm.config.concepts import STATUSES
from ldm.config.methods import METHODS, EvaluationConfig, MethodConfig
from ldm.config.scenes import load_scene


def run_and_write(args: Namespace, experiment, scene: int, configs: dict[str, MethodConfig]) -> None:
    """Run one scene by the methods with these settings, and write all of its files."""
    import pandas as pd

    from ldm.experiments.plots import LinePlot, plot_lines
    from ldm.experiments.scenes import run_scene, scene_grid, summarize, wide_table
    from ldm.io.files import atomic_write, write_text
    from ldm.io.images import save_image
    from ldm.metrics.frechet import distance_column
    from ldm.metrics.tables import to_markdown

    steps = load_scene(scene, args.category)
    protect_all = args.protect_scope == "all"
    shift_dir = artifacts_dir(args) / "all" if protect_all else artifacts_dir(args)
    tables, folders = [], {}
    for method, config in configs.items():
        table, folders[method] = run_scene(experiment, config, scene, steps, shift_dir, protect_all)
        tables.append(table)
    table, distance = pd.concat(tables, ignore_index=True), distance_column(args.inception_weights)
    means = summarize(table, distance)
    path = args.save_path / args.category / f"scene{scene}{'-all' if protect_all else ''}"
    for part, target in ((table, f"{path}.csv"), (means, f"{path}-averages.csv")):
        with atomic_write(target) as partial:
            part.to_csv(partial, index=False)
    title = (
        f"Each concept: {distance} / accuracy % / LPIPS / unchanged (E erased, R restored); the last three: PSNR dB / "
        "LPIPS / unchanged. Unchanged: the fraction of images that differ from the original's by at most 1 of 255"
    )
    text = "\n\n".join([title, to_markdown(wide_table(table, args.category, distance)), to_markdown(means)])
    write_text(f"{path}.md", text + "\n")
    metrics = {"accuracy": "accuracy %", distance: distance, "lpips": "LPIPS"}
    plotted = means[means["status"].isin(STATUSES)]
    plot = LinePlot("time", "method", metrics, "status", STATUSES, title=f"Scene {scene}, {args.category}")
    plot_lines(plotted, plot, f"{path}-averages.png")
    save_image(f"{path}.png", scene_grid(experiment, steps, folders))
    output.show_tables(f"Scene {scene}. {text}", {path.name: table, f"{path.name}-averages": means})
    print(f"-> {path}.png, .md, .csv, -averages.csv, -averages.png")


def main() -> None:
    parser = arguments.make_parser(__doc__)
    add_experiment(parser, "scenes")
    arguments.add_settings(parser, EvaluationConfig, "unprotected_prompts")
    parser.add_argument("--scene", default="4", help="a scene of configs/scenes.yaml, or several such as 1,2,3,4")
    parser.option("methods", default="SRS-ME,FMN,AbConcept,ESD", help=f"of {', '.join(METHODS)}")
    text = "what SRS-ME's null space protects"
    parser.option("protect_scope", choices=("scene", "all"), default="scene", help=text)
    parser.retire("--protect", "--protect is --protect_scope today: give --protect_scope scene or --protect_scope all")
    args = parser.parse_args()
    methods, scenes = parse_methods(args.methods), parse_scenes(args.scene)
    experiment = make_experiment(args)
    if experiment.classifier is None:
        raise ValueError(f"category {args.category} has no classifier: choose style or object, or pass `classifier`")
    configs = method_configs(args, experiment)
    methods = trainable_methods(experiment, methods, configs)
    for scene in scenes:
        run_and_write(args, experiment, scene, {method: configs[method] for method in methods})


if __name__ == "__main__":
    run(main)
