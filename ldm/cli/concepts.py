"""Concepts and protected prompts as arguments: by text, in files, by index."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from ldm.cli import arguments, habits
from ldm.cli.arguments import Namespace, Parser, typed
from ldm.cli.flags import RENAMED_VALUES
from ldm.config.concept_lists import (
    KIND_NAMES,
    check_apart_from,
    make_concept,
    notify_of_near,
    read_concepts,
    read_prompts,
    with_anchor,
)
from ldm.config.concepts import (
    OWN,
    Concept,
    UnknownConceptError,
    erasable_concepts,
    find_by_name,
    get_concept,
    parse_erase_targets,
    parse_indexes,
)
from ldm.config.methods import ANCHORS, EditConfig, MethodConfig, TrainedConfig
from ldm.config.settings import did_you_mean

_OLD_PROTECT = (["exact"], ["spectrum"])  # values of --protect when it was another flag


def add_concepts(parser: Parser, erased_index: str = "") -> None:
    """Add the concepts to erase: --concepts by text or file, with their kind and anchor, or --erased_index."""
    add_own_concepts(parser, "concepts to erase")
    parser.option(
        "anchor",
        type=_parse_anchor,
        default=None,
        help="what takes the place of a concept: a text such as 'a painting', or as the settings say: "
        f"{', '.join(ANCHORS)} (default: the model's settings)",
    )
    text = "instead of --concepts, by index in --category, such as 0, 0,1,2 or 0-8, or by name there"
    parser.option("erased_index", default=erased_index, help=text)


def add_own_concepts(parser: Parser, purpose: str) -> None:
    """Add --concepts by text or file, which are for a `purpose`, and their kind."""
    text = (
        f"{purpose}, each a text such as 'Greg Rutkowski', or a file: .csv with the columns concept, aliases, anchor, "
        "kind; .yaml; .txt with one a line; NAME=FILE.txt for one concept of many phrases"
    )
    parser.option("concepts", nargs="+", default=[], metavar="TEXT|FILE", help=text)
    kinds = (
        f"what kind of thing --concepts are: {', '.join(KIND_NAMES)} (default: what is known of the name, or generic)"
    )
    parser.option("kind", choices=KIND_NAMES, default=None, metavar="KIND", help=kinds)


def add_statuses(parser: Parser, where: str) -> None:
    """Add --erased and --restored for the concepts of images; `where` says which images."""
    text = f"concepts erased in {where}, such as 1,3 or Picasso 'a red fox' (default: those of its metadata's shifts)"
    parser.option("erased", nargs="*", default=None, help=text)
    parser.option("restored", nargs="*", default=[], help=f"concepts restored in {where}, such as 2 or Picasso")


def said_prompts(args: Namespace) -> list[str]:
    """Return prompts that say each of --concepts by its kind's templates, or held-out ones, and those of --protect.

    Raises ValueError for one of --protect that says one of --concepts.
    """
    if "category" in typed:
        raise ValueError("`category` and `concepts` both name what prompts say: give one of them")
    concepts = read_concepts(args.concepts, args.kind)
    protected = read_prompts(args.protect)
    check_apart_from(protected, concepts)
    prompts: list[str] = []
    for concept in concepts:
        prompts += concept.held_out_prompts if args.held_out else [concept.prompt, *concept.captions]
    return list(dict.fromkeys([*prompts, *protected]))


def named_statuses(args: Namespace, image_dir: Path, prompts: Collection[str]) -> dict[str, str]:
    """Return the status of each prompt of a folder of images by its metadata, --erased and --restored."""
    from ldm.metrics.statuses import erased_concepts, named_concepts, prompt_statuses

    if args.erased is None:
        erased = erased_concepts(image_dir, args.category)
    else:
        erased = named_concepts(args.erased, image_dir, args.category, prompts, "erased")
    restored = named_concepts(args.restored, image_dir, args.category, prompts, "restored")
    return prompt_statuses(image_dir, args.category, prompts, erased, restored)


def category_targets(args: Namespace) -> list[Concept]:
    """Return the concepts of the category that --erased_index names. Raises ValueError as `category_indexes`."""
    indexes = category_indexes(args.erased_index, args.category)
    return parse_erase_targets(list(map(str, indexes)), args.category)


def listed_concepts(args: Namespace) -> list[Concept]:
    """Return the concepts that --concepts, or --erased_index in --category, lists. Raises ValueError for none or both.

    As `category_targets` too.
    """
    if bool(args.concepts) == bool(args.erased_index):
        raise ValueError("the concepts are those of `concepts` or of `erased_index`: give one of them")
    if args.kind and not args.concepts:
        raise ValueError("`kind` goes with `concepts`: those of `erased_index` have theirs")
    return read_concepts(args.concepts, args.kind) if args.concepts else category_targets(args)


def category_indexes(texts: str | Sequence[str], category: str) -> list[int]:
    """Return the indexes of the category's concepts that texts name.

    Raises ValueError, which says what erases a concept of its user's own, for a text that names none of them.
    """
    try:
        return parse_indexes(texts, category)
    except UnknownConceptError as error:
        raise ValueError(
            f"{error}. Experiments take the concepts of a category, which images and classifiers are there for: erase "
            "one of your own by train-scripts/SRS_ME.py --concepts, or in a ledger by train-scripts/ledger.py"
        ) from error


def add_erasure(parser: Parser, kind: type[MethodConfig]) -> None:
    """Add what every erasure takes, and the settings of a method."""
    add_concepts(parser)
    habits.add_json(parser)
    arguments.add_model(parser)
    arguments.add_category(parser)
    arguments.add_artifacts(parser)
    arguments.add_settings(parser, kind)
    arguments.add_settings(parser, EditConfig, "least_effect")
    arguments.add_device(parser)
    if not issubclass(kind, TrainedConfig):
        parser.set_defaults(training_image_dir=Path(), gradient_checkpointing=False, frozen_device=None, devices=None)
        return
    arguments.add_training_images(parser)
    parser.option("gradient_checkpointing", action="store_true", help="less memory for a third more time")
    parser.option("frozen_device", default=None, help="another device for the passes without gradient")
    parser.option(
        "devices", default=None, help="--device and --frozen_device in one, such as 0,1 (the original's flag)"
    )


def add_protection(parser: Parser) -> None:
    """Add what an erasure leaves alone: --protect by text or file, and --em_indexes."""
    add_protect(parser, "prompts that stay as they are")
    text = "concepts to protect by index in --category, such as 1,2; those that are erased together protect each other"
    parser.option("em_indexes", default="", help=text)


def add_protect(parser: Parser, purpose: str) -> None:
    """Add --protect: prompts by text or file, which are for a `purpose`."""
    text = f"{purpose}, each a text such as 'a dog', or a file: .txt with one a line, .csv, .yaml"
    parser.option("protect", nargs="*", default=[], metavar="TEXT|FILE", help=text)


def add_retain(parser: Parser) -> None:
    """Add --retain: prompts by text or file that are not protected exactly."""
    text = (
        "prompts that shifts change little, though they are not protected exactly, and that trip no gate, each a text "
        "or a file as of --protect; those that say the erased concept are left out; --retain_preserve_scale weighs them"
    )
    parser.option("retain", nargs="+", default=[], metavar="TEXT|FILE", help=text)


def _parse_anchor(text: str) -> str:
    """Return an anchor. Raises ArgumentTypeError for a word that is called otherwise today, and for an empty text."""
    renamed = RENAMED_VALUES["anchor"]
    if text in renamed:
        raise argparse.ArgumentTypeError(f"'{text}' is called {renamed[text]} today")
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give a text such as 'a painting', or the word empty")
    return text


def named_concepts(args: Namespace) -> list[Concept]:
    """Return the concepts that --concepts, or --erased_index, names. An anchor that is a text is theirs from now on.

    Raises ValueError for none, for both, and for what is no concept.
    """
    protect = getattr(args, "protect", [])
    if protect in _OLD_PROTECT or ("protect" in typed and not protect):
        raise ValueError(
            "`protect` names prompts: give texts or files (what it was before is `rank_rtol` exact, or none)"
        )
    anchor = None
    if args.anchor is not None and args.anchor not in ANCHORS:
        anchor, args.anchor = args.anchor, None
    if args.concepts and "erased_index" in typed:
        raise ValueError("`concepts` and `erased_index` both name what to erase: give one of them")
    if args.concepts:
        if "category" in typed and not getattr(args, "em_indexes", ""):  # which no other method's script has
            raise ValueError("`category` says what `erased_index` counts: with `concepts` give `kind`, or leave it out")
        return read_concepts(args.concepts, args.kind, anchor)
    if not args.erased_index:
        raise ValueError("no concept to erase: give `concepts` texts or files, or `erased_index` indexes such as 0,1,2")
    if args.kind:
        raise ValueError("`kind` goes with `concepts`: those of `erased_index` have theirs")
    try:
        concepts = parse_erase_targets(args.erased_index, args.category)
    except UnknownConceptError as error:
        raise ValueError(f"{error}. A concept of your own goes to `concepts`") from error
    return concepts if anchor is None else [with_anchor(concept, anchor, concept.name) for concept in concepts]


def data_concepts(args: Namespace) -> list[Concept | None]:
    """Return the concepts whose images --prompt asks for: all of the category, or one. None is for the empty prompt.

    Raises ValueError for a watermark, and for a concept of its user's own where one of the category is needed.
    """
    if not args.prompt:
        return [None] if args.prompt == "" else [None, *erasable_concepts(args.category)]
    concept = find_by_name(args.category, args.prompt)
    if concept is not None and not concept.is_watermark:
        return [concept]
    names = [concept.name for concept in erasable_concepts(args.category)]
    if concept is not None or args.source == "synthetic" or args.reconstruct:
        why = "is a watermark" if concept is not None else "has no images by `source` synthetic and no `reconstruct`"
        raise ValueError(
            f"'{args.prompt}' is no {args.category} concept and {why}{did_you_mean(args.prompt, names)}: choose from "
            f"{', '.join(names)}"
        )
    own = make_concept(args.prompt)
    notify_of_near([own])
    return [own]


def category_of(args: Namespace, concepts: Sequence[Concept]) -> str:
    """Return the category below which the bases and shifts of concepts are kept."""
    return OWN if concepts[0].is_own else args.category


def named_protection(args: Namespace, concepts: Sequence[Concept]) -> tuple[list[Concept], list[str]]:
    """Return the concepts and the prompts that an erasure of `concepts` leaves alone by --protect and --em_indexes.

    Those protect each other, but for concepts of --erased_index where --em_indexes says which do. Raises ValueError
    for a protected prompt that says one of them.
    """
    protect, indexes = getattr(args, "protect", []), getattr(args, "em_indexes", "")
    prompts = read_prompts(protect)
    check_apart_from(prompts, concepts)
    named = [get_concept(args.category, index) for index in parse_indexes(indexes, args.category)]
    if indexes and not concepts[0].is_own:
        return named, prompts
    others = [other for other in named if not any(concept.is_named(other.name) for concept in concepts)]
    return list(dict.fromkeys([*concepts, *others])), prompts
