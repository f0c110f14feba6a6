"""What is particular to a family of models: how its pipeline reads prompts, and what its denoiser is called with.

Everything else is diffusers' own pipeline. A family is one class, in a module beside this one, and a row in
`ldm.diffusion.families`.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

from ldm.diffusion.row_tokenizer import RowTokenizer

LAST, PENULTIMATE = "last hidden states", "last hidden states but one"
# What files say of these; `kind` was the type of a file in older ones.
STATES_KEY = "hidden_states"
AFTER_NORM = " after norm "  # in what is said of hidden states, before the digest of the norm behind them
BUT_ONE = (-2,)  # the number of the latter
PROMPT = "prompt_embeds"  # what `encode_prompt` calls the tokens' embeddings, and the end of what it calls pooled ones
MASK = "prompt_attention_mask"
# What most families without masks return.
PROMPTS_AND_POOLED = (PROMPT, f"negative_{PROMPT}", f"pooled_{PROMPT}", f"negative_pooled_{PROMPT}")
_NARROW_SIDE = 8  # of the latents that a narrow twin is tried on


@dataclass(frozen=True)
class Encoded:
    """What a pipeline makes of N prompts: `tokens` (N, T, d), zeros where a row is masked, and `pooled` (N, p)."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """Return which rows of the tokens there are, (N, T), ones and zeros: all but those of zeros."""
        return self.tokens.any(dim=-1).long()


@dataclass(frozen=True)
class TextSource:
    """A text encoder of a pipeline, by name: the rows and columns of the tokens, and of the pooled, that it gives.

    `states` are the hidden states that stand side by side in these columns; without any it is the last, after its norm.
    """

    name: str
    rows: slice | None = None
    columns: slice | None = None
    pooled: slice | None = None
    states: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """Return which of its hidden states the tokens' embeddings are, in words."""
        if self.states == BUT_ONE:
            return PENULTIMATE
        return f"hidden states {', '.join(map(str, self.states))}" if self.states else LAST

    def last_state(self, output: Any) -> torch.Tensor:
        """Return what the denoiser is given of what the text encoder returns, (N, T, width), before any `clip_skip`."""
        return torch.cat([output.hidden_states[k] for k in self.states], dim=-1) if self.states else output[0]


@dataclass(frozen=True)
class ModelSpec:
    """Which kind of model one is: as ModelSpec calls it (`architecture`), and as sd-scripts does; empty for unknown.

    `version` is sd-scripts' name of the base model, `network` that of its module of LoRAs, and `implementation` whose
    names the layers have in such a LoRA.
    """

    architecture: str = ""
    version: str = ""
    network: str = ""
    implementation: str = "diffusers"
    prediction_type: str = ""
    is_v2: bool = False


