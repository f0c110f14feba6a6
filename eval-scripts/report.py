"""A page about a ledger: what was erased and given back when, before and after, results, curves, leaks, capacity, time and memory, and
every command and digest to make it again.

Draws the original's pictures and the present state's, on the same seeds, and writes one HTML file that needs no network. A scene's
ledger, `sceneN-CATEGORY-METHOD.jsonl` beside its shifts, is one too.
"""

from pathlib import Path

from ldm import cli, cli_experiment
from ldm.io.paths import REPO_ROOT
from ldm.io.files import write_text
from ldm.experiments.report import render_report


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("ledger", type=Path, nargs="?", default=REPO_ROOT / "models" / "ledger", help="a ledger's folder, or its .jsonl file")
    cli_experiment.add_experiment(parser, "report")
    parser.set_defaults(model=None)
    parser.add_argument("--num_shown", type=cli.positive, default=4, help="pictures of each prompt that the page shows")
    args = parser.parse_args()
    ledger = cli.ledger_at(args, args.ledger)
    args.erase_cat = ledger.header["erase_cat"]
    tried = cli_experiment.experiment(args)
    tried.also = ledger.header["protected"]
    write_text(args.save_path / "report.html", render_report(ledger, tried, args.num_shown))
    print(f"-> {args.save_path / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
