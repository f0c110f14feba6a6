"""Everyday prompts: seeded, varied, without names of concepts, and the files of data as the code makes them."""

import csv
import re
from functools import cache

import pytest

from ldm.config import everyday
from ldm.config.concepts import CATEGORIES, KINDS, erasable_concepts, match_concept, watermark_prompts
from ldm.config.everyday import (
    UNPROTECTED_GROUPS,
    compositions,
    everyday_captions,
    everyday_words,
    kin_names,
    near_misses,
    retain_captions,
    sample_unprotected,
    split_compositions,
)
from ldm.config.templates import load_template_set
from ldm.io.paths import REPO_ROOT
from ldm.io.prompts import read_prompt_csv

DATA = REPO_ROOT / "data"
HUNDRED_NAMES = DATA / "hundred_names.csv"
GRAMMARS = {"retain": retain_captions, "everyday": everyday_captions}
WORD_RE = re.compile(r"[\w'-]+")
# What both grammars may say: articles, pronouns, prepositions, auxiliaries, numbers and the like.
FUNCTION_WORDS = """
    a an the this that these those some any no not both each another other one two three five six seven eight
    twelve nineteenth several nothing nobody someone my your his her its our their it is are was were be can did
    does do has have at in on of by for from with without to into onto out off over under above below beside
    behind between among across along around through against near next inside outside after before while during
    beneath beyond up down as and or but than then there here where which who what why how many you we top front
    end side middle back about pair full
"""


def words_of(text: str) -> list[str]:
    return [word.removesuffix("'s") for word in WORD_RE.findall(text.lower())]


def forms(word: str) -> set[str]:
    """Return a word as it stands, in the plural or behind he, with -ing, and with -ed."""
    return {word, everyday.plural(word), everyday.present_participle(word), f"{word.removesuffix('e')}ed"}


def vocabulary(file: str) -> set[str]:
    """Return all content words that a grammar can say, in each of their forms."""
    found: set[str] = set()
    for section in ("words", "phrases"):
        for options in everyday.read_section(file, section).values():
            for option in options:
                said = set(words_of(re.sub(r"\{.*?\}(?:'s)?", " ", option)))
                for word in said - set(FUNCTION_WORDS.split()):
                    found |= forms(word)
    return found


