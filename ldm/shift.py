"""Null spaces and separable weight shifts: the one home of a change that erases a concept and can be left out again.

For prompts with embeddings E (rows, d) a change dW (out, d) of a key or value layer with `E dW^T = 0` leaves their
images as they were. Such dW have rows in the null space of E. (Separable Multi-Concept Erasure, arXiv 2402.05947.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ldm.attention import swapped
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


class WeightShift(ABC):
    """A change of the U-Net's weights that erases a concept, kept beside them: one dW for each parameter it changes."""

    def __init__(self, recipe: dict | None = None):
        self.recipe = recipe or {}
        self.path: Path | str = "this shift"

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The parameters that it changes."""

    @abstractmethod
    def delta(self, name: str) -> torch.Tensor:
        """dW of one parameter, in its shape, float64 on the CPU."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one parameter's dW."""

    @abstractmethod
    def save(self, path: Path, recipe: dict) -> None:
        """Write the shift, and `recipe` beside what the kind of shift adds to it, as safetensors."""

    def moved(self, name: str, seen: torch.Tensor) -> torch.Tensor:
        """What inputs (tokens, d) float64 get added by a linear layer's dW: (tokens, out)."""
        return seen @ self.delta(name).T

    @staticmethod
    def load(path: Path, hint: str = "") -> WeightShift:
        """Raises ValueError for a file that is missing, damaged, of wrong shapes or not a shift."""
        tensors, recipe = load_tensors(path, SHIFT, hint)
        shift = SeparableShift.read(tensors, recipe) if "directions" in tensors else DenseShift.read(tensors, recipe)
        if shift is None:
            raise ValueError(f"{path} has tensors of wrong names or shapes for a weight shift: make it again")
        shift.path = path
        return shift

    def check(self, digest: str, unet: nn.Module) -> None:
        """Raises ValueError unless the shift was made for the base model with that digest and its weights."""
        _check_base(self.recipe, digest, self.path)
        weights = dict(unet.named_parameters())
        for name in self.names:
            if name not in weights or weights[name].shape != self.shape(name):
                raise ValueError(f"{self.path}: {name} does not fit the model's layer: make it again")


class SeparableShift(WeightShift):
    """`dW = w (scale * S)` for every key and value layer: coefficients w (out, k) a layer, directions S (k, d) shared."""

    def __init__(self, coefficients: Mapping[str, torch.Tensor], directions: torch.Tensor, scale: float,
                 recipe: dict | None = None):
        super().__init__(recipe)
        self.coefficients = dict(coefficients)
        self.directions = directions.detach().double().cpu()
        self.scale = scale

    @classmethod
    def zeros(cls, layers: Mapping[str, nn.Linear], directions: torch.Tensor, scale: float) -> SeparableShift:
        """A shift of nothing, ready to be learnt: its coefficients are leaf tensors with gradients."""
        weights = {name: torch.zeros(layer.out_features, len(directions), device=layer.weight.device,
                                     requires_grad=True) for name, layer in layers.items()}
        return cls(weights, directions, scale)

    def parameters(self) -> list[torch.Tensor]:
        return list(self.coefficients.values())

    def cut(self, rank: int) -> SeparableShift:
        """The shift with only its `rank` strongest directions, orthonormal, the strongest first: the right singular vectors
        of all layers' dW, stacked. They are combinations of the shift's own, so that what is protected stays so."""
        orthogonal, triangle = torch.linalg.qr(self.directions.T)  # S = triangle^T orthogonal^T
        within = {name: weight.detach().cpu().double() @ (self.scale * triangle.T)
                  for name, weight in self.coefficients.items()}  # dW = within orthogonal^T, (out, k)
        stacked = torch.linalg.qr(torch.cat(list(within.values())), mode="r").R
        strongest = torch.linalg.svd(stacked).Vh[:rank]  # (rank, k)
        return SeparableShift({name: weight @ strongest.T for name, weight in within.items()},
                              strongest @ orthogonal.T, 1.0, self.recipe | {"cut_to_rank": rank})

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """dW of a key or value layer as `up (out, k) @ down (k, d)`, float64."""
        return self._weight(layer) * self.scale, self.directions

    @property
    def names(self) -> list[str]:
        return [f"{layer}.weight" for layer in self.coefficients]

    def _weight(self, name: str) -> torch.Tensor:
        return self.coefficients[name.removesuffix(".weight")].detach().cpu().double()

    def delta(self, name: str) -> torch.Tensor:
        return self._weight(name) @ (self.scale * self.directions)

    def shape(self, name: str) -> tuple[int, ...]:
        return len(self.coefficients[name.removesuffix(".weight")]), self.directions.shape[1]

    def moved(self, name: str, seen: torch.Tensor) -> torch.Tensor:
        return (seen @ (self.scale * self.directions).T) @ self._weight(name).T  # (tokens, k) @ (k, out)

    def save(self, path: Path, recipe: dict) -> None:
        """Coefficients (float32), and the basis once."""
        tensors = {f"w.{name}": value.float() for name, value in self.coefficients.items()}
        save_tensors(path, tensors | {"directions": self.directions}, SHIFT,
                     recipe | {"scale": self.scale, "versions": versions()})

    @classmethod
    def read(cls, tensors: dict[str, torch.Tensor], recipe: dict) -> SeparableShift | None:
        """None when the tensors do not belong together."""
        directions, scale = tensors.pop("directions"), recipe.get("scale")
        good = directions.dim() == 2 and tensors and all(name.startswith("w.") and value.dim() == 2 and
                                                         value.shape[1] == len(directions) for name, value in tensors.items())
        if not good or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            return None
        return cls({name.removeprefix("w."): value for name, value in tensors.items()}, directions, scale, recipe)


