"""Solve for the directions in which a concept can be erased while all protected prompts stay as they are.

They are the null space of the empty prompt, the watermark prompts and the concepts of --em_indexes (less the erased one
itself). Writes one basis per erased concept; SRS_ME.py makes the shift in it.
"""

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.config.concepts import get_concept, parse_erase_targets, parse_indexes


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_category(parser)
    parser.option("erased_index", required=True, help="concepts to erase, such as 0 or 0,1,2")
    parser.option("em_indexes", default="", help="concepts to protect, such as 1,2")
    arguments.add_artifacts(parser)
    arguments.add_null_space(parser)
    parser.retire(
        "--protect", "--protect exact is --rank_rtol exact, and --protect spectrum is the model's own: give --rank_rtol"
    )
    arguments.add_device(parser)
    args = parser.parse_args()
    from ldm.cli import devices, session
    from ldm.config.models import describe_sources, load_model_config
    from ldm.erasure.protection import Protection, solve_null_spaces

    targets = parse_erase_targets(args.erased_index, args.category)
    protected = parse_indexes(args.em_indexes, args.category)
    device, shard = devices.init_distributed(session.first_device(args))
    model = session.load_model(args, device)
    model_config = load_model_config(model)
    print(describe_sources(model_config, ["null_space"], arguments.spelled))
    config = session.fill_settings(args, model_config.null_space)
    artifacts = session.artifact_paths(args, model.name, "SRS-ME")
    for summary in solve_null_spaces(
        model, artifacts, targets, Protection([get_concept(args.category, index) for index in protected], config), shard
    ):
        print(
            f"{summary.concept.index} {summary.concept.name}: {summary.num_protected} prompts protected, rank "
            f"{summary.rank} of {summary.width}, "
            f"{summary.nullity} directions free, max leakage {summary.max_leakage:.1e} -> {summary.path}"
        )


if __name__ == "__main__":
    run(main)
