"""Speed and memory as ratios against a named baseline, each pair measured in this one process: `make bench`.

null space: 24 x 96 against sympy's elimination of the float32 embeddings, as in the original repository, extrapolated to 231 x 768
by its number of operations, rows^2 x columns; and 231 x 768 against scipy.linalg.null_space.
step: one SRS-ME step of one latent, and of four, with Adam's, against the original repository's way (two models, four passes, one
latent after the other, gradients for the weights of the U-Net that learns too), in float32; and without those gradients; and the peak
memory of each, weights included.
erasure: three styles from the closed form to an accuracy of at most 10 %, against the same from zero by gradient.
eighteen: nine styles and nine objects in closed form, each protecting all others, the model loaded; then accuracies of all merged, on
bare names and on templates that no shift was made with, and of three left out while fifteen stay merged.
generation: 64 images, 20 steps, guidance on, against diffusers' StableDiffusionPipeline with the same scheduler and batch; and
merged weights against the original ones.
many: 100 concepts in closed form at Stable Diffusion v1's size, random weights, and embeddings whose spectrum falls as CLIP's;
the time and memory of the last ten against the first ten.
joint memory: the peak of three steps on three concepts at once (SRS-ME-dagger), against that on one of them.
"""

import copy
import itertools
import tempfile
import time
from pathlib import Path

import psutil
import scipy.linalg
import sympy
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from ldm import cli
from ldm.diffusion.text_layers import text_layers
from ldm.config.concepts import Concept, erasable_concepts, get_concept, watermark_prompts
from ldm.io.paths import REPO_ROOT
from ldm.io.images import image_to_tensor
from ldm.io.prompts import PromptCase
from ldm.diffusion.latents import noised_batches
from ldm.erasure.losses import JointSRSMELoss, SRSMELoss
from ldm.metrics.classify import classifier_path, load_classifier
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.erasure.null_space import NullSpaceBasis, leave_one_out_factors, null_space
from ldm.diffusion.sampling import generate, initial_noise, sample_latents
from ldm.erasure.merge import applied, merged_weight
from ldm.erasure.shift import SeparableShift, WeightShift
from ldm.erasure.training import MomentumStopping, training_loop

MODEL = REPO_ROOT / "models" / "mini-sd"


