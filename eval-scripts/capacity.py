"""Measure how many concepts fit: what the protected prompts leave free at several tolerances, and what each costs.

Erases every concept of --erased_index, or of --concepts, in closed form, each by its own shift that protects all the
others, the empty prompt and the watermarks, without generating anything. Writes SAVE_PATH/capacity.csv and .png, and
leakage.csv with the leakage on every protected prompt and held-out template, and on some prompts of each group that
nothing protects: everyday captions, words, kin names, near misses and compositions. Where shifts act by gates (--form)
it fits these too, and tells how many fit before any fires for too many everyday captions: gates.csv has each gate.
"""

from pathlib import Path

from ldm.cli import arguments, concepts, habits, output
from ldm.cli.run import run
from ldm.config.concepts import EMPTY_PROMPT_LABEL, always_protected_prompts, erasable_concepts
from ldm.config.everyday import everyday_captions, sample_unprotected
from ldm.config.methods import EditConfig, EvaluationConfig, NullSpaceConfig
from ldm.io.paths import REPO_ROOT

SPECTRUM_NUMBERS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # of the singular values that are printed, beside the last
CAPTION_SEED = 1  # those of 0 are what a gate's own report counts
NUM_PROMPTS = 20  # that are printed, those with the largest leakage


def leakage_summary(leakage):
    """Return the protected and held-out prompts with the largest leakage, with a column for each tolerance."""
    leakage = leakage[leakage.group.isin(("protected", "held_out"))]
    wide = leakage.pivot(index="prompt", columns="tolerance", values="leakage")
    largest = wide.max(axis=1).sort_values(ascending=False).index[:NUM_PROMPTS]
    summary = wide.loc[largest].rename(index={"": EMPTY_PROMPT_LABEL}).reset_index()
    summary.columns = ["prompts with the largest leakage", *(f"leakage at {tolerance:g}" for tolerance in wide.columns)]
    return summary


def measure_gates(model, listed, others, args, config):
    """Return `measure_gate_capacity` of the concepts that are listed, by captions that no gate is fitted on."""
    from ldm.erasure.gate_fitters import make_gate_fitter
    from ldm.experiments.gate_capacity import measure_gate_capacity
    from ldm.experiments.gates import fit_gates

    gates = fit_gates(make_gate_fitter(model, others, [], config), listed)
    return measure_gate_capacity(model, gates, everyday_captions(args.num_captions, CAPTION_SEED))


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_category(parser)
    text = "all concepts that will ever be erased, by index such as 0-8, or by name in --category"
    parser.option("erased_index", nargs="+", default=[], help=text)
    concepts.add_own_concepts(parser, "instead of --erased_index, concepts")
    text = "what counts as zero, relatively, such as 1e-7,1e-3 (default: six from 1e-7 to 2e-2)"
    parser.option("tolerances", default=None, help=text)
    arguments.add_settings(parser, NullSpaceConfig, "protected_templates")
    arguments.add_settings(parser, EvaluationConfig, "unprotected_prompts")
    arguments.add_settings(parser, EditConfig, "form")
    parser.option("num_captions", type=arguments.positive_int, default=3000, help="everyday captions for gates")
    parser.option("save_path", type=Path, default=REPO_ROOT / "evaluation_folder" / "capacity", help="where to write")
    arguments.add_device(parser)
    habits.add_json(parser)
    args = parser.parse_args()
    erased = concepts.listed_concepts(args)
    tolerances = arguments.parse_numbers(args.tolerances, "tolerances", 1) if args.tolerances is not None else []
    if not all(0 < tolerance < 1 for tolerance in tolerances):
        raise ValueError(f"`tolerances` {args.tolerances}: give numbers between 0 and 1, such as 1e-7,1e-3")
    from ldm.cli import session
    from ldm.config.models import load_model_config
    from ldm.erasure.capacity import DEFAULT_TOLERANCES, FurtherPrompts, measure_capacity, summarize_groups
    from ldm.experiments.plots import plot_spectrum
    from ldm.io.files import atomic_write
    from ldm.metrics.tables import to_markdown

    model = session.load_model(args, session.first_device(args))
    config = load_model_config(model)
    null_space = session.fill_settings(args, config.null_space)
    tolerances = sorted(tolerances) or DEFAULT_TOLERANCES
    evaluation = session.fill_settings(args, config.evaluation)
    protected = always_protected_prompts()
    unprotected = sample_unprotected(args.category, evaluation.unprotected_prompts, protected)
    others = erasable_concepts(args.category) if args.erased_index else erased
    further = FurtherPrompts((), unprotected, others)
    report = measure_capacity(model, erased, null_space, tolerances, config.methods["SRS-ME"], further)
    values = report.singular_values.tolist()
    shown = [*(number for number in SPECTRUM_NUMBERS if number <= len(values)), len(values)]
    print("spectrum: " + ", ".join(f"{number}: {values[number - 1]:.1e}" for number in shown))
    for name, table in (("capacity", report.table), ("leakage", report.leakage)):
        with atomic_write(args.save_path / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
    plot_spectrum(values, report.table, args.save_path / "capacity.png")
    output.show_table(report.table, "capacity")
    output.show_table(leakage_summary(report.leakage), "prompts")
    by_group = report.leakage.groupby(["group", "tolerance"], sort=False)["leakage"].agg(["median", "max"])
    output.show_tables(to_markdown(summarize_groups(report.leakage)), {"groups": by_group.reset_index()})
    if session.fill_settings(args, config.edit).form == "gated":
        gates = measure_gates(model, erased, others, args, config.gate)
        with atomic_write(args.save_path / "gates.csv") as partial:
            gates.gates.to_csv(partial, index=False)
        output.show_table(gates.table.fillna("no limit seen"), "gates")
    print(f"-> {', '.join(sorted(path.name for path in args.save_path.iterdir()))} in {args.save_path}")


if __name__ == "__main__":
    run(main)
