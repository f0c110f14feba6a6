"""Settings follow what a model is: flags, then the file in its folder, then its family's, never the folder's name."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT, compvis_config, is_error
from omegaconf import OmegaConf

from ldm.config import models
from ldm.config.methods import ExportConfig, SamplingConfig, SRSMEConfig
from ldm.config.models import (
    BUNDLED_MODELS,
    DEFAULT_CONFIG,
    ModelConfig,
    SettingsSource,
    bundled_config,
    bundled_settings,
    describe_sources,
    load_model_config,
    read_model_config,
    read_settings,
    read_yaml,
    save_settings,
)
from ldm.diffusion.families import FAMILIES
from ldm.diffusion.load import SUPPORTED_PIPELINES, find_settings, load_model, settings_source
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.export import export
from ldm.erasure.shift import SeparableShift
from ldm.io.errors import Notice
from ldm.io.files import SETTINGS_FILE, changed_files, read_dir_metadata, unlisted_files
from ldm.io.paths import REPO_ROOT

SOLVE, SRS_ME = "train-scripts/SRSME_Solution.py", "train-scripts/SRS_ME.py"
GENERATE = "eval-scripts/generate-images-merge.py"
FAMILY = read_model_config(DEFAULT_CONFIG)
OWN = "sampling: {num_inference_steps: 7}\nnull_space: {rank_rtol: 1.0e-3}\nmethods: {SRS-ME: {ridge_weight: 0.5}}\n"


@pytest.fixture
def folder(tiny_path, tmp_path) -> Path:
    """Return a copy of the tiny model, which has no settings of its own."""
    return Path(shutil.copytree(tiny_path, tmp_path / "own"))


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """Return a folder whose configs/ is read by name in place of this repository's."""
    (tmp_path / "repository" / "configs").mkdir(parents=True)
    monkeypatch.setattr(models, "REPO_ROOT", tmp_path / "repository")
    return tmp_path / "repository"


def settings(source, config=None) -> ModelConfig:
    return load_model_config(settings_source(source, config))


@pytest.mark.parametrize("name", [*BUNDLED_MODELS, "stable-diffusion/v1-inference"])
def test_the_bundled_models_settings_are_those_of_before_they_carried_them(name):
    before = json.loads((ROOT / "tests" / "data" / "settings.json").read_text())[name]
    now = json.loads(json.dumps(dataclasses.asdict(bundled_config(name)), default=str))
    assert {key: value for key, value in now.items() if key != "sources"} == before


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_a_bundled_models_file_is_whole_in_itself_and_says_what_it_was_trained_on(name):
    path = ROOT / "models" / name / SETTINGS_FILE
    assert set(read_settings(path)) == set(OmegaConf.load(path)) and "base_config" not in OmegaConf.load(path)
    trained = read_yaml(REPO_ROOT / "configs" / f"{name}.yaml")
    for key in ("mixture_weights", "captions"):
        assert read_settings(path).dataset.get(key, "listed") == trained.dataset.get(key, "listed")
    assert read_settings(path).seed == trained.seed
    assert not {"sampling", "null_space", "evaluation", "edit", "gate", "methods"} & set(trained)


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_a_copy_of_a_bundled_model_has_its_settings_whatever_it_is_called(name, tmp_path, recwarn):
    original = ROOT / "models" / name
    small = shutil.ignore_patterns("*.safetensors")
    for other in ("another", "mini-sd", "mini-sd-logos", "concepts"):
        copy = shutil.copytree(original, tmp_path / other, ignore=small)
        assert settings(copy) == settings(original) == bundled_config(name)
    assert not [warning for warning in recwarn if issubclass(warning.category, Notice)]


def test_a_loaded_copy_of_mini_sd_is_mini_sd(tmp_path):
    copy = load_model(shutil.copytree(ROOT / "models" / "mini-sd", tmp_path / "my-model"), CPU)
    original = load_model(ROOT / "models" / "mini-sd", CPU)
    assert copy.digest == original.digest and copy.name == "my-model"
    assert load_model_config(copy) == load_model_config(original) == bundled_config("mini-sd") != FAMILY


