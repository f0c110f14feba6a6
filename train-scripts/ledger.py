"""What an owner has erased and restored: VanGogh is erased since March, Picasso was restored in June; show me; give me
the weights.

init begins a ledger in --ledger_dir: it names a base model by its digest, the concepts and all that is protected. erase
makes a concept's shift where there is none yet, and activates it; restore deactivates it. status and history say what
is and what was, verify recomputes every digest, and export writes the present weights as Merge_model.py does. A run
that was stopped has changed nothing.
"""

from dataclasses import fields
from pathlib import Path

from ldm.cli import arguments
from ldm.cli.arguments import Namespace
from ldm.cli.run import run
from ldm.config.concepts import parse_erase_targets
from ldm.config.methods import METHODS
from ldm.io.paths import REPO_ROOT
from ldm.ledger.ledger import HISTORY_FILE, Ledger, ledger_lock, make_header, status_table


def init(args: Namespace) -> None:
    from ldm.cli import session

    concepts = parse_erase_targets(args.erased_index, args.category)
    with ledger_lock(args.ledger_dir):
        if (args.ledger_dir / HISTORY_FILE).exists():
            raise ValueError(
                f"{args.ledger_dir} has a ledger already: give another `ledger_dir`, or continue it with "
                "erase and restore"
            )
        model = session.load_model(args, session.first_device(args))
        source = {}
        for name in ("model", "ckpt_path", "config_path"):
            value = getattr(args, name)
            source[name] = str(Path(value).resolve()) if value and Path(value).exists() else value
        header = make_header(model, args.category, concepts, args.protect, source)
        ledger = Ledger.create(args.ledger_dir / HISTORY_FILE, header)
    print(
        f"{len(concepts)} concepts of {model.name}; always protected: the empty prompt, "
        f"{', '.join(ledger.header['protected'][1:])}"
    )


def erase(args: Namespace) -> None:
    with ledger_lock(args.ledger_dir):
        ledger = Ledger(args.ledger_dir / HISTORY_FILE)
        typed = {name for kind in METHODS.values() for name in arguments.typed_settings(args, kind)}
        concepts = [ledger.concept(name) for name in args.concept]
        records, missing = ledger.plan_erasure(concepts, bool(typed or args.method))
        if missing:
            from ldm.cli import session
            from ldm.config.models import load_model_config
            from ldm.ledger.operations import create_shifts

            method = args.method or "SRS-ME"
            known = [entry.name for entry in fields(METHODS[method])]
            foreign = sorted(typed - set(known))
            if foreign:
                raise ValueError(f"`{foreign[0]}` is no setting of {method}, which has {', '.join(known)}")
            ledger, model = session.open_ledger(args, args.ledger_dir)
            model_config = load_model_config(model.config_name)
            config = session.method_config(args, model_config, method)
            records |= create_shifts(ledger, model, missing, config, model_config.null_space, args.training_image_dir)
        if records:
            ledger.append(records)
    status(args)


def restore(args: Namespace) -> None:
    with ledger_lock(args.ledger_dir):
        ledger = Ledger(args.ledger_dir / HISTORY_FILE)
        restored = {ledger.concept(name).index for name in args.concept} & set(ledger.active_shifts())
        if restored:
            ledger.append({}, restored)
    status(args)


def status(args: Namespace) -> None:
    from ldm.metrics.tables import to_markdown

    print(to_markdown(status_table(Ledger(args.ledger_dir / HISTORY_FILE))))


def history(args: Namespace) -> None:
    print("\n".join(Ledger(args.ledger_dir / HISTORY_FILE).history_lines()))


def verify(args: Namespace) -> None:
    from ldm.cli import session
    from ldm.ledger import operations
    from ldm.metrics.tables import to_markdown

    print(to_markdown(operations.verify(*session.open_ledger(args, args.ledger_dir))))


def export(args: Namespace) -> None:
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
    target = (args.save_path or args.ledger_dir / "export") / f"{model.name}-{merge_name(shifts)}"
    session.print_export(write(model, shifts, target, config, ledger.prompts))


def main() -> None:
    parser = arguments.make_parser(__doc__)
    runs = {
        "init": init,
        "erase": erase,
        "restore": restore,
        "status": status,
        "history": history,
        "verify": verify,
        "export": export,
    }
    commands = arguments.add_commands(parser, REPO_ROOT / "models" / "ledger", **runs)
    for name in ("init", "erase", "verify", "export"):
        arguments.add_model(commands[name], str(arguments.DEFAULT_MODEL) if name == "init" else None)
        arguments.add_device(commands[name])
    arguments.add_category(commands["init"])
    commands["init"].option(
        "erased_index", default="0-8", help="what may be erased, such as 0-8; each shift protects the others"
    )
    commands["init"].retire("--concepts", "--concepts is for names: give indexes to --erased_index")
    commands["init"].option("protect", nargs="*", default=[], help="further prompts that every shift protects")
    for name in ("erase", "restore"):
        commands[name].add_argument("concept", nargs="+", help="names, or indexes")
    commands["erase"].option(
        "method", choices=METHODS, default=None, help="(default: the concept's last shift; else SRS-ME)"
    )
    for kind in METHODS.values():
        arguments.add_settings(commands["erase"], kind)
    arguments.add_training_images(commands["erase"])
    arguments.add_export(commands["export"])
    commands["export"].option("save_path", type=Path, default=None, help="where to (default: LEDGER_DIR/export)")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run(main)
