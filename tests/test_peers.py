"""UCE and SPEED: their closed forms solve what their papers say, and what they make is a shift like every other."""

import pytest
import torch
from conftest import CPU, is_error, make_xl
from families import make_family

from ldm.config.concepts import get_concept, watermark_prompts
from ldm.config.methods import METHODS
from ldm.config.peers import SPEEDConfig, UCEConfig
from ldm.diffusion.load import load_model
from ldm.diffusion.tokenizer import read_whole
from ldm.erasure.erase import erase
from ldm.erasure.key_values import concept_rows, guide_prompt, invariant_rows, preserved_prompts, prompt_rows
from ldm.erasure.methods import check_method
from ldm.erasure.protection import Protection
from ldm.erasure.shift import DenseShift, WeightShift
from ldm.erasure.speed import constrained_change, most_shifted, null_projection, refine
from ldm.erasure.uce import uce_map
from ldm.io.paths import ArtifactPaths

CONCEPTS = [get_concept("style", index) for index in (0, 1, 3)]
JACKSON = CONCEPTS[2]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope_of(objective, change):
    change = change.detach().requires_grad_()
    return torch.autograd.grad(objective(change), change)[0]


def test_uces_change_is_the_least_of_its_objective():
    weight, erased, guides, preserved = randn(5, 8), randn(2, 8, seed=1), randn(2, 8, seed=2), randn(3, 8, seed=3)
    change = weight @ uce_map(erased, guides, preserved, 0.5, 2.0, 3.0)

    def objective(delta):
        cost = 2 * (erased @ (weight + delta).T - guides @ weight.T).square().sum()
        return cost + 3 * (preserved @ delta.T).square().sum() + 0.5 * delta.square().sum()

    assert slope_of(objective, change).abs().max() < 1e-9 and change.norm() > 0.1


def test_speeds_change_is_the_least_of_its_objective_among_those_that_its_constraints_allow():
    weight, erased, anchors = randn(5, 12), randn(2, 12, seed=1), randn(2, 12, seed=2)
    invariant, retained = randn(3, 12, seed=3), randn(4, 12, seed=4)
    projection = null_projection(retained, 1e-9)
    assert torch.allclose(projection @ projection, projection) and torch.linalg.matrix_rank(projection) == 8
    change = weight @ constrained_change(erased, anchors, invariant, projection)
    assert change.norm() > 0.1
    assert (change @ retained.T).abs().max() < 1e-9 and (change @ invariant.T).abs().max() < 1e-9

    def objective(delta):
        return (erased @ (weight + delta).T - anchors @ weight.T).square().sum() + delta.square().sum()

    # Along what the constraints leave free, rows of P without those of C2 in P, nothing makes it less.
    held = torch.linalg.qr(projection @ invariant.T).Q
    free = projection - held @ held.T
    assert (slope_of(objective, change) @ free).abs().max() < 1e-9
    assert (change - change @ free).abs().max() < 1e-9


def test_speeds_constraints_hold_where_the_retain_set_says_what_is_invariant():
    invariant = randn(3, 12)
    projection = null_projection(torch.cat([invariant[:2], randn(2, 12, seed=1)]), 1e-9)
    change = constrained_change(randn(2, 12, seed=2), randn(2, 12, seed=3), invariant, projection)
    assert change.isfinite().all() and (change @ invariant.T).abs().max() < 1e-9 and change.norm() > 0.01


def test_speeds_threshold_is_one_of_the_mean_second_moment():
    rows = torch.diag(torch.tensor([2.0, 0.2, 0.02], dtype=torch.float64))  # values 4/3, 0.04/3, 0.0004/3
    free = [round(float(null_projection(rows, threshold).trace())) for threshold in (0.0001, 0.001, 0.1, 2)]
    assert free == [0, 1, 2, 3]
    assert torch.equal(null_projection(rows[:0], 0.1), torch.eye(3, dtype=torch.float64))


