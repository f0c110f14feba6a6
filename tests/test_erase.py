"""From concepts to shifts: bases that share their work, shifts with metadata, and what is there already is kept."""

import math

import pandas as pd
import pytest
import torch
from conftest import styles
from PIL import Image

from ldm.config.concepts import get_concept, watermark_prompts
from ldm.config.methods import ForgetMeNotConfig, JointSRSMEConfig, NullSpaceConfig, SRSMEConfig
from ldm.erasure.erase import erase, erase_concepts
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.protection import ProtectedRows, Protection, solve_null_spaces
from ldm.erasure.shift import SHIFT_FILE_TYPE, SeparableShift, WeightShift
from ldm.erasure.training import CURVE_COLUMNS
from ldm.io.errors import MissingFileError
from ldm.io.paths import ArtifactPaths
from ldm.io.sharding import Shard
from ldm.io.tensors import CREATED_BY, load_tensors, read_metadata, save_tensors

CLOSED_FORM = SRSMEConfig(mode="closed_form", init="closed_form", max_directions=None)
STYLES = [get_concept("style", index) for index in range(3)]


def artifacts_in(root, method="SRS-ME"):
    return ArtifactPaths(root, method, "tiny", "style", 1, 0)


def test_bases_solved_together_are_those_solved_alone(tiny, tmp_path):
    # The last of the concepts is not protected for the others.
    concepts = styles(0, 1, 2, 7)
    artifacts = artifacts_in(tmp_path)
    config = NullSpaceConfig(rank_rtol=1e-5, protected_templates=1, always_protected_weight=3.0)
    summaries = solve_null_spaces(tiny, artifacts, concepts, Protection(styles(0, 1, 2, 3), config))
    assert [summary.concept for summary in summaries] == concepts
    for summary in summaries:
        concept, basis = summary.concept, NullSpaceBasis.load(summary.path)
        assert summary.path == artifacts.basis(concept.index)
        prompts = ["", *watermark_prompts()]
        for other in (get_concept("style", index) for index in (0, 1, 2, 3) if index != concept.index):
            prompts += [other.prompt, other.captions[0]]
        assert basis.metadata["protected"] == prompts and summary.num_protected == len(prompts)
        rows = tiny.encode_prompt(prompts).double()
        rows[:3] *= 3
        alone = NullSpaceBasis.fit(rows, prompts, 1e-5, "svd")
        assert basis.metadata["rank"] == alone.metadata["rank"] == summary.rank
        assert summary.rank + summary.nullity == summary.width == 96 and len(basis.vectors) == summary.nullity
        assert torch.allclose(basis.vectors.T @ basis.vectors, alone.vectors.T @ alone.vectors, atol=1e-6)
        assert torch.allclose(basis.protected.T @ basis.protected, alone.protected.T @ alone.protected, atol=1e-4)


def test_a_basis_from_the_same_inputs_is_kept(tiny, tmp_path):
    artifacts = artifacts_in(tmp_path)
    solve_null_spaces(tiny, artifacts, STYLES[:1], Protection(styles(0, 1), NullSpaceConfig()))
    written = artifacts.basis(0).stat().st_mtime_ns
    solve_null_spaces(tiny, artifacts, STYLES[:1], Protection(styles(0, 1), NullSpaceConfig()))
    assert artifacts.basis(0).stat().st_mtime_ns == written
    solve_null_spaces(
        tiny,
        artifacts,
        STYLES[:1],
        Protection(styles(0, 1), NullSpaceConfig(), ["a photo of a church"]),
    )
    metadata = NullSpaceBasis.load(artifacts.basis(0)).metadata
    assert metadata["protected"] == ["", *watermark_prompts(), "a photo of a church", "VanGogh"]


def test_of_several_processes_each_solves_and_erases_its_shard(tiny, tmp_path):
    artifacts = artifacts_in(tmp_path)
    for rank, expected in ((0, [0, 2]), (1, [1])):
        solved = solve_null_spaces(
            tiny,
            artifacts,
            STYLES,
            Protection(styles(0, 1, 2), NullSpaceConfig()),
            Shard(rank, 2),
        )
        assert [summary.concept.index for summary in solved] == expected
        erased = erase_concepts(tiny, artifacts, STYLES, CLOSED_FORM, tmp_path, shard=Shard(rank, 2))
        assert [summary.concept for summary in erased] == [STYLES[index].name for index in expected]


