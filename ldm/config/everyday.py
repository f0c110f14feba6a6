"""Everyday prompts from two seeded grammars, and lists chosen by hand, all read from `configs/grammars`. No torch here.

Grammar one makes the captions on which an erasure is fitted as what must not change. Grammar two, which has other
patterns and no content word of the first, makes those that nothing protects, on which false alarms are counted. Of
these, and of compositions, `sample_unprotected` takes a few of each group, to see what an erasure does to them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from configparser import ConfigParser
from functools import cache

from ldm.config.concepts import Concept, concept_status, erasable_concepts
from ldm.config.templates import fill, load_template_set, with_article
from ldm.io.paths import REPO_ROOT

PROMPT_LISTS = {
    "captions": "everyday_captions",
    "words": "everyday_words",
    "kin": "kin_names",
    "near_misses": "near_misses",
}
COMPOSITIONS = "compositions"
UNPROTECTED_GROUPS = (*PROMPT_LISTS, COMPOSITIONS)
NUM_CAPTIONS = 500
NUM_WORDS = 300
_FOLDER = REPO_ROOT / "configs" / "grammars"
_MIN_WORDS, _MAX_WORDS = 3, 20
_MAX_ATTEMPTS = 50  # for each caption that is asked for, before the grammar counts as exhausted
COMPOSED_WITH = {"style": "object", "object": "style"}  # whose concepts compositions say too
_NO_WORDS_OF_THEIR_OWN = ("count", "hour")  # lists of grammar two that hold numbers and times of day

_SLOT_RE = re.compile(r"\{(\w+)(?::(\w+))?\}")
_ARTICLE_RE = re.compile(r"\b([Aa])n? (?=(\w+))")
_LONG_WORD_RE = re.compile(r"[a-z]{4,}")
_SOUNDS_LIKE_CONSONANT = ("uni", "uku", "use", "euro", "one")
_PLURALS = {
    "man": "men", "woman": "women", "child": "children", "person": "people",
    "calf": "calves", "goose": "geese", "wolf": "wolves", "knife": "knives", "mouse": "mice", "ox": "oxen",
    "bookshelf": "bookshelves", "scarf": "scarves", "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes",
    "domino": "dominoes", "volcano": "volcanoes", "hero": "heroes", "echo": "echoes", "mosquito": "mosquitoes",
    "leaf": "leaves", "loaf": "loaves", "thief": "thieves", "elf": "elves", "shelf": "shelves",
    "hoof": "hooves", "life": "lives", "wife": "wives", "foot": "feet", "tooth": "teeth", "die": "dice",
    "lens": "lenses", "rhinoceros": "rhinoceroses",
}  # fmt: skip
_UNCOUNTABLE = (
    "fish", "sheep", "deer", "bison", "aircraft", "kale", "celery", "spinach", "garlic", "parsley", "asparagus",
    "cauliflower", "sandpaper", "squash", "elk", "shrimp", "salmon", "trout", "moose", "spacecraft", "hovercraft",
)  # fmt: skip
_NO_MEN = ("human", "german", "roman", "norman", "caiman", "shaman", "talisman", "ottoman")
_VERB_FORMS = {"lie": ("lying", "lies"), "ski": ("skiing", "skis"), "dust": ("dusting", "dusts")}


def retain_captions(num: int, seed: int = 0) -> list[str]:
    """Return `num` captions of grammar one, no two alike; with more of them from the same seed, the first stay.

    Raises ValueError when the grammar has not so many.
    """
    return _sample_captions("retain", num, seed)


def everyday_captions(num: int, seed: int = 0) -> list[str]:
    """Return `num` captions of grammar two, no two alike; with more of them from the same seed, the first stay.

    Raises ValueError when the grammar has not so many.
    """
    return _sample_captions("everyday", num, seed)


def everyday_words(num: int, seed: int = 0) -> list[str]:
    """Return `num` single words of grammar two: nouns, verbs, adjectives and some names, no two alike.

    Raises ValueError when it has not so many.
    """
    words: set[str] = set()
    for name, options in read_section("everyday", "words").items():
        if name not in _NO_WORDS_OF_THEIR_OWN:
            words.update(option for option in options if option.isalpha())
    if num > len(words):
        raise ValueError(f"there are {len(words)} everyday words, not {num}: ask for fewer")
    return random.Random(seed).sample(sorted(words), num)


def near_misses() -> dict[str, str]:
    """Return prompts that are close to a concept and do not say it, each with the name of that concept."""
    concepts: dict[str, str] = {}
    for concept, prompts in read_section("lists", "near_misses").items():
        concepts |= dict.fromkeys(prompts, concept)
    return concepts


def kin_names() -> list[str]:
    """Return names of artists and objects that are of the same kinds as the concepts, but not among them."""
    kin = read_section("lists", "kin")
    return [*kin["artists"], *kin["objects"]]


@cache
def ordinary_words() -> frozenset[str]:
    """Return the words of grammar one in lower case, which say no concept though its name has them, as Tiger Woods."""
    options = [option for options in read_section("retain", "words").values() for option in options]
    return frozenset(word.lower() for option in options for word in option.split())


def prompt_modifiers() -> list[str]:
    """Return what people add to a prompt, after a comma, to have a better image of whatever it says."""
    return list(read_section("lists", "modifiers")["modifiers"])


def everyday_prompts(kind: str) -> list[str]:
    """Return the prompts of one of `PROMPT_LISTS`, as they stand in the files of `data`."""
    if kind == "captions":
        return everyday_captions(NUM_CAPTIONS)
    if kind == "words":
        return everyday_words(NUM_WORDS)
    return kin_names() if kind == "kin" else list(near_misses())


def sample_unprotected(category: str, num: int, protected: Collection[str] = ()) -> dict[str, list[str]]:
    """Return `num` prompts of each of `UNPROTECTED_GROUPS`, fewer where there are not so many; none for 0.

    Kin names are said by held-out templates of their kind. With more prompts the first stay, and those that are
    `protected` are left out.
    """
    groups: dict[str, list[str]] = {}
    for name in UNPROTECTED_GROUPS if num else ():
        if name == COMPOSITIONS:
            prompts = compositions(category, num)
        else:
            prompts = _kin_prompts() if name == "kin" else everyday_prompts(name)
            prompts = random.Random(name).sample(prompts, len(prompts))[:num]
        groups[name] = [prompt for prompt in prompts if prompt not in protected]
    return groups


def compositions(category: str, num: int) -> list[str]:
    """Return `num` prompts that say each concept of a category in turn, and something else; fewer if there are no more.

    That is an object beside a style, a style beside an object, and an everyday caption beside any other concept.
    """
    concepts = erasable_concepts(category)
    if not concepts:  # as of those that a user names
        return []
    if category not in COMPOSED_WITH:
        captions = [caption.rstrip(".?") for caption in everyday_captions(num)]
        return [_compose(concepts[k % len(concepts)], caption, k) for k, caption in enumerate(captions)]
    others = erasable_concepts(COMPOSED_WITH[category])
    prompts: list[str] = []
    for k in range(min(num, len(concepts) * len(others))):
        own, other = concepts[k % len(concepts)], others[(k % len(concepts) + k // len(concepts)) % len(others)]
        style, thing = (own, other) if category == "style" else (other, own)
        prompts.append(_compose(style, with_article(thing.prompt), k))
    return prompts


def compositions_of(concept: Concept, category: str, num: int) -> list[str]:
    """Return at most `num` prompts that say a concept and something else, as `compositions` of its category do."""
    others = erasable_concepts(COMPOSED_WITH[category]) if category in COMPOSED_WITH else ()
    said = [with_article(other.prompt) for other in others]
    if category == "object":
        return [_compose(other, with_article(concept.prompt), k) for k, other in enumerate(others[:num])]
    texts = said or [caption.rstrip(".?") for caption in everyday_captions(num)]
    return [_compose(concept, text, number) for number, text in enumerate(texts[:num])]


def split_compositions(
    category: str, groups: Mapping[str, Sequence[str]], erased: Collection[int]
) -> dict[str, list[str]]:
    """Return groups of prompts with the compositions that say an erased concept apart, and no group that is empty."""
    split: dict[str, list[str]] = {}
    for name, prompts in groups.items():
        for prompt in prompts:
            is_erased = name == COMPOSITIONS and concept_status(category, prompt, erased) == "erased"
            split.setdefault(f"erased {name}" if is_erased else name, []).append(prompt)
    return split


def _compose(concept: Concept, caption: str, number: int) -> str:
    """Return a caption with a concept in it, as the composed template of that number says it."""
    templates = load_template_set(concept.kind).composed_templates
    return fill(templates[number % len(templates)].replace("{caption}", caption), concept.prompt)


def _kin_prompts() -> list[str]:
    """Return each of `kin_names` in a held-out template of its kind."""
    prompts: list[str] = []
    for section, kind in (("artists", "style"), ("objects", "object")):
        templates = load_template_set(kind).held_out_templates
        for number, name in enumerate(read_section("lists", "kin")[section]):
            prompts.append(fill(templates[number % len(templates)], name))
    return prompts


class _GrammarParser(ConfigParser):
    """Reads the lists under their names as written: those of concepts have capitals."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


