"""Prompts that say a name, by kind: they say it, they are none of those that erasures are fitted or judged on."""

import pytest

from ldm.config.concept_lists import make_concept
from ldm.config.concepts import Concept, erasable_concepts, get_concept
from ldm.config.prompt_kinds import ALONE, OTHER_SPELLINGS, RESPELT, name_kinds
from ldm.config.spellings import says
from ldm.config.templates import KINDS, fill, fill_phrase, load_template_set
from ldm.toy import natural

VANGOGH = get_concept("style", 1)
OWN = [
    *(make_concept("a red fox", kind) for kind in KINDS),
    make_concept("the Eiffel Tower"),
    make_concept("Anna Maria von Schurmann", "person"),
    make_concept("1984", "generic"),
    make_concept("\u7d05\u8449", "style"),
    Concept(0, "a red fox", "a red fox", kind="object"),
]


def test_a_style_has_the_kinds_and_prompts_that_a_suite_needs():
    kinds = name_kinds(VANGOGH)
    assert len(kinds) == 26 and 155 <= sum(map(len, kinds.values())) <= 180
    assert kinds[ALONE] == ["VanGogh"] and "Vincent van Gogh" in kinds[OTHER_SPELLINGS]
    assert "a church, how VanGogh would do it" in kinds["composition"] and "(VanGogh:1.3)" in kinds["weights"]
    assert kinds == name_kinds(VANGOGH)


@pytest.mark.parametrize("max_words", [50, 12, 5])
@pytest.mark.parametrize("concept", [*OWN, *erasable_concepts("style"), *erasable_concepts("object")], ids=str)
def test_every_prompt_says_the_name_in_its_kind_alone(concept, max_words):
    kinds = name_kinds(concept, max_words=max_words)
    assert len(kinds) >= 20 or max_words == 5
    prompts = [prompt for found in kinds.values() for prompt in found]
    assert len(set(prompts)) == len(prompts) and max(len(prompt.split()) for prompt in prompts) <= max_words
    for kind, found in kinds.items():
        for prompt in found:
            assert says(prompt, concept.spellings) == (kind != RESPELT), prompt
            assert "{" not in prompt and "}" not in prompt


@pytest.mark.parametrize("concept", [*erasable_concepts("style"), *erasable_concepts("object"), *OWN], ids=str)
def test_no_wording_is_one_that_is_fitted_trained_on_or_held_out(concept):
    kind = load_template_set(concept.kind)
    templates = {*kind.templates, *kind.held_out_templates, *concept.templates, *concept.held_out_templates}
    templates |= {*natural._STYLE_TEMPLATES, *(text.replace("{a}", "{}") for text in natural._OBJECT_TEMPLATES)}
    known = set()
    for spelling in concept.spellings:
        known |= {fill_phrase(text, spelling).lower() for text in templates if text not in ("{}", "{a}")}
        known |= {fill(text, spelling).lower() for text in templates if text not in ("{}", "{a}")}
    known -= {spelling.lower() for spelling in concept.spellings}  # "the {}" of "the Eiffel Tower" is the name alone
    prompts = [prompt for found in name_kinds(concept).values() for prompt in found]
    assert not {prompt.lower() for prompt in prompts} & known


def test_long_prompts_have_as_many_words_as_fit_and_the_name_at_its_end():
    kinds = name_kinds(VANGOGH, max_words=12)
    for kind, place in (("long, name first", 0), ("long, name last", -1)):
        for prompt in kinds[kind]:
            assert len(prompt.split()) == 12 and prompt.split()[place].strip(",") == "VanGogh"


def test_a_composite_says_another_name_that_is_given_or_one_of_its_kind():
    assert "VanGogh and Sandro Botticelli" in name_kinds(VANGOGH)["composite"]
    goya = make_concept("Sandro Botticelli", "style")
    assert not [text for text in name_kinds(goya)["composite"] if text.count("Botticelli") > 1]
    fox = make_concept("a red fox")
    assert "a red fox and a lawn mower" in name_kinds(fox)["composite"]


def test_a_name_longer_than_the_limit_is_one_line():
    with pytest.raises(ValueError, match="`max_words` is 3, and 'Anna Maria von Schurmann' has more words"):
        name_kinds(make_concept("Anna Maria von Schurmann", "person"), max_words=3)
