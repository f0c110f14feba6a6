"""Fit gated edits: from concepts, and prompts that do not say them, to a gate and a map for each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import binomtest

from ldm.config.concepts import Concept
from ldm.config.everyday import everyday_captions, kin_names
from ldm.config.methods import GateConfig
from ldm.config.spellings import says
from ldm.diffusion.batches import States, encode_in_batches, join_states
from ldm.diffusion.text_encoder import PromptEncoder
from ldm.diffusion.text_states import LAST_STATE, text_encoder_layers
from ldm.diffusion.tokenizer import align_tokens
from ldm.erasure.embedding_map import EmbeddingMap, fit_map, mean_distance_left
from ldm.erasure.gate import Gate, GateTask, NoGateError, Positives, fit_gates, join_gates, without_needless
from ldm.erasure.gate_prompts import GatePrompts, OwnPrompts, check_rare, evenly, with_plurals
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.erasure.known_states import KnownStates
from ldm.erasure.negatives import Negatives
from ldm.erasure.prompt_rows import PromptRows, kept_positions, row_counts
from ldm.erasure.targets import held_out_prompts
from ldm.io.errors import notify

Rows = Mapping[tuple[str, int], list[torch.Tensor]]  # by text encoder and layer: the rows (t, d) of each prompt

_CONCEPTS_AT_ONCE = 16  # whose gates are fitted in one go
_ANCHORS_KEPT = 4  # lists of anchors whose embeddings are not computed again: by batches, whose rounding is their own
_NUM_TRIED, _MAX_TRIED = 400, 8  # prompts, and at most so many concepts and layers, by which the hidden state is chosen
_WORDS_BELOW = 0.99  # of unseen words, whose distance to a threshold counts when a state is chosen
_MISSPELT = "misspelt names"  # of a concept, as a group
_MAX_TAKEN = 0.01  # of made-up words that a gate may take for its concept
_NUM_JUDGED = 500  # captions of another grammar, on which false alarms are counted
_SMALL_GAP = 0.05  # in units of the distance between a concept and all else
_FALSE_ALARMS_SHOWN, _REASONS_SHOWN = 5, 3
_TITLE = "prompts for gates"  # of a progress bar


class NoGatesError(ValueError):
    """Say of which concepts of several there is no gate, and why: `reasons` by label."""

    def __init__(self, reasons: Mapping[str, str], num_made: int):
        told = list(reasons.values())[:_REASONS_SHOWN]
        left = list(reasons)[_REASONS_SHOWN:]
        more = f"; nor is there a gate for {len(left)} more: {', '.join(left)}" if left else ""
        kept = f". The gates of the other {num_made} are kept: leave these out, or rename them" if num_made else ""
        super().__init__(f"{'; '.join(told)}{more}{kept}")
        self.reasons = reasons


class InseparableError(ValueError):
    """Say that no gate tells a concept's prompts from others, and which."""


@dataclass(frozen=True)
class _Prepared:
    """A concept with the states of its misspelt prompts, its maps, and what its gates are fitted on, by encoder."""

    concept: Concept
    own: OwnPrompts
    misspelt: States
    maps: Mapping[str, EmbeddingMap]
    tasks: Mapping[str, GateTask]


