"""Bad input to the scripts, one line each; and the whole path on a tiny model."""

import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import CPU, is_error
from PIL import Image

from ldm.cli.devices import parse_devices
from ldm.config.concepts import load_concepts
from ldm.diffusion.load import load_model
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.shift import WeightShift
from ldm.io.files import file_digest
from ldm.io.prompts import read_prompt_csv

SOLVE, ERASE, MERGE = "train-scripts/SRSME_Solution.py", "train-scripts/SRS_ME.py", "train-scripts/Merge_model.py"
DATA, GENERATE = "eval-scripts/generate-data.py", "eval-scripts/generate-images-merge.py"


@pytest.fixture
def flags(tiny_path, tmp_path):
    return ["--model", tiny_path, "--artifacts_dir", tmp_path / "shifts"]


@pytest.fixture
def solved(script, flags, tmp_path):
    """Solve a basis for VanGogh, make an image to erase it with, and return the flags of SRS_ME.py."""
    assert script(SOLVE, *flags, "--erased_index", "1", "--em_indexes", "1,2", "--device", "cpu")[0] == 0
    (tmp_path / "data" / "VanGogh").mkdir(parents=True)
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "data" / "VanGogh" / "0_0.png")
    return [
        *flags,
        "--training_image_dir",
        tmp_path / "data",
        "--erased_index",
        "1",
        "--devices",
        "cpu",
        "--least_effect",
        "-9",  # a random model's
        "--lr",
        "0.1",
        "--basis_scale",
        "1",
        "--max_steps",
        "12",
        "--stop_threshold",
        "-1",
    ]


@pytest.mark.slow
def test_erase_merge_restore_and_measure(script, flags, solved, tmp_path, tiny_path):
    before = file_digest(tiny_path)
    scales = [f"--{name}preserve_scale=0" for name in ("", "captions_", "neutral_", "others_")]
    paper = ["--init", "zero", "--template_set", "category", "--target_templates", "0", *scales]
    code, out, err = script(ERASE, *solved, *paper, "--max_directions", "691")
    assert code == 0 and "all are used" in out and "was not reached" in err and "| VanGogh | 12 |" in out
    assert script(SOLVE, *flags, "--erased_index", "1", "--em_indexes", "1,2", "--device", "cpu")[0] == 0
    assert "there already" in script(ERASE, *solved, *paper, "--max_directions", "691")[1]
    curve = pd.read_csv(next(tmp_path.rglob("shift-1.csv")))
    assert len(curve) == 12 and curve.monitor.iloc[-1] < curve.monitor.iloc[0]

    prompts = tmp_path / "list.csv"
    prompts.write_text("prompt,evaluation_seed,case_number\nVanGogh,1,0\nPicasso,2,1\n,3,2\nCCS 2024,4,3\n")
    common = ["--prompts_path", prompts, "--save_path", tmp_path / "out", "--num_inference_steps", 3, "--device", "cpu"]
    assert script(GENERATE, *flags, *common)[0] == 0
    assert script(GENERATE, *flags, *common, "--shifts", "1")[0] == 0
    code, out, _ = script(
        "eval-scripts/lpips_eval.py",
        "--original_dir",
        tmp_path / "out/ori-merge",
        "--edited_dir",
        tmp_path / "out/1-merge",
        "--image_size",
        64,
        "--device",
        "cpu",
    )
    lpips = pd.read_csv(tmp_path / "out/1-merge/lpips.csv", keep_default_na=False).set_index("prompt").lpips
    assert code == 0 and lpips["VanGogh"] > 0.001 and lpips.drop("VanGogh").max() < 1e-4

    code, out, _ = script(MERGE, *flags, "--shifts", "1", "--save_path", tmp_path / "merged")
    assert code == 0 and "| Picasso |" in out
    assert script(MERGE, *flags, "--shifts", "1", "--save_path", tmp_path / "merged")[0] == 0
    merged, base = load_model(tmp_path / "merged" / "tiny-1", CPU), load_model(tiny_path, CPU)
    assert merged.config_name == "tiny" and merged.digest != base.digest
    changed = {
        name
        for name, weight in base.denoiser.state_dict().items()
        if not torch.equal(weight, merged.denoiser.state_dict()[name])
    }
    assert changed == {f"{name}.weight" for name in text_layers(base.denoiser)}
    code, out, _ = script(
        "eval-scripts/generate-images.py", "--model_name", "tiny-1", "--models_dir", tmp_path / "merged", *common
    )
    assert code == 0
    assert file_digest(tiny_path) == before


