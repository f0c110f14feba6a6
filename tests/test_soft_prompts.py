"""Soft prompts: whose rows they replace, that they are learnt, against gates too, and that none is learnt twice."""

import dataclasses

import pytest
import torch
from conftest import CPU, ROOT, make_xl
from families import MAKERS, make_family
from PIL import Image

from ldm.config.concepts import get_concept
from ldm.config.methods import SamplingConfig
from ldm.config.models import load_model_config
from ldm.config.robustness import SoftPromptConfig
from ldm.diffusion.latents import denoising_batches
from ldm.diffusion.load import load_model
from ldm.diffusion.soft_tokens import find_placeholders, soft_tokens
from ldm.erasure.embedding_map import fit_map
from ldm.erasure.gate import Gate
from ldm.erasure.gated_edit import GatedEdit
from ldm.erasure.merge import edited
from ldm.erasure.shift import EmbeddingShift
from ldm.experiments import probe_soft_prompts
from ldm.experiments.probe import UNEDITED, Bench, Subject
from ldm.experiments.probe_soft_prompts import SoftPromptLoss, SoftPrompts, learn_soft_prompt
from ldm.io.images import save_image
from ldm.metrics.classify import find_classifier
from ldm.metrics.judge import ClassifierJudge

QUICK = SoftPromptConfig(soft_steps=3, soft_batch_size=2, soft_examples=3)
VAN_GOGH = get_concept("style", 1)


class Sees:
    """A judge that sees every concept in every image."""

    name = "all"

    def knows(self, concept) -> bool:
        return True

    def shows(self, paths, concept) -> list[bool]:
        return [True] * len(paths)


def make(name: str, folder):
    return load_model(make_xl(folder) if name == "xl" else make_family(name, folder), CPU)


