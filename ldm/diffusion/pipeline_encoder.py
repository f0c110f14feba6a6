"""The `encode_prompt` of a pipeline of diffusers, with what its text encoders' hidden states are while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Self

import torch
from diffusers.utils import logging as diffusers_logging
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.utils import logging as transformers_logging

from ldm.diffusion.batches import States
from ldm.diffusion.text_model import join_streams
from ldm.diffusion.text_states import LAST_STATE, capture_states

OUTPUTS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
SIDES = ("", "negative_")  # before the names of what is made of prompts, and of negative prompts

_SD = {"prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance", "negative_prompt", *OUTPUTS[:2]}
_XL = _SD | {"prompt_2", "negative_prompt_2", *OUTPUTS[2:]}
_OPTIONAL = {"lora_scale", "clip_skip"}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a weight in bytes
_WEIGHTS_AT_ONCE = 2**18  # that are summed in one pass, so that their copies as integers stay small


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the libraries say nothing but errors while the block runs."""
    libraries = [(logging, logging.get_verbosity()) for logging in (diffusers_logging, transformers_logging)]
    for logging, _ in libraries:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        for logging, verbosity in libraries:
            logging.set_verbosity(verbosity)


@dataclass
class EncodedPrompts:
    """What `encode_prompt` returns, by name, and the hidden states of each side's prompts.

    A side of which nothing was encoded, such as negative embeddings of zeros, has no states.
    """

    outputs: dict[str, torch.Tensor | None]
    states: dict[str, dict[tuple[str, int], torch.Tensor]]
    num_images: int  # as often each prompt is repeated in the outputs

    def rows(self, side: str) -> torch.Tensor:
        """Return the rows of a side's prompts, each prompt's once: (N, T, d), or of XL (N, T + 1, d + p)."""
        tokens, pooled = self.outputs[f"{side}prompt_embeds"], self.outputs.get(f"{side}pooled_prompt_embeds")
        assert tokens is not None
        tokens = tokens[:: self.num_images]
        return join_streams(tokens, pooled[:: self.num_images] if pooled is not None else None)

    def set_rows(self, side: str, rows: torch.Tensor) -> None:
        """Put other embeddings (N, rows, d) in place of a side's, in the form of `rows`."""
        tokens, pooled = self.outputs[f"{side}prompt_embeds"], self.outputs.get(f"{side}pooled_prompt_embeds")
        assert tokens is not None
        repeated = rows.repeat_interleave(self.num_images, dim=0)
        width = tokens.shape[-1]
        self.outputs[f"{side}prompt_embeds"] = repeated[:, : tokens.shape[1], :width].contiguous()
        if pooled is not None:
            self.outputs[f"{side}pooled_prompt_embeds"] = repeated[:, -1, width:].contiguous()


