"""Weight shifts: the one home of a change that erases a concept and can be left out again.

A separable shift is `dW = w (scale * S)` with directions S in the null space of what is protected
(`ldm.erasure.null_space`); one of embeddings has w = W A for every layer, so that `(W + dW) e = W (e + A S e)`; a dense
one is dW as it is. (Separable Multi-Concept Erasure, arXiv 2402.05947.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from ldm.erasure.gated_edit import GatedEdit, is_gated_tensor
from ldm.erasure.layer_rows import Products, as_rows, in_weight, lacking, stream_columns
from ldm.erasure.output_norms import norms_through, output_norms, stacked_qr_factor
from ldm.erasure.shift_file import (
    HEADER,
    LARGEST,
    SHIFT_FILE_TYPE,
    check_size,
    factor_tensors,
    read_factors,
    split_parts,
)
from ldm.io.checks import check_header
from ldm.io.tensors import EmbeddingModel, LazyTensors, check_base_model, library_versions, load_tensors, save_tensors


class WeightShift(ABC):
    """A change of the denoiser's weights that erases a concept, kept beside them: one dW per parameter it changes."""

    def __init__(self, metadata: dict[str, Any] | None = None):
        self.metadata = metadata or {}
        self.path: Path | str = "this shift"
        self.content_digest = ""  # of the file that it was read from
        self.gated: GatedEdit | None = None  # what erases the concept in prompts instead of weights
        self.parts: list[WeightShift] = []  # what its file has for further text encoders
        self.is_whole = True  # whether it is all that its file has, for rows as it was made on
        self.layers: Mapping[str, nn.Linear] = {}  # the text layers that it acts on, by `on`

    @property
    def provenance(self) -> dict[str, Any]:
        """Return what is said of the shift by what is made with it: its metadata, and the digest of its contents."""
        return self.metadata | ({"content_digest": self.content_digest} if self.content_digest else {})

    def on(self, layers: Mapping[str, nn.Linear]) -> Self:
        """Return the shift as it acts on a denoiser with these text layers."""
        bound = copy(self)
        bound.layers = layers
        return bound

    @property
    def is_gate_alone(self) -> bool:
        """Whether it changes no weights, and acts by its gate in whatever form."""
        return self.gated is not None and self.rank == 0

    @property
    @abstractmethod
    def parameter_names(self) -> list[str]:
        """The names of the parameters that it changes."""

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """The number of directions that all its dW share; None for whole weights."""

    @abstractmethod
    def delta_weight(self, name: str) -> torch.Tensor:
        """Return dW of one parameter, in its shape, float64 on the CPU."""

    def row_delta(self, name: str) -> torch.Tensor:
        """Return what dW of a text layer makes of a prompt's rows, (out, d), float64 on the CPU."""
        layer, delta = name.removesuffix(".weight"), self.delta_weight(name)
        return as_rows(self.layers, layer, delta) if layer in self.layers else delta

    @abstractmethod
    def fits(self, name: str, weight: torch.Tensor) -> bool:
        """Return whether the dW of a parameter is for such a weight."""

    @abstractmethod
    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """Write the shift as safetensors, with `metadata` beside what this kind of shift adds to it."""

    def _save(self, path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        if self.gated is not None:
            tensors |= self.gated.tensors()
            metadata |= {"gate": self.gated.metadata}
        save_tensors(path, tensors, SHIFT_FILE_TYPE, metadata)

    def delta_output(self, name: str, embeds: torch.Tensor) -> torch.Tensor:
        """Return what a linear layer's dW adds to its output for `embeds` (tokens, d), float64: (tokens, out)."""
        return embeds @ self.row_delta(name).T

    def delta_output_norms(self, names: Sequence[str], embeds: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return, per prompt embedding (tokens, d), the norm of what dW adds to the outputs of all layers `names`."""
        return output_norms((self.row_delta(name) for name in names if name in self.parameter_names), embeds)

    @staticmethod
    def load(path: Path, hint: str = "", checked: bool = False) -> WeightShift:
        """Return the shift in a file, whose bytes the caller may have `checked`.

        Raises ValueError if it is missing, damaged, of wrong shapes or not a shift, or if its header says what no shift
        can be.
        """
        tensors, metadata = load_tensors(path, SHIFT_FILE_TYPE, hint, checked)
        check_header(Path(path), metadata, HEADER)
        found = [WeightShift._read(path, *part) for part in split_parts(Path(path), tensors, metadata)]
        found[0].parts = found[1:]
        for part in found:
            part.is_whole = len(found) == 1
        return found[0]

    @staticmethod
    def _read(path: Path, tensors: LazyTensors, metadata: dict[str, Any]) -> WeightShift:
        weights = tensors.where(lambda name: not is_gated_tensor(name))
        kind = SeparableShift if "directions" in weights else DenseShift
        if any(name.startswith("outputs") for name in weights):
            kind = EmbeddingShift
        gated = GatedEdit.read(tensors, metadata.get("gate")) if len(weights) < len(tensors) else None
        shift = EmbeddingShift.none(gated, metadata) if gated and not weights else kind.read(weights, metadata)
        if shift is not None:
            shift.gated = gated
        if shift is None or (shift.gated is None and len(weights) < len(tensors)):
            raise ValueError(f"{path} has tensors of wrong names, shapes or sizes for a weight shift: make it again")
        shift.path, shift.content_digest = path, tensors.content_digest
        return shift

    @abstractmethod
    def in_memory(self) -> Self:
        """Return the shift, read whole: nothing of it changes where its file is written anew."""

    def check(self, model: EmbeddingModel) -> None:
        """Raise ValueError unless the shift was made for the base model, or for its text encoder, and fits it."""
        check_base_model(self.metadata, model, self.path)
        denoiser = getattr(model, "denoiser", None)
        if denoiser is None:
            raise ValueError(f"{self.path} changes a denoiser's weights, and {model.name} is a text encoder alone")
        weights = dict(denoiser.named_parameters())
        for name in self.parameter_names:
            if name not in weights or not self.fits(name, weights[name]):
                raise ValueError(f"{self.path}: {name} does not fit the model's layer: make it again")


class SeparableShift(WeightShift):
    """`dW = w (scale * S)` for every text layer: coefficients w (out, k) a layer, directions S (k, d) shared by all.

    Where a denoiser sees several streams of a prompt, d is the width of its rows, and a direction lies in one stream.
    """

    def __init__(
        self,
        coefficients: Mapping[str, torch.Tensor],
        directions: torch.Tensor,
        scale: float,
        metadata: dict[str, Any] | None = None,
    ):
        super().__init__(metadata)
        self.coefficients = coefficients
        self.directions = directions.detach().double().cpu()
        self.scale = scale

    @classmethod
    def zeros(cls, layers: Mapping[str, nn.Linear], directions: torch.Tensor, scale: float) -> Self:
        """Return a shift of nothing, ready to be trained: its coefficients are leaf tensors with gradients."""
        coefficients = {}
        for name, layer in layers.items():
            shape = layer.out_features, len(directions)
            coefficients[name] = torch.zeros(shape, device=layer.weight.device, requires_grad=True)
        return cls(coefficients, directions, scale).on(layers)

    def on(self, layers: Mapping[str, nn.Linear]) -> Self:
        bound = super().on(layers)
        more = lacking(layers, self.directions.shape[1])
        bound.directions = F.pad(self.directions, (0, more)) if more else self.directions
        return bound

    def fits(self, name: str, weight: torch.Tensor) -> bool:
        return len(weight) == len(self._weight(name)) and weight.shape[1] <= self.directions.shape[1]

    def parameters(self) -> list[torch.Tensor]:
        """Return what is trained."""
        return list(self.coefficients.values())

    @property
    def parameter_names(self) -> list[str]:
        seen = {layer: in_weight(self.layers, layer, self.directions) for layer in self.coefficients}
        return [f"{layer}.weight" for layer, directions in seen.items() if directions.any() or not self.rank]

    @property
    def rank(self) -> int:
        return len(self.directions)

    def in_memory(self) -> Self:
        self.coefficients = dict(self.coefficients)
        return self

    def truncate(self, rank: int) -> SeparableShift:
        """Return the shift with only its `rank` strongest directions, orthonormal, the strongest first.

        They are the right singular vectors of all layers' dW, stacked: combinations of the shift's own directions, so
        that what is protected stays so.
        """
        orthogonal, triangle = torch.linalg.qr(self.directions.T)  # S = triangle^T orthogonal^T
        in_basis = {}  # (out, k), of which dW = in_basis orthogonal^T
        for name, weight in self.coefficients.items():
            in_basis[name] = weight.detach().cpu().double() @ (self.scale * triangle.T)
        stacked = torch.linalg.qr(torch.cat(list(in_basis.values())), mode="r").R
        strongest = torch.linalg.svd(stacked).Vh[:rank]  # (rank, k)
        coefficients = {name: weight @ strongest.T for name, weight in in_basis.items()}
        truncated = SeparableShift(
            coefficients, strongest @ orthogonal.T, 1.0, self.metadata | {"truncated_to_rank": rank}
        )
        truncated.path, truncated.content_digest, truncated.gated = self.path, self.content_digest, self.gated
        truncated.layers = self.layers
        return truncated

    def lora_factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return dW of a text layer as `up (out, k) @ down (k, d)`, float64, with the directions that it sees."""
        down = in_weight(self.layers, layer, self.directions)
        seen = down.any(dim=1)
        return self._weight(layer)[:, seen] * self.scale, down[seen]

    def _weight(self, name: str) -> torch.Tensor:
        return self.coefficients[name.removesuffix(".weight")].detach().cpu().double()

    def row_delta(self, name: str) -> torch.Tensor:
        return self._weight(name) @ (self.scale * self.directions)

    def delta_weight(self, name: str) -> torch.Tensor:
        return in_weight(self.layers, name.removesuffix(".weight"), self.row_delta(name))

    def delta_output_norms(self, names: Sequence[str], embeds: Mapping[str, torch.Tensor]) -> dict[str, float]:
        factor = stacked_qr_factor((self._weight(name) for name in names if name in self.parameter_names), self.rank)
        return norms_through(
            (self.scale * self.directions, factor), embeds
        )  # (tokens, k) in between, smaller than (tokens, d)

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """Write the coefficients (float32) and the directions (float64), once."""
        tensors = {f"w.{name}": value.float() for name, value in self.coefficients.items()}
        tensors["directions"] = self.directions
        largest = max(float(value.detach().abs().max()) for value in self.coefficients.values())
        check_size(path, abs(self.scale) * largest * float(self.directions.abs().max()))
        added = {"scale": self.scale, "versions": library_versions()}
        self._save(path, tensors, metadata | added)

    @classmethod
    def read(cls, tensors: LazyTensors, metadata: dict[str, Any]) -> Self | None:
        """Return the shift that a file's tensors are; None when they do not belong together."""
        directions, scale, weights = tensors["directions"], metadata.get("scale"), tensors.with_prefix("w.")
        if directions.dim() != 2 or not len(directions) or not 0 < len(weights) == len(tensors) - 1:
            return None
        if not directions.is_floating_point() or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            return None
        largest = 0.0
        for weight in weights.values():  # each is read from the file here
            fits = weight.dim() == 2 and weight.shape[1] == len(directions) and weight.numel() > 0
            if not fits or not weight.is_floating_point():
                return None
            largest = max(largest, float(weight.abs().max()))
        if abs(scale) * largest * float(directions.abs().max()) > LARGEST:
            return None
        return cls(weights, directions, scale, metadata)


class EmbeddingShift(SeparableShift):
    """`dW = W A S` for every text layer: one change of prompts' embeddings, e -> e + A S e, that needs no denoiser.

    A (d, k) and S (k, d) fit every denoiser of the same text encoder; `on` says which layers' weights it changes.
    """

    def __init__(
        self,
        outputs: torch.Tensor,
        directions: torch.Tensor,
        metadata: dict[str, Any] | None = None,
    ):
        self.outputs = outputs.detach().double().cpu()
        super().__init__({}, directions, 1.0, metadata)

    @classmethod
    def none(cls, gated: GatedEdit, metadata: dict[str, Any] | None = None) -> EmbeddingShift:
        """Return the shift that is a gate alone: it changes no weights."""
        width = len(next(iter(gated.maps.values())).outputs)
        shift = EmbeddingShift(torch.zeros(width, 0), torch.zeros(0, width), metadata)
        shift.gated = gated
        return shift

    def on(self, layers: Mapping[str, nn.Linear]) -> Self:
        bound = super().on(layers)
        more = bound.directions.shape[1] - len(self.outputs)
        bound.outputs = F.pad(self.outputs, (0, 0, 0, more)) if more else self.outputs
        bound.coefficients = Products(layers, bound.outputs)
        return bound

    def in_memory(self) -> Self:
        return self

    def rounded(self, dtype: torch.dtype) -> EmbeddingShift:
        """Return the shift as a file in `dtype` has it, its gated edit too."""
        outputs, directions = self.outputs.to(dtype).double(), self.directions.to(dtype).double()
        made = self._with(outputs, directions)
        made.gated = made.gated.rounded() if made.gated and dtype == torch.float16 else made.gated
        if not torch.equal(outputs, self.outputs) or not torch.equal(directions, self.directions):
            made.content_digest = ""  # since it is not as its file has it
        return made

    def tensors(self, dtype: torch.dtype, streams: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return what a file in `dtype` holds by name, of rows with `streams` of these widths: of a gate alone none."""
        found = factor_tensors(self.outputs, self.directions, streams) if self.rank else {}
        return {name: tensor.to(dtype) for name, tensor in found.items()}

    def embedding_change(self) -> torch.Tensor:
        """Return A S (d, d), which is added to the identity: what becomes of an embedding, float64."""
        return self.outputs @ self.directions

    def truncate(self, rank: int) -> EmbeddingShift:
        """Return the shift with only its `rank` strongest directions of each stream in its layers, or in embeddings."""
        stacked = stacked_qr_factor(self.coefficients.values() or [self.outputs], self.rank)
        parts: list[torch.Tensor] = []
        for columns in stream_columns(self.layers, self.directions.shape[1]):
            own = self.directions[:, columns].any(dim=1)
            if own.any():
                vh = torch.linalg.svd(stacked[:, own]).Vh[:rank]  # (rank, own k), the directions being orthonormal
                parts.append(vh.new_zeros(len(vh), self.rank).masked_scatter(own, vh))
        strongest = torch.cat(parts)
        made = self._with(self.outputs @ strongest.T, strongest @ self.directions)
        made.metadata = self.metadata | {"truncated_to_rank": rank}
        return made

    def _with(self, outputs: torch.Tensor, directions: torch.Tensor) -> Self:
        made = copy(self)
        made.outputs, made.directions = outputs, directions
        return made.on(self.layers)

    def check(self, model: EmbeddingModel) -> None:
        """Raise ValueError unless the shift was made for the model's text encoder."""
        check_base_model(self.metadata, model, self.path)
        if self.rank and len(self.outputs) not in (model.context_dim, *getattr(model, "widths", {}).values()):
            raise ValueError(
                f"{self.path} changes embeddings of {len(self.outputs)} numbers, and the model's have "
                f"{model.context_dim}: make it again"
            )

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """Write A and S in float32."""
        tensors = self.tensors(torch.float32, metadata.get("streams", {}))
        if self.rank:
            check_size(path, float(self.outputs.abs().max()) * float(self.directions.abs().max()))
        self._save(path, tensors, metadata | {"versions": library_versions()})

    @classmethod
    def read(cls, tensors: LazyTensors, metadata: dict[str, Any]) -> Self | None:
        """Return the shift that a file's tensors are; None when they do not belong together."""
        factors = read_factors(tensors, metadata.get("streams", {}))
        if factors is None or not all(factor.is_floating_point() for factor in factors):
            return None
        outputs, directions = factors
        if float(outputs.abs().max()) * float(directions.abs().max()) > LARGEST:
            return None
        return cls(outputs, directions, metadata)


class DenseShift(WeightShift):
    """dW as it is, for a method that trains the weights themselves."""

    def __init__(self, deltas: Mapping[str, torch.Tensor], metadata: dict[str, Any] | None = None):
        super().__init__(metadata)
        self.deltas = deltas

    @classmethod
    def from_weights(cls, unet: nn.Module, student: Mapping[str, torch.Tensor]) -> Self:
        """Return what leads from the U-Net's weights to those of `student`; weights that are the same are left out."""
        deltas = {}
        for name, weight in student.items():
            delta = weight.detach() - unet.get_parameter(name).detach()
            if delta.any():
                deltas[name] = delta
        return cls(deltas)

    @property
    def parameter_names(self) -> list[str]:
        return list(self.deltas)

    @property
    def rank(self) -> None:
        return None

    def in_memory(self) -> Self:
        self.deltas = dict(self.deltas)
        return self

    def delta_weight(self, name: str) -> torch.Tensor:
        return self.deltas[name].cpu().double()

    def fits(self, name: str, weight: torch.Tensor) -> bool:
        return self.deltas[name].shape == weight.shape

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """Write all dW in float32."""
        tensors = {f"d.{name}": value.float() for name, value in self.deltas.items()}
        check_size(path, max((float(value.abs().max()) for value in tensors.values()), default=0.0))
        self._save(path, tensors, metadata | {"versions": library_versions()})

    @classmethod
    def read(cls, tensors: LazyTensors, metadata: dict[str, Any]) -> Self | None:
        """Return the shift that a file's tensors are; None when they are not named as those of such a shift."""
        deltas = tensors.with_prefix("d.")
        if not 0 < len(deltas) == len(tensors) or not all(delta.is_floating_point() for delta in deltas.values()):
            return None
        return cls(deltas, metadata)
