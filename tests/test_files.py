"""Files are written whole or not at all, and a folder's metadata says what made it."""

import json
import multiprocessing
import os
import socket

import pytest

from ldm.io.files import (
    METADATA_FILE,
    atomic_write,
    atomic_write_dir,
    check_metadata,
    check_writable,
    find_metadata_file,
    read_dir_metadata,
    write_json,
)


def test_a_place_where_nothing_can_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "new" / "folder", tmp_path / "file"):
        check_writable(path, "save_path")
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)  # whoever runs the tests may write anywhere
    with pytest.raises(ValueError, match=f"`save_path` .*new/folder: nothing can be written in {tmp_path}"):
        check_writable(tmp_path / "new" / "folder", "save_path")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_is_written_can_be_read_by_all_who_may_read_new_files(tmp_path):
    (tmp_path / "new").touch()
    with atomic_write(tmp_path / "file"), atomic_write_dir(tmp_path / "folder") as partial:
        (partial / "inner").touch(mode=0o600)
    mode = (tmp_path / "new").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "folder" / "inner").stat().st_mode == mode


def test_a_failed_folder_leaves_the_old_one_and_a_good_one_replaces_it(tmp_path):
    path = tmp_path / "kept"
    with atomic_write_dir(path) as partial:
        (partial / "old").touch()
    with pytest.raises(RuntimeError), atomic_write_dir(path) as partial:
        (partial / "half").touch()
        raise RuntimeError
    assert [name.name for name in path.iterdir()] == ["old"]
    with atomic_write_dir(path) as partial:
        (partial / "new").touch()
    assert [name.name for name in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_half_written_goes_when_the_next_one_writes_there(tmp_path):
    dead = multiprocessing.get_context("spawn").Process()
    dead.start()
    dead.join()
    host = socket.gethostname()
    left, folder = (tmp_path / f".partial-{host}@{dead.pid}-{name}" for name in ("x.png", "folder"))
    alive = tmp_path / f".partial-{host}@{os.getpid()}-x.png"
    other_hosts = tmp_path / f".partial-{host}-17@{dead.pid}-x.png"
    folder.mkdir()
    for path in (left, alive, other_hosts, folder / "part"):
        path.touch()
    with atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, other_hosts.name, "a.txt"])


def test_a_folders_metadata_is_read_under_its_older_name_and_keys_too(tmp_path):
    assert find_metadata_file(tmp_path) is None and read_dir_metadata(tmp_path) == {}
    (tmp_path / "recipe.json").write_text(json.dumps({"made_by": "x.py", "merged": {"1": {"erase_cat": "style"}}}))
    assert find_metadata_file(tmp_path) == tmp_path / "recipe.json"
    assert read_dir_metadata(tmp_path) == {"created_by": "x.py", "merged": {"1": {"category": "style"}}}
    write_json(tmp_path / METADATA_FILE, {"created_by": "srs-me"})
    assert read_dir_metadata(tmp_path) == {"created_by": "srs-me"}
    (tmp_path / METADATA_FILE).write_text("[1]")
    with pytest.raises(ValueError, match="not a mapping"):
        read_dir_metadata(tmp_path)


def test_a_folder_is_refused_for_other_metadata_but_not_for_another_programs_name(tmp_path):
    check_metadata(tmp_path, {"a": 1})  # nothing there yet
    older = {"made_by": "x.py", "ddim_steps": 2, "of": [{"made_by": "y.py"}]}
    (tmp_path / "recipe.json").write_text(json.dumps(older))
    check_metadata(tmp_path, {"created_by": "srs-me", "num_inference_steps": 2, "of": ({"created_by": "srs-me"},)})
    with pytest.raises(
        ValueError, match=r"what another run made, with other .* \(see recipe.json there\): choose another `save_path`"
    ):
        check_metadata(tmp_path, {"created_by": "srs-me", "num_inference_steps": 3, "of": [{}]})
