"""TODO io.prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import numpy as np
import pandas as pd
from pathlib import Path
from ldm.io.files import atomic_write
from ldm.io.images import parse_case_number


@dataclass(frozen=True)
class PromptCase:
    """One row of a prompt list: the prompt, the seed of its first noise, the number in its images' names."""

    prompt: str
    seed: int
    number: int


def read_prompt_csv(path: Path) -> list[PromptCase]:
    """A prompt list: a CSV with columns prompt, evaluation_seed, case_number.

    Raises ValueError when the file, a column or a whole number is missing or a case number stands twice.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype={"prompt": str})
    except FileNotFoundError:
        raise ValueError(f"no prompt list {path}: make one with python eval-scripts/make-prompts.py") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file with a header line") from error
    missing = [name for name in ("prompt", "evaluation_seed", "case_number") if name not in table.columns]
    if missing:
        raise ValueError(f"{path} lacks the column {', '.join(missing)}: "
                         "a prompt list has prompt,evaluation_seed,case_number")
    for name in ("evaluation_seed", "case_number"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        bad = table.index[numbers.isna() | (numbers < 0) | (numbers % 1 != 0)]
        if len(bad):
            raise ValueError(f"{path} line {bad[0] + 2}: {name} is '{table[name][bad[0]]}', not a whole number from 0")
    if table.case_number.duplicated().any():
        raise ValueError(f"{path}: case_number {table.case_number[table.case_number.duplicated()].iloc[0]} stands twice")
    return [PromptCase(str(row.prompt), int(row.evaluation_seed), int(row.case_number)) for row in table.itertuples()]


def make_cases(prompts: Sequence[str], number: int, seed: int) -> list[PromptCase]:
    """`number` cases of each prompt, no evaluation seed twice among them, all drawn from `seed`.

    Raises ValueError for more than 3000 cases in all.
    """
    if len(prompts) * number > 3000:
        raise ValueError(f"{len(prompts)} prompts of {number} seeds each: there are 3000 seeds, so that {3000 // len(prompts)} "
                         "each is the most")
    seeds = np.random.default_rng(seed).choice(3000, size=(len(prompts), number), replace=False)
    return [PromptCase(prompt, int(own), k * number + n) for k, prompt in enumerate(prompts) for n, own in enumerate(seeds[k])]


def write_prompt_csv(path: Path, cases: Sequence[PromptCase]) -> None:
    """Write a prompt list that `read_cases` reads."""
    table = pd.DataFrame([(case.prompt, case.seed, case.number) for case in cases],
                         columns=["prompt", "evaluation_seed", "case_number"])
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False)


def merge_prompt_csv(path: Path, cases: Sequence[PromptCase]) -> list[PromptCase]:
    """The cases of the prompt list at `path`, if there is one, and `cases`, by number. Raises ValueError on a conflict."""
    known = {case.number: case for case in (read_prompt_csv(path) if path.exists() else ())}
    for case in cases:
        if known.setdefault(case.number, case) != case:
            raise ValueError(f"{path} has another prompt or seed for case {case.number}: choose another --save_path for "
                             "another prompt list, or remove the folder")
    return [known[number] for number in sorted(known)]