class Family:
    """The adapter of a family; this one is what most families of transformers share. It keeps nothing of a model."""

    denoiser = "transformer"  # the part of the pipeline
    needs: Sequence[str] = ("text_encoder",)  # the parts without which it reads no prompt
    reader = "text_encoder"  # which reads as many tokens as `max_sequence_length` says
    # What `encode_prompt` returns, by the names that it and the pipeline's own call take it by.
    outputs: Sequence[str] = (PROMPT, MASK, f"negative_{PROMPT}", f"negative_{MASK}")
    reads_negatives_alike = True  # whether it reads negative prompts as it reads prompts
    is_flow = True  # whether it predicts the velocity from clean latents to noise
    pads_right = False  # whether its `encode_prompt` lets a tokenizer pad on the right that would do so on the left
    joins_gates = False  # whether its text encoders' tokens are not the same, so that each has a gate by itself
    samples_by_call = True  # whether images are made by the pipeline's own call
    call_options: Mapping[str, Any] = {}  # of the pipeline's own call
    kohya_names: Mapping[str, str] = {}  # of text layers: what the original implementation calls them, and so do LoRAs
    # The entries of a denoiser's config that a narrow twin has smaller: with the same layers that see the prompt first.
    narrow: Mapping[str, Any] = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}

    def guides(self, pipe: Any) -> bool:
        """Return whether a pipeline guides by a negative prompt."""
        return True

    def takes_guidance(self, pipe: Any) -> bool:
        """Return whether a guidance scale acts: by a negative prompt, or as an input of the denoiser."""
        return self.guides(pipe) or bool(getattr(pipe, self.denoiser).config.get("guidance_embeds"))

    def num_tokens(self, pipe: Any) -> int:
        """Return T, how many tokens the pipeline's own call reads: its default, or what its tokenizer takes."""
        return self.prompt_options(pipe)["max_sequence_length"]

    def length(self, pipe: Any, name: str, options: Mapping[str, Any]) -> int:
        """Return how many tokens a text encoder reads, by the options of `encode_prompt`."""
        own = plain_tokenizer(pipe, name).model_max_length
        return options.get("max_sequence_length", own) if name == self.reader else own

    def tokenizer(
        self, pipe: Any, name: str, options: Mapping[str, Any] | None = None, is_negative: bool = False
    ) -> Any:
        """Return the tokenizer of a text encoder, as the rows of its embeddings follow from it.

        They do by the `options` of `encode_prompt`, by default those of the pipeline's own call.
        """
        options = self.prompt_options(pipe) if options is None else options
        plain, template = plain_tokenizer(pipe, name), self.template(pipe, options, is_negative)
        length = self.length(pipe, name, options)
        if template is None and length == plain.model_max_length:
            return plain
        dropped = slice(0) if is_negative else self.dropped(pipe, options)
        return RowTokenizer(plain, template or str, length, dropped)

    def template(self, pipe: Any, options: Mapping[str, Any], is_negative: bool) -> Callable[[str], str] | None:
        """Return what a pipeline makes of each prompt before its tokenizer reads it; None where that is the prompt."""
        return None

    def dropped(self, pipe: Any, options: Mapping[str, Any]) -> slice:
        """Return which tokens of the template have no row."""
        return slice(0)

    def sources(self, pipe: Any) -> list[TextSource]:
        """Return the text encoders, the one whose tokens are most of the rows first."""
        return [TextSource("text_encoder", slice(None), slice(None))]

    def rows_of(self, state: torch.Tensor, number: int) -> torch.Tensor:
        """Return the `number` rows of a hidden state (N, all tokens, ...) that the embeddings have too."""
        return state

    def prompt_options(self, pipe: Any) -> dict[str, Any]:
        """Return the options by which the pipeline's own call has its `encode_prompt` read prompts."""
        most = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
        tokenizer = plain_tokenizer(pipe, self.reader)
        return {"max_sequence_length": int(min(most, tokenizer.model_max_length)) if tokenizer is not None else most}

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded:
        """Return what the pipeline's own `encode_prompt` makes of prompts."""
        tokens, mask, *_ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device, **self.prompt_options(pipe)
        )
        return Encoded(tokens * mask[..., None].to(tokens))

    def encode_negative(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded | None:
        """Return what a pipeline makes of negative prompts; None where that is what it makes of prompts."""
        return None

    def predict(
        self, denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded, image_size: int
    ) -> torch.Tensor:
        """Return what the denoiser predicts, (N, ...), for `latents` (N, ...) at a scheduler's `timestep` () or (N,).

        For a flow it is the velocity, noise minus clean latents. `image_size` is the side of an image in pixels, which
        some denoisers are told.
        """
        raise NotImplementedError

    def call_inputs(self, prompts: Encoded, negative: Encoded | None) -> dict[str, Any]:
        """Return the arguments by which the pipeline's own call takes embeddings of prompts, and of negative ones."""
        inputs: dict[str, Any] = {"negative_prompt": None}
        for prefix, given in (("", prompts), ("negative_", negative)):
            if given is not None:
                inputs |= {f"{prefix}prompt_embeds": given.tokens, f"{prefix}prompt_attention_mask": given.mask}
        return inputs

    def key_inputs(self, denoiser: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the keys of cross-attention are made of, (N, T, width), for tokens' embeddings (N, T, d)."""
        return tokens

    def step_callback(self, keep: Callable[[torch.Tensor], None]) -> dict[str, Any]:
        """Return the options by which the pipeline's own call gives `keep` the latents after each step."""

        def end_step(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            keep(given["latents"])
            return {}

        return {"callback_on_step_end": end_step}

    def image_size(self, pipe: Any) -> int:
        """Return the side of an image in pixels that the model is made for."""
        return pipe.transformer.config.sample_size * pipe.vae_scale_factor

    def latent_shape(self, pipe: Any, side: int) -> tuple[int, ...]:
        """Return the shape of the latents of one image of `side` pixels, as the denoiser takes them."""
        return self.shape_of(pipe.transformer.config, side // pipe.vae_scale_factor)

    def shape_of(self, config: Any, side: int) -> tuple[int, ...]:
        """Return the shape of latents of `side` numbers a side that a denoiser with this config takes."""
        return config["in_channels"], side, side

    def encode_image(self, pipe: Any, images: torch.Tensor) -> torch.Tensor:
        """Return the latents (N, ...) of images (N, 3, H, W) in [-1, 1], as the denoiser takes them: their means."""
        config = pipe.vae.config
        return (pipe.vae.encode(images).latent_dist.mean - (config.get("shift_factor") or 0)) * config.scaling_factor

    def decode(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        """Return the images (N, 3, H, W), about in [-1, 1], of latents (N, ...)."""
        config = pipe.vae.config
        return pipe.vae.decode(latents / config.scaling_factor + (config.get("shift_factor") or 0)).sample

    def narrow_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config of a denoiser of the same class and with the same first text layers, but small."""
        return {**config, **{name: value for name, value in self.narrow.items() if name in config}}

    def narrow_shape(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape of the smallest latents that a denoiser with this config takes."""
        return self.shape_of(config, _NARROW_SIDE)

    def kohya_name(self, layer: str) -> str:
        """Return what LoRAs in kohya's layout call a layer of the denoiser, with its dots; empty for no name."""
        return self.kohya_names.get(layer, "")

    def model_spec(self, pipe: Any) -> ModelSpec:
        """Return what other programs call such a model, by its structure: a small one of the same counts as one."""
        return ModelSpec()

    def comfyui_encoders(self, pipe: Any) -> dict[str, str]:
        """Return what ComfyUI calls each text encoder, for the node with gates; empty where the node cannot act."""
        return {}

    def text_dims(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return d and p, how wide the tokens and the pooled embedding are that a denoiser takes; 0 for none."""
        return int(config["joint_attention_dim"]), int(config.get("pooled_projection_dim") or 0)


def negatives_of(pipe: Any, prompts: list[str], **options: Any) -> Encoded:
    """Return what `encode_prompt` of a pipeline makes of negative prompts, which it reads without its own text."""
    _, _, tokens, mask = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=True, negative_prompt=prompts, **options
    )
    return Encoded(tokens * mask[..., None].to(tokens))


def plain_tokenizer(pipe: Any, name: str) -> Any:
    """Return the tokenizer of a pipeline that belongs to a text encoder, by the encoder's name; None for none.

    Of an encoder that reads images too it is the one within its processor.
    """
    found = getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
    return getattr(found, "tokenizer", None) if isinstance(found, ProcessorMixin) else found


def unwrapped(module: Any) -> Any:
    """Return a module without what `torch.compile` has put around it."""
    return getattr(module, "_orig_mod", module)


def check_padding(pipe: Any, family: Family) -> None:
    """Raise ValueError where a tokenizer pads prompts on the left: then rows are not where they are looked for."""
    for source in [] if family.pads_right else family.sources(pipe):
        if source.rows is not None and getattr(plain_tokenizer(pipe, source.name), "padding_side", "right") == "left":
            raise ValueError(
                f"the tokenizer of the {source.name} pads prompts on the left, where their rows are not found: give it "
                "one that pads on the right"
            )


def timesteps(timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return a timestep () or (N,) for each of the latents, (N,), on their device."""
    return timestep.to(latents.device).expand(len(latents))


def widths(encoders: Sequence[Any]) -> list[slice]:
    """Return the columns of text encoders whose embeddings stand side by side."""
    ends = [0, *itertools.accumulate(encoder.config.hidden_size for encoder in encoders)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def square_side(number: int) -> int:
    """Return the side of a square of tokens."""
    return math.isqrt(number)
