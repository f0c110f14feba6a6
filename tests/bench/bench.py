"""Speed and memory as ratios against a named baseline, each pair measured in this one process: `make bench`.

null space: 24 x 96 against sympy's elimination of the float32 embeddings, as in the original repository, extrapolated
to 231 x 768 by its number of operations, rows^2 x columns; and 231 x 768 against scipy.linalg.null_space.
iteration: one SRS-ME iteration of one latent, and of four, with Adam's, against the original repository's way (two
models, four passes, one latent after the other, gradients for the weights of the U-Net that trains too), in float32;
and without those gradients; and the peak memory of each, weights included.
erasure: three styles from the closed form to an accuracy of at most 10 %, against the same from zero by gradient.
eighteen: nine styles and nine objects in closed form, each protecting all others, the model loaded; then accuracies of
all merged, on concept names and on templates that no shift was made with, and of three left out while fifteen stay
merged.
generation: 64 images, 20 sampler steps, guidance on, against diffusers' StableDiffusionPipeline with the same scheduler
and batch; and merged weights against the original ones.
many: 100 concepts in closed form at Stable Diffusion v1's size, random weights, and embeddings whose spectrum falls as
CLIP's; the time and memory of the last ten against the first ten.
joint memory: the peak of three iterations on three concepts at once (SRS-ME-dagger), against that on one of them.
"""

import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
import scipy.linalg
import sympy
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from ldm.cli import arguments, session
from ldm.cli.run import run
from ldm.config.concepts import Concept, erasable_concepts, get_concept, watermark_prompts
from ldm.config.methods import SamplingConfig
from ldm.config.models import load_model_config
from ldm.diffusion.latents import noised_batches
from ldm.diffusion.load import load_model
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import SeededNoise, generate, initial_noise, sample_latents
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.closed_form import Costs, closed_form_map, erasure_space
from ldm.erasure.initial_shift import initial_shift
from ldm.erasure.losses import JointSRSMELoss, SRSMELoss
from ldm.erasure.merge import SummedShifts, applied
from ldm.erasure.null_space import NullSpaceBasis, leave_one_out_factors, null_space
from ldm.erasure.retain import RetainSet
from ldm.erasure.shift import EmbeddingShift, SeparableShift, WeightShift
from ldm.erasure.training import MomentumStopping, training_loop
from ldm.io.images import image_to_tensor
from ldm.io.paths import REPO_ROOT
from ldm.io.prompts import PromptCase
from ldm.metrics.classify import classifier_path, load_classifier

MODEL = REPO_ROOT / "models" / "mini-sd"


def seconds(*runs: Callable[[], object], repeat: int = 5) -> list[float]:
    """Return the median time of each of `runs` after one to warm up.

    They are run in turn, so that a slower minute of the machine meets all of them.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeat + 1):
        for measured, results in zip(runs, times, strict=True):
            start = time.perf_counter()
            measured()
            results.append(time.perf_counter() - start)
    return [sorted(results[1:])[repeat // 2] for results in times]


def report(name: str, ours: float, baseline: float, against: str) -> None:
    """Print a time and its ratio to the baseline's."""
    print(f"{name}: {ours:.3f} s, {ours / baseline:.2f} times {against} ({baseline:.3f} s)", flush=True)


