"""Erase concepts, by their texts, from a pipeline of diffusers that the user holds: `ConceptEraser(pipe)`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline

from ldm.config.concepts import CATEGORIES, Concept, always_protected_prompts, find_by_name
from ldm.config.methods import GateConfig
from ldm.config.spellings import says
from ldm.config.templates import load_template_set
from ldm.diffusion.pipeline_encoder import OUTPUTS, SIDES, EncodedPrompts, PipelineEncoder
from ldm.erasure.gate_fitter import GateFitter, InseparableError
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.io.errors import notify
from ldm.io.tensors import tensor_digest

_PROMPTS_AT_ONCE = 64  # that the text encoders embed in one pass
_MAX_STATES = 8  # of the text encoders, and `clip_skip`s, for which edits are kept
_MAX_RETURNED = 10_000  # prompts' embeddings that are known again

Edits = dict[Concept, GatedEdit]


class PipelineEraser:
    """A pipeline and the concepts that are erased from it, each by a gate and a map. No weight is changed.

    While anything is erased, the pipeline's `encode_prompt` is this one's: prompts, negative ones too, that say an
    erased concept become what they are with a neutral word instead; all others keep every bit. When nothing is erased
    the pipeline is what it was. Where the weights, tokens or LoRAs of its text encoders change, the gates are fitted
    anew at the next call. `config` says how gates are fitted. What is erased is not saved with the pipeline.
    """

    def __init__(self, pipe: DiffusionPipeline):
        self._pipe: Any = pipe
        self._encoder = PipelineEncoder.of(pipe)
        self._attribute_before: Any = None  # an `encode_prompt` that the user gave this very pipeline
        self.config = GateConfig()
        self._concepts: dict[str, Concept] = {}  # by the text that erased them
        self._protected: list[str] = []
        self._edits: dict[Hashable, Edits] = {}  # by the state of the text encoders, and `clip_skip`
        self._returned: dict[str, None] = {}  # digests of the embeddings of prompts

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> Self:
        """Return the eraser of a pipeline: the one that has erased something from it now, or a new one.

        Raises ValueError for a pipeline that does not encode prompts as Stable Diffusion or XL do.
        """
        owner = getattr(vars(pipe).get("encode_prompt"), "__self__", None)
        return owner if isinstance(owner, cls) else cls(pipe)

    @property
    def erased(self) -> list[str]:
        """The concepts that are erased now, by the texts that erased them."""
        return list(self._concepts)

    def erase(
        self,
        texts: Sequence[str] | str,
        protect: Sequence[str] | str = (),
        kind: str = "generic",
        aliases: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, Mapping[str, Any]]:
        """Erase concepts by text, one or several, and return what was measured of each new gate.

        A text that names a concept of `configs` takes its other spellings and its kind; of any other, `kind` says what
        kind of thing it is, and `aliases` its other spellings, by text. One that names what is erased already changes
        nothing. `protect` are prompts that keep every bit, whatever is erased until all is restored.
        Raises ValueError, and erases nothing, for a text that no gate tells from other prompts, and for one that says
        another ("Vincent van Gogh" says "Van Gogh"): these are one concept, and the one an alias of the other.
        """
        new = self._new_concepts(_tidied(texts, "texts"), kind, aliases or {})
        added = [prompt for prompt in _as_list(protect, "protect") if prompt not in self._protected]
        before = self._concepts, self._protected, self._edits
        self._concepts, self._protected = {**self._concepts, **new}, [*self._protected, *added]
        if not before[0]:
            self._encoder = PipelineEncoder.of(self._pipe)  # whose `encode_prompt` may be the user's own by now
        if added:
            self._edits = {}  # by gates that do not know them
        try:
            self._check_said()
            edits = self._fitted(self._encoder, self._encoder.fingerprint())
        except BaseException:  # an interrupt too: all of the concepts are erased, or none
            self._concepts, self._protected, self._edits = before
            raise
        if new or added:
            self._returned.clear()
        if not before[0]:
            self._attribute_before = vars(self._pipe).get("encode_prompt")
            self._pipe.encode_prompt = self._encode_prompt
        return {text: edits[concept].report for text, concept in new.items()}

    def restore(self, texts: Sequence[str] | str) -> None:
        """Restore concepts by text. Raises ValueError, and restores nothing, for one that is not erased."""
        found = {text: self._find(text) for text in _tidied(texts, "texts")}
        for text, label in found.items():
            if label is None:
                raise ValueError(f"'{text}' is not erased: erased are {', '.join(self.erased) or 'none'}")
        self._concepts = {text: concept for text, concept in self._concepts.items() if text not in found.values()}
        self._returned.clear()
        if not self._concepts:
            self._protected, self._edits = [], {}
        if not self._concepts and vars(self._pipe).get("encode_prompt") == self._encode_prompt:
            del self._pipe.encode_prompt
            if self._attribute_before is not None:
                self._pipe.encode_prompt = self._attribute_before

    def _find(self, text: str) -> str | None:
        """Return the text of the erased concept that a text names; None where there is none."""
        return next((label for label, concept in self._concepts.items() if concept.is_named(text)), None)

    def _new_concepts(
        self, texts: Sequence[str], kind: str, aliases: Mapping[str, Sequence[str]]
    ) -> dict[str, Concept]:
        """Return the concepts that texts name and that are not erased yet, by text.

        Raises ValueError for a kind that there is not, and for aliases that are not apart from other concepts.
        """
        load_template_set(kind)
        spellings = {_tidied(text, "aliases")[0]: _tidied(others, "aliases") for text, others in aliases.items()}
        for text in spellings:
            if text not in texts:
                raise ValueError(f"`aliases` are given for '{text}', which is none of the texts: add it to them")
        new: dict[str, Concept] = {}
        for text in texts:
            known = {**self._concepts, **new}
            named = next((concept for concept in known.values() if concept.is_named(text)), None)
            concept = named or _make_concept(text, kind)
            others = [alias for alias in spellings.get(text, ()) if not concept.is_named(alias)]
            if named is not None and others:
                raise ValueError(f"'{text}' is erased already: restore it before you erase it with other `aliases`")
            if named is None:
                new[text] = replace(concept, aliases=(*concept.aliases, *others))
                _check_apart(new[text], known)
        return new

    def _check_said(self) -> None:
        """Raise ValueError where a protected prompt says a concept that is erased."""
        for prompt in [*always_protected_prompts(), *self._protected]:
            for text, concept in self._concepts.items():
                if says(prompt, concept.spellings):
                    raise ValueError(
                        f"the protected prompt {prompt!r} says '{text}': protect prompts that do not say what is erased"
                    )

    def _fitted(self, encoder: PipelineEncoder, fingerprint: Hashable) -> Edits:
        """Return the edits of all erased concepts for text encoders with a fingerprint, fitted where they are not yet.

        Raises ValueError where no gate tells a concept from other prompts, or leaves a protected one alone.
        """
        state = fingerprint, encoder.clip_skip
        edits = self._edits.get(state, {})
        lacking = [concept for concept in self._concepts.values() if concept not in edits]
        if lacking:
            self._notify_of_refit(lacking, encoder.clip_skip)
            fitter = GateFitter(encoder, list(self._concepts.values()), self._protected, self.config)
            edits = {**edits, **{concept: _fit(fitter, concept) for concept in lacking}}
            self._check_protected(encoder, {text: edits[concept] for text, concept in self._concepts.items()})
            self._edits[state] = edits
            for oldest in list(self._edits)[:-_MAX_STATES]:
                del self._edits[oldest]
        return {concept: edits[concept] for concept in self._concepts.values()}

    def _notify_of_refit(self, lacking: Sequence[Concept], clip_skip: int | None) -> None:
        fitted: set[Concept] = set()
        for edits in self._edits.values():
            fitted.update(edits)
        names = [concept.name for concept in lacking if concept in fitted]
        if names:
            why = "the text encoders are not as they were (weights, tokens or LoRA)"
            if clip_skip is not None:
                why = f"`clip_skip` {clip_skip} needs maps of its own"
            notify(f"{why}: fitting anew what erases {', '.join(names)}")

    def _check_protected(self, encoder: PipelineEncoder, edits: Mapping[str, GatedEdit]) -> None:
        """Raise ValueError where a gate fires on a protected prompt, as one that is a part of the concept's name."""
        gated, prompts = GatedPrompts(edits), [*always_protected_prompts(), *self._protected]
        for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
            batch = prompts[start : start + _PROMPTS_AT_ONCE]
            states = encoder.encode_with_states(batch, gated.layers)[1]
            for prompt, labels in zip(batch, gated.fired(states), strict=True):
                if labels:
                    raise ValueError(
                        f"the gate of '{labels[0]}' takes the protected prompt {prompt!r} for it: leave that out of "
                        "`protect`, or name the concept more narrowly"
                    )

    def _gated(self, given: Mapping[str, Any]) -> dict[str, GatedPrompts]:
        """Return what acts on the prompts of a call with these arguments, and on its negative ones, by side.

        `clip_skip` is for prompts alone, and their maps: what gates read is the same with any.
        """
        encoder = replace(self._encoder, lora_scale=given.get("lora_scale"))
        fingerprint = encoder.fingerprint()
        edits = self._fitted(encoder, fingerprint)
        gated: dict[str, GatedPrompts] = dict.fromkeys(SIDES, self._together(edits))
        if given.get("clip_skip") is not None:
            skipped = self._fitted(replace(encoder, clip_skip=given["clip_skip"]), fingerprint)
            own = {concept: replace(edit, maps=skipped[concept].maps) for concept, edit in edits.items()}
            gated[""] = self._together(own)
        return gated

    def _together(self, edits: Edits) -> GatedPrompts:
        return GatedPrompts({text: edits[concept] for text, concept in self._concepts.items()})

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """Return what the pipeline's own `encode_prompt` does, with the prompts edited that say erased concepts.

        Raises ValueError for embeddings that this function did not return.
        """
        if not self._concepts:  # where the user's own wrapper of this function keeps it in place
            return self._encoder.encode_prompt(*args, **kwargs)
        given = self._encoder.bind(*args, **kwargs)
        for name in OUTPUTS:
            if given.get(name) is not None and not self._is_returned(given[name]):
                raise ValueError(
                    f"`{name}` do not tell what prompts they are of, which may say {', '.join(self.erased)}: pass the "
                    "prompts, or embeddings that the pipeline's `encode_prompt` returned since the last change of what "
                    "is erased"
                )
        gated = self._gated(given)
        encoded = self._encoder.run(given, gated[""].layers)
        for side, states in encoded.states.items():
            rows = encoded.rows(side)
            edited = gated[side](rows, states)
            if edited is not rows:
                encoded.set_rows(side, edited)
        self._remember(encoded)
        return tuple(encoded.outputs.values())

    def _is_returned(self, embeds: torch.Tensor) -> bool:
        return all(tensor_digest({"": rows}) in self._returned for rows in embeds)

    def _remember(self, encoded: EncodedPrompts) -> None:
        """Note the embedding of each prompt, so that it is known again in any batch, on any device."""
        for embeds in encoded.outputs.values():
            for rows in embeds if embeds is not None else ():
                self._returned[tensor_digest({"": rows})] = None
        for oldest in list(self._returned)[:-_MAX_RETURNED]:
            del self._returned[oldest]


