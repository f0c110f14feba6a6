"""Concepts by text on the command line and in Python: one command, its effect measured, and what is refused."""

import re
import shutil
import warnings

import pandas as pd
import pytest
import torch
from conftest import CPU, is_error
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import ConceptEraser, applied, erase, export, generate
from ldm.cli import arguments, concepts
from ldm.cli.session import method_config
from ldm.config.concept_lists import make_concept
from ldm.config.methods import ExportConfig, SamplingConfig, SRSMEConfig
from ldm.config.models import bundled_config
from ldm.diffusion.load import load_model
from ldm.erasure.effect import judge
from ldm.erasure.merge import load_shifts
from ldm.erasure.shift import SHIFT_FILE_TYPE
from ldm.io.errors import MissingFileError, Notice
from ldm.io.paths import ArtifactPaths, merge_name
from ldm.io.tensors import read_metadata

ERASE, GENERATE = "train-scripts/SRS_ME.py", "eval-scripts/generate-images-merge.py"
SOLVE, MERGE = "train-scripts/SRSME_Solution.py", "train-scripts/Merge_model.py"
ANY_EFFECT = ("--least_effect", "-9")  # a random model's


@pytest.fixture
def flags(mini_path, tmp_path):
    return ["--model", mini_path, "--artifacts_dir", tmp_path / "shifts", "--device", "cpu"]


def own_paths(tmp_path, method="SRS-ME"):
    return ArtifactPaths(tmp_path / "shifts", method, "mini-sd", "own", 1, 0)


def test_one_command_erases_own_concepts_and_exports_them(script, flags, tmp_path):
    named = ["--concepts", "Greg Rutkowski", "a red fox", "--protect", "a dog", "oil painting"]
    code, out, err = script(ERASE, *flags, *named, *ANY_EFFECT, "--export", "kohya,diffusers")
    assert code == 0, err
    assert "| Greg Rutkowski |" in out and "| red fox |" in out and "prompts protected" in out
    for label, other in (("gregrutkowski", "red fox"), ("redfox", "Greg Rutkowski")):
        metadata = read_metadata(own_paths(tmp_path).shift(label), SHIFT_FILE_TYPE)
        assert {"a dog", "oil painting", other} <= set(metadata["protected"])
        assert ("a red fox" in metadata["protected"]) == (other == "red fox")  # as it was typed
        assert metadata["max_leakage_protected"] < metadata["target_change"] and "mean" in metadata["effects"]["linear"]
    merged = tmp_path / "shifts" / "merged"
    assert (merged / "mini-sd-gregrutkowski-redfox-kohya" / "Greg-Rutkowski.safetensors").is_file()
    assert load_model(merged / "mini-sd-gregrutkowski-redfox", CPU).denoiser is not None
    assert script(ERASE, *flags, *named, *ANY_EFFECT)[1].count("there already, from the same inputs") == 2

    steps = ["--num_inference_steps", 2, "--save_path", tmp_path / "images", "--prompts", "a red fox", "a dog"]
    assert script(GENERATE, *flags, *steps, "--shifts", "greg  RUTKOWSKI", "a red fox")[0] == 0
    assert script(GENERATE, *flags, *steps, "--shifts", "Red Fox")[0] == 0
    assert len(list((tmp_path / "images" / "redfox-merge").glob("*.png"))) == 2
    assert script(MERGE, *flags, "--shifts", "a red fox", "--format", "unet")[0] == 0
    code, out, _ = script(MERGE, *flags, "--shifts", "a red fox", "--format", "unet")
    assert "| a dog |" in out and "| Greg Rutkowski |" in out and "Cezanne" not in out
    is_error(script(GENERATE, *flags, *steps, "--shifts", "a red fix"), "did you mean red fox?")
    is_error(script(GENERATE, *flags, *steps, "--shifts", "Matisse"), "make it with", "--concepts Matisse")


