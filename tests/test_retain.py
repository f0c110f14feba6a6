"""The retain set: what a linear shift should change little, what that costs, and what the closed form makes of it."""

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import is_error, styles
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from ldm.cli.reproduce import reproduction_commands
from ldm.config.concepts import Concept, erasable_concepts, get_concept
from ldm.config.methods import GateConfig, NullSpaceConfig, SRSMEConfig
from ldm.config.templates import load_template_set
from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.tokenizer import align_tokens, read_part
from ldm.erasure.erase import erase, initial_shift
from ldm.erasure.eraser import ConceptEraser
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.protection import Protection
from ldm.erasure.retain import RetainSet
from ldm.erasure.shift import SHIFT_FILE_TYPE
from ldm.erasure.targets import anchor_embeds, target_prompts
from ldm.io.errors import Notice
from ldm.io.paths import REPO_ROOT, ArtifactPaths
from ldm.io.tensors import read_metadata
from ldm.ledger.ledger import HISTORY_FILE, Ledger

VAN_GOGH = get_concept("style", 1)
SCALES = ("vocab_preserve_scale", "captions_preserve_scale", "neutral_preserve_scale", "others_preserve_scale")
OWN = ["a church by VanGogh", "a church by Picasso", "a tree", "a church by van gogh"]  # two of them say VanGogh
CLOSED = SRSMEConfig(mode="closed_form", init="closed_form")
ERASE, LEDGER = "train-scripts/SRS_ME.py", "train-scripts/ledger.py"


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
    [rows] = align_tokens(tiny.tokenizers[0], ["VanGogh"], ["an artist"])
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


def test_a_users_prompts_cost_by_their_mean_without_those_that_say_the_concept(tiny):
    retained = RetainSet(tiny, (), [*OWN, "a tree"])
    kept = tiny.encode_prompt(OWN[1:3]).flatten(0, 1).double()
    cost = retained.cost(VAN_GOGH, SRSMEConfig(retain_preserve_scale=4.0), 3)
    assert torch.allclose(cost, 4 * 3 * kept.T @ kept / 2, rtol=1e-6)
    every = tiny.encode_prompt(OWN).flatten(0, 1).double()  # none of which says Cezanne
    cost = retained.cost(get_concept("style", 0), SRSMEConfig(retain_preserve_scale=4.0), 3)
    assert torch.allclose(cost, 4 * 3 * every.T @ every / 4, rtol=1e-6)
    assert not RetainSet(tiny, (), OWN[:1]).cost(VAN_GOGH, SRSMEConfig(), 3).any()  # where none is left
    assert not retained.cost(VAN_GOGH, SRSMEConfig(retain_preserve_scale=0.0), 3).any()


def test_the_images_of_a_users_prompts_change_less_and_the_concept_still_goes(tiny):
    protected, prompt = ["", "Picasso"], tiny.encode_prompt(["a church by Picasso"]).double()
    basis = NullSpaceBasis.fit(tiny.encode_prompt(protected), protected, 1e-7, "svd")
    changes = []
    for prompts in ([], OWN):
        shift = initial_shift(tiny, VAN_GOGH, CLOSED, basis, RetainSet(tiny, (), prompts))
        name = shift.parameter_names[0].removesuffix(".weight")
        own = tiny.encode_prompt([VAN_GOGH.prompt]).double()
        changes.append([float(shift.delta_output(name, embeds).norm()) for embeds in (prompt, own)])
    assert changes[1][0] < 0.1 * changes[0][0] and changes[1][1] > 0.2 * changes[0][1]


def test_other_retain_prompts_make_a_shift_anew_and_it_says_which_it_has(tiny, tmp_path):
    artifacts = ArtifactPaths(tmp_path, "SRS-ME", tiny.name, "style", 1, 0)
    arguments = tiny, artifacts, [VAN_GOGH], CLOSED, Protection(styles(2), NullSpaceConfig()), tmp_path

    def make(*prompts: str, config: SRSMEConfig = CLOSED) -> int:
        return len(erase(*arguments[:3], config, *arguments[4:], retain=prompts))

    def said() -> dict:
        return read_metadata(artifacts.shift(VAN_GOGH.label), SHIFT_FILE_TYPE)

    assert make() == 1 and "retain" not in said() and "retain_preserve_scale" not in said()["config"]
    assert make(config=CLOSED.with_changes(retain_preserve_scale=7.0)) == 0  # which weighs nothing
    with pytest.warns(Notice, match=r"`retain` is without .*: 'a church by VanGogh' \(VanGogh\)$"):
        assert make(*OWN[:3]) == 1
    assert said()["retain"]["prompts"] == 3 and len(said()["retain"]["digest"]) == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert make(*OWN[:3]) == 0 and make("a tree") == 1 and make() == 1 and make() == 0
    assert make("a tree", config=CLOSED.with_changes(retain_preserve_scale=0.0)) == 1  # which its gate takes
    assert make() == 1


