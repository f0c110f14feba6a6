"""What a tokenizer reads of a prompt, and the digest by which it is known again."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

# Texts whose tokens tell how a tokenizer splits, pads and marks the beginning and end of a prompt.
_PROBES = (
    "",
    "A painting, by  Van Gogh's 2nd pupil (1890) -- x_y!",
    "\u00fcber caf\u00e9 \u4e2d\u6587",
    "<|endoftext|> </s> [SEP]",
)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of what decides the tokens of a prompt: vocabulary, merges, normaliser and length.

    How it splits, pads and marks its ends counts by what it makes of a few texts, since versions of its library write
    that down in different ways.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # that of the library `tokenizers`
    content = json.loads(backend.to_str()) if backend is not None else {}
    merges = content.get("model", {}).get("merges", [])
    length = tokenizer.model_max_length
    parts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "normalizer": content.get("normalizer"),
        "length": length,
        "probes": tokenizer(list(_PROBES), padding="max_length", max_length=length, truncation=True).input_ids,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def last_token(tokenizer: Any, prompt: str, name: str) -> int | None:
    """Return the position of the last token of `name` where a prompt says it last; None where the prompt is cut before.

    It is looked for as whole words first, since "a car and a scarf" says a car earlier. Raises ValueError for a prompt
    that does not say it.
    """
    whole = [found.end() for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", prompt)]
    end = whole[-1] if whole else prompt.rindex(name) + len(name)
    position = len(tokenizer(prompt[:end], verbose=False).input_ids) - 2  # its last token marks the end
    return position if position < tokenizer.model_max_length - 1 else None


def last_piece(tokenizer: Any, name: str) -> str:
    """Return the letters of a name's last token, such as `gh` where a tokenizer splits vangogh into van, go and gh."""
    pieces = tokenizer.tokenize(name)
    return pieces[-1].removeprefix("##").removesuffix("</w>") if pieces else ""


def align_tokens(
    tokenizer: Any, prompts: Sequence[str], anchors: Sequence[str], length: int | None = None
) -> list[list[int]]:
    """Return, for each row of each prompt's embedding, the row of its anchor prompt's that stands for it.

    Their common beginning, their common end and the padding are aligned; of what differs, the last token with the last.
    There are `length` rows, by default as many as the tokenizer reads.
    """
    if not prompts:
        return []
    number = length or int(tokenizer.model_max_length)
    texts = list(dict.fromkeys([*prompts, *anchors]))
    ids = dict(zip(texts, tokenizer(texts, truncation=True, max_length=number).input_ids, strict=True))
    return [_align(ids[prompt], ids[anchor], number) for prompt, anchor in zip(prompts, anchors, strict=True)]


def _align(own: Sequence[int], other: Sequence[int], length: int) -> list[int]:
    """Return what `align_tokens` does of a prompt's tokens and its anchor's, with `length` rows."""
    pairs = enumerate(zip(own, other, strict=False))
    head = next((k for k, (one, two) in pairs if one != two), min(len(own), len(other)))
    shift = len(other) - len(own)
    rows = list(range(head))
    rows += [max(head, k + shift) for k in range(head, len(own))]  # what differs, then the common end
    rows += [max(k, len(other)) for k in range(len(own), length)]  # padding
    return [min(row, length - 1) for row in rows]


def vocabulary_words(tokenizer: Any) -> list[str]:
    """Return the words of a tokenizer's vocabulary that are one token, of three letters or more, in alphabetical order.

    Byte pairs mark the end of a word, as in CLIP; pieces of words mark that they continue one, as in BERT.
    """
    vocabulary = tokenizer.get_vocab()
    marks_ends = any(token.endswith("</w>") for token in vocabulary)
    words = []
    for token in vocabulary:
        word = token.removesuffix("</w>")
        if (not marks_ends or token.endswith("</w>")) and len(word) > 2 and word.isalpha():
            words.append(word)
    return sorted(words)


def read_part(tokenizer: Any, prompt: str) -> str | None:
    """Return the beginning of a prompt that a model with this tokenizer reads; None where it reads all of it.

    What comes after is beyond the tokenizer's length, and is cut off.
    """
    length = tokenizer.model_max_length
    if len(tokenizer(prompt, verbose=False).input_ids) <= length:
        return None
    if not tokenizer.is_fast:  # which alone knows where in the prompt a token was
        return tokenizer.decode(
            tokenizer(prompt, truncation=True, max_length=length).input_ids, skip_special_tokens=True
        )
    kept = tokenizer(prompt, truncation=True, max_length=length, return_offsets_mapping=True)
    return prompt[: max(end for _, end in kept.offset_mapping)]


def read_whole(tokenizer: Any, prompts: Sequence[str]) -> set[str]:
    """Return the prompts of which a model with this tokenizer reads all: `read_part` of many in one pass."""
    if not prompts:
        return set()
    numbers = tokenizer(list(prompts), verbose=False).input_ids
    length = tokenizer.model_max_length
    return {prompt for prompt, ids in zip(prompts, numbers, strict=True) if len(ids) <= length}


def describe_cuts(tokenizers: Sequence[Any], prompts: Sequence[str]) -> list[str]:
    """Return a sentence about how many of the prompts are cut, and one about each; nothing where none is.

    Of several tokenizers the one that cuts first counts.
    """
    parts: dict[str, str] = {}
    whole = set(prompts).intersection(*(read_whole(tokenizer, prompts) for tokenizer in tokenizers))
    for prompt in prompts:
        if prompt in whole:
            continue
        cut = [part for part in (read_part(tokenizer, prompt) for tokenizer in tokenizers) if part is not None]
        if cut:
            parts[prompt] = min(cut, key=len)
    if not parts:
        return []
    length = min(tokenizer.model_max_length for tokenizer in tokenizers)
    same = sum(count for count in Counter(parts.values()).values() if count > 1)
    alike = f"; {same} of them are then the same as another" if same else ""
    lines = [f"{len(parts)} of {len(prompts)} prompts are longer than the model's {length} tokens, and are cut{alike}"]
    for prompt, part in parts.items():
        lines.append(f"the prompt '{_shortened(prompt)}' is cut after {len(part)} characters, '...{part[-30:]}'")
    return lines


def _shortened(prompt: str) -> str:
    """Return the beginning and the end of a prompt, which may be all that tells it from another."""
    return prompt if len(prompt) <= 80 else f"{prompt[:40]} ... {prompt[-40:]}"
