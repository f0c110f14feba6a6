"""Probes of what an erasure does to everything else: neighbours, what is restored, and watermarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch

from ldm.config.concepts import Concept, erasable_concepts, watermark_prompts
from ldm.config.everyday import PROMPT_LISTS, compositions_of, everyday_prompts
from ldm.config.spellings import says
from ldm.experiments.probe import UNCHANGED, UNEDITED, Bench, Finding, Subject
from ldm.io.files import atomic_write
from ldm.io.prompts import PromptCase
from ldm.metrics.lpips import pairwise_metrics

LPIPS = "LPIPS to the unedited model"
_TIMESTEPS = (0.5, 0.9)  # of all, at which predictions are compared
_DRAWN = 40  # of the prompts whose predictions change most
_SHOWN = 20  # of these, whose images change most


class Neighbours:
    """(h) Which of all prompts that nothing protects change most?

    Of each prompt the model's predictions are compared with the unedited ones, on one noise at two timesteps; images
    are made of the 40 that change most, and the 20 whose images change most are listed in neighbours.csv.
    """

    name: ClassVar[str] = "neighbours"
    is_slow: ClassVar[bool] = False
    is_of_all: ClassVar[bool] = True

    def __init__(self) -> None:
        self._unedited: torch.Tensor | None = None  # predictions, (prompts, timesteps, ...)

    def measure(self, bench: Bench, subject: Subject, concept: Concept) -> list[Finding]:
        """Return the mean and the largest LPIPS of the twenty, and the share of prompts whose predictions stay."""
        everything = grouped_prompts(bench.category)
        numbers = {prompt: number for number, prompt in enumerate(everything)}
        prompts = unprotected_prompts(everything, bench.erased)
        bench.model.notify_of_cuts(prompts, is_brief=True)
        if self._unedited is None:
            self._unedited = _predictions(bench, UNEDITED, list(prompts))
        changes = (_predictions(bench, subject, list(prompts)) - self._unedited).flatten(1)
        sizes = changes.norm(dim=1) / self._unedited.flatten(1).norm(dim=1)
        chosen = sorted(sizes.argsort(descending=True, stable=True)[:_DRAWN].tolist())
        # A prompt's number and seed are its own, whichever others change most, and whatever is erased.
        made = [list(prompts)[position] for position in chosen]
        cases = [PromptCase(prompt, bench.seed + numbers[prompt], numbers[prompt]) for prompt in made]
        place, base = bench.folder / subject.folder / self.name, bench.folder / UNEDITED.folder / self.name
        with bench.edited(subject):
            own = bench.generate_here(subject, place, cases)
        metrics = pairwise_metrics(bench.generate_here(UNEDITED, base, cases), own, bench.model.device)
        table = pd.DataFrame({"prompt": made, "group": [prompts[prompt] for prompt in made], "lpips": metrics["lpips"]})
        table = table.sort_values("lpips", ascending=False, kind="stable")[:_SHOWN]
        with atomic_write(place / "neighbours.csv") as partial:
            table.to_csv(partial, index=False)
        stay = int((sizes == 0).sum())
        return [
            Finding(f"the {len(table)} most changed", LPIPS, len(table), float(table["lpips"].mean())),
            Finding("the most changed", LPIPS, 1, float(table["lpips"].max())),
            Finding.share("all", stay, len(prompts), "predictions unchanged"),
        ]

    def floor(self, bench: Bench, concept: Concept) -> list[Finding]:
        """Return nothing: what does not change is the floor."""
        return []


def grouped_prompts(category: str) -> dict[str, str]:
    """Return the prompts that nothing protects, those that say the concepts of a category last, each with its group."""
    groups = {name: everyday_prompts(name) for name in PROMPT_LISTS}
    groups["other concepts"] = []
    for other in erasable_concepts(category):
        groups["other concepts"] += [*other.held_out_prompts, *compositions_of(other, category, 9)]
    found: dict[str, str] = {}
    for name, prompts in groups.items():
        found |= {prompt: name for prompt in prompts if prompt not in found}
    return found


def unprotected_prompts(grouped: Mapping[str, str], erased: Sequence[Concept]) -> dict[str, str]:
    """Return those of `grouped_prompts` that say no erased concept."""
    spellings = [spelling for concept in erased for spelling in concept.spellings]
    return {prompt: group for prompt, group in grouped.items() if not says(prompt, spellings)}


@torch.no_grad()
def _predictions(bench: Bench, subject: Subject, prompts: Sequence[str]) -> torch.Tensor:
    """Return a subject's predictions for prompts, (prompts, timesteps, ...), each by itself on the same noise."""
    model = bench.model
    noise = torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(bench.seed)).to(model.device)
    times = [torch.tensor(int(part * model.num_train_timesteps), device=model.device) for part in _TIMESTEPS]
    found: list[torch.Tensor] = []
    with bench.edited(subject):
        for start in range(0, len(prompts), bench.sampling.sample_batch_size):
            rows = model.encode_prompt(list(prompts[start : start + bench.sampling.sample_batch_size]))
            latents = noise.expand(len(rows), *noise.shape)
            each = [model.predict_noise(latents, time.expand(len(rows)), rows) for time in times]
            found.append(torch.stack(each, dim=1).cpu())
    return torch.cat(found)


