"""Prompt lists: what comes back, what is refused, and seeds that never repeat."""

import pytest

from ldm.cli.run import explain
from ldm.io.errors import MissingFileError
from ldm.io.prompts import PromptCase, make_cases, merge_prompt_csv, read_prompt_csv, write_prompt_csv


def test_prompt_lists_keep_the_empty_prompt(tmp_path):
    cases = [PromptCase("", 3, 0), PromptCase("Kilian Eng, again", 5, 7)]
    write_prompt_csv(tmp_path / "list.csv", cases)
    assert read_prompt_csv(tmp_path / "list.csv") == cases


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,evaluation_seed\na,1\n", "lacks the column case_number"),
        ("prompt,evaluation_seed,case_number\na,1,../x\n", "line 2: case_number is '../x'"),
        ("prompt,evaluation_seed,case_number\na,1.5,0\n", "evaluation_seed is '1.5'"),
        ("prompt,evaluation_seed,case_number\na,1,0\nb,1,0\n", "case_number 0 stands twice"),
        ("", "not a CSV"),
    ],
)
def test_bad_prompt_lists_say_what_is_wrong(tmp_path, text, words):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        read_prompt_csv(tmp_path / "list.csv")


def test_a_missing_prompt_list_says_what_makes_one(tmp_path):
    with pytest.raises(MissingFileError, match="no prompt list") as missing:
        read_prompt_csv(tmp_path / "none.csv")
    assert missing.value.kind == "prompts" and "make-prompts.py" in explain(missing.value)


def test_made_cases_have_seeds_of_their_own_and_depend_on_the_seed_alone():
    cases = make_cases(["VanGogh", ""], 3, 7)
    assert [case.prompt for case in cases] == ["VanGogh"] * 3 + [""] * 3
    assert [case.case_number for case in cases] == list(range(6)) and len({case.seed for case in cases}) == 6
    assert make_cases(["VanGogh", ""], 3, 7) == cases != make_cases(["VanGogh", ""], 3, 8)
    with pytest.raises(ValueError, match="1500 each is the most"):
        make_cases(["VanGogh", ""], 1501, 7)


def test_a_list_takes_more_cases_but_no_other_prompt_for_one(tmp_path):
    first, second = PromptCase("a", 1, 0), PromptCase("b", 2, 1)
    assert merge_prompt_csv(tmp_path / "list.csv", [second]) == [second]
    write_prompt_csv(tmp_path / "list.csv", [second])
    assert merge_prompt_csv(tmp_path / "list.csv", [second, first]) == [first, second]
    with pytest.raises(ValueError, match="another prompt or seed for case 1: choose another `save_path`"):
        merge_prompt_csv(tmp_path / "list.csv", [PromptCase("b", 3, 1)])
