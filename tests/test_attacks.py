"""Attacks that know the weights: what a model should predict, hard prompts, and relearning."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import CPU, ROOT
from families import MAKERS, make_family
from torch import nn

from ldm.config.concepts import erasable_concepts, get_concept, identity_of
from ldm.config.methods import SamplingConfig
from ldm.config.models import load_model_config
from ldm.config.robustness import HardPromptConfig, RelearningConfig
from ldm.diffusion.load import load_model
from ldm.diffusion.tokenizer import vocabulary_words
from ldm.erasure.shift import DenseShift
from ldm.experiments.attacks import NoisedImages, denoising_losses
from ldm.experiments.hard_prompts import HardPromptSearch, search_words
from ldm.experiments.probe import SHOWN, UNEDITED, Bench, Subject
from ldm.experiments.probe_hard_prompts import BY_WORDS, KINDS, WITH_NAME, WITHOUT_NAME, HardPrompts
from ldm.experiments.probe_relearning import Relearning
from ldm.experiments.unlearnt import UNLEARNT
from ldm.io.prompts import read_prompt_csv
from ldm.metrics.classify import classifier_path, load_classifier
from ldm.metrics.judge import ClassifierJudge

QUICK = HardPromptConfig(
    hard_words=3, hard_searches=2, hard_iterations=3, hard_candidates=6, hard_top_words=8, hard_noised_images=3
)


class Bright:
    """A judge by the images' files alone."""

    name = "bright"

    def knows(self, concept):
        return True

    def shows(self, paths, concept):
        return [path.read_bytes()[-20] % 2 == 0 for path in paths]


@pytest.fixture
def bench(mini_path, tmp_path) -> Bench:
    model = load_model(mini_path, CPU)
    return Bench(model, "style", tmp_path / "bench", Bright(), SamplingConfig(2, 1.0, 32), images=4)


def subject_of(model, tmp_path) -> Subject:
    """Return a subject whose shift changes a text layer of the model."""
    name = next(iter(model.text_layers)) + ".weight"
    weight = model.denoiser.get_parameter(name)
    shift = DenseShift.from_weights(model.denoiser, {name: nn.Parameter(weight + 0.1)})
    path = tmp_path / "shift-1.safetensors"
    shift.save(path, {"concept": "VanGogh", "index": 1, "category": "style", "method": "ESD"})
    return Subject("edited", {"1": DenseShift.load(path)})


def noised_for(model, number=3) -> NoisedImages:
    clean = torch.randn((5, *model.latent_shape), generator=torch.Generator().manual_seed(3))
    return NoisedImages.sample(model, clean, number, (7,))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_a_diffusion_should_predict_says_the_noise_that_was_added(tiny, monkeypatch, prediction):
    tiny.scheduler.register_to_config(prediction_type=prediction)
    clean, noise = torch.randn(2, 3, *tiny.latent_shape)
    timestep = torch.tensor([3, 400, 990])
    target = tiny.denoising_target(clean, noise, timestep)
    monkeypatch.setattr(tiny, "denoiser_output", lambda *_: target)
    assert torch.allclose(tiny.predict_noise(tiny.add_noise(clean, noise, timestep), timestep, None), noise, atol=1e-5)


def test_what_a_flow_should_predict_leads_back_to_the_clean_latents(tmp_path):
    model = load_model(make_family("flux", tmp_path), CPU)
    clean, noise = torch.randn(2, 3, *model.latent_shape)
    timestep = torch.tensor([3, 400, 990])
    target = model.denoising_target(clean, noise, timestep)
    sigma = (timestep / 1000).view(-1, *[1] * (clean.dim() - 1))
    assert torch.allclose(model.add_noise(clean, noise, timestep) - sigma * target, clean, atol=1e-5)


def test_losses_of_several_prompts_are_those_of_each(tiny):
    noised, embeds = noised_for(tiny), tiny.encode_prompt(["a church", "Picasso", ""])
    together = denoising_losses(tiny, noised, embeds)
    assert torch.allclose(together, torch.cat([denoising_losses(tiny, noised, each[None]) for each in embeds]))
    expected = (
        (tiny.denoiser_output(noised.latents, noised.timestep, embeds[:1].expand(3, -1, -1)) - noised.target) ** 2
    ).mean()
    assert torch.allclose(together[0], expected)


