"""Each loss is its paper's formula, and its gradient reaches what it trains and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU

from ldm.config.concepts import get_concept
from ldm.config.methods import METHODS, SRSMEConfig
from ldm.diffusion.edits import attention_score_differences
from ldm.diffusion.load import load_model
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.losses import (
    AblatingConceptsLoss,
    ESDLoss,
    ForgetMeNotLoss,
    FullCorrelationLoss,
    JointSRSMELoss,
    SRSMELoss,
)
from ldm.erasure.merge import applied
from ldm.erasure.methods import LOSSES, SOLVERS
from ldm.erasure.shift import DenseShift, SeparableShift


def make_srs_me(model, l1_weight=1e-3, prompt="VanGogh"):
    directions = torch.linalg.qr(torch.randn(96, 5, dtype=torch.float64)).Q.T
    shift = SeparableShift.zeros(text_layers(model.denoiser), directions, 0.5)
    loss = SRSMELoss(model, shift, model.encode_prompt([prompt]), model.encode_prompt([""]), l1_weight)
    return shift, loss


def test_srs_me_is_the_papers_formula(tiny):
    shift, loss = make_srs_me(tiny)
    for weight in shift.parameters():
        torch.nn.init.normal_(weight.data, std=0.1)
    latents, timestep = torch.randn(2, *tiny.latent_shape), torch.tensor([100, 700])
    output = loss(latents, timestep)
    target, uncond = (tiny.encode_prompt([prompt]).expand(2, -1, -1) for prompt in ("VanGogh", ""))
    frozen = tiny.predict_noise(latents, timestep, target) - tiny.predict_noise(latents, timestep, uncond)
    with applied(tiny.denoiser, [shift]):
        shifted = tiny.predict_noise(latents, timestep, target)
    edited = shifted - tiny.predict_noise(latents, timestep, uncond)
    correlation = (edited * frozen).mean()
    layers = text_layers(tiny.denoiser)
    size = sum(shift.delta_weight(f"{name}.weight").abs().sum() for name in layers) / len(layers)
    assert output.monitor.item() == pytest.approx(correlation.item(), abs=1e-5)
    assert output.loss.item() == pytest.approx((correlation + 1e-3 * size).item(), rel=1e-4)


def test_only_the_shift_gets_gradients_and_a_zero_shift_starts_at_the_squared_representation(tiny):
    shift, loss = make_srs_me(tiny, l1_weight=0.0)
    output = loss(torch.randn(2, *tiny.latent_shape), torch.tensor([100, 700]))
    output.loss.backward()
    assert output.monitor > 0
    assert all(weight.grad.abs().sum() > 0 for weight in shift.parameters())
    assert all(parameter.grad is None for parameter in tiny.denoiser.parameters())


def make_batch(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *model.latent_shape, generator=generator), torch.tensor([100, 700])


def perturb(loss):
    """Return the loss with its student's weights no longer those of the base."""
    generator = torch.Generator().manual_seed(1)
    for weight in loss.student.values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return loss


def predict(model, prompt, latents, timestep, loss=None):
    """Return what the frozen model, or the student of a loss, predicts under a prompt."""
    with torch.no_grad(), applied(model.denoiser, [loss.to_shift()] if loss else []):
        return model.predict_noise(latents, timestep, model.encode_prompt([prompt]).expand(2, -1, -1))


def embed(model, *prompts):
    return [model.encode_prompt([prompt]) for prompt in prompts]


