"""A file for several text encoders: a model takes of it what was made on its own ones."""

import shutil

import pytest
import torch
from conftest import CPU, is_error
from diffusers import PixArtTransformer2DModel
from families import make_family
from test_families import TINY

from ldm.config.concepts import get_concept
from ldm.config.methods import ExportConfig, GateConfig
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.erasure.erase import erase
from ldm.erasure.export import export
from ldm.erasure.export_shift import join_shifts
from ldm.erasure.merge import edited, merge
from ldm.erasure.portable import take_shifts
from ldm.erasure.protection import Protection
from ldm.erasure.shift import WeightShift
from ldm.io.errors import Notice
from ldm.io.paths import ArtifactPaths
from ldm.io.tensors import load_tensors, save_tensors

SCRIPT = "train-scripts/join-shifts.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return Stable Diffusion 3 with its three text encoders, with two of them, and a PixArt with the third."""
    root = tmp_path_factory.mktemp("families")
    found = {name: make_family(name, root / name) for name in ("sd3", "sd3-without-t5", "pixart-alpha")}
    sd3, pixart = found["sd3"], found["pixart-alpha"]
    for own, other in (("text_encoder", "text_encoder_3"), ("tokenizer", "tokenizer_3")):
        shutil.rmtree(pixart / own)
        shutil.copytree(sd3 / other, pixart / own)
    path = pixart / "transformer"
    config = {**PixArtTransformer2DModel.load_config(path), "caption_channels": 200}  # as wide as the encoder
    PixArtTransformer2DModel.from_config(config).save_pretrained(path)
    return found


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    """Return the file of VanGogh's shift that was made on each model, gate and change of weights."""
    found = {}
    for name, folder in folders.items():
        model = load_model(folder, CPU)
        artifacts = ArtifactPaths(tmp_path_factory.mktemp("shifts"), "SRS-ME", model.name, "style", scene=1, time=0)
        concept = get_concept("style", 1)
        null_space = load_model_config(model).null_space.with_changes(protected_templates=0)
        protection, gate = Protection([get_concept("style", 0)], null_space), GateConfig(retain_captions=60)
        erase(model, artifacts, [concept], TINY, protection, tmp_path_factory.mktemp("images"), gate)
        found[name] = artifacts.shift(concept.label)
    return found


def changes(model, path, form):
    """Return the places that a file is said to leave, and those where VanGogh's rows change as a model takes it."""
    with pytest.warns(Notice):
        taken = take_shifts(model, {"1": WeightShift.load(path)})
    before = model.encode_prompt(["VanGogh", "Cezanne"])
    if form == "linear":
        after = before + before.double() @ taken["1"].embedding_change().T
    else:
        with edited(model, taken, "gated"):
            after = model.encode_prompt(["VanGogh", "Cezanne"])
        assert torch.equal(after[1], before[1])
    found = {name for name in model.places if "." in name and (after - before)[0, *model.places[name]].norm() > 1e-3}
    return set(taken["1"].metadata.get("unchanged", [])), found


CLIPS = {f"{stream}.{name}" for stream in ("tokens", "pooled") for name in ("text_encoder", "text_encoder_2")}


def test_a_file_made_on_three_text_encoders_acts_on_two_of_them(folders, made):
    model = load_model(folders["sd3-without-t5"], CPU)
    assert changes(model, made["sd3"], "gated") == (set(), CLIPS)


def test_a_file_made_on_two_text_encoders_leaves_the_third_and_says_so(folders, made):
    model = load_model(folders["sd3"], CPU)
    assert changes(model, made["sd3-without-t5"], "gated") == ({"tokens.text_encoder_3"}, CLIPS)


def test_the_third_alone_takes_its_part_and_no_change_of_rows_that_are_stacked(folders, made):
    model = load_model(folders["pixart-alpha"], CPU)
    assert changes(model, made["sd3"], "gated") == (set(), {"tokens.text_encoder"})
    assert not WeightShift.load(made["sd3"]).gated.maps.keys() & {"tokens", "pooled"}


def test_joined_files_act_on_all_text_encoders(folders, made, script, tmp_path):
    target = tmp_path / "joined.safetensors"
    files = [made["sd3-without-t5"], made["pixart-alpha"]]
    code, out, _ = script(SCRIPT, *files, "--save_path", target)
    is_error(script(SCRIPT, *files, "--save_path", target), "is there already", "--save_path")
    assert code == 0 and "| sd3-without-t5 | tokens, pooled |" in out and "| pixart-alpha | tokens |" in out
    shift = WeightShift.load(target)
    assert [part.metadata["base_model"] for part in (shift, *shift.parts)] == ["sd3-without-t5", "pixart-alpha"]
    whole, third = (load_model(folders[name], CPU) for name in ("sd3", "pixart-alpha"))
    assert changes(whole, target, "gated") == (set(), {*CLIPS, "tokens.text_encoder_3"})
    for form in ("gated", "linear"):
        own = take_shifts(third, {"1": WeightShift.load(made["pixart-alpha"])})["1"]
        taken = take_shifts(third, {"1": WeightShift.load(target)})["1"]
        assert torch.equal(taken.embedding_change(), own.embedding_change()) and taken.metadata == own.metadata
        assert taken.gated.tensors().keys() == own.gated.tensors().keys() and not taken.parts, form


