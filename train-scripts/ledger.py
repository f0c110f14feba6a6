"""What an owner has erased and restored: VanGogh erased since March, Picasso until June; show me; give me the weights.

init begins a ledger in --ledger_dir: it names a base model by its digest, the concepts, by text, file or index, and all
that is protected; add takes in further concepts. erase makes a concept's shift where there is none yet, and activates
it; restore deactivates it; both take names, files of names, or all. status and history say what is and what was, verify
recomputes every digest, and export writes the present weights as Merge_model.py does. A run that was stopped has
changed nothing. repair cuts off a last line that was torn, as by a copy that was broken off; migrate writes a ledger of
an older version as one of today's, which no list of concepts can change.
"""

from pathlib import Path

from ldm.cli import arguments, habits, ledger
from ldm.cli.concepts import add_concepts, add_retain
from ldm.cli.run import run
from ldm.config.methods import METHODS, EditConfig, GateConfig
from ldm.io.paths import REPO_ROOT


def main() -> None:
    parser = arguments.make_parser(__doc__)
    runs = {
        "init": ledger.init,
        "add": ledger.add,
        "erase": ledger.erase,
        "restore": ledger.restore,
        "status": ledger.status,
        "history": ledger.history,
        "verify": ledger.verify,
        "repair": ledger.repair,
        "migrate": ledger.migrate,
        "export": ledger.export,
    }
    commands = arguments.add_commands(parser, REPO_ROOT / "models" / "ledger", **runs)
    for name in ("init", "add", "erase", "verify", "export"):
        arguments.add_model(commands[name], str(arguments.DEFAULT_MODEL) if name == "init" else None)
        arguments.add_device(commands[name])
    for name in ("erase", "restore", "status", "verify", "export"):
        habits.add_json(commands[name])
    arguments.add_category(commands["init"])
    add_concepts(commands["init"], erased_index="0-8")
    add_concepts(commands["add"])
    text = "further prompts that every shift protects, each a text, or a file: .txt with one a line, .csv, .yaml"
    commands["init"].option("protect", nargs="*", default=[], metavar="TEXT|FILE", help=text)
    add_retain(commands["init"])
    for name in ("erase", "restore"):
        commands[name].add_argument("concept", nargs="+", help="names, files of names, indexes, or all")
    commands["erase"].option(
        "method", choices=METHODS, default=None, help="(default: the concept's last shift; else SRS-ME)"
    )
    for kind in METHODS.values():
        arguments.add_settings(commands["erase"], kind)
    arguments.add_null_space(commands["erase"])
    arguments.add_settings(commands["erase"], GateConfig)
    arguments.add_settings(commands["erase"], EditConfig, "least_effect")
    arguments.add_training_images(commands["erase"])
    arguments.add_export(commands["export"])
    commands["export"].option("save_path", type=Path, default=None, help="where to (default: LEDGER_DIR/export)")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run(main)
