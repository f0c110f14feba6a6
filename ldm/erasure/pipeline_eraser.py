"""Erase concepts, by their texts, from a pipeline of diffusers that the user holds: `ConceptEraser(pipe)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from diffusers import DiffusionPipeline

from ldm.config.concepts import Concept
from ldm.config.templates import load_template_set
from ldm.diffusion.pipeline_encoder import PipelineEncoder
from ldm.erasure.effect import LEAST_EFFECT, LEAST_GATED_EFFECT
from ldm.erasure.pipeline_concepts import Details, as_list, check_said, names_all, new_concepts, tidied
from ldm.erasure.retain import notify_of_left_out
from ldm.io.errors import notify

_ATTRIBUTE = "_concept_eraser"  # of a pipeline from which something is erased
# To the anchor, of a concept that is called erased without a notice.
MAX_DISTANCE_LEFT = {"linear": round(1 - LEAST_EFFECT, 2), "gated": round(1 - LEAST_GATED_EFFECT, 2)}

Reports = dict[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Kept:
    """Prompts that stay as they are, and those that only change little, or trip no gate."""

    protected: tuple[str, ...] = ()
    retained: tuple[str, ...] = ()

    def with_more(self, protected: Sequence[str], retained: Sequence[str]) -> Kept:
        """Return these and further ones, once each."""
        return Kept(
            tuple(dict.fromkeys([*self.protected, *protected])), tuple(dict.fromkeys([*self.retained, *retained]))
        )


class PipelineEraser(ABC):
    """A pipeline and the concepts that are erased from it, in one of two forms.

    `form` gated lets them act on the prompts that say the concepts, linear on the weights. When nothing is erased, the
    pipeline is what it was, bit for bit.
    """

    form: ClassVar[str]
    measured: ClassVar[tuple[str, ...]]  # of what `erase` returns, the columns of `report`

    def __init__(self, pipe: DiffusionPipeline):
        self._pipe: Any = pipe
        self._encoder = PipelineEncoder.of(pipe)
        self._concepts: dict[str, Concept] = {}  # by the text that erased them
        self._kept = Kept()
        self._originals = 0  # blocks of `original` that run now

    @staticmethod
    def of(pipe: DiffusionPipeline) -> PipelineEraser | None:
        """Return the eraser that has erased something from a pipeline; None where nothing is erased."""
        return vars(pipe).get(_ATTRIBUTE)

    @property
    def erased(self) -> list[str]:
        """The concepts that are erased now, by the texts that erased them."""
        return list(self._concepts)

    def erase(
        self,
        texts: Sequence[str] | str,
        protect: Sequence[str] | str = (),
        kind: str | Mapping[str, str] | None = None,
        aliases: Mapping[str, Sequence[str]] | None = None,
        anchor: str | Mapping[str, str] | None = None,
        retain: Sequence[str] | str = (),
    ) -> Reports:
        """Erase concepts by text, one or several, and return what was measured of each new one.

        A text that names a concept of `configs` takes its other spellings and its kind; of any other, `kind` says what
        kind of thing it is, for all texts or by text, and `aliases` its other spellings, by text. `anchor` is what
        prompts become: the same with this text instead of the concept's name, for all texts or by text, and by default
        with a neutral word of its kind. One that names what is erased already changes nothing. `protect` are prompts
        that stay as they are, whatever is erased until all is restored, and `retain` those that trip no gate, or in the
        form linear change little: prompts of it that say what is erased are left out.
        Raises ValueError, and erases nothing, for what cannot be erased, and for a text that says another ("Vincent van
        Gogh" says "Van Gogh"): these are one concept, and the one an alias of the other.
        """
        other = PipelineEraser.of(self._pipe)
        if other is not None and other is not self:
            raise ValueError(
                f"another eraser of this pipeline has erased {', '.join(other.erased)}: erase by that one, which "
                "`ConceptEraser` of the pipeline returns, or restore them there"
            )
        new = new_concepts(texts, Details(kind, aliases, anchor), self._concepts)
        kept = self._kept.with_more(as_list(protect, "protect"), as_list(retain, "retain"))
        concepts = {**self._concepts, **new}
        check_said(concepts, kept.protected)
        notify_of_left_out(kept.retained, new.values())
        reports = self._fit(concepts, kept)  # an interrupt in it too: all of the concepts are erased, or none
        self._set(concepts, kept)
        for text in new:
            left, limit = reports[text]["distance_left"], MAX_DISTANCE_LEFT[self.form]
            if left > limit:
                notify(
                    f"'{text}' is not all erased: its prompts have {left:.2f} of the way to those of its anchor left "
                    f"(more than {limit}): name it otherwise, protect fewer prompts, or give another `anchor`"
                )
        return {text: reports[text] for text in new}

    def restore(self, texts: Sequence[str] | str) -> None:
        """Restore concepts by text, or `all`. Raises ValueError, and restores nothing, for one that is not erased.

        An empty list restores nothing.
        """
        listed = as_list(texts, "texts")
        listed = self.erased if names_all(listed, self._find("all")) else listed
        found = {text: self._find(text) for text in (tidied(listed, "texts") if listed else [])}
        for text, label in found.items():
            if label is None:
                raise ValueError(f"'{text}' is not erased: erased are {', '.join(self.erased) or 'none'}")
        self._set({text: concept for text, concept in self._concepts.items() if text not in found.values()}, self._kept)

    @contextmanager
    def original(self) -> Generator[None]:
        """While the block runs, let the pipeline be its unedited self, bit for bit; then it is what it was before."""
        self._originals += 1
        try:
            self._sync()
            yield
        finally:
            self._originals -= 1
            self._sync()

    def report(self) -> pd.DataFrame:
        """Return a row for each erased concept: its kind, its anchor, and what was measured of it."""
        rows: list[dict[str, Any]] = []
        reports = self._fit(self._concepts, self._kept) if self._concepts else {}
        for text, concept in self._concepts.items():
            anchor = concept.anchor or load_template_set(concept.kind).neutral
            rows.append({"concept": text, "kind": concept.kind, "anchor": anchor})
            for name in self.measured:
                value = reports[text][name]
                rows[-1][name] = "{} of {}".format(*value) if isinstance(value, list) else value
        return pd.DataFrame(rows, columns=["concept", "kind", "anchor", *self.measured])

    def _set(self, concepts: dict[str, Concept], kept: Kept) -> None:
        """Let these concepts be erased and no others, or, where that fails, those that were."""
        before = self._concepts, self._kept
        self._concepts, self._kept = concepts, kept if concepts else Kept()
        try:
            self._sync()
        except BaseException:
            self._concepts, self._kept = before
            raise
        if concepts:
            setattr(self._pipe, _ATTRIBUTE, self)
        else:
            vars(self._pipe).pop(_ATTRIBUTE, None)

    def _find(self, text: str) -> str | None:
        """Return the text of the erased concept that a text names; None where there is none."""
        return next((label for label, concept in self._concepts.items() if concept.is_named(text)), None)

    @abstractmethod
    def _fit(self, concepts: Mapping[str, Concept], kept: Kept) -> Reports:
        """Find what erases each of these concepts from the pipeline as it is now, and return what was measured of it.

        Nothing is erased yet. Raises ValueError for what cannot be erased.
        """

    @abstractmethod
    def _sync(self) -> None:
        """Let the pipeline be without the concepts that are erased now: all of `_concepts`, in `original` none."""
