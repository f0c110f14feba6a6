"""The concepts, what prompts name them, and the timeline of the paper's scenes."""

import json
import subprocess
import sys

import pytest
from conftest import is_error

from ldm.config import concepts, scenes
from ldm.config.concepts import (
    UnknownConceptError,
    _load_config,
    concept_status,
    find_by_name,
    get_concept,
    load_concepts,
    match_concept,
    parse_erase_targets,
    parse_indexes,
)
from ldm.config.scenes import load_scene

GOOD = (
    "watermarks: [mark]\ncategories:\n  style:\n    templates: ['{} painting']\n    concepts: [{name: A}, {name: B}]\n"
)

OTHERS = "  object: &other {concepts: [{name: a}]}\n  similar: *other\n  nudity: *other\n  logo: *other\n"


@pytest.fixture
def write_config(monkeypatch, tmp_path):
    """Write a file of configs/ in a repository of its own, which is read in place of this one."""

    def write(name, text):
        for module in (concepts, scenes):
            monkeypatch.setattr(module, "REPO_ROOT", tmp_path)
        (tmp_path / "configs").mkdir(exist_ok=True)
        for other, content in (("concepts.yaml", GOOD + OTHERS), ("logos.yaml", "{}")):
            if not (tmp_path / "configs" / other).exists():
                (tmp_path / "configs" / other).write_text(content)
        (tmp_path / "configs" / name).write_text(text)
        _load_config.cache_clear()
        load_concepts.cache_clear()

    yield write
    _load_config.cache_clear()
    load_concepts.cache_clear()


def test_styles_have_the_papers_order_and_watermarks_after_them():
    names = [concept.name for concept in load_concepts("style")]
    assert names == [
        "Cezanne",
        "VanGogh",
        "Picasso",
        "Jackson Pollock",
        "Caravaggio",
        "KeithHaring",
        "Kelly McKernan",
        "Tyler Edlin",
        "Kilian Eng",
        "watermark SRS-ME",
        "CCS 2024",
    ]
    assert [concept.index for concept in load_concepts("style")] == list(range(11))


def test_aliases_and_prompts_name_their_concept():
    assert find_by_name("style", "van gogh").index == 1
    assert match_concept("style", "a landscape by Keith Haring").name == "KeithHaring"
    assert match_concept("similar", "Cezanne's painting").index == 1
    assert match_concept("style", "CCS 2024").is_watermark
    assert match_concept("style", "a photo of a church") is None


def test_indexes_are_parsed_once_each_and_bad_ones_list_the_names():
    assert parse_indexes("2, 0,2", "style") == [2, 0] and parse_indexes("", "style") == []
    assert parse_indexes("7-9,0,8-10", "style") == [7, 8, 9, 0, 10]
    assert parse_indexes("0-99", "logo") == list(range(100))
    with pytest.raises(ValueError, match="write 2-3"):
        parse_indexes("3-2", "style")
    with pytest.raises(ValueError, match="no style concept has index 99999999999"):
        parse_indexes("0-99999999999", "style")
    with pytest.raises(ValueError, match="1 VanGogh"):
        parse_indexes("11", "style")
    with pytest.raises(ValueError, match="church"):
        parse_indexes("one", "object")
    with pytest.raises(ValueError, match="style"):
        get_concept("artist", 0)


def test_names_are_indexes_too_and_what_is_none_is_told_the_nearest():
    assert parse_indexes("VanGogh,Picasso", "style") == parse_indexes(["van  gogh", "Picasso"], "style") == [1, 2]
    assert parse_indexes("Keith Haring, 0-1,VanGogh", "style") == [*parse_indexes("KeithHaring", "style"), 0, 1]
    assert [concept.index for concept in parse_erase_targets(["church", "0"], "object")] == [1, 0]
    with pytest.raises(UnknownConceptError, match=r"'Picaso' is not .* category style, did you mean Picasso\?"):
        parse_indexes("1,Picaso", "style")
    with pytest.raises(ValueError, match="is a watermark"):
        parse_erase_targets("CCS 2024", "style")


def test_watermarks_are_never_erased_and_nothing_is_no_request():
    assert [concept.name for concept in parse_erase_targets("1", "style")] == ["VanGogh"]
    with pytest.raises(ValueError, match=r"9 watermark SRS-ME is a watermark.*0 to 8"):
        parse_erase_targets("9", "style")
    with pytest.raises(ValueError, match=r"no concept to erase.*1 VanGogh"):
        parse_erase_targets("", "style")


