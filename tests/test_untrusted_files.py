"""Files that mean harm, or are broken: one line on stderr, exit code 2, no code run, nothing written outside."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from conftest import compvis_config, is_error
from safetensors.torch import load_file, save_file

from ldm.diffusion.compvis import convert_to_compvis
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.shift import SHIFT_FILE_TYPE
from ldm.io.tensors import METADATA_KEY

SOLVE, MERGE = "train-scripts/SRSME_Solution.py", "train-scripts/Merge_model.py"
GENERATE = "eval-scripts/generate-images-merge.py"


class Harm:
    """Unpickled, it writes the file `target`."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.fixture
def refused(script, tmp_path):
    """Run a script that must refuse, and see that all files are as they were."""

    def run(name, *arguments, words=()):
        before = {path: path.lstat().st_mtime_ns for path in tmp_path.parent.rglob("*")}
        is_error(script(name, *arguments), *words)
        after = {path: path.lstat().st_mtime_ns for path in tmp_path.parent.rglob("*")}
        assert after == before

    return run


@pytest.fixture
def checkpoint(tiny, tiny_path, tmp_path):
    """Tensors in CompVis' layout, and the flags that load a file `hostile` of them."""
    tensors = convert_to_compvis(tiny.denoiser.state_dict(), tiny.vae.state_dict(), tiny.text_encoder.state_dict())
    flags = [
        "--config_path",
        compvis_config(tiny_path, tmp_path),
        "--erased_index",
        "0",
        "--artifacts_dir",
        tmp_path / "shifts",
    ]
    return {name: value.contiguous() for name, value in tensors.items()}, flags


@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_that_would_run_code(refused, checkpoint, tmp_path, zipped):
    tensors, flags = checkpoint
    path = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": tensors | {"x": Harm(tmp_path / "harm")}}, path, _use_new_zipfile_serialization=zipped)
    refused(SOLVE, "--ckpt_path", path, *flags, words=["it asks to run", "open", "safetensors"])


def test_a_plain_pickle_as_a_ckpt_as_a_shift_and_as_arrays(refused, checkpoint, tiny_path, tmp_path):
    path = tmp_path / "hostile.pickle"
    path.write_bytes(pickle.dumps({"AlexNet_0": Harm(tmp_path / "harm")}))
    shutil.copy(path, tmp_path / "hostile.ckpt")
    refused(SOLVE, "--ckpt_path", tmp_path / "hostile.ckpt", *checkpoint[1], words=["was not loaded"])
    refused(
        MERGE,
        "--model",
        tiny_path,
        "--shifts",
        path,
        "--save_path",
        tmp_path / "out",
        words=["hostile.pickle", "not safetensors"],
    )
    refused("train-scripts/convert-lpips.py", path, "--save_path", tmp_path / "out", words=["open", "was not loaded"])


def test_pickled_weights_in_a_models_folder(refused, tiny_path, tmp_path):
    shutil.copytree(tiny_path, tmp_path / "model")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": Harm(tmp_path / "harm")}, tmp_path / "model" / "unet" / "diffusion_pytorch_model.bin")
    refused(SOLVE, "--model", tmp_path / "model", "--erased_index", "0", words=["--model"])


