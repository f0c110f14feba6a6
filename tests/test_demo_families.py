"""The live page of a model whose images its pipeline's own call makes: its steps, visitors at once, what is shown."""

import threading

import pytest
import torch
from conftest import CPU
from families import MAKERS, make_family
from PIL import ImageChops

from ldm.config.concepts import get_concept
from ldm.config.methods import GateConfig, SamplingConfig
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.diffusion.sampling import SeededNoise, generate, sample_latents, sample_trajectory
from ldm.erasure.merge import edited
from ldm.io.prompts import PromptCase
from ldm.ledger.demo import Comparison, DemoSession
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header
from ldm.ledger.operations import create_shifts, weights_hash
from ldm.ledger.page import build

STEPS = 3
FEW = GateConfig(gate=True, retain_captions=30, retain_words=10, compositions=5, word_lists=5, misspellings=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_family("flux", tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="module")
def ledger(path, tmp_path_factory):
    """Erase VanGogh, and restore Picasso, in a ledger of a tiny FLUX."""
    model, styles = load_model(path, CPU), [get_concept("style", index) for index in range(3)]
    source = {"model": str(path), "ckpt_path": None, "config_path": None}
    root = tmp_path_factory.mktemp("ledger")
    ledger = Ledger.create(root / HISTORY_FILE, make_header(model, "style", styles, [], source))
    config = load_model_config(model)
    method = config.methods["SRS-ME"].with_changes(ridge_weight=1e-6, vocab_preserve_scale=0)
    ledger.append(create_shifts(ledger, model, styles[1:], method, config.null_space, root / "none", FEW))
    ledger.append({}, ["2"])
    return ledger


@pytest.fixture
def demo(ledger, path):
    return DemoSession(ledger, load_model(path, CPU), lambda: load_model(path, CPU))


def compared(demo, prompt, names, seed=3) -> tuple[list[float], Comparison]:
    *fractions, comparison = demo.compare(prompt, seed, STEPS, 2.0, names)
    return fractions, comparison


@pytest.mark.parametrize("form", ["linear", "gated"])
def test_it_shows_every_step_and_the_images_that_scripts_generate(demo, form):
    demo.form, before = form, weights_hash(demo.model.denoiser)
    fractions, comparison = compared(demo, "VanGogh", ["VanGogh"])
    assert fractions == pytest.approx([(k + 1) / (2 * STEPS) for k in range(2 * STEPS)])
    requests = [(PromptCase("VanGogh", 3, 0), 0)]
    sampling = SamplingConfig(num_inference_steps=STEPS, guidance_scale=2.0, sample_batch_size=1)
    ((_, _, original),) = generate(demo.model, requests, sampling)
    with edited(demo.model, {"1": demo.state.shifts["VanGogh"]}, form):
        ((_, _, changed),) = generate(demo.model, requests, sampling)
    for own, other in ((comparison.original, original), (comparison.edited, changed)):
        assert max(extreme for _, extreme in ImageChops.difference(own, other).getextrema()) <= 1
    assert comparison.difference.getbbox() and comparison.leakage > 0 and weights_hash(demo.model.denoiser) == before
    _, nothing = compared(demo, "VanGogh", [])
    assert nothing.max_difference == 0 and nothing.leakage == 0


def test_visitors_at_the_same_time_each_get_their_own_images(demo):
    visits = [(prompt, names) for prompt in ("VanGogh", "Picasso") for names in ([], [prompt])]
    alone, together = [compared(demo, *visit, seed=5)[1].edited.tobytes() for visit in visits], {}
    assert len(set(alone)) == 4

    def visit(k):
        together[k] = [compared(demo, *visits[k], seed=5)[1].edited.tobytes() for _ in range(3)]

    visitors = [threading.Thread(target=visit, args=(k,)) for k in range(4)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert together == {k: [alone[k]] * 3 for k in range(4)}


def test_its_page_example_and_other_prompts_are_there(demo, tmp_path):
    assert build(demo, tmp_path)
    prompt, comparison = demo.example(demo.state)
    assert prompt == "VanGogh" and comparison.difference.getbbox()
    others = demo.measure_others(["VanGogh"])
    assert others and all(other.max_difference <= 1 for other in others if other.is_protected)
    assert demo.export_zip(["VanGogh"], "lora", tmp_path).is_file()


@pytest.mark.parametrize("name", list(MAKERS))
def test_the_trajectory_of_every_family_has_all_steps_and_ends_in_the_image(name, tmp_path):
    model = load_model(make_family(name, tmp_path / name), CPU)
    embeds, uncond_embeds = model.encode_prompt(["VanGogh"]), model.encode_uncond()

    def trajectory():
        noise = SeededNoise.sample(model, [(4, 0)])
        return sample_trajectory(model, noise, embeds, uncond_embeds, STEPS, 3.0)

    steps = list(trajectory())
    assert len(steps) == STEPS and all(step.shape == (1, *model.latent_shape) for step in steps)
    noise = SeededNoise.sample(model, [(4, 0)])
    after_two = sample_latents(model, noise, embeds, uncond_embeds, STEPS, 3.0, stop=2)
    assert torch.equal(after_two, steps[1]) and not torch.equal(steps[1], steps[2])
    sampling = SamplingConfig(num_inference_steps=STEPS, guidance_scale=3.0, sample_batch_size=1)
    [(_, _, image)] = generate(model, [(PromptCase("VanGogh", 4, 0), 0)], sampling)
    shown = model.decode(steps[-1])[0].clamp(-1, 1)
    expected = torch.tensor(list(image.getdata())).view(*image.size, 3).permute(2, 0, 1) / 127.5 - 1
    assert (shown - expected).abs().max() < 2.5 / 255


def test_a_pipeline_that_fails_says_so_and_one_that_is_left_ends(path):
    model = load_model(path, CPU)
    embeds, uncond_embeds = model.encode_prompt(["VanGogh"]), model.encode_uncond()
    left = sample_trajectory(model, SeededNoise.sample(model, [(4, 0)]), embeds, uncond_embeds, 200, 1.0)
    next(left)
    left.close()
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())
    with pytest.raises(ValueError, match="generators"):
        list(sample_trajectory(model, SeededNoise.sample(model, [(4, 0), (5, 0)]), embeds, uncond_embeds, 2, 1.0))
