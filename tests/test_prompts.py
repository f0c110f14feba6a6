"""Prompt lists: what comes back, what is refused, and seeds that never repeat."""

import pytest
import torch
from conftest import is_error

from ldm.cli.run import explain
from ldm.config.concept_lists import make_concept
from ldm.config.concepts import watermark_prompts
from ldm.io.errors import MissingFileError, Notice
from ldm.io.prompts import MAX_NUMBER, PromptCase, make_cases, merge_prompt_csv, read_prompt_csv, write_prompt_csv


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
        ("prompt,evaluation_seed,case_number\na,1,0\nb,1,0\n", "line 3: case_number 0 stands twice"),
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


HEADER = "prompt,evaluation_seed,case_number\n"


def read(tmp_path, text, encoding="utf-8"):
    (tmp_path / "list.csv").write_bytes(text.encode(encoding))
    return read_prompt_csv(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEADER + "a church, painted by VanGogh,7,0\n", "line 2 has 4 fields for 3 columns"),
        ("case_number,evaluation_seed,prompt\n0,7,VanGogh,\n1,8,Picasso,\n", "line 2 has 4 fields for 3 columns"),
        ("case_number,evaluation_seed,prompt\n0,7,1984,\n", "line 2 has 4 fields for 3 columns"),
        (HEADER + "a,1,0\nb,2\n", "line 3 has 2 fields for 3 columns"),
        (HEADER + "a,1,0\n   \n", "line 3 has 1 fields"),
        (HEADER + '"a\nb\r\nc",1,0\n\nb,x,1\n', "line 6: evaluation_seed is 'x'"),
        (HEADER + 'a,1,0\n"b,2,1\nc,3,2\n', "line 3 is not CSV"),
        (HEADER + 'a,1,0\n"b"c,2,1\n', "line 3 is not CSV"),
        (HEADER + "a,1,0\n" + "b" * 200_000 + ",2,1\n", "line 3 is not CSV"),
        (HEADER + "a,1,0\nb\0,2,1\n", "line 3 holds a NUL byte"),
        (HEADER.replace(",", ";") + "a;1;0\n", "line 1 separates its columns by semicolons, not commas"),
        (HEADER.replace(",", "\t") + "a\t1\t0\n", "separates its columns by tabs"),
        ("sep=;\nprompt;evaluation_seed;case_number\na;1;0\n", "line 1 separates its columns by semicolons"),
        ("prompt,prompt,evaluation_seed,case_number\na,b,1,0\n", "line 1 has the column prompt twice"),
        ("prompt,evaluation_seed,case_number,case_number\na,1,0,1\n", "has the column case_number twice"),
        ("Prompt, evaluation_seed,case_number\na,1,0\n", "lacks the column prompt, evaluation_seed"),
        ("VanGogh,1,0\n", "lacks the column prompt"),
        ("\n\n", "is empty and not a CSV file"),
    ],
)
def test_a_list_that_needs_a_guess_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError, match=r"list\.csv") as refused:
        read(tmp_path, text)
    assert words in str(refused.value) and len(str(refused.value)) < 400 and "\n" not in str(refused.value)


NO_NUMBERS = [
    "",
    " 7",
    "7 ",
    "+7",
    "-1",
    "1e3",
    "1_000",
    "7.5",
    "7.00",
    "0x7",
    "\u00b2",
    "\u0663",
    "\uff17",
    "nan",
    "inf",
]


@pytest.mark.parametrize("text", [*NO_NUMBERS, str(2**64), "9" * 5000])
def test_a_number_is_written_in_digits(tmp_path, text):
    for place, name in enumerate(("evaluation_seed", "case_number"), 1):
        row = ["a", "1", "0"]
        row[place] = text
        with pytest.raises(ValueError, match=rf"list\.csv line 2: {name} is '.*to {2**64 - 1}$") as refused:
            read(tmp_path, HEADER + ",".join(row) + "\n")
        assert len(str(refused.value)) < 300


def test_numbers_come_back_exactly(tmp_path):
    rows = "a,12345678901234567,0\nb,18446744073709551615,1\nc,7.0,2.0\nd,007,3\n"
    cases = read(tmp_path, HEADER + rows)
    assert [case.seed for case in cases] == [12345678901234567, MAX_NUMBER, 7, 7]
    assert [case.case_number for case in cases] == [0, 1, 2, 3]
    write_prompt_csv(tmp_path / "again.csv", cases)
    assert read_prompt_csv(tmp_path / "again.csv") == cases


