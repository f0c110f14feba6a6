import pytest
import torch

from ldm.erasure.shift import SeparableShift
from ldm.io.paths import ArtifactPaths


def put(path, index, **recipe):
    SeparableShift({"a": torch.zeros(2, 1)}, torch.ones(1, 3), 1.0).save(path, {"erased_index": index} | recipe)


def test_a_shift_once_made_serves_later_times_but_not_earlier_ones(tmp_path):
    early, late = (ArtifactPaths(tmp_path, "SRS-ME", "m", "style", 3, time) for time in (0, 2))
    put(early.shift(0), 0)
    put(late.shift(2), 2)
    assert late.find_shift(0) == early.shift(0)
    with pytest.raises(ValueError, match="2 Picasso.*SRS_ME.py --erase_cat style --erased_index 2 --scenei 3 --timei 0"):
        early.find_shift(2)


def test_a_merge_is_named_by_its_indexes_and_takes_files_too(tmp_path):
    store = ArtifactPaths(tmp_path, "SRS-ME", "m", "style", 1, 0)
    put(store.shift(0), 0)
    put(store.shift(2), 2)
    shifts, name = store.load_merge(f"0, {store.shift(2)}")
    assert list(shifts) == ["0", "2"] and name == "02"
    assert store.load_merge("") == ({}, "ori")
    put(store.shift(10), 10)
    assert store.load_merge("2,10")[1] == "2-10"
    for index in range(3, 9):
        put(store.shift(index), index)
    shifts, name = store.load_merge("0,2-8,10")
    assert list(shifts) == ["0", "2", "3", "4", "5", "6", "7", "8", "10"] and name == "0-2..8-10"
    assert store.load_merge("10,3-5")[1] == "10-3-4-5"  # a row of three is no shorter
    objects = ArtifactPaths(tmp_path, "SRS-ME", "m", "object", 1, 0).shift(0)
    put(objects, 0, erase_cat="object")
    assert list(store.load_merge(f"0,{objects}")[0]) == ["0", "object0"]
    dense = ArtifactPaths(tmp_path, "FMN", "m", "style", 1, 0)
    put(dense.shift(1), 1, method="FMN")
    assert dense.load_merge("1")[1] == "FMN-1" and dense.load_merge(f"1,{store.shift(0)}")[1] == "FMN-SRS-ME-10"
    assert dense.basis(1) == store.basis(1)  # the null space is one method's
    with pytest.raises(ValueError, match="twice"):
        store.load_merge(f"0,{store.shift(0)}")
