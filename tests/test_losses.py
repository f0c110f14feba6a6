import pytest
import torch
import torch.nn.functional as F

from ldm.diffusion.edits import attention_score_differences
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.losses import AblatingConceptsLoss, ESDLoss, ForgetMeNotLoss, FullCorrelationLoss, JointSRSMELoss, SRSMELoss
from ldm.diffusion.load import load_model
from ldm.erasure.merge import applied
from ldm.erasure.shift import SeparableShift

from conftest import CPU


def srs_me(tiny, reg_beta=1e-3, prompt="VanGogh"):
    directions = torch.linalg.qr(torch.randn(96, 5, dtype=torch.float64)).Q.T
    layers = text_layers(tiny.unet)
    shift = SeparableShift.zeros(layers, directions, 0.5)
    loss = SRSMELoss(tiny, layers, shift, tiny.encode_prompt([prompt]), tiny.encode_prompt([""]), reg_beta)
    return layers, shift, loss


def test_the_loss_is_the_papers_formula(tiny):
    layers, shift, loss = srs_me(tiny)
    for weight in shift.parameters():
        torch.nn.init.normal_(weight.data, std=0.1)
    latents, step = torch.randn(2, *tiny.latent_shape), torch.tensor([100, 700])
    terms = loss(latents, step)
    concept, blank = (tiny.encode_prompt([prompt]).expand(2, -1, -1) for prompt in ("VanGogh", ""))
    frozen = tiny.predict_noise(latents, step, concept) - tiny.predict_noise(latents, step, blank)
    with applied(tiny.unet, [shift]):
        shifted = tiny.predict_noise(latents, step, concept)
    changed = shifted - tiny.predict_noise(latents, step, blank)
    correlation = (changed * frozen).mean()
    size = sum(shift.delta(f"{name}.weight").abs().sum() for name in layers) / len(layers)
    assert terms.monitor.item() == pytest.approx(correlation.item(), abs=1e-5)
    assert terms.total.item() == pytest.approx((correlation + 1e-3 * size).item(), rel=1e-4)


def test_only_the_shift_gets_gradients_and_a_zero_shift_starts_at_the_squared_representation(tiny):
    _, shift, loss = srs_me(tiny, reg_beta=0.0)
    terms = loss(torch.randn(2, *tiny.latent_shape), torch.tensor([100, 700]))
    terms.total.backward()
    assert terms.monitor > 0
    assert all(weight.grad.abs().sum() > 0 for weight in shift.parameters())
    assert all(p.grad is None for p in tiny.unet.parameters())


def batch(tiny, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *tiny.latent_shape, generator=generator), torch.tensor([100, 700])


def moved(loss):
    """The loss with its student's weights no longer those of the base."""
    generator = torch.Generator().manual_seed(1)
    for weight in loss.student.values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return loss


def noise(tiny, prompt, latents, step, loss=None):
    """What the frozen model, or the student of a loss, predicts under a prompt."""
    with torch.no_grad(), applied(tiny.unet, [loss.shift()] if loss else []):
        return tiny.predict_noise(latents, step, tiny.encode_prompt([prompt]).expand(2, -1, -1))


def prompts(tiny, *texts):
    return [tiny.encode_prompt([text]) for text in texts]


def test_ablating_concepts_is_its_formula(tiny):
    loss = moved(AblatingConceptsLoss(tiny, *prompts(tiny, "VanGogh painting", "painting")))
    latents, step = batch(tiny)
    target = noise(tiny, "painting", latents, step)
    expected = F.mse_loss(noise(tiny, "VanGogh painting", latents, step, loss), target)
    expected += 10 * F.mse_loss(noise(tiny, "painting", latents, step, loss), target)
    assert loss(latents, step).total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_esd_regresses_on_the_negatively_guided_noise_of_the_frozen_model(tiny):
    loss = moved(ESDLoss(tiny, *prompts(tiny, "VanGogh painting", ""), 0.7))
    latents, step = batch(tiny)
    blank, concept = noise(tiny, "", latents, step), noise(tiny, "VanGogh painting", latents, step)
    target = blank - 0.7 * (concept - blank)
    assert torch.allclose(loss.target(latents, step), target, atol=1e-5)  # whatever the student has become
    expected = F.mse_loss(noise(tiny, "VanGogh painting", latents, step, loss), target)
    assert loss(latents, step).total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_esds_first_loss_is_the_guided_difference(tiny):
    """Before any step the student is the base: eps(c) - target = (1 + eta) (eps(c) - eps(""))."""
    loss = ESDLoss(tiny, *prompts(tiny, "VanGogh painting", ""), 1.0)
    latents, step = batch(tiny)
    difference = noise(tiny, "VanGogh painting", latents, step) - noise(tiny, "", latents, step)
    assert loss(latents, step).total.item() == pytest.approx(4 * difference.square().mean().item(), rel=1e-4)