def test_the_retain_set_is_what_erasing_shifts_most_and_variants_along_what_the_layer_shrinks():
    rows, erasing = torch.eye(4, dtype=torch.float64), torch.diag(torch.tensor([1.0, 2, 3, 10]).double())
    assert torch.equal(most_shifted(rows, erasing), rows[3:])
    weight = torch.diag(torch.tensor([5.0, 4, 3, 1e-3]).double())
    found = refine(weight, rows, erasing, SPEEDConfig(augmentations=6), torch.Generator().manual_seed(0))
    assert torch.equal(found[0], rows[3]) and 1 < len(found) < 7
    assert (found[1:, :3] == 0).all() and (found[1:, 3] != 1).all()
    plain = refine(weight, rows, erasing, SPEEDConfig(augmentations=0), torch.Generator())
    assert torch.equal(plain, rows[3:])
    assert torch.equal(refine(weight, rows, erasing, SPEEDConfig(filter_retained=False), torch.Generator()), rows)


def test_a_concept_is_the_row_of_its_last_token_or_what_the_settings_say(tiny):
    rows = tiny.encode_prompt([JACKSON.prompt])[0].double()  # two tokens between the first and the end
    guide = tiny.encode_prompt(["art"])[0].double()
    last = len(tiny.tokenizers[0]("art").input_ids) - 2
    erased, guides = concept_rows(tiny, JACKSON, UCEConfig())
    assert torch.equal(erased, rows[2:3]) and torch.equal(guides, guide[last : last + 1])
    erased, guides = concept_rows(tiny, JACKSON, UCEConfig(rows="end", anchor="empty"))
    assert torch.equal(erased, rows[2:])
    assert torch.equal(guides, tiny.encode_prompt([""])[0].double()[:14])
    erased, guides = concept_rows(tiny, JACKSON, SPEEDConfig(rows="all"))
    assert torch.equal(erased, rows) and torch.equal(guides, guide)
    erased, _ = concept_rows(tiny, JACKSON, UCEConfig(expand_prompts=True))
    phrase = tiny.encode_prompt(["style of Jackson Pollock"])[0].double()
    assert len(erased) == 6 and torch.equal(erased[5], phrase[4])
    assert torch.equal(prompt_rows(tiny, [""], "last")[0], tiny.encode_prompt([""])[0, 0].double())
    assert prompt_rows(tiny, [], "last").shape == (0, 96)


def test_what_takes_a_concepts_place():
    church = get_concept("object", 1)
    assert [guide_prompt(concept, None) for concept in (JACKSON, church)] == ["art", ""]
    assert guide_prompt(JACKSON, "category") == "painting" and guide_prompt(JACKSON, "neutral") == "an artist"
    assert guide_prompt(JACKSON, "empty") == ""


def test_the_preserve_list_is_what_is_protected_without_what_says_the_concept(tiny):
    tokenizer = tiny.tokenizers[0]
    named = ["a dog", "a dog by jackson pollock", "VanGogh"]
    found = preserved_prompts(JACKSON, UCEConfig(), CONCEPTS, named, tokenizer)
    assert found == ["Cezanne", "VanGogh", "a dog"]
    config = SPEEDConfig(preserve_templates=1, preserve_captions=1000, preserve_always=True)
    found = preserved_prompts(JACKSON, config, CONCEPTS, [], tokenizer)
    assert found[:7] == ["Cezanne", "Cezanne painting", "VanGogh", "VanGogh painting", "", *watermark_prompts()]
    assert 7 < len(found) < 1007 and read_whole(tokenizer, found) == set(found)  # no caption that is cut


def test_the_invariant_rows_are_the_first_of_the_empty_prompt_and_centroids_of_the_others(tiny):
    rows = tiny.encode_prompt([""])[0].double()
    found = invariant_rows(tiny, 3)
    assert found.shape == (4, 96) and torch.equal(found[0], rows[0])
    assert torch.allclose(invariant_rows(tiny, 1)[1], rows[1:].mean(0))
    assert len(invariant_rows(tiny, 100)) == len(rows)


def make(model, name, root, concepts=CONCEPTS[:2], **settings):
    artifacts = ArtifactPaths(root, name, model.name, "style", 1, 0)
    config = METHODS[name](**settings)
    protection = Protection(CONCEPTS, None, ["a dog"])
    summaries = erase(model, artifacts, concepts, config, protection, root / "none")
    return summaries, [WeightShift.load(artifacts.shift(concept.label)) for concept in concepts]


