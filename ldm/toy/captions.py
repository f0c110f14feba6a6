"""The captions of the synthetic dataset, (caption, subject, style) from a seed, and the tokenizer trained on them.

The empty caption belongs to plain scenes, so that "no prompt" means "an image in no style": an erased concept, whose
image becomes that of the empty prompt, then is an image in no style and never one of another artist's by chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ldm.config.concepts import Concept, erasable_concepts, watermark_prompts
from ldm.config.templates import with_article
from ldm.io.files import atomic_write_dir
from ldm.toy.render import render, render_watermark
from ldm.toy.shapes import OBJECTS, SCENES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Option = TypeVar("Option")

KINDS = ("empty", "watermark", "style", "object", "plain", "logo")  # in the order of the mixture weights
_PLAIN_TEMPLATES = (
    "a painting of {a}",
    "a photo of {a}",
    "a picture of {a}",
    "a painting of a {}",
    "image of a {}",
    "{}",
)
_STYLED_TEMPLATES = (
    "a painting of {a} by {by}",
    "{a} by {by}",
    "{a} in the style of {by}",
    "a picture of {a} by {by}",
)
_NAMELESS_CAPTIONS = ("painting", "a painting", "a photo", "image", "a picture", "photo", "an artwork")
_HELD_OUT = {("landscape", "{a} by {by}")}  # the held-out template "a landscape by {}"
_NUM_TOKENIZER_CAPTIONS = 6000


@dataclass(frozen=True)
class CaptionedScene:
    """A caption and what it shows: the fixed image of a watermark, or else a subject in a style (None: plain)."""

    caption: str
    subject: str = ""
    style: str | None = None
    watermark: str | None = None

    def render(self, rng: np.random.Generator) -> np.ndarray:
        """Return an image of it, (64, 64, 3) uint8."""
        if self.watermark:
            return render_watermark(self.watermark)
        return render(self.subject, self.style, rng)


def pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    """Return one of the options, each as probable."""
    return options[int(rng.integers(len(options)))]


def _spelling(concept: Concept, rng: np.random.Generator) -> str:
    """Return a concept's prompt, or the same words apart: the vocabulary of mini-sd has no others."""
    apart = [alias for alias in concept.aliases if alias.replace(" ", "") == concept.prompt]
    return pick(rng, (concept.prompt, concept.prompt, *apart))


def sample_kind(rng: np.random.Generator, mixture_weights: Sequence[float]) -> tuple[str, CaptionedScene | None]:
    """Sample a kind of caption, and the caption itself of the kinds that name nothing: the empty one, a watermark."""
    kind = KINDS[int(rng.choice(len(KINDS), p=mixture_weights))]
    if kind == "empty":
        return kind, CaptionedScene("", pick(rng, SCENES))
    if kind == "watermark":
        text = pick(rng, watermark_prompts())
        return kind, CaptionedScene(text, watermark=text)
    return kind, None


def sample_caption(rng: np.random.Generator, mixture_weights: Sequence[float]) -> CaptionedScene:
    """Sample one caption of the synthetic dataset.

    Mixture weights are the fractions of empty captions, watermarks, styles, objects, plain scenes by name, and logos.
    """
    kind, fixed = sample_kind(rng, mixture_weights)
    if fixed:
        return fixed
    if kind == "plain":
        subject = pick(rng, SCENES)
        caption = pick(rng, _PLAIN_TEMPLATES + _NAMELESS_CAPTIONS).format(subject, a=with_article(subject))
        return CaptionedScene(caption, subject)
    concept = pick(rng, erasable_concepts(kind))
    name, name_alone = _spelling(concept, rng), rng.random() < 0.55
    caption = name if name_alone else pick(rng, concept.templates).format(name)
    if kind != "style":
        return CaptionedScene(caption, concept.name)
    if name_alone or rng.random() < 0.4:
        return CaptionedScene(caption, pick(rng, SCENES), concept.name)
    subject, template = pick(rng, SCENES + OBJECTS), pick(rng, _STYLED_TEMPLATES)
    if (subject, template) in _HELD_OUT:
        template = _STYLED_TEMPLATES[0]
    return CaptionedScene(template.format(a=with_article(subject), by=name), subject, concept.name)


def kept_tokenizer(folder: Path, max_length: int, mixture_weights: Sequence[float], seed: int) -> CLIPTokenizer:
    """Return the tokenizer in `folder`, or else that of `build_tokenizer`, which is trained once and kept there."""
    from transformers import CLIPTokenizer

    if not folder.exists():
        with atomic_write_dir(folder) as partial:
            build_tokenizer(partial, max_length, mixture_weights, seed)
    return CLIPTokenizer.from_pretrained(folder)


def build_tokenizer(folder: Path, max_length: int, mixture_weights: Sequence[float], seed: int = 0) -> CLIPTokenizer:
    """Train a byte-pair vocabulary in CLIP's format on sampled captions, save it to `folder` and return the tokenizer.

    Every byte is a token too, so that any text can be encoded. Sequences are padded to `max_length` tokens.
    """
    from transformers import CLIPTokenizer  # heavy, and the processes that render need none

    rng = np.random.default_rng(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [sample_caption(rng, mixture_weights).caption.lower() for _ in range(_NUM_TOKENIZER_CAPTIONS)]
    lines = [text.split() for text in texts] + [list("0123456789-")] * 50 + [[symbol] for symbol in alphabet]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=4,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        # Otherwise these get their numbers in the random order of a hash map, and decide between pairs as frequent.
        special_tokens=[f"{symbol}</w>" for symbol in alphabet],
        show_progress=False,
    )
    tokenizer.train_from_iterator((" ".join(line) for line in lines), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    vocab = json.loads((folder / "vocab.json").read_text())
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    merges: Any = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    clip_tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    clip_tokenizer.save_pretrained(folder)
    return clip_tokenizer
