"""What a concept is, and those of `configs`, by category and index. No torch here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Self

from ldm.config.settings import did_you_mean
from ldm.config.templates import KINDS, fill, load_template_set, with_article
from ldm.config.yaml_files import check_keys, read_mapping
from ldm.io.paths import REPO_ROOT

CATEGORIES = ("style", "object", "similar", "nudity", "logo")
OWN = "own"  # in place of a category: the concepts that a user names by their texts
_NUM_CAPTIONS = 6  # of a concept that has no templates of its own
OWN_INDEX = -1  # of each of them, which nothing counts


STATUSES = ("erased", "restored", "regular", "protected")


INDEX_RANGE_RE = re.compile(r"([0-9]+)(?:-([0-9]+))?")  # an index, or a first and a last one


EMPTY_PROMPT_LABEL = "(empty)"  # what tables and images call the empty prompt


# Folders of images that are no concept's own, beside those that are.
_OTHER_FOLDERS = ("train", "eval", "empty", *CATEGORIES)


class UnknownConceptError(ValueError):
    """A text is neither an index nor a name of a category's concepts."""


@dataclass(frozen=True)
class Concept:
    """A concept: `index` in its category, `prompt` (how prompts say it), other spellings, caption templates with `{}`.

    `held_out_templates` are templates that the bundled model's captions never use. `anchor_prompt` is the first
    template without the concept, to which some methods pull it. `kind` is what kind of thing it is. One that a user
    names by its text, `is_own`, has no index of its own, and may have an `anchor`: what takes the place of its name in
    prompts.
    """

    index: int
    name: str
    prompt: str
    aliases: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    held_out_templates: tuple[str, ...] = ()
    anchor_prompt: str = ""
    is_watermark: bool = False
    kind: str = "generic"  # whose template set of configs/templates.yaml says it
    anchor: str | None = None  # without one the neutral word of its kind

    @property
    def is_own(self) -> bool:
        """Whether a user named the concept by its text, so that it is in no category."""
        return self.index == OWN_INDEX

    @property
    def label(self) -> str:
        """What files and merges call the concept: its index, or else its name without what no file is called by.

        Names that differ only in case or white space have the same label, others different ones.
        """
        if not self.is_own:
            return str(self.index)
        identity = identity_of(self.name)
        if re.fullmatch("[a-z0-9]{1,60}", identity) and not identity.isdigit():
            return identity
        return self._digested_label

    @property
    def _digested_label(self) -> str:
        identity = identity_of(self.name)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        return f"{re.sub('[^a-z0-9]+', '', identity)[:40] or 'concept'}-{digest}"

    @property
    def folder_name(self) -> str:
        """What a folder of its images is called: its name, or where no folder of its own can be, a label like it."""
        if not self.is_own:
            return self.name
        is_unsafe = re.search(r'^\.|[/\\:*?"<>|]|\.$', self.name) or len(self.name.encode()) > 200
        return self._digested_label if is_unsafe or self.name.lower() in _OTHER_FOLDERS else self.name

    @property
    def spellings(self) -> tuple[str, ...]:
        """What names the concept: its prompt, its name and its aliases."""
        return (self.prompt, self.name, *self.aliases)

    def is_named(self, text: str) -> bool:
        """Return whether `text` is one of the spellings, whatever its case and white space."""
        return is_one_of(text, self.spellings)

    @property
    def captions(self) -> list[str]:
        """Each template with the concept in it: its own, or some of its kind's where a user named it."""
        templates = self.templates
        if self.is_own and not templates:
            templates = load_template_set(self.kind).templates[:_NUM_CAPTIONS]
        return [fill(template, self.prompt) for template in templates] or [self.prompt]

    @property
    def held_out_prompts(self) -> list[str]:
        """Each held-out template with the concept in it, as for `captions`."""
        templates = self.held_out_templates
        if self.is_own and not templates:
            templates = load_template_set(self.kind).held_out_templates
        return [fill(template, self.prompt) for template in templates]

    def prompts(self, num_templates: int) -> list[str]:
        """Return the concept's name and its first `num_templates` captions, once each.

        An object that a user named is said with its article too, as users do: "church" and "a church".
        """
        names = [self.prompt]
        if self.is_own and self.kind == "object":
            names.append(with_article(self.prompt))
        return list(dict.fromkeys([*names, *self.captions[:num_templates]]))

    def to_dict(self) -> dict[str, Any]:
        """Return all that the concept is, for a file that has to mean the same for ever."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Return the concept that `to_dict` made this of. Raises ValueError for what it cannot have made."""
        known = {entry.name for entry in fields(cls)}
        if not isinstance(content, dict) or not {"index", "name", "prompt"} <= set(content) <= known:
            raise ValueError(f"{str(content)[:100]} is no concept: it has {', '.join(sorted(known))}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        concept = cls(**values)
        lists = (concept.aliases, concept.templates, concept.held_out_templates)
        if not all(isinstance(value, tuple) for value in lists):
            raise ValueError(f"{str(content)[:100]} is no concept: its aliases and templates are no lists")
        texts = [concept.name, concept.prompt, *concept.aliases, *concept.templates, *concept.held_out_templates]
        texts += [concept.anchor_prompt, concept.kind, concept.anchor or ""]
        is_index = type(concept.index) is int and concept.index >= OWN_INDEX
        is_valid = all(isinstance(text, str) for text in texts) and concept.kind in KINDS
        if not is_valid or not is_index or type(concept.is_watermark) is not bool or not concept.prompt:
            raise ValueError(f"{str(content)[:100]} is no concept: its texts, its index or its kind are none")
        return concept


def image_folder(root: Path, concept: Concept) -> Path:
    """Return the folder below `root` of a concept's images.

    Of a concept that a user names it is one that is there already by another of its spellings, where there is none by
    its name.
    """
    folder = root / concept.folder_name
    if not concept.is_own or folder.is_dir() or not root.is_dir():
        return folder
    for other in sorted(root.iterdir()):
        if other.is_dir() and other.name.lower() not in _OTHER_FOLDERS and concept.is_named(other.name):
            return other
    return folder


def identity_of(text: str) -> str:
    """Return what is the same for all texts that differ only in case and white space."""
    return "".join(text.casefold().split())


def is_one_of(text: str, names: Iterable[str]) -> bool:
    """Return whether a text is one of the names, whatever its case and white space, and with an article or without."""
    tidied = " ".join(text.split())
    texts = {identity_of(tidied), identity_of(re.sub("^(a|an) ", "", tidied, flags=re.IGNORECASE))}
    return not texts.isdisjoint(identity_of(name) for name in names)


def check_text(value: Any, place: str) -> str:
    """Return a text that is one. Raises ValueError, naming `place`, for anything else."""
    if not isinstance(value, str):
        raise ValueError(f'{place} is {value!r} to YAML, and not a text: write it in quotes, such as "1984"')
    if value != value.strip() or not value.isprintable():
        raise ValueError(f"{place} is {value!r}: remove the white space around it and what is not printable in it")
    return value


def check_name(value: Any, place: str) -> str:
    """Return a text by which folders may be called. Raises ValueError, naming `place`, for anything else."""
    if not check_text(value, place):
        raise ValueError(f"{place} is empty: give it a text")
    if re.search(r"[/\\]|^\.", value) or len(value) > 200:  # folders are called so
        raise ValueError(
            f"{place} is {value!r}: a name has no slash, begins with no dot and has at most 200 characters"
        )
    return value


def check_name_list(value: Any, place: str) -> tuple[str, ...]:
    """Return the texts of a list. Raises ValueError, naming `place`, for what is no list of texts."""
    if not isinstance(value, list):
        raise ValueError(f"{place} is {value!r}, not a list: write it as [..., ...]")
    return tuple(check_name(item, f"{place}, entry {k}") for k, item in enumerate(value, 1))


def check_templates(value: Any, place: str) -> tuple[str, ...]:
    """Return the templates of a list. Raises ValueError, naming `place`, for one that is none."""
    for template in check_name_list(value, place):
        try:
            fields = [(name, spec, how) for _, name, spec, how in Formatter().parse(template) if name is not None]
        except ValueError:
            fields = []
        if fields != [("", "", None)] or template.count("{") != 1 or template.count("}") != 1:
            raise ValueError(
                f"{place}: '{template}' should have {{}} once, where the concept goes, and no other braces"
            )
    return tuple(value)


_KIND_OF = {"style": "style", "object": "object", "logo": "brand"}  # where the file names no kind
_GROUP_KEYS = ("kind", "anchor_prompt", "templates", "held_out_templates", "concepts")
_OLD_GROUP_KEYS = {"anchor": "anchor_prompt", "held_out": "held_out_templates"}


@cache
def _load_config() -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the categories of both files, each with the place it stands in, and the watermarks."""
    categories: dict[str, Any] = {}
    watermarks: dict[str, None] = {}
    for name in ("concepts.yaml", "logos.yaml"):
        path = REPO_ROOT / "configs" / name
        content = check_keys(read_mapping(path), ("watermarks", "categories"), str(path))
        for text in check_name_list(content.get("watermarks", []), f"{path}, watermarks"):
            if text in watermarks:
                raise ValueError(f"{path}: the watermark '{text}' stands twice: remove one")
            watermarks[text] = None
        for category, group in check_keys(content.get("categories", {}), CATEGORIES, f"{path}, categories").items():
            if category in categories:
                raise ValueError(f"{path}: the category {category} is in another file too: remove one")
            categories[category] = f"{path}, {category}", group
    return categories, tuple(watermarks)


def check_spelled_once(concepts: Sequence[Concept], places: Sequence[str]) -> None:
    """Raise ValueError, with the place of the later one, where two concepts have a spelling in common."""
    owners: dict[str, Concept] = {}
    for concept, place in zip(concepts, places, strict=True):
        for spelling in concept.spellings:
            other = owners.setdefault(identity_of(spelling), concept)
            if other is not concept and identity_of(other.name) == identity_of(concept.name):
                raise ValueError(f"{place}: '{concept.name}' is there twice: name it once")
            if other is not concept:
                raise ValueError(
                    f"{place}: '{spelling}' names both {other.name} and {concept.name}: remove it from one"
                )


@cache
def load_concepts(category: str) -> tuple[Concept, ...]:
    """All concepts of `category` in order of index, the watermark prompts after them; of `OWN` these alone.

    Raises ValueError for an unknown category, and for a file whose texts are none, or that is wrong in another way.
    """
    if category == OWN:
        return tuple(Concept(k, text, text, is_watermark=True) for k, text in enumerate(watermark_prompts()))
    if category not in CATEGORIES:
        raise ValueError(f"unknown category '{category}': choose one of {', '.join(CATEGORIES)}")
    categories, watermarks = _load_config()
    if category not in categories:
        raise ValueError(f"no category {category} in configs/concepts.yaml: add it")
    place, group = categories[category]
    group = {
        _OLD_GROUP_KEYS.get(key, key): value
        for key, value in check_keys(group, (*_GROUP_KEYS, *_OLD_GROUP_KEYS), place).items()
    }
    templates = check_templates(group.get("templates", []), f"{place}, templates")
    held_out_templates = check_templates(group.get("held_out_templates", []), f"{place}, held_out_templates")
    anchor_prompt = check_text(group.get("anchor_prompt", ""), f"{place}, anchor_prompt")
    kind = group.get("kind", _KIND_OF.get(category, "generic"))
    if kind not in KINDS:
        raise ValueError(f"{place}, kind: {kind!r} is none of {', '.join(KINDS)}")
    entries = group.get("concepts")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{place}, concepts is {entries!r}, not a list of one or more")
    concepts = []
    for index, entry in enumerate(entries):
        where = f"{place}, concept {index}"
        check_keys(entry, ("name", "prompt", "aliases"), where)
        name = check_name(entry.get("name"), f"{where}, name")
        prompt = check_name(entry.get("prompt", name), f"{where} {name}, prompt")
        aliases = check_name_list(entry.get("aliases", []), f"{where} {name}, aliases")
        concepts.append(Concept(index, name, prompt, aliases, templates, held_out_templates, anchor_prompt, kind=kind))
    concepts += [Concept(len(concepts) + k, text, text, is_watermark=True) for k, text in enumerate(watermarks)]
    check_spelled_once(concepts, [place] * len(concepts))
    return tuple(concepts)


def erasable_concepts(category: str) -> tuple[Concept, ...]:
    """The concepts of `category` without the watermark prompts."""
    return tuple(concept for concept in load_concepts(category) if not concept.is_watermark)


def watermark_prompts() -> tuple[str, ...]:
    """The prompts whose images prove ownership; every shift leaves them untouched."""
    return _load_config()[1]


def always_protected_prompts() -> list[str]:
    """The prompts that every shift leaves untouched: the empty one and the watermarks."""
    return ["", *watermark_prompts()]


def _format_choices(category: str) -> str:
    return ", ".join(f"{concept.index} {concept.name}" for concept in load_concepts(category))


def get_concept(category: str, index: int) -> Concept:
    """The concept with that index. Raises ValueError, listing all names, when there is none."""
    concepts = load_concepts(category)
    if type(index) is not int or not 0 <= index < len(concepts):
        raise ValueError(f"no {category} concept has index {index}: choose from {_format_choices(category)}")
    return concepts[index]


def find_by_name(category: str, text: str) -> Concept | None:
    """The concept that `text` names by one of its spellings; None when there is none."""
    return next((concept for concept in load_concepts(category) if concept.is_named(text)), None)


def match_concept(category: str, prompt: str) -> Concept | None:
    """Return the concept that a prompt names: all of it, or the longest spelling within it; None if there is none."""
    inside = [
        (len(spelling), -concept.index, concept)
        for concept in erasable_concepts(category)
        for spelling in concept.spellings
        if spelling.lower() in prompt.lower()
    ]
    return find_by_name(category, prompt) or (max(inside)[2] if inside else None)


def concept_status(
    category: str, prompt: str, erased: Collection[int], restored: Collection[int] = (), protected: Collection[int] = ()
) -> str:
    """What a prompt's concept is, given the indexes of those: erased, restored, protected (as the watermarks and the
    empty prompt always are), or regular.
    """
    concept = match_concept(category, prompt)
    if prompt in always_protected_prompts():
        return "protected"
    if concept is None:
        return "regular"
    kinds = {"erased": erased, "restored": restored, "protected": protected}
    return next((kind for kind, indexes in kinds.items() if concept.index in indexes), "regular")


def parse_indexes(texts: str | Sequence[str], category: str) -> list[int]:
    """Return the indexes that texts say, once each: 'VanGogh', '0,1,4-6', 'VanGogh,2', or several of these.

    Raises UnknownConceptError for a text that names no concept of `category`, and ValueError for a wrong index.
    """
    indexes: list[int] = []
    for text in [texts] if isinstance(texts, str) else texts:
        for piece in _pieces(text, category):
            indexes += _parse_piece(piece, category)
    return list(dict.fromkeys(indexes))


def _pieces(text: str, category: str) -> list[str]:
    """Return what the commas of a text separate; all of it where it is a concept's name."""
    if not text.strip():
        return []
    return [text] if find_by_name(category, text) else [piece.strip() for piece in text.split(",")]


