"""What scenes.py, the ablations and report.py share: their arguments, and the experiment and tables that these ask for.

No torch here at import: `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import arguments, habits, output
from ldm.cli.arguments import Namespace, Parser
from ldm.cli.concepts import category_targets
from ldm.config.methods import (
    METHODS,
    EditConfig,
    EvaluationConfig,
    JointSRSMEConfig,
    MethodConfig,
    SRSMEConfig,
)
from ldm.config.scenes import load_scene
from ldm.config.settings import did_you_mean
from ldm.io.paths import REPO_ROOT

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from ldm.experiments.experiment import Experiment
    from ldm.metrics.classify import Classifier


def add_experiment(parser: Parser, folder: str) -> None:
    """Add what is erased and how, and what `add_evaluation` adds."""
    habits.add_json(parser)
    arguments.add_category(parser)
    text = "where shifts are kept (default: SAVE_PATH/shifts; of --shifts of robustness.py: models)"
    parser.option("artifacts_dir", type=Path, default=None, help=text)
    parser.option("set", nargs="*", default=[], help="changes of the methods' settings, such as FMN.lr=1e-2")
    parser.option("seed", type=arguments.nonnegative_int, default=0, help="of the erasures")
    arguments.add_settings(parser, EvaluationConfig, "num_training_images")
    add_evaluation(parser, folder)


def add_evaluation(parser: Parser, folder: str) -> None:
    """Add how much is generated, by what, and where it goes: below evaluation_folder/`folder` by default."""
    arguments.add_model(parser)
    arguments.add_settings(parser, EvaluationConfig, "seeds_per_prompt")
    parser.option("save_path", type=Path, default=REPO_ROOT / "evaluation_folder" / folder, help="where to write")
    arguments.add_classifier(parser)
    arguments.add_imagenet(parser)
    arguments.add_settings(parser, EditConfig, "form")
    arguments.add_sampling(parser)
    arguments.add_inception(parser)
    arguments.add_device(parser)


def add_ablation(parser: Parser, values: str, text: str) -> None:
    """Add an experiment's arguments, the concepts to erase, and the values to compare."""
    add_experiment(parser, "ablations")
    add_targets(parser, "0,1,2")
    parser.option("sweep_values", default=values, help=text)


def add_targets(parser: Parser, indexes: str) -> None:
    """Add --erased_index for concepts that are erased and merged."""
    text = f"concepts to erase and merge, by index such as {indexes}, or by name in --category"
    parser.option("erased_index", nargs="+", default=indexes, help=text)


def target_indexes(args: Namespace) -> list[int]:
    """Return the indexes of the concepts that --erased_index names."""
    return [concept.index for concept in category_targets(args)]


def make_experiment(args: Namespace) -> Experiment:
    """Return the experiment that the arguments describe, with the category's classifier if it has one."""
    from ldm.cli import session
    from ldm.config.models import load_model_config
    from ldm.experiments.experiment import Experiment

    device = session.first_device(args)
    classifier = _load_classifier(args, device)
    if args.inception_weights and not args.inception_weights.is_file():
        advice = "pass FID's Inception weights as `inception_weights`, or leave it out"
        raise ValueError(f"no file {args.inception_weights}: {advice}")
    model = session.load_model(args, device)
    config = load_model_config(model)
    sampling = session.fill_settings(args, config.sampling)
    evaluation = session.fill_settings(args, config.evaluation)
    folder = args.save_path / args.category
    return Experiment(
        model,
        args.category,
        folder,
        classifier,
        sampling,
        evaluation.seeds_per_prompt,
        evaluation.num_training_images,
        args.inception_weights,
        form=session.fill_settings(args, config.edit).form,
        unprotected_prompts=evaluation.unprotected_prompts,
    )


def make_ablation(args: Namespace) -> Experiment:
    """Return the experiment of an ablation, whose shifts act on the weights: on what is compared no gate depends.

    Raises ValueError where gates are asked for.
    """
    if arguments.typed.get("form") == "gated":
        raise ValueError("`form` gated: what is compared here decides the change of weights, and no gate: leave it out")
    args.form = "linear"
    return make_experiment(args)


def trainable_methods(experiment: Experiment, methods: list[str], configs: dict[str, MethodConfig]) -> list[str]:
    """Return those of the methods that can change the experiment's model.

    Where --methods was not typed a notice says of the others why; where it was they raise ValueError.
    """
    from ldm.erasure.methods import check_method
    from ldm.io.errors import notify

    found: list[str] = []
    for name in methods:
        try:
            check_method(experiment.model, configs[name])
        except ValueError as error:
            if "methods" in arguments.typed:
                raise
            notify(f"without {name}: {error}")
        else:
            found.append(name)
    return found


