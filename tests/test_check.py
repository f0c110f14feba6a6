"""A check of an erasure by images: which prompts it takes, what it measures, and its CLIP scores."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import CPU
from PIL import Image

from ldm.config.methods import SamplingConfig
from ldm.diffusion.load import load_model
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.shift import SeparableShift
from ldm.experiments.check import CheckRequest, check_erasure, choose_prompts
from ldm.io.errors import Notice
from ldm.metrics.clip_score import ClipScorer

SAMPLING = SamplingConfig(num_inference_steps=2, guidance_scale=1.5)


@pytest.fixture
def mini(mini_path):
    return load_model(mini_path, CPU)


def strong_shift(model, seed: int = 0) -> SeparableShift:
    """Return a shift that changes all prompts."""
    generator = torch.Generator().manual_seed(seed)
    layers = text_layers(model.denoiser)
    weights = {name: torch.randn(layer.out_features, 3, generator=generator) for name, layer in layers.items()}
    return SeparableShift(weights, torch.randn(3, model.context_dim, generator=generator), 1.0)


def test_ten_prompts_are_chosen_the_first_of_each_group_first():
    erased, protected = [f"e{k}" for k in range(3)], [f"p{k}" for k in range(20)]
    chosen, left_out = choose_prompts({"erased": erased, "protected": [*protected, "e0"]})
    assert chosen == [("erased", text) for text in erased] + [("protected", text) for text in protected[:7]]
    assert left_out == protected[7:]
    assert choose_prompts({"erased": ["a"], "protected": ["a", ""]}) == ([("erased", "a"), ("protected", "")], [])


def test_a_check_writes_its_images_a_grid_and_a_table(mini, tmp_path):
    prompts, request = {"erased": ["VanGogh"], "protected": [""]}, CheckRequest(2, tmp_path / "check", SAMPLING)
    before = {name: weight.clone() for name, weight in mini.denoiser.state_dict().items()}
    table = check_erasure(mini, {"1": strong_shift(mini)}, "linear", prompts, request)
    assert list(table.columns) == ["group", "prompt", "images", "lpips", "max_abs_diff"]
    assert list(table["group"]) == ["erased", "protected"] and list(table["images"]) == [2, 2]
    assert table["lpips"].gt(0).all() and table["max_abs_diff"].gt(0).all()
    folder = tmp_path / "check"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    images = {f"{side}/{number}_0.png" for side in ("before", "after") for number in range(4)}
    assert names == images | {"check.csv", "check.png", "prompts.csv", "metadata.json"}
    assert pd.read_csv(folder / "check.csv", keep_default_na=False)["prompt"].tolist() == ["VanGogh", ""]
    width, height = Image.open(folder / "check.png").size
    assert width > 4 * 32 and height > 2 * 32
    assert all(torch.equal(weight, before[name]) for name, weight in mini.denoiser.state_dict().items())


def test_a_check_of_no_change_finds_none_and_replaces_the_older_one(mini, tmp_path):
    request = CheckRequest(1, tmp_path / "check", SAMPLING)
    prompts = {"erased": ["VanGogh", "church"]}
    assert len(check_erasure(mini, {"1": strong_shift(mini)}, "linear", prompts, request)) == 2
    with pytest.warns(Notice, match=r"the images of 'VanGogh' hardly change \(LPIPS 0.000\)"):
        table = check_erasure(mini, {}, "linear", {"erased": ["VanGogh"], "protected": [""]}, request)
    assert len(table) == 2 and table["lpips"].eq(0).all() and table["max_abs_diff"].eq(0).all()
    assert len(list((tmp_path / "check" / "before").iterdir())) == 2


def test_what_a_check_leaves_out_is_said(mini, tmp_path):
    prompts = {"erased": [f"a painting by {k}" for k in range(12)]}
    with pytest.warns(Notice, match="leaves out 2: a painting by 10, a painting by 11"):
        assert len(check_erasure(mini, {}, "linear", prompts, CheckRequest(1, tmp_path / "check", SAMPLING))) == 10


def test_a_check_that_cannot_be_made_costs_no_image(mini, tiny, tmp_path):
    (tmp_path / "own").mkdir()
    with pytest.raises(ValueError, match="another folder"):
        CheckRequest(1, tmp_path / "own", SAMPLING)
    with pytest.raises(ValueError, match="`check` 0"):
        CheckRequest(0, tmp_path / "check", SAMPLING)
    request = CheckRequest(1, tmp_path / "check", SAMPLING)
    with pytest.raises(ValueError, match="no prompt"):
        check_erasure(mini, {}, "linear", {"erased": []}, request)
    with pytest.raises(ValueError, match="32 pixels"):
        check_erasure(tiny, {}, "linear", {"erased": ["a"]}, request)
    lacking = CheckRequest(1, tmp_path / "check", SAMPLING, tmp_path / "lacking")
    with pytest.raises(ValueError, match="`clip_path`"):
        check_erasure(mini, {}, "linear", {"erased": ["a"]}, lacking)
    assert not (tmp_path / "check").exists()


def test_with_a_clip_model_a_check_has_scores_but_for_the_empty_prompt(mini, tmp_path, clip_path):
    request = CheckRequest(2, tmp_path / "check", SAMPLING, clip_path)
    prompts = {"erased": ["VanGogh"], "protected": [""]}
    table = check_erasure(mini, {"1": strong_shift(mini)}, "linear", prompts, request)
    assert list(table.columns[-2:]) == ["clip_before", "clip_after"]
    assert table.loc[0, ["clip_before", "clip_after"]].between(0, 100).all()
    assert table.loc[1, ["clip_before", "clip_after"]].isna().all()


def test_clip_scores_are_torchmetrics(tmp_path, clip_path):
    from torchmetrics.functional.multimodal import clip_score

    generator, paths = torch.Generator().manual_seed(0), []
    pixels = torch.randint(0, 256, (3, 40, 40, 3), generator=generator, dtype=torch.uint8)
    for number, image in enumerate(pixels):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image.numpy()).save(paths[-1])
    prompts = ["a painting by VanGogh", "a church", "tench"]
    scorer = ClipScorer.load(clip_path, CPU)
    scores = scorer(paths, prompts, batch_size=2)
    # What torchmetrics 1.9 expects of a model, and transformers 5 wraps in an output.
    unwrapped = SimpleNamespace(
        config=scorer.network.config,
        get_image_features=lambda images: scorer.network.get_image_features(images).pooler_output,
        get_text_features=lambda *inputs: scorer.network.get_text_features(*inputs).pooler_output,
    )
    unwrapped.to = lambda device: unwrapped
    for image, prompt, score in zip(pixels, prompts, scores, strict=True):
        expected = clip_score(image.permute(2, 0, 1), prompt, lambda: (unwrapped, scorer.processor))
        assert score == pytest.approx(expected.item(), abs=1e-3)


def test_an_image_is_embedded_once_for_all_prompts(tmp_path, clip_path, monkeypatch):
    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for k, path in enumerate(paths):
        Image.new("RGB", (32, 32), (80 * k, 30, 200 - 60 * k)).save(path)
    scorer, prompts, seen = ClipScorer.load(clip_path, CPU), ["a cat", "VanGogh", "a church by Picasso"], []
    pairs = torch.stack([scorer(paths, [prompt] * 3) for prompt in prompts], dim=1)
    scorer.network.vision_model.register_forward_hook(lambda *call: seen.append(len(call[2].pooler_output)))
    assert torch.allclose(scorer.with_each(paths, prompts), pairs, atol=1e-4) and seen == [3]


def test_a_prompt_longer_than_clip_reads_has_a_score(tmp_path, clip_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    assert ClipScorer.load(clip_path, CPU)([tmp_path / "red.png"], ["a painting by VanGogh " * 20]).isfinite().all()


def test_a_folder_without_a_clip_model_is_refused(tmp_path, mini_path):
    for path in (tmp_path, mini_path / "unet"):
        with pytest.raises(ValueError, match="`clip_path`"):
            ClipScorer.load(path, CPU)
