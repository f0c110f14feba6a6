"""Solve for the directions in which a concept can be erased while all protected prompts stay as they are.

They are the null space of the empty prompt, the watermark prompts, what --protect names and the concepts of
--em_indexes (less the erased one itself); concepts that are erased together protect each other. Writes one basis per
erased concept; SRS_ME.py makes the shift in it, and solves for one itself where there is none.
"""

from ldm.cli import arguments, concepts
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    concepts.add_concepts(parser)
    concepts.add_protection(parser)
    arguments.add_model(parser)
    arguments.add_category(parser)
    arguments.add_artifacts(parser)
    arguments.add_null_space(parser)
    arguments.add_device(parser)
    args = parser.parse_args()
    from ldm.cli import devices, erasure, session
    from ldm.config.models import describe_sources, load_model_config
    from ldm.erasure.contradictions import check_contradictions
    from ldm.erasure.protection import Protection, solve_null_spaces

    targets = concepts.named_concepts(args)
    protected, prompts = concepts.named_protection(args, targets)
    device, shard = devices.init_distributed(session.first_device(args))
    model = session.load_model(args, device)
    check_contradictions(model, targets, prompts)
    model_config = load_model_config(model)
    print(describe_sources(model_config, ["null_space"], arguments.spelled))
    config = session.fill_settings(args, model_config.null_space)
    artifacts = session.artifact_paths(args, model.name, "SRS-ME", concepts.category_of(args, targets))
    for summary in solve_null_spaces(model, artifacts, targets, Protection(protected, config, prompts), shard):
        print(erasure.describe_basis(summary))


if __name__ == "__main__":
    run(main)
