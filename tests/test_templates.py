"""Template sets: what every set has, and what is said of a file that is wrong."""

import pytest

from ldm.config import templates
from ldm.config.concepts import erasable_concepts
from ldm.config.templates import (
    KINDS,
    fill,
    fill_anchor,
    fill_phrase,
    load_template_set,
    with_article,
    without_article,
)
from ldm.config.yaml_files import read_mapping
from ldm.io.paths import REPO_ROOT

GOOD = """style:
  neutral: an artist
  templates: ["{}", "a painting by {}"]
  composed_templates: ["{caption} by {}"]
  held_out_templates: ["a landscape by {}"]
"""


@pytest.fixture
def write_templates(monkeypatch, tmp_path):
    """Write the templates of a repository of its own, which are read in place of this one's."""
    monkeypatch.setattr(templates, "REPO_ROOT", tmp_path)
    (tmp_path / "configs").mkdir()
    load_template_set.cache_clear()
    yield (tmp_path / "configs" / "templates.yaml").write_text
    load_template_set.cache_clear()


def test_the_file_has_every_kind():
    assert tuple(read_mapping(REPO_ROOT / "configs" / "templates.yaml")) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_set_can_be_fitted_on_and_judged_by(kind):
    found = load_template_set(kind)
    assert found.kind == kind and found.neutral == found.neutral.strip() != ""
    assert "{}" in found.templates  # the name alone
    assert len(found.templates) >= 10 and len(found.composed_templates) >= 4 and len(found.held_out_templates) >= 5
    for group in (found.templates, found.composed_templates, found.held_out_templates):
        assert len(set(group)) == len(group)
        for template in group:
            assert (template.count("{}") == 1) != (template.count("{a}") == 1)
    assert not set(found.held_out_templates) & {*found.templates, *found.composed_templates}


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_prompts_are_no_fitted_ones_with_an_article_either(kind):
    found = load_template_set(kind)
    for name in ("zebra", found.neutral):
        fitted = {fill(template, name) for template in found.templates}
        assert not fitted & {fill(template, name) for template in found.held_out_templates}


def test_concepts_hold_out_no_template_that_their_kind_fits_on():
    for category in ("style", "object", "nudity", "logo"):
        for concept in erasable_concepts(category):
            found = load_template_set(concept.kind)
            fitted = {fill(template, concept.prompt) for template in found.templates}
            assert not fitted & set(concept.held_out_prompts), (category, concept.name)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("zebra", "a zebra"), ("Apple logo", "an Apple logo"), ("owl", "an owl"), ("1984", "a 1984")],
)
def test_articles(noun, expected):
    assert with_article(noun) == expected


def test_a_template_is_filled_once():
    assert fill("a photo of {a}", "owl") == "a photo of an owl"
    assert fill("{}'s painting", "Van Gogh") == "Van Gogh's painting"


def test_a_good_file_is_read(write_templates):
    write_templates(GOOD)
    found = load_template_set("style")
    assert found.neutral == "an artist" and found.templates == ("{}", "a painting by {}")
    with pytest.raises(ValueError, match=r"'person' is no kind of concept in .*templates\.yaml: choose from style"):
        load_template_set("person")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("style:", "styles:", "has the key 'styles': the keys are style, object"),
        ("templates: [", "template: [", "has the key 'template': the keys are neutral, templates"),
        ("neutral: an artist", "neutral: ' '", "neutral is ' ': give a word or two"),
        ("neutral: an artist", "neutral: 5", "neutral is 5: give a word or two"),
        ("  neutral: an artist\n", "", "neutral is None"),
        ("  held_out_templates", "  #", "held_out_templates is no list of texts"),
        ('["{}", "a painting by {}"]', "[]", "style, templates is no list of texts"),
        ('["{}", "a painting by {}"]', "[1]", "style, templates is no list of texts"),
        ('["{}", "a painting by {}"]', "'{}'", "style, templates is no list of texts"),
        ("a painting by {}", "a painting", "'a painting' should have {} or {a} once"),
        ("a painting by {}", "", "'' should have {} or {a} once"),
        ("a painting by {}", "{} by {}", "'{} by {}' should have {} or {a} once"),
        ("a painting by {}", "{a} by {}", "'{a} by {}' should have {} or {a} once"),
        ("a painting by {}", "{} {0}", "and no other braces"),
        ("a painting by {}", "{} }", "and no other braces"),
        ("a painting by {}", "{caption} by {}", "and no other braces"),
        ("{caption} by {}", "a dog by {}", "'a dog by {}' should have .* and {caption} once"),
        ("{caption} by {}", "{caption} and {caption} by {}", "and {caption} once"),
    ],
)
def test_wrong_files_are_named_with_what_to_write(write_templates, old, new, message):
    assert old in GOOD
    write_templates(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        load_template_set("style")
    assert "templates.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "style", "style: [", "style: {neutral: ${oc.env:HOME}}", "style: 3"])
def test_files_that_are_no_sets_are_one_line(write_templates, text):
    write_templates(text)
    with pytest.raises(ValueError, match=r"templates\.yaml"):
        load_template_set("style")


def test_a_file_that_is_not_there_is_one_line(write_templates):
    with pytest.raises(ValueError, match=r"cannot read .*templates\.yaml"):
        load_template_set("style")


@pytest.mark.parametrize(
    ("template", "phrase", "expected"),
    [
        ("a photo of {}", "a cat", "a photo of a cat"),
        ("{a} and a chair", "a cat", "a cat and a chair"),
        ("{a}", "the moon", "the moon"),
        ("the {} in the middle", "an old cat", "the old cat in the middle"),
        ("a small {} in the park", "A cat", "a small cat in the park"),
        ("a {} store", "an apple", "an apple store"),
        ("a {} store", "The Gap", "a Gap store"),
        ("look at this {}", "a cat", "look at this cat"),
        ("a dog in the rain, {}", "a cat", "a dog in the rain, a cat"),
        ("two dogs on the beach by {}", "a cat", "two dogs on the beach by a cat"),
        ("a {} store", "cat", "a cat store"),
        ("{}", "the", "the"),
    ],
)
def test_a_phrase_keeps_its_article_where_the_template_has_none(template, phrase, expected):
    assert fill_phrase(template, phrase) == expected
    assert fill_anchor(template, phrase, "an artist") == expected
    assert fill_anchor(template, None, "word") == fill(template, "word")


def test_articles_are_put_and_left_out_once():
    assert [with_article(noun) for noun in ("cat", "a cat", "old cat", "The cat")] == [
        "a cat",
        "a cat",
        "an old cat",
        "The cat",
    ]
    assert [without_article(noun) for noun in ("a cat", "An old cat", "another cat", "the a", "a")] == [
        "cat",
        "old cat",
        "another cat",
        "a",
        "a",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_without_an_article_is_said_as_ever(kind):
    group = load_template_set(kind)
    for template in (*group.templates, *group.composed_templates, *group.held_out_templates):
        assert fill_phrase(template, "Anna") == fill(template, "Anna")
