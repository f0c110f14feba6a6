"""What SRS-ME starts from, and where nothing is trained stops at: a concept's closed form in its null space."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ldm.config.concepts import Concept
from ldm.config.methods import SRSMEConfig
from ldm.diffusion.text_model import TextModel
from ldm.erasure.closed_form import Costs, ErasureSpace, closed_form_map, erasure_space
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
    target_embeds = model.drop_pooled(model.encode_prompt(list(anchors)))  # (P, tokens, d)
    retain_cost = retain.cost(concept, config, len(target_embeds))
    space = concept_space(config, basis.vectors, basis.protected, target_embeds, retain_cost)
    if config.init == "zero":
        return SeparableShift.zeros(model.text_layers, space.directions, config.basis_scale)
    outputs = closed_form_map(space, target_embeds, anchor_embeds(model, anchors, replaces_name(concept, config)))
    if not config.trains:
        return EmbeddingShift(outputs, space.directions).on(model.text_layers)
    return separable_shift(model.text_layers, space.directions, config.basis_scale, outputs)


def separable_shift(
    layers: Mapping[str, nn.Linear], directions: torch.Tensor, scale: float, outputs: torch.Tensor
) -> SeparableShift:
    """Return a trainable shift that starts from a closed form: `dW = W A S`, A (d, k) the `outputs`.

    Raises ValueError for a scale with which float32 cannot hold the coefficients.
    """
    coefficients = {}
    for name, layer in layers.items():
        weight = layer.weight.double() @ (outputs / scale).to(layer.weight.device)  # (out, k)
        coefficients[name] = weight.float()
        if not torch.allclose(coefficients[name].double(), weight, rtol=1e-3, atol=1e-6 * weight.abs().max().item()):
            raise ValueError(f"`basis_scale` {scale:g} makes a shift that float32 cannot hold: choose such as 1e-4")
        coefficients[name].requires_grad_()
    return SeparableShift(coefficients, directions, scale)


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
