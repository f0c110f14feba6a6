"""The concept that the model never learnt: its pictures, and the judge that tells them from the model's own images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, ROOT
from PIL import Image

from ldm.config.concepts import OWN, load_concepts
from ldm.config.methods import SamplingConfig
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.experiments.probe import UNEDITED, Bench
from ldm.experiments.unlearnt import UNLEARNT, Unlearnt
from ldm.io.images import load_batch, open_image, save_image, tensor_to_images
from ldm.metrics.judge import ClipJudge, FeatureJudge
from ldm.toy.render import render_concept, render_woodcut


@pytest.fixture
def bench(mini_path, tmp_path) -> Bench:
    model = load_model(mini_path, CPU)
    return Bench(model, "style", tmp_path / "bench", ClipJudge(None, []), SamplingConfig(2, 1.0, 32), images=4)


def woodcuts(folder: Path, first: int, number: int, size: int) -> list[Path]:
    """Make woodcuts of other seeds than those of any bench."""
    folder.mkdir(parents=True)
    paths = [folder / f"{k}_0.png" for k in range(number)]
    for k, path in enumerate(paths):
        save_image(path, Image.fromarray(render_woodcut(np.random.default_rng(first + k), size)))
    return paths


def test_a_third_of_the_pictures_is_to_attack_with_and_nothing_is_made_twice(bench):
    found = Unlearnt.of(bench, 20)
    assert len(found.examples) == 20 and open_image(found.examples[0]).size == (32, 32)
    files = {path: path.stat().st_mtime_ns for path in bench.folder.rglob("*.png")}
    assert Unlearnt.of(replace(bench, images=9), 20) is found  # one judge for all probes
    again = Unlearnt.of(replace(bench, shared={}), 20)
    assert again.examples == found.examples and again.judge.threshold == found.judge.threshold
    assert {path: path.stat().st_mtime_ns for path in bench.folder.rglob("*.png")} == files


def test_a_stopped_run_makes_the_pictures_that_lack(bench):
    found = Unlearnt.of(bench, 20)
    before = found.examples[3].read_bytes()
    found.examples[3].unlink()
    assert Unlearnt.of(replace(bench, shared={}), 20).examples[3].read_bytes() == before


def test_a_model_whose_concepts_nobody_configured_makes_images_enough_to_tell(bench):
    Unlearnt.of(replace(bench, category=OWN, shared={}), 20)
    assert len(list((bench.folder / "unedited" / UNLEARNT.label / "own-images").glob("*.png"))) >= 40


def test_the_pictures_of_a_users_folder_are_seen_and_the_models_images_are_not(bench, tmp_path):
    woodcuts(tmp_path / "own", 500, 30, 48)
    found = Unlearnt.of(bench, 10, tmp_path / "own")
    assert len(found.examples) == 10 and open_image(found.examples[0]).size == (32, 32)
    assert np.mean(found.judge.shows(found.examples, UNLEARNT)) >= 0.9
    images = bench.generate(UNEDITED, tmp_path / "images", ["a photo of a cat", "KeithHaring"], 10)
    assert not any(found.judge.shows(images, UNLEARNT))


def test_folders_of_few_pictures_and_what_the_model_makes_itself_are_refused(bench, tmp_path):
    few = woodcuts(tmp_path / "few", 0, 5, 32)
    with pytest.raises(ValueError, match="5 images: give 12 or more"):
        Unlearnt.of(bench, 4, tmp_path / "few")
    with pytest.raises(ValueError, match="look like those"):
        FeatureJudge.fit(few, few, few, few, CPU)


@pytest.mark.slow
def test_the_judge_sees_woodcuts_in_no_image_of_mini_sd_and_in_all_that_its_autoencoder_keeps(tmp_path):
    model = load_model(ROOT / "models" / "mini-sd", CPU)
    bench = Bench(model, "style", tmp_path / "bench", ClipJudge(None, []), load_model_config(model).sampling)
    judge = Unlearnt.of(bench, 20).judge
    fresh = woodcuts(tmp_path / "fresh", 500, 40, 64)
    assert np.mean(judge.shows(fresh, UNLEARNT)) >= 0.9
    # An attack on the prompt reaches no more than what the autoencoder can show.
    kept = tensor_to_images(model.decode(model.encode_image(load_batch(fresh))))
    for path, image in zip(fresh, kept, strict=True):
        image.save(path)
    assert np.mean(judge.shows(fresh, UNLEARNT)) >= 0.9
    prompts = [*(concept.prompt for concept in load_concepts("style")), "", "a photo of a cat"]
    own = bench.generate(UNEDITED, tmp_path / "own", prompts, 4)
    assert np.mean(judge.shows(own, UNLEARNT)) <= 0.02
    learnt = [tmp_path / "learnt" / f"{k}_0.png" for k in range(40)]  # as the model's captions showed it
    learnt[0].parent.mkdir()
    for k, path in enumerate(learnt):
        save_image(
            path, Image.fromarray(render_concept("Jackson Pollock" if k % 2 else None, np.random.default_rng(k)))
        )
    assert np.mean(judge.shows(learnt, UNLEARNT)) <= 0.02