def peak(measured: Callable[[], object]) -> int:
    """Return the most bytes that tensors made within `measured` hold at once."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measured()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        measured()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


def fit_basis(model: DiffusionModel, protected: Sequence[str], rank_rtol: float) -> NullSpaceBasis:
    """Return the basis that protects some prompts."""
    return NullSpaceBasis.fit(model.encode_prompt(list(protected)), protected, rank_rtol, "svd")


def joint_memory(model: DiffusionModel) -> None:
    """Print the peak memory of a joint iteration against that on one concept."""
    layers, uncond_embeds = text_layers(model.denoiser), model.encode_prompt([""])
    basis = fit_basis(model, ["", "watermark SRS-ME", "CCS 2024", "Picasso"], 1e-3)

    def make_losses(*prompts: str) -> list[SRSMELoss]:
        losses = []
        for prompt in prompts:
            shift = SeparableShift.zeros(layers, basis.vectors, 0.05)
            losses.append(SRSMELoss(model, shift, model.encode_prompt([prompt]), uncond_embeds, 1e-6))
        return losses

    def iterations(make_loss, batches) -> Callable[[], None]:
        def measured() -> None:
            loss = make_loss()  # within, so that its coefficients count
            for _ in itertools.islice(training_loop(loss, batches, 0.01), 3):
                pass

        return measured

    clean = torch.randn(4, *model.latent_shape)
    parts = [noised_batches(model, clean, 4, seed) for seed in range(3)]
    joint_batches = (tuple(zip(*batch, strict=True)) for batch in zip(*parts, strict=True))
    one = peak(iterations(lambda: make_losses("VanGogh")[0], noised_batches(model, clean, 4, 0)))
    three = peak(iterations(lambda: JointSRSMELoss(make_losses("VanGogh", "Cezanne", "Caravaggio")), joint_batches))
    ratio = f"{three / one:.2f} times one concept's ({one / 2**20:.1f} MiB)"
    print(f"joint memory: {three / 2**20:.1f} MiB, {ratio}", flush=True)


def embeds_like_clips(number: int, tokens: int, width: int) -> torch.Tensor:
    """Return embeddings (number, tokens, width) as CLIP's.

    All prompts share a first token, and the spectrum falls over four decades.
    """
    turned = torch.linalg.qr(torch.randn(width, width)).Q * torch.logspace(0, -4, width)[:, None]
    embeds = torch.randn(number, tokens, width) @ turned * 28
    embeds[:, 0] = 28 * torch.randn(width)
    return embeds


def null_spaces() -> None:
    """Print the time and residual of a null space against scipy's and sympy's."""
    torch.manual_seed(0)
    rows, few = (embeds_like_clips(*shape).double().flatten(0, 1) for shape in ((3, 77, 768), (3, 8, 96)))
    few = few.float().double()
    # Not in turn: numpy's threads go on waiting for a while, beside torch's.
    [svd], [elimination] = seconds(lambda: null_space(rows)), seconds(lambda: null_space(rows, method="elimination"))
    [theirs] = seconds(lambda: scipy.linalg.null_space(rows.numpy()))
    report("null space by svd", svd, theirs, "scipy.linalg.null_space")
    report("null space by elimination", elimination, theirs, "scipy.linalg.null_space")
    start = time.perf_counter()
    exact = sympy.Matrix(few.float().numpy()).nullspace()  # sympy keeps the 24 bits of a float32
    small = time.perf_counter() - start
    growth = (231**2 * 768) / (24**2 * 96)
    vectors = torch.tensor([[float(value) for value in vector] for vector in exact], dtype=torch.float64)
    their_residual = (few @ (vectors / vectors.norm(dim=1, keepdim=True)).T).abs().max().item()
    residual = (few @ null_space(few)[0].T).abs().max().item()
    print(
        f"null space, sympy at 24 x 96: {small:.2f} s, extrapolated to 231 x 768: {small * growth:.0f} s, "
        f"{small * growth / svd:,.0f} times ours; residual {their_residual:.1e}, "
        f"{their_residual / residual:,.0f} times ours ({residual:.1e})",
        flush=True,
    )


def num_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def iteration(model: DiffusionModel) -> None:
    """Print the time and memory of an iteration against the original's way."""
    layers = text_layers(model.denoiser)
    target_embeds, uncond_embeds = model.encode_prompt(["VanGogh"]), model.encode_prompt([""])
    basis = fit_basis(model, ["", "watermark SRS-ME", "CCS 2024", "Picasso"], 5e-4)
    config, concept = load_model_config(model).methods["SRS-ME"], get_concept("style", 1)
    loss = SRSMELoss.from_config(
        model, concept, config, initial_shift(model, concept, config, basis, RetainSet(model, ()))
    )
    frozen = copy.deepcopy(model.denoiser)
    zeros = SeparableShift.zeros(layers, basis.vectors, 0.05)
    original_loss = SRSMELoss(model, zeros, target_embeds, uncond_embeds, 1e-6)
    original_loss.grad_scale = 1.0  # its own call alone scales gradients
    adam = torch.optim.Adam(loss.parameters(), config.lr)
    original_adam = torch.optim.Adam(original_loss.parameters(), config.lr)

    def ours(latents: torch.Tensor, timesteps: torch.Tensor) -> None:
        adam.zero_grad()
        loss(latents, timesteps).loss.backward()
        adam.step()

    def frozen_weights(latents: torch.Tensor, timesteps: torch.Tensor) -> None:
        for z, t in zip(latents.split(1), timesteps.split(1), strict=True):
            with torch.no_grad():
                old = frozen(z, t, target_embeds).sample - frozen(z, t, uncond_embeds).sample
            with original_loss.edited_model():
                new = model.predict_noise(z, t, target_embeds) - model.predict_noise(z, t, uncond_embeds)
            sizes = [(weight @ original_loss.directions).abs().sum() for weight in original_loss.parameters()]
            ((new * old).mean() + 1e-6 * sum(sizes)).backward()
            original_adam.step()

    def original(latents: torch.Tensor, timesteps: torch.Tensor) -> None:
        model.denoiser.requires_grad_(True)
        frozen_weights(latents, timesteps)
        model.denoiser.requires_grad_(False)

    for batch_size in (1, 4):
        clean = torch.randn(batch_size, *model.latent_shape)
        batch = next(noised_batches(model, clean, batch_size, 0))
        ways = [partial(way, *batch) for way in (ours, original, frozen_weights)]
        time_ours, time_original, time_frozen = seconds(*ways, repeat=25)
        report(f"iteration of {batch_size} latents", time_ours, time_original, "the original's way")
        report("  without gradients for weights", time_ours, time_frozen, "it")
        model.denoiser.zero_grad(set_to_none=True)
        peak_ours = peak(ways[0]) + num_bytes(model.denoiser)
        peak_original = peak(ways[1]) + 2 * num_bytes(model.denoiser)
        ratio = f"{peak_ours / peak_original:.2f} times the original's ({peak_original / 2**20:.1f} MiB)"
        print(f"  peak: {peak_ours / 2**20:.1f} MiB with weights, {ratio}", flush=True)


