"""Prompts that mean a concept without its name, and near misses that do not, by kind. No torch here.

Those of `configs/meanings.yaml`, or of a file of the same form that a user gives. Misspellings are made by rule, and
near misses are those of `configs/grammars` too.
"""

from __future__ import annotations

import random
from pathlib import Path

from ldm.config.concepts import Concept, check_text
from ldm.config.everyday import near_misses
from ldm.config.spellings import misspellings, says
from ldm.config.yaml_files import check_keys, read_mapping
from ldm.io.paths import REPO_ROOT

DESCRIPTIONS, TITLES, OTHER_LANGUAGES = "descriptions", "titles", "other_languages"
OTHER_FORMS, HOMOPHONES, PARTIAL_NAMES = "other_forms", "homophones", "partial_names"
MISSPELLINGS, NEAR_MISSES = "misspellings", "near_misses"
KEYS = (DESCRIPTIONS, TITLES, OTHER_LANGUAGES, OTHER_FORMS, HOMOPHONES, PARTIAL_NAMES, NEAR_MISSES)  # of a file
PATH = REPO_ROOT / "configs" / "meanings.yaml"
_MAY_NAME = (OTHER_LANGUAGES, NEAR_MISSES)  # kinds whose prompts may have a spelling of the concept
_NUM_MISSPELT = 8  # of each concept


def load_meanings(concept: Concept, path: Path = PATH) -> dict[str, list[str]]:
    """Return prompts by kind that mean a concept, and under `NEAR_MISSES` those that do not; nothing without an entry.

    The entry is called by one of the concept's spellings in the file at `path`. Raises ValueError, with the place, for
    a file that is not so: for an unknown key, a text that is none, two entries of the concept, and a prompt that has
    its name where the kind says that it has not.
    """
    content = _read(path)
    entries = [key for key in content if concept.is_named(key)]
    if not entries:
        return {}
    if len(entries) > 1:
        raise ValueError(f"{path}: {' and '.join(entries)} are both {concept.name}: put them together")
    [entry] = entries
    found = content[entry]
    for kind, prompts in found.items():
        named = [text for text in prompts if kind not in _MAY_NAME and says(text, concept.spellings)]
        if named:
            raise ValueError(
                f"{path}, {entry}, {kind}: '{named[0]}' has the name {concept.name}, which this kind has not: remove it"
            )
    meant = {kind: prompts for kind, prompts in found.items() if kind != NEAR_MISSES}
    listed = [text for text, name in near_misses().items() if concept.is_named(name)]
    missed = [*listed, *found.get(NEAR_MISSES, ())]
    return meant | {MISSPELLINGS: _misspelt(concept)} | ({NEAR_MISSES: list(dict.fromkeys(missed))} if missed else {})


def _read(path: Path) -> dict[str, dict[str, list[str]]]:
    """Return the prompts of a file by concept and kind."""
    content: dict[str, dict[str, list[str]]] = {}
    for concept, group in read_mapping(path, "write concepts with prompts by kind").items():
        place = f"{path}, {check_text(concept, f'{path}: a concept')}"
        content[concept] = {}
        for kind, prompts in check_keys(group, KEYS, place).items():
            content[concept][kind] = _check_prompts(prompts, f"{place}, {kind}")
    return content


def _check_prompts(value: object, place: str) -> list[str]:
    """Return the prompts of a list. Raises ValueError, naming `place`, for what is none, and for a prompt again."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} is {value!r}, not a list of prompts: write it as [..., ...]")
    prompts: list[str] = []
    for number, text in enumerate(value, 1):
        if not check_text(text, f"{place}, entry {number}"):
            raise ValueError(f"{place}, entry {number} is empty: give it a text")
        if text in prompts:
            raise ValueError(f"{place}: '{text}' stands twice: remove one")
        prompts.append(text)
    return prompts


def _misspelt(concept: Concept) -> list[str]:
    """Return names with one letter wrong, the same each time, none of them another spelling."""
    wrong: dict[str, None] = {}
    for spelling in concept.spellings:
        wrong |= dict.fromkeys(misspellings(spelling))
    left = [text for text in wrong if not says(text, concept.spellings)]
    random.Random(concept.name).shuffle(left)
    return left[:_NUM_MISSPELT]