@pytest.mark.parametrize("name", ["UCE", "SPEED"])
def test_each_concept_has_a_shift_of_its_own_that_no_other_erasure_decides(tiny, tmp_path, name):
    summaries, shifts = make(tiny, name, tmp_path / "together")
    assert all(isinstance(shift, DenseShift) for shift in shifts)
    assert [summary.iterations for summary in summaries] == [0, 0]
    for concept, shift in zip(CONCEPTS, shifts, strict=False):
        _, (alone,) = make(tiny, name, tmp_path / "alone", [concept])
        for parameter in shift.parameter_names:
            assert torch.equal(shift.delta_weight(parameter), alone.delta_weight(parameter))
        others = [other.prompt for other in CONCEPTS if other != concept]
        assert shift.metadata["preserved"] == [*others, "a dog"] and shift.metadata["method"] == name
        assert shift.metadata["config"] == METHODS[name]().to_dict()
    values = [parameter for parameter in shifts[0].parameter_names if "attn2.to_v" in parameter]
    assert values and (len(values) == len(shifts[0].parameter_names)) == (name == "SPEED")
    assert make(tiny, name, tmp_path / "together")[0] == []  # made from the same inputs
    assert len(make(tiny, name, tmp_path / "together", preserve_templates=1)[0]) == 2


def test_speed_leaves_the_empty_prompt_and_its_retain_set_as_they_are(tiny, tmp_path):
    settings = {"rows": "all", "layers": "both", "null_threshold": 1e-9, "null_text_rows": 15, "augmentations": 0}
    _, (shift, _) = make(tiny, "SPEED", tmp_path, **settings)
    rows = tiny.encode_prompt([""])[0].double()
    own = tiny.encode_prompt([CONCEPTS[0].prompt])[0].double()
    for parameter in shift.parameter_names:
        delta = shift.delta_weight(parameter)
        assert (rows @ delta.T).norm() < 1e-5 * (own @ delta.T).norm()
    assert shift.metadata["target_change"] > 0.1


def test_uce_moves_the_last_token_to_the_guides_output(tiny, tmp_path):
    _, (shift, _) = make(tiny, "UCE", tmp_path, lamb=1e-6, preserve_scale=0)
    erased, guides = concept_rows(tiny, CONCEPTS[0], UCEConfig())
    for parameter in shift.parameter_names:
        weight = tiny.denoiser.get_parameter(parameter).double()
        found = erased @ (weight + shift.delta_weight(parameter)).T
        assert torch.allclose(found, guides @ weight.T, atol=1e-4)


@pytest.mark.parametrize("name", ["UCE", "SPEED"])
def test_both_edit_xl_and_refuse_what_has_no_such_keys_and_values(tmp_path, name):
    xl = load_model(make_xl(tmp_path / "xl"), CPU)
    _, shifts = make(xl, name, tmp_path)
    assert all("attn2" in parameter for shift in shifts for parameter in shift.parameter_names)
    for family in ("flux", "pixart-alpha"):
        model = load_model(make_family(family, tmp_path / family), CPU)
        words = f"{name} edits keys and values of cross-attention that see the prompt alone"
        with pytest.raises(ValueError, match=words):
            check_method(model, METHODS[name]())
        with pytest.raises(ValueError, match=words):
            make(model, name, tmp_path)


@pytest.mark.parametrize("name", ["UCE", "SPEED"])
def test_the_scripts_erase_merge_and_restore(script, tiny_path, tmp_path, name):
    flags = ["--model", tiny_path, "--artifacts_dir", tmp_path]
    given = ["--erased_index", "1,2", "--em_indexes", "0,1,2", "--protect", "a dog", "--rows", "end"]
    code, out, _ = script(f"train-scripts/{name}.py", *flags, *given)
    assert code == 0 and "| VanGogh | 0 |" in out and "| Picasso | 0 |" in out
    assert "there already" in script(f"train-scripts/{name}.py", *flags, *given)[1]
    merge = ["train-scripts/Merge_model.py", *flags, "--method", name, "--save_path", tmp_path / "merged"]
    for shifts in ("1,2", "2"):
        code, _, err = script(*merge, "--shifts", shifts)
        assert code == 0, err
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {f"tiny-{name}-12", f"tiny-{name}-2"}
    is_error(script(*merge, "--shifts", "0"), f"{name}.py", "--erased_index 0")
    is_error(script(f"train-scripts/{name}.py", *flags, "--erased_index", "1", "--lr", "1"), "--lr")
