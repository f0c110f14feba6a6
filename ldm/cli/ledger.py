"""What each command of the ledger's script does with its arguments."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ldm.cli import arguments, output
from ldm.cli.arguments import MODEL_ARGUMENTS, Namespace
from ldm.cli.concepts import category_of, named_concepts
from ldm.config.concept_lists import check_apart_from, names_file, read_concepts, read_prompts
from ldm.config.concepts import OWN, Concept, parse_indexes
from ldm.config.methods import METHODS, NO_GATE, GateConfig, NullSpaceConfig, SRSMEConfig
from ldm.io.errors import MissingFileError, NotErasedError, notify
from ldm.ledger.history import ledger_lock
from ldm.ledger.history import migrate as write_anew
from ldm.ledger.history import repair as cut_off_torn_line
from ldm.ledger.ledger import Ledger, history_path, make_header, status_table
from ldm.ledger.lines import some_of
from ldm.metrics.tables import to_markdown

_INDEXES_RE = re.compile(r"[0-9]+(?:[-,][0-9]+)*")  # what is no name, but looks like indexes
_MAX_ROWS = 24  # of what was changed, in a ledger with more concepts
_NUM_SHOWN = 3  # shifts that change the prompt of an added concept most


def init(args: Namespace) -> None:
    """Begin a ledger."""
    from ldm.cli import session
    from ldm.erasure.contradictions import check_contradictions
    from ldm.erasure.protection import check_apart

    concepts = _concepts_to_know(args)
    prompts = read_prompts(args.protect)
    check_apart_from(prompts, concepts)
    retain = read_prompts(args.retain, "retain")
    path = history_path(args.ledger_dir)
    with ledger_lock(path.parent):
        if path.exists():
            raise ValueError(
                f"{args.ledger_dir} has a ledger already: give another `ledger_dir`, or continue it with "
                "add, erase and restore"
            )
        model = session.load_model(args, session.first_device(args))
        source = {}
        for name in MODEL_ARGUMENTS:
            value = getattr(args, name)
            is_path = value and name != "variant" and Path(value).exists()
            source[name] = str(Path(value).resolve()) if is_path else value
        check_apart(model, concepts, model.embed_prompts(prompts))
        check_contradictions(model, concepts, prompts)
        header = make_header(model, category_of(args, concepts), concepts, prompts, source)
        header |= {"retain": retain} if retain else {}
        ledger = Ledger.create(path, header)
        model.notify_of_cuts(ledger.prompts)
    print(
        f"{len(concepts)} concepts of {model.name}; always protected: the empty prompt, "
        f"{some_of(ledger.header['protected'][1:])}"
    )
    if retain:
        print(f"changed little: {some_of(retain)}")


def _concepts_to_know(args: Namespace) -> list[Concept]:
    """Return the concepts that --concepts or --erased_index names, for a ledger that is to know them.

    Raises ValueError as `named_concepts`, and for what was meant as indexes, or as a setting of an erasure.
    """
    for text in args.concepts:
        if _INDEXES_RE.fullmatch(text):
            if not text.isdigit():
                raise ValueError(f"`concepts` {text}: these are texts: give indexes to `erased_index`")
            notify(f"'{text}' is taken as the name of a concept: give indexes to `erased_index`")
    concepts = named_concepts(args)
    if args.anchor is not None:
        raise ValueError(
            f"`anchor` {args.anchor} is a setting of an erasure: give it to erase, or give a text such as 'a painting'"
        )
    return concepts


def add(args: Namespace) -> None:
    """Add concepts, and say how much the shifts made so far change their prompts, which these do not protect."""
    from ldm.cli import session
    from ldm.erasure.contradictions import check_contradictions
    from ldm.erasure.leakage import LARGE_LEAKAGE
    from ldm.erasure.protection import check_apart
    from ldm.ledger.operations import leakage_on_added

    path = history_path(args.ledger_dir)
    with ledger_lock(path.parent):
        ledger = Ledger(path)
        args.category = ledger.category
        if args.erased_index and args.category == OWN:
            raise ValueError("this ledger's concepts have no indexes: give `concepts` texts or files")
        concepts = _concepts_to_know(args)
        ledger.check_addition(concepts)
        check_apart_from(ledger.header["protected"], concepts)
        ledger, model = session.open_ledger(args, args.ledger_dir)
        check_apart(model, concepts, model.embed_prompts(ledger.header["protected"]))
        check_contradictions(model, concepts, ledger.asked_for)
        table = leakage_on_added(ledger, model, concepts)
        largest = table.sort_values("leakage", ascending=False, kind="stable")
        of_each = largest.drop_duplicates("label")
        ledger.add(concepts, dict(zip(of_each["label"], of_each["leakage"], strict=True)))
        model.notify_of_cuts(concept.prompt for concept in concepts)
    print(f"added: {some_of(concept.name for concept in concepts)}")
    for row in largest.head(_NUM_SHOWN).to_dict("records"):
        print(
            f"the shift of {row['shift']} was made before {row['added']} was added: it changes its prompt by "
            f"{row['leakage']:.1e}"
        )
    unprotected = list(dict.fromkeys(largest[largest["leakage"] > LARGE_LEAKAGE]["shift"]))
    if unprotected:
        notify(
            f"{some_of(unprotected)}: the shifts of these change an added concept by more than {LARGE_LEAKAGE:g}: "
            "restore them, and erase them with `method` SRS-ME, which makes shifts that protect it"
        )


def erase(args: Namespace) -> None:
    """Erase concepts: make the shifts that are missing, and activate them."""
    path = history_path(args.ledger_dir)
    with ledger_lock(path.parent):
        ledger = Ledger(path)
        concepts = _named(ledger, args.concept)
        anew = _asks_for_another_way(args)
        if anew:
            _check_settings(args, args.method or SRSMEConfig.name)
        wanted = _left_to_erase(ledger, args.concept, concepts) if anew else concepts
        records, missing = ledger.plan_erasure(wanted, anew)
        if missing:
            from ldm.cli import session
            from ldm.config.models import describe_sources, load_model_config
            from ldm.ledger.operations import create_shifts

            method = args.method or SRSMEConfig.name
            ledger, model = session.open_ledger(args, args.ledger_dir)
            model_config = load_model_config(model)
            config = session.method_config(args, model_config, method)
            session.report_unused(args, config)
            null_space = session.fill_settings(args, model_config.null_space)
            sections = [f"methods.{method}", "null_space", "gate"]
            print(describe_sources(model_config, sections, arguments.spelled))
            is_gated = model_config.edit.form == "gated" or args.gate
            gate = session.fill_settings(args, model_config.gate) if is_gated else NO_GATE
            records |= create_shifts(ledger, model, missing, config, null_space, args.training_image_dir, gate)
        if records:
            ledger.append(records)
    _show_changed(ledger, concepts)
    left = [concept.name for concept in concepts if concept.label not in {**records, **ledger.active_shifts()}]
    if left:
        raise NotErasedError(
            f"{some_of(left, _NUM_SHOWN)}: no gate was found, as a notice above says: erase another way"
        )
    _check_erased(ledger, {concept.label for concept in concepts}, args.least_effect)  # what was active before too


def _left_to_erase(ledger: Ledger, texts: Sequence[str], concepts: Sequence[Concept]) -> list[Concept]:
    """Return those of `concepts` to erase in a way that was asked for: not what is erased, but for what was named.

    Of `all` and of a file's concepts some may be erased already, as after another was added; these stay, and are told.
    """
    texts = [text for text in texts if text.strip().lower() != "all" and not names_file(text)]
    named = {concept.label for concept in _named(ledger, texts)}
    active = ledger.active_shifts()
    kept = [concept for concept in concepts if concept.label in active and concept.label not in named]
    if kept:
        verb = "is erased already, and stays as it is" if len(kept) == 1 else "are erased already, and stay as they are"
        notify(f"{some_of(concept.name for concept in kept)} {verb}")
    return [concept for concept in concepts if concept not in kept]


def _show_changed(ledger: Ledger, concepts: Sequence[Concept]) -> None:
    """Print what each concept is; of a ledger with many only some of those that were named, the too weak ones first."""
    table, names = status_table(ledger), {concept.name for concept in concepts}
    if len(table) <= _MAX_ROWS:
        output.show_table(table)
        return
    shown = table[table["concept"].isin(names)].sort_values(
        "state", key=lambda states: states != "too_weak", kind="stable"
    )
    counts = ", ".join(f"{count} {state}" for state, count in table["state"].value_counts().items())
    told = f"{to_markdown(shown[:_MAX_ROWS])}\n\n{len(table)} concepts: {counts}; `status` shows them all"
    output.show_tables(told, {"": table})


def _check_erased(ledger: Ledger, labels: Collection[str], least_effect: float | None) -> None:
    """Raise NotErasedError where an active shift is too weak for its record, or for the least effect asked for."""
    from ldm.erasure.effect import judged_form, least_effect_met, round_down

    weak: list[str] = []
    for label, record in ledger.active_shifts().items():
        if label not in labels:
            continue
        is_weak = not record.get("is_erased", True)
        if least_effect is not None:
            metadata = ledger.load(record).metadata
            is_weak = least_effect_met(metadata, judged_form(metadata, record.get("effect"))) < least_effect
        if is_weak:
            weak.append(f"{record['concept']} ({round_down(record['effect'])})")
    if weak:
        raise NotErasedError(
            f"{some_of(weak, _NUM_SHOWN)}: prompts that say it go less of the way to what takes its place than is "
            "called erased (`least_effect`). It is too_weak in the ledger: restore it, and erase it with a larger "
            "`rank_rtol`, fewer `protected_templates`, or smaller `neutral_preserve_scale`, `captions_preserve_scale` "
            "and `preserve_scale`"
        )


def _asks_for_another_way(args: Namespace) -> bool:
    """Return whether a method, or a setting of how a shift is made, was typed: then shifts are made anew."""
    kinds = (*METHODS.values(), NullSpaceConfig, GateConfig)
    return bool(args.method) or any(arguments.typed_settings(args, kind) for kind in kinds)


def _check_settings(args: Namespace, method: str) -> None:
    """Raise ValueError for a setting that was typed and that a method does not have."""
    kind = METHODS[method]
    known = [entry.name for entry in fields(kind)]
    known += [entry.name for entry in fields(NullSpaceConfig)] if kind.needs_null_space else []
    known += [entry.name for entry in fields(GateConfig)] if issubclass(kind, SRSMEConfig) else []
    typed: dict[str, Any] = {}
    for settings in (*METHODS.values(), NullSpaceConfig, GateConfig):
        typed |= arguments.typed_settings(args, settings)
    unexpected = sorted(set(typed) - set(known))
    if unexpected:
        raise ValueError(f"`{unexpected[0]}` is no setting of {method}, which has {', '.join(known)}")


def _named(ledger: Ledger, texts: Sequence[str]) -> list[Concept]:
    """Return the ledger's concepts that texts name: names, files of names, indexes of its category, or all.

    Raises ValueError, with the nearest name, for what is not in the ledger.
    """
    concepts: list[Concept] = []
    for text in texts:
        found = ledger.find(text)
        if found is not None:
            concepts.append(found)
        elif text.strip().lower() == "all":
            concepts += ledger.concepts
        elif names_file(text):
            concepts += [ledger.concept(listed.name) for listed in read_concepts([text])]
        elif ledger.category != OWN and _INDEXES_RE.fullmatch(text):
            concepts += [ledger.concept(str(index)) for index in parse_indexes(text, ledger.category)]
        else:
            concepts.append(ledger.concept(text))
    return list(dict.fromkeys(concepts))


def restore(args: Namespace) -> None:
    """Restore concepts: deactivate their shifts."""
    path = history_path(args.ledger_dir)
    with ledger_lock(path.parent):
        ledger = Ledger(path)
        named, active = _named(ledger, args.concept), ledger.active_shifts()
        others = [concept.name for concept in named if concept.label not in active]
        if len(others) == 1:
            notify(f"{others[0]} is not erased, and stays as it is")
        elif others:
            notify(f"{some_of(others)} are not erased, and stay as they are")
        restored = [concept.label for concept in named if concept.label in active]
        if restored:
            ledger.append({}, restored)
    _show_changed(ledger, named)


def status(args: Namespace) -> None:
    """Print what each concept is."""
    output.show_table(status_table(Ledger(history_path(args.ledger_dir))))


def _existing_history(args: Namespace) -> Path:
    """Return the file of a ledger's history, whole or not. Raises MissingFileError where there is none."""
    path = history_path(args.ledger_dir)
    if not path.is_file():
        raise MissingFileError(f"no ledger in {path.parent}", "ledger", ledger_dir=path.parent)
    return path


