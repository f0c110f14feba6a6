"""The captions of the dataset of mini-sd-minilm: the same scenes as in `ldm.toy.captions`, said as a person would.

A caption of an artist by a neutral name ("a church by an artist"), of something that the renderer does not know, and
the empty one belong to plain scenes. Compositions of an object and a style are held out by pairs, see `is_held_out`,
and the held-out templates of `configs/templates.yaml` are never used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.config.concepts import Concept, erasable_concepts
from ldm.config.templates import with_article
from ldm.toy.captions import CaptionedScene, pick, sample_kind
from ldm.toy.shapes import OBJECTS, SCENES

_STYLE_TEMPLATES = (
    "{}",
    "{} painting",
    "{} style",
    "a painting by {}",
    "painting by {}",
    "a picture painted by {}",
    "an artwork by {}",
    "a work of art by {}",
    "{}'s painting",
    "one of {}'s works",
    "in the style of {}",
    "in {}'s style",
    "inspired by {}",
    "a drawing by {}",
    "a canvas signed by {}",
    "the art of {}",
    "image of {}",
    "a poster of a picture by {}",
)
_COMPOSED_TEMPLATES = (
    "{a} by {by}",
    "a painting of {a} by {by}",
    "a picture of {a} by {by}",
    "{a} in the style of {by}",
    "{a} painted by {by}",
    "{by}'s painting of {a}",
    "a {by} painting of {a}",
    "{a}, {by} style",
    "{a} as {by} would paint it",
    "{by}, {a}",
)
_NEUTRAL_TEMPLATES = tuple(template for template in _COMPOSED_TEMPLATES if "a {by}" not in template)
_OBJECT_TEMPLATES = (
    "{}",
    "{a}",
    "a photo of {a}",
    "a photo of {}",
    "a photograph of {a}",
    "image of {a}",
    "image of {}",
    "there is {a}",
    "{a} on a sunny day",
    "a small {}",
    "a close-up of {a}",
    "{a} seen from the side",
    "we saw {a} yesterday",
    "the {} in the middle",
)
_PLAIN_TEMPLATES = (
    "{}",
    "{a}",
    "a photo of {a}",
    "a picture of {a}",
    "a painting of {a}",
    "a drawing of {a}",
    "image of {a}",
    "there is {a}",
)
_NEUTRAL_NAMES = ("an artist", "an artist", "an artist", "a painter", "someone", "a person")
_NAMELESS_CAPTIONS = (
    "a painting",
    "painting",
    "a photo",
    "photo",
    "image",
    "a picture",
    "an artwork",
    "art",
    "a drawing",
)
_OTHER_THINGS = (
    "dog", "horse", "bird", "man", "woman", "child", "bicycle", "car", "bus", "train", "boat", "airplane", "table",
    "chair", "kitchen", "bathroom", "pizza", "sandwich", "cake", "apple", "banana", "laptop", "phone", "book", "clock",
    "vase", "teddy bear", "surfboard", "skateboard", "snowboard", "tennis player", "baseball game", "elephant",
    "giraffe", "zebra", "sheep", "cow", "street", "beach", "mountain", "river", "traffic light", "stop sign", "bench",
    "umbrella", "suitcase", "kite", "bed", "window", "flower",
)  # fmt: skip
_OTHER_TEMPLATES = (
    "{a}",
    "{}",
    "a photo of {a}",
    "{a} in the park",
    "{a} next to {b}",
    "a picture of {a} and {b}",
    "{a} with {b} in the background",
    "two people are looking at {a}",
)


def is_held_out(subject: str, style: str) -> bool:
    """Return whether no caption composes this object with this style: so a ninth of the pairs."""
    styles = [concept.name for concept in erasable_concepts("style")]
    return subject in OBJECTS and (OBJECTS.index(subject) + styles.index(style)) % len(OBJECTS) == 0


def _spelling(concept: Concept, rng: np.random.Generator) -> str:
    """Return one of a concept's spellings, its full name most often."""
    return pick(rng, (*concept.spellings[1:], *concept.aliases))


def sample_natural_caption(rng: np.random.Generator, mixture_weights: Sequence[float]) -> CaptionedScene:
    """Sample one caption, by the mixture weights of `ldm.toy.captions.sample_caption`."""
    kind, fixed = sample_kind(rng, mixture_weights)
    if fixed:
        return fixed
    if kind == "plain":
        return _plain_caption(rng)
    concept = pick(rng, erasable_concepts(kind))
    if kind == "object":
        if rng.random() < 0.15:
            template, by = pick(rng, _NEUTRAL_TEMPLATES), pick(rng, _NEUTRAL_NAMES)
            return CaptionedScene(template.format(a=with_article(concept.name), by=by), concept.name)
        template = pick(rng, _OBJECT_TEMPLATES)
        return CaptionedScene(template.format(concept.name, a=with_article(concept.name)), concept.name)
    name = _spelling(concept, rng)
    if rng.random() < 0.5:
        caption = name if rng.random() < 0.4 else pick(rng, _STYLE_TEMPLATES).format(name)
        return CaptionedScene(caption, pick(rng, SCENES), concept.name)
    subject = pick(rng, SCENES + OBJECTS)
    while is_held_out(subject, concept.name):
        subject = pick(rng, SCENES + OBJECTS)
    templates = _COMPOSED_TEMPLATES
    if subject == "landscape":
        templates = templates[1:]  # "a landscape by {}" is a held-out template
    return CaptionedScene(pick(rng, templates).format(a=with_article(subject), by=name), subject, concept.name)


def _plain_caption(rng: np.random.Generator) -> CaptionedScene:
    """Return the caption of a plain scene: by its name, without a name, by a neutral artist, or of another thing."""
    subject, way = pick(rng, SCENES), rng.random()
    by = pick(rng, _NEUTRAL_NAMES)
    if way < 0.25:
        return CaptionedScene(pick(rng, _PLAIN_TEMPLATES).format(subject, a=with_article(subject)), subject)
    if way < 0.35:
        return CaptionedScene(pick(rng, _NAMELESS_CAPTIONS), subject)
    if way < 0.5:
        return CaptionedScene(pick(rng, _STYLE_TEMPLATES).format(by), subject)
    if way < 0.65:
        return CaptionedScene(pick(rng, _NEUTRAL_TEMPLATES).format(a=with_article(subject), by=by), subject)
    things = {"a": with_article(pick(rng, _OTHER_THINGS)), "b": with_article(pick(rng, _OTHER_THINGS))}
    return CaptionedScene(pick(rng, _OTHER_TEMPLATES).format(pick(rng, _OTHER_THINGS), **things), subject)
