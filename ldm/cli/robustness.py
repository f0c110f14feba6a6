"""What robustness.py makes of its arguments: whom it asks about what, the judge, the bench and the probes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.arguments import Namespace, typed, typed_settings
from ldm.cli.experiment import artifacts_dir, method_configs, parse_methods, target_indexes, trainable_methods
from ldm.config.concept_lists import split_restored
from ldm.config.concepts import (
    CATEGORIES,
    OWN,
    Concept,
    UnknownConceptError,
    erasable_concepts,
    get_concept,
    parse_erase_targets,
    parse_indexes,
)
from ldm.config.everyday import COMPOSED_WITH
from ldm.config.prompt_kinds import kin_of
from ldm.config.robustness import HardPromptConfig, RelearningConfig, SoftPromptConfig
from ldm.config.templates import without_article
from ldm.io.paths import REPO_ROOT, ArtifactPaths

if TYPE_CHECKING:
    from ldm.erasure.shift import WeightShift
    from ldm.experiments.experiment import Experiment
    from ldm.experiments.methods import Contender
    from ldm.experiments.probe import Bench, Probe, Subject
    from ldm.metrics.classify import Classifier
    from ldm.metrics.judge import Judge

_OF_SHIFTS = ("method", "scene", "scene_time")  # what says which shifts are meant


@dataclass(frozen=True)
class Asked:
    """What a run asks about: the concepts of a category that are erased, and those that are erased and restored.

    `methods` erase them, beside the `subjects` whose shifts a user names. Tables go into `folder`.
    """

    category: str
    erased: Sequence[Concept]
    restored: Sequence[Concept]
    methods: Sequence[str]
    folder: Path
    subjects: Sequence[Subject] = ()


def check_arguments(args: Namespace) -> None:
    """Raise ValueError for arguments that contradict each other, or name nothing, before anything is loaded."""
    if "form" in typed:
        raise ValueError("`form`: every form is asked here, so leave it out")
    if "shifts" not in typed:
        unused = [name for name in _OF_SHIFTS if name in typed]
        if unused:
            raise ValueError(f"`{unused[0]}` says which shifts `shifts` means: give that too (methods go to `methods`)")
        _of_category(args)
    elif "erased_index" in typed:
        raise ValueError("`erased_index` and `shifts` both say what is erased: give one of them")
    elif "methods" in typed:
        parse_methods(args.methods)


def what_is_asked(args: Namespace, experiment: Experiment) -> Asked:
    """Return what the arguments ask about: the shifts that --shifts names, or else what --methods erase."""
    return _of_shifts(args, experiment) if "shifts" in typed else _of_category(args)


def _of_category(args: Namespace) -> Asked:
    erased, folder = target_indexes(args), args.save_path / args.category
    concepts, restored = (
        [get_concept(args.category, index) for index in indexes] for indexes in (erased, restored_indexes(args, erased))
    )
    return Asked(args.category, concepts, restored, parse_methods(args.methods), folder)


def _of_shifts(args: Namespace, experiment: Experiment) -> Asked:
    """Return what is asked of shifts: the concepts that they erase, of which those of --restored are left out."""
    from ldm.erasure.merge import load_shifts
    from ldm.erasure.portable import take_shifts
    from ldm.experiments.named_shifts import NamedShifts
    from ldm.io.files import file_digest

    place = args.artifacts_dir or REPO_ROOT / "models", args.method, experiment.model.name, args.category
    shifts, name = load_shifts(ArtifactPaths(*place, args.scene, args.scene_time), args.shifts)
    if not shifts:
        raise ValueError("`shifts` names no shift: give files, names or indexes, or leave it out")
    named = NamedShifts.of(list(take_shifts(experiment.model, shifts).values()), args.category)
    erased, restored = split_restored(named.concepts, _restored_names(args))
    methods = parse_methods(args.methods) if "methods" in typed else []
    if methods and named.category == OWN:
        raise ValueError(
            f"`methods` erase the concepts of one category, and these are not of one ({erased[0].name}): leave "
            "`methods` out, and give the shifts of other methods to `shifts` in runs of their own"
        )
    inputs = [experiment.model.digest, *(file_digest(Path(shift.path)) for shift in shifts.values())]
    inputs += [concept.label for concept in restored]
    digest = hashlib.sha256(" ".join(inputs).encode()).hexdigest()[:8]  # so that no other run's tables are overwritten
    folder = args.save_path / named.category / f"{name}-{digest}"
    return Asked(named.category, erased, restored, methods, folder, named.subjects(restored))


def _restored_names(args: Namespace) -> list[str]:
    """Return the names of the concepts that --restored says, by name, or by index in --category."""
    names: list[str] = []
    for text in args.restored or ():
        try:
            names += [get_concept(args.category, index).name for index in parse_indexes(text, args.category)]
        except UnknownConceptError:
            names.append(text)
    return names


def restored_indexes(args: Namespace, erased: Sequence[int]) -> list[int]:
    """Return the indexes of the concepts that are restored; by default 2, if it is one to erase and not erased.

    Raises ValueError for a watermark, as for what is erased.
    """
    if args.restored is None:
        erasable = [concept.index for concept in erasable_concepts(args.category)]
        return [2] if 2 in erasable and 2 not in erased else []
    named = [concept.index for concept in parse_erase_targets(args.restored, args.category)] if args.restored else []
    return [index for index in named if index not in erased]


def make_contenders(args: Namespace, experiment: Experiment, asked: Asked) -> list[Contender]:
    """Return the contenders of the methods that are asked."""
    from ldm.experiments.robustness import robustness_contenders

    configs = method_configs(args, experiment)
    return robustness_contenders(trainable_methods(experiment, list(asked.methods), configs), configs)


def make_subjects(
    args: Namespace, experiment: Experiment, asked: Asked, contenders: Sequence[Contender]
) -> Iterator[Subject]:
    """Yield whom is asked: the subjects whose shifts a user names, and what each contender makes, one by one."""
    from ldm.experiments.methods import MethodComparison
    from ldm.experiments.probe import Subject

    yield from asked.subjects
    experiment = replace(experiment, category=asked.category, folder=args.save_path / asked.category)
    indexes = [concept.index for concept in (*asked.erased, *asked.restored)]
    comparison = MethodComparison(experiment, artifacts_dir(args), indexes, {}, None)
    erased = {concept.label for concept in asked.erased}
    for contender in contenders:
        shifts, _ = comparison.erase(contender)
        left = {label: shift for label, shift in shifts.items() if label in erased}
        yield Subject(contender.name, left, contender.form)


def make_bench(args: Namespace, experiment: Experiment, asked: Asked) -> Bench:
    """Return what probes work with. Raises ValueError for a concept that the judge cannot tell."""
    from ldm.experiments.probe import Bench
    from ldm.metrics.classify import find_classifier
    from ldm.metrics.judge import ClassifierJudge

    judge = _make_judge(args, experiment, asked)
    other = COMPOSED_WITH.get(asked.category)
    is_bundled = not args.clip_path and not args.imagenet_weights  # the judge, whose images the other classifier knows
    second = find_classifier(other, None, experiment.model.device) if other and is_bundled else None
    return Bench(
        experiment.model,
        asked.category,
        args.save_path / asked.category / f"{args.images}-images",  # whose seeds are others of another number
        judge,
        experiment.sampling,
        asked.erased,
        asked.restored,
        ClassifierJudge(second) if second else None,
        args.images,
        experiment.seed,
    )


def _make_judge(args: Namespace, experiment: Experiment, asked: Asked) -> Judge:
    """Return CLIP where it is given, NudeNet for nudity, else classifiers that know the concepts.

    Raises ValueError for a concept that none of them knows.
    """
    from ldm.metrics.clip_score import ClipScorer
    from ldm.metrics.judge import ClassifierJudge, ClipJudge, NudityJudge

    if args.clip_path:
        others = [concept.prompt for concept in erasable_concepts(asked.category)]
        for concept in () if others else (*asked.erased, *asked.restored):  # of concepts that nobody configured
            others += [concept.prompt, *map(without_article, kin_of(concept))]
        return ClipJudge(ClipScorer.load(args.clip_path, experiment.model.device), list(dict.fromkeys(others)))
    nudity = NudityJudge()
    if all(map(nudity.knows, asked.erased)):
        return nudity
    judge = ClassifierJudge(*_classifiers(args, experiment, asked.category))
    for concept in asked.erased:
        if not judge.knows(concept):
            raise ValueError(
                f"no classifier here tells {concept.name}: give `classifier` the file of one that does, or `clip_path` "
                "a folder with a CLIP model"
            )
    return judge


def _classifiers(args: Namespace, experiment: Experiment, category: str) -> list[Classifier]:
    """Return the classifier that was named, or else that of a category; all that there are for users' own concepts."""
    from ldm.metrics.classify import classifier_path, load_classifier

    if args.classifier or args.imagenet_weights or category == args.category:
        return [experiment.classifier] if experiment.classifier else []
    paths = [classifier_path(name) for name in (CATEGORIES if category == OWN else (category,))]
    return [load_classifier(path, experiment.model.device)[0] for path in paths if path.is_file()]


