"""A tokenizer as the rows of a prompt's embeddings follow from it, where a pipeline puts a text around each prompt."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class RowTokenizer:
    """The tokens of prompts within a template, one for each row, and one that marks the end of the prompt.

    That is the first token behind the prompt, or, where nothing is behind it, the one that would be padding.
    """

    is_fast = False  # it does not know where in a prompt a token was

    def __init__(self, tokenizer: Any, template: Callable[[str], str], length: int, dropped: slice = slice(0)):
        """`dropped` are the tokens of the template that have no row."""
        self._tokenizer, self._template, self._dropped = tokenizer, template, dropped
        self.model_max_length = length
        ends = [self._whole(text)[::-1] for text in ("a", "b c")]
        pairs = enumerate(zip(*ends, strict=False))
        self._behind = next((k for k, (one, two) in pairs if one != two), 0)  # tokens behind a prompt
        end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._end = ends[0][self._behind - 1] if self._behind else end

    def _whole(self, text: str) -> list[int]:
        return self._tokenizer(self._template(text), verbose=False).input_ids

    def _tokens(self, text: str) -> list[int]:
        """Return the tokens up to the end of the prompt."""
        whole = self._whole(text)
        kept = whole[: len(whole) - self._behind]
        del kept[self._dropped]
        return [*kept, self._end]

    def __call__(
        self,
        text: str | list[str],
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        **_: Any,
    ) -> Any:
        """Return the tokens of a text, or of several, as `input_ids`, by such options of transformers.

        The template counts as special tokens.
        """
        if not add_special_tokens:
            return self._tokenizer(text, add_special_tokens=False, verbose=False)
        texts = [text] if isinstance(text, str) else text
        found = [self._tokens(each) for each in texts]
        if truncation:
            limit = max_length or self.model_max_length
            found = [ids if len(ids) <= limit else [*ids[: limit - 1], self._end] for ids in found]
        return SimpleNamespace(input_ids=found[0] if isinstance(text, str) else found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