def accuracies(
    model: DiffusionModel, shifts: Sequence[WeightShift], category: str, prompts: Sequence[tuple[Concept, str]]
) -> list[int]:
    """Return how many of 20 images of each prompt show its concept, in per cent, with the shifts merged."""
    cases = []
    for k, (_, prompt) in enumerate(prompts):
        cases += [PromptCase(prompt, seed, 20 * k + seed) for seed in range(20)]
    sampling = SamplingConfig(num_inference_steps=20, guidance_scale=1.5, sample_batch_size=60)
    with applied(model.denoiser, shifts):
        images = [image_to_tensor(image) for _, _, image in generate(model, [(case, 0) for case in cases], sampling)]
    classifier, _ = load_classifier(classifier_path(category), model.device)
    predicted = classifier(torch.stack(images)).argmax(1).view(-1, 20)
    results = []
    for (concept, _), row in zip(prompts, predicted, strict=True):
        results.append(round(100 * (row == concept.index + 1).float().mean().item()))
    return results


def eighteen(model: DiffusionModel) -> None:
    """Print the time of eighteen closed forms, and what they erase."""
    config = load_model_config(model)
    concepts: list[Concept] = []
    for category in ("style", "object"):
        concepts += erasable_concepts(category)
    fixed, names = ["", *watermark_prompts()], [concept.prompt for concept in concepts]

    def erase_all() -> list[WeightShift]:
        embeds = dict(zip([*fixed, *names], model.encode_prompt([*fixed, *names]), strict=True))
        fixed_rows = torch.cat([embeds[prompt] for prompt in fixed])
        factors = leave_one_out_factors([embeds[name] for name in names], fixed_rows)
        shifts: list[WeightShift] = []
        for concept, factor in zip(concepts, factors, strict=True):
            protected = [prompt for prompt in embeds if prompt != concept.prompt]
            protected_embeds = [embeds[prompt] for prompt in protected]
            basis = NullSpaceBasis.fit(protected_embeds, protected, config.null_space.rank_rtol, "svd", factor)
            shifts.append(initial_shift(model, concept, config.methods["SRS-ME"], basis, RetainSet(model, ())))
        return shifts

    start = time.perf_counter()
    shifts = erase_all()  # the first time, the vocabulary encoded too
    print(f"eighteen concepts in closed form: {time.perf_counter() - start:.2f} s", flush=True)
    left_out = ("VanGogh", "church", "garbage truck")
    others = [shift for shift, name in zip(shifts, names, strict=True) if name not in left_out]
    for category in ("style", "object"):
        own = erasable_concepts(category)
        by_name = [(concept, concept.prompt) for concept in own]
        restored = [(concept, prompt) for concept, prompt in by_name if prompt in left_out]
        held_out = [(concept, concept.held_out_prompts[0]) for concept in own]
        print(
            f"  {category}: accuracy {accuracies(model, [], category, by_name)} % before, "
            f"{accuracies(model, shifts, category, by_name)} % with all merged, "
            f"held out {accuracies(model, shifts, category, held_out)} %; "
            f"{', '.join(prompt for _, prompt in restored)} left out: "
            f"{accuracies(model, others, category, restored)} %",
            flush=True,
        )