def test_ablating_concepts_is_its_formula(tiny):
    loss = perturb(AblatingConceptsLoss(tiny, *embed(tiny, "VanGogh painting", "painting")))
    latents, timestep = make_batch(tiny)
    target = predict(tiny, "painting", latents, timestep)
    expected = F.mse_loss(predict(tiny, "VanGogh painting", latents, timestep, loss), target)
    expected += 10 * F.mse_loss(predict(tiny, "painting", latents, timestep, loss), target)
    assert loss(latents, timestep).loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_esd_regresses_on_the_negatively_guided_noise_of_the_frozen_model(tiny):
    loss = perturb(ESDLoss(tiny, *embed(tiny, "VanGogh painting", ""), 0.7))
    latents, timestep = make_batch(tiny)
    uncond, cond = (predict(tiny, prompt, latents, timestep) for prompt in ("", "VanGogh painting"))
    target = uncond - 0.7 * (cond - uncond)
    assert torch.allclose(loss.target(latents, timestep), target, atol=1e-5)  # whatever the student has become
    expected = F.mse_loss(predict(tiny, "VanGogh painting", latents, timestep, loss), target)
    assert loss(latents, timestep).loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_esds_first_loss_is_the_guided_difference(tiny):
    """Before any iteration the student is the base: eps(c) - target = (1 + eta) (eps(c) - eps(""))."""
    loss = ESDLoss(tiny, *embed(tiny, "VanGogh painting", ""), 1.0)
    latents, timestep = make_batch(tiny)
    difference = predict(tiny, "VanGogh painting", latents, timestep) - predict(tiny, "", latents, timestep)
    assert loss(latents, timestep).loss.item() == pytest.approx(4 * difference.square().mean().item(), rel=1e-4)


def test_fmn_is_zero_when_both_prompts_are_the_same_and_reaches_queries_and_keys(tiny):
    latents, timestep = make_batch(tiny)
    same = perturb(ForgetMeNotLoss(tiny, *embed(tiny, "painting", "painting")))
    assert same(latents, timestep).loss.item() < 1e-12
    loss = ForgetMeNotLoss(tiny, *embed(tiny, "VanGogh painting", "painting"))
    output = loss(latents, timestep)
    output.loss.backward()
    assert output.loss > 1e-9
    changed = {name for name, weight in loss.student.items() if weight.grad is not None and weight.grad.any()}
    assert any("to_k" in name for name in changed) and any("to_q" in name for name in changed)
    later = [name for name in loss.student if name.startswith("up_blocks") and ("to_v" in name or "to_out" in name)]
    assert not changed & set(later[-3:])  # the last layer's values and output feed no later layer's scores


def test_fmns_differences_are_those_of_the_layers_scores(tiny):
    latents, timestep = make_batch(tiny)
    target, anchor = embed(tiny, "VanGogh painting", "painting")
    layer = next(module for name, module in tiny.denoiser.named_modules() if name.endswith("attn2"))
    queries = []
    hook = layer.to_q.register_forward_hook(lambda _, inputs, output: queries.append(output))
    with attention_score_differences(tiny.denoiser, anchor) as differences:
        predict(tiny, "VanGogh painting", latents, timestep)
    hook.remove()
    query = layer.head_to_batch_dim(queries[0])
    keys = [layer.head_to_batch_dim(layer.to_k(embeds.expand(2, -1, -1))) for embeds in (target, anchor)]
    scores = [(layer.scale * query @ key.transpose(1, 2)) for key in keys]
    assert torch.allclose(differences[0], scores[0] - scores[1], atol=1e-5)
    in_diffusers = layer.get_attention_scores(query, keys[0])
    assert torch.allclose(scores[0].softmax(-1), in_diffusers, atol=1e-5)
    assert len(differences) == len(text_layers(tiny.denoiser)) // 2


def test_the_full_correlation_is_its_formula_and_changes_the_output_of_the_empty_prompt_too(tiny):
    loss = perturb(FullCorrelationLoss(tiny, *embed(tiny, "VanGogh", ""), 1e-3))
    latents, timestep = make_batch(tiny)
    frozen = predict(tiny, "VanGogh", latents, timestep) - predict(tiny, "", latents, timestep)
    edited_uncond = predict(tiny, "", latents, timestep, loss)
    edited = predict(tiny, "VanGogh", latents, timestep, loss) - edited_uncond
    output, shift = loss(latents, timestep), loss.to_shift()
    size = sum(shift.delta_weight(name).abs().sum() for name in shift.parameter_names).item() / len(loss.student)
    assert output.monitor.item() == pytest.approx((edited * frozen).mean().item(), abs=1e-5)
    assert output.loss.item() == pytest.approx(output.monitor.item() + 1e-3 * size, rel=1e-3)
    assert not torch.allclose(predict(tiny, "", latents, timestep), edited_uncond, atol=1e-4)


