"""A text encoder by itself, without a denoiser: what a gate needs of a model, from any encoder of transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer

from ldm.diffusion.batches import States
from ldm.diffusion.components import read_config
from ldm.diffusion.load import silence_hf_logging
from ldm.diffusion.text_states import LAST_STATE, capture_states, text_encoder_layers
from ldm.io.tensors import not_finite

NUM_TOKENS = 32  # that are read of a prompt: more than a caption has
_WORD_MARKS = ("\u0120", "\u2581")  # of a piece that begins a word: of byte pairs without a mark of ends, SentencePiece
_MIN_FRACTION = 0.05  # of a vocabulary, from which on a mark is one
_NAME = "text_encoder"  # as a pipeline calls its first one
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "tokenizer_config.json")
_ADVICE = "give `text_encoder` a folder with config.json, a tokenizer and model.safetensors of one text encoder"


class PromptEncoder(Protocol):
    """What a gate needs of a model: of a `DiffusionModel`, a pipeline, or a `TextEncoder` alone."""

    @property
    def text_encoders(self) -> Mapping[str, Any]:
        """The text encoders by name."""
        ...

    @property
    def tokenizers(self) -> list[Any]:
        """The tokenizers, in the order of the text encoders."""
        ...

    @property
    def places(self) -> Mapping[str, tuple[slice, slice]]:
        """The rows and columns of prompts' embeddings that are each stream's, `tokens` and `pooled`."""
        ...

    def encode_with_states(
        self, prompts: list[str], layers: Mapping[str, Collection[int]]
    ) -> tuple[torch.Tensor, States]:
        """Return the embeddings of prompts (N, rows, d), and hidden states by text encoder and layer."""
        ...


class PromptTokenizer:
    """A tokenizer as gates read it: it marks the beginning and the end of a prompt, and pads behind the end.

    A left-to-right encoder has no mark of the end, and some have none of the beginning. The end is then the token that
    would be padding; the beginning is there because such encoders keep in the first row what belongs to no token.
    Pieces that continue a word begin with ##, as in BERT, whatever the tokenizer marks.
    """

    def __init__(self, tokenizer: Any, max_tokens: int):
        self._tokenizer = tokenizer
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_tokens)
        marked = tokenizer("a").input_ids
        bare = tokenizer("a", add_special_tokens=False).input_ids
        if marked[-1] == bare[-1] or marked[0] == bare[0]:
            if tokenizer.eos_token is None:
                raise ValueError(f"the tokenizer marks no end of a prompt, and has no token that could: {_ADVICE}")
            begin, end = tokenizer.bos_token or tokenizer.eos_token, tokenizer.eos_token
            ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys((begin, end))]
            template = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=ids)
            tokenizer.backend_tokenizer.post_processor = template
        vocabulary = list(tokenizer.get_vocab())
        self._mark = next((mark for mark in _WORD_MARKS if _fraction(vocabulary, mark) > _MIN_FRACTION), None)

    @property
    def unk_token_id(self) -> int | None:
        """Return the token of what the tokenizer does not know; None where it has none."""
        return self._tokenizer.unk_token_id

    @property
    def model_max_length(self) -> int:
        """Return how many tokens of a prompt are read."""
        return self._tokenizer.model_max_length

    @property
    def is_fast(self) -> bool:
        """Return whether it knows where in a prompt a token was."""
        return self._tokenizer.is_fast

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Return the tokens of a text, or of several, by the options of transformers."""
        return self._tokenizer(text, **options)

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def tokenize(self, text: str) -> list[str]:
        """Return the pieces of a text."""
        return [self._piece(token) for token in self._tokenizer.tokenize(text)]

    def get_vocab(self) -> dict[str, int]:
        """Return the pieces of the vocabulary and their numbers."""
        return {self._piece(token): number for token, number in self._tokenizer.get_vocab().items()}

    def _piece(self, token: str) -> str:
        """Return a token as BERT writes it."""
        if self._mark is None:
            return token
        text = token.replace(self._mark, " ")
        return text[1:] if token.startswith(self._mark) else f"##{text}"


