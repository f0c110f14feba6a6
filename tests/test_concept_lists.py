"""Concepts that a user names: by text, in files, and how they are told apart."""

import re
import warnings
from collections import Counter

import pytest

from ldm.config.concept_lists import (
    MAX_CONCEPTS,
    make_concept,
    near_pairs,
    read_concepts,
    read_prompts,
    split_restored,
)
from ldm.config.concepts import CATEGORIES, Concept, get_concept, image_folder, load_concepts
from ldm.config.templates import fill_anchor
from ldm.experiments.prompt_sets import find_names
from ldm.io.errors import Notice
from ldm.io.paths import REPO_ROOT

HEADER = "name,kind,aliases\n"


def test_the_hundred_names_are_concepts_of_known_kinds():
    concepts = read_concepts([str(REPO_ROOT / "data" / "hundred_names.csv")])
    assert len(concepts) == 100 and all(concept.is_own for concept in concepts)
    assert {concept.kind for concept in concepts} == {"style", "person", "brand", "generic"}
    assert set(concepts[1].spellings) == {"Vincent van Gogh", "Van Gogh", "VanGogh"}


@pytest.fixture(scope="module")
def thousand() -> list[Concept]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)  # no two names are spelt nearly alike
        return read_concepts([str(REPO_ROOT / "data" / "thousand_names.csv")])


def test_a_thousand_names_are_concepts_of_four_kinds(thousand):
    kinds = Counter(concept.kind for concept in thousand)
    assert kinds == {"person": 440, "style": 210, "generic": 190, "brand": 160}
    names = {concept.name for concept in thousand}
    assert len(names) == 1000 and {"Apple", "Target", "Shell", "Prince"} <= names  # which are words too
    assert sum(not name.isascii() for name in names) >= 40


def test_no_name_of_the_thousand_stands_in_anothers(thousand):
    """So a prompt that is made of one name says no other one."""
    spellings = [spelling for concept in thousand for spelling in concept.spellings]
    owners = [number for number, concept in enumerate(thousand) for _ in concept.spellings]
    found = find_names(spellings, thousand)
    assert found.nonzero().tolist() == [[row, owner] for row, owner in enumerate(owners)]


def test_people_of_the_thousand_share_surnames_which_are_nobodys_alias(thousand):
    groups: dict[str, list[str]] = {}
    for concept in thousand:
        if concept.kind == "person" and " " in concept.name:
            groups.setdefault(concept.name.split()[-1], []).append(concept.name)
    shared = {surname: names for surname, names in groups.items() if len(names) > 1}
    assert len(shared) >= 50 and {"Barack Obama", "Michelle Obama"} == set(shared["Obama"])
    assert not shared.keys() & {spelling for concept in thousand for spelling in concept.spellings}


