"""Misspelt names, words that look alike, and whether a text says a name."""

import pytest

from ldm.config.concepts import erasable_concepts, get_concept
from ldm.config.spellings import compounds, lookalikes, misspellings, partial_names, says, shared_last_words

WORDS = ["goat", "painting", "river", "sofa", "yellow"]


def test_misspellings_are_one_letter_away():
    assert misspellings("Anna") == ["AAnna", "nAna", "Ana", "Annna", "Anan", "Ann", "Annaa"]
    assert misspellings("a") == ["aa"] and misspellings("1984") == []
    assert "3 ink" not in misspellings("3D ink") and "3D nk" in misspellings("3D ink")  # the first letter stays


@pytest.mark.parametrize("category", ["style", "object", "logo"])
def test_misspellings_differ_from_the_name_and_from_each_other(category):
    for concept in erasable_concepts(category):
        for spelling in concept.spellings:
            found = misspellings(spelling)
            assert found and spelling not in found and len(set(found)) == len(found)
            assert all(abs(len(text) - len(spelling)) <= 1 for text in found)


def test_spaces_and_digits_are_not_misspelt():
    for text in misspellings("Van Gogh 2"):
        assert text.count(" ") == 2 and text.endswith(" 2")


def test_the_first_letter_is_never_dropped():
    assert "icasso" not in misspellings("Picasso") and "Picaso" in misspellings("Picasso")


def test_lookalikes_are_seeded_and_begin_or_end_as_the_last_word():
    found = lookalikes("Vincent van Gogh", WORDS, 50)
    assert len(found) == 50 and found == lookalikes("Vincent van Gogh", WORDS, 50)
    assert {word[-3:] for word in lookalikes("Vincent van Gogh", WORDS, 50, "xyz")} >= {"xyz"}
    assert found[:20] == lookalikes("Vincent van Gogh", WORDS, 20)
    begun = [word for word in found if word.startswith("go") and word[2:] in WORDS]
    ended = [word for word in found if word.endswith("gh") and word[:-2] in WORDS]
    assert begun and ended and len(begun) + len(ended) >= 50
    assert all("gogh" not in word for word in found)


def test_lookalikes_of_short_words_are_words_too():
    assert all(word for word in lookalikes("a", WORDS, 20)) and len(lookalikes("Al", WORDS, 20)) == 20


def test_compounds_are_seeded_beginnings_of_two_words():
    made = compounds(WORDS, 100)
    assert made == compounds(WORDS, 100) and made != compounds(WORDS, 100, seed=1) and made[:10] == compounds(WORDS, 10)
    for word in made:
        splits = [(word[:k], word[k:]) for k in range(2, 6)]
        assert any(
            any(full.startswith(first) for full in WORDS) and second and any(full.startswith(second) for full in WORDS)
            for first, second in splits
        ), word


def test_partial_names_are_what_names_nothing_by_itself():
    assert partial_names(["Van Gogh", "Vincent van Gogh", "VanGogh"]) == ["Van", "Vincent", "van"]
    assert partial_names(["Pablo Picasso", "Picasso", "Pablo"]) == []  # both are names of his
    assert partial_names(["J. Pollock"]) == [] and partial_names(["Picasso"]) == []
    van_gogh = partial_names(get_concept("style", 1).spellings)
    assert "Vincent" in van_gogh and not {"Van Gogh", "Gogh"} & set(van_gogh)


def test_last_words_that_several_names_share_are_found_unless_they_are_a_name_themselves():
    names = {
        "Barack Obama": ["Barack Obama", "Barack Hussein Obama"],
        "Michelle Obama": ["Michelle Obama"],
        "Pablo Picasso": ["Pablo Picasso", "Picasso"],
        "Paloma Picasso": ["Paloma Picasso"],
        "Kim": ["Kim", ""],
        "Lil' Kim": ["Lil' Kim"],
    }
    picassos = ["Pablo Picasso", "Paloma Picasso"]  # of whom one is called so too
    assert shared_last_words(names) == {"Obama": ["Barack Obama", "Michelle Obama"], "Picasso": picassos}
    assert shared_last_words({"a": ["Van Gogh", "Vincent van Gogh"]}) == {}  # one concept's own


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a painting by Van Gogh", True),
        ("VAN GOGH's sunflowers", True),
        ("van gogh, vangogh", True),
        ("Van Goghs", False),
        ("Ivan Gogh", False),
        ("by Van  Gogh", True),  # as tokenizers read it
        ("Van\nGogh", True),
        ("vangogh", False),
        ("Gogh", False),
        ("", False),
    ],
)
def test_a_name_is_said_as_whole_words(text, expected):
    assert says(text, ["Van Gogh"]) is expected


def test_names_are_texts_and_no_patterns():
    assert says("the A.I. boom", ["A.I."]) and not says("the Axis boom", ["A.I."])
    assert says("a (C) sign", ["(C)"]) and says("Paul Cézanne", ["paul cézanne"])
    assert says("a cat and a dog", ["bird", "dog"]) and not says("a cat", ["bird", "dog"])