def migrate(args: Namespace) -> None:
    """Write a ledger of an older version as one of today's."""
    path = _existing_history(args)
    with ledger_lock(path.parent):
        kept = write_anew(path)
        ledger = Ledger(path)
    print(
        f"{path}: {len(ledger.concepts)} concepts and {len(ledger.entries)} changes, as before; the old file is {kept}"
    )


def history(args: Namespace) -> None:
    """Print the history, a sentence for each entry."""
    output.show_answer("\n".join(Ledger(history_path(args.ledger_dir)).history_lines()))


def verify(args: Namespace) -> None:
    """Recompute every digest and change of outputs, and print what was checked, and what that cannot prove."""
    from ldm.cli import session
    from ldm.ledger import operations

    ledger, model = session.open_ledger(args, args.ledger_dir)
    output.show_table(operations.verify(ledger, model))
    print(
        "A chain of digests cannot prove that no entry was cut off at its end, that the whole history was not written "
        f"anew, or who wrote it: keep the history's last digest where others cannot change it: {ledger.last_hash}"
    )


def repair(args: Namespace) -> None:
    """Cut a torn last line off the history."""
    path = _existing_history(args)
    with ledger_lock(path.parent):
        repaired = cut_off_torn_line(path)
        if repaired is None:
            print(f"nothing is torn in {path}")
            return
        cut_off, size = repaired
        entries = len(Ledger(path).entries)
    print(f"{path}: its last line was torn, and its {size} bytes are in {cut_off}; the state is entry {entries}'s")


def export(args: Namespace) -> None:
    """Write the present weights."""
    from ldm.cli import session
    from ldm.erasure.export import export as write
    from ldm.io.paths import merge_name

    config = arguments.export_config(args)
    ledger, model = session.open_ledger(args, args.ledger_dir)
    shifts = ledger.shifts()
    if not shifts:
        base = ledger.header["base_model"]
        raise ValueError(
            f"nothing is erased in {args.ledger_dir}: its weights are those of {base}; erase a concept first"
        )
    target = (args.save_path or ledger.root / "export") / f"{model.name}-{merge_name(shifts)}"
    session.print_export(write(model, shifts, target, config, ledger.prompts))
