"""Write a page about a ledger: what was erased and restored when, with images before and after.

It has results, curves, leakage, capacity, time and memory, and every command and digest to reproduce it. Generates the
original's images and the edited model's, on the same seeds, and writes one HTML file that needs no network. A scene's
ledger, `sceneN-CATEGORY-METHOD.jsonl` beside its shifts, is one too. Results, leakage and capacity have a row for each
group of prompts that nothing protects: everyday captions, words, kin names, near misses and compositions.
"""

from ldm.cli import arguments
from ldm.cli.experiment import add_evaluation, make_experiment
from ldm.cli.run import run
from ldm.config.methods import EvaluationConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_ledger(parser)
    add_evaluation(parser, "report")
    arguments.add_settings(parser, EvaluationConfig, "unprotected_prompts")
    parser.accept_unused("category", "artifacts_dir", "set", "seed", "num_training_images")
    parser.set_defaults(model=None)
    text = "images of each prompt that the page shows"
    parser.option("num_shown", type=arguments.positive_int, default=4, help=text)
    text = "concepts of which images are made; of a ledger with more as many of each state"
    parser.option("concepts_shown", type=arguments.positive_int, default=24, help=text)
    text = "erased concepts of which robustness.py's probes that train nothing are asked, some minutes each"
    parser.option("num_probed", type=arguments.nonnegative_int, default=0, help=text)
    args = parser.parse_args()
    from ldm.cli import session
    from ldm.cli.reproduce import reproduction_commands
    from ldm.config.models import load_model_config
    from ldm.experiments.report import choose_shown, render_report
    from ldm.io.files import write_text

    ledger = session.ledger_at(args, args.ledger)
    args.category = ledger.category
    experiment = make_experiment(args)
    shown = choose_shown(ledger, args.concepts_shown)
    experiment.extra_prompts = ledger.prompts
    if len(shown) < len(ledger.concepts):
        experiment.only = ["", *ledger.header["protected"], *(concept.prompt for concept in shown)]
    path = args.save_path / "report.html"
    commands = reproduction_commands(ledger, vars(args), load_model_config(experiment.model))
    write_text(path, render_report(ledger, experiment, args.num_shown, commands, shown, args.num_probed))
    print(f"-> {path}")


if __name__ == "__main__":
    run(main)