@pytest.mark.parametrize(
    ("name", "method"),
    [("FMN.py", "FMN"), ("Abconcept.py", "AbConcept"), ("Esd.py", "ESD"), ("CiE.py", "SRS-ME-double-dagger")],
)
def test_each_other_method_saves_a_dense_shift_that_merges(script, flags, solved, tmp_path, name, method):
    given = [
        *solved[:-6],
        "--max_steps",
        "2",
        "--lr",
        "1e-3",
        "--train_method",
        "selfattn" if name == "Esd.py" else "xattn",
    ]
    code, out, _ = script(f"train-scripts/{name}", *given)
    assert code == 0 and "| VanGogh | 2 |" in out
    assert "there already" in script(f"train-scripts/{name}", *given)[1]
    shift = WeightShift.load(next(tmp_path.rglob("shift-1.safetensors")))
    assert shift.metadata["method"] == method and shift.metadata["created_by"] == "srs-me"
    assert all(("attn1" if name == "Esd.py" else "attn2") in changed for changed in shift.parameter_names)
    assert script(MERGE, *flags, "--method", method, "--shifts", "1", "--save_path", tmp_path / "merged")[0] == 0
    assert (tmp_path / "merged" / f"tiny-{method}-1").is_dir()
    is_error(
        script(MERGE, *flags, "--method", method, "--shifts", "0", "--save_path", tmp_path), name, "--erased_index 0"
    )


def test_nudity_is_a_category_of_the_methods_that_protect_nothing(script, solved, tmp_path):
    (tmp_path / "data" / "nudity").mkdir()
    Image.new("RGB", (16, 16), "pink").save(tmp_path / "data" / "nudity" / "0_0.png")
    given = [
        *solved[: solved.index("--erased_index")],
        "--category",
        "nudity",
        "--erased_index",
        "0",
        "--max_steps",
        "2",
    ]
    assert "| nudity | 2 |" in script("train-scripts/CiE.py", *given)[1]
    assert "| nudity | 2 |" in script("train-scripts/FMN.py", *given)[1]


def test_another_anchor_is_another_input(script, solved, monkeypatch):
    given = [*solved[:-6], "--max_steps", "1"]
    assert (
        script("train-scripts/Abconcept.py", *given)[0] == 0
        and "there already" in script("train-scripts/Abconcept.py", *given)[1]
    )
    other = [replace(concept, anchor_prompt="picture") for concept in load_concepts("style")]
    monkeypatch.setattr("ldm.config.concepts.load_concepts", lambda category: tuple(other))
    assert "| VanGogh | 1 |" in script("train-scripts/Abconcept.py", *given)[1]


