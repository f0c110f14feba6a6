"""Prompt lists: CSV files with the columns prompt, evaluation_seed and case_number."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.io.errors import MissingFileError, notify
from ldm.io.files import atomic_write

COLUMNS = ("prompt", "evaluation_seed", "case_number")
MAX_NUMBER = 2**64 - 1  # the largest seed that torch takes
_NUMBER_RE = re.compile(r"([0-9]{1,30})(?:\.0)?")  # 7, or 7.0 as tables write it that count missing cells as numbers
_NOISE_SEEDS = 2**32  # torch's generator on the CPU makes the same noise of seeds that are equal modulo this
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class PromptCase:
    """One row of a prompt list: the prompt, the seed of its first noise, the number in its images' names.

    Raises ValueError for a seed or a number that is not from 0 to `MAX_NUMBER`.
    """

    prompt: str
    seed: int
    case_number: int

    def __post_init__(self):
        if not isinstance(self.prompt, str):
            raise ValueError(f"the prompt {self.prompt!r} is no text: give one")
        for name, number in (("seed", self.seed), ("case number", self.case_number)):
            if type(number) is not int or not 0 <= number <= MAX_NUMBER:
                raise ValueError(
                    f"the {name} {number} is not a whole number from 0 to {MAX_NUMBER}: choose one of these"
                )


def read_prompt_csv(path: Path) -> list[PromptCase]:
    """Return a prompt list: a CSV in UTF-8 with columns prompt, evaluation_seed, case_number, among any others.

    Nothing is guessed: a row has as many fields as the header, and a number is written in digits. Blank lines are
    skipped. Raises ValueError, with the line, for anything else, and when a case number stands twice.
    """
    lines, rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} is empty and not a CSV file with a header line {','.join(COLUMNS)}")
    header = rows[0]
    _check_header(path, lines[0], header)
    places = [header.index(name) for name in COLUMNS]
    cases: dict[int, PromptCase] = {}
    noises: dict[int, int] = {}
    for line, row in zip(lines[1:], rows[1:], strict=True):
        if len(row) != len(header):
            raise ValueError(
                f"{path} line {line} has {len(row)} fields for {len(header)} columns: put a prompt that has a comma "
                'into double quotes ("a, b"), and no comma at the end of a line'
            )
        prompt, seed_text, number_text = (row[place] for place in places)
        seed = _parse_number(path, line, "evaluation_seed", seed_text)
        number = _parse_number(path, line, "case_number", number_text)
        if number in cases:
            raise ValueError(f"{path} line {line}: case_number {number} stands twice: number the cases 0, 1, 2, ...")
        cases[number] = PromptCase(prompt, seed, number)
        if noises.setdefault(seed % _NOISE_SEEDS, seed) != seed:
            notify(
                f"{path} line {line}: the seed {seed} makes the same noise as {noises[seed % _NOISE_SEEDS]}: seeds "
                f"count modulo {_NOISE_SEEDS}"
            )
    return list(cases.values())


def is_prompt_csv(path: Path) -> bool:
    """Return whether a file is a CSV file with a column of prompts, and so a prompt list or meant as one.

    Raises ValueError for one that is no CSV file.
    """
    rows = read_rows(path)[1] if Path(path).is_file() else []
    return bool(rows) and COLUMNS[0] in rows[0]


def read_rows(path: Path) -> tuple[list[int], list[list[str]]]:
    """Return the rows of a CSV file that are not blank, the header first, and the number of each one's first line."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"no prompt list {path}", "prompts") from None
    if b"\0" in content:
        line = 1 + content[: content.index(b"\0")].count(b"\n")
        raise ValueError(f"{path} line {line} holds a NUL byte and is not a CSV file in UTF-8: save it as CSV UTF-8")
    try:
        text = content.decode("utf-8-sig")  # with the mark that spreadsheets write in front, or without
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        raise ValueError(f"{path} line {line} is not a CSV file in UTF-8: save it as CSV UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[int] = []
    rows: list[list[str]] = []
    line = 1
    try:
        for row in reader:
            if row:
                lines.append(line)
                rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path} line {line} is not CSV ({error}): see to the double quotes from there on") from error
    return lines, rows


def _check_header(path: Path, line: int, header: Sequence[str]) -> None:
    """Raise ValueError when the header lacks a column of a prompt list, or has one twice."""
    expected = f"a prompt list has {','.join(COLUMNS)}"
    missing = [name for name in COLUMNS if name not in header]
    for separator, words in _OTHER_SEPARATORS.items():
        if missing and separator in "".join(header):
            raise ValueError(f"{path} line {line} separates its columns by {words}, not commas: {expected}")
    if missing:
        raise ValueError(f"{path} lacks the column {', '.join(missing)}: {expected}")
    for name in COLUMNS:
        if header.count(name) > 1:
            raise ValueError(f"{path} line {line} has the column {name} twice: {expected}, each once")


def _parse_number(path: Path, line: int, name: str, text: str) -> int:
    found = _NUMBER_RE.fullmatch(text)
    if not found or int(found[1]) > MAX_NUMBER:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ValueError(f"{path} line {line}: {name} is '{shown}', not a whole number from 0 to {MAX_NUMBER}")
    return int(found[1])


def make_cases(prompts: Sequence[str], number: int, seed: int) -> list[PromptCase]:
    """Return `number` cases of each prompt, no evaluation seed twice among them, all chosen from `seed`.

    Raises ValueError for more than 3000 cases in all.
    """
    if len(prompts) * number > 3000:
        raise ValueError(
            f"{len(prompts)} prompts of {number} seeds each: there are 3000 seeds, so that {3000 // len(prompts)} "
            "each is the most"
        )
    seeds = np.random.default_rng(seed).choice(3000, size=(len(prompts), number), replace=False)
    cases: list[PromptCase] = []
    for k, prompt in enumerate(prompts):
        cases += [PromptCase(prompt, int(own), k * number + n) for n, own in enumerate(seeds[k])]
    return cases


def write_prompt_csv(path: Path, cases: Sequence[PromptCase]) -> None:
    """Write a prompt list that `read_prompt_csv` reads.

    Raises ValueError, before anything is written, for a prompt that cannot come back: one with a NUL, with half of a
    surrogate pair, or longer than a CSV field may be.
    """
    for case in cases:
        prompt = case.prompt
        if re.search("[\0\ud800-\udfff]", prompt):
            raise ValueError(
                f"case {case.case_number}: the prompt {prompt!r} holds what no text file can: leave it out"
            )
        if len(prompt) > csv.field_size_limit():
            raise ValueError(f"case {case.case_number}: the prompt is longer than {csv.field_size_limit()} characters")
    # The writer quotes a line feed, which ends its lines, but a carriage return only where all text is quoted.
    has_return = any("\r" in case.prompt for case in cases)
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8", newline="") as opened:
        quoting = csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL
        writer = csv.writer(opened, lineterminator="\n", quoting=quoting)
        writer.writerow(COLUMNS)
        for case in cases:
            writer.writerow([case.prompt, int(case.seed), int(case.case_number)])


def merge_prompt_csv(path: Path, cases: Sequence[PromptCase]) -> list[PromptCase]:
    """Return the cases of the prompt list at `path`, if any, and `cases`, by number. Raises ValueError on conflict."""
    known = {case.case_number: case for case in (read_prompt_csv(path) if path.exists() else ())}
    for case in cases:
        if known.setdefault(case.case_number, case) != case:
            raise ValueError(
                f"{path} has another prompt or seed for case {case.case_number}: choose another `save_path` for "
                "another prompt list, or remove the folder"
            )
    return [known[number] for number in sorted(known)]
