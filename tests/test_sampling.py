"""Generated images are those of diffusers' pipeline, depend on their seed alone, and a stopped run resumes."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ldm.config.methods import SamplingConfig
from ldm.diffusion.image_folder import generate_to_folder
from ldm.diffusion.sampling import generate, initial_noise
from ldm.io.errors import Notice
from ldm.io.files import METADATA_FILE
from ldm.io.prompts import PromptCase, read_prompt_csv
from ldm.io.sharding import Shard

CASES = [PromptCase("VanGogh", 3, 0), PromptCase("", 4, 1), PromptCase("Picasso", 3, 2)]
SAMPLING = SamplingConfig(num_inference_steps=2, guidance_scale=4.0, sample_batch_size=4)
THREE_STEPS = SAMPLING.with_changes(num_inference_steps=3)
PAIRS = SAMPLING.with_changes(sample_batch_size=2)


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def max_difference(first, second) -> int:
    return abs(pixels(first) - pixels(second)).max()


def test_diffusers_pipeline_generates_the_same_image(tiny, tiny_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_path, safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(tiny, 3, 1)
    theirs = pipeline("VanGogh", num_inference_steps=3, guidance_scale=4.0, latents=noise).images[0]
    ((_, _, ours),) = generate(tiny, [(CASES[0], 0)], THREE_STEPS.with_changes(sample_batch_size=8))
    assert max_difference(theirs, ours) <= 1


def test_an_image_depends_on_its_seed_alone_not_on_its_batch(tiny):
    requests = []
    for case in CASES:
        requests += [(case, 0), (case, 1)]
    single, together = (
        [image for _, _, image in generate(tiny, requests, THREE_STEPS.with_changes(sample_batch_size=batch_size))]
        for batch_size in (1, 6)
    )
    assert max(max_difference(a, b) for a, b in zip(single, together, strict=True)) <= 1
    assert max_difference(single[0], single[1]) > 1
    assert torch.equal(initial_noise(tiny, 3, 2)[:1], initial_noise(tiny, 3, 1))


@pytest.fixture
def with_scheduler(tiny, monkeypatch):
    """Return what gives the tiny model another scheduler."""

    def replace(name: str, **changes) -> None:
        scheduler = getattr(diffusers, name).from_config(tiny.scheduler.config, **changes)
        monkeypatch.setattr(tiny, "scheduler", scheduler)

    return replace


NOISY = {
    "EulerAncestralDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "LCMScheduler": {},
    "DDPMScheduler": {},
    "TCDScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISY)
def test_a_scheduler_that_adds_noise_takes_it_from_the_cases_own_seed(name, tiny, with_scheduler):
    """The same image for any batch, order and process, whatever was sampled before."""
    with_scheduler(name, **NOISY[name])
    requests = [(case, n) for case in CASES for n in range(2)]

    def generated(requests, batch_size) -> dict:
        sampling = THREE_STEPS.with_changes(sample_batch_size=batch_size)
        return {(case, n): image for case, n, image in generate(tiny, requests, sampling)}

    torch.manual_seed(1)
    one_by_one = generated(requests, 1)
    torch.manual_seed(2)
    together = generated(requests[::-1], 4)
    assert max(max_difference(one_by_one[request], together[request]) for request in requests) <= 1
    assert max_difference(one_by_one[CASES[0], 0], one_by_one[CASES[0], 1]) > 1


def test_a_scheduler_that_adds_noise_adds_what_the_pipelines_generator_samples(tiny, tiny_path, with_scheduler):
    with_scheduler("EulerAncestralDiscreteScheduler")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_path, safety_checker=None, dtype=torch.float32)
    pipeline.scheduler = tiny.scheduler
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(3)}
    theirs = pipeline("VanGogh", **options).images[0]
    ((_, _, ours),) = generate(tiny, [(CASES[0], 0)], THREE_STEPS)
    assert max_difference(theirs, ours) <= 1


def test_a_scheduler_that_adds_noise_of_no_seed_is_refused(tiny, monkeypatch):
    class Careless(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample):
            return super().step(model_output, timestep, sample + torch.randn_like(sample))

    monkeypatch.setattr(tiny, "scheduler", Careless.from_config(tiny.scheduler.config))
    with pytest.raises(ValueError, match="Careless adds noise that no seed decides"):
        list(generate(tiny, [(CASES[0], 0)], SAMPLING))


def test_an_image_that_is_not_finite_is_never_generated(tiny, tmp_path):
    with pytest.raises(ValueError, match="the image of case 0, 'VanGogh', holds NaN or infinity"):
        generate_to_folder(tiny, CASES, tmp_path, {}, SAMPLING.with_changes(guidance_scale=1e30))
    assert not list(tmp_path.rglob("*.png"))


def test_an_image_that_is_damaged_is_generated_again(tiny, tmp_path):
    generate_to_folder(tiny, CASES, tmp_path, {}, SAMPLING)
    written = (tmp_path / "2_0.png").read_bytes()
    for damaged in (b"", written[:-20], written[:60] + bytes([written[60] ^ 1]) + written[61:]):
        (tmp_path / "2_0.png").write_bytes(damaged)
        assert generate_to_folder(tiny, CASES, tmp_path, {}, SAMPLING) == 1
        assert (tmp_path / "2_0.png").read_bytes() == written


def test_an_image_in_anothers_place_is_generated_again(tiny, tmp_path):
    generate_to_folder(tiny, CASES, tmp_path, {}, SAMPLING)
    written = (tmp_path / "2_0.png").read_bytes()
    (tmp_path / "2_0.png").write_bytes((tmp_path / "0_0.png").read_bytes())
    assert generate_to_folder(tiny, CASES, tmp_path, {}, SAMPLING) == 1
    assert (tmp_path / "2_0.png").read_bytes() == written
    Image.open(tmp_path / "0_0.png").save(tmp_path / "0_0.png")  # one of an older version says nothing
    assert generate_to_folder(tiny, CASES, tmp_path, {}, SAMPLING) == 0


def test_a_run_that_made_no_image_blocks_no_other(tiny, tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        generate_to_folder(tiny, CASES, tmp_path, {}, SAMPLING.with_changes(guidance_scale=1e30))
    assert generate_to_folder(tiny, CASES[:1], tmp_path, {}, SAMPLING) == 1
    assert read_prompt_csv(tmp_path / "prompts.csv") == CASES[:1]


def test_steps_that_a_scheduler_cannot_take_are_refused_before_anything_is_written(tiny, tmp_path, with_scheduler):
    with pytest.raises(ValueError, match="`num_inference_steps` 1001: the model has 1000 timesteps"):
        generate_to_folder(tiny, CASES, tmp_path, {}, SAMPLING.with_changes(num_inference_steps=1001))
    with_scheduler("PNDMScheduler")
    with pytest.raises(ValueError, match="PNDMScheduler cannot take 2 steps: choose another number of"):
        generate_to_folder(tiny, CASES, tmp_path, {}, SAMPLING)
    assert not list(tmp_path.iterdir())
    with pytest.warns(Notice, match="no case is left"):
        generate_to_folder(tiny, [], tmp_path, {}, SAMPLING.with_changes(num_inference_steps=20))


LONG = "a painting of a church by the sea in the evening light with a boat by VanGogh"  # of more than 16 tokens


def test_prompts_that_are_cut_are_named_with_where(tiny):
    cases = [PromptCase(LONG, 0, 0), PromptCase(f"{LONG} again", 0, 1), PromptCase("VanGogh", 0, 2)]
    with pytest.warns(Notice) as given:
        images = [image for _, _, image in generate(tiny, [(case, 0) for case in cases], SAMPLING)]
    texts = [str(notice.message) for notice in given if notice.category is Notice]
    assert texts[0].startswith(
        "2 of 3 prompts are longer than the model's 16 tokens, and are cut; 2 of them are then the same"
    )
    assert len(texts) == 3 and "is cut after 43 characters, '... a church by the sea in the ev'" in texts[1], texts
    assert max_difference(images[0], images[1]) == 0


def test_a_folder_resumes_where_it_stopped_and_refuses_another_run(tiny, tmp_path):
    folder = tmp_path / "a"
    assert generate_to_folder(tiny, CASES, folder, {"run": 1}, SAMPLING, images_per_seed=2) == 6
    first = (folder / "2_1.png").read_bytes()
    (folder / "2_1.png").unlink()
    (folder / "0").mkdir()
    (folder / "0_0.png").rename(folder / "0" / "0_0.png")
    assert generate_to_folder(tiny, CASES, folder, {"run": 1}, SAMPLING, images_per_seed=2) == 1
    assert (folder / "2_1.png").read_bytes() == first
    with pytest.raises(ValueError, match="another run"):
        generate_to_folder(tiny, CASES, folder, {"run": 2}, SAMPLING, images_per_seed=2)
    with pytest.raises(ValueError, match="another run"):
        generate_to_folder(tiny, CASES, folder, {"run": 1}, THREE_STEPS, images_per_seed=2)


def test_a_folder_of_an_older_version_resumes(tiny, tmp_path):
    """Its metadata is in recipe.json, by the older keys."""
    folder = tmp_path / "a"
    assert generate_to_folder(tiny, CASES, folder, {"created_by": "srs-me"}, SAMPLING) == 3
    metadata = json.loads((folder / METADATA_FILE).read_text())
    assert metadata == {"created_by": "srs-me", "num_inference_steps": 2, "guidance_scale": 4.0}
    (folder / METADATA_FILE).unlink()
    old_metadata = {"made_by": "generate-images-merge.py", "ddim_steps": 2, "guidance_scale": 4.0}
    (folder / "recipe.json").write_text(json.dumps(old_metadata))
    (folder / "2_0.png").unlink()
    assert generate_to_folder(tiny, CASES, folder, {"created_by": "srs-me"}, SAMPLING) == 1


def test_a_folder_takes_more_cases_and_images_but_no_other_prompt_for_a_case(tiny, tmp_path):
    assert generate_to_folder(tiny, CASES[:2], tmp_path, {}, SAMPLING, images_per_seed=1) == 2
    assert generate_to_folder(tiny, CASES[1:], tmp_path, {}, SAMPLING, images_per_seed=2) == 3
    assert read_prompt_csv(tmp_path / "prompts.csv") == CASES
    with pytest.raises(ValueError, match="another prompt or seed for case 0"):
        generate_to_folder(tiny, [PromptCase("Picasso", 3, 0)], tmp_path, {}, SAMPLING, images_per_seed=1)
    assert read_prompt_csv(tmp_path / "prompts.csv") == CASES


def test_the_same_images_are_generated_together_in_every_run(tiny, tmp_path, monkeypatch):
    cases = [PromptCase("VanGogh", k, k) for k in range(7)]
    sampling = SAMPLING.with_changes(num_inference_steps=1, sample_batch_size=3)
    requested = []

    def record(model, requests, sampling):
        requested.append([case.case_number for case, _ in requests])
        return ((case, n, Image.new("RGB", (2, 2))) for case, n in requests)

    monkeypatch.setattr("ldm.diffusion.image_folder.generate", record)
    assert generate_to_folder(tiny, cases, tmp_path / "a", {}, sampling) == 7
    (tmp_path / "a" / "4_0.png").unlink()
    written = (tmp_path / "a" / "3_0.png").stat().st_mtime_ns
    assert generate_to_folder(tiny, cases, tmp_path / "a", {}, sampling) == 1
    assert (tmp_path / "a" / "3_0.png").stat().st_mtime_ns == written  # generated again, but not written
    parts = [generate_to_folder(tiny, cases, tmp_path / "b", {}, sampling, shard=Shard(rank, 2)) for rank in range(2)]
    assert requested == [list(range(7)), [3, 4, 5], [0, 1, 2, 6], [3, 4, 5]] and parts == [4, 3]


@pytest.fixture
def compile_by(monkeypatch):
    """Let torch.compile hand what it has traced to a function instead of to a C++ compiler."""
    compile_unet = torch.compile

    def replace(backend):
        monkeypatch.setattr("torch.compile", lambda unet, **options: compile_unet(unet, backend=backend, **options))

    return replace


@pytest.mark.slow
def test_full_batches_are_compiled_once_and_the_unet_is_restored(tiny, tmp_path, compile_by):
    unet, batch_sizes = tiny.denoiser, set()

    def record(graph, _):
        def run(*inputs):
            for value in inputs:
                if value.dim() == 4 and value.shape[1:] == tiny.latent_shape:
                    batch_sizes.add(value.shape[0])
            return graph(*inputs)

        return run

    compile_by(record)
    assert generate_to_folder(tiny, CASES, tmp_path / "a", {}, PAIRS) == 3 and not batch_sizes
    assert generate_to_folder(tiny, CASES, tmp_path / "b", {}, PAIRS, compile_unet=True) == 3
    assert generate_to_folder(tiny, CASES, tmp_path / "b", {}, PAIRS, compile_unet=True) == 0
    assert batch_sizes == {4} and tiny.denoiser is unet  # two images guided, and not the one that is left
    for k in range(3):
        assert (tmp_path / "a" / f"{k}_0.png").read_bytes() == (tmp_path / "b" / f"{k}_0.png").read_bytes()


@pytest.mark.slow
def test_a_machine_that_cannot_compile_says_so_and_the_unet_is_restored(tiny, tmp_path, compile_by):
    def fail(*_):
        raise RuntimeError("no C++ compiler")

    unet = tiny.denoiser
    compile_by(fail)
    with pytest.raises(ValueError, match=r"leave `compile` out.*no C.. compiler"):
        generate_to_folder(tiny, CASES, tmp_path, {}, PAIRS, compile_unet=True)
    assert tiny.denoiser is unet and not list(tmp_path.rglob("*.png"))
