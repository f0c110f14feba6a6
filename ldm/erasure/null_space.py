"""Null spaces of prompt embeddings: the directions in which a change of weights leaves each of these prompts alone.

For prompts with embeddings E (rows, d) a change dW (out, d) of a text layer with `E dW^T = 0` leaves their images as
they were. Such dW have rows in the null space of E. (Separable Multi-Concept Erasure, arXiv 2402.05947.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F

from ldm.io.checks import check_header, is_count, is_number, is_texts
from ldm.io.tensors import EmbeddingModel, check_base_model, library_versions, load_tensors, save_tensors

BASIS_FILE_TYPE = "null space basis"
EXACT_TOLERANCE = 1e-7


def null_space(rows: torch.Tensor, rank_rtol: float = EXACT_TOLERANCE, method: str = "svd") -> tuple[torch.Tensor, int]:
    """Return a basis (d - r, d) of the null space of `rows` (n, d), unit rows in float64, and the numerical rank r.

    Singular values (`svd`) or pivots (`elimination`) up to `rank_rtol` times the largest count as zero.
    Raises ValueError for an unknown method, a negative tolerance, or rows with NaN.
    """
    if method not in ("svd", "elimination"):
        raise ValueError(f"unknown `null_space_method` '{method}': choose svd or elimination")
    if not 0 <= rank_rtol < 1:
        raise ValueError(f"`rank_rtol` {rank_rtol} is outside [0, 1): 1e-7 is exact, 1e-3 leaves more dimensions free")
    if not rows.isfinite().all():
        raise ValueError(
            "the protected prompts' embeddings hold NaN or infinity: choose a smaller "
            "`always_protected_weight`, or use the model in float32"
        )
    matrix = rows.detach().cpu().double()
    return (_by_svd if method == "svd" else _by_elimination)(matrix, rank_rtol)


def null_space_of_streams(
    rows: torch.Tensor, streams: Sequence[slice], rank_rtol: float = EXACT_TOLERANCE, method: str = "svd"
) -> tuple[torch.Tensor, int]:
    """Return what `null_space` does, for each of several streams alone: its columns of `rows`, by their largest value.

    A vector of the basis is zero in the columns of all streams but one.
    """
    bases: list[torch.Tensor] = []
    total = 0
    for columns in streams:
        vectors, rank = null_space(rows[:, columns], rank_rtol, method)
        bases.append(F.pad(vectors, (columns.start, rows.shape[1] - columns.stop)))
        total += rank
    return torch.cat(bases), total


def _by_svd(matrix: torch.Tensor, rank_rtol: float) -> tuple[torch.Tensor, int]:
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R  # (d, d): same row space, no tall factor
    _, values, vh = torch.linalg.svd(matrix, full_matrices=True)  # vh (d, d)
    rank = int((values > rank_rtol * values[0]).sum())
    return vh[rank:].flip(0), rank  # directions on which the prompts have the smallest projection come first


def _by_elimination(matrix: torch.Tensor, rank_rtol: float) -> tuple[torch.Tensor, int]:
    """Gauss-Jordan elimination with complete pivoting: the largest remaining entry is the next pivot."""
    reduced = matrix.clone()
    pivots: list[int] = []
    largest = reduced.abs().max()
    for row in range(min(reduced.shape)):
        remaining = reduced[row:].abs()
        position = int(remaining.argmax())
        if remaining.view(-1)[position] <= rank_rtol * largest:
            break
        pivot_row, column = row + position // reduced.shape[1], position % reduced.shape[1]
        reduced[[row, pivot_row]] = reduced[[pivot_row, row]]
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


def qr_factor(*rows: torch.Tensor) -> torch.Tensor:
    """Return a triangle (at most d, d), float64, with the null space and singular values of `rows` (n, d) together."""
    return torch.linalg.qr(torch.cat([part.detach().cpu().double() for part in rows]), mode="r").R.contiguous()


def leave_one_out_factors(blocks: Sequence[torch.Tensor], fixed_rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield, for each of the `blocks` (n, d) in turn, a `qr_factor` of `fixed_rows` (m, d) and all blocks but that one.

    Half of the blocks is added for all of the other half at once, and so on, so that both the time for a block and the
    memory grow with the logarithm of their number.
    """
    if len(blocks) == 1:
        yield qr_factor(fixed_rows)
        return
    half = len(blocks) // 2
    yield from leave_one_out_factors(blocks[:half], qr_factor(fixed_rows, *blocks[half:]))
    yield from leave_one_out_factors(blocks[half:], qr_factor(fixed_rows, *blocks[:half]))


