"""What the prompts of a folder of images are: erased, restored, protected or regular, as its metadata say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.config.concept_lists import make_concept
from ldm.config.concepts import (
    OWN,
    STATUSES,
    Concept,
    UnknownConceptError,
    erasable_concepts,
    get_concept,
    match_concept,
    parse_indexes,
)
from ldm.config.settings import did_you_mean
from ldm.config.spellings import says
from ldm.io.errors import notify
from ldm.io.files import read_dir_metadata
from ldm.io.prompts import read_prompt_csv

GROUPS = (*STATUSES, "erased compositions", "compositions")  # of prompts that no list names


def shown_concept(category: str, prompt: str) -> Concept | None:
    """Return the concept of a category that a prompt names; None for none, and for a watermark."""
    concept = match_concept(category, prompt)
    return None if concept is None or concept.is_watermark else concept


def prompt_statuses(
    image_dir: Path, category: str, prompts: Collection[str], erased: Sequence[Concept], restored: Sequence[Concept]
) -> dict[str, str]:
    """Return what each prompt is in a folder of images: erased or restored where it says such a concept, protected
    where every shift that the folder's metadata lists protects that prompt, or regular.

    A prompt says one concept of the category at most, the longest that is in it, and any that a user named. Raises
    ValueError when a concept is both, and when that metadata lists no shift of an erased one, or one of a restored one.
    """
    listed = _read_shifts(image_dir)
    shifts = listed or {}
    for concept in [*erased, *restored]:
        if concept in erased and concept in restored:
            raise ValueError(f"{concept.name} is not both: leave it out of `erased` or of `restored`")
        has_shift = _any_erases(shifts.values(), concept, category)
        if listed is not None and has_shift != (concept in erased):
            setting, found = ("erased", "no shift") if concept in erased else ("restored", "a shift")
            raise ValueError(f"{image_dir} was made with {found} of {concept.name}: leave it out of `{setting}`")
    protected_lists = [set(shift.get("protected", ())) for shift in shifts.values()]
    protected = set.intersection(*protected_lists) if protected_lists else set()
    statuses = {}
    for prompt in prompts:
        statuses[prompt] = "protected" if prompt in protected else "regular"
        if any(_is_said(concept, prompt, category) for concept in erased):
            statuses[prompt] = "erased"
        elif any(_is_said(concept, prompt, category) for concept in restored):
            statuses[prompt] = "restored"
    return statuses


def _is_said(concept: Concept, prompt: str, category: str) -> bool:
    """Return whether a prompt says a concept: one that a user named by any of its spellings."""
    if concept.is_own:
        return concept.is_named(prompt) or says(prompt, concept.spellings)
    shown = shown_concept(category, prompt)
    return shown is not None and shown.index == concept.index


def erased_concepts(image_dir: Path, category: str) -> list[Concept]:
    """Return the concepts that the shifts in a folder's metadata erase: those of `category`, and those by name.

    It is empty, with a notice, where that lists no shifts at all, as of images by a model that was merged into a file.
    """
    shifts = _read_shifts(image_dir)
    if shifts is None:
        notify(f"no metadata in {image_dir} lists shifts: pass as `erased` the concepts that are erased there, if any")
        return []
    listed = [concept for concept in erasable_concepts(category) if _any_erases(shifts.values(), concept, category)]
    return [*listed, *_own_concepts(shifts)]


def named_concepts(
    texts: Sequence[str], image_dir: Path, category: str, prompts: Collection[str], setting: str
) -> list[Concept]:
    """Return the concepts that texts name: indexes and names of `category`, and concepts of their user's own.

    One of these is known by the shifts in the folder's metadata, or by the prompts that say it. Raises ValueError,
    naming the `setting` and the nearest name, for a text that is none.
    """
    own = _own_concepts(_read_shifts(image_dir) or {})
    concepts: list[Concept] = []
    for text in texts:
        try:
            concepts += [get_concept(category, index) for index in parse_indexes(text, category)]
        except UnknownConceptError:
            concepts.append(_named_concept(text, category, own, prompts, setting))
    return list(dict.fromkeys(concepts))


def _named_concept(text: str, category: str, own: Sequence[Concept], prompts: Collection[str], setting: str) -> Concept:
    """Return the concept of its user's own that a text names."""
    named = next((concept for concept in own if concept.is_named(text)), None) or make_concept(text)
    if named in own or any(_is_said(named, prompt, category) for prompt in prompts):
        return named
    known = list(prompts)
    for concept in [*erasable_concepts(category), *own]:
        known += concept.spellings
    raise ValueError(
        f"`{setting}` '{text}' is no concept of category {category}, and no prompt of the images says it"
        f"{did_you_mean(text, known)}: see how it is spelt, or leave it out"
    )


def _own_concepts(shifts: Mapping[str, Mapping[str, Any]]) -> list[Concept]:
    """Return the concepts that users named, as the metadata of their shifts say them."""
    concepts = []
    for shift in shifts.values():
        name = shift.get("concept")
        if shift.get("category") == OWN and isinstance(name, str):
            aliases = [alias for alias in shift.get("aliases", ()) if isinstance(alias, str)]
            concepts.append(make_concept(name, aliases=aliases))
    return concepts


def _read_shifts(image_dir: Path) -> dict[str, dict[str, Any]] | None:
    """Return what the metadata of a folder of images says of each of its shifts; None where it lists none at all.

    Raises ValueError when they are listed in another way than ours.
    """
    metadata = read_dir_metadata(image_dir)
    if "shifts" not in metadata:
        return None
    shifts = metadata["shifts"]
    if not isinstance(shifts, dict) or not all(isinstance(shift, dict) for shift in shifts.values()):
        raise ValueError(f"the metadata in {image_dir} lists its shifts in no known way: generate the images again")
    return shifts


def _any_erases(shifts: Iterable[Mapping[str, Any]], concept: Concept, category: str) -> bool:
    return any(_erases(shift, concept, category) for shift in shifts)


def _erases(shift: Mapping[str, Any], concept: Concept, category: str) -> bool:
    """Return whether a shift's metadata says that it erases the concept, by its prompt, or in older ones its index."""
    if "prompt" in shift:
        return concept.is_named(str(shift["prompt"]))
    return (shift.get("category", category), shift.get("concept_index")) == (category, concept.index)


def prompt_groups(statuses: Mapping[str, str], prompt_lists: Sequence[tuple[str, Path]] = ()) -> dict[str, str]:
    """Return the group of each prompt, given its status by `prompt_statuses`.

    `prompt_lists` are names of groups, each with a prompt list: a prompt is of the first group whose list has it. One
    that says both a style and an object is a composition: of `erased compositions` where its status is erased, else of
    `compositions`. Every other prompt's group is its status.

    Raises MissingFileError or ValueError for a list that cannot be read, and ValueError for a name in `GROUPS`.
    """
    listed: dict[str, str] = {}
    for name, path in prompt_lists:
        if name in GROUPS:
            raise ValueError(f"`groups` {name}={path}: there is a group {name} already, so choose another name")
        prompts = {case.prompt for case in read_prompt_csv(path)}
        if prompts.isdisjoint(statuses):
            notify(f"no image shows a prompt of {path}, so that it adds nothing to the group {name}")
        for prompt in prompts:
            listed.setdefault(prompt, name)
    groups = {}
    for prompt, status in statuses.items():
        if prompt in listed:
            groups[prompt] = listed[prompt]
        elif shown_concept("style", prompt) and shown_concept("object", prompt):
            groups[prompt] = "erased compositions" if status == "erased" else "compositions"
        else:
            groups[prompt] = status
    return groups
