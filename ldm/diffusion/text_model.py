"""What turns prompts into embeddings: a model's tokenizers and text encoders, which do without a denoiser."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ldm.diffusion.batches import States, encode_in_batches
from ldm.diffusion.families import FAMILIES, TEXT_ALONE
from ldm.diffusion.family import LAST, STATES_KEY, Encoded, Family, TextSource, plain_tokenizer
from ldm.diffusion.text_layers import POOLED, TOKENS, TextLayer, TextLayers, output_gram
from ldm.diffusion.text_states import LAST_STATE, capture_states
from ldm.diffusion.tokenizer import align_tokens, describe_cuts, tokenizer_digest, vocabulary_words
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
    """The frozen text encoders and tokenizers of a pipeline, which may lack all else, on one device.

    They are all that a shift in closed form, and a gate, are made of. The text encoders are held in float32, and come
    to the device when needed. What they make of a prompt are its rows (T + 1, d + p): the embeddings of its T tokens in
    the first d columns, and below them the pooled embedding in the last p; where the denoiser takes no pooled one, they
    are the tokens' (T, d) alone. Rows of zeros are none: those of masked tokens.
    """

    name: str
    config_name: str  # what exports call their base: itself, the model it was merged from, or its config
    pipeline: Any  # of diffusers
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the denoiser
    embedding_edit: EmbeddingEdit | None = None  # what becomes of prompts' embeddings, by `edits.edit_embeddings`
    remembered: dict[str, torch.Tensor] | None = None  # embeddings of prompts, by `edits.remember_embeddings`
    settings_path: Path | None = None  # the file with its own settings
    edited_by: tuple[str, ...] = ()  # the labels of the shifts that act on it now, by `merge.edited`
    has_own_pooled: bool = False  # whether a text encoder alone gives its pooled embedding too

    def __post_init__(self) -> None:
        self._text_encoders: dict[str, Any] = {}
        self._tokenizers: list[Any] = []
        for source in self.sources:
            self._text_encoders[source.name] = getattr(self.pipeline, source.name).requires_grad_(False).eval()
            self._tokenizers.append(self.adapter.tokenizer(self.pipeline, source.name))
        self._checked_prompts: set[str] = set()  # of which it was said whether they are cut

    @property
    def family(self) -> str:
        """Return the class of its pipeline, by which `ldm.config.models` knows the settings of its kind of model."""
        return type(self.pipeline).__name__

    @property
    def adapter(self) -> Family:
        """Return what is particular to its family."""
        return TEXT_ALONE if self.has_own_pooled else FAMILIES[self.family]

    @property
    def sources(self) -> list[TextSource]:
        """Return what each text encoder gives, the one first whose tokens are most of a prompt's rows."""
        return self.adapter.sources(self.pipeline)

    @property
    def widths(self) -> dict[str, int]:
        """Return d, how wide the tokens' embeddings are, and p, how wide the pooled one, where there is one."""
        denoiser = getattr(self.pipeline, self.adapter.denoiser, None)
        if denoiser is not None:
            width, pooled_width = self.adapter.text_dims(denoiser.config)
        else:
            width = sum(encoder.config.hidden_size for encoder in self._text_encoders.values())
            pooled_width = max((source.pooled.stop for source in self.sources if source.pooled is not None), default=0)
        return {TOKENS: width} | ({POOLED: pooled_width} if pooled_width else {})

    @property
    def places(self) -> dict[str, tuple[slice, slice]]:
        """Return where in a prompt's rows each stream is, and what each of several text encoders gives to one.

        They are rows and columns, by `tokens`, `pooled`, and such as `tokens.text_encoder_3`.
        """
        return places_of(self.sources, self.adapter.num_tokens(self.pipeline), self.widths)

    def owns_columns(self, place: str) -> bool:
        """Return whether no other text encoder gives rows to a place's columns, as SD3's do to the tokens'."""
        stream = place.partition(".")[0]
        return all(rows == self.places[place][0] for name, (rows, _) in self.places.items() if name.startswith(stream))

    @property
    def context_dim(self) -> int:
        """Return d + p, how wide a prompt's rows are."""
        return sum(self.widths.values())

    @property
    def streams(self) -> list[slice]:
        """Return the columns of a prompt's rows that are each stream's, the tokens' first."""
        ends = [0, *itertools.accumulate(self.widths.values())]
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    @property
    def digests(self) -> tuple[str, ...]:
        """Return the digests of the whole base model, today's first: none, as it has no denoiser."""
        return ()

    @property
    def text_layers(self) -> TextLayers:
        """Return the layers by whose outputs a change is measured: without a denoiser the embeddings themselves."""
        layers: dict[str, nn.Linear] = {}
        found: dict[str, TextLayer] = {}
        for stream, width in self.widths.items():
            name = "embeddings" if stream == TOKENS else stream
            layer = nn.Linear(width, width, bias=False, device=self.device)
            nn.init.eye_(layer.weight)
            layers[name], found[name] = layer.requires_grad_(False), TextLayer(name, stream)
        return TextLayers(layers, found, self.widths)

    @cached_property
    def output_gram(self) -> torch.Tensor:
        """Return the sum over `text_layers` of `W^T W`, (d + p, d + p), float64: W takes a prompt's rows."""
        return output_gram(self.text_layers)

    @property
    def text_digest(self) -> str:
        """Return the digest of what turns prompts into embeddings: tokenizers, text encoders and their configs.

        Of a model that has one text encoder more than once it is that of the encoder.
        """
        return self._text_digest

    @property
    def encoded_as(self) -> dict[str, Any]:
        """Return what a file says of the embeddings that it changes: whose, which of several kinds, and how wide."""
        said: dict[str, Any] = {"text_digest": self.text_digest}
        if len(self.widths) > 1:
            said["streams"] = self.widths
        said |= {STATES_KEY: self.kind} if self.kind != LAST else {}
        is_joined = self.adapter.joins_gates and len(set(self.encoder_digests.values())) > 1
        return said | ({"encoders": self._encoders_said} if is_joined else {})

    @property
    def kind(self) -> str:
        """Return what the text layers see of the text encoders: which of their hidden states, and after which norm."""
        return " and ".join(sorted({source.kind for source in self.sources if source.rows is not None}))

    @property
    def _encoders_said(self) -> dict[str, dict[str, Any]]:
        """Return what a file says of each text encoder by itself: its digest, what it gives, and how wide that is."""
        found: dict[str, dict[str, Any]] = {}
        for source in self.sources:
            columns = {name: self.places.get(f"{name}.{source.name}", [None])[-1] for name in (TOKENS, POOLED)}
            streams = {name: own.stop - own.start for name, own in columns.items() if own is not None}
            kind = {STATES_KEY: source.kind} if source.rows is not None and source.kind != LAST else {}
            found[source.name] = {"text_digest": self.encoder_digests[source.name], "streams": streams, **kind}
        return found

    @cached_property
    def _text_digest(self) -> str:
        if len(self._text_encoders) > 1 and len(set(self.encoder_digests.values())) == 1:
            return next(iter(self.encoder_digests.values()))
        return _digest_of(dict(sorted(self._text_encoders.items())), self._plain_tokenizers)

    @cached_property
    def encoder_digests(self) -> dict[str, str]:
        """The digest of each text encoder with its tokenizer: the `text_digest` of a model that has it alone."""
        found: dict[str, str] = {}
        for name, encoder in self._text_encoders.items():
            found[name] = _digest_of({"text_encoder": encoder}, {"text_encoder": self._plain_tokenizers[name]})
        return found

    @property
    def _plain_tokenizers(self) -> dict[str, Any]:
        return {name: plain_tokenizer(self.pipeline, name) for name in self._text_encoders}

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Return the rows of prompts (N, T + 1, d + p), or (N, T, d), in float32, as `embedding_edit` leaves them."""
        self.notify_of_cuts(prompts)
        return self.embed(prompts)

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Return what `encode_prompt` does, with a gradient for whatever in the text encoders asks for one."""
        if self.embedding_edit is None:
            return self._encode(prompts, {})[0]
        return self.embedding_edit(*self._encode(prompts, self.embedding_edit.layers))

    @torch.no_grad()
    def encode_with_states(
        self, prompts: list[str], layers: Mapping[str, Collection[int]]
    ) -> tuple[torch.Tensor, States]:
        """Return the unedited rows of prompts (N, T + 1, d + p), and hidden states (N, T, width) after `layers`.

        A layer is a number from 0, or `LAST_STATE`: the encoder's columns of what the denoiser is given, or, where it
        gives no tokens, its last hidden state.
        """
        return self._encode(prompts, layers)

    def _encode(self, prompts: list[str], layers: Mapping[str, Collection[int]]) -> tuple[torch.Tensor, States]:
        for encoder in self._text_encoders.values():
            if encoder.device != self.device:  # moving one that is there already takes a while too
                encoder.to(self.device)
        captured: dict[str, dict[int, torch.Tensor]] = {}
        with ExitStack() as stack:
            for source in self.sources:
                encoder, needed = self._text_encoders[source.name], layers.get(source.name, ())
                numbers = [number for number in needed if number != LAST_STATE or source.rows is None]
                captured[source.name] = stack.enter_context(capture_states(encoder, numbers))
            encoded = self.adapter.encode(self.pipeline, prompts, self.device)
        tokens = encoded.tokens.float()  # (N, T, d)
        states: dict[tuple[str, int], torch.Tensor] = {}
        for source in self.sources:
            found = captured[source.name]
            rows = tokens.shape[1]
            own = {number: self.adapter.rows_of(state.float(), rows) for number, state in found.items()}
            if source.rows is not None and source.columns is not None:
                if LAST_STATE in layers.get(source.name, ()):
                    own[LAST_STATE] = tokens[:, source.rows, source.columns]
                own = without_masked(own, encoded.mask[:, source.rows])
            states |= {(source.name, number): state for number, state in own.items()}
        return join_streams(tokens, encoded.pooled), states

    def split(self, rows: torch.Tensor) -> Encoded:
        """Return the streams of prompts' rows (N, T + 1, d + p)."""
        return split_streams(rows, self.widths.get(POOLED, 0))

    def align_rows(self, prompts: Sequence[str], anchors: Sequence[str]) -> list[list[int]]:
        """Return, for each row of each prompt, the row of its anchor that stands for it, as `align_tokens` does."""
        aligned: list[list[int]] = [[] for _ in prompts]
        number = self.adapter.num_tokens(self.pipeline)
        placed: set[int] = set()
        for source, tokenizer in zip(self.sources, self._tokenizers, strict=True):
            start, stop, _ = (source.rows or slice(0)).indices(number)
            if stop == start or start in placed:
                continue
            placed.add(start)
            for rows, found in zip(aligned, align_tokens(tokenizer, prompts, anchors, stop - start), strict=True):
                rows += [start + row for row in found]
        rest = number + (POOLED in self.widths)
        return [[*rows, *range(len(rows), rest)] for rows in aligned]

    def layer_inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what text layers see of prompts' rows (N, T + 1, d + p): the same, but where a norm is before them."""
        return rows

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Return the text encoders by name: `text_encoder`, and of XL `text_encoder_2` too."""
        return self._text_encoders

    @property
    def tokenizers(self) -> list[Any]:
        """Return the tokenizers, in the order of the text encoders."""
        return self._tokenizers

    def notify_of_cuts(self, prompts: Iterable[str], is_brief: bool = False) -> None:
        """Say once of prompts that are longer than the model's tokens how many, which, and where each is cut.

        In brief it is said how many.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._checked_prompts]
        if len(self._checked_prompts) > _MAX_CHECKED:
            self._checked_prompts.clear()
        self._checked_prompts.update(new)
        for line in describe_cuts(self._tokenizers, new)[: 1 if is_brief else None]:
            notify(line)

    def embed_prompts(self, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return what text layers see of each prompt, its rows (T + 1, d + p)."""
        prompts = list(prompts)
        self.notify_of_cuts(prompts)
        known = self.remembered if self.remembered is not None and self.embedding_edit is None else {}
        for prompt in prompts:
            if prompt not in known:
                known[prompt] = self.layer_inputs(self.encode_prompt([prompt]))[0]
        return {prompt: known[prompt] for prompt in prompts}

    @cached_property
    def vocab_gram(self) -> tuple[list[str], torch.Tensor]:
        """Return words of the tokenizer's vocabulary, and the mean of `e^T e` over them: (d, d), float64.

        The words are at most 512, evenly spaced in alphabetical order; e (tokens, d) is the embedding of one alone.
        """
        words = vocabulary_words(self.tokenizers[0])
        words = words[:: max(1, -(-len(words) // _MAX_WORDS))]
        return words, self.prompt_gram(words) / max(1, len(words))

    def prompt_gram(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the sum of `e^T e` over prompts, (d, d), float64, with e (tokens, d) the embedding of one."""
        gram = torch.zeros(self.context_dim, self.context_dim, dtype=torch.float64)
        for _, embeds, _ in encode_in_batches(self, prompts, {}):
            rows = self.layer_inputs(embeds).flatten(0, 1).cpu().double()  # (N (T + 1), d + p)
            gram += rows.T @ rows
        return gram

    def vocab_gram_without(self, *spellings: str) -> torch.Tensor:
        """Return the mean of `vocab_gram` without the words, and pieces of words, of `spellings`: (d, d), float64."""
        words, mean = self.vocab_gram
        pieces = set()
        for text in spellings:
            pieces.update(piece.removesuffix("</w>") for piece in self.tokenizers[0].tokenize(text))
        left_out = [word for word in words if word in pieces]
        if not left_out or len(left_out) == len(words):
            return mean
        return (mean * len(words) - self.prompt_gram(left_out)) / (len(words) - len(left_out))


def _digest_of(encoders: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> str:
    """Return the digest of text encoders by name, and of their tokenizers."""
    weights: dict[str, torch.Tensor] = {}
    for name, encoder in encoders.items():
        for parameter, value in encoder.named_parameters():
            weights[f"{name}.{canonical_name(parameter)}"] = value
    digests = [tokenizer_digest(tokenizers[name]) for name in encoders]
    configs = [own_config(encoder) for encoder in encoders.values()]
    whole = json.dumps([tensor_digest(weights), digests, configs], sort_keys=True)
    return f"text-1:{hashlib.sha256(whole.encode()).hexdigest()}"


def places_of(sources: Sequence[TextSource], number: int, widths: Mapping[str, int]) -> dict[str, tuple[slice, slice]]:
    """Return the rows and columns of `TextModel.places` for prompts of a `number` of tokens, and streams by width."""
    width, whole = widths[TOKENS], sum(widths.values())
    found = {TOKENS: (slice(0, number), slice(0, width))}
    if POOLED in widths:
        found[POOLED] = slice(number, number + 1), slice(width, whole)
    for source in sources:
        if source.rows is not None and source.columns is not None:
            rows, columns = source.rows.indices(number)[:2], source.columns.indices(width)[:2]
            found[f"{TOKENS}.{source.name}"] = slice(*rows), slice(*columns)
        if source.pooled is not None:
            start, stop, _ = source.pooled.indices(whole - width)
            found[f"{POOLED}.{source.name}"] = found[POOLED][0], slice(width + start, width + stop)
    return found


def without_masked(states: Mapping[int, torch.Tensor], mask: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return hidden states (N, T, width) in which rows of masked tokens (N, T) repeat that of their prompt's end."""
    if mask.all():
        return dict(states)
    numbers = torch.arange(mask.shape[1], device=mask.device)
    ends = (mask * numbers).amax(dim=1, keepdim=True)  # (N, 1)
    kept = torch.where(mask.bool(), numbers, ends)[..., None]  # (N, T, 1)
    return {number: state.gather(1, kept.expand_as(state)) for number, state in states.items()}


def split_streams(rows: torch.Tensor, pooled_width: int) -> Encoded:
    """Return the streams of prompts' rows (N, T + 1, d + p), of which p are the pooled embedding's, or (N, T, d)."""
    if not pooled_width:
        return Encoded(rows)
    width = rows.shape[-1] - pooled_width
    return Encoded(rows[:, :-1, :width], rows[:, -1, width:])


def join_streams(tokens: torch.Tensor, pooled: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of prompts (N, T + 1, d + p) with these tokens' embeddings (N, T, d) and pooled ones (N, p)."""
    if pooled is None:
        return tokens
    below = F.pad(pooled.to(tokens.dtype), (tokens.shape[-1], 0))[:, None]  # (N, 1, d + p)
    return torch.cat([F.pad(tokens, (0, pooled.shape[-1])), below], dim=1)
