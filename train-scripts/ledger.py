"""What an owner has erased and given back: VanGogh is out since March, Picasso came back in June; show me; give me the weights.

init begins a ledger in --root: it binds a base model by its digest, the concepts and all that is protected. erase makes a concept's
shift where there is none yet, and switches it on; restore switches it off. status and history say what is and what was, verify
recomputes every digest, and export writes the present weights as Merge_model.py does. A run that was stopped has changed nothing.
"""

from pathlib import Path

from ldm import cli
from ldm.concepts import ROOT, parse_erased
from ldm.export import export
from ldm.ledger import HISTORY, Ledger, bind, locked, make, table, verify
from ldm.losses import METHODS
from ldm.metrics.compare import to_markdown
from ldm.store import joined


def begin(args: cli.Namespace) -> None:
    concepts = parse_erased(args.concepts, args.erase_cat)
    with locked(args.root):
        if (args.root / HISTORY).exists():
            raise ValueError(f"{args.root} has a ledger already: give another --root, or go on with erase and restore")
        model = cli.load_model(args, cli.parse_devices(args.device)[0])
        source = {name: str(Path(value).resolve()) if value and Path(value).exists() else value
                  for name, value in vars(args).items() if name in ("model", "ckpt_path", "config_path")}
        ledger = Ledger.create(args.root / HISTORY, bind(model, args.erase_cat, concepts, args.protect, source))
    print(f"{len(concepts)} concepts of {model.name}; always protected: the blank prompt, {', '.join(ledger.binding['protected'][1:])}")


def erase(args: cli.Namespace) -> None:
    with locked(args.root):
        ledger, flags = Ledger(args.root / HISTORY), [name for name in cli.SETTINGS if getattr(args, name) is not None]
        entries, new = ledger.due([ledger.concept(name) for name in args.concept], bool(flags or args.method))
        if new:
            (ledger, model), method = cli.open_ledger(args, args.root), args.method or "SRS-ME"
            given = cli.given_settings(args, model.base, method)
            if foreign := [name for name in flags if name not in given]:
                raise ValueError(f"--{foreign[0]} is no setting of {method}, which has {', '.join(given)}")
            entries |= make(ledger, model, new, method, given, args.data_path)
        if entries:
            ledger.append(entries)
    status(args)


def restore(args: cli.Namespace) -> None:
    with locked(args.root):
        ledger = Ledger(args.root / HISTORY)
        back = {ledger.concept(name).index for name in args.concept} & set(ledger.state())
        if back:
            ledger.append({}, back)
    status(args)


def status(args: cli.Namespace) -> None:
    print(to_markdown(table(Ledger(args.root / HISTORY))))


def history(args: cli.Namespace) -> None:
    print("\n".join(Ledger(args.root / HISTORY).story()))


def prove(args: cli.Namespace) -> None:
    print(to_markdown(verify(*cli.open_ledger(args, args.root))))


def write(args: cli.Namespace) -> None:
    ledger, model = cli.open_ledger(args, args.root)
    shifts = ledger.shifts()
    if not shifts:
        raise ValueError(f"nothing is erased in {args.root}: its weights are those of {ledger.binding['base']}; erase a concept first")
    place = (args.save_path or args.root / "export") / f"{model.name}-{joined(shifts)}"
    cli.show_export(*export(model, shifts, place, args.format, cli.DTYPES[args.dtype], args.rank, args.share, ledger.prompts, "ledger.py"))


def main() -> None:
    parser = cli.parser(__doc__)
    commands = cli.add_commands(parser, ROOT / "models" / "ledger", init=begin, erase=erase, restore=restore, status=status,
                                history=history, verify=prove, export=write)
    for name in ("init", "erase", "verify", "export"):
        cli.add_model(commands[name])
        cli.add_device(commands[name])
        commands[name].set_defaults(**({} if name == "init" else {"model": None}))
    cli.add_category(commands["init"])
    commands["init"].add_argument("--concepts", default="0-8", help="what may be erased, by index; each shift protects the others")
    commands["init"].add_argument("--protect", nargs="*", default=[], help="further prompts that no shift may move")
    for name in ("erase", "restore"):
        commands[name].add_argument("concept", nargs="+", help="names, or indexes")
    commands["erase"].add_argument("--method", choices=METHODS, default=None, help="(default: the concept's last shift; else SRS-ME)")
    cli.add_settings(commands["erase"], *cli.SETTINGS)
    cli.add_export(commands["export"])
    commands["export"].add_argument("--save_path", type=Path, default=None, help="where to (default: ROOT/export)")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
