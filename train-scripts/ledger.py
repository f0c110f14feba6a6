"""What an owner has erased and given back: VanGogh is out since March, Picasso came back in June; show me; give me the weights.

init begins a ledger in --root: it binds a base model by its digest, the concepts and all that is protected. erase makes a concept's
shift where there is none yet, and switches it on; restore switches it off. status and history say what is and what was, verify
recomputes every digest, and export writes the present weights as Merge_model.py does. A run that was stopped has changed nothing.
"""

from pathlib import Path

from ldm import cli
from ldm.config.concepts import parse_erase_targets
from ldm.io.paths import REPO_ROOT
from ldm.erasure.export import export
from ldm.ledger.ledger import HISTORY_FILE, Ledger, ledger_lock, make_header, status_table
from ldm.ledger.operations import create_shifts, verify
from ldm.erasure.methods import METHODS
from ldm.metrics.tables import to_markdown
from ldm.io.paths import merge_name


def begin(args: cli.Namespace) -> None:
    concepts = parse_erase_targets(args.concepts, args.erase_cat)
    with ledger_lock(args.root):
        if (args.root / HISTORY_FILE).exists():
            raise ValueError(f"{args.root} has a ledger already: give another --root, or go on with erase and restore")
        model = cli.load_model(args, cli.parse_devices(args.device)[0])
        source = {name: str(Path(value).resolve()) if value and Path(value).exists() else value
                  for name, value in vars(args).items() if name in ("model", "ckpt_path", "config_path")}
        ledger = Ledger.create(args.root / HISTORY_FILE, make_header(model, args.erase_cat, concepts, args.protect, source))
    print(f"{len(concepts)} concepts of {model.name}; always protected: the blank prompt, {', '.join(ledger.header['protected'][1:])}")


def erase(args: cli.Namespace) -> None:
    with ledger_lock(args.root):
        ledger, flags = Ledger(args.root / HISTORY_FILE), [name for name in cli.SETTINGS if getattr(args, name) is not None]
        entries, new = ledger.plan_erasure([ledger.concept(name) for name in args.concept], bool(flags or args.method))
        if new:
            (ledger, model), method = cli.open_ledger(args, args.root), args.method or "SRS-ME"
            given = cli.given_settings(args, model.base, method)
            if foreign := [name for name in flags if name not in given]:
                raise ValueError(f"--{foreign[0]} is no setting of {method}, which has {', '.join(given)}")
            entries |= create_shifts(ledger, model, new, method, given, args.data_path)
        if entries:
            ledger.append(entries)
    status(args)


def restore(args: cli.Namespace) -> None:
    with ledger_lock(args.root):
        ledger = Ledger(args.root / HISTORY_FILE)
        back = {ledger.concept(name).index for name in args.concept} & set(ledger.state())
        if back:
            ledger.append({}, back)
    status(args)


def status(args: cli.Namespace) -> None:
    print(to_markdown(status_table(Ledger(args.root / HISTORY_FILE))))


def history(args: cli.Namespace) -> None:
    print("\n".join(Ledger(args.root / HISTORY_FILE).history_lines()))


def prove(args: cli.Namespace) -> None:
    print(to_markdown(verify(*cli.open_ledger(args, args.root))))


def write(args: cli.Namespace) -> None:
    ledger, model = cli.open_ledger(args, args.root)
    shifts = ledger.shifts()
    if not shifts:
        raise ValueError(f"nothing is erased in {args.root}: its weights are those of {ledger.header['base']}; erase a concept first")
    place = (args.save_path or args.root / "export") / f"{model.name}-{merge_name(shifts)}"
    cli.show_export(*export(model, shifts, place, args.format, cli.DTYPES[args.dtype], args.rank, args.share, ledger.prompts, "ledger.py"))


def main() -> None:
    parser = cli.parser(__doc__)
    commands = cli.add_commands(parser, REPO_ROOT / "models" / "ledger", init=begin, erase=erase, restore=restore, status=status,
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
