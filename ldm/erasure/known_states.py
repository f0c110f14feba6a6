"""What an earlier gate fitter found out about the text encoders, so that the next one need not find it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ldm.diffusion.text_model import States


class KnownStates:
    """The hidden states that gates read, and those of groups of prompts, for text encoders that stay as they are.

    `layers` says which hidden state is read of each text encoder; it is empty until that is chosen.
    """

    def __init__(self) -> None:
        self.layers: Mapping[str, int] = {}
        self._groups: dict[str, tuple[dict[str, int], States]] = {}  # by name: number of each prompt, and their states

    def states(self, group: str, prompts: Sequence[str], encode: Callable[[Sequence[str]], States]) -> States:
        """Return the hidden states of prompts (N, T, d), of which those are encoded that the group does not have yet.

        The group then has these prompts and no others. All have to be of the states that `layers` says.
        """
        numbers, known = self._groups.get(group, ({}, {}))
        added = [prompt for prompt in prompts if prompt not in numbers]
        found = encode(added) if added else {}
        states = dict(found)
        for key, rows in known.items():
            by_prompt = {prompt: rows[number] for prompt, number in numbers.items()}
            by_prompt |= dict(zip(added, found.get(key, ()), strict=True))
            states[key] = torch.stack([by_prompt[prompt] for prompt in prompts])
        self._groups[group] = {prompt: number for number, prompt in enumerate(prompts)}, states
        return states