@pytest.mark.slow
def test_joint_erasure_trains_all_at_once_and_both_or_none_again(script, flags, solved, tmp_path):
    assert script(SOLVE, *flags, "--erased_index", "2", "--em_indexes", "1,2", "--device", "cpu")[0] == 0
    (tmp_path / "data" / "Picasso").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "data" / "Picasso" / "0_0.png")
    given = [*solved[: solved.index("--erased_index")], "--erased_index", "1,2", "--joint", "--max_steps", "3"]
    given += ["--devices", "cpu", "--least_effect", "-9", "--stop_threshold", "-1"]
    code, out, err = script(ERASE, *given)
    assert code == 0 and "erase VanGogh, Picasso" in err and "| Picasso | 3 |" in out
    shifts = sorted((tmp_path / "shifts" / "srs-me-dagger").rglob("shift-*.safetensors"))
    assert [WeightShift.load(path).metadata["joint_with"] for path in shifts] == [[1, 2], [1, 2]]
    assert "| concept |" not in script(ERASE, *given)[1]
    shifts[0].unlink()
    assert "| Picasso | 3 |" in script(ERASE, *given)[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scene", "7"], ["no scene 7", "1, 2, 3, 4"]),
        (["--scene", "x"], ["--scene x", "1,2,3,4"]),
        (["--methods", "SRS-ME,SA"], ["'SA' is no method", "AbConcept"]),
        (["--methods", ""], ["no method"]),
        (["--category", "similar"], ["no classifier", "style or object"]),
        (["--set", "FMN.rate=1"], ["--set FMN.rate=1", "FMN.lr=1e-2"]),
        (["--set", "x"], ["METHOD.SETTING=VALUE"]),
        (["--set", "FMN.max_steps=0"], ["FMN.max_steps=0"]),
        (["--imagenet_weights", "x"], ["--imagenet_weights", "--category object"]),
        (["--inception_weights", "x"], ["no file x", "--inception_weights"]),
    ],
)
def test_what_no_scene_can_be_run_with(script, tiny_path, tmp_path, flags, words):
    is_error(
        script(
            "eval-scripts/scenes.py", "--model", tiny_path, "--save_path", tmp_path / "s", "--device", "cpu", *flags
        ),
        *words,
    )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("beta", "1", ["two different"]),
        ("beta", "a,b", ["give numbers"]),
        ("beta", "0,inf", ["give numbers"]),
        ("beta", "0,1", ["above 0"]),
        ("regularisation", "-1,1", ["above 0, or 0"]),
        ("protected", "2,9", ["0 to 8"]),
        ("protected", "-1,2", ["0 to 8"]),
        ("protected", "0,2.5", ["0 to 8"]),
    ],
)
def test_what_no_ablation_can_vary(script, tiny_path, tmp_path, name, values, words):
    is_error(
        script(
            f"eval-scripts/ablate-{name}.py",
            "--model",
            tiny_path,
            "--save_path",
            tmp_path / "a",
            f"--sweep_values={values}",
        ),
        *words,
    )
    assert not (tmp_path / "a").exists()


def test_a_detector_threshold_below_what_it_reports_is_refused(script, tmp_path):
    is_error(
        script("eval-scripts/nudenet_eval.py", "--image_dir", tmp_path, "--min_score", "0.1"), "--min_score 0.1", "0.25"
    )


def test_unknown_train_method_lists_them(script, solved):
    is_error(
        script("train-scripts/Esd.py", *solved[:-6], "--train_method", "x"),
        "--train_method: 'x' is none of",
        "selflayer",
    )


def test_unknown_index_lists_the_names(script, flags):
    is_error(script(SOLVE, *flags, "--erased_index", "12"), "12", "1 VanGogh", "10 CCS 2024")
    is_error(script(MERGE, *flags, "--shifts", "12"), "12", "1 VanGogh")
    is_error(script(SOLVE, *flags, "--erased_index", "9"), "watermark", "0 to 8")


def test_missing_data_names_the_command(script, solved, tmp_path):
    (tmp_path / "data" / "VanGogh" / "0_0.png").unlink()
    is_error(script(ERASE, *solved), "VanGogh", "generate-data.py")