@cache
def read_section(file: str, section: str) -> dict[str, tuple[str, ...]]:
    """Return the lists of one section of `configs/grammars/FILE.ini`; those of words are apart by commas too."""
    parser = _GrammarParser(interpolation=None, delimiters=("=",))
    parser.read_string((_FOLDER / f"{file}.ini").read_text(encoding="utf-8"))
    separator = r"[,\n]" if section == "words" else r"\n"
    lists = {}
    for name, text in parser[section].items():
        options = [option.strip() for option in re.split(separator, text)]
        lists[name] = tuple(option for option in options if option)
    return lists


def _sample_captions(file: str, num: int, seed: int) -> list[str]:
    """Return `num` captions of a grammar, no two alike, all chosen from `seed`."""
    rules = {**read_section(file, "words"), **read_section(file, "phrases")}
    patterns = rules["caption"]
    num_slots = [1 + pattern.count("{") for pattern in patterns]  # their weights: few slots have few expansions
    rng = random.Random(seed)
    captions: dict[str, None] = {}
    for _ in range(num * _MAX_ATTEMPTS):
        if len(captions) == num:
            break
        pattern = rng.choices(patterns, num_slots)[0]
        text = _correct_articles(_expand(pattern, rules, rng))
        if _is_natural(text):
            captions[_punctuate(text, rng)] = None
    if len(captions) < num:
        raise ValueError(f"the grammar {file} makes {len(captions)} captions, not {num}: ask for fewer")
    return list(captions)