def test_the_rows_of_what_is_protected_are_all_but_the_concepts_own():
    """The always protected rows are weighted, a concept that is not protected has all of the others' rows."""
    generator = torch.Generator().manual_seed(0)
    names = ["", "a", "b", "c"]
    embeds = {name: torch.randn(2, 12, generator=generator, dtype=torch.float64) for name in names}
    rows = ProtectedRows(embeds, [""], {"0": ["a"], "1": ["b"], "2": ["c"]}, 4.0)
    concepts = styles(0, 2, 7)
    expected = (["b", "c"], ["a", "b"], ["a", "b", "c"])
    for concept, factor, others in zip(concepts, rows.leave_one_out(concepts), expected, strict=True):
        assert rows.without(concept) == ["", *others]
        stacked = torch.cat([4 * embeds[""], *(embeds[name] for name in others)])
        assert torch.allclose(factor.T @ factor, stacked.T @ stacked)


def test_a_closed_form_is_saved_with_its_metadata_and_measured(tiny, tmp_path):
    artifacts = artifacts_in(tmp_path)
    protection = Protection(styles(0, 1, 2), NullSpaceConfig())
    (summary,) = erase(tiny, artifacts, STYLES[1:2], CLOSED_FORM, protection, tmp_path / "no images")
    assert (summary.concept, summary.iterations) == ("VanGogh", 0) and math.isnan(summary.momentum)
    assert summary.max_leakage_protected < 1e-5 < 1e-2 < summary.target_change
    shift = WeightShift.load(artifacts.find_shift(1))
    shift.check(tiny)
    metadata = shift.metadata
    assert metadata["created_by"] == CREATED_BY == "srs-me" and metadata["method"] == "SRS-ME"
    assert (metadata["category"], metadata["concept_index"], metadata["concept"]) == ("style", 1, "VanGogh")
    assert metadata["protected"] == ["", *watermark_prompts(), "Cezanne", "Picasso"]
    assert metadata["config"]["mode"] == "closed_form" and "lr" not in metadata["config"]  # which does not act
    assert "data_digest" not in metadata
    curve = pd.read_csv(artifacts.shift(1).with_suffix(".csv"))
    assert list(curve) == list(CURVE_COLUMNS) == ["iteration", "loss", "monitor", "momentum"] and not len(curve)


def test_a_closed_forms_coefficients_are_its_map_of_the_weights(tiny, tmp_path):
    """`w = W A` with `A = (Y - X)^T P (P^T P + C)^-1` and `P = X S^T`, one A for all layers."""
    artifacts = artifacts_in(tmp_path)
    erase(
        tiny,
        artifacts,
        STYLES[1:2],
        CLOSED_FORM,
        Protection(styles(0, 1, 2), NullSpaceConfig()),
        tmp_path,
    )
    shift, basis = WeightShift.load(artifacts.shift(1)), NullSpaceBasis.load(artifacts.basis(1))
    assert isinstance(shift, SeparableShift)
    target, anchor = (tiny.encode_prompt([prompt])[0].double() for prompt in ("VanGogh", ""))
    size = torch.linalg.matrix_norm(target @ torch.linalg.qr(basis.vectors.T).Q, ord=2)
    projection = target @ shift.directions.T
    cost = CLOSED_FORM.ridge_weight * size**2 * torch.eye(len(shift.directions), dtype=torch.float64)
    gain = torch.linalg.inv(projection.T @ projection + cost)
    embedding_map = (anchor - target).T @ projection @ gain
    for name, coefficients in shift.coefficients.items():
        expected = tiny.denoiser.get_submodule(name).weight.double() @ embedding_map
        assert torch.allclose(shift.scale * coefficients.double(), expected, atol=1e-6 * expected.abs().max())