@pytest.mark.parametrize("category", ["style", "object"])
def test_no_word_says_the_concept_whose_name_is_left_out(tiny, category):
    tokenizer = tiny.tokenizers[0]
    for concept in erasable_concepts(category):
        words = search_words(tokenizer, concept)
        own = {piece.casefold() for spelling in concept.spellings for piece in spelling.split()}
        pieces = {
            piece.removesuffix("</w>") for spelling in concept.spellings for piece in tokenizer.tokenize(spelling)
        }
        assert words and not (own | pieces) & set(words)
        assert not any(
            identity_of(name) in identity_of("".join(words[k : k + 1])) for name in own for k in range(len(words))
        )
    assert {"van", "gogh", "vangogh"} <= set(search_words(tokenizer))
    assert not {"van", "gogh", "vangogh"} & set(search_words(tokenizer, get_concept("style", 1)))


def test_words_are_one_token_each_and_come_back_as_they_are(tiny):
    tokenizer, words = tiny.tokenizers[0], search_words(tiny.tokenizers[0])
    assert set(words) <= set(vocabulary_words(tokenizer))
    for word in words:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        assert len(ids) == 1 and tokenizer.decode(ids).strip() == word


@pytest.mark.parametrize("family", list(MAKERS))
def test_a_search_lessens_the_loss_and_changes_every_place_in_every_family(tmp_path, family):
    model = load_model(make_family(family, tmp_path), CPU)
    words = search_words(model.tokenizers[0])
    search = HardPromptSearch(model, noised_for(model), words, QUICK)
    changes = search._changes(words[:3], " ".join)
    assert {place for place, _ in changes} == {0, 1, 2}
    found = search.find(" ".join, "0")
    assert found.loss <= found.start_loss and set(found.prompt.split()) <= set(words)
    assert found == search.find(" ".join, "0")
    with torch.no_grad():
        assert found.loss == pytest.approx(
            denoising_losses(model, search.noised, model.embed([found.prompt])).item(), rel=1e-5
        )


def test_the_gradient_tells_how_the_loss_changes_with_a_words_embedding(tiny):
    words, noised = search_words(tiny.tokenizers[0]), noised_for(tiny)
    search = HardPromptSearch(tiny, noised, words, replace(QUICK, hard_top_words=len(words)))
    prompt = ["church", "picasso", "painting"]
    changes = [word for place, word in search._changes(prompt, " ".join) if place == 1]
    embedding = search._embedding.weight
    own = embedding[tiny.tokenizers[0]("picasso", add_special_tokens=False).input_ids[0]]
    before, slopes = own.clone(), []
    for word in changes[0], changes[-1]:  # the likeliest to lessen the loss, and the least
        other = embedding[tiny.tokenizers[0](word, add_special_tokens=False).input_ids[0]]
        losses = []
        for step in (-1e-2, 1e-2):
            own.data.copy_(before + step * (other - before))
            losses.append(denoising_losses(tiny, noised, tiny.encode_prompt([" ".join(prompt)])).item())
        own.data.copy_(before)
        slopes.append(losses[1] - losses[0])
    assert slopes[0] < 0 and slopes[0] < slopes[1]


def found_prompts(bench, subject: Subject) -> dict[str, list[str]]:
    """Return the prompts that searches kept, by kind."""
    found = {}
    for kind in KINDS:
        [path] = bench.folder.glob(f"{subject.folder}/*/{kind.replace(' ', '-')}-*/prompts.json")
        found[kind] = [entry["prompt"] for entry in json.loads(path.read_text())["prompts"]]
    return found


