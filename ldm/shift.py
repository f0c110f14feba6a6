"""Null spaces and separable weight shifts: the one home of a change that erases a concept and can be left out again.

For prompts with embeddings E (rows, d) a change dW (out, d) of a key or value layer with `E dW^T = 0` leaves their
images as they were. Such dW have rows in the null space of E. (Separable Multi-Concept Erasure, arXiv 2402.05947.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint import load_tensors, save_tensors, versions

BASIS, SHIFT = "null space basis", "weight shift"
EXACT = 1e-7


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


def null_space(rows: torch.Tensor, tolerance: float = EXACT, method: str = "svd") -> tuple[torch.Tensor, int]:
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


@dataclass(frozen=True)
class NullSpaceBasis:
    """Directions (k, d), float64 unit rows, that the protected prompts do not reach, and what made them."""

    vectors: torch.Tensor
    recipe: dict = field(default_factory=dict)

    @classmethod
    def solve(cls, embeddings: torch.Tensor, protected: Sequence[str], tolerance: float, method: str,
              recipe: dict) -> NullSpaceBasis:
        """The basis for the prompts `protected` with embeddings (N, tokens, d).

        Raises ValueError, saying how many prompts fit, when they leave no room.
        """
        tokens, width = embeddings.shape[1:]
        rows = embeddings.flatten(0, 1)  # (N * tokens, d)
        vectors, rank = null_space(rows, tolerance, method)
        if len(vectors) == 0:
            fit = next(n for n in range(len(embeddings) - 1, -1, -1)
                       if n == 0 or null_space(embeddings[:n].flatten(0, 1), tolerance)[1] < width)
            raise ValueError(f"no null space left: {len(embeddings)} protected prompts of {tokens} tokens fill all "
                             f"{width} dimensions, and the first {fit} fit: protect fewer, or raise --tolerance")
        leak = (vectors @ rows.double().cpu().T).abs().max().item()
        return cls(vectors, recipe | {"protected": list(protected), "rank": rank, "width": width,
                                      "tolerance": tolerance, "method": method, "largest_leak": leak,
                                      "versions": versions()})

    def save(self, path: Path) -> None:
        save_tensors(path, {"basis": self.vectors}, BASIS, self.recipe)

    @classmethod
    def load(cls, path: Path, hint: str = "") -> NullSpaceBasis:
        """Raises ValueError for a file that is missing, damaged or not a basis."""
        tensors, recipe = load_tensors(path, BASIS, hint)
        if "basis" not in tensors or tensors["basis"].dim() != 2 or not recipe.keys() >= {"protected", "rank", "tolerance"}:
            raise ValueError(f"{path} holds no basis of shape (k, d) and its recipe: make it again with SRSME_Solution.py")
        return cls(tensors["basis"].double(), recipe)

    def directions(self, concept: torch.Tensor, most: int | None) -> torch.Tensor:
        """At most `most` directions (k, d) of the null space: all as they are, or those that `concept` reaches most.

        A gradient on the concept's prompts (P, tokens, d) acts only where their embeddings reach, yet Adam moves every
        coefficient alike; directions beyond those cost other concepts and erase nothing. So when there is a choice the
        basis is turned to the right singular vectors of the embeddings within it, the strongest first.
        """
        if most is None or most >= len(self.vectors):
            return self.vectors
        orthonormal = torch.linalg.qr(self.vectors.T).Q.T  # (k, d)
        reach = concept.flatten(0, 1).cpu().double() @ orthonormal.T  # (P * tokens, k)
        return torch.linalg.svd(reach, full_matrices=True).Vh[:most] @ orthonormal

    def check(self, digest: str, width: int, path: Path) -> None:
        """Raises ValueError unless the basis was made for the base model with that digest."""
        _check_base(self.recipe, digest, path)
        if self.vectors.shape[1] != width:
            raise ValueError(f"{path} holds directions of {self.vectors.shape[1]} dimensions, the model's prompts "
                             f"have {width}: make it again with SRSME_Solution.py")


def _check_base(recipe: Mapping, digest: str, path: Path | str) -> None:
    if recipe.get("base_digest") != digest:
        raise ValueError(f"{path} was made for another base model ({recipe.get('base', 'unknown')}, digest "
                         f"{str(recipe.get('base_digest'))[:12]}, not {digest[:12]}): pass --model that one, or make it again")


class WeightShift:
    """`dW = w (scale * S)` for every key and value layer: coefficients w (out, k) a layer, directions S (k, d) shared."""

    def __init__(self, coefficients: Mapping[str, torch.Tensor], directions: torch.Tensor, scale: float,
                 recipe: dict | None = None):
        self.coefficients = dict(coefficients)
        self.directions = directions.detach().double().cpu()
        self.scale = scale
        self.recipe = recipe or {}
        self.path: Path | str = "this shift"

    @classmethod
    def zeros(cls, layers: Mapping[str, nn.Linear], directions: torch.Tensor, scale: float) -> WeightShift:
        """A shift of nothing, ready to be learnt: its coefficients are leaf tensors with gradients."""
        weights = {name: torch.zeros(layer.out_features, len(directions), device=layer.weight.device,
                                     requires_grad=True) for name, layer in layers.items()}
        return cls(weights, directions, scale)

    def parameters(self) -> list[torch.Tensor]:
        return list(self.coefficients.values())

    def delta(self, name: str) -> torch.Tensor:
        """dW of one layer, (out, d) float64 on the CPU."""
        return self.coefficients[name].detach().cpu().double() @ (self.scale * self.directions)

    def save(self, path: Path, recipe: dict) -> None:
        """Write coefficients (float32), the basis once, and `recipe` as safetensors."""
        tensors = {f"w.{name}": value.float() for name, value in self.coefficients.items()}
        save_tensors(path, tensors | {"directions": self.directions}, SHIFT,
                     recipe | {"scale": self.scale, "versions": versions()})

    @classmethod
    def load(cls, path: Path, hint: str = "") -> WeightShift:
        """Raises ValueError for a file that is missing, damaged, of wrong shapes or not a shift."""
        tensors, recipe = load_tensors(path, SHIFT, hint)
        directions = tensors.pop("directions", None)
        weights = {name.removeprefix("w."): value for name, value in tensors.items() if name.startswith("w.")}
        good = directions is not None and directions.dim() == 2 and weights and all(
            value.dim() == 2 and value.shape[1] == len(directions) for value in weights.values())
        if not good or not isinstance(recipe.get("scale"), (int, float)) or not math.isfinite(recipe["scale"]):
            raise ValueError(f"{path} has tensors of wrong shapes for a weight shift: make it again with SRS_ME.py")
        shift = cls(weights, directions, recipe["scale"], recipe)
        shift.path = path
        return shift

    def check(self, digest: str, layers: Mapping[str, nn.Linear]) -> None:
        """Raises ValueError unless the shift was made for the base model with that digest and its layers."""
        _check_base(self.recipe, digest, self.path)
        for name, weight in self.coefficients.items():
            expected = (layers[name].out_features, layers[name].in_features) if name in layers else None
            if expected != (weight.shape[0], self.directions.shape[1]):
                raise ValueError(f"{self.path}: {name} does not fit the model's layer: make it again with SRS_ME.py")


def merge(layers: Mapping[str, nn.Linear], shifts: Sequence[WeightShift]) -> dict[str, torch.Tensor]:
    """`W + sum of dW` for the layers that any shift changes: summed in float64, rounded once. No layer is changed."""
    changed = [name for name in layers if any(name in shift.coefficients for shift in shifts)]
    merged = {}
    for name in changed:
        weight = layers[name].weight
        total = sum((shift.delta(name) for shift in shifts if name in shift.coefficients), weight.cpu().double())
        merged[name] = total.to(weight.device, weight.dtype)
    return merged


@contextmanager
def applied(layers: Mapping[str, nn.Linear], shifts: Sequence[WeightShift]) -> Iterator[None]:
    """While the block runs, the layers hold the merged weights; then the very same base tensors are back."""
    merged = merge(layers, shifts)
    base = {name: layers[name].weight for name in merged}
    try:
        for name, weight in merged.items():
            layers[name].weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for name, weight in base.items():
            layers[name].weight = weight


def leaks(layers: Mapping[str, nn.Linear], shifts: Mapping[str, WeightShift],
          embeddings: Mapping[str, torch.Tensor]) -> list[dict]:
    """How far each shift moves what each prompt's embedding (tokens, d) puts out: |e dW^T| / |e W^T| over all layers.

    One row per pair: shift, prompt, leak.
    """
    rows = []
    for prompt, embedding in embeddings.items():
        seen = embedding.cpu().double()
        base = math.hypot(*((seen @ layer.weight.cpu().double().T).norm().item() for layer in layers.values()))
        for label, shift in shifts.items():
            reach = seen @ (shift.scale * shift.directions).T  # (tokens, k)
            moved = math.hypot(*((reach @ weight.detach().cpu().double().T).norm().item()
                                 for weight in shift.coefficients.values()))
            rows.append({"shift": label, "prompt": prompt, "leak": moved / base})
    return rows