def test_a_shift_from_the_same_inputs_is_kept_and_other_settings_make_another(tiny, tmp_path, capsys):
    artifacts, protection = (
        artifacts_in(tmp_path),
        Protection(styles(0, 1, 2), NullSpaceConfig()),
    )
    assert len(erase(tiny, artifacts, STYLES, CLOSED_FORM, protection, tmp_path)) == 3
    contents = {index: artifacts.shift(index).read_bytes() for index in range(3)}
    artifacts.shift(2).unlink()
    (again,) = erase(tiny, artifacts, STYLES, CLOSED_FORM, protection, tmp_path)
    assert again.concept == "Picasso" and "is there already, from the same inputs" in capsys.readouterr().out
    assert {index: artifacts.shift(index).read_bytes() for index in range(3)} == contents
    assert erase(tiny, artifacts, STYLES, CLOSED_FORM.with_changes(lr=7.0), protection, tmp_path) == []
    assert len(erase(tiny, artifacts, STYLES, CLOSED_FORM.with_changes(ridge_weight=1.0), protection, tmp_path)) == 3


def test_a_shift_of_an_older_version_is_kept_too(tiny, tmp_path):
    """Its header has the older keys, another program's name, and settings that today do not act."""
    artifacts, protection = (
        artifacts_in(tmp_path),
        Protection(styles(0, 1), NullSpaceConfig()),
    )
    erase(tiny, artifacts, STYLES[:1], CLOSED_FORM, protection, tmp_path)
    tensors, metadata = load_tensors(artifacts.shift(0), SHIFT_FILE_TYPE)
    old_names = {
        "created_by": "made_by",
        "base_model": "base",
        "category": "erase_cat",
        "concept_index": "erased_index",
        "config": "arguments",
        "iterations": "steps",
    }
    older = {old_names.get(key, key): value for key, value in metadata.items()} | {"made_by": "SRS_ME.py"}
    older["arguments"] = {
        "init": "closed-form",
        "ridge": 0.003,
        "keep": 0.0,
        "spare": 0.0,
        "anchor": "blank",
        "templates": 0,
        "scale_factor": 1e-4,
        "max_base": None,
        "iter_break": 0,
    }
    save_tensors(artifacts.shift(0), dict(tensors), SHIFT_FILE_TYPE, older)
    assert read_metadata(artifacts.shift(0), SHIFT_FILE_TYPE)["category"] == "style"
    assert erase(tiny, artifacts, STYLES[:1], CLOSED_FORM, protection, tmp_path) == []


def test_what_makes_nothing_or_lacks_its_inputs_is_refused(tiny, tmp_path):
    artifacts = artifacts_in(tmp_path)
    with pytest.raises(ValueError, match="`mode` closed_form trains nothing from `init` zero"):
        erase_concepts(tiny, artifacts, STYLES, CLOSED_FORM.with_changes(init="zero"), tmp_path)
    with pytest.raises(MissingFileError, match="no null space basis") as missing:
        erase_concepts(tiny, artifacts, STYLES, CLOSED_FORM, tmp_path)
    assert missing.value.kind == "basis" and missing.value.details["erased_index"] == "0"
    with pytest.raises(MissingFileError, match="no folder"):
        erase_concepts(tiny, artifacts_in(tmp_path, "FMN"), STYLES[:1], ForgetMeNotConfig(), tmp_path / "none")


def test_a_joint_method_trains_all_at_once_in_one_process(tiny, tmp_path):
    artifacts = artifacts_in(tmp_path, "SRS-ME-dagger")
    solve_null_spaces(tiny, artifacts, STYLES[:2], Protection(styles(0, 1), NullSpaceConfig()))
    for concept in STYLES[:2]:
        (tmp_path / "images" / concept.name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / concept.name / "0_0.png")
    config = JointSRSMEConfig(max_steps=2, max_directions=None)
    assert erase_concepts(tiny, artifacts, STYLES[:2], config, tmp_path / "images", shard=Shard(1, 2)) == []
    summaries = erase_concepts(tiny, artifacts, STYLES[:2], config, tmp_path / "images", shard=Shard(0, 2))
    assert [summary.iterations for summary in summaries] == [2, 2]
    for concept in STYLES[:2]:
        metadata = WeightShift.load(artifacts.shift(concept.index)).metadata
        assert metadata["joint_with"] == [0, 1] and metadata["data_digest"] and metadata["iterations"] == 2
