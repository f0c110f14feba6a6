import pytest

from ldm.concepts import concept_in, find_concept, get_concept, load_concepts, parse_erased, parse_indexes


def test_styles_have_the_papers_order_and_watermarks_after_them():
    names = [concept.name for concept in load_concepts("style")]
    assert names == ["Cezanne", "VanGogh", "Picasso", "Jackson Pollock", "Caravaggio", "KeithHaring", "Kelly McKernan",
                     "Tyler Edlin", "Kilian Eng", "watermark SRS-ME", "CCS 2024"]
    assert [concept.index for concept in load_concepts("style")] == list(range(11))


def test_other_spellings_and_prompts_name_their_concept():
    assert find_concept("style", "van gogh").index == 1
    assert concept_in("style", "a landscape by Keith Haring").name == "KeithHaring"
    assert concept_in("similar", "Cezanne's painting").index == 1
    assert concept_in("style", "CCS 2024").watermark
    assert concept_in("style", "a photo of a church") is None


def test_indexes_are_parsed_once_each_and_bad_ones_list_the_names():
    assert parse_indexes("2, 0,2", "style") == [2, 0] and parse_indexes("", "style") == []
    with pytest.raises(ValueError, match="1 VanGogh"):
        parse_indexes("11", "style")
    with pytest.raises(ValueError, match="church"):
        parse_indexes("one", "object")
    with pytest.raises(ValueError, match="style"):
        get_concept("artist", 0)


def test_watermarks_are_never_erased_and_nothing_is_no_request():
    assert [concept.name for concept in parse_erased("1", "style")] == ["VanGogh"]
    with pytest.raises(ValueError, match="9 watermark SRS-ME is a watermark.*0 to 8"):
        parse_erased("9", "style")
    with pytest.raises(ValueError, match="no concept to erase.*1 VanGogh"):
        parse_erased("", "style")
