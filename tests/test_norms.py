"""A norm before the text layers: what a shift changes behind it belongs to that norm, and its gate does not."""

import shutil

import pytest
import torch
from conftest import CPU
from families import make_family
from safetensors.torch import load_file, save_file

from ldm import erase
from ldm.diffusion.load import load_model
from ldm.erasure.embedding_map import EmbeddingMap
from ldm.erasure.gate import Gate
from ldm.erasure.gated_edit import GatedEdit
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.portable import take_shifts
from ldm.erasure.shift import WeightShift
from ldm.erasure.transfer import fitted_to, needs_fitting

NORM = "time_caption_embed.caption_embedder.0.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a tiny Lumina 2, one with another norm, and one with the same norm and another projection behind it."""
    root = tmp_path_factory.mktemp("models")
    own = make_family("lumina2", root / "own")
    for name, weight in (("other", NORM), ("same", NORM.replace("0.weight", "1.weight"))):
        path = shutil.copytree(own, root / name) / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors[weight] = tensors[weight] * (1 + torch.rand_like(tensors[weight]))
        save_file(tensors, path, metadata={"format": "pt"})
    return root


def make(folders, tmp_path):
    model = load_model(folders / "own", CPU)
    [shift] = erase(model, "VanGogh", artifacts_dir=tmp_path, ridge_weight=1e-6, gate=False).values()
    return model, WeightShift.load(shift.path)


def test_a_linear_shift_is_for_its_norm_alone(folders, tmp_path):
    model, shift = make(folders, tmp_path)
    assert shift.metadata["hidden_states"] == model.kind and model.kind.startswith(
        "last hidden states but one after norm "
    )
    other, same = (load_model(folders / name, CPU) for name in ("other", "same"))
    assert other.text_digest == model.text_digest and other.kind != model.kind and same.kind == model.kind
    assert load_model(folders / "own", CPU, dtype=torch.bfloat16).kind == model.kind
    assert take_shifts(model, {"": shift})[""].rank == shift.rank
    with pytest.warns(match="what the shifts do is measured on this model"):
        assert take_shifts(same, {"": shift})[""].rank == shift.rank
    with pytest.raises(ValueError, match=r"changes the last hidden states but one after norm .* takes other states"):
        take_shifts(other, {"": shift})
    with pytest.raises(ValueError, match=r"was made for the last hidden states but one after norm .*: make it again"):
        shift.check(other)


def test_its_null_space_is_too(folders, tmp_path):
    model, _ = make(folders, tmp_path)
    [path] = tmp_path.rglob("basis-*.safetensors")
    basis = NullSpaceBasis.load(path)
    basis.check(model, path)
    with pytest.raises(ValueError, match="make it again"):
        basis.check(load_model(folders / "other", CPU), path)


def test_a_gate_acts_before_any_norm(folders, tmp_path):
    _, shift = make(folders, tmp_path)
    width = len(shift.outputs)
    found = EmbeddingMap(torch.ones(width, 1).double(), torch.ones(1, width).double(), torch.eye(1).double(), 1.0)
    gate = Gate(torch.ones(1, width), torch.ones(1), 0.5)
    shift.gated = GatedEdit({"text_encoder": gate}, {"text_encoder": 0}, {"tokens": found})
    fitted, left = fitted_to(load_model(folders / "other", CPU), shift)
    assert shift.rank and fitted.is_gate_alone and fitted.gated.maps["tokens"] is found and not left


@pytest.mark.parametrize("name", ["flux2-klein", "sd3", "flux", "lumina2"])
def test_a_model_takes_its_own_shifts_as_they_are(name, tmp_path, recwarn):
    model = load_model(make_family(name, tmp_path / name), CPU)
    [shift] = erase(model, "VanGogh", artifacts_dir=tmp_path / "made", ridge_weight=1e-6, gate=False).values()
    read = WeightShift.load(shift.path)
    assert not needs_fitting(model, read)
    recwarn.clear()
    assert take_shifts(model, {"": read})[""].rank == read.rank and not recwarn.list
