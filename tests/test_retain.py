"""The retain set: what a linear shift should change little, what that costs, and what the closed form makes of it."""

from dataclasses import replace

import pytest
import torch
from conftest import styles
from transformers import CLIPTokenizer

from ldm.config.concepts import Concept, erasable_concepts, get_concept
from ldm.config.methods import NullSpaceConfig, SRSMEConfig
from ldm.config.templates import load_template_set
from ldm.diffusion.tokenizer import align_tokens, read_part
from ldm.erasure.erase import erase, initial_shift
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.protection import Protection
from ldm.erasure.retain import RetainSet
from ldm.erasure.targets import anchor_embeds, target_prompts
from ldm.io.paths import REPO_ROOT, ArtifactPaths

VAN_GOGH = get_concept("style", 1)
SCALES = ("vocab_preserve_scale", "captions_preserve_scale", "neutral_preserve_scale", "others_preserve_scale")


@pytest.fixture
def retain(tiny):
    return RetainSet(tiny, erasable_concepts("style"))


def test_nothing_costs_anything_by_default_and_each_scale_adds_its_own_cost(retain):
    zero = retain.cost(VAN_GOGH, SRSMEConfig(), 1)
    assert not zero.any()
    costs = {name: retain.cost(VAN_GOGH, SRSMEConfig(**{name: 2.0}), 1) for name in SCALES}
    for cost in costs.values():
        assert torch.allclose(cost, cost.T) and torch.linalg.eigvalsh(cost)[0] > -1e-9 * cost.norm()
    together = retain.cost(VAN_GOGH, SRSMEConfig(**dict.fromkeys(SCALES, 2.0)), 1)
    assert torch.allclose(together, sum(costs.values()), rtol=1e-12)
    assert torch.allclose(retain.cost(VAN_GOGH, SRSMEConfig(others_preserve_scale=6.0), 1), 3 * costs[SCALES[3]])


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
    retained.cost(concept, SRSMEConfig(captions_preserve_scale=1.0), 1)
    assert counted and first not in counted[0] and len(counted[0]) > 900
    counted.clear()
    retained.cost(VAN_GOGH, SRSMEConfig(others_preserve_scale=1.0), 1)
    assert len(counted) == 1 and all("picasso" in prompt.lower() for prompt in counted[0])
    retained.cost(VAN_GOGH, SRSMEConfig(others_preserve_scale=3.0), 1)
    assert len(counted) == 1  # the moments are computed once
    counted.clear()
    retained.cost(VAN_GOGH, SRSMEConfig(neutral_preserve_scale=1.0), 1)
    assert any("an artist" in prompt for prompt in counted[0]) and not any("Gogh" in prompt for prompt in counted[0])


def test_targets_are_the_categorys_templates_or_those_of_the_kind_in_all_spellings():
    tokenizer = CLIPTokenizer.from_pretrained(REPO_ROOT / "models" / "mini-sd" / "tokenizer")
    of_category = target_prompts(VAN_GOGH, SRSMEConfig(target_templates=2), tokenizer)
    assert of_category == dict.fromkeys(["VanGogh", "VanGogh painting", "a painting by VanGogh"], "")
    pulled = target_prompts(VAN_GOGH, SRSMEConfig(target_templates=1, anchor="category"), tokenizer)
    assert set(pulled.values()) == {"painting"}
    settings = {"template_set": "kind", "anchor": "neutral"}
    of_kind = target_prompts(VAN_GOGH, SRSMEConfig(target_templates=2, **settings), tokenizer)
    assert of_kind["Vincent van Gogh"] == "an artist" and of_kind["a painting by Van Gogh"] == "a painting by an artist"
    templates = load_template_set("style").templates
    assert templates[0] == "{}" and len(of_kind) == 3 * len(set(VAN_GOGH.spellings))
    all_templates = target_prompts(VAN_GOGH, SRSMEConfig(target_templates=30, **settings), tokenizer)
    assert len(all_templates) < len(templates) * 3  # of which some are longer than mini-sd reads
    assert all(read_part(tokenizer, prompt) is None for prompt in all_templates)


def test_anchors_are_aligned_with_their_prompts_token_by_token(tiny):
    anchors = {"a painting by VanGogh": "a painting by an artist", "VanGogh": "an artist"}
    aims = anchor_embeds(tiny, anchors, True)
    assert aims.shape == (2, *tiny.encode_prompt([""]).shape[1:])
    rows = align_tokens(tiny.tokenizers[0], "VanGogh", "an artist")
    assert torch.equal(aims[1], tiny.encode_prompt(["an artist"])[0][rows])
    alone = anchor_embeds(tiny, {"VanGogh": "an artist"}, True)
    assert torch.equal(alone[0], aims[1])
    assert torch.equal(anchor_embeds(tiny, {"a": "", "b": ""}, False), tiny.encode_prompt([""]))


def test_a_shift_is_made_anew_when_the_prompts_that_it_is_made_of_change(tiny, tmp_path):
    prompts = SRSMEConfig(mode="closed_form", init="closed_form", template_set="kind", others_preserve_scale=1.0)
    artifacts = ArtifactPaths(tmp_path, "SRS-ME", tiny.name, "style", 1, 0)
    protection = Protection(styles(2), NullSpaceConfig())
    first = erase(tiny, artifacts, [VAN_GOGH], prompts, protection, tmp_path)
    assert len(first) == 1 and not erase(tiny, artifacts, [VAN_GOGH], prompts, protection, tmp_path)
    renamed = replace(VAN_GOGH, aliases=(*VAN_GOGH.aliases, "Vincent"))
    assert len(erase(tiny, artifacts, [renamed], prompts, protection, tmp_path)) == 1


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
