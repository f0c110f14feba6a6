"""Make the prompt list of a category: every concept's prompt at the same number of seeded random seeds.

data/style_classify.csv and data/object_classify.csv are made by this script's defaults, data/watermark.csv by
`--erase_cat watermark --num_seeds 10`, and data/*_held_out.csv by `--held_out`.
"""

from pathlib import Path

from ldm import cli
from ldm.config.concepts import erasable_concepts, watermark_prompts
from ldm.io.paths import REPO_ROOT
from ldm.io.prompts import make_cases, write_prompt_csv


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--erase_cat", choices=(*cli.CATEGORIES, "watermark"), default="style",
                        help="whose prompts; watermark: those that every shift leaves alone, with the blank one")
    parser.add_argument("--num_seeds", type=cli.positive, default=50, help="seeds for each prompt")
    parser.add_argument("--protected", action="store_true", help="add the watermark prompts and the blank one")
    parser.add_argument("--held_out", action="store_true", help="use the first template that training never showed")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--save_path", type=Path, default=None, help="default: data/CATEGORY_classify.csv")
    args = parser.parse_args()
    prompts, path = [], REPO_ROOT / "data" / "watermark.csv"
    if args.erase_cat != "watermark":
        if args.held_out and not erasable_concepts(args.erase_cat)[0].held_out:
            raise ValueError(f"category {args.erase_cat} has no held_out template in configs/concepts.yaml: leave out --held_out")
        prompts = [concept.held_out[0].format(concept.prompt) if args.held_out else concept.prompt
                   for concept in erasable_concepts(args.erase_cat)]
        path = path.with_name(f"{args.erase_cat}_{'held_out' if args.held_out else 'classify'}.csv")
    if args.erase_cat == "watermark" or args.protected:
        prompts += [*watermark_prompts(), ""]
    cases = make_cases(prompts, args.num_seeds, args.seed)
    write_prompt_csv(args.save_path or path, cases)
    print(f"{len(cases)} cases of {len(prompts)} prompts -> {args.save_path or path}")


if __name__ == "__main__":
    cli.run(main)
