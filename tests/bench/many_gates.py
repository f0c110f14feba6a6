"""A thousand gated concepts from given embeddings, at Stable Diffusion v1's width, against a fit of each by itself.

Embeddings are random, 77 x 768, with a spectrum as CLIP's: one large first row for all prompts, tokens whose spectrum
falls, and padding that is nearly the same throughout a prompt. Told are the seconds of all, of the last hundred against
the first hundred, and the peak memory beyond what there was before; then what a switch of one concept, and a prompt,
take with a hundred and with all of them active. The baseline is a fit of one concept as it was before rows were shared:
every discriminant solved anew in float64 and asked about all rows, and a map of all moments.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import psutil
import torch

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.erasure.embedding_map import EmbeddingMap, fit_map
from ldm.erasure.gate import Gate, GateTask, Positives, fit_gates, join_gates
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.erasure.negatives import Negatives
from ldm.erasure.prompt_rows import PromptRows, kept_positions, row_counts

TOKENS, WIDTH = 77, 768
CAPTIONS, WORDS, OTHER_PROMPTS = 1680, 1500, 20  # negatives: captions, words, and of each concept, as the thousand have
PLAIN, MISSPELT, LOOKALIKES = 102, 60, 76  # prompts of each concept: its name, misspelt names, lookalikes
CAPTION_LENGTH, NAME_LENGTH, WORD_LENGTH = 15, 10, 4  # tokens
AT_ONCE = 16  # concepts whose gates are fitted in one go, as in `gate_fitter`
RIDGE, POSITION, CLEARANCE, MAP_RIDGE, MAP_RANK, MAP_LOSS, MOST = 0.01, 0.7, 0.35, 0.001, 64, 0.03, 18


class Encoder:
    """Random embeddings as CLIP's."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.spectrum = torch.linalg.qr(self.normal(WIDTH, WIDTH)).Q * torch.logspace(0, -2, WIDTH)[:, None] * 28
        self.first, self.end = 28 * self.normal(WIDTH), self.tokens(1)[0]
        self.places = 0.3 * self.tokens(TOKENS)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def tokens(self, number: int) -> torch.Tensor:
        return self.normal(number, WIDTH) @ self.spectrum

    def prompts(self, number: int, length: int, name: torch.Tensor | None = None) -> torch.Tensor:
        """Return the embeddings of prompts (n, 77, d), whose last token but one says a name where one is given."""
        rows = self.end + self.places + 0.5 * self.tokens(number)[:, None]  # padding, which sums a prompt up
        rows[:, 0] = self.first
        rows[:, 1:length] = self.tokens(number * (length - 1)).view(number, length - 1, WIDTH)
        if name is not None:
            rows[:, length - 2] = name + 0.5 * rows[:, length - 2]
        return rows


def thinned(embeds: torch.Tensor, length: int) -> PromptRows:
    """Return the rows of prompts that can matter."""
    kept = torch.tensor([kept_positions(length, TOKENS, number) for number in range(len(embeds))])
    rows = embeds[torch.arange(len(embeds))[:, None], kept]
    return PromptRows(rows.flatten(0, 1), torch.full((len(embeds),), kept.shape[1]))


def joined(parts: list[PromptRows]) -> PromptRows:
    return PromptRows(torch.cat([part.rows for part in parts]), torch.cat([part.counts for part in parts]))


def make_task(embeds: torch.Tensor, alike: torch.Tensor, left_out: torch.Tensor) -> GateTask:
    """Return what the gates of a concept are fitted on: its name, and its misspelt names."""
    groups: list[Positives] = []
    for part, clearance in zip(embeds.split([PLAIN, MISSPELT]), (None, CLEARANCE), strict=True):
        last_tokens = torch.full((len(part),), NAME_LENGTH - 2)
        groups.append(Positives(thinned(part, NAME_LENGTH), last_tokens, clearance))
    return GateTask(groups, left_out, thinned(alike, NAME_LENGTH))


def make_map(embeds: torch.Tensor, anchors: torch.Tensor) -> EmbeddingMap:
    """Return the map of a concept's prompts onto their anchors."""
    targets, aims = (thinned(rows, NAME_LENGTH).rows for rows in (embeds, anchors))
    counts = row_counts(kept_positions(NAME_LENGTH, TOKENS, 0), TOKENS).repeat(len(embeds))
    return fit_map(targets, aims, MAP_RIDGE, MAP_RANK, MAP_LOSS, counts, MOST).rounded()


def fit_alone(embeds: torch.Tensor, anchors: torch.Tensor, rows: torch.Tensor) -> None:
    """Fit the gates and the map of one concept as it was done before, to rows (R, d) of negatives."""
    mean = rows.mean(0).double()
    moments = rows[: 20 * TOKENS].double()  # of the prompts that are left out, and of the lookalikes
    covariance = moments.T @ moments / len(moments)
    for part in embeds.split([PLAIN, MISSPELT]):
        own = part[:, NAME_LENGTH - 2].double()
        offset, inner = own.mean(0) - mean, covariance + RIDGE * covariance.diagonal().mean() * torch.eye(WIDTH)
        for _ in range(4):
            direction = torch.linalg.solve(inner, offset)
            hard = rows[(rows @ direction.float()).topk(2000).indices].double() - mean
            inner = 0.9 * inner + 0.1 * hard.T @ hard / len(hard)
    targets = embeds.flatten(0, 1).double()
    directions = torch.linalg.eigh(targets.T @ targets).eigenvectors[:, -MAP_RANK:]
    projections = targets @ directions
    torch.linalg.solve(projections.T @ projections, projections.T @ (anchors.flatten(0, 1).double() - targets))


