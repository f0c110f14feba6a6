"""Ask what an erasure is worth: is the concept gone, or only hidden, and what became of everything else?

Every method erases the concepts of --erased_index and those of --restored, whose shifts are then left out. Each is
asked by every probe, beside the unedited model and a floor: what is found where the concept was never learnt, or is not
asked for.
Shares have Wilson's interval of 95 %. SRS-ME is there gated, linear, and trained. Writes robustness.csv (every
finding), .md and .png, and detection.md (gates beside a filter of keywords) into SAVE_PATH/CATEGORY. The same command
resumes a stopped run: shifts, images, and what attacks learn are made once.
"""

from pathlib import Path

from ldm.cli import arguments, output
from ldm.cli.experiment import (
    add_experiment,
    add_targets,
    artifacts_dir,
    make_experiment,
    method_configs,
    parse_methods,
    target_indexes,
    trainable_methods,
)
from ldm.cli.robustness import chosen_probes, make_bench, restored_indexes, write_detection
from ldm.cli.run import run
from ldm.config.meanings import PATH as MEANINGS
from ldm.config.methods import METHODS
from ldm.config.robustness import HardPromptConfig, RelearningConfig, SoftPromptConfig


def write(findings, path: Path) -> None:
    """Write all findings, their summary and the plot, and print the summary."""
    from ldm.experiments.plots import plot_robustness
    from ldm.experiments.robustness import compare_findings, summarize, summary_markdown
    from ldm.io.files import atomic_write, write_text

    table = compare_findings(findings)
    if not len(table):
        return
    with atomic_write(path.with_suffix(".csv")) as partial:
        findings.to_csv(partial, index=False)
    summary = summarize(table)
    text = summary_markdown(summary)
    write_text(path.with_suffix(".md"), text + "\n")
    plot_robustness(table, path.with_suffix(".png"))
    output.show_tables(text, {"": summary})
    print(f"-> {path}.png, .md, .csv")


def main() -> None:
    parser = arguments.make_parser(__doc__)
    add_experiment(parser, "robustness")
    add_targets(parser, "1")
    parser.option("methods", default="SRS-ME,UCE,AbConcept,ESD", help=f"of {', '.join(METHODS)}")
    text = (
        "concepts that are erased too and then restored, by index or name in --category (default: 2, if there is one)"
    )
    parser.option("restored", nargs="*", default=None, help=text)
    parser.option("images", type=arguments.positive_int, default=16, help="of each finding, about")
    parser.option("probes", default="", help="which of them, by the beginning of their names, such as prompts,soft")
    text = "images of what the model never learnt, for the floor of attacks (default: woodcuts)"
    parser.option("unlearnt_dir", type=Path, default=None, help=text)
    for kind in (SoftPromptConfig, HardPromptConfig, RelearningConfig):
        arguments.add_settings_with_defaults(parser, kind())
    text = "prompts that mean concepts, and near misses, in a file like this one"
    parser.option("meanings", type=Path, default=MEANINGS, help=text)
    parser.option("quick", action="store_true", help="leave out the probes that train something")
    parser.option("clip_path", type=Path, default=None, help="a folder with CLIP, which judges instead of a classifier")
    args = parser.parse_args()
    methods, erased = parse_methods(args.methods), target_indexes(args)
    restored = restored_indexes(args, erased)
    if "form" in arguments.typed:
        raise ValueError("`form`: both forms are asked here, so leave it out")
    import pandas as pd

    from ldm.erasure.merge import describe_forms
    from ldm.experiments.methods import MethodComparison
    from ldm.experiments.probe import UNEDITED, Subject
    from ldm.experiments.robustness import ask, ask_floor, robustness_contenders

    probes = chosen_probes(args)
    experiment = make_experiment(args)
    bench = make_bench(args, experiment, erased, restored)
    configs = method_configs(args, experiment)
    contenders = robustness_contenders(trainable_methods(experiment, methods, configs), configs)
    comparison = MethodComparison(experiment, artifacts_dir(args), [*erased, *restored], {}, None)
    path = args.save_path / args.category / "robustness"
    tables = [*ask_floor(bench, probes), *ask(bench, UNEDITED, probes)]
    for number, contender in enumerate(contenders, start=1):
        shifts, _ = comparison.erase(contender)
        left = {label: shift for label, shift in shifts.items() if int(label) in erased}
        form = describe_forms(left, contender.form)
        print(f"{number} of {len(contenders)}: {contender.name}, {form}", flush=True)
        tables += ask(bench, Subject(contender.name, left, contender.form), probes)
        write(pd.concat(tables, ignore_index=True), path)
        if contender.form == "gated":
            write_detection(bench, left, args.meanings, path.with_name("detection.md"))


if __name__ == "__main__":
    run(main)
