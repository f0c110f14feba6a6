"""Make a prompt list, of a category or of your own concepts: every prompt at the same number of seeded random seeds.

data/style_classify.csv and data/object_classify.csv are made by this script's defaults, data/watermark.csv by
`--category watermark --seeds_per_prompt 10`, and data/*_held_out.csv by `--held_out`. `--everyday` makes lists of no
category instead: prompts that name no concept, at one seed each unless told otherwise. `--concepts` makes one of your
own: each concept's name and what says it by the templates of its kind, or with `--held_out` by those that an erasure
never saw, and the prompts of `--protect`.
"""

from pathlib import Path

from ldm.cli import arguments
from ldm.cli.concepts import add_own_concepts, add_protect, said_prompts
from ldm.cli.run import run
from ldm.config.concepts import CATEGORIES, erasable_concepts, watermark_prompts
from ldm.config.everyday import PROMPT_LISTS, everyday_prompts
from ldm.io.paths import REPO_ROOT

WATERMARK = "watermark"


def category_prompts(category: str, held_out: bool) -> list[str]:
    """Return the prompt of each concept of a category, or its first held-out template with that in it."""
    concepts = erasable_concepts(category)
    if not held_out:
        return [concept.prompt for concept in concepts]
    if not concepts[0].held_out_templates:
        raise ValueError(f"category {category} has no held-out template in configs/concepts.yaml: leave out `held_out`")
    return [concept.held_out_prompts[0] for concept in concepts]


def main() -> None:
    parser = arguments.make_parser(__doc__)
    text = f"whose prompts; {WATERMARK}: those that every shift protects, with the empty one"
    parser.option("category", choices=(*CATEGORIES, WATERMARK), default="style", help=text)
    add_own_concepts(parser, "instead, concepts whose prompts are made")
    add_protect(parser, "with --concepts, further prompts that should stay as they are")
    text = "default: 50; --concepts: 4; --everyday: 1"
    parser.option("seeds_per_prompt", type=arguments.positive_int, default=None, help=text)
    parser.option("protected", action="store_true", help="add the watermark prompts and the empty one")
    text = "use the first template that training never showed; for --concepts each of them"
    parser.option("held_out", action="store_true", help=text)
    parser.option("everyday", choices=tuple(PROMPT_LISTS), default=None, help="prompts that name no concept, instead")
    parser.option("seed", type=arguments.nonnegative_int, default=2024, help="what the seeds are chosen from")
    parser.option("save_path", type=Path, default=None, help="default: in data, by the list's name")
    args = parser.parse_args()
    from ldm.io.prompts import make_cases, write_prompt_csv

    if (args.protect or args.kind) and not args.concepts:
        raise ValueError("`protect` and `kind` go with `concepts`: give these, or leave them out")
    if args.concepts and args.everyday:
        raise ValueError("`everyday` names no concept: give it or `concepts`")
    prompts, name, default_seeds = [], WATERMARK, 50
    held_out = "_held_out" if args.held_out else ""
    if args.concepts:
        prompts, name, default_seeds = said_prompts(args), f"concepts{held_out}", 4
    elif args.everyday:
        default_seeds = 1
        prompts, name = everyday_prompts(args.everyday), PROMPT_LISTS[args.everyday]
    elif args.category != WATERMARK:
        prompts = category_prompts(args.category, args.held_out)
        name = f"{args.category}{held_out or '_classify'}"
    if name == WATERMARK or args.protected:
        prompts += [prompt for prompt in (*watermark_prompts(), "") if prompt not in prompts]
    cases = make_cases(prompts, args.seeds_per_prompt or default_seeds, args.seed)
    path = args.save_path or REPO_ROOT / "data" / f"{name}.csv"
    write_prompt_csv(path, cases)
    print(f"{len(cases)} cases of {len(prompts)} prompts -> {path}")


if __name__ == "__main__":
    run(main)