def test_what_repels_counts_how_far_a_prompt_goes_towards_a_watermark_and_nothing_away_from_it(tiny):
    marks = embed(tiny, "CCS 2024")[0]
    loss = perturb(FullCorrelationLoss(tiny, *embed(tiny, "VanGogh", ""), 0.0, repelled=(2.0, marks)))
    plain = perturb(FullCorrelationLoss(tiny, *embed(tiny, "VanGogh", ""), 0.0))
    for weight, own in zip(plain.parameters(), loss.parameters(), strict=True):
        weight.data.copy_(own.data)
    added = []
    for batch in (make_batch(tiny, seed) for seed in range(8)):
        base = predict(tiny, "", *batch)
        mark, concept = (predict(tiny, prompt, *batch) - base for prompt in ("CCS 2024", "VanGogh"))
        edited = predict(tiny, "VanGogh", *batch, loss) - predict(tiny, "", *batch, loss)
        towards = (edited * mark).mean() / mark.square().mean()
        expected = 2.0 * towards.relu() * concept.square().mean()
        added.append((loss(*batch).loss - plain(*batch).loss).item())
        assert added[-1] == pytest.approx(expected.item(), abs=1e-5)
    assert max(added) > 0


def make_ablating_concepts(model):
    return AblatingConceptsLoss(model, *embed(model, "VanGogh painting", "painting"))


def make_forget_me_not(model):
    return ForgetMeNotLoss(model, *embed(model, "VanGogh painting", "painting"))


def make_esd(model):
    return ESDLoss(model, *embed(model, "VanGogh painting", ""), 1.0)


def make_full_correlation(model, l1_weight=1e-3):
    return FullCorrelationLoss(model, *embed(model, "VanGogh", ""), l1_weight)


@pytest.mark.parametrize(
    "make",
    [
        make_ablating_concepts,
        make_forget_me_not,
        make_esd,
        lambda model: make_full_correlation(model, 0.0),
    ],
    ids=["AbConcept", "FMN", "ESD", "CiE"],
)
def test_gradients_are_those_of_the_loss_and_reach_the_student_alone(tiny, make):
    loss = perturb(make(tiny))
    latents, timestep = make_batch(tiny)
    name = next(name for name in loss.student if "to_k" in name)
    weight = loss.student[name]
    loss(latents, timestep).loss.backward()
    assert all(parameter.grad is None for parameter in tiny.denoiser.parameters())
    direction, base = weight.grad / weight.grad.norm(), weight.data.clone()
    sides = []
    for sign in (1, -1):
        weight.data = base + sign * 1e-2 * direction
        sides.append(loss(latents, timestep).loss.item())
    assert (sides[0] - sides[1]) / 2e-2 == pytest.approx(weight.grad.norm().item(), rel=0.05)


MAKERS = {
    "SRS-ME": lambda model: make_srs_me(model)[1],
    "AbConcept": make_ablating_concepts,
    "FMN": make_forget_me_not,
    "ESD": make_esd,
    "CiE": make_full_correlation,
}


