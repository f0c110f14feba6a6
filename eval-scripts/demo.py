"""Serve a live page about a ledger: a prompt's image by the original, by the edited model, and how they differ.

It is seen on this machine alone unless --share is given, which asks every visitor for a password: a new one that is
printed, or the one in the environment variable SRSME_PAGE_PASSWORD. Each visitor chooses which concepts are erased;
that changes no weights that others see, and nothing in the ledger. A button exports the weights of that choice.

--owner adds buttons that write to the ledger, for whoever opens the page. Without it nothing that the page's server
answers can write there.
"""

import os
import secrets

from ldm.cli import arguments, output
from ldm.cli.run import run

PASSWORD_VARIABLE, MIN_PASSWORD_CHARS = "SRSME_PAGE_PASSWORD", 12


def login(share: bool, owner: bool = False) -> tuple[str, str] | None:
    """Return the user and password that the page asks for, the latter new unless the environment has one; or None."""
    user = "owner" if owner else "visitor"
    password = os.environ.get(PASSWORD_VARIABLE)
    if password is not None and len(password) < MIN_PASSWORD_CHARS:
        raise ValueError(
            f"{PASSWORD_VARIABLE} has {len(password)} characters: give at least {MIN_PASSWORD_CHARS}, or unset it"
        )
    if password is None and share:
        password = secrets.token_urlsafe(16)
        output.show_answer(f"the page asks for user {user}, password {password}")
    return (user, password) if password else None


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_ledger(parser)
    arguments.add_model(parser, default=None)
    parser.option("port", type=arguments.positive_int, default=7860, help="of the page")
    parser.option("share", action="store_true", help="let others in, by a public address of Gradio's and a password")
    parser.option("owner", action="store_true", help="add buttons that erase and restore in the ledger itself")
    arguments.add_training_images(parser)
    arguments.add_device(parser)
    args = parser.parse_args()
    auth = login(args.share, args.owner)
    from ldm.cli import session
    from ldm.ledger.demo import DemoSession
    from ldm.ledger.owner import Owner
    from ldm.ledger.page import serve

    ledger, model = session.open_ledger(args, args.ledger)
    demo = DemoSession(ledger, model, lambda: session.load_model(args, model.device))
    if not demo.state.shifts and not args.owner:
        advice = f"python train-scripts/ledger.py erase CONCEPT --ledger_dir {args.ledger}"
        raise ValueError(f"nothing was ever erased in {args.ledger}: {advice}")
    owner = Owner(demo, args.training_image_dir) if args.owner else None
    serve(demo, args.port, auth, args.share, owner, lambda address: output.show_answer(f"the page is at {address}"))


if __name__ == "__main__":
    run(main)