def test_what_cannot_be_one_file_is_refused(made, script, tmp_path):
    before, target = made["sd3"].read_bytes(), ["--save_path", tmp_path / "joined.safetensors"]
    is_error(script(SCRIPT, made["sd3"], made["sd3"], *target), "were made on the same text encoder: give one of them")
    tensors, metadata = load_tensors(made["pixart-alpha"], "weight shift")
    other = tmp_path / "other.safetensors"
    renamed = metadata | {"concept": "Picasso", "prompt": "Picasso", "aliases": []}
    save_tensors(other, dict(tensors), "weight shift", renamed)
    is_error(script(SCRIPT, made["sd3"], other, *target), "erases Picasso", "VanGogh", "give one's files")
    is_error(script(SCRIPT, made["sd3"], tmp_path / "none.safetensors", *target), "none.safetensors")
    assert not target[1].exists()
    assert made["sd3"].read_bytes() == before


@pytest.mark.parametrize("change", ["tensor", "header", "streams"])
def test_a_file_whose_parts_are_not_those_of_its_header_is_refused(made, change, tmp_path):
    target = tmp_path / "joined.safetensors"
    join_shifts([made["sd3-without-t5"], made["pixart-alpha"]], target)
    tensors, metadata = load_tensors(target, "weight shift")
    tensors = dict(tensors)
    if change == "tensor":
        tensors["part3.outputs"] = torch.zeros(2, 2)
    elif change == "header":
        metadata["parts"] = []
    else:
        metadata["parts"][0]["streams"] = {"tokens": "wide"}
    save_tensors(target, tensors, "weight shift", metadata)
    with pytest.raises(ValueError, match="make it again"):
        WeightShift.load(target)


def test_each_part_of_a_file_is_merged_as_its_own(folders, made, tmp_path):
    """The sum of what shifts change is remembered by their files, of which a part is not all."""
    target = tmp_path / "joined.safetensors"
    join_shifts([made["pixart-alpha"], made["sd3-without-t5"]], target)
    changes = []
    for name in ("pixart-alpha", "sd3-without-t5"):
        model = load_model(folders[name], CPU)
        taken = take_shifts(model, {"1": WeightShift.load(target)})
        own = take_shifts(model, {"1": WeightShift.load(made[name])})
        merged, expected = (merge(model.denoiser, list(each.values())) for each in (taken, own))
        assert all(torch.equal(merged[weight], expected[weight]) for weight in expected)
        changes.append(merged)
    assert changes[0].keys() != changes[1].keys()


def test_what_a_shift_leaves_is_said_in_its_small_file_and_no_longer_where_it_fits(folders, made, tmp_path):
    sd3, clips = (load_model(folders[name], CPU) for name in ("sd3", "sd3-without-t5"))
    taken = take_shifts(sd3, {"1": WeightShift.load(made["sd3-without-t5"])})
    [folder] = export(sd3, taken, tmp_path / "out", ExportConfig(("shift",)), ["VanGogh"]).targets
    path = next(folder.glob("*.safetensors"))
    path.with_suffix(".json").unlink()
    assert take_shifts(sd3, {"1": WeightShift.load(path)})["1"].metadata["unchanged"] == ["tokens.text_encoder_3"]
    assert "unchanged" not in take_shifts(clips, {"1": WeightShift.load(path)})["1"].metadata


@pytest.mark.parametrize(
    "change",
    [
        {"streams": {"tokens": 96, "pooled": 10**13}},
        {"streams": {"tokens": 200}},
        {"streams": {"tokens": 100, "pooled": 164}},
    ],
)
def test_a_header_that_does_not_fit_its_tensors_ends_in_one_line(folders, made, change, tmp_path):
    model, path = load_model(folders["sd3-without-t5"], CPU), tmp_path / "crafted.safetensors"
    tensors, metadata = load_tensors(made["sd3"], "weight shift")
    save_tensors(path, dict(tensors), "weight shift", metadata | change)
    with pytest.raises(ValueError, match="make it again"):
        take_shifts(model, {"1": WeightShift.load(path)})
