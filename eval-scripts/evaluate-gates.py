"""Fit a gate for each concept of a list, and measure them all together: false alarms, misses, firmness and cost.

False alarms are counted on everyday captions that no gate is fitted on, on kin names and near misses, on the prompts of
all other concepts of the list, those that are restored apart, and on the captions of any files that are given. A gate
needs the text encoder alone, which --text_encoder gives instead of a model. --ledger_dir measures the gates that are
active in a ledger instead, and makes none: what it knows and has not erased counts as restored. Beside the gates stand
two plain detectors: a filter of keywords, and the gates' decision with the name replaced in the text. A prompt says a
concept where one of its spellings stands in it, in either case; in your own files too, where a name that is written
otherwise ("Van-Gogh", "Vangog") counts as a false alarm if its gate fires. Writes into SAVE_PATH gates.csv, which has a
row for each concept, false_alarms.csv and misses.csv, which have one for each prompt and gate, detectors.csv, and
gates.json.
"""

from pathlib import Path

from ldm.cli import arguments, habits, output
from ldm.cli.run import run
from ldm.config.methods import GateConfig
from ldm.io.paths import REPO_ROOT

GATE_SETTINGS = (  # which decide of gates; others decide what a prompt becomes
    "gate_position",
    "gate_ridge",
    "retain_captions",
    "retain_words",
    "compositions",
    "misspellings",
    "misspelling_clearance",
)
NUM_WORST = 10  # concepts that are printed
NUM_EXAMPLES = 20  # of false alarms, and of misses, that are printed


def print_report(report, detectors):
    """Print the tables of a report, the detectors, and examples of errors."""
    output.show_table(report.counts, "counts")
    output.show_table(report.precision, "precision")
    output.show_table(detectors.set_index("detector").T.rename_axis("detector").reset_index(), "detectors")
    output.show_table(report.concepts[:NUM_WORST], "worst", f"the worst of {len(report.concepts)} concepts:")
    for concept, reason in report.summary["refused"].items():
        print(f"\n{concept} has no gate: {reason}")
    for name, examples in (("false alarms", report.false_alarms), ("misses", report.misses)):
        output.show_table(examples[:NUM_EXAMPLES], name, f"{name}, {len(examples)} in all:")
    summary = report.summary
    if summary["seconds_per_gate"] is not None:
        print(
            f"\nbefore the first gate {summary['seconds_before_gates']:.0f} s, each {summary['seconds_per_gate']:.1f} s"
        )
    print(
        f"\n{summary['seconds_judging']:.0f} s to judge them; a prompt takes {summary['milliseconds_to_embed']:.1f} ms "
        f"to embed, and {summary['milliseconds_of_gates']:.1f} ms for {summary['gates']} gates"
    )


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_model(parser)
    text = "instead, a text encoder by itself: a folder of transformers with its tokenizer and safetensors"
    parser.option("text_encoder", type=Path, default=None, metavar="FOLDER", help=text)
    text = "the list of concepts: a CSV file with the columns name, kind and aliases"
    parser.option("concepts", type=Path, default=REPO_ROOT / "data" / "hundred_names.csv", help=text)
    text = "concepts of the list whose gates are left out, by name: their prompts are a row of the table"
    parser.option("restored", nargs="+", action="extend", default=[], metavar="NAME", help=text)
    text = "further files of captions: a prompt list as CSV, or a text file with one a line"
    parser.option("captions", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help=text)
    text = "a ledger whose gates are measured, instead of gates that are made"
    parser.option("ledger_dir", type=Path, default=None, metavar="FOLDER", help=text)
    parser.option("num_captions", type=arguments.positive_int, default=3000, help="everyday captions")
    arguments.add_settings(parser, GateConfig, *GATE_SETTINGS)
    parser.option("save_path", type=Path, default=REPO_ROOT / "evaluation_folder" / "gates", help="where to write")
    arguments.add_device(parser)
    habits.add_json(parser)
    args = parser.parse_args()
    from ldm.cli.gates import gates_to_measure
    from ldm.experiments.baselines import compare_detectors
    from ldm.experiments.gates import evaluate_gates
    from ldm.experiments.prompt_sets import make_prompt_sets, read_captions
    from ldm.io.files import atomic_write, write_json

    files = read_captions(args.captions)  # before the slow part, so that a mistake is told at once
    model, gates, restored, setup_seconds = gates_to_measure(args)
    made = make_prompt_sets(gates.concepts, args.num_captions, model.tokenizers[0], restored)
    report = evaluate_gates(model, gates, [*made, *files], setup_seconds)
    detectors = compare_detectors(model, gates, report.judged)
    print_report(report, detectors)
    tables = {"gates": report.concepts, "detectors": detectors}
    tables |= {"false_alarms": report.false_alarms, "misses": report.misses}
    for name, table in tables.items():
        with atomic_write(args.save_path / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
    write_json(args.save_path / "gates.json", {"model": model.name, **report.summary})
    print(f"-> {', '.join(f'{name}.csv' for name in tables)} and gates.json in {args.save_path}")


if __name__ == "__main__":
    run(main)