class DenseShift(WeightShift):
    """dW as it is, for a method that trains the weights themselves."""

    def __init__(self, deltas: Mapping[str, torch.Tensor], recipe: dict | None = None):
        super().__init__(recipe)
        self.deltas = dict(deltas)

    @classmethod
    def between(cls, unet: nn.Module, student: Mapping[str, torch.Tensor]) -> DenseShift:
        """What leads from the U-Net's weights to those of `student`; weights that are the same are left out."""
        moved = {name: weight.detach() - unet.get_parameter(name).detach() for name, weight in student.items()}
        return cls({name: delta for name, delta in moved.items() if delta.any()})

    @property
    def names(self) -> list[str]:
        return list(self.deltas)

    def delta(self, name: str) -> torch.Tensor:
        return self.deltas[name].cpu().double()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.deltas[name].shape)

    def save(self, path: Path, recipe: dict) -> None:
        """All dW in float32."""
        save_tensors(path, {f"d.{name}": value.float() for name, value in self.deltas.items()}, SHIFT,
                     recipe | {"versions": versions()})

    @classmethod
    def read(cls, tensors: dict[str, torch.Tensor], recipe: dict) -> DenseShift | None:
        """None when the tensors are not named as those of such a shift."""
        if not all(name.startswith("d.") for name in tensors):
            return None
        return cls({name.removeprefix("d."): value for name, value in tensors.items()}, recipe)


def added_to(weight: torch.Tensor, name: str, shifts: Sequence[WeightShift], dtype: torch.dtype | None = None) -> torch.Tensor:
    """`W + sum of dW` of one parameter: summed in float64 and rounded once, to `dtype` or the weight's own."""
    total = sum((shift.delta(name) for shift in shifts if name in shift.names), weight.detach().cpu().double())
    return total.to(weight.device, dtype or weight.dtype)


def merge(unet: nn.Module, shifts: Sequence[WeightShift], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """`W + sum of dW` for the parameters that any shift changes, by `added_to`. Nothing is changed."""
    changed = dict.fromkeys(name for shift in shifts for name in shift.names)
    return {name: added_to(unet.get_parameter(name), name, shifts, dtype) for name in changed}


@contextmanager
def applied(unet: nn.Module, shifts: Sequence[WeightShift]) -> Iterator[None]:
    """While the block runs, the U-Net holds the merged weights; then the very same base tensors are back."""
    merged = {name: nn.Parameter(weight, requires_grad=False) for name, weight in merge(unet, shifts).items()}
    with swapped(unet, merged):
        yield


def leaks(layers: Mapping[str, nn.Linear], shifts: Mapping[str, WeightShift],
          embeddings: Mapping[str, torch.Tensor]) -> list[dict]:
    """How far each shift moves what each prompt's embedding (tokens, d) puts out: |e dW^T| / |e W^T| over the key and
    value `layers`. One row per pair: shift, prompt, leak.
    """
    rows = []
    for prompt, embedding in embeddings.items():
        seen = embedding.cpu().double()
        base = math.hypot(*((seen @ layer.weight.cpu().double().T).norm().item() for layer in layers.values()))
        for label, shift in shifts.items():
            changed = set(shift.names)
            moved = math.hypot(*(shift.moved(f"{name}.weight", seen).norm().item() for name in layers
                                 if f"{name}.weight" in changed))
            rows.append({"shift": label, "prompt": prompt, "leak": moved / base})
    return rows


def rounded_leak(layers: Mapping[str, nn.Linear], merged: Mapping[str, torch.Tensor], embedding: torch.Tensor) -> float:
    """How far merged weights, rounded as they are, move what one prompt's embedding (tokens, d) puts out, against the base
    rounded likewise: `leaks` of all shifts together, with what rounding adds."""
    seen = embedding.cpu().double()
    base = moved = 0.0
    for name, layer in layers.items():
        weight = layer.weight.cpu()
        base = math.hypot(base, (seen @ weight.double().T).norm().item())
        if f"{name}.weight" in merged:
            rounded = merged[f"{name}.weight"].cpu()
            moved = math.hypot(moved, (seen @ (rounded.double() - weight.to(rounded.dtype).double()).T).norm().item())
    return moved / base


def lost(shift: WeightShift, cut: WeightShift, seen: torch.Tensor) -> float:
    """The share of a shift's effect on the embeddings `seen` (tokens, d) that its `cut` lacks: |e (dW - dW_cut)^T| / |e dW^T|
    over all layers."""
    seen = seen.cpu().double()
    whole = [shift.moved(name, seen) for name in shift.names]
    left = [moved - cut.moved(name, seen) for name, moved in zip(shift.names, whole)]
    return math.hypot(*(part.norm().item() for part in left)) / math.hypot(*(part.norm().item() for part in whole))