def test_a_users_prompts_are_among_those_that_trip_no_gate(tiny, tmp_path, monkeypatch):
    given: list[list[str]] = []

    class Recorded:
        def __init__(self, model, others, retained, config, known):
            given.append(list(retained))

        def fit(self, concept):
            return None

    monkeypatch.setattr("ldm.erasure.gate_fitters.GateFitter", Recorded)
    artifacts = ArtifactPaths(tmp_path, "SRS-ME", tiny.name, "style", 1, 0)
    settings = CLOSED, Protection(styles(2), NullSpaceConfig()), tmp_path, GateConfig()
    erase(tiny, artifacts, [VAN_GOGH], *settings, retain=["a tree"])
    assert len(given) == 1 and {"Picasso", "a tree"} <= set(given[0])


def test_a_file_of_prompts_is_retained_by_a_command_and_in_python(script, mini_path, tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,evaluation_seed,case_number\na tree,1,0\na red fox in a tree,2,1\n")
    flags = ["--model", mini_path, "--artifacts_dir", tmp_path / "shifts", "--device", "cpu", "--concepts", "a red fox"]
    flags += ["--least_effect", "-9"]
    code, _, err = script(ERASE, *flags, "--retain", tmp_path / "mine.csv", "a church", "--retain_preserve_scale", "9")
    assert code == 0 and "'a red fox in a tree' (red fox)" in err and "--retain is without" in err, err
    path = ArtifactPaths(tmp_path / "shifts", "SRS-ME", "mini-sd", "own", 1, 0).shift("redfox")
    metadata = read_metadata(path, SHIFT_FILE_TYPE)
    assert metadata["retain"]["prompts"] == 3 and metadata["config"]["retain_preserve_scale"] == 9
    is_error(script(ERASE, *flags, "--retain_preserve_scale", "9"), "--retain_preserve_scale goes with --retain")
    is_error(script(ERASE, *flags, "--retain", " "), "--retain has an empty text")
    is_error(script(ERASE, *flags, "--retain", "none.txt"), "no file none.txt")


def test_a_ledger_says_what_its_shifts_retain(script, mini_path, tmp_path):
    root = ["--ledger_dir", tmp_path / "ledger"]
    init = ["--model", mini_path, "--device", "cpu", "--concepts", "a violin", "--retain", "a tree", "a church"]
    code, out, err = script(LEDGER, "init", *root, *init)
    assert code == 0 and "changed little: a tree, a church" in out, err
    assert script(LEDGER, "erase", *root, "violin", "--device", "cpu")[0] in (0, 3)
    ledger = Ledger(tmp_path / "ledger" / HISTORY_FILE)
    metadata = ledger.load(ledger.active_shifts()["violin"]).metadata
    assert ledger.retain == ["a tree", "a church"] and metadata["retain"]["prompts"] == 2
    assert "--retain 'a tree' 'a church'" in reproduction_commands(ledger)[0]
    text = ledger.path.read_text().replace('["a tree", "a church"]', "7")
    with pytest.raises(ValueError, match="line 1"):
        Ledger.from_text(ledger.path, text)


def test_an_eraser_retains_what_it_is_given(mini_path, tmp_path):
    eraser = ConceptEraser(mini_path, artifacts_dir=tmp_path, device="cpu")
    eraser.erase("VanGogh", "a red fox", retain="a tree")
    assert [shift.metadata["retain"]["prompts"] for shift in eraser.shifts.values()] == [1, 1]


def test_a_pipelines_shifts_retain_what_it_is_given_until_all_is_restored(tiny_path):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_path, safety_checker=None)
    eraser = ConceptEraser(pipe, form="linear")
    eraser.config, eraser.null_space = CLOSED, NullSpaceConfig(rank_rtol=1e-7)
    layer = next(iter(text_layers(pipe.unet).values()))
    before = layer.weight.detach().clone()
    rows = eraser._encoder.encode_with_states(["a church by Picasso"], {})[0][0]
    changes = []
    for prompts in ((), OWN):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            eraser.erase("VanGogh", kind="style", retain=prompts)
        assert any("`retain` is without" in str(notice.message) for notice in found) == bool(prompts)
        changes.append(float((rows @ (layer.weight.detach() - before).T).norm()))
        eraser.restore("all")
        assert torch.equal(layer.weight, before) and not eraser._kept.retained
    assert changes[1] < 0.1 * changes[0]
    with pytest.raises(ValueError, match=r"`retain` has the file 'mine.txt'"):
        eraser.erase("VanGogh", retain="mine.txt")
