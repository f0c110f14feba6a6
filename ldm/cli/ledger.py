"""What each command of the ledger's script does with its arguments."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from ldm.cli import arguments, output
from ldm.cli.arguments import MODEL_ARGUMENTS, Namespace
from ldm.config.concepts import parse_erase_targets
from ldm.config.methods import METHODS, NO_GATE
from ldm.io.errors import MissingFileError, notify
from ldm.ledger.history import ledger_lock
from ldm.ledger.history import repair as cut_off_torn_line
from ldm.ledger.ledger import Ledger, history_path, make_header, status_table


def init(args: Namespace) -> None:
    """Begin a ledger."""
    from ldm.cli import session
    from ldm.erasure.protection import check_apart

    concepts = parse_erase_targets(args.erased_index, args.category)
    path = history_path(args.ledger_dir)
    with ledger_lock(path.parent):
        if path.exists():
            raise ValueError(
                f"{args.ledger_dir} has a ledger already: give another `ledger_dir`, or continue it with "
                "erase and restore"
            )
        model = session.load_model(args, session.first_device(args))
        source = {}
        for name in MODEL_ARGUMENTS:
            value = getattr(args, name)
            is_path = value and name != "variant" and Path(value).exists()
            source[name] = str(Path(value).resolve()) if is_path else value
        check_apart(model, concepts, model.embed_prompts(args.protect))
        header = make_header(model, args.category, concepts, args.protect, source)
        ledger = Ledger.create(path, header)
        model.notify_of_cuts(ledger.prompts)
    print(
        f"{len(concepts)} concepts of {model.name}; always protected: the empty prompt, "
        f"{', '.join(ledger.header['protected'][1:])}"
    )


def erase(args: Namespace) -> None:
    """Erase concepts: make the shifts that are missing, and activate them."""
    path = history_path(args.ledger_dir)
    with ledger_lock(path.parent):
        ledger = Ledger(path)
        typed = {name for kind in METHODS.values() for name in arguments.typed_settings(args, kind)}
        concepts = [ledger.concept(name) for name in args.concept]
        records, missing = ledger.plan_erasure(concepts, bool(typed or args.method))
        if missing:
            from ldm.cli import session
            from ldm.config.models import describe_sources, load_model_config
            from ldm.ledger.operations import create_shifts

            method = args.method or "SRS-ME"
            known = [entry.name for entry in fields(METHODS[method])]
            unexpected = sorted(typed - set(known))
            if unexpected:
                raise ValueError(f"`{unexpected[0]}` is no setting of {method}, which has {', '.join(known)}")
            ledger, model = session.open_ledger(args, args.ledger_dir)
            model_config = load_model_config(model)
            config = session.method_config(args, model_config, method)
            sections = [f"methods.{method}", "null_space", "gate"]
            print(describe_sources(model_config, sections, arguments.spelled))
            gate = model_config.gate if model_config.edit.form == "gated" else NO_GATE
            settings = config, model_config.null_space, args.training_image_dir, gate
            records |= create_shifts(ledger, model, missing, *settings)
        if records:
            ledger.append(records)
    status(args)


def restore(args: Namespace) -> None:
    """Restore concepts: deactivate their shifts."""
    path = history_path(args.ledger_dir)
    with ledger_lock(path.parent):
        ledger = Ledger(path)
        named = {concept.index: concept.name for concept in map(ledger.concept, args.concept)}
        restored = set(named) & set(ledger.active_shifts())
        for index in sorted(set(named) - restored):
            notify(f"{named[index]} is not erased, and stays as it is")
        if restored:
            ledger.append({}, restored)
    status(args)


def status(args: Namespace) -> None:
    """Print what each concept is."""
    output.show_table(status_table(Ledger(history_path(args.ledger_dir))))


def history(args: Namespace) -> None:
    """Print the history, a sentence for each entry."""
    output.show_answer("\n".join(Ledger(history_path(args.ledger_dir)).history_lines()))


def verify(args: Namespace) -> None:
    """Recompute every digest and effect, and print what was checked, and what that cannot prove."""
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
    path = history_path(args.ledger_dir)
    if not path.is_file():
        raise MissingFileError(f"no ledger in {path.parent}", "ledger", ledger_dir=path.parent)
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
