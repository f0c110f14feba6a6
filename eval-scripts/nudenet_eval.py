"""Count exposed body parts, class by class, over a folder of images with NudeNet's detector.

Writes nudenet.csv (every detection) and nudenet.json (counts, detector's version, threshold) into --path. Only detections of
at least --threshold count; the detector itself reports none below 0.25.
"""

from pathlib import Path

import pandas as pd

from ldm import cli
from ldm.images import atomic, write_json
from ldm.metrics.compare import to_markdown
from ldm.metrics.nudity import LEAST, count, detect, detector


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--path", type=Path, required=True, help="the images")
    parser.add_argument("--threshold", type=float, default=0.6, help="least score of a detection that counts")
    args = parser.parse_args()
    if not LEAST <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} is outside [{LEAST}, 1]: the detector reports nothing below {LEAST}")
    found, images = detect(args.path)
    counts = count(found, args.threshold)
    with atomic(args.path / "nudenet.csv") as partial:
        found.to_csv(partial, index=False)
    write_json(args.path / "nudenet.json", {"detector": detector(), "threshold": args.threshold, "images": images,
                                            "exposed": counts, "all": sum(counts.values())})
    print(to_markdown(pd.DataFrame({"body part": counts.keys(), "exposed": counts.values()})))
    print(f"{sum(counts.values())} exposed body parts in {images} images, {detector()}, threshold {args.threshold} "
          f"-> {args.path / 'nudenet.json'}")


if __name__ == "__main__":
    cli.run(main)
