"""TODO erasure.shift."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
import math
from pathlib import Path
import torch
from torch import nn
from ldm.io.tensors import LazyTensors, check_base_model, library_versions, load_tensors, save_tensors


SHIFT_FILE_TYPE = "weight shift"


class WeightShift(ABC):
    """A change of the U-Net's weights that erases a concept, kept beside them: one dW for each parameter it changes."""

    def __init__(self, recipe: dict | None = None):
        self.metadata = recipe or {}
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

    def delta_output(self, name: str, seen: torch.Tensor) -> torch.Tensor:
        """What inputs (tokens, d) float64 get added by a linear layer's dW: (tokens, out)."""
        return seen @ self.delta(name).T

    def delta_output_norms(self, names: Sequence[str], embeddings: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The norm of what each prompt's embedding (tokens, d) gets added by dW of the linear layers `names` together."""
        return output_norms((self.delta(name) for name in names if name in self.names), embeddings)

    @staticmethod
    def load(path: Path, hint: str = "") -> WeightShift:
        """Raises ValueError for a file that is missing, damaged, of wrong shapes or not a shift."""
        tensors, recipe = load_tensors(path, SHIFT_FILE_TYPE, hint)
        shift = SeparableShift.read(tensors, recipe) if "directions" in tensors else DenseShift.read(tensors, recipe)
        if shift is None:
            raise ValueError(f"{path} has tensors of wrong names or shapes for a weight shift: make it again")
        shift.path = path
        return shift

    def check(self, digest: str, unet: nn.Module) -> None:
        """Raises ValueError unless the shift was made for the base model with that digest and its weights."""
        check_base_model(self.metadata, digest, self.path)
        weights = dict(unet.named_parameters())
        for name in self.names:
            if name not in weights or weights[name].shape != self.shape(name):
                raise ValueError(f"{self.path}: {name} does not fit the model's layer: make it again")


class SeparableShift(WeightShift):
    """`dW = w (scale * S)` for every key and value layer: coefficients w (out, k) a layer, directions S (k, d) shared."""

    def __init__(self, coefficients: Mapping[str, torch.Tensor], directions: torch.Tensor, scale: float,
                 recipe: dict | None = None):
        super().__init__(recipe)
        self.coefficients = coefficients
        self.directions = directions.detach().double().cpu()
        self.scale = scale

    @classmethod
    def zeros(cls, layers: Mapping[str, nn.Linear], directions: torch.Tensor, scale: float) -> SeparableShift:
        """A shift of nothing, ready to be learnt: its coefficients are leaf tensors with gradients."""
        weights = {name: torch.zeros(layer.out_features, len(directions), device=layer.weight.device,
                                     requires_grad=True) for name, layer in layers.items()}
        return cls(weights, directions, scale)

    @classmethod
    def closed_form(cls, layers: Mapping[str, nn.Linear], directions: torch.Tensor, scale: float, concept: torch.Tensor,
                    anchor: torch.Tensor, cost: torch.Tensor) -> SeparableShift:
        """The shift along `directions` S (k, d) that gives `concept` the keys and values of `anchor` (both (N, tokens, d), prompt
        by prompt, token by token) at the least cost: the one that minimises

        `|X (W + dW)^T - Y W^T|^2 + tr(w C w^T)` over `dW = w S`,

        X and Y the rows of concept and anchor, C (k, k) the cost along the directions. The solution is `w = W A` with
        `A = (Y - X)^T P (P^T P + C)^-1` and `P = X S^T`, and A is the same for all layers. (Closed forms edit attention
        since TIME, arXiv 2303.08084, and UCE, 2308.14761; within a null space SPEED, 2503.07392.)
        """
        seen, wanted = (rows.flatten(0, 1).cpu().double() for rows in (concept, anchor.expand_as(concept)))  # (N * tokens, d)
        reach = seen @ directions.T  # P
        solution = torch.linalg.solve(reach.T @ reach + cost, reach.T @ (wanted - seen)).T / scale  # A (d, k)
        weights = {name: (layer.weight.double() @ solution.to(layer.weight.device)).float().requires_grad_()
                   for name, layer in layers.items()}
        return cls(weights, directions, scale)

    def parameters(self) -> list[torch.Tensor]:
        return list(self.coefficients.values())

    def cut(self, rank: int) -> SeparableShift:
        """The shift with only its `rank` strongest directions, orthonormal, the strongest first: the right singular vectors
        of all layers' dW, stacked. They are combinations of the shift's own, so that what is protected stays so."""
        orthogonal, stacked_qr_factor = torch.linalg.qr(self.directions.T)  # S = triangle^T orthogonal^T
        within = {name: weight.detach().cpu().double() @ (self.scale * stacked_qr_factor.T)
                  for name, weight in self.coefficients.items()}  # dW = within orthogonal^T, (out, k)
        stacked = torch.linalg.qr(torch.cat(list(within.values())), mode="r").R
        strongest = torch.linalg.svd(stacked).Vh[:rank]  # (rank, k)
        return SeparableShift({name: weight @ strongest.T for name, weight in within.items()},
                              strongest @ orthogonal.T, 1.0, self.metadata | {"cut_to_rank": rank})

    def lora_factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
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

    def delta_output(self, name: str, seen: torch.Tensor) -> torch.Tensor:
        return (seen @ (self.scale * self.directions).T) @ self._weight(name).T  # (tokens, k) @ (k, out)

    def delta_output_norms(self, names: Sequence[str], embeddings: Mapping[str, torch.Tensor]) -> dict[str, float]:
        along = {prompt: seen.cpu().double() @ (self.scale * self.directions).T for prompt, seen in embeddings.items()}
        return output_norms((self._weight(name) for name in names if name in self.names), along)  # of (tokens, k), not of (tokens, d)

    def save(self, path: Path, recipe: dict) -> None:
        """Coefficients (float32), and the basis once."""
        tensors = {f"w.{name}": value.float() for name, value in self.coefficients.items()}
        save_tensors(path, tensors | {"directions": self.directions}, SHIFT_FILE_TYPE,
                     recipe | {"scale": self.scale, "versions": library_versions()})

    @classmethod
    def read(cls, tensors: LazyTensors, recipe: dict) -> SeparableShift | None:
        """None when the tensors do not belong together."""
        directions, scale, weights = tensors["directions"], recipe.get("scale"), tensors.with_prefix("w.")
        good = directions.dim() == 2 and 0 < len(weights) == len(tensors) - 1 and all(
            weight.dim() == 2 and weight.shape[1] == len(directions) for weight in weights.values())
        if not good or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            return None
        return cls(weights, directions, scale, recipe)


class DenseShift(WeightShift):
    """dW as it is, for a method that trains the weights themselves."""

    def __init__(self, deltas: Mapping[str, torch.Tensor], recipe: dict | None = None):
        super().__init__(recipe)
        self.deltas = deltas

    @classmethod
    def from_weights(cls, unet: nn.Module, student: Mapping[str, torch.Tensor]) -> DenseShift:
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
        save_tensors(path, {f"d.{name}": value.float() for name, value in self.deltas.items()}, SHIFT_FILE_TYPE,
                     recipe | {"versions": library_versions()})

    @classmethod
    def read(cls, tensors: LazyTensors, recipe: dict) -> DenseShift | None:
        """None when the tensors are not named as those of such a shift."""
        deltas = tensors.with_prefix("d.")
        return cls(deltas, recipe) if len(deltas) == len(tensors) else None


def stacked_qr_factor(matrices: Iterable[torch.Tensor], width: int) -> torch.Tensor:
    """A triangle R (at most d, d) with `|e R^T|` the norm of what all `matrices` (out, d) make of e."""
    stacked = [matrix.detach().cpu().double() for matrix in matrices]
    return torch.linalg.qr(torch.cat(stacked), mode="r").R if stacked else torch.zeros(1, width, dtype=torch.float64)


def output_norms(matrices: Iterable[torch.Tensor], embeddings: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The norm of what all `matrices` (out, d) together make of each prompt's embedding (tokens, d)."""
    whole = stacked_qr_factor(matrices, next(iter(embeddings.values())).shape[-1])
    return {prompt: (seen.cpu().double() @ whole.T).norm().item() for prompt, seen in embeddings.items()}