def test_a_null_space_of_another_model_of_this_name_is_solved_anew(script, flags, mini_path, tmp_path):
    given = [*flags, "--concepts", "a red fox", *ANY_EFFECT]
    assert script(ERASE, *given)[0] == 0
    path = shutil.copytree(mini_path, tmp_path / "other" / "mini-sd") / "text_encoder" / "model.safetensors"
    save_file({name: 1.01 * value for name, value in load_file(path).items()}, path)
    code, out, err = script(ERASE, *given, "--model", path.parent.parent)
    assert code == 0 and re.search(r"red fox: \d prompts protected", out), err


def test_what_was_exported_of_other_shifts_is_not_replaced(script, flags, tmp_path):
    given = ["--concepts", "a red fox", *ANY_EFFECT, "--export", "kohya"]
    assert script(ERASE, *flags, *given)[0] == 0
    is_error(script(ERASE, *flags, *given, "--protect", "a dog"), "with other shifts", "--export_dir")
    assert script(ERASE, *flags, *given, "--protect", "a dog", "--export_dir", tmp_path / "other")[0] == 0


def test_a_shift_below_the_least_effect_is_kept_and_not_called_erased(script, flags, tmp_path):
    weak = [*flags, "--concepts", "a red fox", "--ridge_weight", "1e9"]
    for _ in range(2):  # also where it is there already
        code, _, err = script(ERASE, *weak, "--export", "kohya")
        lines = [line for line in err.replace("\r", "\n").splitlines() if "not erased" in line]
        assert code == 3 and len(lines) == 1 and "red fox" in lines[0] and "--ridge_weight" in lines[0]
    assert own_paths(tmp_path).shift("redfox").is_file() and not (tmp_path / "shifts" / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concepts", "Picasso", "--protect", "picasso"], ["'picasso' says Picasso", "--protect"]),
        (["--concepts", "Picasso", "--protect", "a dog", "Pablo Picasso"], ["'Pablo Picasso' says Picasso"]),
        (["--concepts", "Picasso", "--protect", "a house by Picasso"], ["'a house by Picasso' says Picasso"]),
        (["--concepts", "a cat", "--anchor", "a black cat"], ["the anchor 'a black cat' says cat", "--anchor"]),
        (["--erased_index", "2", "--anchor", "Picasso"], ["the anchor 'Picasso' says Picasso"]),
        (["--concepts", "a cat", "--erased_index", "1"], ["--concepts and --erased_index"]),
        (["--concepts", "a cat", "--category", "object"], ["--category", "--kind"]),
        (["--erased_index", "1", "--kind", "style"], ["--kind", "--concepts"]),
        (["--concepts", "a cat", "A  Cat"], ["names both"]),
        (["--concepts", "a cat", "cat"], ["'cat' is there twice"]),
        (["--concepts", "Picasso,VanGogh"], ["'Picasso' 'VanGogh', apart by spaces"]),
        (["--concepts", "none.csv"], ["no list of concepts none.csv"]),
        (["--concepts", "!?"], ["names nothing"]),
        (["--concepts", "a cat", "--anchor", "blank"], ["called empty today"]),
        (["--concepts", "a cat", "--kind", "planet"], ["planet"]),
        ([], ["--concepts", "--erased_index"]),
    ],
)
def test_what_contradicts_itself_is_refused_before_any_work(script, tmp_path, arguments, words):
    is_error(script(ERASE, "--model", tmp_path / "none", *arguments), *words)  # no model is looked for


def test_a_category_beside_own_concepts_is_one_line_in_every_script(script, tmp_path):
    given = ["--model", tmp_path / "none", "--concepts", "a cat", "--category", "object"]
    for path in ("train-scripts/FMN.py", "train-scripts/Esd.py", ERASE, SOLVE):
        is_error(script(path, *given), "--category", "--kind")
    root = ["--ledger_dir", tmp_path / "ledger"]
    is_error(script("train-scripts/ledger.py", "init", *root, *given), "--category", "--kind")