def test_restored_concepts_are_named_by_any_spelling_and_the_others_stay_erased():
    concepts = [Concept(0, "Paul Klee", "Paul Klee", ("Klee",)), Concept(1, "Nike", "Nike"), Concept(2, "Lego", "Lego")]
    assert split_restored(concepts, ["klee", "Lego"]) == ([concepts[1]], [concepts[0], concepts[2]])
    assert split_restored(concepts, []) == (concepts, [])
    with pytest.raises(ValueError, match=r"`restored` names 'Legos'.*did you mean Lego"):
        split_restored(concepts, ["Legos"])
    with pytest.raises(ValueError, match="every concept of the list"):
        split_restored(concepts, ["Klee", "Nike", "Lego"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["has the columns (none)"]),
        ("name,kind,alias\nA,brand,\n", ["name,kind,alias:", "the column concept", "aliases, anchor, kind"]),
        (HEADER, ["no concept"]),
        (HEADER + "A,brand\n", ["line 2", "2 fields for 3 columns"]),
        (HEADER + "A,brand,\n\nB,planet,\n", ["line 4", "column kind", "'planet'", "public figure"]),
        (HEADER + ",brand,\n", ["line 2", "names nothing"]),
        (HEADER + "A,brand,B;;C\n", ["line 2", "empty alias"]),
        (HEADER + "A,brand,\nB,brand,a\n", ["line 3", "'a' names both A and B"]),
        (HEADER + "Red Fox,object,\nred  fox,object,\n", ["line 3", "red fox"]),
        (HEADER + 'A,brand,"B\n', ["line 2", "not CSV"]),
        ("concept,anchor\nred fox,a Red Fox\n", ["line 2", "'a Red Fox' says red fox"]),
        ("concept\n" + "".join(f"word {k}\n" for k in range(10_000)), ["10000 concepts", f"at most {MAX_CONCEPTS}"]),
    ],
)
def test_a_list_of_concepts_is_read_strictly(tmp_path, text, words):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_concepts([str(path)])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "\n# nothing\n", "nothing in it"),
        ("a.txt", "red fox\nRed  Fox\n", "line 2"),
        ("a.yaml", "concepts: []\n", "not a list of one or more"),
        ("a.yaml", "- red fox\n- owl\n", "begin it with the line 'concepts:'"),
        ("a.yaml", "concepts: [1984]\n", "write it in quotes"),
        ("a.yaml", "concepts: [{concept: A, alias: [B]}]\n", "has the key 'alias'"),
        ("a.yaml", "concepts: [{aliases: [B]}]\n", "concept 1, concept is None"),
        ("a.yaml", "concepts: [{concept: A, kind: planet}]\n", "'planet'"),
        ("a.yaml", "concepts: [{concept: A, anchor: a}]\n", "the anchor 'a' says A"),
        ("a.yaml", "concepts: [{concept: A, anchor: empty}]\n", "concept 1 has the anchor 'empty', which is a setting"),
    ],
)
def test_text_and_yaml_files_are_read_strictly(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_concepts([str(tmp_path / name)])
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("text", ["castle", "a castle", "Castle", "church", "a red fox"])
def test_a_concept_that_a_text_and_a_file_name_is_there_twice(tmp_path, text):
    (tmp_path / "list.csv").write_text("concept\nred fox\ncastle\nchurch\n")
    with pytest.raises(ValueError, match=r"list.csv line \d: '.*' is there twice: name it once"):
        read_concepts([text, str(tmp_path / "list.csv")])


def test_a_name_that_lists_known_concepts_is_refused_and_one_that_may_list_others_asked_about():
    for text in ("Picasso,VanGogh", "Picasso; a church", "gas pump, cat"):
        with pytest.raises(ValueError, match=r"would be one concept of this name: give '.*' '.*', apart by spaces"):
            read_concepts([text])
    with pytest.warns(Notice, match="'fox;an owl' is one concept of this name: for several give 'fox' 'an owl'"):
        read_concepts(["the fox", "a fox;an owl"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_concepts(["Paris, Texas", "10,000 Maniacs", "AC;"])) == 3


def test_texts_and_files_name_concepts_in_one_list(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff1984\n\na steam train\n")
    (tmp_path / "b.csv").write_text("concept,aliases,anchor,kind\nACME,acme corp;Acme Inc,a firm,brand\n")
    (tmp_path / "c.yaml").write_text(
        "kind: style\nconcepts:\n- Mondrian\n- {concept: Miro, aliases: [Joan Miro], kind: person}\n"
    )
    (tmp_path / "unsafe.txt").write_text("blood\ngore\n")
    files = [str(tmp_path / name) for name in ("a.txt", "b.csv", "c.yaml")]
    concepts = read_concepts(["a red fox", *files, f"unsafe={tmp_path / 'unsafe.txt'}"], kind="person")
    names = {concept.name: concept for concept in concepts}
    assert list(names) == ["red fox", "1984", "steam train", "ACME", "Mondrian", "Miro", "unsafe"]
    assert names["ACME"].aliases == ("acme corp", "Acme Inc") and names["ACME"].anchor == "a firm"
    kinds = [concept.kind for concept in concepts]
    assert kinds == ["person", "person", "person", "brand", "style", "person", "person"]
    assert names["unsafe"].spellings == ("unsafe", "unsafe", "blood", "gore")


def test_a_text_is_a_concept_and_never_an_index():
    (year,) = read_concepts(["1984"])
    assert year.is_own and year.prompt == "1984" and not year.label.isdigit()


def test_what_configs_knows_of_a_name_is_known_of_a_users_concept():
    concept = make_concept("vincent  VAN gogh")
    assert concept.is_own and concept.kind == "style" and "VanGogh" in concept.aliases
    assert concept.anchor_prompt == get_concept("style", 1).anchor_prompt
    assert make_concept("Greg Rutkowski").kind == "generic"
    assert make_concept("Greg Rutkowski", "style").kind == "style"


def test_an_article_is_no_part_of_a_name_and_makes_it_an_object():
    fox = make_concept("a red fox")
    assert (fox.name, fox.kind) == ("red fox", "object")
    assert fox.is_named("a red fox") and fox.is_named("RedFox") and not fox.is_named("a fox")
    assert "a photo of a red fox" in fox.captions
    assert make_concept("A Bigger Splash").name == "A Bigger Splash"
    assert make_concept("a cat").kind == "object"  # which configs knows without a kind


def test_an_anchor_has_one_article_at_most():
    expected = {"a toy {}": "a toy dog", "a photo of {a}": "a photo of a dog", "{} painting": "a dog painting"}
    for template, prompt in expected.items():
        assert fill_anchor(template, "a dog", "an object") == prompt
    assert fill_anchor("a photo of {a}", "owl", "") == "a photo of an owl" and fill_anchor("{}", None, "art") == "art"


def test_labels_are_the_same_for_the_same_concept_alone_and_are_file_names():
    texts = ["Greg Rutkowski", "C", "C++", "AC/DC", "../../etc", "1984", "\u9f8d", "x" * 150, "a-b", "a b", "o'neill"]
    labels = [make_concept(text).label for text in texts]
    assert len(set(labels)) == len(texts)
    assert all(re.fullmatch(r"[a-z0-9-]{1,60}", label) and not label.isdigit() for label in labels)
    assert make_concept("GREG  rutkowski").label == labels[0]


def test_images_of_a_concept_lie_in_a_folder_of_its_name_where_one_can_be():
    names = {
        text: make_concept(text).folder_name for text in ("Greg Rutkowski", "a red fox", "o'neill", "\u9f8d", "1984")
    }
    assert [*names.values()] == ["Greg Rutkowski", "red fox", "o'neill", "\u9f8d", "1984"]
    others = ["../../etc", "AC/DC", ".hidden", "St.", "train", "Eval", "empty", "object", "a:b", "\u9f8d" * 150]
    labels = [make_concept(text).folder_name for text in others]
    assert len(set(labels)) == len(others) and all(re.fullmatch(r"[a-z0-9]+-[0-9a-f]{8}", label) for label in labels)
    assert all(concept.folder_name == concept.name for concept in load_concepts("object"))


def test_images_are_found_by_another_spelling_of_a_users_concept(tmp_path):
    assert image_folder(tmp_path / "none", make_concept("Red Fox")) == tmp_path / "none" / "Red Fox"
    for name in ("VanGogh", "red fox", "train", "notes"):
        (tmp_path / name).mkdir()
    for text, name in {"Red Fox": "red fox", "van gogh": "VanGogh", "a blue dog": "blue dog"}.items():
        assert image_folder(tmp_path, make_concept(text)).name == name
    assert image_folder(tmp_path, make_concept("Train")).name.startswith("train-")
    (tmp_path / "Red Fox").mkdir()
    assert image_folder(tmp_path, make_concept("Red Fox")).name == "Red Fox"


@pytest.mark.parametrize("text", ["", "  ", "!?", "x" * 201, "a\tb\x00"])
def test_a_text_that_names_nothing_is_refused(text):
    with pytest.raises(ValueError, match="concept"):
        make_concept(text)


def test_names_that_may_be_one_are_asked_about():
    assert near_pairs(["Frida Kahlo", "Frida Kalho", "logo 11", "logo 12", "cat", "cats"]) == [
        ("Frida Kahlo", "Frida Kalho")
    ]
    with pytest.warns(Notice, match="'Frida Kahlo' and 'Frida Kalho' are spelt nearly alike"):
        read_concepts(["Frida Kahlo", "Frida Kalho"])
    with pytest.warns(Notice, match="'Picaso' is spelt nearly as Picasso is"):
        read_concepts(["Picaso"])


def test_protected_prompts_come_from_texts_and_files(tmp_path):
    (tmp_path / "a.txt").write_text("a dog\nan oil painting\n")
    (tmp_path / "b.csv").write_text("concept,aliases\nMonet,Claude Monet\n")
    prompts = read_prompts(["a dog", str(tmp_path / "a.txt"), str(tmp_path / "b.csv")])
    assert prompts == ["a dog", "an oil painting", "Monet", "Claude Monet"]
    (tmp_path / "c.csv").write_text("prompt,evaluation_seed,case_number\na dog,1,0\na cat,2,1\na dog,3,2\n")
    assert read_prompts([str(tmp_path / "c.csv")]) == ["a dog", "a cat"]
    (tmp_path / "d.csv").write_text("prompt\na dog\n")
    with pytest.raises(ValueError, match="lacks the column evaluation_seed, case_number"):
        read_prompts([str(tmp_path / "d.csv")])
    with pytest.raises(ValueError, match="empty text"):
        read_prompts([" "])


def test_a_concept_comes_back_from_what_a_file_says_of_it():
    for concept in [make_concept("a red fox", anchor="a dog"), *load_concepts("style")]:
        assert Concept.from_dict(concept.to_dict()) == concept
    good = make_concept("a red fox").to_dict()
    for bad in ({"name": 1}, {"index": -2}, {"index": True}, {"kind": "planet"}, {"aliases": [1]}, {"more": 1}):
        with pytest.raises(ValueError, match="is no concept"):
            Concept.from_dict(good | bad)


def test_no_concept_of_configs_is_called_own():
    assert "own" not in CATEGORIES
