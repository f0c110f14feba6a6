import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ldm.io.prompts import PromptCase, read_prompt_csv
from ldm.diffusion.sampling import generate, generate_to_folder, initial_noise
from ldm.io.sharding import Shard

CASES = [PromptCase("VanGogh", 3, 0), PromptCase("", 4, 1), PromptCase("Picasso", 3, 2)]


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def test_the_pipeline_of_diffusers_draws_the_same_picture(tiny, tiny_path):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_path, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("VanGogh", num_inference_steps=3, guidance_scale=4.0, latents=initial_noise(tiny, 3, 1)).images[0]
    (_, _, ours), = generate(tiny, [(CASES[0], 0)], 3, 4.0, 8)
    assert abs(pixels(theirs) - pixels(ours)).max() <= 1


def test_a_picture_depends_on_its_seed_alone_not_on_its_batch(tiny):
    wanted = [(case, n) for case in CASES for n in range(2)]
    one, many = ([image for _, _, image in generate(tiny, wanted, 3, 4.0, batch)] for batch in (1, 6))
    assert max(abs(pixels(a) - pixels(b)).max() for a, b in zip(one, many)) <= 1
    assert abs(pixels(one[0]) - pixels(one[1])).max() > 1
    assert torch.equal(initial_noise(tiny, 3, 2)[:1], initial_noise(tiny, 3, 1))


def test_a_folder_goes_on_where_it_stopped_and_refuses_another_run(tiny, tmp_path):
    settings = {"samples": 2, "steps": 2, "guidance": 4.0, "batch": 4}
    assert generate_to_folder(tiny, CASES, tmp_path / "a", {"run": 1}, **settings) == 6
    first = (tmp_path / "a" / "2_1.png").read_bytes()
    (tmp_path / "a" / "2_1.png").unlink()
    (tmp_path / "a" / "0").mkdir()
    (tmp_path / "a" / "0_0.png").rename(tmp_path / "a" / "0" / "0_0.png")
    assert generate_to_folder(tiny, CASES, tmp_path / "a", {"run": 1}, **settings) == 1
    assert (tmp_path / "a" / "2_1.png").read_bytes() == first
    with pytest.raises(ValueError, match="another run"):
        generate_to_folder(tiny, CASES, tmp_path / "a", {"run": 2}, **settings)


def test_a_folder_takes_more_cases_and_samples_but_no_other_prompt_for_a_case(tiny, tmp_path):
    settings = {"steps": 2, "guidance": 4.0, "batch": 4}
    assert generate_to_folder(tiny, CASES[:2], tmp_path, {}, samples=1, **settings) == 2
    assert generate_to_folder(tiny, CASES[1:], tmp_path, {}, samples=2, **settings) == 3
    assert read_prompt_csv(tmp_path / "prompts.csv") == CASES
    with pytest.raises(ValueError, match="another prompt or seed for case 0"):
        generate_to_folder(tiny, [PromptCase("Picasso", 3, 0)], tmp_path, {}, samples=1, **settings)
    assert read_prompt_csv(tmp_path / "prompts.csv") == CASES


def test_the_same_pictures_are_drawn_together_in_every_run(tiny, tmp_path, monkeypatch):
    cases = [PromptCase("VanGogh", k, k) for k in range(7)]
    settings = {"recipe": {}, "samples": 1, "steps": 1, "guidance": 4.0, "batch": 3}
    asked = []
    monkeypatch.setattr("ldm.sampling.generate", lambda model, wanted, *rest: asked.append([case.number for case, _ in wanted]) or
                        ((case, n, Image.new("RGB", (2, 2))) for case, n in wanted))
    assert generate_to_folder(tiny, cases, tmp_path / "a", **settings) == 7
    (tmp_path / "a" / "4_0.png").unlink()
    kept = (tmp_path / "a" / "3_0.png").stat().st_mtime_ns
    assert generate_to_folder(tiny, cases, tmp_path / "a", **settings) == 1
    assert (tmp_path / "a" / "3_0.png").stat().st_mtime_ns == kept  # drawn again, but not written
    parts = [generate_to_folder(tiny, cases, tmp_path / "b", **settings, share=Shard(rank, 2)) for rank in range(2)]
    assert asked == [list(range(7)), [3, 4, 5], [0, 1, 2, 6], [3, 4, 5]] and parts == [4, 3]


@pytest.fixture
def compile_by(monkeypatch):
    """Let torch.compile hand what it has traced to a function instead of to a C++ compiler."""
    real = torch.compile
    return lambda backend: monkeypatch.setattr("torch.compile", lambda unet, **how: real(unet, backend=backend, **how))


def test_full_batches_are_compiled_once_and_the_unet_is_given_back(tiny, tmp_path, compile_by):
    settings, unet, batches = {"samples": 1, "steps": 2, "guidance": 4.0, "batch": 2}, tiny.unet, set()

    def ran(graph, _):
        return lambda *given: batches.update(value.shape[0] for value in given if value.dim() == 4 and value.shape[1:] == tiny.latent_shape) \
            or graph(*given)
    compile_by(ran)
    assert generate_to_folder(tiny, CASES, tmp_path / "a", {}, **settings) == 3 and not batches
    assert generate_to_folder(tiny, CASES, tmp_path / "b", {}, **settings, fast=True) == 3
    assert generate_to_folder(tiny, CASES, tmp_path / "b", {}, **settings, fast=True) == 0
    assert batches == {4} and tiny.unet is unet  # two pictures guided, and not the one that is left
    assert all((tmp_path / "a" / f"{k}_0.png").read_bytes() == (tmp_path / "b" / f"{k}_0.png").read_bytes() for k in range(3))


def test_a_machine_that_cannot_compile_says_so_and_the_unet_is_given_back(tiny, tmp_path, compile_by):
    def broken(*_):
        raise RuntimeError("no C++ compiler")
    unet = tiny.unet
    compile_by(broken)
    with pytest.raises(ValueError, match="leave --compile out.*no C.. compiler"):
        generate_to_folder(tiny, CASES, tmp_path, {}, 1, 2, 4.0, 2, fast=True)
    assert tiny.unet is unet and not list(tmp_path.rglob("*.png"))
