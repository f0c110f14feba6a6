"""Fit gated edits: from concepts, and prompts that do not say them, to a gate and a map for each."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from scipy.stats import binomtest
from tqdm import tqdm

from ldm.config.concepts import Concept, always_protected_prompts
from ldm.config.everyday import everyday_captions, kin_names, plural, retain_captions
from ldm.config.methods import GateConfig
from ldm.config.spellings import compounds, lookalikes, misspellings, partial_names, says
from ldm.config.templates import fill, fill_anchor, fill_phrase, load_template_set, without_article
from ldm.diffusion.text_encoder import PromptEncoder
from ldm.diffusion.text_model import States
from ldm.diffusion.text_states import LAST_STATE, text_encoder_layers
from ldm.diffusion.tokenizer import align_tokens, last_piece, last_token, read_part, vocabulary_words
from ldm.erasure.embedding_map import EmbeddingMap, fit_map
from ldm.erasure.gate import Gate, Negatives, NoGateError, Positives, fit_gate, join_gates
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.erasure.known_states import KnownStates
from ldm.erasure.targets import held_out_prompts
from ldm.io.errors import notify

Item = TypeVar("Item")

_PROMPTS_AT_ONCE = 64  # that the text encoders embed in one pass
_NUM_TRIED, _MAX_TRIED = 400, 8  # prompts, and at most so many concepts and layers, by which the hidden state is chosen
_NUM_UNSEEN = 800  # made-up words among which false alarms of the states are counted
_NEAR_BEST = 0.75  # of the largest gap that a state has to reach
_NUM_JUDGED = 500  # captions of another grammar, on which false alarms are counted
_OTHER_TEMPLATES = 8  # by which prompts say the concepts that are not erased
_NUM_LOOKALIKES = 60  # made-up words for each spelling
_SMALL_GAP = 0.05  # in units of the distance between a concept and all else
_MAX_SAYING = 0.2  # the largest fraction of captions that may say a concept
_FALSE_ALARMS_SHOWN = 5
_QUIET_SECONDS = 1.5  # before a progress bar shows
_SURNAMES = ("Miller", "Jones", "Silva", "Petrov", "Larsen", "Kim", "Rossi", "Novak")  # of people who are no concept


class InseparableError(ValueError):
    """Say that no gate tells a concept's prompts from others, and which."""


@dataclass(frozen=True)
class _OwnPrompts:
    """The prompts that say a concept as (prompt, name), the misspelt ones apart, and the anchor prompt of each."""

    plain: list[tuple[str, str]]
    misspelt: list[tuple[str, str]]
    anchors: dict[str, str]
    last_tokens: torch.Tensor  # (N,), where each prompt's name ends, in the order of `all`

    @property
    def all(self) -> list[str]:
        return [prompt for prompt, _ in (*self.plain, *self.misspelt)]


