"""Inputs that once gave a wrong result and exit code 0: prompt lists and images, each made anew here."""

import numpy as np
import pytest
from conftest import is_error
from PIL import Image

HEADER = "prompt,evaluation_seed,case_number\n"
LISTS = {
    "unquoted comma": (HEADER + "a church, painted by VanGogh,7,0\n", ["line 2", "4 fields for 3 columns"]),
    "trailing comma": ("case_number,evaluation_seed,prompt\n0,7,VanGogh,\n", ["line 2", "4 fields for 3 columns"]),
    "numeric trailing comma": ("case_number,evaluation_seed,prompt\n0,7,8,\n", ["line 2", "4 fields for 3 columns"]),
    "seed 2^64": (HEADER + "VanGogh,18446744073709551616,0\n", ["line 2", "evaluation_seed", "18446744073709551615"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_prompt_list_is_refused_before_anything_is_written(script, tiny_path, tmp_path, name):
    text, words = LISTS[name]
    (tmp_path / "list.csv").write_text(text)
    flags = ["--model", tiny_path, "--prompts_path", tmp_path / "list.csv", "--save_path", tmp_path / "out"]
    is_error(script("eval-scripts/generate-images-merge.py", *flags, "--ddim_steps", "1"), "list.csv", *words)
    assert not (tmp_path / "out").exists()


def pictures(folder, seed, size=64):
    """Write two folders' worth of blurred noise: four images, and their prompt list."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    (folder / "prompts.csv").write_text(HEADER + "".join(f"VanGogh,{k},{k}\n" for k in range(4)))
    for k in range(4):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{k}_0.png")
    return folder


def mean_lpips(script, original, edited):
    code, out, err = script("eval-scripts/lpips_eval.py", "--path1", original, "--path2", edited)
    assert code == 0, err
    return out.splitlines()[-1].split(" -> ")[0]


def test_16_bits_of_grey_compare_as_8(script, tmp_path):
    original, edited, deep = pictures(tmp_path / "a", 0), pictures(tmp_path / "b", 1), pictures(tmp_path / "c", 1)
    for path in edited.glob("*.png"):
        grey = Image.open(path).convert("L")
        grey.save(path)
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(deep / path.name)
    expected = mean_lpips(script, original, edited)
    assert mean_lpips(script, original, deep) == expected and "over 4 pairs" in expected


def test_a_turned_image_compares_as_it_is_shown(script, tmp_path):
    original, edited = pictures(tmp_path / "a", 0), pictures(tmp_path / "b", 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in edited.glob("*.png"):
        turned = Image.open(path).transpose(Image.Transpose.ROTATE_90)
        turned.save(path, exif=exif)
    assert mean_lpips(script, original, edited) == "mean LPIPS 0.000000 over 4 pairs"


def test_a_notebooks_hidden_folder_does_not_count(script, tmp_path):
    original, edited = pictures(tmp_path / "a", 0), pictures(tmp_path / "b", 1)
    expected = mean_lpips(script, original, edited)
    for folder in (original, edited):
        (folder / ".ipynb_checkpoints").mkdir()
        for k in range(2):
            (folder / ".ipynb_checkpoints" / f"{k}_0-checkpoint.png").write_bytes((folder / f"{k}_0.png").read_bytes())
    assert mean_lpips(script, original, edited) == expected


@pytest.mark.parametrize("name", ["FID_eval", "lpips_eval", "compare", "styleloss"])
def test_images_of_two_sizes_are_refused_by_all(script, tmp_path, name):
    original, edited = pictures(tmp_path / "a", 0), pictures(tmp_path / "b", 1, 96)
    before = sorted(edited.iterdir())
    is_error(script(f"eval-scripts/{name}.py", "--path1", original, "--path2", edited), "0_0.png", "differ in size")
    assert sorted(edited.iterdir()) == before
