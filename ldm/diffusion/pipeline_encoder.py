"""The `encode_prompt` of a pipeline of diffusers, with what its text encoders' hidden states are while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any, Self

import torch
from diffusers.utils import logging as diffusers_logging
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.utils import logging as transformers_logging

from ldm.diffusion.batches import States
from ldm.diffusion.families import FAMILIES, base_pipeline
from ldm.diffusion.family import MASK, PROMPT, Family, TextSource, check_padding, plain_tokenizer
from ldm.diffusion.text_layers import POOLED, TOKENS
from ldm.diffusion.text_model import join_streams, places_of, without_masked
from ldm.diffusion.text_states import LAST_STATE, capture_states

SIDES = PROMPTS, NEGATIVES = "", "negative_"  # before the names of what is made of prompts, and of negative prompts

# Of the arguments of `encode_prompt` those that say how prompts are read.
_READING = {
    "max_sequence_length",
    "clean_caption",
    "complex_human_instruction",
    "system_prompt",
    "text_encoder_out_layers",
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a weight in bytes
_Run = tuple[dict[int, torch.Tensor], torch.Tensor | None]  # hidden states of a text encoder by layer, and its mask
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
    """What `encode_prompt` returns, by name, and of each side's prompts the hidden states and which tokens are masked.

    A side of which nothing was encoded, such as negative embeddings of zeros, has no states.
    """

    outputs: dict[str, torch.Tensor | None]
    states: dict[str, dict[tuple[str, int], torch.Tensor]]
    masks: dict[str, torch.Tensor]  # (N, T, 1), of families that have such
    num_images: int  # as often each prompt is repeated in the outputs

    def rows(self, side: str) -> torch.Tensor:
        """Return the rows of a side's prompts, each prompt's once: (N, T, d), or of XL (N, T + 1, d + p).

        Those of masked tokens are zeros.
        """
        tokens, pooled = self.streams(side)
        tokens = tokens[:: self.num_images]
        if side in self.masks:
            tokens = tokens * self.masks[side].to(tokens)
        return join_streams(tokens, pooled[:: self.num_images] if pooled is not None else None)

    def set_rows(self, side: str, rows: torch.Tensor) -> None:
        """Put other embeddings (N, rows, d) in place of a side's, in the form of `rows`. What is the same stays."""
        tokens, pooled = self.streams(side)
        changed = (rows != self.rows(side)).flatten(1).any(dim=1)  # (N,)
        number, width = tokens.shape[1:]
        is_own = changed[:, None, None] & self.masks.get(side, changed[:, None, None]).bool()
        self.outputs[f"{side}{PROMPT}"] = self._replaced(tokens, rows[:, :number, :width], is_own)
        if pooled is not None:
            self.outputs[f"{side}pooled_{PROMPT}"] = self._replaced(pooled, rows[:, -1, width:], changed[:, None])

    def streams(self, side: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the tokens' embeddings of a side's prompts (N n, T, d), and the pooled ones (N n, p), if any."""
        tokens, pooled = (self.outputs.get(f"{side}{stream}{PROMPT}") for stream in ("", "pooled_"))
        assert tokens is not None
        return tokens, pooled

    def _replaced(self, output: torch.Tensor, values: torch.Tensor, is_own: torch.Tensor) -> torch.Tensor:
        """Return an output (N n, ...) with the values (N, ...) of prompts in all n images of each, where `is_own`."""
        repeated = [each.repeat_interleave(self.num_images, dim=0) for each in (is_own, values)]
        return torch.where(repeated[0], repeated[1].to(output), output)


@dataclass(frozen=True)
class PipelineEncoder:
    """A pipeline's own `encode_prompt`, and how `encode_with_states` calls it.

    That is under a LoRA scale and a `clip_skip`, with `options` such as `max_sequence_length`, which are those of the
    pipeline's own call where they are not given, and by way of its prompts or its negative ones.
    """

    pipe: Any
    encode_prompt: Callable[..., Any]
    lora_scale: float | None = None
    clip_skip: int | None = None
    options: Mapping[str, Any] | None = None
    side: str = PROMPTS

    @classmethod
    def of(cls, pipe: Any) -> Self:
        """Return the encoder of a pipeline, whose `encode_prompt` is as it is now.

        Raises ValueError for a pipeline that does not encode prompts as a known family does, or lacks what reads them.
        """
        adapter = FAMILIES[base_pipeline(pipe)]
        if any(getattr(pipe, name, None) is None or plain_tokenizer(pipe, name) is None for name in adapter.needs):
            raise ValueError(
                f"this {type(pipe).__name__} has no text encoder and tokenizer, so that it reads no prompts, and "
                f"embeddings alone do not tell what they say: give it both ({', '.join(adapter.needs)})"
            )
        check_padding(pipe, adapter)
        return cls(pipe, pipe.encode_prompt)

    @cached_property
    def adapter(self) -> Family:
        """Return what is particular to the pipeline's family."""
        return FAMILIES[base_pipeline(self.pipe)]

    @property
    def sources(self) -> list[TextSource]:
        """Return what each text encoder that the pipeline has now gives."""
        return self.adapter.sources(self.pipe)

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Return the text encoders that the pipeline has now, by name: `text_encoder`, and of XL `text_encoder_2`."""
        return {source.name: getattr(self.pipe, source.name) for source in self.sources}

    @property
    def tokenizers(self) -> list[Any]:
        """Return the tokenizers, in the order of the text encoders."""
        is_negative = self.side == NEGATIVES
        return [self.adapter.tokenizer(self.pipe, name, self._options, is_negative) for name in self.text_encoders]

    @property
    def encoder_digests(self) -> dict[str, str]:
        """Return what tells the text encoders apart: their names, since each may be given another prompt."""
        return {name: name for name in self.text_encoders}

    @property
    def places(self) -> dict[str, tuple[slice, slice]]:
        """Return the rows and columns of prompts' rows that are each stream's, as `TextModel.places`."""
        return self._places

    @cached_property
    @torch.no_grad()
    def _places(self) -> dict[str, tuple[slice, slice]]:
        return self.places_in(self._encode([""], {}), self.side)

    def places_in(self, encoded: EncodedPrompts, side: str) -> dict[str, tuple[slice, slice]]:
        """Return the same of a side's prompts as they are encoded."""
        tokens, pooled = encoded.streams(side)
        widths = {TOKENS: tokens.shape[2]} | ({POOLED: pooled.shape[1]} if pooled is not None else {})
        return places_of(self.sources, tokens.shape[1], widths)

    @property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.pipe).encode_prompt, self.pipe))

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of a call of `encode_prompt` by name, those that it does not give too."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        further = bound.arguments.pop("kwargs", {})  # as PixArt takes
        return {**bound.arguments, **further}

    @cached_property
    def _options(self) -> dict[str, Any]:
        """Return the arguments of `encode_prompt` that say how prompts are read."""
        if self.options is not None:
            return dict(self.options)
        calls = inspect.signature(type(self.pipe).__call__).parameters
        own = {name: calls.get(name, each).default for name, each in self._signature.parameters.items()}
        return self.options_of({**own, **self.adapter.prompt_options(self.pipe)})

    @staticmethod
    def options_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the arguments of `encode_prompt` that say how prompts are read."""
        return {name: value for name, value in arguments.items() if name in _READING}

    @property
    def reading(self) -> Hashable:
        """Return what hidden states depend on beside `fingerprint`: how prompts are read."""
        return self.side, self.reading_told

    @property
    def reading_told(self) -> str:
        """Return how prompts are read, in words."""
        return ", ".join(f"`{name}` {value!r}" for name, value in sorted(self._options.items()))

    def run(self, arguments: Mapping[str, Any], layers: Mapping[str, Collection[int]]) -> EncodedPrompts:
        """Call the pipeline's own `encode_prompt`, and keep the hidden states after `layers`, by text encoder.

        A layer is a number from 0, or `LAST_STATE`: what the denoiser is given where no `clip_skip` says otherwise.
        Raises ValueError where the text encoders do not run once for each side.
        """
        is_masked, calls = MASK in self.adapter.outputs, dict[str, list[_Run]]()
        with ExitStack() as stack:
            for source in self.sources:
                if is_masked or layers.get(source.name):
                    runs = self._capture_runs(source, layers.get(source.name, ()))
                    calls[source.name] = stack.enter_context(runs)
            returned = self.encode_prompt(**arguments)
        outputs: dict[str, torch.Tensor | None] = dict(zip(self.adapter.outputs, returned, strict=False))
        encoded = EncodedPrompts(outputs, {}, {}, arguments["num_images_per_prompt"])
        sides = [side for side in SIDES if arguments.get(f"{side}{PROMPT}", returned) is None]
        fits = all(len(runs) <= len(sides) for runs in calls.values())
        for name, runs in calls.items():
            for side, (captured, mask) in zip(sides, runs, strict=False):
                number = encoded.streams(side)[0].shape[1]
                own = {layer: self.adapter.rows_of(state, number) for layer, state in captured.items()}
                if is_masked and mask is not None:
                    mask = self.adapter.rows_of(mask, number)
                    own, encoded.masks[side] = without_masked(own, mask), mask[..., None]
                found = encoded.states.setdefault(side, {})
                found |= {(name, layer): state for layer, state in own.items()}
        for side, found in encoded.states.items():
            fits = fits and all(len(state) == len(encoded.rows(side)) for state in found.values())
        if not fits:
            raise ValueError(
                f"{type(self.pipe).__name__} runs its text encoder on parts of prompts, where no gate can follow: "
                "give each prompt to its `encode_prompt` whole"
            )
        return encoded

    @contextmanager
    def _capture_runs(self, source: TextSource, layers: Collection[int]) -> Iterator[list[_Run]]:
        """Collect, for each time a text encoder runs in the block, its states (N, T, d) after `layers`, and its mask.

        That is (N, T), or None.
        """
        runs: list[_Run] = []
        encoder = getattr(self.pipe, source.name)

        with capture_states(encoder, [number for number in layers if number != LAST_STATE]) as states:

            def keep(_: Any, inputs: Any, options: Any, output: Any) -> None:
                last = {LAST_STATE: source.last_state(output)} if LAST_STATE in layers else {}
                runs.append(({**states, **last}, options.get("attention_mask")))

            hook = encoder.register_forward_hook(keep, with_kwargs=True)
            try:
                yield runs
            finally:
                hook.remove()

    def _encode(self, prompts: list[str], layers: Mapping[str, Collection[int]]) -> EncodedPrompts:
        is_negative = self.side == NEGATIVES
        given = {"prompt": prompts, "prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": is_negative}
        given |= {"negative_prompt": prompts} if is_negative else {}
        given |= {"lora_scale": self.lora_scale, "clip_skip": self.clip_skip, "num_images_per_prompt": 1}
        given |= {"device": self.pipe._execution_device, **self._options}
        known = {name: value for name, value in given.items() if name in self._signature.parameters}
        with _quiet():  # that prompts are cut is known
            return self.run(self.bind(**known), layers)

    @torch.no_grad()
    def encode_with_states(
        self, prompts: list[str], layers: Mapping[str, Collection[int]]
    ) -> tuple[torch.Tensor, States]:
        """Return embeddings (N, rows, d) and hidden states in float32, as `DiffusionModel.encode_with_states` does."""
        encoded = self._encode(prompts, layers)
        states = {key: state.float() for key, state in encoded.states.get(self.side, {}).items()}
        return encoded.rows(self.side).float(), states

    def fingerprint(self) -> Hashable:
        """Return what the hidden states depend on: weights, how many tokens there are, and LoRAs with their scales.

        Weights count by the sums of their bits, which are the same on every device and see changes through `.data`.
        Those that are offloaded to no device, as sequential offloading does, count by their number alone.
        """
        parts: list[Hashable] = [len(plain_tokenizer(self.pipe, name)) for name in self.text_encoders]
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
    for tensor in (part for parameter in module.parameters() for part in _parts(parameter)):
        if not tensor.is_meta:
            bits = tensor.detach().flatten().view(_INTEGERS[tensor.element_size()])
            sums += [part.sum(dtype=torch.int64) for part in bits.split(_WEIGHTS_AT_ONCE)]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for found in sums:
        by_device.setdefault(found.device, []).append(found)
    return [number for group in by_device.values() for number in torch.stack(group).tolist()]


def _parts(tensor: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors whose numbers a tensor has: itself, or those inside one that is quantized, as by torchao."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


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
