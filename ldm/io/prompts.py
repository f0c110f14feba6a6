"""Prompt lists: CSV files with the columns prompt, evaluation_seed and case_number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.io.errors import MissingFileError
from ldm.io.files import atomic_write


@dataclass(frozen=True)
class PromptCase:
    """One row of a prompt list: the prompt, the seed of its first noise, the number in its images' names."""

    prompt: str
    seed: int
    case_number: int


def read_prompt_csv(path: Path) -> list[PromptCase]:
    """Return a prompt list: a CSV with columns prompt, evaluation_seed, case_number.

    Raises ValueError when the file, a column or a whole number is missing or a case number stands twice.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype={"prompt": str})
    except FileNotFoundError:
        raise MissingFileError(f"no prompt list {path}", "prompts") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file with a header line") from error
    missing = [name for name in ("prompt", "evaluation_seed", "case_number") if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path} lacks the column {', '.join(missing)}: a prompt list has prompt,evaluation_seed,case_number"
        )
    for name in ("evaluation_seed", "case_number"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        bad = table.index[numbers.isna() | (numbers < 0) | (numbers % 1 != 0)]
        if len(bad):
            raise ValueError(f"{path} line {bad[0] + 2}: {name} is '{table[name][bad[0]]}', not a whole number from 0")
    repeated = table["case_number"][table["case_number"].duplicated()]
    if len(repeated):
        raise ValueError(f"{path}: case_number {repeated.iloc[0]} stands twice")
    rows = zip(table["prompt"], table["evaluation_seed"], table["case_number"], strict=True)
    return [PromptCase(str(prompt), int(seed), int(number)) for prompt, seed, number in rows]


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
    """Write a prompt list that `read_prompt_csv` reads."""
    table = pd.DataFrame(
        [(case.prompt, case.seed, case.case_number) for case in cases],
        columns=["prompt", "evaluation_seed", "case_number"],
    )
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False)


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