@dataclass(frozen=True)
class _Trial:
    """What a concept's gate is fitted against: prompts that do not say it, their rows, and those of lookalikes."""

    prompts: Sequence[str]
    left_out: torch.Tensor  # (N,), which of the prompts say it after all
    negatives: Negatives
    lookalikes: torch.Tensor
    is_quiet: bool = False


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
        self.captions = retain_captions(config.retain_captions)
        words = vocabulary_words(self.tokenizer)
        self.common = set(words)
        self.words = _evenly(words, config.retain_words)
        made = compounds(words, config.retain_words + _NUM_UNSEEN)
        unseen, self.rare_words = made[:_NUM_UNSEEN], made[_NUM_UNSEEN:]
        prompts = [*always_protected_prompts(), *retained, *self.captions, *self.words, *self.rare_words]
        for concept in others:
            prompts += _other_prompts(concept, self.common)
        self.prompts = list(dict.fromkeys(prompts))
        known.layers = self.layers = known.layers or self._choose_layers(others, unseen)
        states = known.states("negatives", self.prompts, self._encode_chosen)
        self.negatives = {name: Negatives(states[name, layer]) for name, layer in self.layers.items()}
        self.judged = everyday_captions(_NUM_JUDGED)
        self.judged_states = known.states("judged", self.judged, self._encode_chosen)

    def fit(self, concept: Concept) -> GatedEdit:
        """Return the edit that erases a concept.

        Raises ValueError, naming prompts, where no gate tells it from others, for a name that many everyday captions
        say, and for one of which the model's tokenizer keeps nothing.
        """
        concept = _with_plurals(concept)
        _check_rare(concept, self.captions)
        own = self._own_prompts(concept)
        embeds, states = self._embed(own.all, self.layers)
        alike = self._encode(self._lookalike_prompts(concept), self.layers)
        left_out, gates = self._left_out(concept, own, self.prompts), {}
        for name, layer in self.layers.items():
            trial = _Trial(self.prompts, left_out, self.negatives[name], alike[name, layer])
            gates[name] = self._fit_gate(concept, own, states[name, layer], trial)
        edit = GatedEdit(gates, self.layers, self._fit_maps(own, embeds))
        return replace(edit, report=self._report(concept, own, edit, states))

    def _own_prompts(self, concept: Concept) -> _OwnPrompts:
        """Return the prompts that say a concept, as far as the model reads all of them."""
        tokenizer, kind = self.tokenizer, load_template_set(concept.kind)
        rng = random.Random(f"compositions {concept.name}")
        templates = [*kind.templates, *concept.templates]
        spellings = _spellings(tokenizer, concept)
        said = [(template, spelling) for spelling in spellings for template in templates]
        for number in range(self.config.compositions):
            template = rng.choice(kind.composed_templates).replace("{caption}", rng.choice(self.captions))
            said.append((template, spellings[number % len(spellings)]))
        wrong = [text for spelling in spellings for text in misspellings(spelling)]
        wrong = [text for text in dict.fromkeys(wrong) if not says(text, concept.spellings)]
        rng.shuffle(wrong)
        wrong = wrong[: self.config.misspellings]
        misspelt = [(templates[number % len(templates)], text) for number, text in enumerate(wrong)]
        anchors: dict[str, str] = {}
        groups: list[dict[str, str]] = [{}, {}]
        for group, pairs in zip(groups, (said, misspelt), strict=True):
            for template, name in pairs:
                prompt = fill_phrase(template, name)
                if prompt not in anchors and read_part(tokenizer, prompt) is None:
                    group[prompt] = name
                    anchors[prompt] = self._anchor_prompt(concept, template)
        if not groups[0]:
            raise ValueError(
                f"'{concept.prompt}' is longer than the model's {tokenizer.model_max_length} tokens: give the "
                "concept a shorter name"
            )
        plain, wrongly = list(groups[0].items()), list(groups[1].items())
        positions = [last_token(tokenizer, prompt, without_article(name)) or 0 for prompt, name in (*plain, *wrongly)]
        return _OwnPrompts(plain, wrongly, anchors, torch.tensor(positions))

    def _anchor_prompt(self, concept: Concept, template: str) -> str:
        """Return what the prompt becomes that says a concept in a template."""
        if concept.anchor is None and self.config.gate_anchor == "empty":
            return ""
        return fill_anchor(template, concept.anchor, load_template_set(concept.kind).neutral)

    def _lookalike_prompts(self, concept: Concept) -> list[str]:
        """Return prompts that say nearly a concept: made-up words spelled much alike, and parts of its names."""
        templates, made = load_template_set(concept.kind).templates, []
        for spelling in dict.fromkeys(spelling.lower() for spelling in concept.spellings):
            tail = last_piece(self.tokenizer, spelling)
            made += lookalikes(spelling, self.words, _NUM_LOOKALIKES, tail)
        alike = [fill_phrase(templates[number % len(templates)], word) for number, word in enumerate(made)]
        return [text for text in (*alike, *_partial_prompts(concept, self.common)) if not says(text, concept.spellings)]

    def _choose_layers(self, others: Sequence[Concept], unseen: Sequence[str]) -> dict[str, int]:
        """Return, for each text encoder, the hidden state that gates read, judged by a few of `others` and other names.

        Of the states with nearly the largest gap it is the one with the fewest false alarms among `unseen` words.
        """
        shown = _evenly(self.prompts, _NUM_TRIED)
        names = [Concept(number, name, name) for number, name in enumerate(kin_names())]
        concepts = [*_evenly(names, _MAX_TRIED // 2), *_evenly(others, _MAX_TRIED // 2)]
        chosen = {}
        for name, encoder in self.model.text_encoders.items():
            number = len(text_encoder_layers(encoder))
            tried = [*range(0, number - 1, -(-number // _MAX_TRIED)), LAST_STATE]
            shown_states = self._encode(shown, {name: tried})
            negatives = {layer: Negatives(shown_states[name, layer]) for layer in tried}
            gates: dict[int, list[Gate]] = {layer: [] for layer in tried}
            for concept in concepts:
                try:
                    own = self._own_prompts(concept)
                except ValueError:  # longer than the model reads
                    continue
                states = self._encode(own.all, {name: tried})
                alike = self._encode(self._lookalike_prompts(concept), {name: tried})
                left_out = self._left_out(concept, own, shown)
                for layer in tried:
                    trial = _Trial(shown, left_out, negatives[layer], alike[name, layer], is_quiet=True)
                    with suppress(ValueError):
                        gates[layer].append(self._fit_gate(concept, own, states[name, layer], trial))
            unseen_states = self._encode(unseen, {name: tried})
            gaps = {layer: sum(gate.gap for gate in found) for layer, found in gates.items()}
            alarms = {}
            for layer, found in gates.items():
                alarms[layer] = sum(int((gate.margins(unseen_states[name, layer]) > 0).sum()) for gate in found)
            least = _NEAR_BEST * max(gaps.values())
            near = [layer for layer in tried if gaps[layer] >= max(least, 0)] or [LAST_STATE]
            chosen[name] = min(near, key=lambda layer: (alarms[layer], -gaps[layer]))
        return chosen

    def _encode(self, prompts: Sequence[str], layers: Mapping[str, int | Collection[int]]) -> States:
        """Return the hidden states of prompts (N, T, d), by text encoder and layer, on the CPU."""
        return self._embed(prompts, layers)[1]

    def _encode_chosen(self, prompts: Sequence[str]) -> States:
        """Return the hidden states of prompts that gates read."""
        return self._encode(prompts, self.layers)

    def _embed(
        self, prompts: Sequence[str], layers: Mapping[str, int | Collection[int]]
    ) -> tuple[torch.Tensor, States]:
        """Return the embeddings of prompts (N, rows, d) and their hidden states, on the CPU."""
        needed = {name: [found] if isinstance(found, int) else found for name, found in layers.items()}
        embeds: list[torch.Tensor] = []
        batches: dict[tuple[str, int], list[torch.Tensor]] = {}
        starts = range(0, len(prompts), _PROMPTS_AT_ONCE)
        for start in tqdm(starts, desc="prompts for gates", unit="batch", delay=_QUIET_SECONDS, leave=False):
            found, states = self.model.encode_with_states(list(prompts[start : start + _PROMPTS_AT_ONCE]), needed)
            embeds.append(found.cpu())
            for key, state in states.items():
                batches.setdefault(key, []).append(state.cpu())
        return torch.cat(embeds), {key: torch.cat(parts) for key, parts in batches.items()}

    def _left_out(self, concept: Concept, own: _OwnPrompts, prompts: Sequence[str]) -> torch.Tensor:
        """Return which of the prompts say a concept, or a part of its names, and so are none of its negatives, (N,)."""
        own_texts = {*own.anchors, *_partial_prompts(concept, self.common)}
        names = [without_article(spelling) for spelling in concept.spellings]
        words = {word.lower() for name in names for word in name.split() if len(word) > 2}
        own_texts |= {text for text in self.words if text.lower() in words}  # a small vocabulary, or one with capitals
        own_texts |= {text for text in self.rare_words if any(word[:4] in text.lower() for word in words)}
        return torch.tensor([text in own_texts or says(text, concept.spellings) for text in prompts])

    def _fit_gate(self, concept: Concept, own: _OwnPrompts, rows: torch.Tensor, trial: _Trial) -> Gate:
        """Return the gate of a concept, whose prompts `own.all` have `rows` (N, T, d): of the spellings that it tells.

        Raises InseparableError where that is not its first one.
        """
        config = self.config
        groups: dict[str, list[int]] = {}
        for number, (_, name) in enumerate(own.plain):
            groups.setdefault(name, []).append(number)
        last_tokens = own.last_tokens
        settings = trial.left_out, trial.lookalikes, config.gate_ridge, config.gate_position
        gates = []
        for number, (name, numbers) in enumerate(groups.items()):
            try:
                gates.append(fit_gate(Positives(rows[numbers], last_tokens[numbers]), trial.negatives, *settings))
            except NoGateError as error:
                shown = ", ".join(f"'{trial.prompts[negative]}'" for negative in error.negatives[:3])
                text = f"no gate tells '{name}' from other prompts, as some say it to the model too ({shown})"
                if not number:
                    advice = "erase it without a gate, or name it more narrowly"
                    raise InseparableError(f"{text}: {advice}") from error
                if not trial.is_quiet:
                    notify(f"{text}: prompts that call {concept.name} so are not erased")
        if own.misspelt:
            first = len(own.plain)
            group = Positives(rows[first:], last_tokens[first:], config.misspelling_clearance)
            gates.append(fit_gate(group, trial.negatives, *settings))
        return join_gates(gates)

    def _fit_maps(self, own: _OwnPrompts, embeds: torch.Tensor) -> dict[str, EmbeddingMap]:
        """Return the maps of a concept's prompts, whose embeddings are (N, rows, d), onto their anchors, by stream."""
        number, aim = self.tokenizer.model_max_length, self._aims(own.all, own.anchors)
        streams = {"tokens": slice(0, number), "pooled": slice(number, None)}
        maps = {}
        for stream, part in streams.items():
            targets = embeds[:, part].flatten(0, 1)
            if len(targets):
                goals = aim[:, part].flatten(0, 1)
                maps[stream] = fit_map(targets, goals, self.config.map_ridge, self.config.map_rank)
        return maps

    def _aims(self, prompts: Iterable[str], anchors: Mapping[str, str]) -> torch.Tensor:
        """Return the embeddings that prompts should get, (N, rows, d): those of their anchors, token by token."""
        texts = list(dict.fromkeys(anchors.values()))
        embeds = dict(zip(texts, self._embed(texts, {})[0], strict=True))
        aims = []
        for prompt in prompts:
            rows = embeds[anchors[prompt]]
            alignment = align_tokens(self.tokenizer, prompt, anchors[prompt])
            pooled = range(len(alignment), len(rows))  # XL's last row
            aims.append(rows[[*alignment, *pooled]])
        return torch.stack(aims)

    def _report(self, concept: Concept, own: _OwnPrompts, edit: GatedEdit, states: States) -> dict[str, Any]:
        """Return what is known of an edit: its gap, false alarms, misses, and the least distance to its threshold.

        `distance_left` is how much of the way to the anchor is left of held-out prompts, by `mean_distance_left`.
        """
        held_out = held_out_prompts(concept, self.tokenizer)
        anchors = {prompt: self._anchor_prompt(concept, template) for prompt, template in held_out.items()}
        alarms, found = edit.margins(self.judged_states), torch.zeros(0)
        measured = anchors or own.anchors  # a long name is cut in all of the former
        embeds, seen = self._embed(list(measured), edit.layers)
        if anchors:
            found = edit.margins(seen)
        left = mean_distance_left(embeds, GatedPrompts({"": edit})(embeds, seen), self._aims(measured, measured))
        misspelt = edit.margins(states)[len(own.plain) :]
        others = [number for number, text in enumerate(self.judged) if not says(text, concept.spellings)]
        named = [self.judged[number] for number in others if alarms[number] > 0]
        gap = min(gate.gap for gate in edit.gates.values())
        if gap < _SMALL_GAP:
            notify(
                f"{concept.name}: other prompts come within {gap:.2g} of those that say it, in units of its distance "
                "from them: try its gate on prompts of your own"
            )
        return {
            "gap": round(gap, 4),
            "least_margin": round(torch.cat([alarms, found]).abs().min().item(), 4),
            "false_alarms": rate(len(named), len(others)),
            "false_alarm_prompts": named[:_FALSE_ALARMS_SHOWN],
            "misses": rate(int((found <= 0).sum()), len(found)),
            "misspelt_misses": rate(int((misspelt <= 0).sum()), len(misspelt)),
            "distance_left": round(left, 3),
        }


def mean_distance_left(before: torch.Tensor, after: torch.Tensor, aims: torch.Tensor) -> float:
    """Return how much of the way to their aims is left for prompts, on average: 0 for none, 1 for all of it.

    Of a prompt with embedding e that becomes e' and should become y, all (N, rows, d), it is `<y - e', y - e> / |y -
    e|^2`. Those that should not change do not count; where none should, it is 1.
    """
    way, remaining = (aims - before).flatten(1).double(), (aims - after).flatten(1).double()
    lengths = way.square().sum(1)
    left = (way * remaining).sum(1)[lengths > 0] / lengths[lengths > 0]
    return float(left.mean()) if len(left) else 1.0


def rate(count: int, total: int) -> list[float]:
    """Return a count, its total, and Wilson's interval of 95 % of their ratio: [count, total, low, high]."""
    if not total:
        return [0, 0, 0.0, 1.0]
    interval = binomtest(count, total).proportion_ci(method="wilson")
    return [count, total, round(float(interval.low), 5), round(float(interval.high), 5)]


def _spellings(tokenizer: Any, concept: Concept) -> list[str]:
    """Return the spellings of a concept that a tokenizer tells apart. Raises ValueError where it keeps none."""
    empty, unknown, found = list(tokenizer("").input_ids), tokenizer.unk_token_id, {}
    in_lower_case = [spelling.lower() for spelling in concept.spellings]  # which many tokenizers do not tell apart
    for spelling in (*concept.spellings, *in_lower_case):
        ids = tokenizer(spelling).input_ids
        if list(ids) != empty and unknown not in tokenizer(spelling, add_special_tokens=False).input_ids:
            found.setdefault(tuple(ids), spelling)
    if not found:
        raise ValueError(f"the model's tokenizer keeps nothing of '{concept.prompt}': give the concept another name")
    return list(found.values())


def _with_plurals(concept: Concept) -> Concept:
    """Return a concept with the plurals of its spellings among them, where it is an object, or may be one."""
    if concept.kind not in ("object", "generic"):
        return concept
    plurals: list[str] = []
    for spelling in dict.fromkeys(without_article(spelling) for spelling in concept.spellings):
        words = spelling.split()
        if concept.kind == "object" or (words and words[-1].islower()):  # and no proper name
            plurals.append(" ".join([*words[:-1], plural(words[-1])]))
    return replace(concept, aliases=(*concept.aliases, *(text for text in plurals if not concept.is_named(text))))


def _evenly(items: Sequence[Item], num: int) -> list[Item]:
    """Return at most `num` of the items, evenly spaced."""
    return list(items[:: max(1, len(items) // num)][:num])


def _check_rare(concept: Concept, captions: Sequence[str]) -> None:
    """Raise ValueError for a name that many everyday captions say, such as a stop word."""
    saying = [text for text in captions if says(text, concept.spellings)]
    if len(saying) > _MAX_SAYING * len(captions):
        shown = ", ".join(f"'{text}'" for text in saying[:3])
        raise ValueError(
            f"'{concept.prompt}' is said by {len(saying)} of {len(captions)} everyday captions ({shown}): name the "
            "concept more narrowly"
        )


def _other_prompts(concept: Concept, common: Collection[str]) -> list[str]:
    """Return prompts that say a concept by its name, by the neutral word of its kind, and by parts of its names."""
    kind = load_template_set(concept.kind)
    prompts = [fill(template, kind.neutral) for template in kind.templates]
    for name in concept.spellings:
        prompts += [fill_phrase(template, name) for template in kind.templates[:_OTHER_TEMPLATES]]
    return prompts + _partial_prompts(concept, common)


def _partial_prompts(concept: Concept, common: Collection[str]) -> list[str]:
    """Return prompts that say parts of a concept's names, such as first names, alone and of somebody else."""
    templates, prompts = load_template_set(concept.kind).templates, []
    for part in partial_names([without_article(spelling) for spelling in concept.spellings], common):
        prompts += [fill(template, part) for template in templates[:_OTHER_TEMPLATES]]
        prompts += [fill(template, f"{part} {name}") for name, template in zip(_SURNAMES, templates, strict=False)]
    return prompts
