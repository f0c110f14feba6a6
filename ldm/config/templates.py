"""How prompts say a concept, by its kind: the template sets of `configs/templates.yaml`. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from ldm.config.yaml_files import check_keys, read_mapping
from ldm.io.paths import REPO_ROOT

KINDS = ("style", "object", "person", "brand", "generic")

_FIELDS = ("{}", "{a}")
_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\S)", re.IGNORECASE)
# What a name has no article of its own after: "the", "an old", but not "a photo of".
_DETERMINER = re.compile(r"\b(?:an?|the|this|my)\s+(?:\w+\s+)?$", re.IGNORECASE)


def without_article(name: str) -> str:
    """Return a name without the article that it begins with, such as 'cat' of 'a cat'."""
    return _ARTICLE.sub("", name, count=1) if _ARTICLE.match(name) else name


def with_article(noun: str) -> str:
    """Return a noun with its article, which it may have already."""
    if _ARTICLE.match(noun):
        return noun
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def fill(template: str, name: str) -> str:
    """Return a template with a name where it says `{}`, and the name with an article where it says `{a}`."""
    return template.replace("{a}", with_article(name)).replace("{}", name)


def fill_phrase(template: str, phrase: str) -> str:
    """Return what `fill` does for a name that may have an article of its own, such as 'a cat'.

    It is left out where the template has one: 'the cat', 'an old cat'.
    """
    noun = without_article(phrase)
    if noun == phrase or not _DETERMINER.search(template.partition("{}")[0]):
        return fill(template, phrase)
    return fill(re.sub(r"\ban? \{\}", "{a}", template), noun)


def fill_anchor(template: str, anchor: str | None, neutral: str) -> str:
    """Return a template that says a concept's own anchor instead of its name, or the neutral word of its kind."""
    return fill(template, neutral) if anchor is None else fill_phrase(template, anchor)


@dataclass(frozen=True)
class TemplateSet:
    """How prompts say concepts of a kind: `neutral` instead of a name, templates to fit on, others to judge by."""

    kind: str
    neutral: str
    templates: tuple[str, ...]
    composed_templates: tuple[str, ...]  # which say a caption too, at {caption}
    held_out_templates: tuple[str, ...]


@cache
def load_template_set(kind: str) -> TemplateSet:
    """Return the template set of a kind. Raises ValueError for a kind that there is not, or a file that is wrong."""
    path = REPO_ROOT / "configs" / "templates.yaml"
    content = check_keys(read_mapping(path), KINDS, str(path))
    if kind not in content:
        raise ValueError(f"'{kind}' is no kind of concept in {path}: choose from {', '.join(content)}")
    place = f"{path}, {kind}"
    group = check_keys(content[kind], ("neutral", "templates", "composed_templates", "held_out_templates"), place)
    neutral = group.get("neutral")
    if not isinstance(neutral, str) or not neutral.strip():
        raise ValueError(f"{place}, neutral is {neutral!r}: give a word or two, such as an artist")
    return TemplateSet(
        kind,
        neutral,
        _checked(group.get("templates"), f"{place}, templates"),
        _checked(group.get("composed_templates"), f"{place}, composed_templates", needs="{caption}"),
        _checked(group.get("held_out_templates"), f"{place}, held_out_templates"),
    )


def _checked(value: Any, place: str, needs: str = "") -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{place} is no list of texts: write it as [..., ...]")
    for template in value:
        said = [field for field in _FIELDS if field in template]
        rest = template.replace(needs, "", 1) if needs else template
        for field in said:
            rest = rest.replace(field, "", 1)
        if len(said) != 1 or "{" in rest or "}" in rest or needs not in template:
            wanted = f"{{}} or {{a}} once, where the concept goes{f', and {needs} once' if needs else ''}"
            raise ValueError(f"{place}: '{template}' should have {wanted}, and no other braces")
    return tuple(value)