def _parse_piece(piece: str, category: str) -> list[int]:
    """Return the indexes of '3', of '4-6', or of a concept's name."""
    span = INDEX_RANGE_RE.fullmatch(piece)
    named = find_by_name(category, piece)
    if not span and named:
        return [named.index]
    if not span:
        names = [spelling for concept in load_concepts(category) for spelling in concept.spellings]
        raise UnknownConceptError(
            f"'{piece}' is not a concept index, and no name of category {category}{did_you_mean(piece, names)}: give "
            f"numbers such as 0,1,2 or 0-8, or names, from {_format_choices(category)}"
        )
    first, last = int(span[1]), int(span[2] or span[1])
    if last < first:
        raise ValueError(f"'{piece}' counts backwards: write {last}-{first}")
    for end in (first, last):  # before a range of billions is made
        get_concept(category, end)
    return list(range(first, last + 1))


def parse_erase_targets(texts: str | Sequence[str], category: str) -> list[Concept]:
    """The concepts to erase, by `parse_indexes`. Raises ValueError for none at all, and for a watermark."""
    concepts = [get_concept(category, index) for index in parse_indexes(texts, category)]
    if not concepts:
        raise ValueError(f"no concept to erase: give indexes such as 0,1,2 from {_format_choices(category)}")
    for concept in concepts:
        if concept.is_watermark:
            raise ValueError(
                f"{concept.index} {concept.name} is a watermark, which every shift protects: "
                f"erase one of {erasable_concepts(category)[0].index} to {erasable_concepts(category)[-1].index}"
            )
    return concepts
