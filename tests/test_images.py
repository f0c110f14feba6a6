"""Images: as tensors, from files, listed in order, and side by side in a grid."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli.run import explain
from ldm.io.errors import MissingFileError
from ldm.io.image_grid import image_grid
from ldm.io.images import (
    MAX_BATCH_PIXELS,
    MAX_PIXELS,
    check_same_size,
    image_to_tensor,
    is_intact,
    list_images,
    load_batch,
    load_batches,
    open_image,
    parse_case_number,
    read_origin,
    save_image,
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


def write_png(path, size, pixels: bytes, color_type: int, palette: bytes = b"") -> None:
    """Write a PNG of 8 bits whose rows, and palette, are what is given."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, color_type, 0, 0, 0))
    content += chunk(b"PLTE", palette) if palette else b""
    path.write_bytes(content + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def test_a_png_that_ends_early_is_refused_and_is_not_whole(tmp_path):
    rows, path = b"".join(b"\0" + bytes(range(8)) for _ in range(8)), tmp_path / "0_0.png"
    write_png(path, (8, 8), rows, 0)
    assert is_intact(path) and open_image(path).size == (8, 8)
    write_png(path, (8, 8), rows[:40], 0)
    assert not is_intact(path)
    with pytest.raises(ValueError, match=r"cannot read the image .*0_0\.png"):
        open_image(path)
    write_png(path, (8, 8), rows, 3, bytes(range(3 * 8)))
    assert is_intact(path)
    write_png(path, (8, 8), rows, 3, bytes(range(3 * 7)))  # one color less than the pixels name
    assert not is_intact(path)


def test_a_whole_png_of_every_kind_is_whole(tmp_path):
    rng = np.random.default_rng(0)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        for size in ((1, 1), (3, 5), (17, 9)):
            image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
            converted = image.convert("L").convert("I").point(lambda value: value * 256).convert("I;16")
            (converted if mode == "I;16" else image.convert(mode)).save(tmp_path / "a.png")
            assert is_intact(tmp_path / "a.png"), (mode, size)


def test_an_image_says_where_it_comes_from(tmp_path):
    origin = {"prompt": "a \u2028 cat", "seed": 2**63, "n": 1}
    save_image(tmp_path / "a.png", Image.new("RGB", (4, 4), "red"), origin)
    assert read_origin(tmp_path / "a.png") == origin and open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
    save_image(tmp_path / "b.png", Image.new("RGB", (4, 4)))
    assert read_origin(tmp_path / "b.png") is None


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


def ramp(mode="RGB"):
    """Return an image of 64 x 48 pixels, no two rows or columns of which are the same."""
    pixels = np.stack(np.broadcast_arrays(np.arange(64)[None] * 4, np.arange(48)[:, None] * 5, np.array(7)), 2)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def opened(folder, image, name="x.png", **options):
    """Return an image that was saved and opened again."""
    image.save(folder / name, **options)
    return np.asarray(open_image(folder / name))


def test_grey_of_16_bits_is_that_of_8(tmp_path):
    grey = np.asarray(ramp("L"))
    expected = opened(tmp_path, ramp("L"))
    for scale in (256, 257):
        assert np.array_equal(opened(tmp_path, Image.fromarray(grey.astype(np.uint16) * scale)), expected)
    deep = Image.fromarray(np.array([[0, 255, 256, 40000, 65535]], dtype=np.uint16))
    assert opened(tmp_path, deep)[0, :, 0].tolist() == [0, 0, 1, 156, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.png", "x.webp"])
def test_an_image_is_turned_as_it_says(tmp_path, orientation, name):
    turns = [
        None,
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    ]
    turn = turns[orientation - 1]
    stored = ramp().transpose(Image.Transpose[turn]) if turn else ramp()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name.endswith("webp") else {}
    assert np.array_equal(opened(tmp_path, stored, name, exif=exif, **options), np.asarray(ramp()))
    assert open_image(tmp_path / name).size == (64, 48)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_over_white(tmp_path, mode):
    image = ramp(mode)
    image.putalpha(Image.fromarray(np.repeat(np.array([[0] * 32 + [255] * 32], np.uint8), 48, 0)))
    pixels = opened(tmp_path, image)
    assert (pixels[:, :32] == 255).all() and np.array_equal(
        pixels[:, 32:], np.asarray(ramp(mode).convert("RGB"))[:, 32:]
    )
    image.putalpha(128)
    half = np.asarray(ramp(mode).convert("RGB")).astype(float) * 128 / 255 + 127
    assert np.abs(opened(tmp_path, image) - half).max() <= 1


def test_a_transparent_color_is_over_white_too(tmp_path):
    for mode, clear in (("P", 3), ("P", bytes([255, 0, 255, 0])), ("L", 3), ("RGB", (3, 3, 3))):
        image = Image.new(mode if mode != "P" else "L", (4, 1))
        image.putdata([(k, k, k) for k in range(4)] if mode == "RGB" else range(4))
        if mode == "P":
            image = image.convert("P")
            image.putpalette([channel for k in range(256) for channel in (k, k, k)])
        pixels = opened(tmp_path, image, transparency=clear)[0, :, 0].tolist()
        assert pixels == ([0, 255, 2, 255] if isinstance(clear, bytes) else [0, 1, 2, 255])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_the_other_modes_are_as_pil_shows_them(tmp_path, mode):
    assert np.array_equal(opened(tmp_path, ramp(mode)), np.asarray(ramp(mode).convert("RGB")))
    cmyk = opened(tmp_path, ramp("CMYK"), "x.jpg", quality=100).astype(int)
    assert np.abs(cmyk - np.asarray(ramp())).max() < 20


def test_several_frames_are_refused_but_for_a_cameras_further_ones(tmp_path):
    for name in ("x.png", "x.webp"):
        ramp().save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", (64, 48), "red")])
        with pytest.raises(ValueError, match=rf"{name} has several frames"):
            open_image(tmp_path / name)
    ramp().save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    assert open_image(tmp_path / "x.jpg").size == (64, 48)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS", "PPM"])
def test_another_format_under_an_images_name_is_refused(tmp_path, kind):
    ramp().save(tmp_path / "x.png", kind)
    with pytest.raises(ValueError, match=r"cannot read the image .*x\.png as PNG"):
        open_image(tmp_path / "x.png")
    assert not is_intact(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp"])
def test_an_image_that_was_cut_off_is_refused(tmp_path, name):
    ramp().save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for length in (0, 1, 30, len(content) // 2, len(content) - 30):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot read the image"):
            open_image(tmp_path / name)


def test_more_pixels_than_a_camera_has_are_refused_before_they_are_read(tmp_path):
    side = int(MAX_PIXELS**0.5) + 1
    for width, height in ((side, side), (12000, 12000), (30000, 30000)):
        Image.new("1", (8, 8)).save(tmp_path / "large.png")
        content = bytearray((tmp_path / "large.png").read_bytes())
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        (tmp_path / "large.png").write_bytes(content)
        for size in (None, 64):
            with pytest.raises(ValueError, match=r"large\.png has more than 64 million pixels"):
                open_image(tmp_path / "large.png", size)
    Image.new("1", (40000, 2)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"strip\.png is 40000 x 2 pixels, too narrow"):
        open_image(tmp_path / "strip.png", 512)


def test_batches_have_one_size_and_are_smaller_where_images_are_large(tmp_path, monkeypatch):
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for path in paths:
        Image.new("RGB", (40, 32)).save(path)
    assert [len(batch) for batch in load_batches(paths, 3)] == [3, 2] and not [*load_batches([], 3)]
    with monkeypatch.context() as patched:
        patched.setattr("ldm.io.images.MAX_BATCH_PIXELS", 2 * 40 * 32)
        assert [len(batch) for batch in load_batches(paths, 3)] == [2, 2, 1]
        patched.setattr("ldm.io.images.MAX_BATCH_PIXELS", 40 * 32 - 1)
        with pytest.raises(ValueError, match=r"0\.png is 40 x 32 pixels, too large for a network"):
            next(load_batches(paths, 3))
    check_same_size(*paths[:2])
    Image.new("RGB", (32, 40)).save(paths[4])
    with pytest.raises(ValueError, match=r"0\.png and .*4\.png differ in size"):
        check_same_size(paths[0], paths[4])
    for batch_size in (2, 4, 5):
        with pytest.raises(ValueError, match=r"\.png and .*4\.png differ in size"):
            list(load_batches(paths, batch_size))
    assert MAX_BATCH_PIXELS < MAX_PIXELS


def test_every_visible_image_counts_once(tmp_path):
    folder, elsewhere = tmp_path / "images.png", tmp_path / "elsewhere"
    for path in (
        "0_0.png",
        "1/1_0.PNG",
        "1/.hidden.png",
        ".ipynb_checkpoints/0_0-checkpoint.png",
        "2_0.gif",
        "1_0.txt",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    (elsewhere / "deep.png").mkdir(parents=True)
    for path in ("7_0.jpg", "deep.png/8_0.png"):
        (elsewhere / path).touch()
    (folder / "linked").symlink_to(elsewhere)  # counts
    (folder / "linked-again").symlink_to(elsewhere / "deep.png")  # is the same
    (folder / "up").symlink_to(tmp_path)  # leads back
    (elsewhere / "round").symlink_to(elsewhere)
    (folder / "0_1.png").symlink_to(folder / "0_0.png")  # is the same
    (folder / "9_0.png").symlink_to(elsewhere / "none.png")  # so that opening it says what is missing
    (folder / "8_0.png").symlink_to(folder / "8_0.png")
    found = [path.relative_to(folder).as_posix() for path in list_images(folder)]
    assert found[:2] == ["0_0.png", "1/1_0.PNG"] and found[2:4] == ["8_0.png", "9_0.png"]
    assert sorted(path.split("/")[-1] for path in found[4:]) == ["7_0.jpg", "8_0.png"] and len(found) == 6
    with pytest.raises(ValueError, match=r"cannot read the image .*9_0\.png"):
        open_image(folder / "9_0.png")
    (tmp_path / "link").symlink_to(folder)
    assert len(list_images(tmp_path / "link")) == 6
    with pytest.raises(MissingFileError, match="no folder"):
        list_images(folder / "0_0.png")


def test_only_plain_digits_are_a_number_in_a_name(tmp_path):
    for name in ("\u00b2_0.png", "\u0663_0.png", "\uff11_0.png", "-1_0.png", "1.5_0.png", "0\u00b2_0.png", "_0.png"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match="starts with its case number, such as"):
            parse_case_number(tmp_path / name)
    assert len(list_images(tmp_path)) == 7


def test_a_grid_has_images_of_one_size():
    small, large = Image.new("RGB", (10, 10)), Image.new("RGB", (20, 10))
    with pytest.raises(ValueError, match="10 x 10 and of 20 x 10 pixels"):
        image_grid([("a", [[small], [large]])], ["a", "b"])
