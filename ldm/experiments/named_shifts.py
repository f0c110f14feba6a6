"""Shifts that a user names, as the robustness suite asks of them: the concepts that they erase, and the subjects."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from ldm.config.concept_lists import make_concept
from ldm.config.concepts import OWN, Concept, load_concepts
from ldm.config.methods import SRSMEConfig
from ldm.erasure.merge import by_form
from ldm.erasure.shift import WeightShift
from ldm.experiments.probe import Subject

_NAMED = 3  # concepts in the name of a subject


@dataclass(frozen=True)
class NamedShifts:
    """Shifts by label, and the concepts of a `category` that they erase, each once.

    The first of a concept's shifts has its label; further ones have labels that begin with it. `owners` has the concept
    of every shift.
    """

    category: str
    shifts: Mapping[str, WeightShift]
    owners: Mapping[str, Concept]

    @classmethod
    def of(cls, shifts: Sequence[WeightShift], category: str) -> Self:
        """Return shifts with the concepts that their metadata name; `category` is that of one that says none.

        Where all are of one category they are its concepts, else such as a user names. Raises ValueError for a shift
        that does not say what it erases.
        """
        read = [_read_concept(shift, category) for shift in shifts]
        categories = {
            OWN if concept.is_own else str(shift.metadata.get("category", category))
            for shift, concept in zip(shifts, read, strict=True)
        }
        common = categories.pop() if len(categories) == 1 else OWN
        if common == OWN:
            read = [concept if concept.is_own else make_concept(concept.name) for concept in read]
        concepts: dict[str, Concept] = {}
        for concept in read:
            first = concepts.setdefault(concept.label, concept)
            more = [text for text in concept.spellings if not first.is_named(text)]
            concepts[concept.label] = replace(first, aliases=tuple(dict.fromkeys([*first.aliases, *more])))
        named: dict[str, WeightShift] = {}
        owners: dict[str, Concept] = {}
        # The label of a concept is that of its gate, where it has one.
        for shift, concept in sorted(zip(shifts, read, strict=True), key=lambda pair: pair[0].gated is None):
            label = concept.label if concept.label not in named else f"{concept.label}-{len(named)}"
            named[label], owners[label] = shift, concepts[concept.label]
        return cls(common, named, owners)

    @property
    def concepts(self) -> list[Concept]:
        """The concepts that the shifts erase."""
        return list(dict.fromkeys(self.owners.values()))

    def subjects(self, restored: Collection[Concept]) -> list[Subject]:
        """Return the model with the shifts of all concepts but the restored ones, in each form in which they differ."""
        left = {label: shift for label, shift in self.shifts.items() if self.owners[label] not in restored}
        gated, always_gated = by_form(left, "gated")[0], by_form(left, "linear")[0]
        forms = ["gated"] if gated else []
        if not gated or len(always_gated) < len(gated):
            forms.append("linear")
        methods = dict.fromkeys(str(shift.metadata.get("method", SRSMEConfig.name)) for shift in left.values())
        names = [concept.name for concept in self.concepts if concept not in restored]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        name = f"{' + '.join(methods)} {', '.join(names[:_NAMED])}{more}"
        return [Subject(f"{name} {form}", left, form) for form in forms]


def _read_concept(shift: WeightShift, category: str) -> Concept:
    """Return the concept that a shift's metadata name: one of `configs`, or else one of its user's own."""
    metadata: Mapping[str, Any] = shift.metadata
    name, index = metadata.get("concept"), metadata.get("concept_index")
    if index is not None:
        for concept in load_concepts(str(metadata.get("category", category))):
            if concept.index == index and (name is None or concept.is_named(name)):
                return concept
    if not name:
        raise ValueError(f"{shift.path} does not say which concept it erases: make it again")
    return make_concept(name, metadata.get("concept_kind"), metadata.get("aliases", ()))