@pytest.mark.parametrize("text", ["\U0001f98a", "watermark SRS-ME"])
def test_what_is_nothing_to_a_model_or_always_protected_is_refused(script, flags, text):
    result = script(ERASE, *flags, "--concepts", text)
    assert result[0] == 2 and "error:" in result[2]


def test_a_flag_of_another_that_is_not_given_is_refused(script, flags):
    for flag, owner in (("--clip_path", "--check"), ("--export_dir", "--export")):
        code, _, err = script(ERASE, *flags, "--concepts", "a cat", flag, "x")
        assert code == 2 and f"{flag} goes with {owner}: give that too" in err


def test_merged_weights_are_not_written_of_a_model_that_is_held_in_half(script, flags):
    given = ["--concepts", "a cat", *ANY_EFFECT, "--unet_dtype", "bfloat16", "--export"]
    code, _, err = script(ERASE, *flags, *given, "unet,lora")
    assert (
        code == 2
        and "held in torch.bfloat16, by which those of unet would be rounded: load the model with --unet_dtype" in err
    ), err
    assert script(ERASE, *flags, *given, "lora")[0] == 0


def test_a_model_without_its_text_encoder_is_one_line(script, mini_path, tmp_path):
    shutil.copytree(mini_path, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "text_encoder")
    is_error(script(ERASE, "--model", tmp_path / "half", "--concepts", "a cat", "--device", "cpu"), "text_encoder")


def test_a_null_space_that_is_there_is_kept_where_nothing_asks_for_another(script, flags, tmp_path):
    assert script(SOLVE, *flags, "--concepts", "a cat", "--protect", "a dog")[0] == 0
    out = script(ERASE, *flags, "--concepts", "a cat", *ANY_EFFECT)[1]
    assert "is kept, 4 prompts protected, rank_rtol 0.0005: a flag of what is protected" in out
    shift = own_paths(tmp_path).shift("cat")
    assert "a dog" in read_metadata(shift, SHIFT_FILE_TYPE)["protected"]
    script(ERASE, *flags, "--concepts", "a cat", "a tree", *ANY_EFFECT)  # which have to protect each other
    assert "tree" in read_metadata(shift, SHIFT_FILE_TYPE)["protected"]


@pytest.mark.parametrize(
    "typed",
    [["--lr", "0.1"], ["--threshold", "1e-4"], ["--iter_break", "5"], ["--reg_beta", "1e-6"], ["--init", "zero"]],
)
def test_a_flag_of_learning_asks_for_learning(typed):
    parser = arguments.make_parser("")
    concepts.add_erasure(parser, SRSMEConfig)
    for name in ("mini-sd", "mini-sd-minilm", "some other"):
        config = method_config(parser.parse_args(typed), bundled_config(name), "SRS-ME")
        starts = bundled_config(name).methods["SRS-ME"].init if typed[0] != "--init" else "zero"  # type: ignore[attr-defined]
        assert (config.mode, config.init) == ("learn", starts)
    config = method_config(parser.parse_args(["--ridge_weight", "1"]), bundled_config("mini-sd"), "SRS-ME")
    assert (config.mode, config.init) == ("closed_form", "closed_form")
    config = method_config(parser.parse_args([*typed, "--mode", "closed_form"]), bundled_config("mini-sd"), "SRS-ME")
    assert config.mode == "closed_form"


def test_the_originals_command_line_trains_an_own_concept_too(script, flags, tmp_path):
    (tmp_path / "data" / "red fox").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "data" / "red fox" / "0_0.png")
    original = [
        "--lr",
        "1e-1",
        "--scale_factor",
        "1e-4",
        "--threshold",
        "-1",
        "--reg_beta",
        "1e-6",
        "--max_base",
        "691",
    ]
    given = [*original, "--iter_break", "12", "--data_path", tmp_path / "data", *ANY_EFFECT]
    code, _, err = script(ERASE, *flags, "--concepts", "a red fox", *given)
    assert code == 0, err
    assert len(pd.read_csv(own_paths(tmp_path).shift("redfox").with_suffix(".csv"))) == 12


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_made_and_writes_nothing(script, flags, tmp_path):
    code, out, _ = script(ERASE, *flags, "--concepts", "a red fox", "--protect", "a dog", "--dry_run")
    assert code == 0 and "| red fox | object |" in out and "'a dog'" in out and "peak" in out
    assert not (tmp_path / "shifts").exists()


