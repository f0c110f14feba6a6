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
_ARTICLE_RE = re.compile(r"(a|an|the) (?=\S)", re.IGNORECASE)
_AFTER_ARTICLE_RE = re.compile(r"\b(a|an|the|this|new)( \w+)? \{\}", re.IGNORECASE)


def with_article(noun: str) -> str:
    """Return a noun with its article."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def without_article(name: str) -> str:
    """Return a name without the article before it, but for that of a title: "a red fox", not "A Bigger Splash"."""
    return re.sub(r"^(a|an) (?=\S)", "", name)


def fill(template: str, name: str) -> str:
    """Return a template with a name where it says `{}`, and the name with an article where it says `{a}`."""
    return template.replace("{a}", with_article(name)).replace("{}", name)


def fill_anchor(template: str, anchor: str) -> str:
    """Return a template with an anchor in place of a concept's name.

    One that has an article ("a dog") keeps it where the template has none: "a photo of a dog", but "a toy dog".
    """
    noun = _ARTICLE_RE.sub("", anchor)
    if noun == anchor:
        return fill(template, anchor)
    return template.replace("{a}", anchor).replace("{}", noun if _AFTER_ARTICLE_RE.search(template) else anchor)


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
