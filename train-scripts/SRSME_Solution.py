"""Solve for the directions in which a concept can be erased while all other prompts stay as they are.

The null space of the blank prompt, the watermark prompts and the concepts of --em_indexes (less the erased one itself).
Writes one basis per erased concept; SRS_ME.py learns the shift in it.
"""

from ldm import cli
from ldm.config.concepts import parse_erase_targets, parse_indexes
from ldm.erasure.erase import solve_null_spaces
from ldm.config.models import load_model_config
from ldm.erasure.null_space import EXACT_TOLERANCE


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_model(parser)
    cli.add_category(parser)
    parser.add_argument("--erased_index", required=True, help="concepts to erase, such as 0 or 0,1,2")
    parser.add_argument("--em_indexes", default="", help="concepts to protect, such as 1,2")
    cli.add_scene(parser)
    parser.add_argument("--basis", choices=("svd", "elimination"), default=None, help="how to decompose")
    parser.add_argument("--protect", choices=("exact", "spectrum"), default=None, help=f"exact: tolerance {EXACT_TOLERANCE}; spectrum: --tolerance, "
                        "or the model's config's, which leaves more room at a leak that is reported")
    parser.add_argument("--tolerance", type=float, default=None,
                        help="relative size of a singular value that counts as zero (default: the model's config)")
    parser.add_argument("--templates", type=cli.from_zero, default=None,
                        help="caption templates to protect beside each bare name (default: the model's config)")
    parser.add_argument("--always", type=cli.positive_number, default=None, help="weight of the blank prompt and the watermarks, "
                        "which are always protected, against that of a concept (default: the model's config)")
    cli.add_device(parser)
    args = parser.parse_args()
    if args.protect == "exact":
        if args.tolerance is not None:
            raise ValueError(f"--protect exact is --tolerance {EXACT_TOLERANCE}: give one of the two, or --protect spectrum")
        args.tolerance = EXACT_TOLERANCE
    erased = parse_erase_targets(args.erased_index, args.erase_cat)
    others = parse_indexes(args.em_indexes, args.erase_cat)
    device, share = cli.join(cli.parse_devices(args.device)[0])
    model = cli.load_model(args, device)
    cli.fill(args, load_model_config(model.base).solution)
    store = cli.store(args, model.name, "SRS-ME")
    for concept, basis in solve_null_spaces(model, store, erased, others, args.tolerance, args.basis, args.templates, args.always, share):
        print(f"{concept.index} {concept.name}: {len(basis.metadata['protected'])} prompts protected, rank {basis.metadata['rank']} of "
              f"{basis.metadata['width']}, {len(basis.vectors)} directions free, largest leak "
              f"{basis.metadata['largest_leak']:.1e} -> {store.basis(concept.index)}")


if __name__ == "__main__":
    cli.run(main)
