"""What a denoiser is trained under: captions as tokens, or as the embeddings of a text encoder that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from transformers import AutoConfig, BertModel, BertTokenizer, CLIPTextModel, CLIPTokenizer

from ldm.diffusion.tokenizer import tokenizer_digest

_CAPTIONS_AT_ONCE = 256  # that a text encoder embeds in one pass
# A text encoder that stays frozen, and its tokenizer, by the kind that its config says.
_FROZEN: dict[str, tuple[Any, Any]] = {
    "bert": (BertModel, BertTokenizer),
    "clip_text_model": (CLIPTextModel, CLIPTokenizer),
}
FrozenEncoder = BertModel | CLIPTextModel
FrozenTokenizer = BertTokenizer | CLIPTokenizer


class Captions(Protocol):
    """The captions of a dataset of N images, as a denoiser takes them."""

    @property
    def vocabulary(self) -> str:
        """The digest of the tokenizer that read them."""
        ...

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Return those of the images `indices` (n,): (n, tokens) or (n, tokens, d)."""
        ...


@dataclass(frozen=True)
class Tokens:
    """The captions as ids (N, tokens), and the digest of the tokenizer that made them."""

    ids: torch.Tensor
    vocabulary: str

    @classmethod
    def of(cls, captions: list[str], tokenizer: CLIPTokenizer) -> Self:
        """Return the tokens of captions."""
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return cls(ids, tokenizer_digest(tokenizer))

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the ids of the captions `indices`, (n, tokens)."""
        return self.ids[indices]


def token_states(output: Any) -> torch.Tensor:
    """Return the rows of a text encoder's output that Stable Diffusion takes, (n, tokens, d)."""
    return output[0]


def token_and_pooled_states(output: Any) -> torch.Tensor:
    """Return the rows of a text encoder's output, and below them its pooled one, as FLUX takes both."""
    return torch.cat([output.last_hidden_state, output.pooler_output[:, None]], dim=1)


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of the captions, (unique, tokens, d) in half precision, and which is each image's, (N,)."""

    values: torch.Tensor
    index: torch.Tensor
    vocabulary: str

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        captions: list[str],
        tokenizer: FrozenTokenizer,
        encoder: FrozenEncoder,
        device: torch.device,
        rows_of: Callable[[Any], torch.Tensor] = token_states,
    ) -> Self:
        """Return what `encoder` makes of captions on `device`, padding unmasked as in Stable Diffusion."""
        unique = list(dict.fromkeys(captions))
        number = {caption: k for k, caption in enumerate(unique)}
        ids = tokenizer(unique, padding="max_length", truncation=True, return_tensors="pt").input_ids
        module: Any = encoder
        module.to(device).eval()
        values = [rows_of(module(batch.to(device))).half().cpu() for batch in ids.split(_CAPTIONS_AT_ONCE)]
        return cls(torch.cat(values), torch.tensor([number[text] for text in captions]), tokenizer_digest(tokenizer))

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of the captions `indices`, (n, tokens, d) float32."""
        return self.values[self.index[indices]].float()


def load_frozen_text(folder: Path, max_length: int) -> tuple[FrozenEncoder, FrozenTokenizer]:
    """Return a BERT or CLIP's text encoder, and its tokenizer, cut to `max_length` tokens.

    The weights are those that half precision holds. `folder` is a diffusers model's, or one that has the files of
    both. No code from it is run. Raises ValueError for an encoder of another kind.
    """
    parts = [folder / part for part in ("text_encoder", "tokenizer")] if (folder / "text_encoder").is_dir() else None
    encoder_dir, tokenizer_dir = parts or (folder, folder)
    if not (encoder_dir / "config.json").is_file():
        raise ValueError(f"{encoder_dir} has no config.json: give `text_encoder` the folder of a text encoder")
    kind = AutoConfig.from_pretrained(encoder_dir, local_files_only=True).model_type
    if kind not in _FROZEN:
        known = ", ".join(_FROZEN)
        raise ValueError(f"{encoder_dir} is a {kind}: give `text_encoder` a folder with one of these: {known}")
    encoder_class, tokenizer_class = _FROZEN[kind]
    encoder = encoder_class.from_pretrained(
        encoder_dir, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    tokenizer = tokenizer_class.from_pretrained(tokenizer_dir, local_files_only=True)
    tokenizer.model_max_length = max_length
    return encoder.half().float().requires_grad_(False), tokenizer
