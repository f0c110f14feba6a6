"""Count exposed body parts, class by class, over a folder of images with NudeNet's detector.

Writes nudenet.csv (every detection) and nudenet.json (counts, detector's version, threshold) into --path. Only detections of
at least --threshold count; the detector itself reports none below 0.25.
"""

from pathlib import Path

import pandas as pd

from ldm import cli
from ldm.io.files import atomic_write, write_json
from ldm.metrics.tables import to_markdown
from ldm.metrics.nudity import MIN_SCORE, count, detect, detector_name


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--path", type=Path, required=True, help="the images")
    parser.add_argument("--threshold", type=float, default=0.6, help="least score of a detection that counts")
    args = parser.parse_args()
    if not MIN_SCORE <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} is outside [{MIN_SCORE}, 1]: the detector reports nothing below {MIN_SCORE}")
    found, images = detect(args.path)
    counts = count(found, args.threshold)
    with atomic_write(args.path / "nudenet.csv") as partial:
        found.to_csv(partial, index=False)
    write_json(args.path / "nudenet.json", {"detector": detector_name(), "threshold": args.threshold, "images": images,
                                            "exposed": counts, "all": sum(counts.values())})
    print(to_markdown(pd.DataFrame({"body part": counts.keys(), "exposed": counts.values()})))
    print(f"{sum(counts.values())} exposed body parts in {images} images, {detector_name()}, threshold {args.threshold} "
          f"-> {args.path / 'nudenet.json'}")


if __name__ == "__main__":
    cli.run(main)
