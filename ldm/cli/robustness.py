"""What robustness.py makes of its arguments: the judge, the bench and the probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.arguments import Namespace, typed_settings
from ldm.config.concepts import erasable_concepts, get_concept, parse_erase_targets
from ldm.config.everyday import COMPOSED_WITH
from ldm.config.robustness import HardPromptConfig, RelearningConfig, SoftPromptConfig

if TYPE_CHECKING:
    from ldm.erasure.shift import WeightShift
    from ldm.experiments.experiment import Experiment
    from ldm.experiments.probe import Bench, Probe
    from ldm.metrics.judge import Judge


def make_bench(args: Namespace, experiment: Experiment, erased: Sequence[int], restored: Sequence[int]) -> Bench:
    """Return what probes work with. Raises ValueError for a concept that the judge cannot tell."""
    from ldm.experiments.probe import Bench
    from ldm.metrics.classify import find_classifier
    from ldm.metrics.judge import ClassifierJudge

    judge = _make_judge(args, experiment)
    other = COMPOSED_WITH.get(args.category)
    is_bundled = not args.clip_path and not args.imagenet_weights  # the judge, whose images the other classifier knows
    second = find_classifier(other, None, experiment.model.device) if other and is_bundled else None
    concepts = [get_concept(args.category, index) for index in erased]
    for concept in concepts:
        if not judge.knows(concept):
            raise ValueError(
                f"the {judge.name} cannot tell {concept.name}: give `classifier` one that does, or `clip_path`"
            )
    return Bench(
        experiment.model,
        args.category,
        args.save_path / args.category / f"{args.images}-images",  # whose seeds are others of another number
        judge,
        experiment.sampling,
        concepts,
        [get_concept(args.category, index) for index in restored],
        ClassifierJudge(second) if second else None,
        args.images,
        experiment.seed,
    )


def restored_indexes(args: Namespace, erased: Sequence[int]) -> list[int]:
    """Return the indexes of the concepts that are restored; by default 2, if it is one to erase and not erased.

    Raises ValueError for a watermark, as for what is erased.
    """
    if args.restored is None:
        erasable = [concept.index for concept in erasable_concepts(args.category)]
        return [2] if 2 in erasable and 2 not in erased else []
    named = [concept.index for concept in parse_erase_targets(args.restored, args.category)] if args.restored else []
    return [index for index in named if index not in erased]


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


def _make_judge(args: Namespace, experiment: Experiment) -> Judge:
    """Return CLIP where it is given, NudeNet for nudity, else the category's classifier."""
    from ldm.metrics.clip_score import ClipScorer
    from ldm.metrics.judge import ClassifierJudge, ClipJudge, NudityJudge

    if args.clip_path:
        others = [concept.prompt for concept in erasable_concepts(args.category)]
        return ClipJudge(ClipScorer.load(args.clip_path, experiment.model.device), others)
    if args.category == "nudity":
        return NudityJudge()
    if experiment.classifier is None:
        raise ValueError(f"there is no classifier of {args.category}: give `classifier` a file of one, or `clip_path`")
    return ClassifierJudge(experiment.classifier)


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
