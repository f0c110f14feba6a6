"""What SRS-ME starts from, and where nothing is trained stops at: a concept's closed form in its null space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ldm.config.concepts import Concept
from ldm.config.methods import SRSMEConfig
from ldm.diffusion.text_model import TextModel
from ldm.erasure.closed_form import Costs, ErasureSpace, NoProjectionError, closed_form_map, erasure_space
from ldm.erasure.layer_rows import row_weight
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.retain import RetainSet
from ldm.erasure.shift import EmbeddingShift, SeparableShift
from ldm.erasure.targets import anchor_embeds, replaces_name, target_prompts


def initial_shift(
    model: TextModel, concept: Concept, config: SRSMEConfig, basis: NullSpaceBasis, retain: RetainSet
) -> SeparableShift:
    """Return what SRS-ME starts from or stops at: a concept's closed form in `basis`, or zero in its directions.

    Where nothing is trained it is a change of embeddings, which any denoiser of the same text encoder takes.
    """
    anchors = target_prompts(concept, config, model.tokenizers[0])
    target_embeds = model.layer_inputs(model.encode_prompt(list(anchors)))  # (P, rows, d)
    is_zero = config.init == "zero"
    aims = None if is_zero else anchor_embeds(model, anchors, replaces_name(concept, config))
    retain_cost = retain.cost(concept, config, len(target_embeds))
    protected = basis.vectors, basis.protected
    outputs, directions = solve_streams(config, model.streams, protected, target_embeds, aims, retain_cost)
    if outputs is None:
        return SeparableShift.zeros(model.text_layers, directions, config.basis_scale)
    if not config.trains:
        return EmbeddingShift(outputs, directions).on(model.text_layers)
    return separable_shift(model.text_layers, directions, config.basis_scale, outputs)


def solve_streams(
    config: SRSMEConfig,
    streams: Sequence[slice],
    null_basis: tuple[torch.Tensor, torch.Tensor],
    target_embeds: torch.Tensor,
    aims: torch.Tensor | None,
    retain_cost: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the closed form A (d, k) of a concept, None where it has no `aims`, and its directions (k, d), by SRS-ME.

    Each of the `streams`, columns of the rows `target_embeds` (P, rows, d), has its own directions, cost and closed
    form. `null_basis` are the basis and the rows of what is protected. Raises NoProjectionError where the concept has a
    projection on the null space of no stream.
    """
    outputs: list[torch.Tensor] = []
    directions: list[torch.Tensor] = []
    reasons: list[NoProjectionError] = []
    width = target_embeds.shape[-1]
    for columns in streams:
        basis, protected = (rows[:, columns] for rows in null_basis)
        own, around = target_embeds[..., columns], (columns.start, width - columns.stop)
        try:
            space = concept_space(config, basis[basis.any(dim=1)], protected, own, retain_cost[columns, columns])
        except NoProjectionError as error:
            reasons.append(error)
            continue
        directions.append(F.pad(space.directions, around))
        if aims is not None:
            outputs.append(F.pad(closed_form_map(space, own, aims[..., columns]), (0, 0, *around)))
    if not directions:
        raise reasons[0]
    return torch.cat(outputs, dim=1) if outputs else None, torch.cat(directions)


def separable_shift(
    layers: Mapping[str, nn.Linear], directions: torch.Tensor, scale: float, outputs: torch.Tensor
) -> SeparableShift:
    """Return a trainable shift that starts from a closed form: `dW = W A S`, A (d, k) the `outputs`.

    Raises ValueError for a scale with which float32 cannot hold the coefficients.
    """
    coefficients = {}
    for name, layer in layers.items():
        weight = row_weight(layers, name).double() @ (outputs / scale).to(layer.weight.device)  # (out, k)
        coefficients[name] = weight.float()
        if not torch.allclose(coefficients[name].double(), weight, rtol=1e-3, atol=1e-6 * weight.abs().max().item()):
            raise ValueError(f"`basis_scale` {scale:g} makes a shift that float32 cannot hold: choose such as 1e-4")
        coefficients[name].requires_grad_()
    return SeparableShift(coefficients, directions, scale).on(layers)


def concept_space(
    config: SRSMEConfig,
    basis: torch.Tensor,
    protected_rows: torch.Tensor,
    target_embeds: torch.Tensor,
    retain_cost: torch.Tensor,
) -> ErasureSpace:
    """Return `closed_form.erasure_space` for a concept by SRS-ME's settings; `retain_cost` is that of `RetainSet`."""
    costs = Costs(config.ridge_weight, config.preserve_scale, retain_cost)
    return erasure_space(basis, protected_rows, target_embeds, costs, config.max_directions)
