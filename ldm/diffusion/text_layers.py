"""The linear layers of a denoiser that see the prompt alone: what erasure changes. They are found by trying.

A denoiser runs three times: with other latents and another timestep under the same prompts, then with other prompts. A
linear layer whose input stays in the first two passes and differs in the last sees the prompt alone. Of layers behind
one another the first is one whose input is what the pipeline gives the denoiser: the tokens' embeddings, or the pooled
one, each a stream; or such an input after a norm. What is tried is a narrow twin of the denoiser, of the same class and
config but small, so that no model is too large.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.diffusion.families import family_of
from ldm.diffusion.family import Encoded, Family

TOKENS, POOLED = "tokens", "pooled"  # the streams that there are
_PROMPTS, _ROWS = 2, 5  # prompts, and tokens of each, that a twin is tried on


@dataclass(frozen=True)
class TextLayer:
    """A linear layer that sees a stream: from which column on, by its name, and after which norm, if any."""

    name: str
    stream: str
    start: int = 0
    norm: str = ""


class TextLayers(Mapping[str, nn.Linear]):
    """The text layers of a denoiser by name, and what each sees of a prompt's rows (T + 1, d + p).

    The rows of a prompt are its tokens' embeddings in the first d columns, and below them its pooled embedding in the
    last p; without a pooled stream they are the tokens' alone. Where peft has put a LoRA around a layer, it is the
    layer inside, under the name that it has without.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], found: Mapping[str, TextLayer], widths: Mapping[str, int]):
        self._layers, self.found, self.widths = dict(layers), dict(found), dict(widths)

    def __getitem__(self, name: str) -> nn.Linear:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def width(self) -> int:
        """Return d + p."""
        return sum(self.widths.values())

    @property
    def streams(self) -> list[slice]:
        """Return the columns of a prompt's rows that are each stream's."""
        return [self.columns(stream) for stream in self.widths]

    @property
    def stream_names(self) -> list[str]:
        """Return what each of `streams` is called."""
        return list(self.widths)

    def columns(self, stream: str) -> slice:
        """Return the columns of a prompt's rows that are a stream's."""
        start = 0 if stream == TOKENS else self.widths[TOKENS]
        return slice(start, start + self.widths[stream])

    def row_weight(self, name: str) -> torch.Tensor:
        """Return what a layer's weight makes of a prompt's rows, (out, d + p): nothing of what it does not see."""
        return self.as_rows(name, self._layers[name].weight.detach())

    def as_rows(self, name: str, delta: torch.Tensor) -> torch.Tensor:
        """Return what acts on a layer's input (n, in) as it acts on a prompt's rows, (n, d + p)."""
        own = delta[:, self.own_columns(name)]
        if own.shape[1] == self.width:
            return own
        columns = self.columns(self.found[name].stream)
        return F.pad(own, (columns.start, self.width - columns.stop))

    def in_weight(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return what acts on a prompt's rows (n, d + p) as it acts on a layer's input, (n, in).

        It is zero in the columns that are not the text's.
        """
        own, number = self.own_columns(name), self._layers[name].in_features
        if own.stop - own.start == number == self.width:
            return rows
        return F.pad(rows[:, self.columns(self.found[name].stream)], (own.start, number - own.stop))

    def own_columns(self, name: str) -> slice:
        """Return the columns of a layer's weight that are the text's: all but those of XL's sizes."""
        start = self.found[name].start
        return slice(start, start + self.widths[self.found[name].stream])


@cache
def _find(denoiser_class: type, config: str, family: Family) -> tuple[TextLayer, ...]:
    """Return the text layers of a class of denoisers under a config, a JSON object, in the order of its modules."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tuple(_probe(denoiser_class, json.loads(config), family))


@torch.no_grad()
def _probe(denoiser_class: Any, config: Mapping[str, Any], family: Family) -> Iterator[TextLayer]:
    narrow = family.narrow_config(config)
    twin = denoiser_class.from_config(narrow).eval()
    width, pooled_width = family.text_dims(narrow)
    prompts: list[Encoded] = []
    for _ in range(2):
        pooled = torch.randn(_PROMPTS, pooled_width) if pooled_width else None
        prompts.append(Encoded(torch.randn(_PROMPTS, _ROWS, width), pooled))
    latents = [torch.randn(_PROMPTS, *family.narrow_shape(narrow)) for _ in range(2)]
    passes = []
    for latent, timestep, given in ((0, 700.0, 0), (1, 300.0, 0), (1, 300.0, 1)):
        passes.append(_inputs(twin, family, latents[latent], torch.tensor(timestep), prompts[given]))
    (first, outputs), (second, _), (third, _) = passes
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and name in first:
            same, other = _equal(first[name], second[name]), _equal(second[name], third[name])
            layer = _classify(name, first[name], prompts[0], outputs) if same and not other else None
            if layer is not None:
                yield layer


def _inputs(
    twin: nn.Module, family: Family, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Return the input of each linear layer in a pass, by name, and inputs and outputs of each norm."""
    inputs: dict[str, torch.Tensor] = {}
    norms: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = []

    def keep(name: str, is_linear: bool) -> Any:
        def hook(_: nn.Module, given: Any, output: Any) -> None:
            if is_linear:
                inputs[name] = given[0].clone()
            elif given and isinstance(given[0], torch.Tensor) and isinstance(output, torch.Tensor):
                norms[name] = given[0].clone(), output.clone()

        return hook

    for name, module in twin.named_modules():
        is_linear = isinstance(module, nn.Linear)
        if is_linear or type(module).__name__.endswith("Norm"):
            hooks.append(module.register_forward_hook(keep(name, is_linear)))
    try:
        family.predict(twin, latents, timestep, prompts, 64)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, norms


def _classify(
    name: str, given: torch.Tensor, prompts: Encoded, norms: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> TextLayer | None:
    """Return what a layer sees of prompts; None where that is what other layers made of them."""
    for norm, (before, after) in ({"": (given, given)} | dict(norms)).items():
        if not _equal(after, given):
            continue
        if _holds(before, prompts.tokens, 0):
            return TextLayer(name, TOKENS, norm=norm)
        if prompts.pooled is not None:
            for start in range(before.shape[-1] - prompts.pooled.shape[-1] + 1):
                if _holds(before, prompts.pooled, start):
                    return TextLayer(name, POOLED, start, norm)
    return None


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _holds(given: torch.Tensor, stream: torch.Tensor, start: int) -> bool:
    """Return whether a layer's input has the numbers of a stream from a column on, of the same prompts."""
    own = given[..., start : start + stream.shape[-1]]
    return own.numel() == stream.numel() and torch.equal(own.reshape_as(stream), stream)


def text_layers(denoiser: Any) -> TextLayers:
    """Return the linear layers of a denoiser that see the prompt and nothing else, in the order of its modules.

    In Stable Diffusion these are all `attn2.to_k` and `attn2.to_v`, the keys and values of cross-attention. Raises
    ValueError for a class of denoisers that is not known, and for one that has no such layer.
    """
    family = family_of(denoiser)
    config = {name: value for name, value in denoiser.config.items() if not name.startswith("_")}
    found = _find(type(denoiser), json.dumps(config, sort_keys=True), family)
    modules = {name.removesuffix(".base_layer"): module for name, module in denoiser.named_modules()}
    inner = {name: module for name, module in denoiser.named_modules() if name.endswith(".base_layer")}
    modules |= {name.removesuffix(".base_layer"): module for name, module in inner.items()}
    width, pooled_width = family.text_dims(config)
    streams = dict.fromkeys(layer.stream for layer in found)
    widths = {name: size for name, size in ((TOKENS, width), (POOLED, pooled_width)) if name in streams}
    layers: dict[str, nn.Linear] = {}
    for layer in found:
        module = modules.get(layer.name)
        if not isinstance(module, nn.Linear) or module.in_features < layer.start + widths[layer.stream]:
            raise ValueError(f"{layer.name} of this {type(denoiser).__name__} is no linear layer that sees a prompt")
        layers[layer.name] = module
    if not layers:
        raise ValueError(
            f"{type(denoiser).__name__} has no linear layer that sees the prompt and nothing else, so that nothing "
            "can be erased from it so"
        )
    return TextLayers(layers, {layer.name: layer for layer in found}, widths)


def output_gram(layers: TextLayers) -> torch.Tensor:
    """Return the sum over text layers of `W^T W`, (d + p, d + p), float64, with W what takes a prompt's rows."""
    total = torch.zeros(layers.width, layers.width, dtype=torch.float64)
    for name in layers:
        weight = layers.row_weight(name).cpu().double()
        total += weight.T @ weight
    return total
