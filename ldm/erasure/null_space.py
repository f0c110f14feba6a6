"""TODO erasure.null_space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
import torch
import torch.nn.functional as F
from ldm.erasure.closed_form import MIN_GAIN
from ldm.io.tensors import check_base_model, library_versions, load_tensors, save_tensors


BASIS_FILE_TYPE = "null space basis"


EXACT_TOLERANCE = 1e-7


def _by_svd(matrix: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, int]:
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R  # (d, d): same row space, no tall factor
    _, values, right = torch.linalg.svd(matrix, full_matrices=True)  # right (d, d)
    rank = int((values > tolerance * values[0]).sum())
    return right[rank:].flip(0), rank  # directions that the prompts reach least come first


def _by_elimination(matrix: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, int]:
    """Gauss-Jordan with complete pivoting: the largest remaining entry is the next pivot."""
    reduced = matrix.clone()
    pivots: list[int] = []
    largest = reduced.abs().max()
    for row in range(min(reduced.shape)):
        rest = reduced[row:].abs()
        position = int(rest.argmax())
        if rest.view(-1)[position] <= tolerance * largest:
            break
        chosen, column = row + position // reduced.shape[1], position % reduced.shape[1]
        reduced[[row, chosen]] = reduced[[chosen, row]]
        reduced[row] /= reduced[row, column].clone()
        factors = reduced[:, column].clone()
        factors[row] = 0
        reduced -= factors[:, None] * reduced[row]
        pivots.append(column)
    rank, width = len(pivots), reduced.shape[1]
    free = [column for column in range(width) if column not in set(pivots)]
    vectors = torch.zeros(len(free), width, dtype=matrix.dtype)
    vectors[range(len(free)), free] = 1
    vectors[:, pivots] = -reduced[:rank, free].T
    return vectors / vectors.norm(dim=1, keepdim=True), rank


def null_space(rows: torch.Tensor, tolerance: float = EXACT_TOLERANCE, method: str = "svd") -> tuple[torch.Tensor, int]:
    """A basis (d - r, d) of what `rows` (n, d) do not reach, unit rows, float64, and the numerical rank r.

    Singular values (`svd`) or pivots (`elimination`) up to `tolerance` times the largest count as zero.
    Raises ValueError for an unknown method, a negative tolerance, or rows with NaN.
    """
    if method not in ("svd", "elimination"):
        raise ValueError(f"unknown basis method '{method}': choose svd or elimination")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance {tolerance} is outside [0, 1): near 1e-7 is exact, 1e-3 leaves more room")
    if not rows.isfinite().all():
        raise ValueError("the prompts' embeddings hold NaN or infinity: the model cannot be used in this precision")
    matrix = rows.detach().cpu().double()
    return (_by_svd if method == "svd" else _by_elimination)(matrix, tolerance)


def qr_factor(*rows: torch.Tensor) -> torch.Tensor:
    """A triangle (at most d, d), float64, of the same null space and singular values as all `rows` (n, d) together."""
    return torch.linalg.qr(torch.cat([part.detach().cpu().double() for part in rows]), mode="r").R.contiguous()


def leave_one_out_factors(blocks: Sequence[torch.Tensor], rest: torch.Tensor) -> Iterator[torch.Tensor]:
    """For each of the `blocks` (n, d) in turn, a `factor` of `rest` (m, d) and all blocks but that one.

    Half of the blocks is added for all of the other half at once, and so on, so that both the time for a block and the memory
    grow with the logarithm of their number.
    """
    if len(blocks) == 1:
        yield qr_factor(rest)
        return
    half = len(blocks) // 2
    yield from leave_one_out_factors(blocks[:half], qr_factor(rest, *blocks[half:]))
    yield from leave_one_out_factors(blocks[half:], qr_factor(rest, *blocks[:half]))


def relative_singular_values(rows: torch.Tensor) -> torch.Tensor:
    """The singular values of `rows` (n, d), relative to the largest, in descending order, and zeros up to d of them."""
    values = torch.linalg.svdvals(qr_factor(rows))
    return F.pad(values / values[0], (0, rows.shape[1] - len(values)))


def suggest_tolerance(values: torch.Tensor) -> float | None:
    """The least of 1, 2 or 5 times a power of ten that, as a tolerance, leaves a sixteenth of all d directions of a `spectrum`
    free; None where even 0.5 does not."""
    steps = [number * 10.0 ** -power for power in range(8, 0, -1) for number in (1, 2, 5)]
    return next((float(f"{step:.0e}") for step in steps if (values <= step).sum() >= len(values) / 16), None)


@dataclass(frozen=True)
class NullSpaceBasis:
    """Directions (k, d), float64 unit rows, that the protected prompts do not reach, or hardly; a `factor` (r, d) of what they are;
    and what made them."""

    vectors: torch.Tensor
    protected: torch.Tensor
    recipe: dict = field(default_factory=dict)

    @classmethod
    def solve(cls, embeddings: Sequence[torch.Tensor], protected: Sequence[str], tolerance: float, method: str, recipe: dict,
              rows: torch.Tensor | None = None) -> NullSpaceBasis:
        """The basis for the prompts `protected` with embeddings (tokens, d) each, whose `factor` is `rows` if it is known.

        Raises ValueError, saying how many prompts fit and which tolerance would make room, when they leave none.
        """
        tokens, width = embeddings[0].shape
        rows = qr_factor(*embeddings) if rows is None else rows  # at most (d, d)
        vectors, rank = null_space(rows, tolerance, method)
        if len(vectors) == 0:
            fit = next(n for n in range(len(embeddings) - 1, -1, -1)
                       if n == 0 or null_space(qr_factor(*embeddings[:n]), tolerance)[1] < width)
            enough = suggest_tolerance(relative_singular_values(rows))
            raise ValueError(f"no null space left: {len(embeddings)} protected prompts of {tokens} tokens fill all "
                             f"{width} dimensions, and the first {fit} fit: protect fewer"
                             + (f", or raise --tolerance to {enough:g}, which leaves a sixteenth of them free" if enough else ""))
        leak = (vectors @ rows.T).norm(dim=1).max().item()
        return cls(vectors, rows, recipe | {"protected": list(protected), "rank": rank, "width": width, "tolerance": tolerance,
                                            "method": method, "largest_leak": leak, "versions": library_versions()})

    def save(self, path: Path) -> None:
        save_tensors(path, {"basis": self.vectors, "protected": self.protected}, BASIS_FILE_TYPE, self.metadata)

    @classmethod
    def load(cls, path: Path, hint: str = "") -> NullSpaceBasis:
        """Raises ValueError for a file that is missing, damaged or not a basis."""
        tensors, recipe = load_tensors(path, BASIS_FILE_TYPE, hint)
        parts = [tensors[name].double() for name in ("basis", "protected") if name in tensors]
        if (len(parts) < 2 or any(part.dim() != 2 for part in parts) or parts[0].shape[1] != parts[1].shape[1]
                or not recipe.keys() >= {"protected", "rank", "tolerance"}):
            raise ValueError(f"{path} holds no basis of shape (k, d) and its recipe: make it again with SRSME_Solution.py")
        return cls(*parts, recipe)

    def directions(self, concept: torch.Tensor, most: int | None, ridge: float, keep: float,
                   spared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a shift that erases `concept` (P, tokens, d) should act: directions (k, d) within the null space, orthonormal, the
        best first, at most `most` of them; and what acting there costs, (k, k).

        A change along direction v costs `|v|^2 ridge s^2 + keep |E v|^2 + v spared v^T`, with s the most that a direction of the
        null space reaches of the concept, E the protected prompts, which a coarse tolerance lets move a little, and `spared`
        (d, d) the sum of `e^T e` over what else should move little. The directions are those with the most reach for their cost:
        the right singular vectors of `X S^T C^(-1/2)`, down to a value of `REACH`, led back through `C^(-1/2) S` (X the concept's
        tokens, S the null space, C the cost in it). Beyond them a gradient on the concept's prompts hardly acts, yet Adam moves
        every coefficient alike.
        Raises ValueError where the concept reaches none: what is protected says all of it.
        """
        within = torch.linalg.qr(self.vectors.T).Q.T  # S (m, d)
        seen = concept.flatten(0, 1).cpu().double()  # (P * tokens, d)
        reach = seen @ within.T
        size = torch.linalg.matrix_norm(reach, ord=2)
        if size <= EXACT_TOLERANCE * seen.norm():
            raise ValueError("the protected prompts reach all that the concept reaches, so that nothing can erase it alone: protect "
                             "fewer, or raise --tolerance")
        leak = self.protected @ within.T
        cost = ridge * size.square() * torch.eye(len(within), dtype=reach.dtype) + keep * leak.T @ leak + within @ spared @ within.T
        root = torch.linalg.cholesky(cost)
        whitened = torch.linalg.solve_triangular(root, reach.T, upper=False).T  # X S^T L^-T with C = L L^T
        _, gain, turned = torch.linalg.svd(whitened, full_matrices=False)
        acting = min(max(1, int((gain > MIN_GAIN).sum())), most or len(gain))
        chosen = torch.linalg.solve_triangular(root.T, turned[:acting].T, upper=True).T  # (k, m)
        chosen = torch.linalg.qr(chosen.T).Q.T  # whose first rows span what the first rows spanned
        return chosen @ within, chosen @ cost @ chosen.T

    def check(self, digest: str, width: int, path: Path) -> None:
        """Raises ValueError unless the basis was made for the base model with that digest."""
        check_base_model(self.metadata, digest, path)
        if self.vectors.shape[1] != width:
            raise ValueError(f"{path} holds directions of {self.vectors.shape[1]} dimensions, the model's prompts "
                             f"have {width}: make it again with SRSME_Solution.py")