def _as_list(texts: Sequence[str] | str, setting: str) -> list[str]:
    """Return texts, one or several, as a list. Raises ValueError where they are none."""
    found = [texts] if isinstance(texts, str) else list(texts)
    for text in found:
        if type(text) is not str:
            raise ValueError(f"`{setting}` has {text!r}, which is no text: give texts, such as 'Vincent van Gogh'")
    return found


def _tidied(texts: Sequence[str] | str, setting: str) -> list[str]:
    """Return texts without superfluous white space. Raises ValueError where there is none, or an empty one."""
    found = [" ".join(text.split()) for text in _as_list(texts, setting)]
    if not all(found) or not found:
        raise ValueError(f"`{setting}` has an empty text, or none at all: name a concept, such as 'Vincent van Gogh'")
    return found


def _make_concept(text: str, kind: str) -> Concept:
    """Return the concept that a text names, called as the text does: one of `configs`, or a new one of this kind."""
    for category in CATEGORIES:
        known = find_by_name(category, text)
        if known is not None and not known.is_watermark:
            others = [spelling for spelling in dict.fromkeys(known.spellings) if spelling.lower() != text.lower()]
            return replace(known, name=text, prompt=text, aliases=tuple(others))
    return Concept(0, text, text, kind=kind)


def _check_apart(concept: Concept, known: Mapping[str, Concept]) -> None:
    """Raise ValueError for a concept that says another one, or is said by it: no gate tells them apart for long."""
    for text, other in known.items():
        pairs = [(concept.name, spelling, other) for spelling in concept.spellings]
        pairs += [(text, spelling, concept) for spelling in other.spellings]
        for own, spelling, said in pairs:
            if says(spelling, said.spellings):
                shown = f"'{own}'" if spelling == own else f"'{spelling}', a spelling of '{own}',"
                raise ValueError(
                    f"{shown} says '{said.name}' too: erase them as one concept, with one of them among the other's "
                    "`aliases`"
                )


def _fit(fitter: GateFitter, concept: Concept) -> GatedEdit:
    try:
        return fitter.fit(concept)
    except InseparableError as error:
        reason = str(error).rpartition(": ")[0]  # without the advice to erase it by other means
        raise ValueError(f"{reason}: name it more narrowly, or protect fewer prompts") from error
