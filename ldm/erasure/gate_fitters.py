"""Gates of a model of several text encoders: each encoder's are fitted as if it were the only one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ldm.config.concepts import Concept
from ldm.config.methods import GateConfig
from ldm.diffusion.encoder_view import EncoderView, EncodingModel
from ldm.diffusion.text_encoder import PromptEncoder
from ldm.erasure.gate_fitter import GateFitter, alarms_report, misses_report
from ldm.erasure.gated_edit import GatedEdit
from ldm.erasure.known_states import KnownStates
from ldm.erasure.targets import held_out_prompts

_Told = Sequence[tuple[EncoderView, GateFitter, GatedEdit]]


class JoinedGateFitter:
    """What fits the gates of a model's text encoders, and joins them: a prompt is gated if any of them fires.

    A concept that one of the encoders does not tell from others is told by the rest, and has its maps all the same.
    The arguments are those of `GateFitter`.
    """

    def __init__(
        self,
        model: EncodingModel,
        others: Sequence[Concept],
        retained: Sequence[str],
        config: GateConfig,
        known: KnownStates,
    ):
        self.model, self.views, self.fitters = model, EncoderView.of(model), list[GateFitter]()
        for view in self.views:
            [name] = view.text_encoders
            self.fitters.append(GateFitter(view, others, retained, config, known.part(name)))

    def fit(self, concept: Concept) -> GatedEdit:
        """Return the edit that erases a concept. Raises ValueError where no encoder tells it from others."""
        [found] = self.fit_all([concept])
        if isinstance(found, ValueError):
            raise found
        return found

    def fit_all(self, concepts: Sequence[Concept]) -> Iterator[GatedEdit | ValueError]:
        """Return for each concept, one after the other, the edit that erases it, or why there is none."""
        fitted = zip(*(fitter.fit_all(concepts) for fitter in self.fitters), strict=True)
        for concept, found in zip(concepts, fitted, strict=True):
            told: list[tuple[EncoderView, GateFitter, GatedEdit]] = []
            for view, fitter, each in zip(self.views, self.fitters, found, strict=True):
                if isinstance(each, GatedEdit):
                    told.append((view, fitter, each))
            yield self._join(concept, told) if told else next(each for each in found if isinstance(each, ValueError))

    def _join(self, concept: Concept, told: _Told) -> GatedEdit:
        gates: dict[str, Any] = {}
        layers: dict[str, int] = {}
        maps: dict[str, Any] = {}
        edits = {view: edit for view, _, edit in told}
        for view, fitter in zip(self.views, self.fitters, strict=True):
            edit = edits.get(view)
            if edit is not None:
                gates |= edit.gates
                layers |= edit.layers
            own = edit.maps if edit is not None else fitter.maps(concept)
            maps |= {view.place_names[stream]: found for stream, found in own.items()}
        joined = GatedEdit(gates, layers, maps, told[0][2].report)
        return replace(joined, report={**joined.report, **self._report(concept, told, joined)})

    def _report(self, concept: Concept, told: _Told, joined: GatedEdit) -> dict[str, Any]:
        """Return the false alarms and misses of all gates together, in place of the first encoder's."""
        alarms = torch.stack([edit.margins(fitter.judged_states) for _, fitter, edit in told]).amax(0)
        report = alarms_report(concept, told[0][1].judged, alarms)
        held_out = list(held_out_prompts(concept, told[0][0].tokenizers[0]))
        if held_out:
            numbers = {name: [layer] for name, layer in joined.layers.items()}
            report |= misses_report(joined.margins(self.model.encode_with_states(held_out, numbers)[1]))
        return report


AnyGateFitter = GateFitter | JoinedGateFitter


def make_gate_fitter(
    model: PromptEncoder,
    others: Sequence[Concept],
    retained: Sequence[str],
    config: GateConfig,
    known: KnownStates | None = None,
) -> AnyGateFitter:
    """Return what fits the gates of a model: of several text encoders with tokens of their own each by itself."""
    known = known or KnownStates()
    if isinstance(model, EncodingModel) and model.adapter.joins_gates:
        return JoinedGateFitter(model, others, retained, config, known)
    return GateFitter(model, others, retained, config, known)