def _fraction(vocabulary: list[str], mark: str) -> float:
    """Return which fraction of a vocabulary begins with a mark."""
    return sum(token.startswith(mark) for token in vocabulary) / len(vocabulary)


class TextEncoder:
    """A frozen text encoder and its tokenizer, embedding prompts as a denoiser with it would be given them."""

    def __init__(self, name: str, encoder: Any, tokenizer: Any, device: torch.device):
        self.name, self.device = name, device
        self.text_encoders = {_NAME: encoder.requires_grad_(False).eval().to(device)}
        longest = getattr(encoder.config, "max_position_embeddings", None) or NUM_TOKENS
        self.tokenizers: list[Any] = [PromptTokenizer(tokenizer, min(longest, NUM_TOKENS))]
        rows = slice(0, self.tokenizers[0].model_max_length)
        self.places = {"tokens": (rows, slice(0, encoder.config.hidden_size))}

    @torch.no_grad()
    def encode_with_states(
        self, prompts: list[str], layers: Mapping[str, Collection[int]]
    ) -> tuple[torch.Tensor, States]:
        """Return the last hidden states of prompts (N, T, d), and those after `layers`.

        Padding is masked. Its rows repeat that of the end of their prompt, and so say nothing else.
        """
        encoder, tokenizer = self.text_encoders[_NAME], self.tokenizers[0]
        tokens = tokenizer(
            prompts, padding=True, truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        ).to(self.device)
        needed = layers.get(_NAME, ())
        numbers = [number for number in needed if number != LAST_STATE]
        with capture_states(encoder, numbers) as captured:
            output = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        ends = tokens.attention_mask.sum(1) - 1  # (N,)
        rows = torch.arange(tokenizer.model_max_length, device=self.device).minimum(ends[:, None])  # (N, T)

        def padded(state: torch.Tensor) -> torch.Tensor:
            return state.float().gather(1, rows[..., None].expand(-1, -1, state.shape[-1]))  # (N, T, d)

        embeds = padded(output.last_hidden_state)
        states = {(_NAME, number): padded(state) for number, state in captured.items()}
        if LAST_STATE in needed:
            states[_NAME, LAST_STATE] = embeds
        return embeds, states


def load_text_encoder(folder: Path, device: torch.device) -> TextEncoder:
    """Return the text encoder in a folder: config.json, tokenizer and safetensors of transformers. Runs no code of it.

    It is BERT-like, CLIP's, or a causal language model without its head. Raises ValueError for anything else, and for
    weights that are missing or not finite.
    """
    silence_hf_logging()
    if (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is a whole pipeline: give it as `model`, or its text encoder with its tokenizer")
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json in {folder}: give `text_encoder` a folder with it, tokenizer and safetensors")
    config = read_config(folder / "config.json")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"no tokenizer in {folder}: copy its files there, such as {_TOKENIZER_FILES[0]}")
    if config.get("is_encoder_decoder"):
        raise ValueError(f"{folder} holds an encoder with a decoder: {_ADVICE}")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        encoder, info = AutoModel.from_pretrained(
            str(folder),
            dtype=torch.float32,
            attn_implementation="eager",  # a config may name another one, which would be fetched
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        text_encoder_layers(encoder)
    except Exception as error:  # what the libraries raise for a file that is wrong has no end, see `load_model`
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot read a text encoder from {folder}: {_ADVICE}: {reason}") from error
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)  # nothing here reads a pooler
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)[:200]}: {_ADVICE}")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer in {folder} has no token that could mark an end: {_ADVICE}")
    wrong = not_finite(dict(encoder.named_parameters()))
    if wrong is not None:
        raise ValueError(f"{folder}: {wrong} holds NaN or infinity: get the text encoder again")
    return TextEncoder(folder.resolve().name, encoder, tokenizer, device)