def erasures(model: DiffusionModel) -> None:
    """Print the time of three erasures in closed form against training them."""
    config, concepts = load_model_config(model), [get_concept("style", index) for index in range(3)]
    names, uncond_embeds = [concept.prompt for concept in concepts], model.encode_uncond()
    bases, latents = {}, {}
    for concept in concepts:
        protected = ["", "watermark SRS-ME", "CCS 2024", *(name for name in names if name != concept.prompt)]
        bases[concept] = fit_basis(model, protected, config.null_space.rank_rtol)
        noise = torch.cat([initial_noise(model, 10_000 + seed, 1) for seed in range(32)])
        embeds = model.encode_prompt([concept.prompt]).expand(32, -1, -1)
        latents[concept] = sample_latents(
            model, SeededNoise(noise, [torch.Generator()]), embeds, uncond_embeds, 20, 1.5
        )

    def erase_all(**changes: object) -> tuple[float, list[WeightShift]]:
        method = config.methods["SRS-ME"].with_changes(**changes)
        start, shifts = time.perf_counter(), []
        for concept in concepts:
            shift = initial_shift(model, concept, method, bases[concept], RetainSet(model, ()))
            if method.trains:
                loss = SRSMELoss.from_config(model, concept, method, shift)
                stopping = MomentumStopping(method.stop_threshold)
                batches = noised_batches(model, latents[concept], method.train_batch_size, 0)
                for step in itertools.islice(training_loop(loss, batches, method.lr), method.max_steps):
                    if stopping.update(step):
                        break
            shifts.append(shift)
        return time.perf_counter() - start, shifts

    styles = [(concept, concept.prompt) for concept in erasable_concepts("style")]
    before = accuracies(model, [], "style", styles)
    closed_form = {"mode": "closed_form", "init": "closed_form"}
    erase_all(**closed_form)  # to warm up: the vocabulary is encoded once for a model
    times = {}
    for name, changes in (("closed form", closed_form), ("zero", {"mode": "learn", "init": "zero", "max_steps": 300})):
        times[name], shifts = erase_all(**changes)
        after = accuracies(model, shifts, "style", styles)
        print(
            f"three styles erased from {name}: {times[name]:.2f} s; accuracy {after[:3]} % (before {before[:3]}), "
            f"regular {sum(after[3:]) / 6:.1f} % (before {sum(before[3:]) / 6:.1f})",
            flush=True,
        )
    print(f"  from the closed form: {times['zero'] / times['closed form']:.0f} times faster", flush=True)


def generation(model: DiffusionModel) -> None:
    """Print the time of 64 images against diffusers' pipeline."""
    cases = [PromptCase("VanGogh", seed, seed) for seed in range(64)]
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None, dtype=torch.float32)
    pipeline = pipeline.to(model.device)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.cat([initial_noise(model, case.seed, 1) for case in cases])
    sampling = SamplingConfig(num_inference_steps=20, guidance_scale=4.0, sample_batch_size=64)

    def ours() -> list[object]:
        return list(generate(model, [(case, 0) for case in cases], sampling))

    shift = SeparableShift.zeros(text_layers(model.denoiser), torch.eye(model.context_dim)[:3], 1.0)

    def merged() -> None:
        with applied(model.denoiser, [shift]):
            ours()

    def theirs() -> None:
        pipeline(["VanGogh"] * 64, num_inference_steps=20, guidance_scale=4.0, latents=noise)

    time_ours, time_merged, time_theirs = seconds(ours, merged, theirs)
    report("64 images", time_ours, time_theirs, "diffusers' pipeline")
    report("64 images, merged", time_merged, time_ours, "the original model")