def _load_classifier(args: Namespace, device: torch.device) -> Classifier | None:
    """Return the classifier that --imagenet_weights or --classifier names, else the category's own if it has one."""
    from ldm.metrics.classify import ImageNetObjects, find_classifier

    if args.imagenet_weights:
        if args.category != "object":
            raise ValueError("`imagenet_weights` goes with `category` object: ImageNet has no other of the categories")
        return ImageNetObjects(args.imagenet_weights).to(device)
    return find_classifier(args.category, args.classifier, device)


def artifacts_dir(args: Namespace) -> Path:
    """Return where an experiment's shifts are kept."""
    return args.artifacts_dir or args.save_path / "shifts"


def method_configs(args: Namespace, experiment: Experiment) -> dict[str, MethodConfig]:
    """Return the settings of every method with the changes of --set and the seed."""
    from ldm.cli import session
    from ldm.config.models import load_model_config

    methods = session.changed_methods(load_model_config(experiment.model), args.set)
    changed = {name: config.with_changes(seed=args.seed) for name, config in methods.items() if hasattr(config, "seed")}
    return methods | changed


def srsme_config(args: Namespace, experiment: Experiment) -> SRSMEConfig:
    """Return SRS-ME's settings for an ablation.

    Where these stop at the closed form, what an ablation of training takes at most are the iterations of SRS-ME-dagger,
    which always trains.
    """
    methods = method_configs(args, experiment)
    config, joint = methods[SRSMEConfig.name], methods[JointSRSMEConfig.name]
    assert isinstance(config, SRSMEConfig) and isinstance(joint, SRSMEConfig)
    return config if config.trains else config.with_changes(max_steps=joint.max_steps)


def run_sweep(args: Namespace, name: str, setting: str, allow_zero: bool = False) -> None:
    """Erase by training and evaluate with each of --sweep_values for one of SRS-ME's settings, and print the means.

    The erased concepts protect each other. `allow_zero` says whether 0 is a value of the setting.
    """
    erased = target_indexes(args)
    values = arguments.parse_numbers(args.sweep_values, "sweep_values")
    if min(values) < 0 or (0 in values and not allow_zero):
        advice = "give numbers above 0, or 0" if allow_zero else "give numbers above 0"
        raise ValueError(f"`sweep_values` {args.sweep_values}: {advice}")
    from ldm.experiments.ablations import Variant, run_ablation

    experiment = make_ablation(args)
    config = srsme_config(args, experiment).with_changes(mode="learn")
    if not any(change.startswith(f"{SRSMEConfig.name}.init=") for change in args.set):
        config = config.with_changes(init="zero")  # what is compared is what training from nothing finds
    variants = [Variant(value, config.with_changes(**{setting: value}), erased) for value in values]
    table = run_ablation(experiment, artifacts_dir(args), name, erased, variants)
    print_ablation(args, table, name, "status", setting, log_x=True)


def print_ablation(args: Namespace, table: pd.DataFrame, name: str, by: str, x: str, log_x: bool = False) -> None:
    """Write an ablation's table and plot, and print the means over the groups of `by`; `x` is what the values are."""
    from ldm.experiments.ablations import AblationSummary, save_ablation
    from ldm.metrics.frechet import distance_column

    path = args.save_path / args.category / name
    summary = AblationSummary(by, x, distance_column(args.inception_weights), log_x)
    output.show_table(save_ablation(table, path, summary))
    print(f"-> {path}.png, .md, .csv")


def parse_methods(text: str) -> list[str]:
    """Return the methods in such as 'SRS-ME,FMN'. Raises ValueError for an unknown name, or none."""
    pieces = [piece.strip() for piece in text.split(",")]
    names = list(dict.fromkeys(piece for piece in pieces if piece))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        name = (unknown or [text])[0]
        raise ValueError(f"'{name}' is no method{did_you_mean(name, list(METHODS))}: choose from {','.join(METHODS)}")
    return names


def parse_scenes(text: str) -> list[int]:
    """Return the scenes of configs/scenes.yaml in such as '1,2'. Raises ValueError for anything that is none."""
    pieces = [piece.strip() for piece in text.split(",")]
    for piece in pieces:
        if not piece.isascii() or not piece.isdigit():
            raise ValueError(f"`scene` {text}: give numbers of configs/scenes.yaml, such as 4 or 1,2,3,4")
        load_scene(int(piece))  # before any work, so that a wrong number costs none
    return [int(piece) for piece in dict.fromkeys(pieces)]
