"""Where artifacts are kept, which shift a time of a scene finds, and what a merge is called."""

import pytest
import torch

from ldm.cli.run import explain
from ldm.erasure.merge import load_shifts
from ldm.erasure.shift import SeparableShift
from ldm.io.errors import MissingFileError
from ldm.io.paths import ArtifactPaths, merge_name


def save_shift(path, concept_index, **metadata):
    shift = SeparableShift({"a": torch.zeros(2, 1)}, torch.ones(1, 3), 1.0)
    shift.save(path, {"concept_index": concept_index, **metadata})


def test_a_shift_once_made_serves_later_times_but_not_earlier_ones(tmp_path):
    early, late = (ArtifactPaths(tmp_path, "SRS-ME", "m", "style", 3, time) for time in (0, 2))
    save_shift(early.shift(0), 0)
    save_shift(late.shift(2), 2)
    assert late.find_shift(0) == early.shift(0)
    with pytest.raises(MissingFileError, match="2 Picasso") as missing:
        early.find_shift(2, "Picasso")
    assert missing.value.kind == "shift"
    expected = {"method": "SRS-ME", "category": "style", "erased_index": 2, "scene": 3, "scene_time": 0}
    assert missing.value.details == expected
    assert "SRS_ME.py --category style --erased_index 2 --scene 3 --scene_time 0" in explain(missing.value)


def test_a_missing_basis_says_what_would_make_it(tmp_path):
    artifacts = ArtifactPaths(tmp_path, "SRS-ME-dagger", "m", "object", 1, 2)
    with pytest.raises(MissingFileError, match="no null space basis") as missing:
        artifacts.find_basis(5)
    assert missing.value.kind == "basis" and missing.value.details["erased_index"] == 5
    artifacts.basis(5).parent.mkdir(parents=True)
    artifacts.basis(5).touch()
    assert artifacts.find_basis(5) == tmp_path / "srs-me" / "m" / "object" / "scene1" / "time2" / "basis-5.safetensors"


def test_a_merge_is_named_by_its_indexes_and_takes_files_too(tmp_path):
    artifacts = ArtifactPaths(tmp_path, "SRS-ME", "m", "style", 1, 0)
    save_shift(artifacts.shift(0), 0)
    save_shift(artifacts.shift(2), 2)
    shifts, name = load_shifts(artifacts, f"0, {artifacts.shift(2)}")
    assert list(shifts) == ["0", "2"] and name == "02"
    assert load_shifts(artifacts, "") == ({}, "ori")
    save_shift(artifacts.shift(10), 10)
    assert load_shifts(artifacts, "2,10")[1] == "2-10"
    for index in range(3, 9):
        save_shift(artifacts.shift(index), index)
    shifts, name = load_shifts(artifacts, "0,2-8,10")
    assert list(shifts) == ["0", "2", "3", "4", "5", "6", "7", "8", "10"] and name == "0-2..8-10"
    assert load_shifts(artifacts, "10,3-5")[1] == "10-3-4-5"  # a row of three is no shorter
    objects = ArtifactPaths(tmp_path, "SRS-ME", "m", "object", 1, 0).shift(0)
    save_shift(objects, 0, category="object")
    assert list(load_shifts(artifacts, f"0,{objects}")[0]) == ["0", "object0"]
    dense = ArtifactPaths(tmp_path, "FMN", "m", "style", 1, 0)
    save_shift(dense.shift(1), 1, method="FMN")
    assert load_shifts(dense, "1")[1] == "FMN-1"
    assert load_shifts(dense, f"1,{artifacts.shift(0)}")[1] == "FMN-SRS-ME-10"
    save_shift(artifacts.shift(1), 1)
    shifts, name = load_shifts(artifacts, f"1,{dense.shift(1)}")  # two changes of one concept, which act together
    assert list(shifts) == ["1", "1-FMN"] and name == "SRS-ME-FMN-1-1-FMN"
    with pytest.raises(ValueError, match="twice"):
        load_shifts(artifacts, f"1,{dense.shift(1)},{dense.shift(1)}")
    assert dense.basis(1) == artifacts.basis(1)  # the null space is one method's
    with pytest.raises(ValueError, match="twice"):
        load_shifts(artifacts, f"0,{artifacts.shift(0)}")


def test_a_shift_of_an_older_version_is_found_by_its_older_keys(tmp_path):
    path = tmp_path / "old.safetensors"
    shift = SeparableShift({"a": torch.zeros(2, 1)}, torch.ones(1, 3), 1.0)
    shift.save(path, {"erased_index": 4, "erase_cat": "object"})
    shifts, name = load_shifts(ArtifactPaths(tmp_path, "SRS-ME", "m", "style", 1, 0), str(path))
    assert list(shifts) == ["object4"] and name == "object4"


def test_a_shift_that_does_not_say_what_it_erases_is_refused(tmp_path):
    artifacts = ArtifactPaths(tmp_path, "SRS-ME", "m", "style", 1, 0)
    incomplete = {"concept_index": "0"}, {"concept_index": 0, "category": "x"}, {"concept_index": 0, "method": "x"}
    for metadata in incomplete:
        save_shift(artifacts.shift(0), **metadata)
        with pytest.raises(ValueError, match=r"does not say which concept it erases|says .0. for concept_index"):
            load_shifts(artifacts, "0")


def test_labels_are_joined_to_one_name():
    assert merge_name(["0", "1", "2"]) == "012" and merge_name([]) == ""
    assert merge_name(["0", "10"]) == "0-10" and merge_name(["10", "11", "12", "13"]) == "10..13"