def many(number: int = 100) -> None:
    """Print what a concept costs in the algebra alone, with its basis and its shift written to a file."""
    torch.manual_seed(0)
    layers = {}
    for k, width in enumerate([320] * 5 + [640] * 5 + [1280] * 6):
        for part in ("to_k", "to_v"):
            layers[f"{k}.{part}"] = nn.Linear(768, width, bias=False)
    embeds = embeds_like_clips(number + 30, 77, 768)
    embeds, vocab = embeds[: number + 3], embeds[number + 3 :].flatten(0, 1).double()
    costs = Costs(0.01, 1.0, 10 * vocab.T @ vocab / 27)
    fixed_rows, own = embeds[:3].flatten(0, 1), embeds[3:]
    names = [str(k) for k in range(number + 3)]
    process, times, memory = psutil.Process(), [], []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for k, factor in enumerate(leave_one_out_factors(list(own), fixed_rows)):
            others = torch.cat([embeds[: 3 + k], embeds[4 + k :]])
            basis = NullSpaceBasis.fit(others, names[: 3 + k] + names[4 + k :], 2e-3, "svd", factor)
            basis.save(Path(folder) / f"basis-{k}.safetensors")
            target_embeds = own[k : k + 1]
            space = erasure_space(basis.vectors, basis.protected, target_embeds, costs)
            embedding_map = closed_form_map(space, target_embeds, embeds[:1])
            shift = EmbeddingShift(embedding_map, space.directions)
            shift.save(Path(folder) / f"shift-{k}.safetensors", {})
            times.append(time.perf_counter() - start)
            memory.append(process.memory_info().rss)
        each = [later - earlier for earlier, later in itertools.pairwise([0.0, *times])]
        print(
            f"many: {number} concepts at Stable Diffusion v1's size, bases and shifts written: {times[-1]:.1f} s; "
            f"a concept of the last ten {sum(each[-10:]) / sum(each[:10]):.2f} times one of the first ten; "
            f"memory {memory[-1] / 2**20:.0f} MiB, {memory[-1] / memory[9]:.2f} times that after ten; "
            f"rank {basis.metadata['rank']} of 768, {len(space.directions)} directions a shift",
            flush=True,
        )
        start = time.perf_counter()
        shifts = [WeightShift.load(Path(folder) / f"shift-{k}.safetensors") for k in range(number)]
        size = sum(path.stat().st_size for path in Path(folder).glob("shift-*"))
        print(f"  reading their files, {size / 2**20:.0f} MiB: {time.perf_counter() - start:.1f} s", flush=True)
    rank = len(space.directions)
    drawn = [EmbeddingShift(torch.randn(768, rank), torch.randn(rank, 768) / 768) for _ in range(1000)]
    together, one = partial(merge_all, layers, shifts), partial(merge_all, layers, shifts[:1])
    time_together, time_one, time_drawn = seconds(together, one, partial(merge_all, layers, drawn))
    report(f"merging {number} concepts into its text layers", time_together, time_one, "merging one")
    report(f"merging 1,000 random ones of rank {rank}", time_drawn, time_one, "merging one")


def merge_all(layers: dict[str, nn.Linear], shifts: Sequence[WeightShift]) -> None:
    """Make the weights of all text layers with shifts in them."""
    summed = SummedShifts(shifts, layers)
    for name, layer in layers.items():
        summed.merged(layer.weight, f"{name}.weight")


def main() -> None:
    parts: dict[str, Callable[[], None]] = {"null space": null_spaces, "many": many}
    with_model = {
        "iteration": iteration,
        "erasure": erasures,
        "eighteen": eighteen,
        "generation": generation,
        "joint memory": joint_memory,
    }
    parser = arguments.make_parser(__doc__)
    parser.option("only", default=None, help=f"one of {', '.join([*parts, *with_model])}")
    arguments.add_device(parser)
    args = parser.parse_args()
    if args.only not in (None, *parts, *with_model):
        raise ValueError(f"`only` {args.only}: give one of {', '.join([*parts, *with_model])}")
    model = load_model(MODEL, session.first_device(args))
    for name, part in parts.items():
        if args.only in (None, name):
            part()
    for name, part in with_model.items():
        if args.only in (None, name):
            part(model)


if __name__ == "__main__":
    run(main)