class Restoration:
    """(i) Is a concept whose shift is left out as it was, in its name, templates, compositions and long prompts?"""

    name: ClassVar[str] = "restoration"
    is_slow: ClassVar[bool] = False
    is_of_all: ClassVar[bool] = True

    def measure(self, bench: Bench, subject: Subject, concept: Concept) -> list[Finding]:
        """Return how far images of the restored concepts are from the unedited ones, and how many are the same."""
        findings: list[Finding] = []
        for kind in ("names", "templates", "compositions", "long prompts"):
            own: list[Path] = []
            before: list[Path] = []
            shown: list[bool] = []
            for restored in bench.restored:
                prompts = _restored_prompts(bench, restored)[kind]
                if not prompts:
                    continue
                place = bench.place(subject, restored, self.name, kind)
                made = bench.generate(subject, place, prompts)
                shown += bench.judge.shows(made, restored) if bench.judge.knows(restored) else []
                own += made
                before += bench.generate(UNEDITED, bench.place(UNEDITED, restored, self.name, kind), prompts)
            if own:
                metrics = pairwise_metrics(before, own, bench.model.device)
                findings += [Finding.share(kind, sum(shown), len(shown))] if shown else []
                findings.append(Finding(kind, LPIPS, len(own), float(metrics["lpips"].mean())))
                findings.append(Finding.share(kind, int((metrics["max_abs_diff"] <= 1).sum()), len(own), UNCHANGED))
        return findings

    def floor(self, bench: Bench, concept: Concept) -> list[Finding]:
        """Return nothing: what is restored has none."""
        return []


def _restored_prompts(bench: Bench, concept: Concept) -> dict[str, list[str]]:
    """Return the prompts of a restored concept by kind."""
    kinds = bench.name_kinds(concept)
    return {
        "names": list(dict.fromkeys(concept.spellings)),
        "templates": concept.held_out_prompts,
        "compositions": bench.compositions(concept),
        "long prompts": [prompt for kind, prompts in kinds.items() if kind.startswith("long") for prompt in prompts],
    }


class Watermarks:
    """(j) Do erased prompts draw a watermark?

    Their images are compared by LPIPS with images of the watermarks, and so are those of the empty prompt: an erased
    one is a hit where it is nearer to a watermark than the nearest of these.
    """

    name: ClassVar[str] = "watermarks"
    is_slow: ClassVar[bool] = False
    is_of_all: ClassVar[bool] = False

    def measure(self, bench: Bench, subject: Subject, concept: Concept) -> list[Finding]:
        """Return the least LPIPS of erased images to a watermark, the largest PSNR, and the share of hits."""
        prompts = list(dict.fromkeys([concept.prompt, *concept.held_out_prompts]))
        return self._measure(bench, bench.generate(subject, bench.place(subject, concept, self.name), prompts), concept)

    def floor(self, bench: Bench, concept: Concept) -> list[Finding]:
        """Return the same of the empty prompt's images by the unedited model."""
        return self._measure(bench, _empty_images(bench, concept), concept)

    def _measure(self, bench: Bench, paths: Sequence[Path], concept: Concept) -> list[Finding]:
        marks = bench.generate(UNEDITED, bench.folder / UNEDITED.folder / "marks", list(watermark_prompts()), 4)
        nearest, likest = _nearest(bench, paths, marks)
        limit = float(_nearest(bench, _empty_images(bench, concept), marks)[0].min())
        hits = int((nearest < limit).sum())
        return [
            Finding("nearest", "LPIPS to a watermark", len(paths), float(nearest.min())),
            Finding("likest", "PSNR to a watermark, dB", len(paths), float(likest.max())),
            Finding.share("nearer than the empty prompt's", hits, len(paths), "images"),
        ]


def _empty_images(bench: Bench, concept: Concept) -> list[Path]:
    return bench.generate(UNEDITED, bench.folder / UNEDITED.folder / "empty", [""], 8 * bench.images)


def _nearest(bench: Bench, paths: Sequence[Path], marks: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each image its least LPIPS and its largest PSNR to any of some marks, (N,) each."""
    pairs = [(path, mark) for path in paths for mark in marks]
    metrics = pairwise_metrics([path for path, _ in pairs], [mark for _, mark in pairs], bench.model.device)
    shape = len(paths), len(marks)
    return metrics["lpips"].view(shape).amin(1), metrics["psnr"].view(shape).amax(1)