@pytest.mark.parametrize("name", [*BUNDLED_MODELS, "mini-many"])
def test_another_model_in_a_folder_called_as_a_bundled_one_has_its_familys_settings(name, tiny_path, tmp_path, recwarn):
    model = load_model(shutil.copytree(tiny_path, tmp_path / name), CPU)
    assert model.settings_path is None and load_model_config(model) == FAMILY == settings(tmp_path / name)
    shutil.copy(ROOT / "configs" / "mini-sd.yaml", tmp_path / "any.ckpt")  # any file, which is not read here
    assert find_settings(tmp_path / f"{name}.ckpt") is None and find_settings(f"owner/{name}") is None
    assert not [warning for warning in recwarn if issubclass(warning.category, Notice)]


def test_every_pipeline_that_is_loaded_has_a_family():
    assert set(models.FAMILIES) == set(FAMILIES) >= set(SUPPORTED_PIPELINES)
    for path in models.FAMILIES.values():
        config = read_model_config(path)
        assert not config.methods["SRS-ME"].trains and config.sources["edit.form"] == models.DEFAULT_CONFIG


def test_a_models_file_stands_over_its_familys_and_that_over_the_defaults(folder, tmp_path, monkeypatch):
    (folder / SETTINGS_FILE).write_text(OWN)
    family = tmp_path / "family.yaml"
    family.write_text("sampling: {num_inference_steps: 5, guidance_scale: 2}\nmethods: {SRS-ME: {anchor: category}}")
    monkeypatch.setitem(models.FAMILIES, "StableDiffusionPipeline", family)
    config = settings(folder)
    assert config.sampling == SamplingConfig(num_inference_steps=7, guidance_scale=2.0)
    assert config.methods["SRS-ME"] == SRSMEConfig(ridge_weight=0.5, anchor="category")
    assert config.sources == {
        "sampling.num_inference_steps": folder / SETTINGS_FILE,
        "sampling.guidance_scale": family,
        "null_space.rank_rtol": folder / SETTINGS_FILE,
        "methods.SRS-ME.ridge_weight": folder / SETTINGS_FILE,
        "methods.SRS-ME.anchor": family,
    }


def test_the_source_of_each_setting_is_said(folder):
    (folder / SETTINGS_FILE).write_text(OWN)
    text = describe_sources(settings(folder), ["methods.SRS-ME", "gate"], {"lr": "--lr", "anchor": "--anchor"})
    assert text == (
        f"settings: --lr, --anchor typed; configs/stable-diffusion/v1-inference.yaml: mode, init, preserve_scale, "
        "captions_preserve_scale, neutral_preserve_scale, others_preserve_scale, target_templates, template_set, "
        f"max_directions; {folder / SETTINGS_FILE}: ridge_weight; all others: their defaults"
    )
    assert describe_sources(ModelConfig(), ["sampling"], {}) == "settings: all others: their defaults"


@pytest.mark.slow
def test_scripts_say_where_their_settings_come_from(script, folder):
    (folder / SETTINGS_FILE).write_text(OWN)
    model = ["--model", folder, "--artifacts_dir", folder / "shifts", "--device", "cpu"]
    code, out, err = script(SOLVE, *model, "--erased_index", "1", "--em_indexes", "0,2")
    assert code == 0 and f"settings: {folder / SETTINGS_FILE}: rank_rtol; all others: their defaults" in out, err
    code, out, err = script(
        SRS_ME, *model, "--erased_index", "1", "--ridge", "0.1", "--iter_break", "0", "--least_effect", "-9"
    )
    assert code == 0 and "settings: --iter_break, --ridge typed; configs/stable-diffusion/" in out, err
    prompts = folder / "prompts.csv"
    prompts.write_text("case_number,prompt,evaluation_seed\n0,VanGogh,3\n")
    flags = ["--prompts_path", prompts, "--save_path", folder / "images", "--guidance_scale", "2", "--shifts", "1"]
    code, out, err = script(GENERATE, *model, *flags)
    assert code == 0 and f"--guidance_scale typed; {folder / SETTINGS_FILE}: num_inference_steps; " in out, err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("samplings: {}", ["no key samplings, did you mean sampling?"]),
        ("null_space: {rank_rtoll: 1}", ["null_space", "rank_rtoll", "rank_rtol"]),
        ("null_space: {rank_rtol: much}", ["null_space", "much"]),
        ("null_space: 3", ["null_space: 3 is no mapping"]),
        ("methods: 3", ["methods: 3 is no mapping"]),
        ("methods: {SRSME: {}}", ["no method SRSME, did you mean SRS-ME"]),
        ("model: {}", ["no key model"]),
        ("a: [", ["cannot read"]),
        ("a: \x00", ["cannot read"]),
        ("sampling: {num_inference_steps: '${oc.env:HOME}'}", ["asks for a value from elsewhere"]),
        ("a: &a [*a]", ["lead back to themselves"]),
        ("a: !!python/object/apply:os.system [true]", ["cannot read"]),
        ("base_config: ../../etc", ["is no model's file"]),
        ("[1]", ["is no mapping"]),
    ],
)
def test_a_settings_file_with_a_fault_is_refused_by_name_in_one_line(script, folder, text, words):
    (folder / SETTINGS_FILE).write_text(text)
    is_error(script(SOLVE, "--model", folder, "--erased_index", "1", "--device", "cpu"), SETTINGS_FILE, *words)
    with pytest.raises(ValueError, match=SETTINGS_FILE):
        settings(folder)