def test_prompts_are_found_once_and_a_stopped_run_goes_on(bench, tmp_path, monkeypatch):
    subject, concept = subject_of(bench.model, tmp_path), get_concept("style", 1)
    probe = HardPrompts(QUICK)
    calls = []
    find = HardPromptSearch.find

    def stop_at_third(self, template, seed):
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return find(self, template, seed)

    monkeypatch.setattr(HardPromptSearch, "find", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        probe.measure(bench, subject, concept)
    kept = found_prompts(bench, subject)
    assert [len(kept[kind]) for kind in KINDS] == [2, 1]
    findings = probe.measure(bench, subject, concept)
    assert len(calls) == 5
    again = replace(bench, folder=tmp_path / "again")
    assert probe.measure(again, subject, concept) == findings and len(calls) == 9
    assert found_prompts(again, subject) == found_prompts(bench, subject)
    assert [(each.kind, each.n) for each in findings] == [(WITH_NAME, 4), (WITHOUT_NAME, 4), (WITH_NAME, 4)]
    assert findings[-1].measure == BY_WORDS
    [folder] = bench.folder.rglob("name-left-out")
    without = [case.prompt for case in read_prompt_csv(folder / "prompts.csv")]
    assert len(without) == 4 and not any(concept.is_named(text) or "gogh" in text.lower() for text in without)
    assert all(f" {concept.prompt} " in f" {prompt} " for prompt in kept[WITH_NAME])
    probe.measure(bench, subject, concept)
    assert len(calls) == 9
    HardPrompts(replace(QUICK, hard_searches=1)).measure(bench, subject, concept)
    assert len(calls) == 11  # other settings have searches of their own


def test_the_floor_of_both_is_of_the_unedited_model_and_of_what_it_never_learnt(bench):
    for probe in HardPrompts(QUICK), Relearning(RelearningConfig(relearning_steps=1)):
        assert probe.floor(bench, get_concept("style", 1)) == probe.floor(bench, get_concept("style", 2))
        assert {path.name for path in (bench.folder / UNEDITED.name).iterdir()} == {UNLEARNT.label}


def test_relearning_gives_the_weights_back_and_a_stopped_run_goes_on(bench, tmp_path, monkeypatch):
    model, concept = bench.model, get_concept("style", 1)
    subject = subject_of(model, tmp_path)
    probe = Relearning(RelearningConfig(relearning_steps=10, relearning_images=3, relearning_batch_size=2))
    before = {name: weight.clone() for name, weight in model.denoiser.state_dict().items()}
    parameters = dict(model.denoiser.named_parameters())
    steps = []
    sample = NoisedImages.sample.__func__

    def count(cls, *arguments):
        steps.append(arguments[-1][1])
        if len(steps) == 4:
            raise KeyboardInterrupt
        return sample(cls, *arguments)

    monkeypatch.setattr(NoisedImages, "sample", classmethod(count))
    with pytest.raises(KeyboardInterrupt):
        probe.measure(bench, subject, concept)
    assert list(bench.folder.rglob("weights.safetensors"))
    findings = probe.measure(bench, subject, concept)
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9] and not list(bench.folder.rglob("weights.safetensors"))
    again = replace(bench, folder=tmp_path / "again")
    assert probe.measure(again, subject, concept) == findings
    folders = [each.folder for each in (bench, again)]
    images = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")} for folder in folders]
    assert images[0] == images[1] and len(images[0]) == 3 + 3 * 4
    assert len({content for path, content in images[0].items() if path.parent.name.endswith("steps")}) == 12
    count_before = len(steps)
    probe.measure(bench, subject, concept)
    assert len(steps) == count_before
    assert all(torch.equal(weight, before[name]) for name, weight in model.denoiser.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.denoiser.named_parameters())


@pytest.mark.slow
def test_a_model_that_erased_nothing_draws_the_concept_by_every_attack_that_names_it(tmp_path):
    model, (classifier, _) = (
        load_model(ROOT / "models" / "mini-sd", CPU),
        load_classifier(classifier_path("style"), CPU),
    )
    sampling = load_model_config(model).sampling
    bench = Bench(model, "style", tmp_path / "bench", ClassifierJudge(classifier), sampling, images=8)
    concept = get_concept("style", 1)
    quick = HardPromptConfig(hard_searches=2, hard_iterations=2, hard_candidates=16, hard_noised_images=4)
    findings = HardPrompts(quick).measure(bench, UNEDITED, concept)
    found = {each.kind: each.value for each in findings if each.measure == SHOWN}
    assert found[WITH_NAME] >= 0.8 and found[WITHOUT_NAME] <= 0.4
    relearnt = Relearning(RelearningConfig())
    assert min(each.value for each in relearnt.measure(bench, UNEDITED, concept)) >= 0.9
    assert relearnt.floor(bench, concept)[0].value <= 0.2