def _expand(text: str, rules: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """Return `text` with an option of its rule for each slot such as {bird} or {bird:s}, in the form that it names."""

    def fill(slot: re.Match[str]) -> str:
        option = _expand(rng.choice(rules[slot[1]]), rules, rng)
        return _inflect(option, slot[2]) if slot[2] else option

    return _SLOT_RE.sub(fill, text)


def _inflect(text: str, form: str) -> str:
    """Return a noun in the plural (form s), or a phrase whose first word, a verb, is in the form ing or does."""
    if form == "s":
        noun, of, rest = text.partition(" of ")
        first, space, last = noun.rpartition(" ")
        return f"{first}{space}{plural(last)}{of}{rest}"
    verb, space, rest = text.partition(" ")
    inflected = present_participle(verb) if form == "ing" else third_person(verb)
    return f"{inflected}{space}{rest}"


def plural(noun: str) -> str:
    """Return the plural of a noun of one word; of one that looks like a plural, such as scissors, the word itself."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun in _UNCOUNTABLE:
        return noun
    if re.search(r"[^aisu]s$", noun):
        return noun
    if noun.endswith("man") and not noun.lower().endswith(_NO_MEN):
        return f"{noun[:-2]}en"
    if re.search(r"[^aeiou]y$", noun):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if re.search(r"(s|x|ch|sh|z)$", noun) else f"{noun}s"


def third_person(verb: str) -> str:
    """Return a verb as it stands behind he, she or it."""
    return _VERB_FORMS[verb][1] if verb in _VERB_FORMS else plural(verb)


def present_participle(verb: str) -> str:
    """Return the form of a verb that ends in -ing."""
    if verb in _VERB_FORMS:
        return _VERB_FORMS[verb][0]
    if re.search(r"[^aeiouy][aeiou][^aeiouywx]$", verb) and len(re.findall("[aeiou]+", verb)) == 1:
        return f"{verb}{verb[-1]}ing"  # sit, run
    return f"{verb[:-1]}ing" if re.search(r"[^eoy]e$", verb) else f"{verb}ing"


def _correct_articles(text: str) -> str:
    """Return `text` with "a" or "an" as the next word asks for."""

    def article(found: re.Match[str]) -> str:
        word = found[2].lower()
        is_vowel = word[0] in "aeiou" and not word.startswith(_SOUNDS_LIKE_CONSONANT)
        return f"{found[1]}n " if is_vowel else f"{found[1]} "

    return _ARTICLE_RE.sub(article, text)


def _is_natural(text: str) -> bool:
    """Return whether a caption has neither too few words nor too many, and says no longer word twice."""
    long_words = _LONG_WORD_RE.findall(text.lower())
    return _MIN_WORDS <= len(text.split()) <= _MAX_WORDS and len(set(long_words)) == len(long_words)


def _punctuate(text: str, rng: random.Random) -> str:
    """Return a caption as one of those who write them would: with a capital and a period, with one of them, or none."""
    has_capital, has_period = rng.choice(((False, False), (False, False), (True, False), (True, True), (True, True)))
    if has_capital:
        text = text[0].upper() + text[1:]
    return f"{text}." if has_period and not text.endswith("?") else text