@pytest.mark.parametrize("number", [-1, 2**64])
def test_a_case_has_a_seed_that_torch_takes(number):
    for numbers in ((number, 0), (0, number)):
        with pytest.raises(ValueError, match=f"{number} is not a whole number from 0 to {2**64 - 1}"):
            PromptCase("a", *numbers)


def test_what_spreadsheets_and_other_systems_write_is_read(tmp_path):
    expected = [
        PromptCase("été, VanGogh", 1, 0),
        PromptCase("1984", 2, 1),
        PromptCase("NA", 3, 2),
        PromptCase("", 4, 3),
    ]
    lines = [
        "case_number,evaluation_seed,prompt,note,note",
        '0,1,"été, VanGogh",x,"y\nz"',
        "1,2,1984,,",
        "",
        "2,3,NA,,",
        "3,4,,,",
    ]
    for ending in ("\n", "\r\n", "\r"):
        for mark in ("", "\ufeff"):
            assert read(tmp_path, mark + ending.join(lines)) == expected
    for encoding in ("latin-1", "utf-16", "utf-16-le"):
        with pytest.raises(ValueError, match=r"list\.csv line \d .*CSV UTF-8"):
            read(tmp_path, "\n".join(lines), encoding)


@pytest.mark.parametrize(
    "prompt",
    ["a\rb", "a\r\nb", "\n", "\r", '"', 'a"b', " a ", ",", ";", "\ufeff", "\x1c\x85\u2028", "1e3", "NaN", "#", "'"],
)
def test_a_prompt_comes_back_as_it_was_written(tmp_path, prompt):
    cases = [PromptCase(prompt, 1, 0), PromptCase("next", 2, 1)]
    write_prompt_csv(tmp_path / "list.csv", cases)
    assert read_prompt_csv(tmp_path / "list.csv") == merge_prompt_csv(tmp_path / "list.csv", cases) == cases


@pytest.mark.parametrize("prompt", ["a\0", "\ud800", "a" * 200_000])
def test_a_prompt_that_cannot_come_back_is_refused_before_anything_is_written(tmp_path, prompt):
    with pytest.raises(ValueError, match="case 5: the prompt"):
        write_prompt_csv(tmp_path / "new" / "list.csv", [PromptCase("a", 1, 0), PromptCase(prompt, 1, 5)])
    assert not (tmp_path / "new").exists()


def test_seeds_of_the_same_noise_are_told(tmp_path):
    first, second = (torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32))
    assert torch.equal(first, second)
    with pytest.warns(Notice, match=rf"list\.csv line 3: the seed {5 + 2**32} makes the same noise as 5"):
        read(tmp_path, HEADER + f"a,5,0\na,{5 + 2**32},1\n")


def test_prompts_say_a_users_concepts_by_their_kinds(script, tmp_path):
    path, make = tmp_path / "list.csv", "eval-scripts/make-prompts.py"
    (tmp_path / "mine.csv").write_text("concept,kind\nGreg Rutkowski,artist\n")
    flags = ["--concepts", "a red fox", tmp_path / "mine.csv", "--protect", "a dog", "--save_path", path]
    assert script(make, *flags, "--protected")[0] == 0
    prompts = list(dict.fromkeys(case.prompt for case in read_prompt_csv(path)))
    fox, artist = make_concept("a red fox"), make_concept("Greg Rutkowski", "style")
    assert prompts == [*fox.prompts(99), *artist.prompts(99), "a dog", *watermark_prompts(), ""]
    assert len(read_prompt_csv(path)) == 4 * len(prompts)
    assert script(make, *flags, "--held_out", "--seeds_per_prompt", "1")[0] == 0
    prompts = [case.prompt for case in read_prompt_csv(path)]
    assert prompts == [*fox.held_out_prompts, *artist.held_out_prompts, "a dog"] and len(prompts) > 2
    is_error(script(make, "--protect", "a dog"), "--protect and --kind go with --concepts")
    is_error(script(make, *flags, "--protect", "two of a red fox"), "says red fox", "--protect")
    is_error(script(make, *flags, "--category", "object"), "--category and --concepts")
    is_error(script(make, *flags, "--everyday", "captions"), "--everyday")
