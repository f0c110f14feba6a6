"""A ledger as the live page shows it: what is erased and restored, and prompts to try and to measure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ldm.config.concepts import Concept
from ldm.config.everyday import everyday_captions
from ldm.config.templates import fill, load_template_set
from ldm.erasure.shift import WeightShift
from ldm.ledger.ledger import Ledger

COMPOSED_CAPTION = "a church"  # in compositions: a thing that every bundled model knows
NUM_CAPTIONS = 50  # everyday captions, of which one is taken that says no concept


class RequestError(ValueError):
    """Say what a visitor can mend. Every visitor reads its text, which names no file."""


@dataclass(frozen=True)
class LedgerState:
    """A ledger as it was read at one time.

    `shifts` and `digests`, of their files, are by the concept's name: what was ever erased. `erased` are the names of
    the concepts that are erased now.
    """

    ledger: Ledger
    shifts: dict[str, WeightShift]
    digests: dict[str, str]
    erased: list[str]

    @classmethod
    def read(cls, path: Path, known: LedgerState | None = None) -> LedgerState:
        """Return the ledger in a file; shifts that are `known` from an earlier reading are not loaded again.

        Raises ValueError for a ledger or a shift that is not what was written.
        """
        ledger = Ledger(path)
        records = ledger.last_shifts()
        active = {record["concept"] for record in ledger.active_shifts().values()}
        loaded = {known.digests[name]: shift for name, shift in known.shifts.items()} if known else {}
        digests: dict[str, str] = {}
        shifts: dict[str, WeightShift] = {}
        for name, record in records.items():
            digests[name] = record["digest"]
            if record["digest"] in loaded:
                ledger.check_file(record)
            shifts[name] = loaded.get(record["digest"]) or ledger.load(record)
        return cls(ledger, shifts, digests, [concept.name for concept in ledger.concepts if concept.name in active])

    @property
    def restored(self) -> list[str]:
        """The names of the concepts that were erased once and are not now."""
        return [name for name in self.shifts if name not in self.erased]

    @property
    def never_erased(self) -> list[str]:
        """The names of the ledger's concepts that no shift was ever made for."""
        return [concept.name for concept in self.ledger.concepts if concept.name not in self.shifts]

    @property
    def names_by_state(self) -> dict[str, list[str]]:
        """The names of all concepts, by what people call their state."""
        return {"Erased": self.erased, "Restored": self.restored, "Never erased": self.never_erased}

    def concept(self, name: str) -> Concept:
        """Return the ledger's concept of that very name. Raises RequestError when there is none."""
        for concept in self.ledger.concepts:
            if concept.name == name:
                return concept
        raise RequestError("choose one of the concepts first")

    def digests_of(self, names: Collection[str]) -> tuple[str, ...]:
        """Return what tells a choice of concepts from every other, also from one whose shifts were made again."""
        return tuple(sorted(self.digests[name] for name in set(names) & set(self.digests)))

    @property
    def switches(self) -> dict[str, str]:
        """What a visitor may change, each as what says it and what it asks for: an action, a space and a name."""
        erased = set(self.erased)
        told: dict[str, str] = {}
        for name in self.shifts:
            action, now = ("restore", "erased") if name in erased else ("erase", "restored")
            told[f"{name} ({now} in the ledger)"] = f"{action} {name}"
        return told

    def switched(self, wishes: Collection[str]) -> list[str]:
        """Return what is erased where `wishes` are met, of which each asks to erase or restore one concept.

        What is already as it is asked for stays so, as where the ledger has changed since. Raises RequestError for what
        asks for neither, and as `select_shifts`.
        """
        chosen = set(self.erased)
        if not isinstance(wishes, (list, tuple, set)):
            raise RequestError("give a list of what is other than in the ledger")
        for wish in wishes:
            action, _, name = str(wish).partition(" ")
            self.select_shifts([name])
            if action not in ("erase", "restore"):
                raise RequestError(f"'{str(wish)[:50]}' asks neither to erase nor to restore a concept")
            chosen = chosen | {name} if action == "erase" else chosen - {name}
        return [name for name in self.shifts if name in chosen]

    def select_shifts(self, names: Collection[str]) -> dict[str, WeightShift]:
        """Return the shifts of the concepts `names`, by label. Raises RequestError for a name that has none."""
        if not isinstance(names, (list, tuple, set)):
            raise RequestError("give a list of concepts' names")
        for name in names:
            if not isinstance(name, str) or name not in self.shifts:
                choices = ", ".join(self.shifts)
                raise RequestError(f"'{str(name)[:50]}' is no concept that can be erased here: choose from {choices}")
        wanted = set(names)
        concepts = [concept for concept in self.ledger.concepts if concept.name in wanted]
        return {concept.label: self.shifts[concept.name] for concept in concepts}


def example_prompts(state: LedgerState) -> dict[str, str]:
    """Return prompts to try, by a label that says what they are.

    These are an erased, a restored and another concept, compositions of the first and the last, and a caption without
    any concept.
    """
    prompts: dict[str, str] = {}
    for word, names in state.names_by_state.items():
        if names:
            prompts[f"{names[0]} ({word.lower()})"] = state.concept(names[0]).prompt
    for names in (state.erased, state.never_erased):
        if names:
            prompt = _compose(state.concept(names[0]))
            prompts[prompt] = prompt
    caption = _plain_caption(state)
    return prompts | {f"{caption} (no concept)": caption}


def other_prompts(state: LedgerState, names: Collection[str]) -> dict[str, bool]:
    """Return prompts that say none of the concepts `names`, and of each whether the ledger protects it.

    Of what it protects that is one prompt that always is, and a concept of each state; of all else a composition and a
    caption without any concept.
    """
    prompts = {state.ledger.header["protected"][-1]: True}
    others = []
    for group in state.names_by_state.values():
        others += [state.concept(name) for name in group if name not in names][:1]
    for concept in others:
        prompts[concept.prompt] = True
    if others:
        prompts[_compose(others[-1])] = False
    prompts[_plain_caption(state)] = False
    chosen = [state.concept(name) for name in names]
    return {text: known for text, known in prompts.items() if not any(_says(text, concept) for concept in chosen)}


def _says(prompt: str, concept: Concept) -> bool:
    """Return whether a prompt has a spelling of a concept in it."""
    return any(spelling.lower() in prompt.lower() for spelling in concept.spellings)


def _compose(concept: Concept) -> str:
    """Return a prompt that says a concept and something else."""
    template = load_template_set(concept.kind).composed_templates[0]
    return fill(template.replace("{caption}", COMPOSED_CAPTION), concept.prompt)


def _plain_caption(state: LedgerState) -> str:
    """Return the shortest of some everyday captions that says no concept of the ledger; the shortest if all do."""
    captions = sorted(everyday_captions(NUM_CAPTIONS), key=len)
    for caption in captions:
        if not any(_says(caption, concept) for concept in state.ledger.concepts):
            return caption
    return captions[0]