def test_fmn_is_zero_when_both_prompts_are_the_same_and_reaches_queries_and_keys(tiny):
    latents, step = batch(tiny)
    same = moved(ForgetMeNotLoss(tiny, *prompts(tiny, "painting", "painting")))
    assert same(latents, step).total.item() < 1e-12
    loss = ForgetMeNotLoss(tiny, *prompts(tiny, "VanGogh painting", "painting"))
    terms = loss(latents, step)
    terms.total.backward()
    assert terms.total > 1e-9
    changed = {name for name, weight in loss.student.items() if weight.grad is not None and weight.grad.any()}
    assert any("to_k" in name for name in changed) and any("to_q" in name for name in changed)
    later = [name for name in loss.student if name.startswith("up_blocks") and ("to_v" in name or "to_out" in name)]
    assert not changed & set(later[-3:])  # the last layer's values and output feed no later layer's scores


def test_fmns_differences_are_those_of_the_layers_scores(tiny):
    latents, step = batch(tiny)
    concept, anchor = prompts(tiny, "VanGogh painting", "painting")
    layer = next(module for name, module in tiny.unet.named_modules() if name.endswith("attn2"))
    caught = []
    hook = layer.to_q.register_forward_hook(lambda _, inputs, output: caught.append(output))
    with attention_score_differences(tiny.unet, anchor) as differences:
        noise(tiny, "VanGogh painting", latents, step)
    hook.remove()
    query = layer.head_to_batch_dim(caught[0])
    keys = [layer.head_to_batch_dim(layer.to_k(prompt.expand(2, -1, -1))) for prompt in (concept, anchor)]
    scores = [(layer.scale * query @ key.transpose(1, 2)) for key in keys]
    assert torch.allclose(differences[0], scores[0] - scores[1], atol=1e-5)
    assert torch.allclose(scores[0].softmax(-1), layer.get_attention_scores(query, keys[0]), atol=1e-5)  # as diffusers has them
    assert len(differences) == len(text_layers(tiny.unet)) // 2


def test_the_full_correlation_is_its_formula_and_moves_the_blank_prompt_too(tiny):
    loss = moved(FullCorrelationLoss(tiny, *prompts(tiny, "VanGogh", ""), 1e-3))
    latents, step = batch(tiny)
    frozen = noise(tiny, "VanGogh", latents, step) - noise(tiny, "", latents, step)
    student = noise(tiny, "VanGogh", latents, step, loss) - noise(tiny, "", latents, step, loss)
    terms, shift = loss(latents, step), loss.shift()
    size = sum(shift.delta(name).abs().sum() for name in shift.names).item() / len(loss.student)
    assert terms.monitor.item() == pytest.approx((student * frozen).mean().item(), abs=1e-5)
    assert terms.total.item() == pytest.approx(terms.monitor.item() + 1e-3 * size, rel=1e-3)
    assert not torch.allclose(noise(tiny, "", latents, step), noise(tiny, "", latents, step, loss), atol=1e-4)


@pytest.mark.parametrize("build", [
    lambda tiny: AblatingConceptsLoss(tiny, *prompts(tiny, "VanGogh painting", "painting")),
    lambda tiny: ForgetMeNotLoss(tiny, *prompts(tiny, "VanGogh painting", "painting")),
    lambda tiny: ESDLoss(tiny, *prompts(tiny, "VanGogh painting", ""), 1.0),
    lambda tiny: FullCorrelationLoss(tiny, *prompts(tiny, "VanGogh", ""), 0.0)])
def test_gradients_are_those_of_the_loss_and_reach_the_student_alone(tiny, build):
    loss = moved(build(tiny))
    latents, step = batch(tiny)
    name = next(name for name in loss.student if "to_k" in name)
    weight = loss.student[name]
    loss(latents, step).total.backward()
    assert all(p.grad is None for p in tiny.unet.parameters())
    direction, base = weight.grad / weight.grad.norm(), weight.data.clone()
    sides = []
    for sign in (1, -1):
        weight.data = base + sign * 1e-2 * direction
        sides.append(loss(latents, step).total.item())
    assert (sides[0] - sides[1]) / 2e-2 == pytest.approx(weight.grad.norm().item(), rel=0.05)


