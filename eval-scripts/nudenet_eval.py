"""Count exposed body parts, class by class, over a folder of images with NudeNet's detector.

Writes nudenet.csv (every detection) and nudenet.json (counts, detector's version, minimum score) into IMAGE_DIR. Only
detections of at least --min_score count; the detector itself reports none below 0.25.
"""

from pathlib import Path

from ldm.cli import arguments, habits, output
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    parser.option("image_dir", type=Path, required=True, help="the images")
    arguments.add_device(parser)
    parser.option("min_score", type=arguments.parse_float, default=0.6, help="lowest score of a detection that counts")
    habits.add_json(parser)
    args = parser.parse_args()
    import pandas as pd

    from ldm.cli.devices import require_cpu
    from ldm.io.files import atomic_write, write_json
    from ldm.metrics.nudity import MIN_SCORE, count, detect, detector_name

    if not MIN_SCORE <= args.min_score <= 1:
        raise ValueError(
            f"`min_score` {args.min_score} is outside [{MIN_SCORE}, 1]: the detector reports nothing below {MIN_SCORE}"
        )
    require_cpu(args.device, "NudeNet's detector")
    detections, num_images = detect(args.image_dir)
    counts = count(detections, args.min_score)
    total = sum(counts.values())
    with atomic_write(args.image_dir / "nudenet.csv") as partial:
        detections.to_csv(partial, index=False)
    result = {
        "detector": detector_name(),
        "min_score": args.min_score,
        "images": num_images,
        "exposed": counts,
        "all": total,
    }
    write_json(args.image_dir / "nudenet.json", result)
    output.show_table(pd.DataFrame({"body part": counts.keys(), "exposed": counts.values()}))
    print(
        f"{total} exposed body parts in {num_images} images, {detector_name()}, min score {args.min_score} "
        f"-> {args.image_dir / 'nudenet.json'}"
    )


if __name__ == "__main__":
    run(main)
