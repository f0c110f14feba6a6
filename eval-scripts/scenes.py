"""Play the paper's scenes through time with several methods: what is erased, given back and kept, side by side.

Writes into SAVE_PATH/CATEGORY, for each scene N: sceneN.csv and .md (every concept and time), sceneN-averages.csv and .png, and
the picture sheet sceneN.png. No shift of a scene is computed twice, and images are drawn once for each set of weights, so that
a stopped run goes on with the same command. --protect all lets SRS-ME protect every concept of the category, not
only those that the scene ever erases (sceneN-all.csv and so on).
"""

import pandas as pd

from ldm import cli, cli_experiment
from ldm.config.concepts import STATUSES
from ldm.config.scenes import load_scene
from ldm.io.files import atomic_write, write_text
from ldm.io.images import save_image
from ldm.erasure.methods import METHODS
from ldm.metrics.tables import to_markdown
from ldm.metrics.frechet import distance_column
from ldm.experiments.plots import plot_lines
from ldm.experiments.scenes import run_scene, scene_grid, summarize, wide_table


def show(args, experiment, scene: int, methods: list[str]) -> None:
    """Play one scene and write all of its files."""
    moments, tables, folders = load_scene(scene), [], {}
    everything, name = args.protect == "all", f"scene{scene}" + "-all" * (args.protect == "all")
    shifts = args.shifts_path / "all" if everything else args.shifts_path
    given = cli.methods_settings(experiment.model.base, args.settings)
    for method in methods:
        table, folders[method] = run_scene(experiment, method, scene, moments, shifts, given[method] | {"seed": args.seed}, everything)
        tables.append(table)
    table, distance = pd.concat(tables, ignore_index=True), distance_column(args.inception_path)
    means, path = summarize(table, distance), args.save_path / args.erase_cat / name
    for part, target in ((table, f"{path}.csv"), (means, f"{path}-averages.csv")):
        with atomic_write(target) as partial:
            part.to_csv(partial, index=False)
    text = "\n\n".join([f"Each concept: {distance} / accuracy % / LPIPS (E erased, R restored); the last three: PSNR dB / LPIPS",
                        to_markdown(wide_table(table, args.erase_cat, distance)), to_markdown(means)])
    write_text(f"{path}.md", text + "\n")
    plot_lines(means, "time", {"accuracy": "accuracy %", distance: distance, "lpips": "LPIPS"}, "method", f"{path}-averages.png",
          rows="status", order=STATUSES, title=f"Scene {scene}, {args.erase_cat}")
    save_image(f"{path}.png", scene_grid(experiment, moments, folders))
    print(f"\nScene {scene}. {text}\n-> {path}.png, .md, .csv, -averages.csv, -averages.png")


def main() -> None:
    parser = cli.parser(__doc__)
    cli_experiment.add_experiment(parser, "scenes")
    parser.add_argument("--scene", default="4", help="a scene of configs/scenes.yaml, or several such as 1,2,3,4")
    parser.add_argument("--methods", default="SRS-ME,FMN,AbConcept,ESD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--protect", choices=("scene", "all"), default="scene", help="what SRS-ME's null space protects")
    args = parser.parse_args()
    methods, scenes = cli_experiment.parse_methods(args.methods), cli_experiment.parse_scenes(args.scene)
    experiment = cli_experiment.experiment(args)
    if experiment.classifier is None:
        raise ValueError(f"category {args.erase_cat} has no classifier: choose style or object, or pass --model_path")
    for scene in scenes:
        show(args, experiment, scene, methods)


if __name__ == "__main__":
    cli.run(main)