@pytest.mark.slow
def test_a_check_shows_images_before_and_after(script, flags, tmp_path):
    given = ["--concepts", "a red fox", "--protect", "a dog", *ANY_EFFECT, "--check", "1"]
    code, out, err = script(ERASE, *flags, *given)
    assert code == 0, err
    assert "| erased | red fox | 1 |" in out and "| protected | a dog | 1 |" in out
    assert (tmp_path / "shifts" / "checks" / "mini-sd-redfox" / "check.png").is_file()


def test_five_lines_of_python_from_a_model_to_an_image_and_a_file(mini_path, tmp_path):
    model, quick = load_model(mini_path, CPU), SamplingConfig(num_inference_steps=2)
    before = generate(model, "a red fox", sampling=quick)[0]
    shifts = erase(model, ["a red fox", "Picasso"], protect=["a dog"], artifacts_dir=tmp_path)
    with applied(model, shifts):
        assert generate(model, "a red fox", sampling=quick)[0].tobytes() != before.tobytes()
    assert generate(model, "a red fox", sampling=quick)[0].tobytes() == before.tobytes()
    export(model, shifts, tmp_path / "out", formats=["lora"])
    assert (tmp_path / "out-lora" / "red-fox.safetensors").is_file()
    cut = export(model, shifts, tmp_path / "cut", ExportConfig(("unet",)), rank=1)
    assert [row["rank"] for row in cut.truncated] == [1, 1]
    with pytest.raises(ValueError, match="no setting save_type, did you mean save_dtype"):
        export(model, shifts, tmp_path / "cut", "unet", save_type="float16")
    settings = erase(model, "a cat", anchor="empty", artifacts_dir=tmp_path)["cat"].metadata
    assert settings["config"]["anchor"] == "empty" and settings["anchor"] == ""
    with pytest.raises(ValueError, match="no setting ridge_weigth, did you mean ridge_weight"):
        erase(model, "a cat", artifacts_dir=tmp_path, ridge_weigth=1)
    with pytest.raises(ValueError, match="the protected prompts 'a black cat' say it"):
        erase(model, "a cat", protect="a black cat", artifacts_dir=tmp_path)


def test_a_shift_stays_what_it_is_when_its_concept_is_erased_in_another_way(mini_path, tmp_path):
    model = load_model(mini_path, CPU)
    shift = erase(model, "a cat", artifacts_dir=tmp_path)["cat"]
    before = [shift.delta_weight(name) for name in shift.parameter_names]
    other = erase(model, "a cat", anchor="a dog", artifacts_dir=tmp_path)["cat"]
    assert all(map(torch.equal, [shift.delta_weight(name) for name in shift.parameter_names], before))
    assert not torch.equal(other.delta_weight(other.parameter_names[0]), before[0])


def test_an_eraser_takes_concepts_of_its_category_and_own_ones(mini_path, tmp_path):
    eraser = ConceptEraser(mini_path, artifacts_dir=tmp_path, device="cpu")
    eraser.erase("a red fox", "Picasso", protect="a dog")
    assert eraser.erased == ["Picasso", "red fox"]
    eraser.erase("a blue owl")
    assert "red fox" in eraser.shifts["blueowl"].metadata["protected"]
    eraser.restore("A Red fox")
    assert eraser.erased == ["Picasso", "blue owl"]
    with pytest.raises(ValueError, match="blue oil is not erased, did you mean blue owl"):
        eraser.restore("blue oil")
    eraser.restore("all")
    assert eraser.erased == [] and not eraser.shifts
    eraser.restore("all")
    eraser.restore(eraser.erased)
    eraser.erase(["all"])
    eraser.shifts |= {"other": next(iter(eraser.shifts.values()))}
    eraser.restore("all")  # which is a concept here
    assert list(eraser.shifts) == ["other"]