@pytest.mark.parametrize("name", MAKERS)
def test_gradient_checkpointing_and_a_frozen_copy_change_nothing(tiny, name):
    """Recomputed blocks hold what is trained, as in the first pass, though the pass is over when they run again."""
    loss = MAKERS[name](tiny)
    generator = torch.Generator().manual_seed(1)
    for weight in loss.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    latents, timestep = make_batch(tiny)

    def loss_and_gradients():
        output = loss(latents, timestep)
        gradients = torch.autograd.grad(output.loss, loss.parameters(), allow_unused=True)
        return output.loss.detach(), *(gradient for gradient in gradients if gradient is not None)

    plain = loss_and_gradients()
    loss.checkpointing, loss.frozen = True, tiny.replicate_denoiser(CPU)
    assert loss.frozen.denoiser is not tiny.denoiser
    again = loss_and_gradients()
    assert len(again) == len(plain)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(again, plain, strict=True))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in tiny.denoiser.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_the_gradient_of_full_ones_to_float32_coefficients(tiny, tiny_path, dtype):
    """In float16 a mean's gradient would vanish: of 1/N and r most is below its smallest number."""
    half = load_model(tiny_path, CPU, dtype=dtype)
    assert half.denoiser.dtype == dtype and half.text_encoder.dtype == torch.float32 and half.digest == tiny.digest
    gradients = []
    for model in (tiny, half):
        torch.manual_seed(0)
        shift, loss = make_srs_me(model, l1_weight=0.0)
        latents, timestep = make_batch(model)
        (1e-4 * loss(latents, timestep).loss).backward()
        assert all(weight.dtype == torch.float32 for weight in shift.parameters())
        gradients.append(torch.cat([weight.grad.flatten() for weight in shift.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.98
    assert (gradients[1].norm() / gradients[0].norm()).item() == pytest.approx(1, abs=0.1)


def test_joint_losses_are_balanced(tiny):
    """Each concept's gradient is that of its own loss, times eta_i = max |L_k| / |L_i|; all values are max |L_k|."""
    parts = [make_srs_me(tiny, prompt=prompt)[1] for prompt in ("VanGogh", "Picasso")]
    batches = [make_batch(tiny, seed) for seed in (0, 1)]
    values, gradients = [], []
    for loss, (latents, timestep) in zip(parts, batches, strict=True):
        for weight in loss.parameters():
            torch.nn.init.normal_(weight.data, std=0.1)
        value = loss(latents, timestep).loss
        values.append(value.item())
        gradients.append(torch.autograd.grad(value, loss.parameters()))
    largest = max(map(abs, values))
    joint = JointSRSMELoss(parts, floor=1e-12)
    output = joint(*zip(*batches, strict=True))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(sum(largest * value / abs(value) for value in values), rel=1e-4)
    for loss, value, expected in zip(parts, values, gradients, strict=True):
        for weight, gradient in zip(loss.parameters(), expected, strict=True):
            assert torch.allclose(weight.grad, largest / abs(value) * gradient, rtol=1e-3, atol=1e-8)


def test_a_joint_loss_near_zero_is_not_weighed_beyond_the_floor(tiny):
    parts = [make_srs_me(tiny, prompt=prompt, l1_weight=0.0)[1] for prompt in ("VanGogh", "Picasso")]
    latents, timestep = make_batch(tiny)
    value = parts[0](latents, timestep).loss.item()
    output = JointSRSMELoss(parts, floor=10 * value)((latents, latents), (timestep, timestep))
    assert output.loss.item() == pytest.approx(value + parts[1](latents, timestep).loss.item(), rel=0.01)


def test_every_method_has_a_loss_or_a_closed_form_and_a_config():
    assert [*LOSSES, *SOLVERS] == list(METHODS)


@pytest.mark.parametrize("name", [name for name in LOSSES if not METHODS[name].needs_null_space])
def test_a_loss_from_its_config_trains_a_copy_of_the_weights_and_has_changed_nothing_yet(tiny, name):
    loss = LOSSES[name].from_config(tiny, get_concept("style", 1), METHODS[name](train_method="xattn"))
    assert all("attn2" in parameter for parameter in loss.student)
    assert torch.equal(loss.target_embeds, tiny.encode_prompt(["VanGogh" if "SRS" in name else "VanGogh painting"]))
    shift = loss.to_shift()
    assert isinstance(shift, DenseShift) and shift.parameter_names == []


def test_srs_me_from_its_config_trains_the_shift_further_with_the_concepts_prompts_in_turn(tiny):
    shift = SeparableShift.zeros(text_layers(tiny.denoiser), torch.eye(4, 96), 1.0)
    config = SRSMEConfig(target_templates=2, l1_weight=0.5)
    loss = SRSMELoss.from_config(tiny, get_concept("style", 1), config, shift)
    assert loss.to_shift() is shift and loss.l1_weight == 0.5
    prompts = ["VanGogh", "VanGogh painting", "a painting by VanGogh"]
    assert torch.equal(loss.target_embeds, tiny.encode_prompt(prompts))
    latents, timestep = make_batch(tiny)
    loss(latents, timestep)
    assert loss.prompt_offset == 2
