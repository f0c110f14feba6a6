"""What an earlier gate fitter found out about the text encoders, so that the next one need not find it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

Rows = Mapping[tuple[str, int], list[torch.Tensor]]  # by text encoder and layer: the rows (t, d) of each prompt


class KnownStates:
    """The hidden states that gates read, and their rows of groups of prompts, for encoders that stay as they are.

    `layers` says which hidden state is read of each text encoder; it is empty until that is chosen.
    """

    def __init__(self) -> None:
        self.layers: Mapping[str, int] = {}
        self._groups: dict[str, tuple[dict[str, int], Rows]] = {}  # by name: number of each prompt, and their rows
        self._parts: dict[str, KnownStates] = {}  # where each text encoder has gates by itself

    @property
    def is_empty(self) -> bool:
        """Return whether nothing was found out yet."""
        return not self.layers and not self._parts

    def part(self, name: str) -> KnownStates:
        """Return what was found out about one of several text encoders, by name, as if it were the only one."""
        return self._parts.setdefault(name, KnownStates())

    def rows(self, group: str, prompts: Sequence[str], encode: Callable[[Sequence[str]], Rows]) -> Rows:
        """Return the rows (t, d) of each of the prompts, of which those are encoded that the group does not have yet.

        The group then has these prompts and no others. All have to be of the states that `layers` says.
        """
        numbers, known = self._groups.get(group, ({}, {}))
        added = [prompt for prompt in prompts if prompt not in numbers]
        found = encode(added) if added else {}
        rows = dict(found)
        for key, earlier in known.items():
            by_prompt = {prompt: earlier[number] for prompt, number in numbers.items()}
            by_prompt |= dict(zip(added, found.get(key, ()), strict=True))
            rows[key] = [by_prompt[prompt] for prompt in prompts]
        self._groups[group] = {prompt: number for number, prompt in enumerate(prompts)}, rows
        return rows