def test_a_settings_file_that_is_no_text_is_refused_in_one_line(script, folder):
    (folder / SETTINGS_FILE).write_bytes(b"\xff\xfe\x80")
    is_error(script(SOLVE, "--model", folder, "--erased_index", "1", "--device", "cpu"), SETTINGS_FILE, "cannot read")


def exported(source: Path, target: Path) -> Path:
    """Export a model with a shift of nothing, and return the folder."""
    model = load_model(source, CPU)
    shift = SeparableShift.zeros(text_layers(model.denoiser), torch.eye(model.context_dim)[:2], 1.0)
    export(model, {"1": shift}, target, ExportConfig(), [""])
    return target


def test_an_export_carries_the_settings_and_its_user_may_change_them(folder, tmp_path):
    (folder / SETTINGS_FILE).write_text(f"# mine\n{OWN}")
    target = exported(folder, tmp_path / "merged" / "mini-sd")
    copy = target / SETTINGS_FILE
    assert copy.read_text() == f"# mine\n{OWN}"
    assert SETTINGS_FILE not in read_dir_metadata(target)["files"]
    assert load_model_config(load_model(target, CPU)) == settings(folder) != FAMILY
    copy.write_text("sampling: {num_inference_steps: 3}")
    assert not changed_files(target) and not unlisted_files(target)
    assert load_model_config(load_model(target, CPU)).sampling.num_inference_steps == 3
    (target / "unet" / "config.json").write_text("{}")  # damaged, and so written again
    with pytest.warns(Notice, match="it is written again"):
        exported(folder, target)
    assert not changed_files(target) and copy.read_text() == "sampling: {num_inference_steps: 3}"
    copy.unlink()
    assert load_model_config(load_model(target, CPU)) == FAMILY


def test_an_export_of_a_model_without_settings_takes_no_other_models(tiny_path, tmp_path):
    source = Path(shutil.copytree(tiny_path, tmp_path / "mini-sd"))
    target = exported(source, tmp_path / "merged")
    assert read_dir_metadata(target)["base_model"] == "mini-sd" and (target / SETTINGS_FILE).is_file()
    assert load_model_config(load_model(target, CPU)) == FAMILY


