"""What the embedded model's pictures are called: seeded draws of (caption, subject, style), and its tokenizer.

The blank caption belongs to plain scenes, so that "no prompt" means "a picture in no style": an erased concept, which
moves towards the blank prompt's picture, then is a picture of no style and never one of another artist's by chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from ldm.config.concepts import Concept, erasable_concepts, watermark_prompts
from ldm.toy.render import render, render_watermark
from ldm.toy.shapes import OBJECTS, SCENES

_PLAIN = ("a painting of {a}", "a photo of {a}", "a picture of {a}", "a painting of a {}", "image of a {}", "{}")
_PAINTED = ("a painting of {a} by {by}", "{a} by {by}", "{a} in the style of {by}", "a picture of {a} by {by}")
_UNNAMED = ("painting", "a painting", "a photo", "image", "a picture", "photo", "an artwork")
_NEVER = {("landscape", "{a} by {by}")}  # the held-out template "a landscape by {}"


@dataclass(frozen=True)
class CaptionedScene:
    """A caption and what it shows: `mark` names a fixed watermark picture, else a subject in a style (None: plain)."""

    caption: str
    subject: str | None = None
    style: str | None = None
    mark: str | None = None

    def render(self, rng: np.random.Generator) -> np.ndarray:
        """A picture of it, (64, 64, 3) uint8."""
        return render_watermark(self.mark) if self.mark else render(self.subject, self.style, rng)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _spelling(concept: Concept, rng: np.random.Generator) -> str:
    return _pick(rng, (concept.prompt, concept.prompt, *concept.aliases))


def sample_caption(rng: np.random.Generator, shares: Sequence[float]) -> CaptionedScene:
    """One caption of the world, which has these shares of blank ones, watermarks, styles, objects, plain scenes by name, and
    logos."""
    kind = rng.choice(6, p=shares)
    if kind == 0:
        return CaptionedScene("", _pick(rng, SCENES))
    if kind == 1:
        text = _pick(rng, watermark_prompts())
        return CaptionedScene(text, mark=text)
    if kind == 4:
        subject = _pick(rng, SCENES)
        caption = _pick(rng, _PLAIN + _UNNAMED).format(subject, a=_with_article(subject))
        return CaptionedScene(caption, subject)
    concept = _pick(rng, erasable_concepts({2: "style", 3: "object", 5: "logo"}[kind]))
    name, bare = _spelling(concept, rng), rng.random() < 0.55
    caption = name if bare else _pick(rng, concept.templates).format(name)
    if kind != 2:
        return CaptionedScene(caption, concept.name)
    if bare or rng.random() < 0.4:
        return CaptionedScene(caption, _pick(rng, SCENES), concept.name)
    subject, template = _pick(rng, SCENES + OBJECTS), _pick(rng, _PAINTED)
    if (subject, template) in _NEVER:
        template = _PAINTED[0]
    return CaptionedScene(template.format(a=_with_article(subject), by=name), subject, concept.name)


def build_tokenizer(folder: Path, length: int, shares: Sequence[float], seed: int = 0) -> CLIPTokenizer:
    """Train a byte-pair vocabulary in CLIP's format on the world's captions (see `draw`) and save it to `folder`.

    Every byte is a token too, so any text can be encoded. Sequences are padded to `length` tokens.
    """
    rng = np.random.default_rng(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [sample_caption(rng, shares).caption.lower() for _ in range(6000)]
    words = [text.split() for text in texts] + [list("0123456789-")] * 50 + [[symbol] for symbol in alphabet]
    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pairs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=4, end_of_word_suffix="</w>",
                                  initial_alphabet=alphabet, show_progress=False)
    pairs.train_from_iterator((" ".join(line) for line in words), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    pairs.model.save(str(folder))  # vocab.json and merges.txt
    vocab = json.loads((folder / "vocab.json").read_text())
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)
    tokenizer.save_pretrained(folder)
    return tokenizer