class GateFitter:
    """What the gates of all concepts of a model share: the prompts that trip none of them, and the state they read.

    `others` are concepts that a gate leaves alone unless it is its own, `retained` further prompts. What `known` has of
    an earlier fitter for the same text encoders is not encoded again, and the gates read the states that it chose.
    """

    def __init__(
        self,
        model: PromptEncoder,
        others: Sequence[Concept],
        retained: Sequence[str],
        config: GateConfig,
        known: KnownStates | None = None,
    ):
        known = known or KnownStates()
        self.model, self.config, self.tokenizer = model, config, model.tokenizers[0]
        self.texts = GatePrompts(self.tokenizer, others, retained, config)
        known.layers = self.layers = known.layers or self._choose_layers(others)
        rows = known.rows("negatives", self.texts.negatives, self._encode_rows)
        self.negatives = {name: self._negatives(rows[name, layer]) for name, layer in self.layers.items()}
        words = known.rows("unseen", self.texts.unseen, self._encode_rows)
        self.unseen = {
            name: PromptRows.join(words[name, layer], words[name, layer][0].shape[1])
            for name, layer in self.layers.items()
        }
        self._anchors: dict[
            tuple[str, ...], torch.Tensor
        ] = {}  # embeddings (N, rows, d), which concepts of a kind share
        self.judged = everyday_captions(_NUM_JUDGED)
        whole = known.rows("judged", self.judged, self._encode_whole)
        self.judged_states = {key: torch.stack(found) for key, found in whole.items()}

    def fit(self, concept: Concept) -> GatedEdit:
        """Return the edit that erases a concept.

        Raises ValueError, naming prompts, where no gate tells it from others, for a name that many everyday captions
        say, and for one of which the model's tokenizer keeps nothing.
        """
        [found] = self.fit_all([concept])
        if isinstance(found, ValueError):
            raise found
        return found

    def fit_all(self, concepts: Sequence[Concept]) -> Iterator[GatedEdit | ValueError]:
        """Return for each concept, one after the other, the edit that erases it, or why `fit` gives none.

        Those of a few concepts are fitted together, which is faster and gives the same.
        """
        for start in range(0, len(concepts), _CONCEPTS_AT_ONCE):
            yield from self._fit_some(concepts[start : start + _CONCEPTS_AT_ONCE], self.config.word_lists)

    def maps(self, concept: Concept) -> dict[str, EmbeddingMap]:
        """Return the maps of a concept that no gate of this encoder may tell, for another one's. Raises as `fit`."""
        own = self.texts.own(self.texts.without_shared(with_plurals(concept)), self.config.word_lists)
        return self._fit_maps(own, self._embed(own.all, {})[0])

    def _fit_some(self, concepts: Sequence[Concept], word_lists: int) -> list[GatedEdit | ValueError]:
        prepared: list[_Prepared | ValueError] = []
        for concept in concepts:
            try:
                prepared.append(self._prepare(self.texts.without_shared(with_plurals(concept)), word_lists))
            except ValueError as error:
                prepared.append(error)
        tasks = [each.tasks for each in prepared if isinstance(each, _Prepared)]
        fitted: dict[str, Iterator[list[Gate | NoGateError]]] = {}
        for name, negatives in self.negatives.items():
            fitted[name] = iter(fit_gates([own[name] for own in tasks], negatives, self.config.gate_position))
        edits: list[GatedEdit | ValueError] = []
        for concept, each in zip(concepts, prepared, strict=True):
            if isinstance(each, ValueError):
                edits.append(each)
                continue
            own = {name: next(results) for name, results in fitted.items()}
            try:
                gates = {name: self._join_gates(each, name, found) for name, found in own.items()}
            except InseparableError as error:
                edits.append(self._fit_without_lists(concept) if word_lists else error)
                continue
            edit = GatedEdit(gates, self.layers, each.maps)
            edits.append(replace(edit, report=self._report(each.concept, each.own, edit, each.misspelt)))
        return edits

    def _fit_without_lists(self, concept: Concept) -> GatedEdit | ValueError:
        """Return what `_fit_some` does of a concept that no gate tells among words in no order."""
        [found] = self._fit_some([concept], word_lists=0)
        if isinstance(found, GatedEdit):
            notify(f"no gate tells '{concept.prompt}' among words in no order: such prompts may not be erased")
            return replace(found, report={**found.report, "word_lists": 0})
        return found

    def _prepare(self, concept: Concept, word_lists: int) -> _Prepared:
        """Return what the gates of a concept are fitted on, and its maps. Raises ValueError as `fit` does."""
        check_rare(concept, self.texts.captions)
        own = self.texts.own(concept, word_lists)
        embeds, states = self._embed(own.all, self.layers)
        alike = self._encode_rows(self.texts.lookalikes(concept))
        left_out = self.texts.left_out(concept, own, self.texts.negatives)
        tasks: dict[str, GateTask] = {}
        for name, layer in self.layers.items():
            rows = self._thinned(own.all, {(name, layer): states[name, layer]})[name, layer]
            tasks[name] = self._task(own, rows, left_out, PromptRows.join(alike[name, layer], rows[0].shape[1]))
        misspelt = {key: state[len(own.plain) :].clone() for key, state in states.items()}  # so that the rest is freed
        return _Prepared(concept, own, misspelt, self._fit_maps(own, embeds), tasks)

    def _choose_layers(self, others: Sequence[Concept]) -> dict[str, int]:
        """Return, for each text encoder, the hidden state that gates read, judged by a few of `others` and other names.

        It is the one in which both sides are furthest from the thresholds: the prompts that say a concept above them,
        and nearly all unseen words below. (The number of words that come near them says less: it is four or five of
        800 in several states.)
        """
        names = [Concept(number, name, name) for number, name in enumerate(kin_names())]
        concepts = [*evenly(names, _MAX_TRIED // 2), *evenly(others, _MAX_TRIED // 2)]
        chosen = {}
        for name, encoder in self.model.text_encoders.items():
            number = len(text_encoder_layers(encoder))
            tried = [*range(0, number - 1, -(-number // _MAX_TRIED)), LAST_STATE]
            gates = self._try_layers(name, tried, concepts)
            unseen_states = self._encode(self.texts.unseen, {name: tried})
            distances = dict.fromkeys(tried, 0.0)  # a concept without a gate adds nothing
            for layer, found in gates.items():
                for gate, lowest in found:
                    words = gate.margins(unseen_states[name, layer]).quantile(_WORDS_BELOW).item()
                    distances[layer] += max(lowest - words, 0)
            chosen[name] = max(reversed(tried), key=lambda layer: distances[layer])
        return chosen

    def _try_layers(
        self, name: str, tried: Sequence[int], concepts: Sequence[Concept]
    ) -> dict[int, list[tuple[Gate, float]]]:
        """Return the gates of some concepts that read each of the layers tried, of those that it tells from others.

        With each is how far the lowest of the concept's prompts is above the threshold.
        """
        shown = evenly(self.texts.negatives, _NUM_TRIED)
        shown_rows = self._encode_rows(shown, {name: tried})
        negatives = {layer: self._negatives(shown_rows[name, layer]) for layer in tried}
        gates: dict[int, list[tuple[Gate, float]]] = {layer: [] for layer in tried}
        for concept in concepts:
            try:
                own = self.texts.own(concept, word_lists=0)
            except ValueError:  # longer than the model reads
                continue
            rows = self._encode_rows(own.all, {name: tried})
            alike = self._encode_rows(self.texts.lookalikes(concept), {name: tried})
            left_out = self.texts.left_out(concept, own, shown)
            for layer in tried:
                own_rows = rows[name, layer]
                task = self._task(own, own_rows, left_out, PromptRows.join(alike[name, layer], own_rows[0].shape[1]))
                [found] = fit_gates([task], negatives[layer], self.config.gate_position, turns=False)
                told = [(gate, group) for gate, group in zip(found, task.groups, strict=True) if isinstance(gate, Gate)]
                if told and isinstance(found[0], Gate):
                    least = [gate.row_margins(group.rows).min() for gate, group in told if group.clearance is None]
                    gates[layer].append((join_gates([gate for gate, _ in told]), torch.stack(least).min().item()))
        return gates

    def _negatives(self, rows: Sequence[torch.Tensor]) -> Negatives:
        return Negatives(PromptRows.join(rows, rows[0].shape[1]), self.config.gate_ridge)

    def _task(
        self, own: OwnPrompts, rows: Sequence[torch.Tensor], left_out: torch.Tensor, alike: PromptRows
    ) -> GateTask:
        """Return what the gates of a concept are fitted on: a group for each name, and one for its misspelt names."""
        groups: list[Positives] = []
        for numbers in own.by_name.values():
            said = PromptRows.join([rows[number] for number in numbers], rows[0].shape[1])
            groups.append(Positives(said, own.last_tokens[numbers]))
        if own.misspelt:
            first = len(own.plain)
            wrong = PromptRows.join(rows[first:], rows[0].shape[1])
            groups.append(Positives(wrong, own.last_tokens[first:], self.config.misspelling_clearance))
        return GateTask(groups, left_out, alike)

    def _join_gates(self, prepared: _Prepared, encoder: str, found: Sequence[Gate | NoGateError]) -> Gate:
        """Return the gate of a concept for a text encoder: of the spellings that it tells, and of its misspelt names.

        Raises InseparableError where that is not its first one.
        """
        told: list[tuple[Gate, Positives]] = []
        untold: list[tuple[str, Positives]] = []
        misspelt: list[Gate] = []
        groups = zip(found, prepared.tasks[encoder].groups, [*prepared.own.by_name, _MISSPELT], strict=False)
        for gate, group, name in groups:
            others = gate.negatives if isinstance(gate, NoGateError) else self._words_taken(encoder, gate)
            if isinstance(gate, Gate) and len(others) <= _MAX_TAKEN * len(self.texts.unseen):
                if group.clearance is None:
                    told.append((gate, group))
                else:
                    misspelt.append(gate)
                continue
            taken = self.texts.negatives if isinstance(gate, NoGateError) else self.texts.unseen
            shown = ", ".join(f"'{taken[other]}'" for other in others[:3])
            text = f"no gate tells '{name}' from other prompts, as some say it to the model too ({shown})"
            if not told:
                raise InseparableError(f"{text}: erase it without a gate, or name it more narrowly")
            if group.clearance is None:  # of misspelt names the report counts those that are missed
                untold.append((text, group))
        gates = without_needless([gate for gate, _ in told], [group for _, group in told])
        for text, group in untold:
            if (join_gates(gates).row_margins(group.rows) <= 0).any():  # which the gate of another spelling may tell
                notify(f"{text}: prompts that call {prepared.concept.name} so are not erased")
        return join_gates([*gates, *misspelt])

    def _words_taken(self, encoder: str, gate: Gate) -> list[int]:
        """Return which made-up words, on which no gate is fitted, a gate takes for its concept, the clearest first."""
        margins = gate.row_margins(self.unseen[encoder])
        return [number for number in margins.argsort(descending=True).tolist() if margins[number] > 0]

    def _encode(self, prompts: Sequence[str], layers: Mapping[str, int | Collection[int]]) -> States:
        """Return the hidden states of prompts (N, T, d), by text encoder and layer, on the CPU."""
        return self._embed(prompts, layers)[1]

    def _encode_whole(self, prompts: Sequence[str]) -> Rows:
        """Return all rows of the hidden states of prompts that gates read."""
        return {key: list(states) for key, states in self._encode(prompts, self.layers).items()}

    def _encode_rows(self, prompts: Sequence[str], layers: Mapping[str, int | Collection[int]] | None = None) -> Rows:
        """Return the rows that can matter of prompts' hidden states, by default of those that gates read.

        Those of a few prompts are thinned before the next ones are encoded, so that the whole is never held.
        """
        found: dict[tuple[str, int], list[torch.Tensor]] = {}
        for part, _, states in encode_in_batches(self.model, prompts, _several(layers or self.layers), _TITLE):
            for key, rows in self._thinned(part, states).items():
                found.setdefault(key, []).extend(rows)
        return found

    def _thinned(self, prompts: Sequence[str], states: States) -> Rows:
        """Return the rows of hidden states (N, T, d) that can matter, by prompt, in float32 on the CPU."""
        ids = self._token_ids(prompts)
        thinned: dict[tuple[str, int], list[torch.Tensor]] = {}
        for key, state in states.items():
            kept = [kept_positions(len(tokens), state.shape[1], sum(tokens)) for tokens in ids]
            thinned[key] = [rows[positions].float() for rows, positions in zip(state.cpu(), kept, strict=True)]
        return thinned

    def _token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each prompt that are read, with those that mark its beginning and end."""
        limit = self.tokenizer.model_max_length
        return self.tokenizer(list(prompts), truncation=True, max_length=limit, verbose=False).input_ids

    def _embed(
        self, prompts: Sequence[str], layers: Mapping[str, int | Collection[int]]
    ) -> tuple[torch.Tensor, States]:
        """Return the embeddings of prompts (N, rows, d) and their hidden states, on the CPU."""
        found = list(encode_in_batches(self.model, prompts, _several(layers), _TITLE))
        return torch.cat([embeds.cpu() for _, embeds, _ in found]), join_states([states for _, _, states in found])

    def _fit_maps(self, own: OwnPrompts, embeds: torch.Tensor) -> dict[str, EmbeddingMap]:
        """Return the maps of a concept's prompts, whose embeddings are (N, rows, d), onto their anchors, by stream."""
        aims, config, streams = self._aims(own.all, own.anchors), self.config, self.model.places
        settings = config.map_ridge, config.map_rank, config.map_loss
        maps: dict[str, EmbeddingMap] = {}
        if "tokens" in streams:
            number, columns = streams["tokens"][0].stop, streams["tokens"][1]
            kept = [kept_positions(len(tokens), number, sum(tokens)) for tokens in self._token_ids(own.all)]
            targets, goals = (
                torch.cat([rows[positions, columns] for rows, positions in zip(found, kept, strict=True)])
                for found in (embeds, aims)
            )
            counts = torch.cat(
                [weight * row_counts(rows, number) for weight, rows in zip(own.weights, kept, strict=True)]
            )
            maps["tokens"] = fit_map(targets, goals, *settings, counts, config.max_map_rank).rounded()
        if "pooled" in streams:
            before, after = (found[:, -1, streams["pooled"][1]] for found in (embeds, aims))
            maps["pooled"] = fit_map(before, after, *settings, own.weights, config.max_map_rank).rounded()
        return maps

    def _aims(self, prompts: Iterable[str], anchors: Mapping[str, str]) -> torch.Tensor:
        """Return the embeddings that prompts should get, (N, rows, d): those of their anchors, token by token."""
        texts = tuple(dict.fromkeys(anchors.values()))
        if texts not in self._anchors:  # those of other kinds of concepts, or of names of other lengths
            self._anchors[texts] = self._embed(texts, {})[0]
            for oldest in list(self._anchors)[:-_ANCHORS_KEPT]:
                del self._anchors[oldest]
        embeds = dict(zip(texts, self._anchors[texts], strict=True))
        aims = []
        prompts = list(prompts)
        number = self.model.places["tokens"][0].stop if "tokens" in self.model.places else 0
        aligned = align_tokens(self.tokenizer, prompts, [anchors[prompt] for prompt in prompts], number or None)
        for prompt, alignment in zip(prompts, aligned, strict=True):
            rows = embeds[anchors[prompt]]
            aims.append(rows[[*alignment[:number], *range(number, len(rows))]])  # and the pooled one
        return torch.stack(aims)

    def _report(self, concept: Concept, own: OwnPrompts, edit: GatedEdit, wrong: States) -> dict[str, Any]:
        """Return what is known of an edit: its gap, false alarms, misses, and the least distance to its threshold.

        `distance_left` is how much of the way to the anchor is left of held-out prompts, by `mean_distance_left`.
        """
        held_out = held_out_prompts(concept, self.tokenizer)
        anchors = {prompt: self.texts.anchor(concept, template) for prompt, template in held_out.items()}
        alarms, found = edit.margins(self.judged_states), torch.zeros(0)
        measured = anchors or own.anchors  # a long name is cut in all of the former
        embeds, seen = self._embed(list(measured), edit.layers)
        if anchors:
            found = edit.margins(seen)
        left = mean_distance_left(
            embeds, GatedPrompts({"": edit}, self.model.places)(embeds, seen), self._aims(measured, measured)
        )
        misspelt = edit.margins(wrong)
        gap = min(gate.gap for gate in edit.gates.values())
        if gap < _SMALL_GAP:
            notify(
                f"{concept.name}: other prompts come within {gap:.2g} of those that say it, in units of its distance "
                "from them: try its gate on prompts of your own"
            )
        return {
            "gap": round(gap, 4),
            "least_margin": round(torch.cat([alarms, found]).abs().min().item(), 4),
            **alarms_report(concept, self.judged, alarms),
            **misses_report(found),
            "misspelt_misses": rate(int((misspelt <= 0).sum()), len(misspelt)),
            "distance_left": round(left, 3),
        }


def alarms_report(concept: Concept, captions: Sequence[str], margins: torch.Tensor) -> dict[str, Any]:
    """Return which of some captions trip a concept's gate without saying it, given their `margins` (N,)."""
    others = [number for number, text in enumerate(captions) if not says(text, concept.spellings)]
    named = [captions[number] for number in others if margins[number] > 0]
    return {"false_alarms": rate(len(named), len(others)), "false_alarm_prompts": named[:_FALSE_ALARMS_SHOWN]}


def misses_report(margins: torch.Tensor) -> dict[str, Any]:
    """Return how many prompts that say a concept do not trip its gate, given their `margins` (N,)."""
    return {"misses": rate(int((margins <= 0).sum()), len(margins))}


def _several(layers: Mapping[str, int | Collection[int]]) -> dict[str, Collection[int]]:
    """Return the layers of each text encoder, where it may have one alone."""
    return {name: [found] if isinstance(found, int) else found for name, found in layers.items()}


def rate(count: int, total: int) -> list[float]:
    """Return a count, its total, and Wilson's interval of 95 % of their ratio: [count, total, low, high]."""
    if not total:
        return [0, 0, 0.0, 1.0]
    interval = binomtest(count, total).proportion_ci(method="wilson")
    return [count, total, round(float(interval.low), 5), round(float(interval.high), 5)]