def test_an_export_of_settings_with_a_fault_is_refused_before_anything_is_written(folder, tmp_path):
    (folder / SETTINGS_FILE).write_text("samplings: {}")
    with pytest.raises(ValueError, match="no key samplings"):
        exported(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("base", ["mini-sd", "mini-many", "models/mini-sd-logos"])
def test_a_model_that_an_older_version_merged_has_the_bundled_models_settings(base, folder):
    content = json.loads((ROOT / "tests" / "data" / "v0.1" / "merged" / "tiny-1" / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(content | {"base": base}))
    assert settings(folder) == bundled_config(Path(base).name) != FAMILY
    (folder / SETTINGS_FILE).write_text(OWN)
    assert settings(folder).sampling == SamplingConfig(num_inference_steps=7)


@pytest.mark.parametrize("base", ["tiny", "../../mini-sd/x", "concepts", ""])
def test_a_model_that_was_merged_from_any_other_has_its_familys_settings(base, folder):
    (folder / "metadata.json").write_text(json.dumps({"base_model": base}))
    assert settings(folder) == FAMILY


def test_an_older_file_of_the_folders_name_is_read_with_a_notice(folder, repository):
    (repository / "configs" / "own.yaml").write_text(OWN)
    with pytest.warns(Notice, match=rf"configs/own.yaml is read since .* move it to .*own/{SETTINGS_FILE}"):
        assert settings(folder).sampling.num_inference_steps == 7
    (folder / "metadata.json").write_text(json.dumps({"base_model": "base"}))
    assert find_settings(folder) is None
    (repository / "configs" / "own.yaml").rename(repository / "configs" / "base.yaml")
    with pytest.warns(Notice, match=r"configs/base.yaml is read since a model is called base"):
        assert find_settings(folder) == repository / "configs" / "base.yaml"
    (repository / "configs" / "base.yaml").rename(folder / SETTINGS_FILE)
    assert settings(folder).sampling.num_inference_steps == 7


def test_an_older_file_of_a_checkpoints_or_hub_ids_name_is_read(repository, recwarn):
    for name in ("sd", "owner--name"):
        (repository / "configs" / f"{name}.yaml").write_text(OWN)
    assert find_settings("owner/name") == repository / "configs" / "owner--name.yaml" and not len(recwarn)
    with pytest.warns(Notice, match="give it as `config_path`"):
        assert find_settings("sd.ckpt") == repository / "configs" / "sd.yaml"
    assert find_settings("other.ckpt") is None


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_a_bundled_models_checkpoint_has_its_settings(name):
    assert settings("any.ckpt", ROOT / "configs" / f"{name}.yaml") == bundled_config(name)
    assert settings("any.ckpt") == settings("any.ckpt", DEFAULT_CONFIG) == FAMILY


def test_a_checkpoints_config_stands_over_what_the_folder_of_its_parts_carries(folder, tmp_path):
    config = compvis_config(folder, tmp_path)
    assert settings("any.ckpt", config) == FAMILY
    (folder / SETTINGS_FILE).write_text(OWN)
    assert settings("any.ckpt", config) == settings(folder)
    config.write_text(f"component_configs: {folder}\nbase_config: mini-sd\nnull_space: {{rank_rtol: 1.0e-2}}")
    assert settings("any.ckpt", config).null_space.rank_rtol == 1e-2
    assert settings("any.ckpt", config).sampling == settings(folder).sampling  # and not mini-sd's
    (folder / SETTINGS_FILE).unlink()
    assert settings("any.ckpt", config).sampling == bundled_config("mini-sd").sampling


def test_compvis_own_config_says_nothing_of_settings(tmp_path):
    config = tmp_path / "v1-inference.yaml"
    config.write_text("model: {base_learning_rate: 1.0e-4, target: ldm.LatentDiffusion, params: {}}")
    assert settings("any.ckpt", config) == FAMILY


def test_settings_that_lead_back_to_themselves_are_refused(folder, repository):
    (repository / "configs" / "loop.yaml").write_text(f"component_configs: {folder}")
    (folder / SETTINGS_FILE).write_text("base_config: loop")
    with pytest.raises(ValueError, match="its settings lead back to itself"):
        settings(folder)


def test_a_trained_model_is_saved_with_the_settings_of_its_config(tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text("base_config: mini-sd-logos\nseed: 4\nsampling: {num_inference_steps: 3}\ntrain: {}")
    save_settings(SettingsSource("StableDiffusionPipeline", config), tmp_path)
    read = read_settings(tmp_path / SETTINGS_FILE)
    assert read.seed == 4 and not {"train", "unet", "base_config", "component_configs"} & set(read)
    assert read.dataset.mixture_weights == read_yaml(config).dataset.mixture_weights
    own, logos = read_model_config(DEFAULT_CONFIG, tmp_path / SETTINGS_FILE), bundled_config("mini-sd-logos")
    assert own.sampling.num_inference_steps == 3 and own.methods == logos.methods and own.gate == logos.gate


def test_a_bundled_models_settings_go_by_name_where_a_name_is_all_there_is():
    assert bundled_settings("mini-many") == ROOT / "models" / "mini-sd-logos" / SETTINGS_FILE
    assert bundled_settings("own") is bundled_settings("") is bundled_settings("../models/mini-sd") is None