def seconds(measured: Callable[[], object], repeat: int = 5) -> float:
    """Return the median seconds of a call."""
    times: list[float] = []
    for _ in range(repeat):
        start = time.perf_counter()
        measured()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fit_many(number: int) -> list[GatedEdit]:
    """Return the edits of that many concepts, and print what they cost."""
    encoder, process = Encoder(), psutil.Process()
    names = 2 * encoder.tokens(number)
    parts = [thinned(encoder.prompts(CAPTIONS, CAPTION_LENGTH), CAPTION_LENGTH)]
    parts.append(thinned(encoder.prompts(WORDS, WORD_LENGTH), WORD_LENGTH))
    parts += [thinned(encoder.prompts(OTHER_PROMPTS, NAME_LENGTH, name), NAME_LENGTH) for name in names]
    rows = joined(parts)
    del parts
    before, start = process.memory_info().rss, time.perf_counter()
    negatives = Negatives(rows, RIDGE)
    setup = time.perf_counter() - start
    edits: list[GatedEdit] = []
    times: list[float] = []
    processor = 0.0  # seconds of it, which other work on the machine changes less
    for first in range(0, number, AT_ONCE):
        tasks: list[GateTask] = []
        maps: list[EmbeddingMap] = []
        taken = 0.0
        for k in range(first, min(first + AT_ONCE, number)):
            embeds = encoder.prompts(PLAIN + MISSPELT, NAME_LENGTH, names[k])
            alike = encoder.prompts(LOOKALIKES, NAME_LENGTH)
            anchors = embeds + 0.3 * encoder.tokens(1)
            anchors[:, NAME_LENGTH - 2 :] = encoder.prompts(len(embeds), NAME_LENGTH)[:, NAME_LENGTH - 2 :]
            start, used = time.perf_counter(), time.process_time()
            left_out = torch.zeros(len(rows), dtype=torch.bool)
            left_out[CAPTIONS + WORDS + OTHER_PROMPTS * k :][:OTHER_PROMPTS] = True
            tasks.append(make_task(embeds, alike, left_out))
            maps.append(make_map(embeds, anchors))
            taken += time.perf_counter() - start
            processor += time.process_time() - used
        start, used = time.perf_counter(), time.process_time()
        gates = fit_gates(tasks, negatives, POSITION)
        taken += time.perf_counter() - start
        processor += time.process_time() - used
        times += [taken / len(maps)] * len(maps)
        for k, each in enumerate(maps):
            told = [gate for gate in gates[k] if isinstance(gate, Gate)]
            edits.append(GatedEdit({"text_encoder": join_gates(told)}, {"text_encoder": 0}, {"tokens": each}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    few = min(100, number // 2)
    print(
        f"{number} gates and maps, {len(negatives.rows)} rows of negatives: {setup:.1f} s before the first, "
        f"{setup + sum(times):.1f} s in all, {1000 * statistics.mean(times):.0f} ms each "
        f"({1000 * processor / number:.0f} of the processor); the last {few} "
        f"{sum(times[-few:]) / sum(times[:few]):.2f} times the first {few}; peak {peak / 2**30:.2f} GiB beyond the "
        f"rows ({rows.rows.nbytes / 2**30:.2f} GiB); maps of {statistics.mean(size(each) for each in edits):.0f} bytes",
        flush=True,
    )
    alone = seconds(lambda: fit_alone(embeds, anchors, rows.rows), repeat=3)
    print(f"  one by itself {alone:.2f} s: {alone / statistics.mean(times):.0f} times ours", flush=True)
    return edits


def size(edit: GatedEdit) -> int:
    """Return the bytes of an edit's map in a file."""
    return sum(part.nbytes for name, part in edit.tensors().items() if name.startswith("map."))


def ask_many(edits: list[GatedEdit]) -> None:
    """Print what a switch of one concept takes, and a prompt, with more and more concepts active."""
    encoder = Encoder()
    embeds = encoder.prompts(1, CAPTION_LENGTH)
    states = {("text_encoder", 0): embeds}
    for number in (1, 100, len(edits)):
        active = {str(k): edit for k, edit in enumerate(edits[:number])}
        prompts = GatedPrompts(active)
        switch, ask = seconds(partial(GatedPrompts, active), 20), seconds(partial(prompts, embeds, states), 20)
        print(f"  {number} active: a switch {1000 * switch:.2f} ms, a prompt {1000 * ask:.2f} ms", flush=True)


def main() -> None:
    parser = arguments.make_parser(__doc__)
    parser.option("number", type=arguments.positive_int, default=1000, help="concepts")
    parser.option("threads", type=arguments.positive_int, default=2, help="of the processor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ask_many(fit_many(args.number))


if __name__ == "__main__":
    run(main)
