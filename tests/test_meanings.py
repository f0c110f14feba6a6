"""Prompts that mean a concept without its name: what the file holds, and a user's own file that is wrong."""

import re

import pytest

from ldm.config.concept_lists import make_concept
from ldm.config.concepts import erasable_concepts, get_concept
from ldm.config.everyday import near_misses
from ldm.config.meanings import (
    DESCRIPTIONS,
    KEYS,
    MISSPELLINGS,
    NEAR_MISSES,
    OTHER_LANGUAGES,
    PATH,
    TITLES,
    load_meanings,
)
from ldm.config.spellings import misspellings, says
from ldm.config.yaml_files import read_mapping

VANGOGH = get_concept("style", 1)
STYLES = erasable_concepts("style")
FEW_TITLES = {"Kelly McKernan": 4, "Kilian Eng": 4}  # living illustrators; of Tyler Edlin none is known


@pytest.mark.parametrize("concept", STYLES, ids=lambda concept: concept.name)
def test_each_artist_has_at_least_six_prompts_of_each_kind(concept):
    kinds = load_meanings(concept)
    expected = {*KEYS, MISSPELLINGS} - ({TITLES} if concept.name == "Tyler Edlin" else set())
    assert set(kinds) == expected
    for kind, prompts in kinds.items():
        least = FEW_TITLES.get(concept.name, 6) if kind == TITLES else 6
        assert len(set(prompts)) == len(prompts) >= least, kind


@pytest.mark.parametrize("concept", STYLES, ids=lambda concept: concept.name)
def test_only_whole_prompts_in_other_languages_say_the_name(concept):
    for kind, prompts in load_meanings(concept).items():
        for prompt in prompts:
            if kind != NEAR_MISSES:  # "grilled pollock fillet" has the word, and is about a fish
                assert says(prompt, concept.spellings) == (kind == OTHER_LANGUAGES), prompt


@pytest.mark.parametrize("concept", STYLES, ids=lambda concept: concept.name)
def test_no_prompt_says_another_artist_that_may_be_erased(concept):
    for prompts in load_meanings(concept).values():
        for other in STYLES:
            assert other == concept or not [text for text in prompts if says(text, other.spellings)]


def test_no_prompt_is_of_two_kinds_or_of_two_artists():
    prompts = [text for concept in STYLES for found in load_meanings(concept).values() for text in found]
    assert len(set(prompts)) == len(prompts)


def test_the_near_misses_of_the_grammars_are_among_them():
    listed = {text for text, name in near_misses().items() if name == "VanGogh"}
    assert listed < set(load_meanings(VANGOGH)[NEAR_MISSES])


def test_every_entry_is_a_configured_artist():
    assert set(read_mapping(PATH)) == {concept.name for concept in STYLES}


@pytest.mark.parametrize("text", ["a red fox", "Claude Monet", "1984"])
def test_a_concept_without_an_entry_has_no_prompts(text):
    assert load_meanings(make_concept(text)) == {}
    assert load_meanings(get_concept("object", 0)) == {}


def test_a_users_file_names_a_concept_by_any_spelling(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("Red  Fox:\n  descriptions: [Reynard of the fables]\n  near_misses: [a red box]\n")
    kinds = load_meanings(make_concept("a red fox"), path)
    assert kinds[DESCRIPTIONS] == ["Reynard of the fables"] and kinds[NEAR_MISSES] == ["a red box"]
    assert kinds[MISSPELLINGS] and load_meanings(VANGOGH, path) == {}


WRONG = {
    "red fox: {titels: [Reynard]}": "red fox has the key 'titels': the keys are descriptions, titles",
    "red fox: [Reynard]": "red fox is ['Reynard'], not a mapping with the keys",
    "red fox: {titles: Reynard}": "red fox, titles is 'Reynard', not a list of prompts",
    "red fox: {titles: []}": "red fox, titles is [], not a list of prompts",
    "red fox: {titles: [1984]}": "red fox, titles, entry 1 is 1984 to YAML, and not a text",
    "red fox: {titles: [a, '']}": "red fox, titles, entry 2 is empty: give it a text",
    "red fox: {titles: [' a']}": "red fox, titles, entry 1 is ' a': remove the white space",
    "red fox: {titles: [a, a]}": "red fox, titles: 'a' stands twice: remove one",
    "red fox: {titles: [The Red Fox and I]}": "red fox, titles: 'The Red Fox and I' has the name red fox",
    "red fox: {titles: [a]}\nRedFox: {titles: [b]}": "red fox and RedFox are both red fox: put them together",
    "1: {titles: [a]}": "a concept is 1 to YAML, and not a text",
    "- a": "is no mapping: write concepts with prompts by kind",
    "red fox: {titles: ['${oc.env:HOME}']}": "asks for a value from elsewhere",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_users_file_that_is_wrong_is_one_line(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(WRONG[text])) as error:
        load_meanings(make_concept("a red fox"), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none.yaml"):
        load_meanings(VANGOGH, tmp_path / "none.yaml")


def test_misspellings_are_of_one_letter_and_the_same_each_time():
    for concept in STYLES:
        wrong = load_meanings(concept)[MISSPELLINGS]
        assert len(wrong) == 8 and wrong == load_meanings(concept)[MISSPELLINGS]
        assert set(wrong) <= {text for spelling in concept.spellings for text in misspellings(spelling)}
