"""Play one of the paper's scenes through time with several methods: what is erased, given back and kept, side by side.

Writes into SAVE_PATH/CATEGORY: sceneN.csv and .md (every concept and time), sceneN-averages.csv and .png, and the picture
sheet sceneN.png. Shifts are kept in SHIFTS_PATH and never computed twice, and images once for each set of weights, so that a
stopped run goes on with the same command.
"""

import pandas as pd
from omegaconf import OmegaConf

from ldm import cli
from ldm.concepts import load_scene
from ldm.images import atomic, save_image, write_text
from ldm.metrics.compare import to_markdown
from ldm.metrics.frechet import column
from ldm.model import settings
from ldm.plots import lines
from ldm.scenes import ORDER, averages, picture, play, wide
from ldm.store import METHODS


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_experiment(parser, "scenes")
    parser.add_argument("--scene", type=cli.positive, default=4, help="number of a scene in configs/scenes.yaml")
    parser.add_argument("--methods", default="SRS-ME,FMN,AbConcept,ESD", help=f"of {', '.join(METHODS)}")
    args = parser.parse_args()
    methods, moments = cli.parse_methods(args.methods), load_scene(args.scene)
    experiment, distance = cli.experiment(args), column(args.inception_path)
    if experiment.classifier is None:
        raise ValueError(f"category {args.erase_cat} has no classifier in models/classifiers: choose style or object")
    folder, given = args.save_path / args.erase_cat, settings(experiment.model.base)
    tables, folders = [], {}
    for method in methods:
        arguments = OmegaConf.to_container(given.erasure[method]) | {"seed": 0}
        table, folders[method] = play(experiment, method, args.scene, moments, args.shifts_path, arguments)
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    means, name = averages(table, distance), f"scene{args.scene}"
    for part, end in ((table, ".csv"), (means, "-averages.csv")):
        with atomic(folder / f"{name}{end}") as partial:
            part.to_csv(partial, index=False)
    text = "\n\n".join(["Each concept: " + f"{distance} / accuracy % / LPIPS (E erased, R restored); the last three: PSNR dB / LPIPS",
                        to_markdown(wide(table, args.erase_cat, distance)), to_markdown(means)])
    write_text(folder / f"{name}.md", text + "\n")
    lines(means, "time", {"accuracy": "accuracy %", distance: distance, "lpips": "LPIPS"}, "method",
          folder / f"{name}-averages.png", rows="status", order=ORDER, title=f"Scene {args.scene}, {args.erase_cat}")
    save_image(folder / f"{name}.png", picture(experiment, moments, folders))
    print(text)
    print(f"-> {folder / name}.png, .md, .csv, -averages.csv, -averages.png")


if __name__ == "__main__":
    cli.run(main)
