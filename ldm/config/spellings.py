"""Other ways of writing a name: misspelt, and made-up words that are spelled much alike. No torch here."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence


def misspellings(name: str) -> list[str]:
    """Return a name with one letter dropped, doubled or swapped with the next, the first letter never dropped."""
    letters = [k for k, letter in enumerate(name) if letter.isalpha()]
    found: dict[str, None] = {}
    for k in letters:
        if k != letters[0]:
            found[name[:k] + name[k + 1 :]] = None
        found[name[:k] + name[k] + name[k:]] = None
        if k + 1 in letters and name[k] != name[k + 1]:
            found[name[:k] + name[k + 1] + name[k] + name[k + 2 :]] = None
    return list(found)


def respellings(name: str) -> list[str]:
    """Return other ways to write a name that readers still take for it: case, hyphens, letters apart, possessives."""
    words, letters = name.split(), name.replace(" ", "")
    found = [name.lower(), name.upper(), "-".join(words), "_".join(words), "".join(words).lower()]
    found += [" ".join(letters.lower()), f"{name}\u2019s", f"{'-'.join(words)}'s"]
    return [text for text in dict.fromkeys(found) if text != name]


def lookalikes(name: str, words: Sequence[str], num: int, tail: str = "") -> list[str]:
    """Return made-up words that begin or end as a name's last word does, or end in `tail`, and go on as one of `words`.

    They are the same each time.
    """
    rng = random.Random(name)
    last = name.split()[-1].lower()
    made = []
    for _ in range(num if words else 0):
        size, word, way = rng.randint(2, max(2, len(last) // 2)), rng.choice(words), rng.random()
        if way < 0.3:
            made.append(last[:size] + word)
        elif way < 0.6 or not tail:
            made.append(word + last[-size:])
        else:
            made.append(word[: rng.randint(2, 5)] + tail)
    return made


def compounds(words: Sequence[str], num: int, seed: int = 0) -> list[str]:
    """Return made-up words, each the beginnings of two of `words`: they split into pieces as rare words do."""
    rng = random.Random(seed)
    made = []
    for _ in range(num if words else 0):
        first, second = rng.choice(words), rng.choice(words)
        made.append(first[: rng.randint(2, 5)] + second[: rng.randint(2, 5)])
    return made


def partial_names(spellings: Collection[str], common: Collection[str] = ()) -> list[str]:
    """Return the words of names that name nothing by themselves: those that are no spelling, such as first names.

    A last word counts only where it is one of the `common` words.
    """
    known = {spelling.lower() for spelling in spellings}
    words: dict[str, None] = {}
    for spelling in spellings:
        *first, last = spelling.split()
        for word in [*first, last] if last.lower() in common else first:
            if word.lower() not in known and len(word) > 2:
                words[word] = None
    return list(words)


def shared_last_words(names: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """Return the last words of names that several concepts share, such as surnames, and which concepts these are.

    `names` has the spellings of each concept by its name. A word that is a concept's whole name says that one.
    """
    whole = {name.lower() for name in names}
    written: dict[str, str] = {}
    owners: dict[str, dict[str, None]] = {}
    for concept, spellings in names.items():
        for spelling in spellings:
            for last in spelling.split()[-1:]:
                written.setdefault(last.lower(), last)
                owners.setdefault(last.lower(), {})[concept] = None
    shared = [word for word, found in owners.items() if len(found) > 1 and word not in whole]
    return {written[word]: list(owners[word]) for word in shared}


def says(text: str, spellings: Collection[str]) -> bool:
    """Return whether a text has one of the spellings in it, as whole words, whatever its case and white space."""
    names = "|".join(re.escape(" ".join(spelling.split())) for spelling in spellings if spelling.strip())
    return bool(names) and re.search(rf"(?<!\w)({names})(?!\w)", " ".join(text.split()), re.IGNORECASE) is not None