def write_detection(bench: Bench, shifts: Mapping[str, WeightShift], meanings: Path, path: Path) -> None:
    """Write what gates, a filter of keywords and a rewriting find of prompts about the erased concepts, kind by kind.

    Where one of the concepts has no gate there is no such file. `meanings` is the file of what means them.
    """
    from ldm.experiments.detection import detection_table, prompts_about
    from ldm.io.files import write_text
    from ldm.metrics.tables import to_markdown

    if not all(shifts[concept.label].gated for concept in bench.erased):
        path.unlink(missing_ok=True)
        return
    kinds = [kind for concept in bench.erased for kind in prompts_about(concept, bench.model.tokenizers[0], meanings)]
    write_text(path, to_markdown(detection_table(bench.model, shifts, kinds)) + "\n")
    print(f"-> {path}")


def chosen_probes(args: Namespace) -> list[Probe]:
    """Return the probes that are asked for. Raises ValueError for a name that is none's beginning."""
    from ldm.experiments.robustness import all_probes

    every = all_probes(
        SoftPromptConfig(**typed_settings(args, SoftPromptConfig)),
        HardPromptConfig(**typed_settings(args, HardPromptConfig)),
        RelearningConfig(**typed_settings(args, RelearningConfig)),
        args.meanings,
        args.unlearnt_dir,
    )
    probes = [probe for probe in every if not (args.quick and probe.is_slow)]
    wanted = [piece.strip() for piece in args.probes.split(",") if piece.strip()]
    for piece in wanted:
        if not any(probe.name.startswith(piece) for probe in probes):
            raise ValueError(
                f"`probes` '{piece}' begins no probe's name: choose from {', '.join(p.name for p in probes)}"
            )
    return [probe for probe in probes if not wanted or any(probe.name.startswith(piece) for piece in wanted)]
