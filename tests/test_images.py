"""Images: as tensors, from files, listed in order, and side by side in a grid."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli.run import explain
from ldm.io.errors import MissingFileError
from ldm.io.image_grid import image_grid
from ldm.io.images import (
    image_to_tensor,
    list_images,
    load_batch,
    open_image,
    parse_case_number,
    tensor_to_images,
)


def test_pixels_survive_the_way_to_a_tensor_and_back():
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    tensor = image_to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(np.asarray(tensor_to_images(tensor[None])[0]), pixels)


def test_images_are_listed_in_natural_order(tmp_path):
    for name in ("10_0.png", "2_1.png", "2_0.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / ".partial-1.png").touch()
    assert [path.name for path in list_images(tmp_path)] == ["2_0.png", "2_1.png", "10_0.png"]
    assert parse_case_number(tmp_path / "10_0.png") == 10
    with pytest.raises(ValueError, match="starts with its case number"):
        parse_case_number(tmp_path / "x_0.png")


def test_a_missing_folder_says_what_makes_it(tmp_path):
    with pytest.raises(MissingFileError, match="no folder") as missing:
        list_images(tmp_path / "none")
    assert missing.value.kind == "generated images" and "generate-images-merge.py" in explain(missing.value)
    with pytest.raises(MissingFileError, match="no images in") as missing:
        list_images(tmp_path, "training images", category="style", concept="VanGogh")
    assert "generate-data.py --category style --prompt VanGogh" in explain(missing.value)


def test_opening_scales_the_short_side_and_cuts_the_middle(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    image.save(tmp_path / "wide.png")
    assert open_image(tmp_path / "wide.png", 20).getcolors() == [(400, (0, 0, 255))]


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        open_image(tmp_path / "broken.png")


def test_images_of_a_batch_have_one_size(tmp_path):
    paths = [tmp_path / f"{side}.png" for side in (4, 8)]
    for side, path in zip((4, 8), paths, strict=True):
        Image.new("RGB", (side, side)).save(path)
    assert load_batch(paths, 4).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"4\.png and .*8\.png differ in size"):
        load_batch(paths)


def test_a_grid_has_room_for_every_row_and_column():
    red = Image.new("RGB", (10, 10), "red")
    grid = image_grid([("first", [[red], [red, red]]), ("second", [[red], [red]])], ["a", "b"], scale=2)
    pixels = torch.from_numpy(np.asarray(grid).copy()).long()
    assert int((pixels == torch.tensor([255, 0, 0])).all(-1).sum()) == 5 * 400