def test_a_models_folder_that_brings_code(refused, tiny_path, tmp_path):
    shutil.copytree(tiny_path, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    kept = json.loads(index.read_text())
    (tmp_path / "model" / "harm.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    (tmp_path / "model" / "unet" / "harm.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    for changes in (
        {"unet": ["harm", "UNet2DConditionModel"]},
        {"_class_name": ["harm", "Pipeline"]},
        {"_class_name": "OnnxStableDiffusionPipeline"},
    ):
        index.write_text(json.dumps(kept | changes))
        refused(SOLVE, "--model", tmp_path / "model", "--erased_index", "0", words=["--model"])


def lie(path):
    """Let a safetensors header claim more than the file holds."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    header[name]["data_offsets"][1] += 2**40
    header[name]["shape"] = [2**38]
    made = json.dumps(header).encode()
    path.write_bytes(len(made).to_bytes(8, "little") + made + content[8 + size :])


def test_a_checkpoint_of_wrong_shapes_with_nan_without_a_part_or_with_a_header_that_lies(refused, checkpoint, tmp_path):
    tensors, flags = checkpoint
    path = tmp_path / "hostile.safetensors"
    key = next(name for name in tensors if name.endswith("attn2.to_k.weight"))
    part = "first_stage_model.decoder.conv_in.weight"
    text = next(name for name in tensors if "token_embedding" in name)
    for changed, words in (
        ({key: torch.ones(3, 5)}, ["shape"]),
        ({key: tensors[key] * float("nan")}, ["NaN", "attn2.to_k"]),
        ({part: None}, []),
        ({key: None}, []),
        ({text: None}, []),
    ):
        save_file({name: value for name, value in (tensors | changed).items() if value is not None}, path)
        refused(SOLVE, "--ckpt_path", path, *flags, words=["hostile.safetensors", *words])
    save_file(tensors, path)
    lie(path)
    refused(SOLVE, "--ckpt_path", path, *flags, words=["hostile.safetensors", "damaged"])
    path.write_bytes(b"\xff" * 8 + b"{}")
    refused(SOLVE, "--ckpt_path", path, *flags, words=["hostile.safetensors", "damaged"])
    save_file({"a": torch.ones(1)}, path)
    refused(SOLVE, "--ckpt_path", path, *flags, words=["no U-Net", "--ckpt_path"])


def test_a_ckpt_whose_zip_leads_out_of_its_folder(refused, checkpoint, tmp_path):
    path = tmp_path / "hostile.ckpt"
    with zipfile.ZipFile(path, "w") as opened:
        for name in ("../../harm", "/harm", "archive/data.pkl"):
            opened.writestr(name, b"harm")
    refused(SOLVE, "--ckpt_path", path, *checkpoint[1], words=["hostile.ckpt", "damaged"])


@pytest.fixture
def shift(tiny, tmp_path):
    """Write a shift file with other tensors, or other metadata."""

    def write(changes=(), **tensors):
        coefficients = {
            f"w.{name}": torch.zeros(layer.out_features, 2) for name, layer in text_layers(tiny.denoiser).items()
        }
        metadata = {
            "concept_index": 1,
            "category": "style",
            "concept": "VanGogh",
            "prompt": "VanGogh",
            "captions": ["VanGogh"],
            "protected": [""],
            "base_model": "tiny",
            "base_digest": tiny.digest,
            "scale": 1.0,
            "method": "SRS-ME",
        }
        path = tmp_path / "shift.safetensors"
        contents = coefficients | {"directions": torch.eye(2, 96, dtype=torch.float64)} | tensors
        # as a file of an older version, which says no digest of its content; save_tensors would not write NaN
        header = json.dumps({"file_type": SHIFT_FILE_TYPE, "metadata": metadata | dict(changes)})
        save_file(contents, path, metadata={METADATA_KEY: header})
        return path

    return write


def test_a_shift_of_wrong_shapes_with_nan_for_another_base_or_with_a_header_that_lies(
    refused, shift, tiny, tiny_path, other_path, tmp_path
):
    (tmp_path / "list.csv").write_text("prompt,evaluation_seed,case_number\nVanGogh,1,0\n")
    flags = ["--prompts_path", tmp_path / "list.csv", "--save_path", tmp_path / "out"]
    first = f"w.{next(iter(text_layers(tiny.denoiser)))}"
    for changed, words in (
        ({"directions": torch.eye(3, 96)}, ["wrong names, shapes or sizes"]),
        ({"directions": torch.eye(2, 95)}, ["does not fit"]),
        ({first: torch.zeros(5, 2)}, ["does not fit"]),
        ({"w.nothing": torch.zeros(5, 2)}, ["nothing", "does not fit"]),
        ({first: torch.full((5, 2), float("nan"))}, ["NaN"]),
        ({first: torch.full((5, 2), float("inf"))}, ["NaN or infinity"]),
    ):
        refused(
            GENERATE, "--model", tiny_path, "--shifts", shift(**changed), *flags, words=["shift.safetensors", *words]
        )
    refused(GENERATE, "--model", other_path, "--shifts", shift(), *flags, words=["another base model", "tiny"])
    path = shift()
    lie(path)
    refused(GENERATE, "--model", tiny_path, "--shifts", path, *flags, words=["damaged"])


def test_a_shift_whose_metadata_names_paths(script, refused, shift, tiny_path, tmp_path):
    flags = ["--model", tiny_path, "--format", "lora,kohya", "--save_path", tmp_path / "deep" / "out"]
    for changes in ({"concept_index": "../../harm"}, {"category": "../../harm"}, {"method": "../../harm"}):
        refused(MERGE, *flags, "--shifts", shift(changes), words=["make it again"])
    for changes in ({"captions": [7]}, {"protected": ["", None]}, {"prompt": None}):
        refused(MERGE, *flags, "--shifts", shift(changes), words=["make it again"])
    tensors = load_file(shift())
    coefficients = {name: torch.ones_like(value) for name, value in tensors.items() if name.startswith("w.")}
    assert script(MERGE, *flags, "--shifts", shift({"concept": "../../../harm"}, **coefficients))[0] == 0
    assert not [path for path in tmp_path.rglob("*harm*") if (tmp_path / "deep" / "out") not in path.parents]
    assert (tmp_path / "deep" / "out" / "tiny-1-lora" / "1-harm.safetensors").is_file()


def test_a_prompt_list_whose_case_number_is_a_path(refused, tiny_path, tmp_path):
    for number in ("../../harm", "/harm", "-1", "1e3x"):
        (tmp_path / "list.csv").write_text(f"prompt,evaluation_seed,case_number\nVanGogh,1,{number}\n")
        refused(
            GENERATE,
            "--model",
            tiny_path,
            "--prompts_path",
            tmp_path / "list.csv",
            "--save_path",
            tmp_path / "out",
            words=["list.csv", "case_number", "whole number"],
        )


@pytest.mark.parametrize(("name", "key"), [("metadata.json", "base_model"), ("recipe.json", "base")])
def test_a_models_metadata_that_names_a_path(refused, script, tiny_path, tmp_path, name, key):
    shutil.copytree(tiny_path, tmp_path / "model")
    (tmp_path / "harm.yaml").write_text("null_space: {null_space_method: guess, rank_rtol: 1}")
    (tmp_path / "model" / name).write_text(json.dumps({key: os.path.relpath(tmp_path / "harm")}))
    flags = ["--model", tmp_path / "model", "--erased_index", "0"]
    assert script(SOLVE, *flags, "--artifacts_dir", tmp_path / "shifts")[0] == 0
    for text in ("no JSON", "[]", f'{{"{key}": 3}}'):
        (tmp_path / "model" / name).write_text(text)
        refused(SOLVE, *flags, words=[name, "merge again"])