LOSSES = {
    "SRS-ME": lambda tiny: srs_me(tiny)[2],
    "AbConcept": lambda tiny: AblatingConceptsLoss(tiny, *prompts(tiny, "VanGogh painting", "painting")),
    "FMN": lambda tiny: ForgetMeNotLoss(tiny, *prompts(tiny, "VanGogh painting", "painting")),
    "ESD": lambda tiny: ESDLoss(tiny, *prompts(tiny, "VanGogh painting", ""), 1.0),
    "CiE": lambda tiny: FullCorrelationLoss(tiny, *prompts(tiny, "VanGogh", ""), 1e-3)}


@pytest.mark.parametrize("name", LOSSES)
def test_blocks_run_again_for_their_gradient_and_a_frozen_copy_change_nothing(tiny, name):
    """Recomputed blocks must hold what is learnt, as in the first pass, though the pass is over when they run again."""
    loss = LOSSES[name](tiny)
    generator = torch.Generator().manual_seed(1)
    for weight in loss.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    latents, step = batch(tiny)

    def result():
        terms = loss(latents, step)
        gradients = torch.autograd.grad(terms.total, loss.parameters(), allow_unused=True)
        return terms.total.detach(), *(gradient for gradient in gradients if gradient is not None)

    kept = result()
    loss.checkpointing, loss.frozen = True, tiny.replicate_unet(CPU)
    assert loss.frozen.unet is not tiny.unet
    again = result()
    assert len(again) == len(kept) and all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(again, kept))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in tiny.unet.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_the_gradient_of_full_ones_to_float32_coefficients(tiny, tiny_path, dtype):
    """In float16 a mean's gradient would vanish: of 1/N and r most is below its smallest number."""
    half = load_model(tiny_path, CPU, dtype=dtype)
    assert half.unet.dtype == dtype and half.text_encoder.dtype == torch.float32 and half.digest == tiny.digest
    gradients = []
    for model in (tiny, half):
        torch.manual_seed(0)
        _, shift, loss = srs_me(model, reg_beta=0.0)
        latents, step = batch(model)
        (1e-4 * loss(latents, step).total).backward()
        assert all(weight.dtype == torch.float32 for weight in shift.parameters())
        gradients.append(torch.cat([weight.grad.flatten() for weight in shift.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.98
    assert (gradients[1].norm() / gradients[0].norm()).item() == pytest.approx(1, abs=0.1)


def test_joint_losses_are_balanced(tiny):
    """Each concept's gradient is that of its own loss, times eta_i = max |L_k| / |L_i|; the values are all max |L_k|."""
    parts = [srs_me(tiny, prompt=prompt)[2] for prompt in ("VanGogh", "Picasso")]
    data = [batch(tiny, seed) for seed in (0, 1)]
    own, gradients = [], []
    for loss, (latents, step) in zip(parts, data):
        for weight in loss.parameters():
            torch.nn.init.normal_(weight.data, std=0.1)
        total = loss(latents, step).total
        own.append(total.item())
        gradients.append(torch.autograd.grad(total, loss.parameters()))
    largest = max(map(abs, own))
    joint = JointSRSMELoss(parts, floor=1e-12)
    terms = joint(*zip(*data))
    terms.total.backward()
    assert terms.total.item() == pytest.approx(sum(largest * value / abs(value) for value in own), rel=1e-4)
    for loss, value, expected in zip(parts, own, gradients):
        for weight, gradient in zip(loss.parameters(), expected):
            assert torch.allclose(weight.grad, largest / abs(value) * gradient, rtol=1e-3, atol=1e-8)


def test_a_joint_loss_near_zero_is_not_weighed_beyond_the_floor(tiny):
    parts = [srs_me(tiny, prompt=prompt, reg_beta=0.0)[2] for prompt in ("VanGogh", "Picasso")]
    latents, step = batch(tiny)
    value = parts[0](latents, step).total.item()
    terms = JointSRSMELoss(parts, floor=10 * value)((latents, latents), (step, step))
    assert terms.total.item() == pytest.approx(value + parts[1](latents, step).total.item(), rel=0.01)
