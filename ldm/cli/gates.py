"""The gates that a script measures: those of a ledger, or new ones of a list of concepts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ldm.cli import arguments, session
from ldm.cli.arguments import MODEL_ARGUMENTS, Namespace
from ldm.config.concept_lists import read_concepts, split_restored
from ldm.config.concepts import Concept
from ldm.config.methods import GateConfig

if TYPE_CHECKING:
    from ldm.diffusion.text_encoder import PromptEncoder
    from ldm.experiments.gates import FittedGates

    Measured = tuple[PromptEncoder, FittedGates, list[Concept], float]


def gates_to_measure(args: Namespace) -> Measured:
    """Return a model or text encoder, gates for it, the concepts that are restored, and the seconds before the gates.

    Raises ValueError for arguments of gates that are made beside a ledger, whose gates are there.
    """
    return _of_ledger(args) if args.ledger_dir is not None else _of_list(args)


def _of_ledger(args: Namespace) -> Measured:
    from ldm.experiments.gates import active_gates

    settings = arguments.typed_settings(args, GateConfig)
    unused = [*settings, *(name for name in ("text_encoder", "concepts", "restored") if name in arguments.typed)]
    if unused:
        raise ValueError(f"`{unused[0]}` is for gates that are made, and `ledger_dir` measures those that are there")
    if not any(name in arguments.typed for name in MODEL_ARGUMENTS):
        args.model = None  # so that it is the ledger's
    ledger, model = session.open_ledger(args, args.ledger_dir)
    gates = active_gates(ledger)
    erased = ledger.active_shifts()
    return model, gates, [concept for concept in ledger.concepts if concept.label not in erased], 0.0


def _of_list(args: Namespace) -> Measured:
    from ldm.erasure.gate_fitters import make_gate_fitter
    from ldm.experiments.gates import fit_gates

    concepts = read_concepts([str(args.concepts)])
    erased, restored = split_restored(concepts, args.restored)
    model, config = _load_encoder(args)
    start = time.perf_counter()
    fitter = make_gate_fitter(model, concepts, [], config)
    seconds = time.perf_counter() - start
    return model, fit_gates(fitter, erased), restored, seconds


def _load_encoder(args: Namespace) -> tuple[PromptEncoder, GateConfig]:
    """Return the model or the text encoder that the arguments name, and its settings of gates."""
    from ldm.config.models import load_model_config
    from ldm.diffusion.load_text import load_text_model
    from ldm.diffusion.text_encoder import load_text_encoder

    device = session.first_device(args)
    if args.text_encoder is not None:
        if "model" in arguments.typed or "ckpt_path" in arguments.typed:
            raise ValueError("`text_encoder` is given instead of a model: leave out `model` and `ckpt_path`")
        if (args.text_encoder / "model_index.json").is_file():  # a model's folder, of which nothing else is read
            text_model = load_text_model(args.text_encoder, device)
            return text_model, session.fill_settings(args, load_model_config(text_model).gate)
        return load_text_encoder(args.text_encoder, device), session.fill_settings(args, GateConfig())
    model = session.load_model(args, device)
    return model, session.fill_settings(args, load_model_config(model).gate)
