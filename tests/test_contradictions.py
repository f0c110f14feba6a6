"""Contradictions between what is erased and what is protected."""

import pytest
from conftest import CPU, ROOT

from ldm.config.concept_lists import make_concept
from ldm.config.concepts import erasable_concepts, get_concept
from ldm.config.everyday import everyday_captions
from ldm.diffusion.load import load_model
from ldm.erasure.contradictions import Likeness, check_contradictions, find_by_text

VANGOGH = get_concept("style", 1)


@pytest.fixture(scope="module")
def minilm():
    return load_model(ROOT / "models" / "mini-sd-minilm", CPU)


def test_a_name_an_alias_and_a_caption_say_a_concept_and_a_part_of_another_word_does_not():
    said = ["vangogh", "Vincent van Gogh", "a painting by VanGogh", "VanGogh's house"]
    assert find_by_text(VANGOGH, [*said, "", "a dog", "vangoghish"]) == said


@pytest.mark.parametrize("prompt", ["VanGogh", "Van Gogh", "a house by vangogh"])
def test_a_contradiction_is_refused_by_name(tiny, prompt):
    with pytest.raises(ValueError, match=f"VanGogh cannot be erased and protected at once.*'{prompt}' say it"):
        check_contradictions(tiny, [get_concept("object", 1), VANGOGH], ["", "a dog", prompt])


def test_many_contradictions_are_counted(tiny):
    with pytest.raises(ValueError, match="and 2 more say it"):
        check_contradictions(tiny, [VANGOGH], [f"{number} by VanGogh" for number in range(5)])


def test_without_protected_prompts_there_is_none(tiny):
    check_contradictions(tiny, [VANGOGH], [])
    check_contradictions(tiny, [VANGOGH], [""])


def test_by_embedding_a_prompt_says_a_concept_that_its_text_does_not(minilm):
    protected = ["a golf\u00a0ball", "a photo of a chúrch", "a dog", *everyday_captions(20)]
    assert find_by_text(get_concept("object", 1), protected) == []
    assert Likeness(minilm, protected).find(get_concept("object", 1)) == ["a photo of a chúrch"]
    with pytest.raises(ValueError, match="'a photo of a chúrch' say it to the model"):
        check_contradictions(minilm, [get_concept("object", 1)], protected)


def test_what_an_anchor_takes_out_of_a_name_may_stay_elsewhere(minilm):
    attribute = make_concept("a scientist with glasses", anchor="a scientist")
    check_contradictions(minilm, [attribute], ["glasses", "a dog"])
    with pytest.raises(ValueError, match="'glasses' say it to the model"):
        check_contradictions(minilm, [make_concept("a scientist with glasses")], ["glasses"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini-sd", "mini-sd-minilm"])
def test_by_embedding_other_concepts_and_everyday_captions_say_none(name):
    model = load_model(ROOT / "models" / name, CPU)
    for category, index in (("style", 1), ("style", 3), ("object", 1), ("object", 8)):
        concept = get_concept(category, index)
        others = [other.prompt for other in erasable_concepts(category) if other != concept]
        protected = ["", *others, *[f"a painting by {other}" for other in others], *everyday_captions(30)]
        assert Likeness(model, protected).find(concept) == []
