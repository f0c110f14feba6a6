"""Tensor files: what comes back, what is refused, and digests."""

import pickle

import numpy as np
import pytest
import torch
from conftest import NamedModel, save_unchecked
from safetensors.torch import save_file

from ldm.io.files import file_digest
from ldm.io.pickles import load_numpy_pickle
from ldm.io.tensors import METADATA_KEY, check_base_model, load_tensors, read_metadata, save_tensors, tensor_digest


def test_tensors_and_metadata_come_back(tmp_path):
    value = torch.randn(3, 4, dtype=torch.float64)
    save_tensors(tmp_path / "a.safetensors", {"x": value}, "thing", {"why": [1, "é"]})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors", "thing")
    assert torch.equal(tensors["x"], value) and metadata == {"why": [1, "é"]}


def test_a_header_of_an_older_version_is_read_by_todays_keys(tmp_path):
    header = '{"kind": "thing", "recipe": {"made_by": "SRS_ME.py", "base": "mini-sd", "arguments": {"keep": 1}}}'
    save_file({"x": torch.ones(1)}, tmp_path / "old.safetensors", metadata={METADATA_KEY: header})
    expected = {"created_by": "SRS_ME.py", "base_model": "mini-sd", "config": {"preserve_scale": 1}}
    assert load_tensors(tmp_path / "old.safetensors", "thing")[1] == expected
    assert read_metadata(tmp_path / "old.safetensors", "thing") == expected


def test_the_same_content_is_the_same_bytes(tmp_path):
    for n in range(12):  # safetensors writes several header entries in random order
        save_tensors(tmp_path / str(n), {"x": torch.ones(2)}, "thing", {"b": 1, "a": 2})
    assert len({(tmp_path / str(n)).read_bytes() for n in range(12)}) == 1


def test_unexpected_damaged_and_nan_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"no thing .*: do this"):
        load_tensors(path, "thing", "do this")
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is not a thing but a file of another program"):
        load_tensors(path, "thing")
    save_unchecked(path, {"x": torch.tensor([float("nan")])}, "thing", {})
    with pytest.raises(ValueError, match="x holds NaN"):
        load_tensors(path, "thing")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="damaged"):
        load_tensors(path, "thing")
    assert read_metadata(path, "thing") == {}


def test_a_file_of_another_base_model_is_refused():
    check_base_model({"base_digest": "a" * 64}, NamedModel("a" * 64), "x")
    with pytest.raises(ValueError, match="x was made for another base model"):
        check_base_model({"base_digest": "a" * 64, "base_model": "mini-sd"}, NamedModel("b" * 64), "x")
    with pytest.raises(ValueError, match="another base model"):
        check_base_model({}, NamedModel("b" * 64, "c" * 64), "x")
    for model in (NamedModel("b" * 64), NamedModel()):  # whose text encoder is the one that the file names
        check_base_model({"base_digest": "a" * 64, "text_digest": "text"}, model, "x")
    with pytest.raises(ValueError, match=r"another text encoder \(that of mini-sd, digest text, not other\)"):
        check_base_model(
            {"text_digest": "text", "base_model": "mini-sd"}, NamedModel("a" * 64, text_digest="other"), "x"
        )
    with pytest.raises(ValueError, match="not a text encoder alone"):
        check_base_model({"base_digest": "a" * 64}, NamedModel(), "x")


def test_a_model_and_its_half_precision_copy_are_one_base():
    weights = {"a": torch.randn(5, 5)}
    assert tensor_digest(weights) == tensor_digest({"a": weights["a"].half()})
    assert tensor_digest(weights) != tensor_digest({"a": weights["a"] + 0.01})
    assert tensor_digest(weights) != tensor_digest({"b": weights["a"]})


def test_a_folders_digest_sees_names_and_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    first = file_digest(tmp_path)
    (tmp_path / "a").write_bytes(b"2")
    second = file_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, file_digest(tmp_path)}) == 3


class _Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


def test_a_pickle_is_read_without_running_what_it_asks_for(tmp_path):
    good, bad, target = tmp_path / "good", tmp_path / "bad", tmp_path / "written"
    good.write_bytes(pickle.dumps({"a": {"b": np.arange(6.0).reshape(2, 3)}}))
    assert np.array_equal(load_numpy_pickle(good)["a"]["b"], np.arange(6.0).reshape(2, 3))
    bad.write_bytes(pickle.dumps({"a": _Hostile(str(target))}))
    with pytest.raises(ValueError, match="open"):
        load_numpy_pickle(bad)
    assert not target.exists()


def test_tensors_are_read_when_they_are_asked_for(tmp_path):
    contents = {"w.a": torch.ones(2), "w.b": torch.zeros(3), "c": torch.ones(1)}
    save_tensors(tmp_path / "x.safetensors", contents, "thing", {})
    tensors, _ = load_tensors(tmp_path / "x.safetensors", "thing")
    weights = tensors.with_prefix("w.")
    assert list(weights) == ["a", "b"] and torch.equal(weights["b"], torch.zeros(3))
    assert weights["a"] is not weights["a"]
