"""Ask what an erasure is worth: is the concept gone, or only hidden, and what became of everything else?

Every method erases the concepts of --erased_index and those of --restored, whose shifts are then left out. Each is
asked by every probe, beside the unedited model and a floor: what is found where the concept was never learnt, or is not
asked for. With --shifts these are asked instead, all together, about the concepts that they say they erase, a user's
own too; --methods beside it compares methods with them.
Shares have Wilson's interval of 95 %. SRS-ME is there gated, linear, and trained. Writes robustness.csv (every
finding), .md and .png, and detection.md (gates beside a filter of keywords) into SAVE_PATH/CATEGORY, of --shifts into
the folder of their merge in it. The same command resumes a stopped run: shifts, images, and what attacks learn are made
once.
"""

from pathlib import Path

from ldm.cli import arguments, output
from ldm.cli.experiment import add_experiment, add_targets, make_experiment
from ldm.cli.robustness import (
    check_arguments,
    chosen_probes,
    make_bench,
    make_contenders,
    make_subjects,
    what_is_asked,
    write_detection,
)
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
    arguments.add_shifts(parser, purpose="ask about", without="methods")
    arguments.add_scene(parser)
    parser.option("methods", default="SRS-ME,UCE,AbConcept,ESD", help=f"of {', '.join(METHODS)}")
    text = "concepts that are erased too and then restored, by index or name in --category (default: 2, if there is "
    text += "one), or those of --shifts whose shifts are left out (default: none)"
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
    check_arguments(args)
    import pandas as pd

    from ldm.erasure.merge import describe_forms
    from ldm.experiments.probe import UNEDITED
    from ldm.experiments.robustness import ask, ask_floor

    probes = chosen_probes(args)
    experiment = make_experiment(args)
    asked = what_is_asked(args, experiment)
    (asked.folder / "detection.md").unlink(missing_ok=True)  # of a run that asked of gates
    bench, contenders = make_bench(args, experiment, asked), make_contenders(args, experiment, asked)
    tables = [*ask_floor(bench, probes), *ask(bench, UNEDITED, probes)]
    number = len(asked.subjects) + len(contenders)
    for position, subject in enumerate(make_subjects(args, experiment, asked, contenders), start=1):
        print(f"{position} of {number}: {subject.name}, {describe_forms(subject.shifts, subject.form)}", flush=True)
        tables += ask(bench, subject, probes)
        write(pd.concat(tables, ignore_index=True), asked.folder / "robustness")
        # Of gates that a user names it tells alone, and of SRS-ME's where there are none.
        if subject.form == "gated" and (subject in asked.subjects or not asked.subjects):
            write_detection(bench, subject.shifts, args.meanings, asked.folder / "detection.md")


if __name__ == "__main__":
    run(main)