def relative_singular_values(rows: torch.Tensor) -> torch.Tensor:
    """Return the singular values of `rows` (n, d) relative to the largest, in descending order, with zeros up to d."""
    values = torch.linalg.svdvals(qr_factor(rows))
    return F.pad(values / values[0], (0, rows.shape[1] - len(values)))


def suggest_tolerance(values: torch.Tensor) -> float | None:
    """Return the smallest tolerance, 1, 2 or 5 times a power of ten, that leaves a sixteenth of all d directions free.

    `values` (d,) are `relative_singular_values`. Returns None where even 0.5 does not.
    """
    for power in range(8, 0, -1):
        for digit in (1, 2, 5):
            tolerance = digit * 10.0**-power
            if (values <= tolerance).sum() >= len(values) / 16:
                return float(f"{tolerance:.0e}")
    return None


@dataclass(frozen=True)
class NullSpaceBasis:
    """Directions (k, d), float64 unit rows, on which the protected prompts have no projection, or hardly any.

    `protected` is a `qr_factor` (r, d) of the protected prompts' embeddings; `metadata` says what made the basis.
    """

    vectors: torch.Tensor
    protected: torch.Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        embeddings: Sequence[torch.Tensor],
        protected: Sequence[str],
        rank_rtol: float = EXACT_TOLERANCE,
        method: str = "svd",
        rows: torch.Tensor | None = None,
        streams: Sequence[slice] = (),
    ) -> Self:
        """Return the basis for prompts `protected` with embeddings (tokens, d), whose `qr_factor` is `rows` if known.

        `streams` are the columns of the streams that a denoiser sees of them, where it sees several. Raises ValueError
        when they leave no dimension free, saying how many fit and which tolerance would do.
        """
        tokens, width = embeddings[0].shape
        rows = qr_factor(*embeddings) if rows is None else rows  # at most (d, d)
        vectors, rank = null_space_of_streams(rows, streams or [slice(0, width)], rank_rtol, method)
        if len(vectors) == 0:
            raise ValueError(_no_nullity(embeddings, rows, rank_rtol, tokens, width))
        max_leakage = (vectors @ rows.T).norm(dim=1).max().item()
        metadata = {
            "protected": list(protected),
            "rank": rank,
            "width": width,
            "rank_rtol": rank_rtol,
            "method": method,
            "max_leakage": max_leakage,
            "versions": library_versions(),
        }
        return cls(vectors, rows, metadata)

    def save(self, path: Path) -> None:
        """Write the basis as safetensors."""
        save_tensors(path, {"basis": self.vectors, "protected": self.protected}, BASIS_FILE_TYPE, self.metadata)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the basis in a file. Raises ValueError for one that is missing, damaged or not a basis."""
        tensors, metadata = load_tensors(path, BASIS_FILE_TYPE)
        check_header(path, metadata, {"protected": is_texts, "rank": is_count, "rank_rtol": is_number})
        parts = [tensors[name].double() for name in ("basis", "protected") if name in tensors]
        if (
            len(parts) < 2
            or any(part.dim() != 2 or not len(part) for part in parts)
            or parts[0].shape[1] != parts[1].shape[1]
            or not metadata.keys() >= {"protected", "rank", "rank_rtol"}
        ):
            raise ValueError(f"{path} holds no basis of shape (k, d) and its metadata: solve the null space again")
        vectors, protected = parts
        return cls(vectors, protected, metadata)

    def check(self, model: EmbeddingModel, path: Path) -> None:
        """Raise ValueError unless the basis is for this model, or its text encoder, and for embeddings that wide."""
        check_base_model(self.metadata, model, path)
        if self.vectors.shape[1] != model.context_dim:
            raise ValueError(
                f"{path} holds directions of {self.vectors.shape[1]} dimensions, the model's prompts have "
                f"{model.context_dim}"
            )


def _no_nullity(
    embeddings: Sequence[torch.Tensor], rows: torch.Tensor, rank_rtol: float, tokens: int, width: int
) -> str:
    """Say how many of the prompts fit, and which tolerance would leave dimensions free."""
    fit, too_many = 0, len(embeddings)
    while too_many - fit > 1:  # halved each time, as there may be thousands
        count = (fit + too_many) // 2
        if null_space(qr_factor(*embeddings[:count]), rank_rtol)[1] < width:
            fit = count
        else:
            too_many = count
    tolerance = suggest_tolerance(relative_singular_values(rows))
    advice = f", or raise `rank_rtol` to {tolerance:g}, which leaves a sixteenth of them free" if tolerance else ""
    return (
        f"no null space left: {len(embeddings)} protected prompts of {tokens} tokens fill all {width} dimensions, "
        f"and the first {fit} fit: protect fewer{advice}"
    )