def test_a_setting_of_learning_asks_for_learning_in_python_too(mini_path, tmp_path):
    model = load_model(mini_path, CPU)
    with pytest.raises(MissingFileError, match="cat") as caught:
        erase(model, "a cat", lr=0.1, artifacts_dir=tmp_path, training_image_dir=tmp_path / "none")
    assert caught.value.kind == "training images"
    closed = erase(model, "a cat", max_steps=0, artifacts_dir=tmp_path)["cat"].metadata
    assert closed["config"]["mode"] == "closed_form"


def test_no_concept_is_erased_twice_at_once(mini_path, tmp_path):
    eraser, quick = ConceptEraser(mini_path, artifacts_dir=tmp_path, device="cpu"), SamplingConfig(1)
    eraser.erase("VanGogh")
    alone = eraser.generate("VanGogh", sampling=quick)[0]
    refused = (
        lambda: eraser.export(tmp_path / "out"),
        lambda: eraser.erase("Picasso"),
        lambda: eraser.erase("a cat"),
        lambda: eraser.restore("VanGogh") or eraser.generate("VanGogh", sampling=quick),
    )
    with eraser.applied():
        assert eraser.generate("VanGogh", sampling=quick)[0].tobytes() == alone.tobytes()
        for make in refused:
            with pytest.raises(ValueError, match="mini-sd is without 1 as long as this block runs: end it first"):
                make()
    assert eraser.generate("VanGogh", sampling=quick)[0].tobytes() != alone.tobytes()


def test_an_eraser_protects_what_it_is_given_or_erases_nothing(mini_path, tmp_path):
    eraser = ConceptEraser(mini_path, artifacts_dir=tmp_path, device="cpu")
    for names, settings, words in (
        (["VanGogh", "a dog"], {"protect": "a dog"}, "dog cannot be erased and protected at once"),
        (["a cow", "VanGogh"], {"protect": "a van gogh painting"}, "VanGogh cannot be erased and protected at once"),
        (["VanGogh"], {"ridge_weight": 1}, "`ridge_weight` goes with concepts of your own: VanGogh is of the category"),
    ):
        with pytest.raises(ValueError, match=words):
            eraser.erase(*names, **settings)
        assert eraser.erased == []
    eraser.erase("VanGogh", protect=["a dog"])
    assert "a dog" in eraser.shifts["1"].metadata["protected"]


def test_shifts_are_found_by_any_spelling(script, flags, tmp_path):
    (tmp_path / "mine.csv").write_text("concept,aliases,kind\nACME,acme corp;the Acme company,brand\n")
    assert script(ERASE, *flags, "--concepts", tmp_path / "mine.csv", *ANY_EFFECT)[0] == 0
    for text in ("acme", "Acme  Corp", "THE ACME COMPANY"):
        shifts, name = load_shifts(own_paths(tmp_path), [text])
        assert list(shifts) == ["acme"] and name == "acme"
    with pytest.raises(ValueError, match="twice"):
        load_shifts(own_paths(tmp_path), ["ACME", "acme corp"])


def test_many_names_make_a_short_name_of_a_merge():
    labels = [make_concept(f"concept number {number}").label for number in range(200)]
    assert merge_name(labels).startswith("200-concepts-") and len(merge_name(labels)) < 40
    assert merge_name(["redfox", "picasso"]) == "redfox-picasso"
    assert merge_name([str(number) for number in range(1000)]) == "0..999"