def hundred_names() -> list[dict[str, str]]:
    with open(HUNDRED_NAMES, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


@cache
def names(surnames: bool) -> tuple[str, ...]:
    """Return what names our concepts and the hundred, in lower case; without surnames, only the names in full."""
    found: set[str] = set()
    for category in ("style", "object", "nudity", "logo"):
        for concept in erasable_concepts(category):
            found.update(concept.spellings)
    for row in hundred_names():
        found.add(row["name"])
        if surnames:
            found.update(alias for alias in row["aliases"].split(";") if alias)
            if row["kind"] in ("artist", "public figure"):
                found.add(row["name"].split()[-1])
    if not surnames:
        found -= {"Pollock"}  # a fish too, which is a near miss
    return tuple(name.lower() for name in sorted(found))


def named(texts: list[str], surnames: bool = True) -> list[str]:
    """Return the texts in which a name stands as a sequence of whole words, each with that name."""
    found = []
    lines = "\n".join(text.lower() for text in texts)
    for name in names(surnames):
        match = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", lines)
        if match:
            found.append(f"{name}: {lines[max(0, match.start() - 40) : match.end() + 40]}")
    return found


@pytest.mark.parametrize("make", GRAMMARS.values(), ids=GRAMMARS)
def test_captions_are_unlike_each_other_and_of_a_captions_length(make):
    captions = make(3000)
    assert len(set(captions)) == 3000 and captions == make(3000) and captions[:100] == make(100)
    assert captions[:100] != make(100, seed=1)
    for caption in captions:
        assert 3 <= len(caption.split()) <= 20 and not re.search(r"[{}]|  |_|\ba [aeio]\w+s?\b(?<!a one)", caption), (
            caption
        )


@pytest.mark.parametrize("file", GRAMMARS)
def test_every_slot_has_a_rule_and_every_rule_a_slot(file):
    rules = {**everyday.read_section(file, "words"), **everyday.read_section(file, "phrases")}
    assert len(set(rules["caption"])) >= 40
    slots = {"caption"}
    for options in rules.values():
        for option in options:
            slots.update(re.findall(r"\{(\w+)(?::(?:s|ing|does))?\}", option))
            assert "{" not in re.sub(r"\{\w+(?::(?:s|ing|does))?\}", "", option), option
    assert slots == set(rules)


def test_the_grammars_share_no_content_word_and_no_pattern():
    assert not vocabulary("retain") & vocabulary("everyday")
    patterns = [set(everyday.read_section(file, "phrases")["caption"]) for file in GRAMMARS]
    assert not patterns[0] & patterns[1]


def test_the_vocabulary_is_wide():
    for file in GRAMMARS:
        assert len({word for caption in GRAMMARS[file](8000) for word in words_of(caption)}) > 1000


@pytest.mark.slow
def test_no_name_of_a_concept_is_said():
    for make in GRAMMARS.values():
        assert not named(make(4000))
        for caption in make(500):
            assert not match_concept("style", caption) and not match_concept("object", caption)
    listed = [
        option for file in GRAMMARS for options in everyday.read_section(file, "words").values() for option in options
    ]
    assert not named(listed) and not named(everyday_words(300)) and not named(kin_names())


def test_near_misses_belong_to_every_concept_and_say_none():
    concepts = [concept.name for category in ("style", "object") for concept in erasable_concepts(category)]
    assert list(dict.fromkeys(near_misses().values())) == concepts
    assert len(near_misses()) >= 60 and not named(list(near_misses()), surnames=False)


def test_words_are_single_and_kin_are_forty_that_no_grammar_says():
    words = everyday_words(300)
    assert len(set(words)) == 300 and all(word.isalpha() for word in words) and words == everyday_words(300)
    assert len(set(kin_names())) == 40
    for make in GRAMMARS.values():
        lines = "\n".join(make(8000)).lower()
        assert not [name for name in kin_names() if re.search(rf"\b{name.lower()}s?\b", lines)]


def test_what_there_is_not_enough_of_is_an_error():
    with pytest.raises(ValueError, match="ask for fewer"):
        everyday_words(10**6)


@pytest.mark.parametrize(
    ("verb", "participle", "third"),
    [
        ("sit", "sitting", "sits"), ("ride", "riding", "rides"), ("lie", "lying", "lies"),
        ("watch", "watching", "watches"), ("carry", "carrying", "carries"), ("play", "playing", "plays"),
        ("open", "opening", "opens"), ("see", "seeing", "sees"), ("row", "rowing", "rows"),
        ("swim", "swimming", "swims"), ("fix", "fixing", "fixes"),
    ],
)  # fmt: skip
def test_forms_of_verbs(verb, participle, third):
    assert everyday.present_participle(verb) == participle and everyday.third_person(verb) == third


@pytest.mark.parametrize(
    ("one", "many"),
    [("bus", "buses"), ("fisherman", "fishermen"), ("puppy", "puppies"), ("monkey", "monkeys"), ("sheep", "sheep"),
     ("knife", "knives"), ("peach", "peaches"), ("human", "humans"), ("German", "Germans"), ("caiman", "caimans"),
     ("leaf", "leaves"), ("tooth", "teeth"), ("hero", "heroes"), ("scissors", "scissors"), ("glasses", "glasses"),
     ("dress", "dresses"), ("cactus", "cactuses"), ("gas", "gases"), ("lens", "lenses"), ("balls", "balls"),
     ("snowman", "snowmen")],
)  # fmt: skip
def test_plurals(one, many):
    assert everyday.plural(one) == many


def test_a_hundred_names_to_erase():
    rows = hundred_names()
    kinds = [row["kind"] for row in rows]
    counts = {"artist": 35, "public figure": 30, "brand": 20, "proper name": 15}
    assert {kind: kinds.count(kind) for kind in counts} == counts and len({row["name"] for row in rows}) == 100
    ours = {spelling.lower() for concept in erasable_concepts("style") for spelling in concept.spellings}
    spellings = {name.lower() for row in rows for name in (row["name"], *row["aliases"].split(";"))}
    assert ours <= spellings


@pytest.mark.parametrize(("kind", "name"), everyday.PROMPT_LISTS.items())
def test_the_files_of_data_are_what_the_code_makes(kind, name):
    cases = read_prompt_csv(DATA / f"{name}.csv")
    assert [case.prompt for case in cases] == everyday.everyday_prompts(kind)


@pytest.mark.parametrize("category", CATEGORIES)
def test_there_are_as_many_prompts_of_each_unprotected_group_as_asked_for_and_more_of_them_begin_alike(category):
    few, many = sample_unprotected(category, 3), sample_unprotected(category, 40)
    assert tuple(few) == tuple(many) == UNPROTECTED_GROUPS
    for name, prompts in many.items():
        assert few[name] == prompts[:3] and len(set(prompts)) == len(prompts) == 40
    every_prompt = [prompt for prompts in many.values() for prompt in prompts]
    assert len(set(every_prompt)) == len(every_prompt)  # a prompt has one group
    assert not {"", *watermark_prompts()} & set(every_prompt)
    assert sample_unprotected(category, 0) == {}


def test_compositions_say_a_concept_and_other_unprotected_prompts_none():
    for category in ("style", "object", "nudity", "logo"):
        groups = sample_unprotected(category, 500)
        assert all(match_concept(category, prompt) for prompt in groups["compositions"])
        for name in ("captions", "words", "kin"):
            assert not [prompt for prompt in groups[name] if match_concept(category, prompt)]


def test_a_prompt_that_is_protected_is_in_no_unprotected_group():
    groups = sample_unprotected("style", 3)
    left = sample_unprotected("style", 3, protected=[groups["words"][1]])
    assert left["words"] == [groups["words"][0], groups["words"][2]] and left["kin"] == groups["kin"]


def test_compositions_say_each_style_beside_an_object_once():
    for category in ("style", "object"):
        prompts = compositions(category, 1000)
        said = {(match_concept("style", prompt), match_concept("object", prompt)) for prompt in prompts}
        assert len(said) == len(prompts) == len(erasable_concepts("style")) * len(erasable_concepts("object"))
        first = [match_concept(category, prompt) for prompt in prompts[: len(erasable_concepts(category))]]
        assert first == list(erasable_concepts(category))


def test_compositions_of_erased_concepts_are_a_group_of_their_own():
    groups = {"kin": ["Paul Klee"], "compositions": ["a church by VanGogh", "a tench by Picasso"], "words": []}
    split = split_compositions("style", groups, [1])
    assert split == {
        "kin": ["Paul Klee"],
        "erased compositions": ["a church by VanGogh"],
        "compositions": ["a tench by Picasso"],
    }
    assert split_compositions("style", groups, []) == {name: prompts for name, prompts in groups.items() if prompts}


def test_the_modifiers_on_which_gates_are_fitted_stand_in_no_prompt_by_which_they_are_judged():
    modifiers = everyday.prompt_modifiers()
    assert len(set(modifiers)) == len(modifiers) >= 40 and not named(modifiers)
    held_out = [text for kind in KINDS for text in load_template_set(kind).held_out_templates]
    judging = [*held_out, *near_misses(), *kin_names()]
    assert not [(words, text) for words in modifiers for text in judging if words.lower() in text.lower()]
    assert not vocabulary("everyday") & {word for words in modifiers for word in words_of(words)}