def test_captions_hold_the_concept_and_the_anchor_does_not():
    style, thing, plain = get_concept("style", 1), get_concept("object", 1), get_concept("similar", 3)
    assert (style.captions[0], style.anchor_prompt) == ("VanGogh painting", "painting")
    assert (thing.captions[0], thing.anchor_prompt) == ("a photo of church", "a photo")
    assert (plain.captions, plain.anchor_prompt) == (["cat"], "")


def test_a_concepts_prompts_are_its_name_and_first_captions_once_each():
    style, plain = get_concept("style", 1), get_concept("similar", 3)
    assert style.prompts(0) == ["VanGogh"]
    assert style.prompts(2) == ["VanGogh", "VanGogh painting", "a painting by VanGogh"]
    assert style.held_out_prompts == ["a landscape by VanGogh"]
    assert plain.prompts(3) == ["cat"] and plain.held_out_prompts == []


def test_a_prompts_status():
    assert concept_status("style", "a landscape by VanGogh", [1], [2]) == "erased"
    assert concept_status("style", "Picasso", [1], [2]) == "restored"
    assert concept_status("style", "Cezanne", [1], protected=[0]) == "protected"
    assert concept_status("style", "Cezanne", [1]) == "regular"
    assert concept_status("style", "", [1]) == concept_status("style", "CCS 2024", [1]) == "protected"


def test_the_papers_scenes():
    assert [step.erased for step in load_scene(1)] == [(0, 1, 2, 3, 4, 5), (2, 3, 4, 5), (3, 4, 5)]
    assert [step.erased for step in load_scene(2)] == [(0, 1, 2, 3, 4, 5), (0, 1, 2, 5), (0, 1, 2)]
    timeline = [(step.newly_erased, step.restored) for step in load_scene(3)]
    assert timeline == [((0, 2, 4), ()), ((1, 3), (0, 2)), ((5,), (0, 1, 2))]
    last = load_scene(4)[-1]
    assert last.newly_erased == () and last.erased == (3, 4, 5) and last.restored == (0, 1, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scenes: {1: [{erase: [0.0]}]}", "time 0, erase: 0.0 is no concept's index"),
        ("scenes: {1: [{erase: [true]}]}", "True is no concept's index"),
        ("scenes: {1: [{erase: ['0']}]}", "'0' is no concept's index"),
        ("scenes: {1: [{erase: [2]}]}", "2 is no concept's index: give whole numbers from 0 to 1"),
        ("scenes: {1: [{erase: [-1]}]}", "-1 is no"),
        ("scenes: {1: [{erase: 0}]}", "erase is 0, not a list"),
        ("scenes: {1: [{erase: null}]}", "erase is None, not a list"),
        ("scenes: {1: [{erases: [0]}]}", "has the key 'erases': the keys are erase, restore"),
        ("scenes: {1: [[0]]}", "not a mapping"),
        ("scenes: {1: []}", "not a list of one time or more"),
        ("scenes: {'1': [{erase: [0]}]}", "a mapping from whole numbers"),
        ("scenes: {1: [{erase: [0]}], 1: [{erase: [1]}]}", "line 1 has the key 1 again"),
        ("scenes: [", "cannot read"),
    ],
)
def test_a_scene_of_no_indexes_is_refused(text, words, write_config):
    write_config("scenes.yaml", text)
    with pytest.raises(ValueError, match=r"scenes\.yaml") as refused:
        load_scene(1)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_scenes_indexes_are_those_of_its_category(write_config):
    assert load_scene(5, "style") == load_scene(5)
    with pytest.raises(ValueError, match=r"5 is no concept's index: give whole numbers from 0 to 4"):
        load_scene(1, "similar")


NOT_TEXTS = ["1984", "on", "NO", "null", "~", "", "1e3", "1.5", "true", "0x10", "017", ".inf", "[a]", "{a: b}"]


