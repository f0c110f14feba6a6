"""Serve a live page about a ledger: a prompt's image by the original, by the edited model, and how they differ.

It is seen on this machine alone unless --share is given, which asks every visitor for a password: a new one that is
printed, or the one in the environment variable SRSME_PAGE_PASSWORD. Each visitor chooses which concepts are erased;
that changes no weights that others see, and nothing in the ledger. A button exports the weights of that choice.
"""

import os
import secrets

from ldm.cli import arguments, output
from ldm.cli.run import run

PASSWORD_VARIABLE, MIN_PASSWORD_CHARS = "SRSME_PAGE_PASSWORD", 12


def login(share: bool) -> tuple[str, str] | None:
    """Return the user and password that the page asks for, the latter new unless the environment has one; or None."""
    password = os.environ.get(PASSWORD_VARIABLE)
    if password is not None and len(password) < MIN_PASSWORD_CHARS:
        raise ValueError(
            f"{PASSWORD_VARIABLE} has {len(password)} characters: give at least {MIN_PASSWORD_CHARS}, or unset it"
        )
    if password is None and share:
        password = secrets.token_urlsafe(16)
        output.show_answer(f"the page asks for user visitor, password {password}")
    return ("visitor", password) if password else None


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_ledger(parser)
    arguments.add_model(parser, default=None)
    parser.option("port", type=arguments.positive_int, default=7860, help="of the page")
    parser.option("share", action="store_true", help="let others in, by a public address of Gradio's and a password")
    arguments.add_device(parser)
    args = parser.parse_args()
    auth = login(args.share)
    from ldm.cli import session
    from ldm.config.models import load_model_config
    from ldm.ledger.demo import DemoSession
    from ldm.ledger.page import serve

    ledger, model = session.open_ledger(args, args.ledger)
    demo = DemoSession(ledger, model, lambda: session.load_model(args, model.device))
    if not demo.state.shifts:
        advice = f"python train-scripts/ledger.py erase CONCEPT --ledger_dir {args.ledger}"
        raise ValueError(f"nothing was ever erased in {args.ledger}: {advice}")
    serve(demo, load_model_config(model).sampling, args.port, auth, args.share)


if __name__ == "__main__":
    run(main)
