"""Every flag of version 0.1 and of the original repository works today, and what does not says what to type instead."""

import argparse
import runpy
import sys
from functools import cache

import pytest
from conftest import ROOT, is_error

from ldm.cli.arguments import Parser, spelled

RENAMED_SCRIPTS = {
    "eval-scripts/app.py": "eval-scripts/demo.py",
    "eval-scripts/sheet.py": "eval-scripts/image-grid.py",
    "eval-scripts/check-mini-sd.py": "eval-scripts/evaluate-mini-sd.py",
    "train-scripts/capacity.py": "eval-scripts/capacity.py",
}
# What a flag of version 0.1 is called today, where it has another name: everywhere, and in one script or command.
RENAMED = {
    "erase_cat": "category",
    "scenei": "scene",
    "timei": "scene_time",
    "iter_break": "max_steps",
    "scale_factor": "basis_scale",
    "reg_beta": "l1_weight",
    "threshold": "stop_threshold",
    "max_base": "max_directions",
    "keep": "preserve_scale",
    "spare": "vocab_preserve_scale",
    "ridge": "ridge_weight",
    "always": "always_protected_weight",
    "basis": "null_space_method",
    "tolerance": "rank_rtol",
    "templates": "target_templates",
    "plan": "estimate_memory",
    "dtype": "unet_dtype",
    "share": "effect_fraction",
    "merge": "shifts",
    "shifts_path": "artifacts_dir",
    "data_path": "training_image_dir",
    "root": "ledger_dir",
    "settings": "set",
    "model_path": "classifier",
    "weights": "init_weights",
    "imagenet_path": "imagenet_weights",
    "inception_path": "inception_weights",
    "path1": "original_dir",
    "path2": "edited_dir",
    "path": "image_dir",
    "from_case": "start_case",
    "num_samples": "images_per_seed",
    "num_seeds": "seeds_per_prompt",
    "num_pictures": "num_training_images",
    "num_painted": "num_rendered",
    "ddim_steps": "num_inference_steps",
    "batch_size": "sample_batch_size",
    "zoom": "scale",
    "titles": "column_titles",
    "values": "sweep_values",
    "paths": "image_dirs",
    "models_path": "models_dir",
    "work_path": "checkpoint_dir",
    "lr-max": "max_lr",
}
TRAINING = {"batch_size": "train_batch_size"}
RENAMED_IN = {
    "train-scripts/SRSME_Solution.py": {"templates": "protected_templates"},
    "train-scripts/SRS_ME.py": TRAINING,
    "train-scripts/CiE.py": TRAINING,
    "train-scripts/FMN.py": TRAINING,
    "train-scripts/Abconcept.py": TRAINING,
    "train-scripts/Esd.py": TRAINING,
    "train-scripts/ledger.py erase": TRAINING,
    "train-scripts/ledger.py export": {"dtype": "save_dtype"},
    "train-scripts/Merge_model.py": {"dtype": "save_dtype"},
    "train-scripts/artist-cls-train.py": {**TRAINING, "path": "data_dir", "model_path": "classifier_dir"},
    "train-scripts/move_image.py": {"num": "cases_per_concept"},
    "eval-scripts/image-grid.py": {"num": "images_per_cell"},
    "eval-scripts/capacity.py": {"templates": "protected_templates"},
    "eval-scripts/generate-data.py": {"model_name": "source"},
    "eval-scripts/nudenet_eval.py": {"threshold": "min_score"},
    "eval-scripts/evaluate-mini-sd.py": {"held_out": "num_held_out"},
    "eval-scripts/demo.py": {"share": "share"},
}
# Flags whose words would mean something else today: what the one line that they end in names.
RETIRED = {
    ("eval-scripts/scenes.py", "--protect"): "--protect_scope",
}


def read_flags(path):
    """Return the flags of each script, or command of one, in a file of `SCRIPT: FLAGS` lines."""
    flags = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            name, _, listed = line.partition(":")
            flags[name] = listed.split()
    return flags


def todays_name(name: str) -> str:
    script, _, command = name.partition(" ")
    return f"{RENAMED_SCRIPTS.get(script, script)} {command}".strip()


OLD_FLAGS = {todays_name(name): flags for name, flags in read_flags(ROOT / "tests/data/v0.1/flags.txt").items()}
ORIGINAL_FLAGS = read_flags(ROOT / "tests/data/original-flags.txt")
SCRIPTS = sorted({name.partition(" ")[0] for name in OLD_FLAGS})


class Parsed(BaseException):
    """Carries a script's parser out of it, before anything is parsed."""


@cache
def parser_of(name: str) -> Parser:
    """Return the parser of a script, or of a command of one, as the script itself makes it."""
    path, _, command = name.partition(" ")

    def stop(parser, *_):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", stop, raising=False)
        patch.setattr(sys, "argv", [path])
        with pytest.raises(Parsed) as raised:
            runpy.run_path(str(ROOT / path), run_name="__main__")
    parser = raised.value.args[0]
    if not command:
        return parser
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return subparsers.choices[command]


def test_the_lists_are_whole():
    todays = {
        path.relative_to(ROOT).as_posix()
        for folder in ("train", "eval")
        for path in ROOT.glob(f"{folder}-scripts/*.py")
    }
    assert set(SCRIPTS) <= todays and sum(map(len, OLD_FLAGS.values())) > 350