def vectors_for(model, number: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Return random soft tokens for each text encoder."""
    torch.manual_seed(0)
    widths = {name: encoder.get_input_embeddings().weight.shape[1] for name, encoder in model.text_encoders.items()}
    return {name: size * torch.randn(number, width) for name, width in widths.items()}


@pytest.fixture
def bench(mini_path, tmp_path) -> Bench:
    return Bench(load_model(mini_path, CPU), "style", tmp_path / "bench", Sees(), SamplingConfig(2, 1.0, 32), images=2)


def test_only_the_rows_of_the_placeholders_change_and_only_within_the_block(tiny):
    words = find_placeholders(tiny, 2)
    vectors = vectors_for(tiny, 2)
    embedding = tiny.text_encoder.get_input_embeddings()
    ids = tiny.tokenizers[0](f"a {words.prompt} church", return_tensors="pt").input_ids
    before, embeds = embedding(ids), tiny.encode_prompt(["", words.prompt])
    with soft_tokens(tiny, words, vectors):
        within, soft = embedding(ids), tiny.encode_prompt(["", words.prompt])
    is_soft = torch.isin(ids, torch.tensor(words.ids["text_encoder"]))
    assert int(is_soft.sum()) == 2 and torch.equal(within[is_soft], vectors["text_encoder"])
    assert torch.equal(within[~is_soft], before[~is_soft])
    assert torch.equal(soft[0], embeds[0]) and not torch.equal(soft[1], embeds[1])
    assert torch.equal(embedding(ids), before) and torch.equal(tiny.encode_prompt(["", words.prompt]), embeds)
    assert not embedding._forward_hooks


def test_the_digests_stay_as_they_are_while_soft_tokens_act(tiny, tiny_path):
    words = find_placeholders(tiny, 1)
    with soft_tokens(tiny, words, vectors_for(tiny, 1)):
        fresh = load_model(tiny_path, CPU)
        assert tiny.digest == fresh.digest and tiny.text_digest == fresh.text_digest


@pytest.mark.parametrize("name", ["xl", *MAKERS])
def test_every_family_has_placeholders_whose_vectors_get_a_gradient_in_each_text_encoder(name, tmp_path):
    model = make(name, tmp_path / name)
    words = find_placeholders(model, 3)
    assert all(len(set(ids)) == 3 for ids in words.ids.values()) and set(words.ids) == set(model.text_encoders)
    loss = SoftPromptLoss(model, words, QUICK)
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    noised, timestep, target = next(denoising_batches(model, latents, 2, 0))
    loss((noised, timestep), target).loss.backward()
    for offsets in loss.parameters():
        assert offsets.grad is not None and (offsets.grad.abs().amax(1) > 0).all()
    assert not any(weight.requires_grad for weight in model.denoiser.parameters())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_of_a_diffusion_is_what_its_prediction_type_says(tiny, prediction_type):
    tiny.scheduler.register_to_config(prediction_type=prediction_type)
    clean, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    timestep = torch.tensor([10, 500, 900])
    noised, target = tiny.add_noise(clean, noise, timestep), tiny.denoising_target(clean, noise, timestep)
    alpha = tiny.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
    if prediction_type == "epsilon":
        assert torch.equal(target, noise)
    else:  # the clean latents follow from the velocity and the noised ones
        assert torch.allclose(alpha.sqrt() * noised - (1 - alpha).sqrt() * target, clean, atol=1e-5)


def test_the_target_of_a_flow_leads_from_clean_latents_to_noise(tmp_path):
    model = make("flux", tmp_path / "flux")
    clean, noise = torch.randn(2, 1, *model.latent_shape).unbind()
    timestep = torch.tensor([400.0])
    noised, target = model.add_noise(clean, noise, timestep), model.denoising_target(clean, noise, timestep)
    assert torch.allclose(noised - 0.4 * target, clean, atol=1e-5)


def test_the_loss_falls_on_a_batch_that_stays_the_same(tiny):
    loss = SoftPromptLoss(tiny, find_placeholders(tiny, 3), QUICK)
    latents = torch.randn(4, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))
    noised, timestep, target = next(denoising_batches(tiny, latents, 4, 0))
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        value = loss((noised, timestep), target).loss
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] and min(values) == pytest.approx(values[-1], rel=1e-3)


def gated_subject(model) -> Subject:
    """Return a subject whose gate fires on every prompt of soft tokens as they are at first."""
    prompt = find_placeholders(model, 1).prompt
    loss = SoftPromptLoss(model, find_placeholders(model, 1), QUICK)
    with soft_tokens(model, loss.words, {name: own.detach() for name, own in loss.vectors.items()}):
        _, states = model.encode_with_states([prompt, ""], {"text_encoder": [0]})
    rows = states["text_encoder", 0]
    weights = (rows[0, 1] - rows[1, 1])[None]
    weights /= weights.square().sum()
    threshold = (rows[0] @ weights.T).amax() - 0.05
    gate = Gate(weights, threshold.view(1), 0.5)
    embeds = torch.randn(20, 96)
    edit = GatedEdit({"text_encoder": gate}, {"text_encoder": 0}, {"tokens": fit_map(embeds, -embeds, 0.01, 4)})
    return Subject("gated", {"1": EmbeddingShift.none(edit, {})}, "gated")


def test_a_soft_prompt_against_the_gate_leaves_it_and_one_that_ignores_it_has_a_gradient_through_its_map(
    tmp_path, mini_path
):
    model = load_model(mini_path, CPU)
    subject = gated_subject(model)
    words = find_placeholders(model, 1)
    config = dataclasses.replace(QUICK, soft_gate_weight=100.0, soft_steps=60)
    paths = [tmp_path / f"{k}_0.png" for k in range(2)]
    for path in paths:
        save_image(path, Image.new("RGB", (32, 32), "gray"))
    margins = {}
    with edited(model, subject.shifts, "gated"):
        edit = model.embedding_edit
        ignoring = SoftPromptLoss(model, words, config)
        assert ignoring.watched is None
        for evades in (False, True):
            vectors = learn_soft_prompt(model, paths, words, config if evades else QUICK, evades)
            with soft_tokens(model, words, vectors):
                _, states = model.encode_with_states([words.prompt], edit.layers)
            margins[evades] = edit.margins(states).item()
        assert model.embedding_edit is edit
    assert margins[True] < 0 and margins[True] < margins[False]


def test_nothing_is_learnt_or_made_twice_and_other_settings_are_kept_apart(bench, monkeypatch):
    probe = SoftPrompts(QUICK)
    found = probe.measure(bench, UNEDITED, VAN_GOGH)
    assert [(each.kind, each.measure, each.hits, each.n) for each in found] == [
        ("1 token", "shown", 2, 2),
        ("3 tokens", "shown", 2, 2),
    ]
    files = {path: path.stat().st_mtime_ns for path in bench.folder.rglob("*.png")}
    monkeypatch.setattr(probe_soft_prompts, "learn_soft_prompt", None)  # which would fail
    assert probe.measure(bench, UNEDITED, VAN_GOGH) == found
    assert {path: path.stat().st_mtime_ns for path in bench.folder.rglob("*.png")} == files
    with pytest.raises(TypeError):
        SoftPrompts(dataclasses.replace(QUICK, soft_lr=0.2)).measure(bench, UNEDITED, VAN_GOGH)


def test_a_run_that_is_stopped_within_a_soft_prompt_leaves_no_file_of_it(bench, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(probe_soft_prompts, "training_loop", stop)
        with pytest.raises(KeyboardInterrupt):
            SoftPrompts(QUICK, numbers=(1,)).measure(bench, UNEDITED, VAN_GOGH)
    assert (
        not list(bench.folder.rglob("*.safetensors"))
        and not bench.model.text_encoder.get_input_embeddings()._forward_hooks
    )
    assert SoftPrompts(QUICK, numbers=(1,)).measure(bench, UNEDITED, VAN_GOGH)[0].n == 2


def test_the_floor_is_of_the_same_kinds_on_the_unedited_model(bench):
    found = SoftPrompts(QUICK).floor(bench, VAN_GOGH)
    assert [each.kind for each in found] == ["1 token", "3 tokens"] and all(each.hits == 0 for each in found)
    assert list((bench.folder / "unedited" / "unlearnt").glob("soft-prompts/*/*/soft-prompt.safetensors"))


@pytest.mark.slow
def test_mini_sd_with_nothing_erased_scores_as_that_and_far_above_what_it_never_learnt(tmp_path):
    model = load_model(ROOT / "models" / "mini-sd", CPU)
    judge = ClassifierJudge(find_classifier("style", None, CPU))
    bench = Bench(model, "style", tmp_path / "bench", judge, load_model_config(model).sampling)
    probe = SoftPrompts(numbers=(3,))
    (shown,), (floor,) = probe.measure(bench, UNEDITED, VAN_GOGH), probe.floor(bench, VAN_GOGH)
    assert shown.hits >= 12 and shown.n == floor.n == 16
    assert floor.hits <= shown.hits - 8
