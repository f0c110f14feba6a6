"""The concepts, what prompts name them, and the timeline of the paper's scenes."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from ldm.config import scenes
from ldm.config.concepts import (
    concept_status,
    find_by_name,
    get_concept,
    load_concepts,
    match_concept,
    parse_erase_targets,
    parse_indexes,
)
from ldm.config.scenes import load_scene


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


@pytest.mark.parametrize("times", [[{"erase": [0]}, {"erase": [0]}], [{"restore": [1]}]])
def test_a_scene_that_erases_or_restores_twice_is_refused(times, monkeypatch):
    monkeypatch.setattr(scenes.OmegaConf, "load", lambda path: OmegaConf.create({"scenes": {1: times}}))
    with pytest.raises(ValueError, match="scene 1, time"):
        load_scene(1)
    with pytest.raises(ValueError, match=r"no scene 7.*choose from 1"):
        load_scene(7)


def test_the_config_imports_no_torch():
    modules = "ldm.config.concepts, ldm.config.scenes, ldm.config.methods, ldm.config.models"
    command = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
