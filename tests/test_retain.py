"""The retain set: what a linear shift should change little, what that costs, and what the closed form makes of it."""

import pytest
import torch

from ldm.config.concepts import Concept, erasable_concepts, get_concept
from ldm.config.methods import SRSMEConfig
from ldm.config.templates import load_template_set
from ldm.diffusion.tokenizer import align_tokens
from ldm.erasure.erase import anchor_embeds, initial_shift, target_prompts
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.retain import RetainSet

VAN_GOGH = get_concept("style", 1)
SCALES = ("vocab_preserve_scale", "captions_preserve_scale", "neutral_preserve_scale", "others_preserve_scale")


@pytest.fixture
def retain(tiny):
    return RetainSet(tiny, erasable_concepts("style"))


def test_nothing_costs_anything_by_default_and_each_scale_adds_its_own_cost(retain):
    zero = retain.cost(VAN_GOGH, SRSMEConfig())
    assert not zero.any()
    costs = {name: retain.cost(VAN_GOGH, SRSMEConfig(**{name: 2.0})) for name in SCALES}
    for cost in costs.values():
        assert torch.allclose(cost, cost.T) and torch.linalg.eigvalsh(cost)[0] > -1e-9 * cost.norm()
    together = retain.cost(VAN_GOGH, SRSMEConfig(**dict.fromkeys(SCALES, 2.0)))
    assert torch.allclose(together, sum(costs.values()), rtol=1e-12)
    assert torch.allclose(retain.cost(VAN_GOGH, SRSMEConfig(others_preserve_scale=6.0)), 3 * costs[SCALES[3]])


def test_prompts_that_say_the_concept_are_not_retained(tiny, retain, monkeypatch):
    counted: list[list[str]] = []
    gram = type(tiny).prompt_gram

    def count(self, prompts):
        counted.append(list(prompts))
        return gram(self, prompts)

    monkeypatch.setattr(type(tiny), "prompt_gram", count)
    retained = RetainSet(tiny, (VAN_GOGH, get_concept("style", 2)))
    first = retained.captions[0]
    concept = Concept(0, "own", first.split()[-1].strip(".,?!"), kind="style")
    retained.cost(concept, SRSMEConfig(captions_preserve_scale=1.0))
    assert counted and first not in counted[0] and len(counted[0]) > 900
    counted.clear()
    retained.cost(VAN_GOGH, SRSMEConfig(others_preserve_scale=1.0))
    assert len(counted) == 1 and all("picasso" in prompt.lower() for prompt in counted[0])
    retained.cost(VAN_GOGH, SRSMEConfig(others_preserve_scale=3.0))
    assert len(counted) == 1  # the moments are computed once
    counted.clear()
    retained.cost(VAN_GOGH, SRSMEConfig(neutral_preserve_scale=1.0))
    assert any("an artist" in prompt for prompt in counted[0]) and not any("Gogh" in prompt for prompt in counted[0])


def test_targets_are_the_categorys_templates_or_those_of_the_kind_in_all_spellings():
    of_category = target_prompts(VAN_GOGH, SRSMEConfig(target_templates=2))
    assert of_category == dict.fromkeys(["VanGogh", "VanGogh painting", "a painting by VanGogh"], "")
    pulled = target_prompts(VAN_GOGH, SRSMEConfig(target_templates=1, anchor="category"))
    assert set(pulled.values()) == {"painting"}
    of_kind = target_prompts(VAN_GOGH, SRSMEConfig(target_templates=3, template_set="kind", anchor="neutral"))
    assert of_kind["Vincent van Gogh"] == "an artist" and of_kind["a painting by Van Gogh"] == "a painting by an artist"
    templates = load_template_set("style").templates
    assert len(of_kind) == len({"{}", *templates[:3]}) * len(set(VAN_GOGH.spellings))


def test_anchors_are_aligned_with_their_prompts_token_by_token(tiny):
    anchors = {"a painting by VanGogh": "a painting by an artist", "VanGogh": "an artist"}
    aims = anchor_embeds(tiny, anchors)
    assert aims.shape == (2, *tiny.encode_prompt([""]).shape[1:])
    rows = align_tokens(tiny.tokenizers[0], "VanGogh", "an artist")
    assert torch.equal(aims[1], tiny.encode_prompt(["an artist"])[0][rows])
    assert torch.equal(anchor_embeds(tiny, {"a": "", "b": ""}), tiny.encode_prompt([""]))


def test_more_weight_changes_what_is_retained_less_and_the_concept_too(tiny, retain):
    protected = ["", "Picasso"]
    basis = NullSpaceBasis.fit(tiny.encode_prompt(protected), protected, 1e-7, "svd")
    captions, own = tiny.encode_prompt(retain.captions[:20]), tiny.encode_prompt([VAN_GOGH.prompt])
    changes = []
    for scale in (0.0, 1.0, 100.0):
        settings = dict.fromkeys(SCALES[1:], scale)
        config = SRSMEConfig(
            mode="closed_form",
            init="closed_form",
            anchor="neutral",
            template_set="kind",
            target_templates=4,
            **settings,
        )
        shift = initial_shift(tiny, VAN_GOGH, config, basis, retain)
        name = shift.parameter_names[0].removesuffix(".weight")
        changes.append([float(shift.delta_output(name, embeds.double()).norm()) for embeds in (captions, own)])
    assert changes[0][0] > changes[1][0] > changes[2][0]
    assert changes[0][1] > changes[2][1] > 0