@dataclass(frozen=True)
class PipelineEncoder:
    """A pipeline's own `encode_prompt`, and under which LoRA scale and `clip_skip` `encode_with_states` calls it."""

    pipe: Any
    encode_prompt: Callable[..., Any]
    lora_scale: float | None = None
    clip_skip: int | None = None

    @classmethod
    def of(cls, pipe: Any) -> Self:
        """Return the encoder of a pipeline, whose `encode_prompt` is as it is now.

        Raises ValueError for a pipeline that does not encode prompts as Stable Diffusion or XL do.
        """
        name = type(pipe).__name__
        encode_prompt = getattr(type(pipe), "encode_prompt", None)
        names = set(inspect.signature(encode_prompt).parameters) - {"self"} if encode_prompt else set[str]()
        if names - _OPTIONAL not in (_SD, _XL):
            raise ValueError(
                f"{name} does not encode prompts as Stable Diffusion 1.x, 2.x or XL: give a pipeline of one of these"
            )
        encoder = cls(pipe, pipe.encode_prompt)
        if not encoder.text_encoders:
            raise ValueError(f"this {name} has no text encoder and tokenizer: give it both, so that it reads prompts")
        return encoder

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Return the text encoders that the pipeline has now, by name: `text_encoder`, and of XL `text_encoder_2`."""
        return {name: encoder for name, encoder, _ in self._parts()}

    @property
    def tokenizers(self) -> list[Any]:
        """Return the tokenizers, in the order of the text encoders."""
        return [tokenizer for _, _, tokenizer in self._parts()]

    @property
    def places(self) -> dict[str, tuple[slice, slice]]:
        """Return the rows and columns of prompts' rows that are each stream's, `tokens` and of XL `pooled`."""
        width = sum(encoder.config.hidden_size for encoder in self.text_encoders.values())
        number = self.tokenizers[0].model_max_length
        found = {"tokens": (slice(0, number), slice(0, width))}
        if "text_encoder_2" in self.text_encoders:
            pooled = self.text_encoders["text_encoder_2"].config.projection_dim
            found["pooled"] = slice(number, number + 1), slice(width, width + pooled)
        return found

    def _parts(self) -> Iterator[tuple[str, Any, Any]]:
        for suffix in ("", "_2"):
            encoder = getattr(self.pipe, f"text_encoder{suffix}", None)
            tokenizer = getattr(self.pipe, f"tokenizer{suffix}", None)
            if encoder is not None and tokenizer is not None:
                yield f"text_encoder{suffix}", encoder, tokenizer

    @property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.pipe).encode_prompt, self.pipe))

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of a call of `encode_prompt` by name, those that it does not give too."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def run(self, arguments: Mapping[str, Any], layers: Mapping[str, Collection[int]]) -> EncodedPrompts:
        """Call the pipeline's own `encode_prompt`, and keep the hidden states after `layers`, by text encoder.

        A layer is a number from 0, or `LAST_STATE`: what the denoiser is given where no `clip_skip` says otherwise.
        Raises ValueError where the text encoders do not run once for each side.
        """
        calls: dict[str, list[dict[int, torch.Tensor]]] = {}
        with ExitStack() as stack:
            for name, encoder in self.text_encoders.items():
                if layers.get(name):
                    calls[name] = stack.enter_context(self._capture_calls(encoder, layers[name]))
            returned = self.encode_prompt(**arguments)
        outputs: dict[str, torch.Tensor | None] = dict(zip(OUTPUTS, returned, strict=False))
        sides = [side for side in SIDES if arguments[f"{side}prompt_embeds"] is None]
        states: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
        for name, found in calls.items():
            for side, captured in zip(sides, found, strict=False):
                own = {(name, number): state for number, state in captured.items()}
                states[side] = states.get(side, {}) | own
        encoded = EncodedPrompts(outputs, states, arguments["num_images_per_prompt"])
        fits = all(len(found) <= len(sides) for found in calls.values())
        for side, found in states.items():
            fits = fits and all(len(state) == len(encoded.rows(side)) for state in found.values())
        if not fits:
            raise ValueError(
                f"{type(self.pipe).__name__} runs its text encoder on parts of prompts, where no gate can follow: "
                "give each prompt to its `encode_prompt` whole"
            )
        return encoded

    @contextmanager
    def _capture_calls(self, encoder: Any, layers: Collection[int]) -> Iterator[list[dict[int, torch.Tensor]]]:
        """Collect, for each time a text encoder runs in the block, its states (N, T, d) after `layers`."""
        calls: list[dict[int, torch.Tensor]] = []
        numbers = [number for number in layers if number != LAST_STATE]

        with capture_states(encoder, numbers) as states:

            def keep(_: Any, inputs: Any, output: Any) -> None:
                last = output.hidden_states[-2] if "prompt_2" in self._signature.parameters else output[0]
                calls.append({**states, LAST_STATE: last})

            hook = encoder.register_forward_hook(keep)
            try:
                yield calls
            finally:
                hook.remove()

    @torch.no_grad()
    def encode_with_states(
        self, prompts: list[str], layers: Mapping[str, Collection[int]]
    ) -> tuple[torch.Tensor, States]:
        """Return embeddings (N, rows, d) and hidden states in float32, as `DiffusionModel.encode_with_states` does."""
        arguments = self.bind(prompts, device=self.pipe._execution_device, **self._settings())
        with _quiet():  # that prompts are cut is known
            encoded = self.run(arguments, layers)
        states = {key: state.float() for key, state in encoded.states.get("", {}).items()}
        return encoded.rows("").float(), states

    def _settings(self) -> dict[str, Any]:
        settings = {"lora_scale": self.lora_scale, "clip_skip": self.clip_skip}
        known = {name: value for name, value in settings.items() if name in self._signature.parameters}
        return {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, **known}

    def fingerprint(self) -> Hashable:
        """Return what the hidden states depend on: weights, how many tokens there are, and LoRAs with their scales.

        Weights count by the sums of their bits, which are the same on every device and see changes through `.data`.
        Those that are offloaded to no device, as sequential offloading does, count by their number alone.
        """
        parts: list[Hashable] = [len(tokenizer) for tokenizer in self.tokenizers]
        for encoder in self.text_encoders.values():
            parts += [parameter.dtype for parameter in encoder.parameters()]
            parts += _sums_of_bits(encoder)
            adapters = _adapters(encoder)
            parts.append(adapters)
            if adapters:
                parts.append(1.0 if self.lora_scale is None else float(self.lora_scale))
        return tuple(parts)


def _sums_of_bits(module: torch.nn.Module) -> list[int]:
    sums: list[torch.Tensor] = []
    for parameter in module.parameters():
        if not parameter.is_meta:
            bits = parameter.detach().flatten().view(_INTEGERS[parameter.element_size()])
            sums += [part.sum(dtype=torch.int64) for part in bits.split(_WEIGHTS_AT_ONCE)]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for found in sums:
        by_device.setdefault(found.device, []).append(found)
    return [number for group in by_device.values() for number in torch.stack(group).tolist()]


def _adapters(module: torch.nn.Module) -> str:
    """Return which LoRAs a text encoder has, and whether and how strongly they act; empty for none."""
    found: list[Any] = []
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            scales: dict[str, float] = getattr(layer, "scaling", {})
            # A scale that a call multiplies, and divides by again, may differ in its last bit.
            rounded = {adapter: f"{scale:.6g}" for adapter, scale in scales.items()}
            found.append((name, layer.active_adapters, layer.disable_adapters, rounded))
    return repr(found) if found else ""
