"""Speed and memory as ratios against a named baseline, each pair measured in this one process: `make bench`.

step: one SRS-ME step, against the original repository's way (two models, four passes, one latent after the other).
generation: 64 images, 20 steps, guidance on, against diffusers' StableDiffusionPipeline with the same batch.
null space: 231 x 768, against scipy.linalg.null_space.
joint memory: the peak of three steps on three concepts at once (SRS-ME-dagger), against that on one of them.
"""

import copy
import itertools
import time

import scipy.linalg
import torch
from diffusers import StableDiffusionPipeline

from ldm import cli
from ldm.attention import kv_layers
from ldm.concepts import ROOT
from ldm.images import Case
from ldm.latents import noisy
from ldm.losses import JointErasure, SeparableErasure
from ldm.model import load
from ldm.sampling import first_noise, generate
from ldm.null_space import NullSpaceBasis, null_space
from ldm.shift import SeparableShift
from ldm.training import erase

MODEL = ROOT / "models" / "mini-sd"


def seconds(run, repeat: int = 5) -> float:
    """The median time of `repeat` runs after one to warm up."""
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeat // 2]


def report(name: str, ours: float, baseline: float, against: str) -> None:
    print(f"{name}: {ours:.3f} s, {ours / baseline:.2f} times {against} ({baseline:.3f} s)", flush=True)


def peak(run) -> int:
    """The most bytes that tensors made within `run` hold at once."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def joint_memory(model, layers, basis, blank) -> None:
    def losses(*prompts):
        return [SeparableErasure(model, layers, SeparableShift.zeros(layers, basis.vectors, 0.05), model.encode_prompt([prompt]),
                                 blank, 1e-6) for prompt in prompts]

    def steps(build, batches):
        def run():
            loss = build()  # within, so that its coefficients count
            for _ in itertools.islice(erase(loss, loss.parameters(), batches, 0.01), 3):
                pass
        return run

    pictures = torch.randn(4, *model.latent_shape)
    together = (tuple(zip(*parts)) for parts in zip(*(noisy(model, pictures, 4, seed) for seed in range(3))))
    one = peak(steps(lambda: losses("VanGogh")[0], noisy(model, pictures, 4, 0)))
    three = peak(steps(lambda: JointErasure(losses("VanGogh", "Cezanne", "Caravaggio")), together))
    print(f"joint memory: {three / 2**20:.1f} MiB, {three / one:.2f} times one concept's ({one / 2**20:.1f} MiB)", flush=True)


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_device(parser)
    device = cli.parse_devices(parser.parse_args().device)[0]
    model = load(MODEL, device)
    layers = kv_layers(model.unet)
    protected = ["", "watermark SRS-ME", "CCS 2024", "Picasso"]
    basis = NullSpaceBasis.solve(model.encode_prompt(protected), protected, 1e-3, "svd", {})
    shift = SeparableShift.zeros(layers, basis.vectors, 0.05)
    concept, blank = model.encode_prompt(["VanGogh"]), model.encode_prompt([""])
    loss = SeparableErasure(model, layers, shift, concept, blank, 1e-6)
    latents, step = next(noisy(model, torch.randn(4, *model.latent_shape), 4, 0))

    def ours():
        loss(latents, step).total.backward()

    frozen = copy.deepcopy(model.unet)

    def original():
        for z, t in zip(latents.split(1), step.split(1)):
            with torch.no_grad():
                old = frozen(z, t, concept).sample - frozen(z, t, blank).sample
            with loss.active():
                new = model.predict_noise(z, t, concept) - model.predict_noise(z, t, blank)
            (new * old).mean().backward()

    report("step of 4 latents", seconds(ours), seconds(original), "the original's way")

    joint_memory(model, layers, basis, blank)

    cases = [Case("VanGogh", seed, seed) for seed in range(64)]
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.cat([first_noise(model, case.seed, 1) for case in cases])
    report("64 images", seconds(lambda: list(generate(model, [(case, 0) for case in cases], 20, 4.0, 64)), 1),
           seconds(lambda: pipeline(["VanGogh"] * 64, num_inference_steps=20, guidance_scale=4.0, latents=noise), 1),
           "diffusers' pipeline")

    prompts = torch.randn(3, 77, 768, dtype=torch.float64)
    prompts[:, 0] = prompts[0, 0]
    rows = prompts.flatten(0, 1)
    for method in ("svd", "elimination"):
        report(f"null space by {method}", seconds(lambda: null_space(rows, method=method)),
               seconds(lambda: scipy.linalg.null_space(rows.numpy())), "scipy.linalg.null_space")


if __name__ == "__main__":
    cli.run(main)