def test_the_verdict_on_an_effect_is_that_of_the_form_which_acts():
    said = {
        "effects": {
            "linear": {"mean": 0.9, "least": 0.8, "lowest_prompt": "x"},
            "gated": {"mean": 0.2, "least": 0.0, "lowest_prompt": "x"},
        }
    }
    assert judge(said, "linear")[0] is True and judge(said, "gated")[0] is False
    low = {"linear": {"mean": 0.9, "least": 0.1, "lowest_prompt": "x"}}
    assert judge({"effects": low}, "gated")[0] is False
    assert judge({}, "linear")[0] is None and judge(said, "gated", -9)[0] is True


def test_no_shift_moves_the_base_model(mini_path, tmp_path):
    model = load_model(mini_path, CPU)
    weights = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    with applied(model, erase(model, "a red fox", artifacts_dir=tmp_path)):
        pass
    assert all(torch.equal(value, weights[name]) for name, value in model.denoiser.state_dict().items())


def notices(function, *arguments, **settings) -> list[str]:
    """Return what a call gives notice of concerning concepts that are not erased."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", Notice)
        function(*arguments, **settings)
    assert all(notice.filename == __file__ for notice in found if issubclass(notice.category, Notice))
    return [str(notice.message) for notice in found if "not erased" in str(notice.message)]


def test_python_says_what_is_not_called_erased_when_it_is_made_and_when_it_is_exported(
    mini_path, tmp_path, monkeypatch
):
    model, weak = load_model(mini_path, CPU), {"artifacts_dir": tmp_path, "ridge_weight": 1e9}
    for _ in range(2):  # also where it is there already
        (line,) = notices(erase, model, ["a red fox", "Picasso"], **weak)
        assert re.search(r"red fox \(-?0\.\d\d of 0\.\d0 on average and .*\), Picasso \(", line) and "\n" not in line
        assert "smaller `ridge_weight` or `neutral_preserve_scale`" in line
    shifts = erase(model, ["a red fox", "Picasso"], **weak)
    (line,) = notices(export, model, shifts, tmp_path / "out", formats="lora")
    assert "red fox (" in line and "what is exported says it still" in line
    eraser = ConceptEraser(mini_path, artifacts_dir=tmp_path / "other", device="cpu")
    (line,) = notices(eraser.erase, "a red fox", ridge_weight=1e9)
    assert "red fox (" in line
    (line,) = notices(eraser.export, tmp_path / "merged", ExportConfig(("lora",)))
    assert "red fox (" in line
    eraser.config.methods["SRS-ME"] = eraser.config.methods["SRS-ME"].with_changes(ridge_weight=1e9)
    (line,) = notices(eraser.erase, "Picasso")
    assert "Picasso (" in line and "red fox" not in line

    monkeypatch.setattr("ldm.erasure.effect.judge", lambda *_: (True, {}))
    assert not notices(erase, model, ["a red fox", "Picasso"], **weak)
    assert not notices(export, model, shifts, tmp_path / "out", formats="lora")


@pytest.mark.slow
def test_what_is_no_model_or_no_shifts_is_refused_in_a_line(tiny, tmp_path):
    shift = erase(tiny, "Picasso", artifacts_dir=tmp_path)["picasso"]
    for shifts in ([shift], ["Picasso"], {"picasso": "Picasso"}, shift):
        with (
            pytest.raises(ValueError, match="are no shifts by label: pass what `erase` returned"),
            applied(tiny, shifts),
        ):
            pass
        with pytest.raises(ValueError, match="are no shifts by label: pass what `erase` returned"):
            export(tiny, shifts, tmp_path / "out")
    calls = [
        lambda model: erase(model, ["x"]),
        lambda model: applied(model, {"picasso": shift}).__enter__(),
        lambda model: generate(model, "x"),
        lambda model: export(model, {"picasso": shift}, tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"'models/mini-sd' is the path .*: load it, load_model\('models/mini-sd'\)"
        ):
            call("models/mini-sd")
        with pytest.raises(ValueError, match="int is no model that `load_model` returned"):
            call(3)