def test_missing_and_foreign_bases(script, flags, solved, tmp_path, other_path):
    others = ["--model", other_path, *solved[2:]]
    path = next(tmp_path.rglob("basis-1.safetensors"))
    kept = tmp_path / "shifts" / "srs-me"
    foreign = kept / "other" / path.relative_to(kept / "tiny")
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(path.read_bytes())
    is_error(script(ERASE, *others), "another text encoder")
    basis = NullSpaceBasis.load(path)
    NullSpaceBasis(basis.vectors[:, :5], basis.protected[:, :5], basis.metadata).save(path)
    is_error(script(ERASE, *solved), "5 dimensions", "SRSME_Solution.py")
    path.write_bytes(b"nothing")
    is_error(script(ERASE, *solved), "damaged")
    assert not list(tmp_path.rglob("shift-*"))


@pytest.mark.slow
def test_missing_and_foreign_shifts(script, flags, solved, tmp_path, other_path):
    merge = ["--save_path", tmp_path / "merged"]
    is_error(script(MERGE, *flags, *merge, "--shifts", "1"), "no shift that erases 1 VanGogh", "SRS_ME.py")
    is_error(
        script(MERGE, *flags, *merge, "--shifts", next(tmp_path.rglob("basis-1.safetensors"))), "not a weight shift"
    )
    assert script(ERASE, *solved)[0] == 0
    shift = next(tmp_path.rglob("shift-1.safetensors"))
    is_error(script(MERGE, "--model", other_path, *merge, "--shifts", shift), "another base model")
    is_error(script(MERGE, *flags, *merge, "--shifts", ""), "no shift", "0,1,2")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_shift_is_trained_again_when_it_is_damaged_or_its_images_changed(script, solved, tmp_path):
    assert script(ERASE, *solved)[0] == 0
    path = next(tmp_path.rglob("shift-1.safetensors"))
    first = path.read_bytes()
    path.write_bytes(first[:-3])
    assert script(ERASE, *solved)[0] == 0 and path.read_bytes() == first
    Image.new("RGB", (16, 16), "red").save(tmp_path / "data" / "VanGogh" / "0_0.png")
    assert "there already" not in script(ERASE, *solved)[1] and path.read_bytes() != first


@pytest.mark.slow
def test_another_merge_of_the_same_name_is_refused(script, flags, solved, tmp_path):
    merge = [*flags, "--shifts", "1", "--save_path", tmp_path / "merged"]
    assert script(ERASE, *solved)[0] == 0 and script(MERGE, *merge)[0] == 0
    assert script(ERASE, *solved, "--seed", "1")[0] == 0
    is_error(script(MERGE, *merge), "another run", "--save_path")


def test_nan_in_the_loss_saves_nothing(script, solved, tmp_path):
    is_error(
        script(ERASE, *solved[:-6], "--basis_scale", "1", "--lr", "1e30", "--max_steps", "5"),
        "nan",
        "nothing was saved",
    )
    assert not list(tmp_path.rglob("shift-*")) and not list(tmp_path.rglob(".partial*"))


def test_no_null_space_left(script, flags):
    result = script(SOLVE, *flags, "--erased_index", "0", "--em_indexes", "1,2,3,4,5,6,7", "--rank_rtol", "1e-9")
    is_error(result, "no null space left", "fit", "--rank_rtol")


