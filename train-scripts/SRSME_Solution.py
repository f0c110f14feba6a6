"""Solve for the directions in which a concept can be erased while all other prompts stay as they are.

The null space of the blank prompt, the watermark prompts and the concepts of --em_indexes (less the erased one itself).
Writes one basis per erased concept; SRS_ME.py learns the shift in it.
"""

from ldm import cli
from ldm.concepts import parse_erased, parse_indexes
from ldm.erasure import solve
from ldm.model import settings
from ldm.shift import EXACT


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_model(parser)
    cli.add_category(parser)
    parser.add_argument("--erased_index", required=True, help="concepts to erase, such as 0 or 0,1,2")
    parser.add_argument("--em_indexes", default="", help="concepts to protect, such as 1,2")
    cli.add_scene(parser)
    parser.add_argument("--basis", choices=("svd", "elimination"), default=None, help="how to decompose")
    parser.add_argument("--tolerance", type=float, default=None,
                        help=f"relative size of a singular value that counts as zero; {EXACT} is exact")
    cli.add_device(parser)
    args = parser.parse_args()
    erased = parse_erased(args.erased_index, args.erase_cat)
    others = parse_indexes(args.em_indexes, args.erase_cat)
    device = cli.parse_devices(args.device)[0]
    model = cli.load_model(args, device)
    cli.fill(args, settings(model.base).solution)
    store = cli.store(args, model.name, "SRS-ME")
    for concept in erased:
        basis, path = solve(model, store, concept, others, args.tolerance, args.basis), store.basis(concept.index)
        print(f"{concept.index} {concept.name}: {len(basis.recipe['protected'])} prompts protected, rank {basis.recipe['rank']} of "
              f"{basis.recipe['width']}, {len(basis.vectors)} directions free, largest leak "
              f"{basis.recipe['largest_leak']:.1e} -> {path}")


if __name__ == "__main__":
    cli.run(main)