@pytest.mark.parametrize("name", OLD_FLAGS)
def test_every_flag_of_version_0_1_means_what_it_meant(name):
    parser = parser_of(name)
    positional = [action.dest for action in parser._actions if not action.option_strings]
    for text in OLD_FLAGS[name]:
        flag = text.removesuffix("*")
        if not flag.startswith("--"):
            assert flag in positional
        elif (name, flag) not in RETIRED:
            action = parser._option_string_actions.get(flag)
            old = flag.removeprefix("--")
            renamed = RENAMED_IN.get(name, {}).get(old) or RENAMED.get(old, old)
            assert action is not None, f"{flag} is gone: it is called --{renamed} today"
            assert action.dest == renamed, flag
            assert (action.nargs == 0) == text.endswith("*"), flag


@pytest.mark.parametrize(("name", "flag"), RETIRED)
def test_a_flag_that_would_mean_something_else_names_todays(script, name, flag):
    path, _, command = name.partition(" ")
    for values in ([], ["exact"], ["0", "1"]):
        is_error(script(path, *filter(None, [command]), flag, *values), RETIRED[name, flag])


@pytest.mark.parametrize("name", [name for name in ORIGINAL_FLAGS if name in OLD_FLAGS])
def test_every_flag_of_the_original_that_version_0_1_took_stands_in_the_help(name):
    shown = {flag for action in parser_of(name)._actions for flag in action.option_strings}
    text = parser_of(name).format_help()
    for flag in set(ORIGINAL_FLAGS[name]) & set(OLD_FLAGS[name]):
        assert flag in shown and flag in text, flag


@pytest.mark.parametrize("name", OLD_FLAGS)
def test_batch_size_is_shown_where_the_original_had_it_and_works_elsewhere(name):
    shown = any("--batch_size" in action.option_strings for action in parser_of(name)._actions)
    assert shown == (name == "train-scripts/artist-cls-train.py")
    assert ("--batch_size" in OLD_FLAGS[name]) == ("--batch_size" in parser_of(name)._option_string_actions)


@pytest.mark.parametrize("name", OLD_FLAGS)
def test_every_flag_has_a_help_text_and_older_spellings_are_hidden(name):
    originals = set(ORIGINAL_FLAGS.get(name, ()))
    text = parser_of(name).format_help()
    for action in parser_of(name)._actions:
        if action.help != argparse.SUPPRESS and action.option_strings:
            assert action.help and action.help.strip(), action.option_strings
            own = f"--{action.dest}"
            assert own in action.option_strings or action.dest == "help"
    for flag in {flag.removesuffix("*") for flag in OLD_FLAGS[name]} - originals:
        action = parser_of(name)._option_string_actions.get(flag)
        if action and flag not in action.option_strings:
            assert f"{flag} " not in text and f"{flag}," not in text


@pytest.mark.parametrize(
    ("path", "arguments", "words"),
    [
        ("train-scripts/SRS_ME.py", ["--max_step", "5"], ["--max_step,", "did you mean --max_steps?"]),
        ("train-scripts/SRS_ME.py", ["--iter_brake", "5"], ["--iter_brake,", "did you mean --iter_break?"]),
        ("train-scripts/SRSME_Solution.py", ["--erased_index", "0", "--rank_rtoll=1"], ["did you mean --rank_rtol?"]),
        ("train-scripts/ledger.py", ["erase", "VanGogh", "--ledger_dirs", "x"], ["did you mean --ledger_dir?"]),
        ("eval-scripts/make-prompts.py", ["--seed_per_prompt", "1"], ["did you mean --seeds_per_prompt?"]),
        ("eval-scripts/make-prompts.py", ["--qqqq"], ["unrecognized argument --qqqq"]),
    ],
)
def test_a_misspelt_flag_names_the_nearest(script, path, arguments, words):
    is_error(script(path, *arguments), *words)


def test_a_message_shows_the_flag_that_was_typed(script, tiny_path, tmp_path):
    common = ["--model", tiny_path, "--artifacts_dir", tmp_path, "--erased_index", "0", "--em_indexes", "1,2,3,4,5,6,7"]
    for flag in ("--rank_rtol", "--tolerance"):
        is_error(script("train-scripts/SRSME_Solution.py", *common, flag, "1e-9"), "no null space left", flag)
    assert spelled["rank_rtol"] == "--tolerance"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--anchor", "blank"], ["--anchor", "'blank' is called empty today"]),
        (["--anchor", "template"], ["--anchor", "'template' is called category today"]),
    ],
)
def test_a_value_that_would_be_a_text_today_names_its_new_word(script, arguments, words):
    is_error(script("train-scripts/SRS_ME.py", *arguments), *words)


def test_values_that_mean_the_same_are_still_taken():
    parse = argparse.ArgumentParser.parse_args
    args = parse(parser_of("train-scripts/SRS_ME.py"), ["--init", "closed-form", "--iter_break", "0"])
    assert args.init == "closed_form" and args.max_steps == 0
    for old, new in (("0", "model"), ("paint", "synthetic")):
        assert parse(parser_of("eval-scripts/generate-data.py"), ["--model_name", old]).source == new
    args = parse(
        parser_of("train-scripts/SRSME_Solution.py"), ["--erased_index", "0", "--basis", "svd", "--tolerance", "0"]
    )
    assert args.null_space_method == "svd" and args.rank_rtol == 0