def test_a_csv_without_a_column_and_an_unreadable_image(script, flags, solved, tmp_path):
    (tmp_path / "list.csv").write_text("prompt,seed\nVanGogh,1\n")
    is_error(
        script(GENERATE, *flags, "--prompts_path", tmp_path / "list.csv", "--save_path", tmp_path / "out"),
        "evaluation_seed, case_number",
    )
    (tmp_path / "data" / "VanGogh" / "0_0.png").write_text("no image")
    is_error(script(ERASE, *solved), "0_0.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_devices_without_cuda(script, solved):
    at = solved.index("--devices")
    is_error(script(ERASE, *solved[:at], "--devices", "0,1", *solved[at + 2 :]), "CUDA", "use cpu")
    assert parse_devices(None) == [CPU] and parse_devices("cpu, cpu") == [CPU, CPU]
    for wrong in ("gpu one", "meta"):
        with pytest.raises(ValueError, match="no device"):
            parse_devices(wrong)


def test_a_compvis_checkpoint_that_is_not_there(script, flags):
    checkpoint = ["--erased_index", "0", "--ckpt_path", "sd.ckpt"]
    is_error(script(SOLVE, *checkpoint), "no checkpoint sd.ckpt", "--ckpt_path")
    is_error(script(SOLVE, *flags, *checkpoint), "--model and --ckpt_path both name a model")
    is_error(script(SOLVE, "--erased_index", "0", "--ckpt_path", ""), "is empty")
    is_error(script(SOLVE, "--erased_index", "0", "--config_path", "x.yaml"), "--config_path says what --ckpt_path")
    is_error(script(SOLVE, "--erased_index", "0,,1"), "'' is not a concept index")
    is_error(script(SOLVE, "--erased_index", "0", "--artifacts_dir", __file__), "a file is where a folder should be")
    is_error(script(SOLVE, "--erased_index", "0", "--scene", "\u0663"), "is not a whole number")


@pytest.mark.slow
def test_memory_is_estimated_and_running_out_of_it_ends_in_the_same_table(script, flags, solved, monkeypatch):
    code, table, _ = script(ERASE, *flags, "--estimate_memory", "--devices", "cpu")
    assert code == 0 and "| bfloat16 | yes |" in table and "<-" in table

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ldm.erasure.erase.erase_concepts", full)
    result = script(ERASE, *solved)
    is_error(result, "out of memory", "--gradient_checkpointing")
    assert table.splitlines()[0] in result[1].splitlines() and "| bfloat16 | yes |" in result[1]
    is_error(script(ERASE, "--estimate_memory", "--model", "nothing/here"), "--model")


@pytest.mark.slow
def test_an_erasure_in_half_precision_with_little_memory_and_a_second_device(script, solved, tmp_path):
    at = solved.index("--devices")
    given = [
        *solved[:at],
        "--devices",
        "cpu,cpu",
        *solved[at + 2 :],
        "--unet_dtype",
        "bfloat16",
        "--gradient_checkpointing",
    ]
    assert script(ERASE, *given)[0] == 0
    path = next(tmp_path.rglob("shift-1.safetensors"))
    shift = WeightShift.load(path)
    assert shift.metadata["dtype"] == "torch.bfloat16" and all(
        value.dtype == torch.float32 for value in shift.coefficients.values()
    )
    assert "there already" in script(ERASE, *given)[1]
    assert "there already" not in script(ERASE, *solved)[1]  # in float32 it is another


@pytest.mark.slow
def test_formats_are_written_side_by_side_and_ranks_are_reported(script, flags, solved, tmp_path):
    assert script(ERASE, *solved)[0] == 0
    merge = [*flags, "--shifts", "1", "--save_path", tmp_path / "merged", "--format"]
    code, out, _ = script(MERGE, *merge, "diffusers,kohya,unet,compvis,lora", "--save_dtype", "float16")
    assert code == 0 and "all, in float16" in out and "truncation_error" in out
    made = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert made == ["tiny-1", "tiny-1-compvis", "tiny-1-kohya", "tiny-1-lora", "tiny-1-unet"]
    assert load_model(tmp_path / "merged" / "tiny-1", CPU).digest != load_model(flags[1], CPU).digest
    assert "| VanGogh | 2 |" in script(MERGE, *merge[:-2], tmp_path / "two", "--format", "lora", "--rank", "2")[1]
    is_error(script(MERGE, *merge, "onnx"), "onnx", "compvis")
    is_error(script(MERGE, *merge, "lora", "--rank", "0"), "whole number from 1")
    is_error(script(MERGE, *merge, "lora", "--effect_fraction", "2"), "--effect_fraction 2.0")
    is_error(script(MERGE, *merge, "lora"), "another run", "--save_path")


def test_wrong_flags_are_one_line(script):
    is_error(script(SOLVE), "--erased_index")
    is_error(
        script(GENERATE, "--images_per_seed", "0", "--prompts_path", "a", "--save_path", "b"), "whole number from 1"
    )


def test_generated_data_is_split_and_the_empty_prompt_is_class_0(script, tmp_path):
    assert (
        script(
            DATA, "--source", "synthetic", "--save_path", tmp_path, "--seeds_per_prompt", "10", "--prompt", "van gogh"
        )[0]
        == 0
    )
    assert (
        script(DATA, "--source", "synthetic", "--save_path", tmp_path, "--seeds_per_prompt", "10", "--prompt", "")[0]
        == 0
    )
    count = {
        folder: len(list((tmp_path / folder).glob("*.png")))
        for folder in ("VanGogh", "train/2", "eval/2", "empty", "train/0", "eval/0")
    }
    assert list(count.values()) == [10, 7, 3, 10, 7, 3]
    first = (tmp_path / "VanGogh" / "3_0.png").read_bytes()
    (tmp_path / "VanGogh" / "3_0.png").unlink()
    kept = (tmp_path / "VanGogh" / "4_0.png").stat().st_mtime_ns
    assert (
        script(
            DATA, "--source", "synthetic", "--save_path", tmp_path, "--seeds_per_prompt", "10", "--prompt", "VanGogh"
        )[0]
        == 0
    )
    assert (tmp_path / "VanGogh" / "3_0.png").read_bytes() == first
    assert (tmp_path / "VanGogh" / "4_0.png").stat().st_mtime_ns == kept
    is_error(
        script(
            DATA, "--source", "synthetic", "--save_path", tmp_path, "--seeds_per_prompt", "5", "--prompt", "VanGogh"
        ),
        "another run",
        "--save_path",
    )
    for flag in (["--source", "synthetic"], ["--reconstruct"]):
        is_error(
            script(DATA, "--prompt", "Picaso", *flag), "'Picaso' is no style concept", "did you mean Picasso?", flag[0]
        )
    is_error(script(DATA, "--prompt", "CCS 2024"), "is a watermark", "VanGogh")
    is_error(script(DATA, "--source", "SD-v2"), "synthetic")


def test_a_users_concept_is_drawn_and_erased_by_a_method_that_trains_on_images(script, flags, tiny_path, tmp_path):
    data = tmp_path / "data"
    generate = [DATA, "--model", tiny_path, "--save_path", data, "--seeds_per_prompt", "2", "--device", "cpu"]
    generate += ["--num_inference_steps", "2"]
    training = ["--training_image_dir", data, "--device", "cpu", "--max_steps", "2", "--train_batch_size", "1"]
    erase = ["train-scripts/FMN.py", *flags, *training, "--concepts", "a red fox", "AC/DC"]
    is_error(script(*erase), "generate-data.py --prompt 'red fox' --source model --model")
    for text in ("a red fox", "AC/DC"):
        assert script(*generate, "--prompt", text)[0] == 0
    fox, band = sorted(data.iterdir(), reverse=True)
    assert fox.name == "red fox" and re.fullmatch("acdc-[0-9a-f]{8}", band.name)
    seeds = [[case.seed for case in read_prompt_csv(folder / "prompts.csv")] for folder in (fox, band)]
    assert seeds[0] != seeds[1] and len(list(fox.glob("*.png"))) == 2
    code, out, err = script(*erase)
    assert code in (0, 3) and "| red fox |" in out and "| AC/DC |" in out, err
    again = script("train-scripts/FMN.py", *flags, *training, "--concepts", "Red  Fox")
    assert again[0] in (0, 3) and "| Red Fox |" in again[1]
    _, _, err = script(*generate, "--prompt", "Picaso")
    assert "'Picaso' is spelt nearly as Picasso is" in err


def test_experiments_take_names_of_their_category_and_send_others_elsewhere(script, tiny_path, tmp_path):
    flags = ["--model", tiny_path, "--save_path", tmp_path / "a", "--device", "cpu"]
    own = "train-scripts/SRS_ME.py --concepts"
    is_error(
        script("eval-scripts/ablate-beta.py", *flags, "--erased_index", "1", "a red fox"), "'a red fox' is not", own
    )
    is_error(script("eval-scripts/capacity.py", *flags, "--erased_index", "VanGoh"), "did you mean VanGogh?", own)
    is_error(script("eval-scripts/compare-methods.py", *flags, "--restored", "Picasso,a dog"), "'a dog' is not", own)
    is_error(script("eval-scripts/ablate-similar.py", *flags, "--erased_index", "CCS 2024"), "is a watermark")
    is_error(script(SOLVE, *flags[:2], "--erased_index", "a red fox"), "A concept of your own goes to --concepts")
    assert not (tmp_path / "a").exists()


def test_images_are_sorted_by_prompt_or_by_number(script, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for case in range(4):
            Image.new("RGB", (4, 4)).save(tmp_path / folder / f"{case}_0.png")
    (tmp_path / "a" / "prompts.csv").write_text(
        "prompt,evaluation_seed,case_number\nPicasso,1,0\nVanGogh,2,1\nPicasso,3,2\n,4,3\n"
    )
    assert script("train-scripts/move_image.py", "--image_dir", tmp_path / "a")[0] == 0
    assert script("train-scripts/move_image.py", "--image_dir", tmp_path / "b", "--cases_per_concept", "3")[0] == 0
    moved = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("**/*.png"))
    assert moved[:4] == ["a/1/1_0.png", "a/2/0_0.png", "a/2/2_0.png", "a/3_0.png"]
    assert moved[4:] == ["b/0/0_0.png", "b/0/1_0.png", "b/0/2_0.png", "b/1/3_0.png"]


@pytest.mark.slow
def test_a_closed_form_needs_no_images_and_says_what_it_does_not_use(script, flags, tmp_path):
    protected = ["--em_indexes", "0-2", "--rank_rtol", "1e-4", "--device", "cpu"]
    assert script(SOLVE, *flags, "--erased_index", "0-2", *protected)[0] == 0
    given = [*flags, "--training_image_dir", tmp_path / "none", "--erased_index", "0-2", "--devices", "cpu"]
    given += ["--mode", "closed_form", "--least_effect", "-9"]
    is_error(script(ERASE, *given, "--init", "zero"), "--mode closed_form", "--init closed_form")
    code, out, err = script(ERASE, *given, "--init", "closed_form", "--lr", "0.1")
    assert code == 0 and "--lr, --training_image_dir: not used" in err and "| Cezanne | 0 |" in out
    assert len(list(tmp_path.rglob("shift-*.safetensors"))) == 3
    is_error(script(ERASE, *given, "--ridge_weight", "0"), "'0' is not above 0")
    is_error(script(ERASE, *given, "--init", "one"), "closed_form, zero")
    is_error(script("train-scripts/FMN.py", *given[:-4], "--max_steps", "0"), "--max_steps", "'0'")


def test_exact_is_a_tolerance_and_captions_can_be_protected_too(script, flags, tmp_path):
    given = [*flags, "--erased_index", "1", "--em_indexes", "2", "--device", "cpu"]
    is_error(script(SOLVE, *given, "--protect", "exact"), "--rank_rtol exact")
    assert script(SOLVE, *given, "--rank_rtol", "exact", "--protected_templates", "2")[0] == 0
    metadata = NullSpaceBasis.load(next(tmp_path.rglob("basis-1.safetensors"))).metadata
    protected = set(metadata["protected"])
    assert metadata["rank_rtol"] == 1e-7 and {"Picasso", "Picasso painting", "a painting by Picasso"} < protected
    assert "painting by Picasso" not in protected and not {text for text in protected if "VanGogh" in text}
