"""The gated form of `ConceptEraser(pipe)`: concepts are erased in the prompts that say them, and nowhere else."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from ldm.config.concepts import Concept, always_protected_prompts
from ldm.config.methods import GateConfig
from ldm.diffusion.batches import encode_in_batches
from ldm.diffusion.family import PROMPT
from ldm.diffusion.pipeline_encoder import NEGATIVES, PROMPTS, SIDES, EncodedPrompts, PipelineEncoder
from ldm.erasure.gate_fitter import InseparableError
from ldm.erasure.gate_fitters import make_gate_fitter
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.erasure.known_states import KnownStates
from ldm.erasure.pipeline_eraser import Kept, PipelineEraser, Reports
from ldm.io.errors import notify
from ldm.io.tensors import tensor_digest

_MAX_STATES = 8  # of the text encoders, ways of reading and kept prompts, for which edits are kept
_MAX_RETURNED = 10_000  # prompts' embeddings that are known again

Edits = dict[Concept, GatedEdit]


class GatedPipelineEraser(PipelineEraser):
    """A pipeline and the concepts that are erased from it, each by a gate and a map. No weight is changed.

    While anything is erased, the pipeline's `encode_prompt` is this one's: prompts, negative ones too, that say an
    erased concept become what they are with their anchor instead; all others keep every bit. Where the weights, tokens
    or LoRAs of its text encoders change, or it reads prompts in another way, as with another `max_sequence_length`, the
    gates are fitted anew at the next call. `config` says how gates are fitted. What is erased is not saved with the
    pipeline, whose `save_pretrained` gives notice of that meanwhile.
    """

    form: ClassVar[str] = "gated"
    measured: ClassVar[tuple[str, ...]] = ("gap", "false_alarms", "misses", "distance_left")

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__(pipe)
        self.config = GateConfig()
        self._methods_before: dict[str, Any] = {}  # those that the user gave this very pipeline
        # by the state of the text encoders and how they read, and by what is kept and the `config`
        self._edits: dict[tuple[Hashable, Hashable], Edits] = {}
        self._known: tuple[Hashable, KnownStates] = None, KnownStates()  # of text encoders in one state
        self._returned: dict[str, None] = {}  # digests of the embeddings of prompts
        self._active: tuple[list[Concept], Kept] = [], Kept()  # and what is kept, in these embeddings

    def _fit(self, concepts: Mapping[str, Concept], kept: Kept) -> Reports:
        if not self._concepts:
            self._encoder = PipelineEncoder.of(self._pipe)  # whose `encode_prompt` may be the user's own by now
        edits = self._fitted(self._encoder, self._encoder.fingerprint(), concepts, kept)
        return {text: edits[concept].report for text, concept in concepts.items()}

    def _sync(self) -> None:
        methods = {"encode_prompt": self._encode_prompt, "save_pretrained": self._save_pretrained}
        active = list(self._concepts.values()), self._kept
        if active != self._active:
            self._returned.clear()
        if self._concepts and not self._active[0]:
            own = {name: vars(self._pipe).get(name) for name in methods}
            self._methods_before = {name: own[name] for name in own if own[name] not in (None, methods[name])}
            for name, method in methods.items():
                setattr(self._pipe, name, method)
        if not self._concepts:
            for name, method in methods.items():
                if vars(self._pipe).get(name) == method:
                    delattr(self._pipe, name)
                    if name in self._methods_before:
                        setattr(self._pipe, name, self._methods_before[name])
        self._active = active

    def _fitted(
        self, encoder: PipelineEncoder, fingerprint: Hashable, concepts: Mapping[str, Concept], kept: Kept
    ) -> Edits:
        """Return the edits of concepts for text encoders with a fingerprint, fitted where they are not yet.

        Raises ValueError where no gate tells a concept from other prompts, or leaves a protected one alone.
        """
        state = (fingerprint, encoder.reading, encoder.clip_skip), (kept, self.config)
        edits = self._edits.get(state, {})
        lacking = [concept for concept in concepts.values() if concept not in edits]
        if lacking:
            self._notify_of_refit(lacking, encoder, kept)
            edits = {**edits, **self._fit_gates(encoder, fingerprint, lacking, list(concepts.values()), kept)}
            _check_protected(encoder, {text: edits[concept] for text, concept in concepts.items()}, kept.protected)
            self._edits[state] = edits
            for oldest in list(self._edits)[:-_MAX_STATES]:
                del self._edits[oldest]
        return {concept: edits[concept] for concept in concepts.values()}

    def _fit_gates(
        self,
        encoder: PipelineEncoder,
        fingerprint: Hashable,
        lacking: Sequence[Concept],
        concepts: Sequence[Concept],
        kept: Kept,
    ) -> Edits:
        """Return the edits of the concepts that are `lacking`, whose gates leave all of the `concepts` but their own.

        They read the hidden states that were chosen when these text encoders were first read, or, where these do not
        tell a concept from other prompts, ones that are chosen anew. Raises ValueError where none do.
        """
        state = fingerprint, encoder.reading, self.config
        if self._known[0] != state:
            self._known = state, KnownStates()
        is_first = self._known[1].is_empty
        try:
            retained = [*kept.protected, *kept.retained]
            fitter = make_gate_fitter(encoder, concepts, retained, self.config, self._known[1])
            return {concept: fitter.fit(concept) for concept in lacking}
        except InseparableError as error:
            self._known = None, KnownStates()
            if not is_first:
                return self._fit_gates(encoder, fingerprint, lacking, concepts, kept)
            reason = str(error).rpartition(": ")[0]  # without the advice to erase it by other means
            advice = "name it more narrowly, protect fewer prompts, or take the `form` linear"
            raise ValueError(f"{reason}: {advice}") from error

    def _notify_of_refit(self, lacking: Sequence[Concept], encoder: PipelineEncoder, kept: Kept) -> None:
        fitted: set[Concept] = set()
        for (_, settings), edits in self._edits.items():
            if settings == (kept, self.config):
                fitted.update(edits)
        names = [concept.name for concept in lacking if concept in fitted]
        if names:
            why = "the text encoders are not as they were (weights, tokens or LoRA)"
            if encoder.clip_skip is not None:
                why = f"`clip_skip` {encoder.clip_skip} needs maps of its own"
            elif encoder.side == NEGATIVES:
                why = "negative prompts are read in another way than prompts, and need gates of their own"
            elif encoder.reading != self._encoder.reading:
                why = f"prompts are read in another way ({encoder.reading_told}), which needs gates of its own"
            notify(f"{why}: fitting anew what erases {', '.join(names)}")

    def _acting(self, given: Mapping[str, Any]) -> dict[str, Edits]:
        """Return what acts on the prompts of a call with these arguments, and on its negative ones, by side.

        `clip_skip` is for prompts alone, and their maps: what gates read is the same with any.
        """
        options = self._encoder.options_of(given)
        encoder = replace(self._encoder, lora_scale=given.get("lora_scale"), options=options)
        fingerprint = encoder.fingerprint()
        edits = self._fitted(encoder, fingerprint, self._concepts, self._kept)
        acting: dict[str, Edits] = dict.fromkeys(SIDES, edits)
        if given.get("clip_skip") is not None:
            skipping = replace(encoder, clip_skip=given["clip_skip"])
            skipped = self._fitted(skipping, fingerprint, self._concepts, self._kept)
            acting[PROMPTS] = {concept: replace(edit, maps=skipped[concept].maps) for concept, edit in edits.items()}
        if not encoder.adapter.reads_negatives_alike:
            acting[NEGATIVES] = {}
            if given["do_classifier_free_guidance"] and any(given["negative_prompt"] or ()):  # the empty one says none
                negative = replace(encoder, side=NEGATIVES)
                acting[NEGATIVES] = self._fitted(negative, fingerprint, self._concepts, self._kept)
        return acting

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """Return what the pipeline's own `encode_prompt` does, with the prompts edited that say erased concepts.

        Raises ValueError for embeddings that this function did not return.
        """
        # nothing is erased where the user's own wrapper of this function keeps it in place
        if self._originals or not self._concepts:
            return self._encoder.encode_prompt(*args, **kwargs)
        given = self._encoder.bind(*args, **kwargs)
        for name in self._encoder.adapter.outputs:
            if name.endswith(PROMPT) and given.get(name) is not None and not self._is_returned(given[name]):
                raise ValueError(
                    f"`{name}` do not tell what prompts they are of, which may say {', '.join(self.erased)}: pass the "
                    "prompts, or embeddings that the pipeline's `encode_prompt` returned since the last change of what "
                    "is erased"
                )
        acting = self._acting(given)
        encoded = self._encoder.run(given, _layers(acting))
        for side, states in encoded.states.items():
            rows, edits = encoded.rows(side), acting[side]
            named = {text: edits[concept] for text, concept in self._concepts.items() if concept in edits}
            edited = GatedPrompts(named, self._encoder.places_in(encoded, side))(rows, states)
            if edited is not rows:
                encoded.set_rows(side, edited)
        self._remember(encoded)
        return tuple(encoded.outputs.values())

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the pipeline as it does itself, and say that what is erased is not saved."""
        if self._concepts and not self._originals:
            notify(
                f"what is erased is not saved with the pipeline ({', '.join(self.erased)}): the `form` gated changes "
                "no weights, so restore them and erase them with the `form` linear to save a pipeline without them"
            )
        own = self._methods_before.get("save_pretrained", partial(type(self._pipe).save_pretrained, self._pipe))
        return own(*args, **kwargs)

    def _is_returned(self, embeds: torch.Tensor) -> bool:
        """Return whether embeddings (N, rows, d), or pooled ones (N, d), are known.

        Those of a long prompt may be put together of several prompts', behind one another.
        """
        length = self._encoder.tokenizers[0].model_max_length
        return all(self._is_known(rows) or all(map(self._is_known, rows.split(length))) for rows in embeds)

    def _is_known(self, embeds: torch.Tensor) -> bool:
        return tensor_digest({"": embeds}) in self._returned

    def _remember(self, encoded: EncodedPrompts) -> None:
        """Note the embedding of each prompt, so that it is known again in any batch, on any device."""
        for name, embeds in encoded.outputs.items():
            for rows in embeds if name.endswith(PROMPT) and embeds is not None else ():
                self._returned[tensor_digest({"": rows})] = None
        for oldest in list(self._returned)[:-_MAX_RETURNED]:
            del self._returned[oldest]


def _layers(acting: Mapping[str, Edits]) -> dict[str, set[int]]:
    """Return the hidden states that the gates of edits read, by text encoder."""
    found: dict[str, set[int]] = {}
    for edits in acting.values():
        for edit in edits.values():
            for name in edit.gates:
                found.setdefault(name, set()).add(edit.layers[name])
    return found


def _check_protected(encoder: PipelineEncoder, edits: Mapping[str, GatedEdit], protected: Sequence[str]) -> None:
    """Raise ValueError where a gate fires on a protected prompt, as one that is a part of the concept's name."""
    gated, prompts = GatedPrompts(edits), [*always_protected_prompts(), *protected]
    for batch, _, states in encode_in_batches(encoder, prompts, gated.layers):
        for prompt, labels in zip(batch, gated.fired(states), strict=True):
            if labels:
                raise ValueError(
                    f"the gate of '{labels[0]}' takes the protected prompt {prompt!r} for it: leave that out of "
                    "`protect`, or name the concept more narrowly"
                )
