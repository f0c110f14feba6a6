"""What turns prompts into embeddings: a model's tokenizers and text encoders, which do without a denoiser."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from ldm.diffusion.batches import States, encode_in_batches
from ldm.diffusion.text_states import LAST_STATE, capture_states
from ldm.diffusion.tokenizer import describe_cuts, tokenizer_digest, vocabulary_words
from ldm.io.errors import notify
from ldm.io.tensors import tensor_digest

# Of a text encoder's config what its weights do not say.
_ENCODER_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id", "max_position_embeddings")
_MAX_WORDS = 512  # of the vocabulary that the second moment is taken over
_MAX_CHECKED = 10_000  # prompts of which it is remembered that they were looked at


def own_config(module: Any) -> dict[str, Any]:
    """Return what a part's config says beside its weights: what differs from the defaults of its class.

    So it is the same by every version of the library that knows these settings. The size of images is left out.
    """
    if not hasattr(type(module), "load_config"):  # a text encoder of transformers
        return {name: getattr(module.config, name, None) for name in _ENCODER_SETTINGS}
    defaults = inspect.signature(type(module).__init__).parameters
    own = {}
    for name, value in module.config.items():
        plain = list(value) if isinstance(value, tuple) else value
        default = defaults[name].default if name in defaults else None
        if (
            name in defaults
            and name != "sample_size"
            and plain != (list(default) if isinstance(default, tuple) else default)
        ):
            own[name] = plain
    return own


def canonical_name(name: str) -> str:
    """Return what a weight of a text encoder is called: some versions of transformers put "text_model." before it."""
    return name.removeprefix("text_model.")


class EmbeddingEdit(Protocol):
    """A change of prompt embeddings that may read hidden states of the text encoders, see `edits.edit_embeddings`."""

    @property
    def layers(self) -> Mapping[str, Collection[int]]:
        """The hidden states that it reads, by text encoder."""
        ...

    def __call__(self, prompt_embeds: torch.Tensor, states: States) -> torch.Tensor:
        """Return what becomes of prompt embeddings (N, rows, d); those that it leaves alone keep every bit."""
        ...


@dataclass
class TextModel:
    """The frozen text encoders and tokenizers of a Stable Diffusion pipeline, which may lack all else, on one device.

    They are all that a shift in closed form, and a gate, are made of. The text encoders are held in float32, and come
    to the device when needed.
    """

    name: str
    config_name: str  # what exports call their base: itself, the model it was merged from, or its config
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the denoiser
    embedding_edit: EmbeddingEdit | None = None  # what becomes of prompts' embeddings, by `edits.edit_embeddings`
    remembered: dict[str, torch.Tensor] | None = None  # embeddings of prompts, by `edits.remember_embeddings`
    settings_path: Path | None = None  # the file with its own settings
    edited_by: tuple[str, ...] = ()  # the labels of the shifts that act on it now, by `merge.edited`

    def __post_init__(self) -> None:
        self._text_encoders: dict[str, Any] = {}
        self._tokenizers: list[Any] = []
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(self.pipeline, name, None)
            if encoder is not None:
                self._text_encoders[name] = encoder.requires_grad_(False).eval()
                self._tokenizers.append(getattr(self.pipeline, name.replace("text_encoder", "tokenizer")))
        self._checked_prompts: set[str] = set()  # of which it was said whether they are cut

    @property
    def family(self) -> str:
        """Return the class of its pipeline, by which `ldm.config.models` knows the settings of its kind of model."""
        return type(self.pipeline).__name__

    @property
    def context_dim(self) -> int:
        """Return d, the size of a token's embedding."""
        return sum(encoder.config.hidden_size for encoder in self._text_encoders.values())

    @property
    def digests(self) -> tuple[str, ...]:
        """Return the digests of the whole base model, today's first: none, as it has no denoiser."""
        return ()

    @property
    def text_layers(self) -> dict[str, nn.Linear]:
        """Return the layers by whose outputs a change is measured: without a denoiser the embeddings themselves."""
        layer = nn.Linear(self.context_dim, self.context_dim, bias=False, device=self.device)
        nn.init.eye_(layer.weight)
        return {"embeddings": layer.requires_grad_(False)}

    @cached_property
    def output_gram(self) -> torch.Tensor:
        """Return the sum over `text_layers` of `W^T W`, (d, d), float64."""
        total = torch.zeros(self.context_dim, self.context_dim, dtype=torch.float64)
        for layer in self.text_layers.values():
            weight = layer.weight.detach().cpu().double()
            total += weight.T @ weight
        return total

    @property
    def text_digest(self) -> str:
        """Return the digest of what turns prompts into embeddings: tokenizers, text encoders and their configs."""
        return self._text_digest

    @cached_property
    def _text_digest(self) -> str:
        weights: dict[str, torch.Tensor] = {}
        for name, encoder in self._text_encoders.items():
            for parameter, value in encoder.named_parameters():
                weights[f"{name}.{canonical_name(parameter)}"] = value
        tokenizers = [tokenizer_digest(tokenizer) for tokenizer in self._tokenizers]
        configs = [own_config(encoder) for encoder in self._text_encoders.values()]
        whole = json.dumps([tensor_digest(weights), tokenizers, configs], sort_keys=True)
        return f"text-1:{hashlib.sha256(whole.encode()).hexdigest()}"

    @property
    def _pooled_dim(self) -> int:
        """Return the size of XL's pooled embedding, which the U-Net takes beside the tokens; 0 where there is none."""
        encoder = self._text_encoders.get("text_encoder_2")
        return encoder.config.projection_dim if encoder is not None else 0

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Embed prompts: (N, rows, d) in float32, as `embedding_edit` leaves them.

        Each of the model's tokens has a row, and XL has one more: the pooled embedding, padded to d with zeros.
        """
        self.notify_of_cuts(prompts)
        if self.embedding_edit is None:
            return self.encode_with_states(prompts, {})[0]
        return self.embedding_edit(*self.encode_with_states(prompts, self.embedding_edit.layers))

    @torch.no_grad()
    def encode_with_states(
        self, prompts: list[str], layers: Mapping[str, Collection[int]]
    ) -> tuple[torch.Tensor, States]:
        """Return the unedited embeddings of prompts (N, rows, d), and hidden states: those after `layers`.

        A layer is a number from 0, or `LAST_STATE`: the encoder's columns of what the denoiser is given.
        """
        for encoder in self._text_encoders.values():
            if encoder.device != self.device:  # moving one that is there already takes a while too
                encoder.to(self.device)
        pipeline: Any = self.pipeline  # XL's says that it takes one prompt, and takes several
        captured: dict[str, dict[int, torch.Tensor]] = {}
        with ExitStack() as stack:
            for name, encoder in self._text_encoders.items():
                numbers = [number for number in layers.get(name, ()) if number != LAST_STATE]
                captured[name] = stack.enter_context(capture_states(encoder, numbers))
            outputs = pipeline.encode_prompt(
                prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        token_embeds = outputs[0].float()  # (N, tokens, d)
        states = {(name, number): state.float() for name, found in captured.items() for number, state in found.items()}
        widths = [encoder.config.hidden_size for encoder in self._text_encoders.values()]
        for name, columns in zip(self._text_encoders, token_embeds.split(widths, dim=-1), strict=True):
            if LAST_STATE in layers.get(name, ()):
                states[name, LAST_STATE] = columns
        if not self._pooled_dim:
            return token_embeds, states
        pooled_row = F.pad(outputs[2].float(), (0, self.context_dim - self._pooled_dim))[:, None]  # (N, 1, d)
        return torch.cat([token_embeds, pooled_row], dim=1), states  # (N, tokens + 1, d)

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Return the text encoders by name: `text_encoder`, and of XL `text_encoder_2` too."""
        return self._text_encoders

    @property
    def tokenizers(self) -> list[Any]:
        """Return the tokenizers, in the order of the text encoders."""
        return self._tokenizers

    def notify_of_cuts(self, prompts: Iterable[str]) -> None:
        """Say once of prompts that are longer than the model's tokens how many, which, and where each is cut."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._checked_prompts]
        if len(self._checked_prompts) > _MAX_CHECKED:
            self._checked_prompts.clear()
        self._checked_prompts.update(new)
        for line in describe_cuts(self._tokenizers, new):
            notify(line)

    def drop_pooled(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Return the rows of (..., rows, d) that cross-attention takes, (..., tokens, d): all but XL's pooled one."""
        return prompt_embeds[..., :-1, :] if self._pooled_dim else prompt_embeds

    def embed_prompts(self, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the embedding of each prompt that cross-attention takes, (tokens, d)."""
        prompts = list(prompts)
        self.notify_of_cuts(prompts)
        known = self.remembered if self.remembered is not None and self.embedding_edit is None else {}
        for prompt in prompts:
            if prompt not in known:
                known[prompt] = self.drop_pooled(self.encode_prompt([prompt]))[0]
        return {prompt: known[prompt] for prompt in prompts}

    @cached_property
    def vocab_gram(self) -> tuple[list[str], torch.Tensor]:
        """Return words of the tokenizer's vocabulary, and the mean of `e^T e` over them: (d, d), float64.

        The words are at most 512, evenly spaced in alphabetical order; e (tokens, d) is the embedding of one alone.
        """
        words = vocabulary_words(self.pipeline.tokenizer)
        words = words[:: max(1, -(-len(words) // _MAX_WORDS))]
        return words, self.prompt_gram(words) / max(1, len(words))

    def prompt_gram(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the sum of `e^T e` over prompts, (d, d), float64, with e (tokens, d) the embedding of one."""
        gram = torch.zeros(self.context_dim, self.context_dim, dtype=torch.float64)
        for _, embeds, _ in encode_in_batches(self, prompts, {}):
            rows = self.drop_pooled(embeds).flatten(0, 1).cpu().double()  # (N * tokens, d)
            gram += rows.T @ rows
        return gram

    def vocab_gram_without(self, *spellings: str) -> torch.Tensor:
        """Return the mean of `vocab_gram` without the words, and pieces of words, of `spellings`: (d, d), float64."""
        words, mean = self.vocab_gram
        pieces = set()
        for text in spellings:
            pieces.update(piece.removesuffix("</w>") for piece in self.pipeline.tokenizer.tokenize(text))
        left_out = [word for word in words if word in pieces]
        if not left_out or len(left_out) == len(words):
            return mean
        return (mean * len(words) - self.prompt_gram(left_out)) / (len(words) - len(left_out))
