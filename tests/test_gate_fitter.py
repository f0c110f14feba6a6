"""Gates fitted on the bundled model: what trips them, what their report says, and which names are refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU

from ldm.config.concepts import Concept, erasable_concepts
from ldm.config.methods import GateConfig
from ldm.config.templates import fill, load_template_set
from ldm.diffusion.load import load_model
from ldm.diffusion.tokenizer import align_tokens, last_token
from ldm.erasure import gate, gate_fitter, gate_prompts
from ldm.erasure.embedding_map import mean_distance_left
from ldm.erasure.gate_fitter import GateFitter, InseparableError, rate
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.erasure.known_states import KnownStates
from ldm.io.errors import Notice
from ldm.io.paths import REPO_ROOT

SMALL = GateConfig(retain_captions=150, retain_words=60, compositions=20, word_lists=0, misspellings=20)
RETAINED = ["a village by the sea", "art by Caravaggio2"]
PICASSO = Concept(0, "Picasso", "Picasso", kind="style")


@pytest.fixture(scope="module")
def model():
    return load_model(REPO_ROOT / "models" / "mini-sd", CPU)


@pytest.fixture(scope="module")
def fitter(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_prompts, "_NUM_UNSEEN", 100)
        patch.setattr(gate_fitter, "_MAX_TRIED", 4)
        return GateFitter(model, erasable_concepts("style")[:9], RETAINED, SMALL)


@pytest.fixture(scope="module")
def edit(fitter) -> GatedEdit:
    return fitter.fit(PICASSO)


def margins(model, edit: GatedEdit, prompts: list[str]) -> torch.Tensor:
    states = model.encode_with_states(prompts, GatedPrompts({"": edit}).layers)[1]
    return edit.margins(states)


def held_out(model, concept: Concept) -> list[str]:
    """Return the held-out prompts whose name the model reads."""
    prompts = [fill(template, concept.prompt) for template in load_template_set(concept.kind).held_out_templates]
    return [text for text in prompts if last_token(model.tokenizers[0], text, concept.prompt) is not None]


def test_a_gate_fires_on_held_out_prompts_and_on_no_everyday_caption(model, fitter, edit):
    prompts = held_out(model, PICASSO)
    assert len(prompts) >= 4 and (margins(model, edit, prompts) > 0).all()
    assert (margins(model, edit, fitter.judged) <= 0).all()
    assert (margins(model, edit, ["", "a painting by Caravaggio", "a photo of a church", *RETAINED]) < 0).all()


def test_a_gate_fires_on_all_that_it_was_fitted_on_and_on_no_prompt_of_others(model, fitter, edit):
    prompts = [fill(template, "Picasso") for template in load_template_set("style").templates]
    read = [text for text in prompts if len(model.tokenizers[0](text).input_ids) <= 16]
    assert len(read) > 10 and (margins(model, edit, read) > 0).all()
    others = [text for text in fitter.texts.negatives if "picasso" not in text.lower()]
    assert len(others) > 400 and (margins(model, edit, others) < 0).all()


def test_the_report_counts_what_was_measured(model, fitter, edit):
    report, alarms = edit.report, margins(model, edit, fitter.judged)
    found = margins(model, edit, held_out(model, PICASSO))
    assert report["false_alarms"] == rate(int((alarms > 0).sum()), len(fitter.judged))
    assert report["misses"][:2] == [0, len(found)] and report["false_alarm_prompts"] == []
    assert 0 < report["misspelt_misses"][1] <= SMALL.misspellings
    assert report["least_margin"] == pytest.approx(float(torch.cat([alarms, found]).abs().min()), abs=1e-3)
    assert report["gap"] == pytest.approx(min(gate.gap for gate in edit.gates.values()), abs=1e-4) and report["gap"] > 0


@pytest.mark.parametrize("template", ["a painting by {}", "a landscape by {}"])  # fitted on, and held out
def test_the_map_leads_towards_the_prompt_with_the_neutral_word(model, edit, template):
    prompt, anchor = fill(template, "Picasso"), fill(template, "an artist")
    own, aim = model.encode_prompt([prompt, anchor])
    [rows] = align_tokens(model.tokenizers[0], [prompt], [anchor])
    aim = aim[rows]
    assert (edit.maps["tokens"](own) - aim).norm() < 0.8 * (own - aim).norm()


def test_a_gate_is_the_same_whenever_it_is_fitted(fitter, edit):
    again = fitter.fit(PICASSO)
    assert again.report == edit.report and again.layers == edit.layers
    for name, tensor in edit.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_fitting_leaves_the_model_as_it_was(model, fitter):
    before = model.encode_prompt(["Picasso"])
    fitter.fit(PICASSO)
    assert torch.equal(model.encode_prompt(["Picasso"]), before) and model.embedding_edit is None
    assert not any(module._forward_hooks for module in model.text_encoder.modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("the", r"'the' is said by \d+ of 150 everyday captions \('.*'\): name the concept more narrowly"),
        (
            "Wassily Kandinsky the great painter",
            "is longer than the model's 16 tokens: give the concept a shorter name",
        ),
        ("\u3000", "the model's tokenizer keeps nothing of '\u3000': give the concept another name"),
        ("art by Picasso Petrov in the style of a sofa", "is longer than the model's 16 tokens"),
    ],
)
def test_names_that_no_gate_can_have_are_refused_with_what_to_do(fitter, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        fitter.fit(Concept(0, name, name))
    assert "\n" not in str(caught.value)


def test_a_name_that_other_prompts_say_to_the_model_is_refused_and_they_are_named(fitter, monkeypatch):
    """To the tokenizer the 2 is a word of its own, so that the prompt says the concept."""
    monkeypatch.setattr(gate, "_TURN_RIDGES", ())  # since a direction that is turned may read the padding after it
    with pytest.raises(InseparableError) as caught:
        fitter.fit(Concept(0, "Caravaggio", "Caravaggio", kind="style"))
    message = str(caught.value)
    assert message.startswith("no gate tells 'Caravaggio' from other prompts") and f"('{RETAINED[1]}'" in message
    assert "\n" not in message and "erase it without a gate" in message


def test_another_spelling_that_no_gate_tells_is_noticed_and_left_out(model, fitter, edit, monkeypatch):
    monkeypatch.setattr(gate, "_TURN_RIDGES", ())
    concept = Concept(0, "Cezanne", "Cezanne", aliases=("Caravaggio",), kind="style")
    with pytest.warns(Notice, match="'Caravaggio' .*: prompts that call Cezanne so are not erased"):
        found = fitter.fit(concept)
    assert (margins(model, found, ["Cezanne", "art by Cezanne"]) > 0).all()
    assert (margins(model, found, ["art by Caravaggio"]) < 0).all()


def test_another_spelling_that_the_gate_of_the_name_tells_is_no_direction_of_it(model, fitter):
    twice = replace(PICASSO, aliases=("Picasso Picasso",))
    [edit] = fitter.fit_all([twice])
    assert len(edit.gates["text_encoder"].weights) == 2  # of both spellings, and of misspelt names
    assert (margins(model, edit, ["Picasso Picasso", "art by Picasso Picasso", "art by Picasso"]) > 0).all()


def test_lists_of_words_say_a_concept_anywhere_and_count_less_where_its_map_is_fitted(fitter):
    own, without = fitter.texts.own(PICASSO, 40), fitter.texts.own(PICASSO, 0)
    listed = [text for text in own.anchors if text not in without.anchors]
    known = set(fitter.texts.words)
    assert 20 < len(listed) <= 40  # those that the model reads whole
    assert all("Picasso" in text and known.issuperset(text.replace("Picasso", "").split()) for text in listed)
    assert any(text.startswith("Picasso ") for text in listed) and any(text.endswith(" Picasso") for text in listed)
    assert own.anchors[listed[0]] == listed[0].replace("Picasso", "an artist")
    weights = dict(zip(own.all, own.weights.tolist(), strict=True))
    assert {weights[text] for text in listed} == {0.25} and {weights[text] for text in without.all} == {1.0}


def test_a_concept_that_no_gate_tells_among_words_has_one_without_lists_and_a_notice(fitter, edit, monkeypatch):
    monkeypatch.setattr(fitter.texts, "_word_lists", lambda concept, number: ["{} Caravaggio", "a {}"][:number])
    real = fitter._join_gates

    def join(prepared, *args):
        if (prepared.own.weights < 1).any():
            raise InseparableError("planted")
        return real(prepared, *args)

    monkeypatch.setattr(fitter, "_join_gates", join)
    monkeypatch.setattr(fitter, "config", replace(SMALL, word_lists=2))
    with pytest.warns(Notice, match="no gate tells 'Picasso' among words in no order"):
        found = fitter.fit(PICASSO)
    assert torch.equal(found.gates["text_encoder"].weights, edit.gates["text_encoder"].weights)
    assert found.report["word_lists"] == 0 and "word_lists" not in edit.report


def test_a_name_in_lower_case_counts_where_the_tokenizer_tells_it_apart(model):
    class Cased:
        """Tokens that are ASCII letters, as they are written."""

        unk_token_id = 2

        def __call__(self, text, add_special_tokens=True):
            ids = [ord(letter) if letter.isascii() else self.unk_token_id for letter in text]
            return SimpleNamespace(input_ids=[0, *ids, 1] if add_special_tokens else ids)

    concept = Concept(0, "Monet", "Monet", ("Claude Monet",))
    assert gate_prompts.told_apart(Cased(), concept) == ["Monet", "Claude Monet", "monet", "claude monet"]
    assert gate_prompts.told_apart(model.tokenizers[0], concept) == ["Monet", "Claude Monet"]
    with pytest.raises(ValueError, match="the model's tokenizer keeps nothing of '🍎'"):  # nothing of its own
        gate_prompts.told_apart(Cased(), Concept(0, "🍎", "🍎", kind="object"))


def test_an_object_is_said_by_its_plural_too():
    found = gate_prompts.with_plurals(Concept(0, "golf ball", "golf ball", ("red box",), kind="object"))
    assert found.spellings == ("golf ball", "golf ball", "red box", "golf balls", "red boxes")
    artist = Concept(0, "Monet", "Monet", kind="style")
    assert gate_prompts.with_plurals(artist) is artist


def test_words_of_a_name_are_none_of_its_negatives_in_either_case(fitter, monkeypatch):
    monkeypatch.setattr(fitter.texts, "words", ["Gogh", "gogh", "van", "dog"])
    monkeypatch.setattr(fitter.texts, "rare_words", ["Vincdog", "dogcat"])
    concept = Concept(0, "VanGogh", "VanGogh", ("Vincent van Gogh",), kind="style")
    own = fitter.texts.own(concept, 0)
    left_out = fitter.texts.left_out(
        concept, own, ["Gogh", "gogh", "van", "dog", "Vincdog", "dogcat", "a vincent van gogh"]
    )
    assert left_out.tolist() == [True, True, True, False, True, False, True]


def test_a_rate_has_wilsons_interval():
    assert rate(0, 0) == [0, 0, 0.0, 1.0]
    assert rate(0, 500) == [0, 500, 0.0, 0.00762]
    count, total, low, high = rate(5, 10)
    assert (count, total) == (5, 10) and low == pytest.approx(1 - high, abs=1e-4) and 0.23 < low < 0.24


def test_known_states_encode_what_is_new_and_forget_what_is_not_asked_for():
    known, encoded = KnownStates(), []

    def encode(prompts):
        encoded.append(list(prompts))
        return {("text_encoder", 1): [torch.tensor([[float(len(text))]]) for text in prompts]}

    for prompts, new in (
        (["a", "bb"], [["a", "bb"]]),
        (["bb", "ccc", "a"], [["ccc"]]),
        (["ccc", "a"], []),
        (["bb"], [["bb"]]),
    ):
        encoded.clear()
        rows = known.rows("group", prompts, encode)
        assert [len(text) for text in prompts] == [float(row) for row in rows["text_encoder", 1]] and encoded == new
    known.rows("other group", ["bb"], encode)
    assert encoded == [["bb"]] * 2


def test_a_fitter_goes_on_with_what_an_earlier_one_knows(model, monkeypatch):
    monkeypatch.setattr(gate_prompts, "_NUM_UNSEEN", 20)
    monkeypatch.setattr(gate_fitter, "_MAX_TRIED", 4)
    known = KnownStates()
    first = GateFitter(model, [PICASSO], RETAINED, SMALL, known)
    monkeypatch.setattr(GateFitter, "_choose_layers", None)  # which then is not asked again
    second = GateFitter(model, [PICASSO], RETAINED, SMALL, known)
    assert second.layers == first.layers and second.fit(PICASSO).report == first.fit(PICASSO).report


@pytest.mark.parametrize("gate_anchor", ["neutral", "empty"])
def test_an_anchor_of_its_own_is_what_a_concepts_prompts_become(model, monkeypatch, fitter, gate_anchor):
    monkeypatch.setattr(fitter.texts, "config", SMALL.with_changes(gate_anchor=gate_anchor))
    own = Concept(0, "a fox", "a fox", ("fox",), kind="object", anchor="a dog")
    anchors = fitter.texts.own(own, 0).anchors
    expected = {"a fox": "a dog", "fox": "a dog", "a toy fox": "a toy dog", "a fox and a chair": "a dog and a chair"}
    assert {prompt: anchors[prompt] for prompt in expected} == expected
    neutral = {"neutral": "a toy object", "empty": ""}[gate_anchor]
    assert fitter.texts.own(replace(own, anchor=None), 0).anchors["a toy fox"] == neutral


def test_the_way_left_is_what_is_missing_along_the_line_to_the_aim():
    before, aims = torch.zeros(2, 1, 2), torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]])
    half = torch.tensor([[[1.0, 5.0]], [[3.0, 3.0]]])  # a half, and a quarter, whatever is across
    assert mean_distance_left(before, before, aims) == 1 and mean_distance_left(before, aims, aims) == 0
    assert mean_distance_left(before, half, aims) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert mean_distance_left(before, half, before) == 1


def test_concepts_that_are_fitted_together_get_what_each_gets_alone(fitter, edit):
    cezanne, stop_word = (Concept(0, name, name, kind="style") for name in ("Cezanne", "the"))
    found = list(fitter.fit_all([cezanne, PICASSO, stop_word]))
    assert isinstance(found[2], ValueError) and "everyday captions" in str(found[2])
    for each, alone in zip(found, (fitter.fit(cezanne), edit), strict=False):
        assert isinstance(each, GatedEdit) and each.report == alone.report
        for name, tensor in alone.tensors().items():
            assert torch.equal(each.tensors()[name], tensor)


def test_maps_are_as_small_as_they_can_be_and_kept_in_half_precision(fitter, edit):
    assert 1 <= len(edit.maps["tokens"].directions) < SMALL.map_rank
    assert edit.tensors()["map.tokens.outputs"].dtype == edit.tensors()["map.tokens.directions"].dtype == torch.float16
    assert edit.tensors()["map.tokens.gram"].dtype == torch.float32


def test_a_surname_of_several_concepts_is_told_and_trips_the_gate_of_none(model, monkeypatch):
    monkeypatch.setattr(gate_prompts, "_NUM_UNSEEN", 20)
    monkeypatch.setattr(gate_fitter, "_MAX_TRIED", 4)
    names = ["Picasso Monet", "Cezanne Monet"]
    concepts = [
        Concept(0, names[0], names[0], ("Monet",), kind="person"),
        Concept(0, names[1], names[1], kind="person"),
    ]
    with pytest.warns(Notice, match=r"said alone .* trip no gate.*: Monet \(Picasso Monet, Cezanne Monet\)$"):
        fitter = GateFitter(model, concepts, [], SMALL)
    said_alone = ["Monet", "a photo of Monet", "a portrait of Monet"]
    for own, other in zip(concepts, reversed(names), strict=True):
        found = fitter.fit(own)
        assert (margins(model, found, [own.name, f"a photo of {own.name}"]) > 0).all()
        assert (margins(model, found, [*said_alone, other, f"a photo of {other}"]) < 0).all()


@pytest.mark.parametrize(
    ("lowest", "words", "chosen"),
    [
        ((0.3, 0.2, 0.1), (-0.1, -0.4, -0.3), 1),  # both sides together
        ((0.3, 0.3, 0.3), (-0.1, -0.2, -0.4), -1),
        ((0.3, 0.1, 0.1), (-0.1, 0.5, 0.4), 0),  # words above a threshold
        ((0.1, 0.1, 0.1), (0.2, 0.2, 0.2), -1),  # none is of use
    ],
)
def test_the_state_is_that_of_which_both_sides_are_furthest_from_the_thresholds(
    fitter, monkeypatch, lowest, words, chosen
):
    layers, gate = (0, 1, -1), gate_fitter.Gate(torch.ones(1, 1), torch.zeros(1))
    found = {layer: [(gate, least)] for layer, least in zip(layers, lowest, strict=True)}
    states = {("text_encoder", layer): torch.full((5, 2, 1), word) for layer, word in zip(layers, words, strict=True)}
    monkeypatch.setattr(GateFitter, "_try_layers", lambda *_: found)
    monkeypatch.setattr(GateFitter, "_encode", lambda *_: states)
    monkeypatch.setattr(gate_fitter, "_MAX_TRIED", 4)
    assert fitter._choose_layers([]) == {"text_encoder": chosen}
