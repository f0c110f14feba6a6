import multiprocessing
import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.io.files import atomic_write, atomic_write_dir
from ldm.io.image_grid import image_grid
from ldm.io.images import image_to_tensor, list_images, open_image, parse_case_number, tensor_to_images
from ldm.io.prompts import PromptCase, read_prompt_csv, write_prompt_csv


def test_pixels_survive_the_way_to_a_tensor_and_back():
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    tensor = image_to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(np.asarray(tensor_to_images(tensor[None])[0]), pixels)


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
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "folder" / "inner").stat().st_mode == (tmp_path / "new").stat().st_mode


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


def test_images_are_listed_in_natural_order(tmp_path):
    for name in ("10_0.png", "2_1.png", "2_0.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / ".partial-1.png").touch()
    assert [path.name for path in list_images(tmp_path)] == ["2_0.png", "2_1.png", "10_0.png"]
    assert parse_case_number(tmp_path / "10_0.png") == 10
    with pytest.raises(ValueError, match="no folder .*make it so"):
        list_images(tmp_path / "none", "make it so")


def test_opening_scales_the_short_side_and_cuts_the_middle(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    image.save(tmp_path / "wide.png")
    assert open_image(tmp_path / "wide.png", 20).getcolors() == [(400, (0, 0, 255))]


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="broken.png"):
        open_image(tmp_path / "broken.png")


def test_prompt_lists_keep_the_blank_prompt(tmp_path):
    cases = [PromptCase("", 3, 0), PromptCase("Kilian Eng, again", 5, 7)]
    write_prompt_csv(tmp_path / "list.csv", cases)
    assert read_prompt_csv(tmp_path / "list.csv") == cases


@pytest.mark.parametrize("text, words", [
    ("prompt,evaluation_seed\na,1\n", "lacks the column case_number"),
    ("prompt,evaluation_seed,case_number\na,1,../x\n", "line 2: case_number is '../x'"),
    ("prompt,evaluation_seed,case_number\na,1.5,0\n", "evaluation_seed is '1.5'"),
    ("prompt,evaluation_seed,case_number\na,1,0\nb,1,0\n", "case_number 0 stands twice"),
    ("", "not a CSV"),
])
def test_bad_prompt_lists_say_what_is_wrong(tmp_path, text, words):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        read_prompt_csv(tmp_path / "list.csv")


def test_a_sheet_has_room_for_every_row_and_column():
    red = Image.new("RGB", (10, 10), "red")
    picture = image_grid([("first", [[red], [red, red]]), ("second", [[red], [red]])], ["a", "b"], zoom=2)
    pixels = torch.from_numpy(np.asarray(picture).copy()).long()
    assert int((pixels == torch.tensor([255, 0, 0])).all(-1).sum()) == 5 * 400


def test_what_a_killed_process_left_half_written_goes_when_the_next_one_writes_there(tmp_path):
    dead = multiprocessing.get_context("spawn").Process()
    dead.start()
    dead.join()
    host = socket.gethostname()
    left, folder = (tmp_path / f".partial-{host}-{dead.pid}-{name}" for name in ("x.png", "folder"))
    alive, foreign = tmp_path / f".partial-{host}-{os.getpid()}-x.png", tmp_path / f".partial-other-{dead.pid}-x.png"
    folder.mkdir()
    for path in (left, alive, foreign, folder / "part"):
        path.touch()
    with atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, foreign.name, "a.txt"])