def seconds(*runs, repeat: int = 5) -> list[float]:
    """The median time of each after one to warm up, taken in turn, so that a slower minute of the machine meets all of them."""
    times = [[] for _ in runs]
    for k in range(repeat + 1):
        for run, own in zip(runs, times):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [sorted(own[1:])[repeat // 2] for own in times]


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
        return [SRSMELoss(model, layers, SeparableShift.zeros(layers, basis.vectors, 0.05), model.encode_prompt([prompt]),
                                 blank, 1e-6) for prompt in prompts]

    def steps(build, batches):
        def run():
            loss = build()  # within, so that its coefficients count
            for _ in itertools.islice(training_loop(loss, loss.parameters(), batches, 0.01), 3):
                pass
        return run

    pictures = torch.randn(4, *model.latent_shape)
    together = (tuple(zip(*parts)) for parts in zip(*(noised_batches(model, pictures, 4, seed) for seed in range(3))))
    one = peak(steps(lambda: losses("VanGogh")[0], noised_batches(model, pictures, 4, 0)))
    three = peak(steps(lambda: JointSRSMELoss(losses("VanGogh", "Cezanne", "Caravaggio")), together))
    print(f"joint memory: {three / 2**20:.1f} MiB, {three / one:.2f} times one concept's ({one / 2**20:.1f} MiB)", flush=True)


def prompts_like(number: int, tokens: int, width: int) -> torch.Tensor:
    """Embeddings (number, tokens, width) as CLIP's: a first token that all prompts share, and a spectrum that falls over four
    decades."""
    turned = torch.linalg.qr(torch.randn(width, width)).Q * torch.logspace(0, -4, width)[:, None]
    prompts = torch.randn(number, tokens, width) @ turned * 28
    prompts[:, 0] = 28 * torch.randn(width)
    return prompts


def null_spaces() -> None:
    torch.manual_seed(0)
    rows, few = (prompts_like(*shape).double().flatten(0, 1) for shape in ((3, 77, 768), (3, 8, 96)))
    few = few.float().double()
    # Not in turn: numpy's threads go on waiting for a while, beside torch's.
    [svd], [elimination] = seconds(lambda: null_space(rows)), seconds(lambda: null_space(rows, method="elimination"))
    [theirs] = seconds(lambda: scipy.linalg.null_space(rows.numpy()))
    report("null space by svd", svd, theirs, "scipy.linalg.null_space")
    report("null space by elimination", elimination, theirs, "scipy.linalg.null_space")
    start = time.perf_counter()
    exact = sympy.Matrix(few.float().numpy()).nullspace()  # sympy keeps the 24 bits of a float32
    small = time.perf_counter() - start
    growth = (231 ** 2 * 768) / (24 ** 2 * 96)
    vectors = torch.tensor([[float(value) for value in vector] for vector in exact], dtype=torch.float64)
    theirs = (few @ (vectors / vectors.norm(dim=1, keepdim=True)).T).abs().max().item()
    own = (few @ null_space(few)[0].T).abs().max().item()
    print(f"null space, sympy at 24 x 96: {small:.2f} s, extrapolated to 231 x 768: {small * growth:.0f} s, {small * growth / svd:,.0f} "
          f"times ours; residual {theirs:.1e}, {theirs / own:,.0f} times ours ({own:.1e})", flush=True)


def weights_of(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def step(model, layers) -> None:
    concept, blank = model.encode_prompt(["VanGogh"]), model.encode_prompt([""])
    protected = ["", "watermark SRS-ME", "CCS 2024", "Picasso"]
    basis = NullSpaceBasis.solve(model.encode_prompt(protected), protected, 5e-4, "svd", {})
    given = load_model_config(model.base).erasure["SRS-ME"]
    loss = SRSMELoss.of(model, get_concept("style", 1), given, basis)
    frozen = copy.deepcopy(model.unet)
    full = SRSMELoss(model, layers, SeparableShift.zeros(layers, basis.vectors, 0.05), concept, blank, 1e-6)
    full.grad_scale = 1.0  # its own call alone lifts gradients
    own_adam, adam = torch.optim.Adam(loss.parameters(), given.lr), torch.optim.Adam(full.parameters(), given.lr)

    for size in (1, 4):
        latents, when = next(noised_batches(model, torch.randn(size, *model.latent_shape), size, 0))

        def ours():
            own_adam.zero_grad()
            loss(latents, when).total.backward()
            own_adam.step()

        def frozen_weights():
            for z, t in zip(latents.split(1), when.split(1)):
                with torch.no_grad():
                    old = frozen(z, t, concept).sample - frozen(z, t, blank).sample
                with full.active():
                    new = model.predict_noise(z, t, concept) - model.predict_noise(z, t, blank)
                change = sum((weight @ full.directions).abs().sum() for weight in full.parameters())
                ((new * old).mean() + 1e-6 * change).backward()
                adam.step()

        def original():
            model.unet.requires_grad_(True)
            frozen_weights()
            model.unet.requires_grad_(False)

        own, theirs, less = seconds(ours, original, frozen_weights, repeat=25)
        report(f"step of {size} latents", own, theirs, "the original's way")
        report("  without gradients for weights", own, less, "it")
        model.unet.zero_grad(set_to_none=True)
        most, most_theirs = peak(ours) + weights_of(model.unet), peak(original) + 2 * weights_of(model.unet)
        print(f"  peak: {most / 2**20:.1f} MiB with weights, {most / most_theirs:.2f} times the original's ({most_theirs / 2**20:.1f} MiB)",
              flush=True)


def accuracies(model, shifts: list[WeightShift], category: str, said: list[tuple[Concept, str]]) -> list[int]:
    """How many of 20 pictures of each prompt show its concept, in per cent, with the shifts merged."""
    cases = [PromptCase(prompt, seed, 20 * k + seed) for k, (_, prompt) in enumerate(said) for seed in range(20)]
    with applied(model.unet, shifts):
        drawn = list(generate(model, [(case, 0) for case in cases], 20, 1.5, 60))
    classifier, _ = load_classifier(classifier_path(category), model.device)
    found = classifier(torch.stack([image_to_tensor(image) for _, _, image in drawn])).argmax(1).view(-1, 20)
    return [round(100 * (row == concept.index + 1).float().mean().item()) for (concept, _), row in zip(said, found)]


def eighteen(model) -> None:
    given = load_model_config(model.base)
    concepts = [(category, concept) for category in ("style", "object") for concept in erasable_concepts(category)]
    fixed, names = ["", *watermark_prompts()], [concept.prompt for _, concept in concepts]

    def erased() -> list[WeightShift]:
        embeddings = dict(zip([*fixed, *names], model.encode_prompt([*fixed, *names])))
        rows = leave_one_out_factors([embeddings[name] for name in names], torch.cat([embeddings[prompt] for prompt in fixed]))
        shifts = []
        for (_, concept), triangle in zip(concepts, rows):
            protected = [prompt for prompt in embeddings if prompt != concept.prompt]
            basis = NullSpaceBasis.solve([embeddings[prompt] for prompt in protected], protected, given.solution.tolerance, "svd", {},
                                         triangle)
            shifts.append(SRSMELoss.of(model, concept, given.erasure["SRS-ME"], basis).shift())
        return shifts

    start = time.perf_counter()
    shifts = erased()  # the first time, the vocabulary encoded too
    print(f"eighteen concepts in closed form: {time.perf_counter() - start:.2f} s", flush=True)
    left = ("VanGogh", "church", "garbage truck")
    rest = [shift for shift, name in zip(shifts, names) if name not in left]
    for category in ("style", "object"):
        own = [concept for kind, concept in concepts if kind == category]
        bare = [(concept, concept.prompt) for concept in own]
        back = [(concept, prompt) for concept, prompt in bare if prompt in left]
        held = [(concept, concept.held_out[0].format(concept.prompt)) for concept in own]
        print(f"  {category}: accuracy {accuracies(model, [], category, bare)} % before, {accuracies(model, shifts, category, bare)} % "
              f"with all merged, held out {accuracies(model, shifts, category, held)} %; {', '.join(prompt for _, prompt in back)} left "
              f"out: {accuracies(model, rest, category, back)} %", flush=True)


def erasures(model) -> None:
    given, concepts = load_model_config(model.base), [get_concept("style", index) for index in range(3)]
    names, blank = [concept.prompt for concept in concepts], model.encode_uncond()
    bases, pictures = {}, {}
    for concept in concepts:
        protected = ["", "watermark SRS-ME", "CCS 2024", *(name for name in names if name != concept.prompt)]
        bases[concept] = NullSpaceBasis.solve(model.encode_prompt(protected), protected, given.solution.tolerance, "svd", {})
        noise = torch.cat([initial_noise(model, 10_000 + seed, 1) for seed in range(32)])
        pictures[concept] = sample_latents(model, noise, model.encode_prompt([concept.prompt]).expand(32, -1, -1), blank, 20, 1.5)

    def erased(init: str, steps: int) -> tuple[float, list[WeightShift]]:
        start, shifts = time.perf_counter(), []
        for concept in concepts:
            own = given.erasure["SRS-ME"] | {"init": init, "iter_break": steps}
            loss, stop = SRSMELoss.of(model, concept, own, bases[concept]), MomentumStopping(own.threshold)
            batches = noised_batches(model, pictures[concept], own.batch_size, 0)
            for done in itertools.islice(training_loop(loss, loss.parameters(), batches, own.lr), steps):
                if stop.update(done):
                    break
            shifts.append(loss.shift())
        return time.perf_counter() - start, shifts

    styles = [(concept, concept.prompt) for concept in erasable_concepts("style")]
    before = accuracies(model, [], "style", styles)
    erased("closed-form", 0)  # to warm up: the vocabulary is encoded once for a model
    times = {}
    for init, steps in (("closed-form", 0), ("zero", 300)):
        times[init], shifts = erased(init, steps)
        after = accuracies(model, shifts, "style", styles)
        print(f"three styles erased from {init}: {times[init]:.2f} s; accuracy {after[:3]} % (before {before[:3]}), regular "
              f"{sum(after[3:]) / 6:.1f} % (before {sum(before[3:]) / 6:.1f})", flush=True)
    print(f"  from the closed form: {times['zero'] / times['closed-form']:.0f} times faster", flush=True)


def generation(model) -> None:
    cases = [PromptCase("VanGogh", seed, seed) for seed in range(64)]
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None, dtype=torch.float32).to(model.device)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.cat([initial_noise(model, case.seed, 1) for case in cases])

    def ours():
        return list(generate(model, [(case, 0) for case in cases], 20, 4.0, 64))

    shift = SeparableShift.zeros(text_layers(model.unet), torch.eye(model.width)[:3], 1.0)

    def merged():
        with applied(model.unet, [shift]):
            ours()

    own, same, theirs = seconds(ours, merged, lambda: pipeline(["VanGogh"] * 64, num_inference_steps=20, guidance_scale=4.0, latents=noise))
    report("64 images", own, theirs, "diffusers' pipeline")
    report("64 images, merged", same, own, "the original model")


def many(number: int = 100) -> None:
    """Without a text encoder: what a concept costs in the algebra, with its basis and its shift written to a file."""
    torch.manual_seed(0)
    outs = [320] * 5 + [640] * 5 + [1280] * 6
    layers = {f"{k}.{part}": nn.Linear(768, out, bias=False) for k, out in enumerate(outs) for part in ("to_k", "to_v")}
    prompts = prompts_like(number + 30, 77, 768)
    prompts, vocabulary = prompts[:number + 3], prompts[number + 3:].flatten(0, 1).double()
    spared = 10 * vocabulary.T @ vocabulary / 27
    rest, own = prompts[:3].flatten(0, 1), prompts[3:]
    names = [str(k) for k in range(number + 3)]
    process, times, memory = psutil.Process(), [], []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for k, rows in enumerate(leave_one_out_factors(list(own), rest)):
            others = torch.cat([prompts[:3 + k], prompts[4 + k:]])
            basis = NullSpaceBasis.solve(others, names[:3 + k] + names[4 + k:], 2e-3, "svd", {}, rows)
            basis.save(Path(folder) / f"basis-{k}.safetensors")
            acting, cost = basis.directions(own[k:k + 1], None, 0.01, 1.0, spared)
            shift = SeparableShift.closed_form(layers, acting, 0.05, own[k:k + 1], prompts[:1], cost)
            shift.save(Path(folder) / f"shift-{k}.safetensors", {})
            times.append(time.perf_counter() - start)
            memory.append(process.memory_info().rss)
        each = [later - earlier for earlier, later in zip([0.0, *times], times)]
        print(f"many: {number} concepts at Stable Diffusion v1's size, bases and shifts written: {times[-1]:.1f} s; a concept of the last "
              f"ten {sum(each[-10:]) / sum(each[:10]):.2f} times one of the first ten; memory {memory[-1] / 2**20:.0f} MiB, "
              f"{memory[-1] / memory[9]:.2f} times that after ten; rank {basis.metadata['rank']} of 768, {len(acting)} directions a shift",
              flush=True)
        before, start = process.memory_info().rss, time.perf_counter()
        shifts = [WeightShift.load(Path(folder) / f"shift-{k}.safetensors") for k in range(number)]
        most = 0
        for name, layer in layers.items():
            merged_weight(layer.weight, f"{name}.weight", shifts)
            most = max(most, process.memory_info().rss - before)
        size = sum(path.stat().st_size for path in Path(folder).glob("shift-*"))
        print(f"  merging them: {time.perf_counter() - start:.1f} s, {most / 2**20:.0f} MiB more, {most / size:.2f} times the shifts' files "
              f"({size / 2**20:.0f} MiB)", flush=True)


def main() -> None:
    parser = cli.parser(__doc__)
    parts = {"null space": null_spaces, "many": many}
    parser.add_argument("--only", default=None, help="one of null space, step, erasure, eighteen, generation, many, joint memory")
    cli.add_device(parser)
    args = parser.parse_args()
    model = load_model(MODEL, cli.parse_devices(args.device)[0])
    layers = text_layers(model.unet)
    protected = ["", "watermark SRS-ME", "CCS 2024", "Picasso"]
    basis = NullSpaceBasis.solve(model.encode_prompt(protected), protected, 1e-3, "svd", {})
    parts |= {"step": lambda: step(model, layers), "erasure": lambda: erasures(model), "eighteen": lambda: eighteen(model),
              "generation": lambda: generation(model), "joint memory": lambda: joint_memory(model, layers, basis, model.encode_prompt([""]))}
    if args.only and args.only not in parts:
        raise ValueError(f"--only {args.only}: give one of {', '.join(parts)}")
    for name, part in parts.items():
        if args.only in (None, name):
            part()


if __name__ == "__main__":
    cli.run(main)