@pytest.mark.parametrize("written", NOT_TEXTS)
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{name: A}", "{{name: {} }}", "concept 0, name"),
        ("{name: A}", "{{name: A, prompt: {} }}", "concept 0 A, prompt"),
        ("{name: A}", "{{name: A, aliases: [x, {} ]}}", "concept 0 A, aliases, entry 2"),
        ("['{} painting']", "['{{}} painting', {} ]", "style, templates, entry 2"),
        ("[mark]", "[mark, {} ]", "watermarks, entry 2"),
    ],
)
def test_a_name_that_yaml_takes_for_something_else_is_to_be_quoted(written, old, new, words, write_config):
    if not written and "[" in new:
        pytest.skip("nothing before a bracket is no entry")
    write_config("concepts.yaml", GOOD.replace(old, new.format(written)))
    with pytest.raises(ValueError, match=r"concepts\.yaml.*write it in quotes") as refused:
        load_concepts("style")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_quoted_name_is_that_text(write_config):
    for name in ("1984", "on", "null", "1e3", "2024-01-01", "12:30", "{x}", "?"):
        write_config("concepts.yaml", GOOD.replace("{name: A}", f"{{name: '{name}'}}"))
        concept = load_concepts("style")[0]
        assert (concept.name, concept.captions) == (name, [f"{name} painting"]) and concept.is_named(name)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("'{} painting'", "'a painting'", "'a painting' should have {} once"),
        ("'{} painting'", "'{0} painting'", "'{0} painting' should have {} once"),
        ("'{} painting'", "'{x}'", "'{x}' should"),
        ("'{} painting'", "'{} and {}'", "should have {} once"),
        ("'{} painting'", "'{!r}'", "should have {} once"),
        ("'{} painting'", "'{:>9}'", "should have {} once"),
        ("'{} painting'", "'{'", "should have {} once"),
        ("['{} painting']", "'{} painting'", "templates is '{} painting', not a list"),
        ("{name: A}", "{name: A, aliases: Van Gogh}", "concept 0 A, aliases is 'Van Gogh', not a list"),
        ("{name: A}", "{name: A, alias: [x]}", "the key 'alias': the keys are name, prompt, aliases"),
        ("{name: A}", "{name: b}", "'B' is there twice"),
        ("{name: A}", "{name: A, aliases: [B]}", "'B' names both A and B"),
        ("{name: A}", "{name: mark}", "'mark' is there twice"),
        ("{name: A}", "{name: ' A'}", "remove the white space"),
        ("{name: A}", '{name: "A\\0"}', "not printable"),
        ("{name: A}", "{name: ''}", "name is empty"),
        ("{name: A}", "{}", "name is None"),
        ("{name: A}", "A", "concept 0 is 'A', not a mapping"),
        ("{name: A}", "{name: A, name: C}", "has the key name again"),
        ("[{name: A}, {name: B}]", "[]", "not a list of one or more"),
        ("{name: A}", "{name: '${oc.env:HOME}'}", "${oc.env:HOME} asks for a value from elsewhere"),
        ("[mark]", "[mark, mark]", "the watermark 'mark' stands twice"),
        ("  style:", "  styles:", "has the key 'styles'"),
        ("templates", "template", "has the key 'template'"),
    ],
)
def test_a_concept_file_is_read_exactly_or_refused(old, new, words, write_config):
    write_config("concepts.yaml", GOOD.replace(old, new))
    with pytest.raises(ValueError, match=r"concepts\.yaml") as refused:
        load_concepts("style")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_refused_concept_file_is_one_line_of_a_script(script, write_config):
    write_config("concepts.yaml", GOOD.replace("{name: A}", "{name: 1984}"))
    is_error(script("eval-scripts/make-prompts.py"), "concepts.yaml", "concept 0, name is 1984 to YAML", "quotes")


def test_a_category_stands_in_one_file(write_config):
    write_config("logos.yaml", "categories: {style: {concepts: [{name: C}]}}")
    with pytest.raises(ValueError, match=r"logos\.yaml: the category style is in another file"):
        load_concepts("style")


@pytest.mark.parametrize("times", [[{"erase": [0]}, {"erase": [0]}], [{"restore": [1]}]])
def test_a_scene_that_erases_or_restores_twice_is_refused(times, write_config):
    write_config("scenes.yaml", f"scenes: {{1: {json.dumps(times)}}}")
    with pytest.raises(ValueError, match="scene 1, time"):
        load_scene(1)
    with pytest.raises(ValueError, match=r"no scene 7.*choose from 1"):
        load_scene(7)


def test_the_config_imports_no_torch():
    modules = "ldm.config.concepts, ldm.config.scenes, ldm.config.methods, ldm.config.models"
    command = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
