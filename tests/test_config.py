"""Settings: the paper's values by default, a model's YAML over them, and no typo or impossible value unnoticed."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from ldm.config import models
from ldm.config.methods import (
    METHODS,
    EvaluationConfig,
    ExecutionConfig,
    ExportConfig,
    FullCorrelationConfig,
    NullSpaceConfig,
    SamplingConfig,
    SRSMEConfig,
)
from ldm.config.models import DEFAULT_CONFIG, ModelConfig, bundled_config, named_settings, read_model_config, read_yaml
from ldm.config.settings import setting
from ldm.io.paths import REPO_ROOT

# What the original repository and the paper use for Stable Diffusion v1 (arXiv 2402.05947).
SRS_ME = {
    "mode": "learn",
    "init": "zero",
    "ridge_weight": 0.003,
    "preserve_scale": 0.0,
    "vocab_preserve_scale": 0.0,
    "captions_preserve_scale": 0.0,
    "neutral_preserve_scale": 0.0,
    "others_preserve_scale": 0.0,
    "retain_preserve_scale": 10.0,
    "anchor": "empty",
    "target_templates": 0,
    "template_set": "category",
    "lr": 0.1,
    "basis_scale": 1e-4,
    "stop_threshold": 1e-4,
    "l1_weight": 1e-6,
    "max_steps": 1000,
    "max_directions": 691,
    "train_batch_size": 1,
    "seed": 0,
}
FINETUNE = {"lr": 1e-5, "train_batch_size": 1, "train_method": "xattn", "seed": 0}
PEER = {"anchor": None, "rows": "last", "preserve_templates": 0, "preserve_captions": 0, "preserve_always": False}
PAPER = {
    "SRS-ME": SRS_ME,
    "SRS-ME-dagger": SRS_ME,
    "SRS-ME-double-dagger": FINETUNE
    | {"lr": 1e-6, "stop_threshold": 5e-5, "l1_weight": 1e-5, "max_steps": 1000, "repel_weight": 0.0},
    "FMN": FINETUNE | {"max_steps": 50},
    "AbConcept": FINETUNE | {"max_steps": 75},
    "ESD": FINETUNE | {"max_steps": 1000, "start_guidance": 3.0, "negative_guidance": 1.0, "num_inference_steps": 50},
    "UCE": PEER | {"lamb": 0.5, "erase_scale": 1.0, "preserve_scale": 1.0, "expand_prompts": False},
    "SPEED": PEER
    | {
        "layers": "values",
        "null_threshold": 0.1,
        "filter_retained": True,
        "augmentations": 10,
        "augment_rank": 1,
        "null_text_rows": 3,
        "seed": 0,
    },
}

# configs/mini-sd.yaml as it was written before its keys were renamed.
OLD_MINI_SD = """
seed: 0
components: ../models/mini-sd  # the parts' configs, for a checkpoint in CompVis' layout
world: {pictures: 32000, held_out: 1000, shares: [0.13, 0.12, 0.42, 0.28, 0.05, 0]}
tokenizer: {model_max_length: 16}
text_encoder: {hidden_size: 256}
train:
  denoiser: {steps: 6500, batch: 32, lr: 1.0e-3, warmup: 300, ema: 0.995}
sampling: {ddim_steps: 20, guidance_scale: 1.5, batch_size: 64}
solution: {basis: svd, tolerance: 5.0e-4, templates: 0, always: 1}
evaluation: {num_seeds: 20, num_pictures: 50}
erasure:
  SRS-ME: {init: closed-form, ridge: 0.003, keep: 1, spare: 10, anchor: blank, templates: 6, iter_break: 0, lr: 0.1,
    scale_factor: 0.05, threshold: 1.0e-4, reg_beta: 1.0e-6, max_base: null, batch_size: 4}
  SRS-ME-dagger: {init: zero, ridge: 0.003, keep: 1, spare: 10, anchor: blank, templates: 6, iter_break: 300, lr: 0.1,
    scale_factor: 0.05, threshold: 1.0e-4, reg_beta: 1.0e-6, max_base: null, batch_size: 4}
  SRS-ME-double-dagger: {lr: 5.0e-4, threshold: -3.0e-3, reg_beta: 1.0e-6, iter_break: 300, batch_size: 4,
    train_method: xattn}
  FMN: {lr: 3.0e-3, iter_break: 50, batch_size: 4, train_method: xattn}
  AbConcept: {lr: 5.0e-4, iter_break: 75, batch_size: 4, train_method: xattn}
  ESD: {lr: 3.0e-4, iter_break: 50, batch_size: 4, train_method: xattn, start_guidance: 3.0, negative_guidance: 1.0,
    ddim_steps: 10}
"""
OLD_MINI_MANY = """
extends: mini-sd
components: ../models/mini-many
world: {shares: [0.12, 0.08, 0.2, 0.15, 0.03, 0.42]}
train:
  start: mini-sd
  denoiser: {steps: 4500, lr: 8.0e-4}
solution: {tolerance: 1.0e-2, templates: 4, always: 30}
erasure:
  SRS-ME: {ridge: 1.0e-3, keep: 2, spare: 0, templates: 4}
"""


def load_yaml(tmp_path, text) -> ModelConfig:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    return read_model_config(path)


@pytest.mark.parametrize("name", PAPER)
def test_the_defaults_are_the_papers(name):
    assert METHODS[name]().to_dict() == PAPER[name]
    assert list(METHODS) == list(PAPER)


def test_the_defaults_around_the_methods_are_the_papers():
    assert NullSpaceConfig().to_dict() == {
        "null_space_method": "svd",
        "rank_rtol": 1e-7,
        "protected_templates": 0,
        "always_protected_weight": 1.0,
    }
    sampling = {"num_inference_steps": 50, "guidance_scale": 7.5, "sample_batch_size": 4}
    assert SamplingConfig().to_dict() == sampling
    assert EvaluationConfig().to_dict() == {
        "seeds_per_prompt": 50,
        "num_training_images": 50,
        "unprotected_prompts": 10,
    }
    assert ExecutionConfig().to_dict() == {"frozen_device": None, "gradient_checkpointing": False}
    assert ExportConfig() == ExportConfig(("diffusers",), "float32", None, 0.85)


def test_the_familys_config_is_stable_diffusions_whose_closed_form_has_a_retain_set():
    config = bundled_config("anything")
    assert config == read_model_config(DEFAULT_CONFIG)
    closed_form = config.methods["SRS-ME"]
    assert (closed_form.mode, closed_form.anchor, closed_form.template_set) == ("closed_form", "neutral", "kind")
    assert min(closed_form.captions_preserve_scale, closed_form.others_preserve_scale) > 0
    paper = {"mode": "learn", "init": "zero", "anchor": "empty", "template_set": "category", "target_templates": 0}
    scales = {f"{name}preserve_scale": 0.0 for name in ("", "captions_", "neutral_", "others_")}
    learnt = {
        name: config.methods[name].with_changes(max_directions=691, **paper, **scales)
        for name in ("SRS-ME", "SRS-ME-dagger")
    }
    learnt["SRS-ME-double-dagger"] = config.methods["SRS-ME-double-dagger"].with_changes(repel_weight=0.0)
    assert dataclasses.replace(config, methods={**config.methods, **learnt}) == ModelConfig()


@pytest.mark.parametrize(
    "kind", [*METHODS.values(), NullSpaceConfig, SamplingConfig, EvaluationConfig, ExecutionConfig]
)
def test_every_setting_has_a_help_and_cannot_be_changed_in_place(kind):
    settings = kind()
    for entry in dataclasses.fields(kind):
        assert len(entry.metadata["help"]) > 5, entry.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, entry.name, None)


def test_a_copy_with_changes_leaves_the_original_and_names_the_nearest_setting_for_a_typo():
    config = SRSMEConfig()
    changed = config.with_changes(lr=0.5, max_directions=None)
    assert (changed.lr, changed.max_directions, config.lr, config.max_directions) == (0.5, None, 0.1, 691)
    with pytest.raises(ValueError, match=r"no setting ridge_weigth, did you mean ridge_weight\?"):
        config.with_changes(ridge_weigth=1.0)
    with pytest.raises(ValueError, match="no setting xyz: choose from"):
        config.with_changes(xyz=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "gradient"}, "`mode` 'gradient' is none of closed_form, learn"),
        ({"init": "closed-form"}, "`init` 'closed-form' is none of"),
        ({"ridge_weight": 0.0}, "`ridge_weight` '0.0' is not above 0"),
        ({"preserve_scale": -1.0}, "`preserve_scale` '-1.0' is not a number from 0"),
        ({"max_steps": 0}, "`max_steps` '0' is not a number from 1"),
        ({"max_directions": 0}, "`max_directions` '0' is not a number from 1"),
        ({"train_batch_size": 0}, "`train_batch_size` '0' is not a number from 1"),
        ({"lr": float("nan")}, "`lr` 'nan' is not a finite number"),
        ({"l1_weight": float("inf")}, "`l1_weight` 'inf' is not a finite number"),
    ],
)
def test_values_out_of_range_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        SRSMEConfig().with_changes(**change)
    with pytest.raises(ValueError, match=words):
        SRSMEConfig(**change)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NullSpaceConfig(null_space_method="qr"), "`null_space_method` 'qr' is none of svd, elimination"),
        (lambda: NullSpaceConfig(rank_rtol=-1e-9), "`rank_rtol` '-1e-09' is not a number from 0"),
        (lambda: NullSpaceConfig(always_protected_weight=0.0), "is not above 0"),
        (lambda: SamplingConfig(num_inference_steps=0), "`num_inference_steps` '0' is not a number from 1"),
        (lambda: FullCorrelationConfig(train_method="all"), "`train_method` 'all' is none of xattn"),
        (lambda: ExportConfig(("png",)), "'png' is no format: choose from compvis"),
        (lambda: ExportConfig(()), "is no format"),
        (lambda: ExportConfig(save_dtype="int8"), "`save_dtype` 'int8' is none of"),
        (lambda: ExportConfig(rank=0), "`rank` '0' is not a number from 1"),
        (lambda: ExportConfig(rank="half"), "`rank` 'half' is neither a whole number from 1 nor auto"),
        (lambda: ExportConfig(effect_fraction=0.0), r"`effect_fraction` 0.0 is outside \(0, 1\]"),
        (lambda: ExportConfig(effect_fraction=1.01), "`effect_fraction` 1.01 is outside"),
    ],
)
def test_values_out_of_range_are_refused_in_every_config(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_what_a_method_says_of_itself():
    traits = {
        name: (kind.needs_null_space, kind.is_joint, kind.needs_images, kind().trains) for name, kind in METHODS.items()
    }
    assert traits == {
        "SRS-ME": (True, False, True, True),
        "SRS-ME-dagger": (True, True, True, True),
        "SRS-ME-double-dagger": (False, False, True, True),
        "FMN": (False, False, True, True),
        "AbConcept": (False, False, True, True),
        "ESD": (False, False, False, True),
        "UCE": (False, False, False, False),
        "SPEED": (False, False, False, False),
    }


def test_without_a_gradient_the_closed_forms_settings_act_alone():
    config = SRSMEConfig(mode="closed_form", init="closed_form")
    assert not config.trains
    assert set(config.acting()) == {
        "mode",
        "init",
        "ridge_weight",
        "preserve_scale",
        "vocab_preserve_scale",
        "captions_preserve_scale",
        "neutral_preserve_scale",
        "others_preserve_scale",
        "retain_preserve_scale",
        "anchor",
        "target_templates",
        "template_set",
        "max_directions",
        "basis_scale",
    }
    assert SRSMEConfig().acting() == SRSMEConfig().to_dict()


def test_the_bundled_models_settings():
    mini_sd, logos = bundled_config("mini-sd"), bundled_config("mini-sd-logos")
    assert mini_sd.sampling == SamplingConfig(20, 1.5, 64) == logos.sampling
    assert mini_sd.null_space == NullSpaceConfig(rank_rtol=5e-4)
    assert logos.null_space == NullSpaceConfig(rank_rtol=1e-2, protected_templates=4, always_protected_weight=30)
    config = mini_sd.methods["SRS-ME"]
    assert (config.mode, config.init, config.target_templates, config.max_directions) == (
        "closed_form",
        "closed_form",
        6,
        None,
    )
    changes = {"ridge_weight": 1e-3, "preserve_scale": 2, "vocab_preserve_scale": 0, "target_templates": 4}
    changes["retain_preserve_scale"] = 10
    for name in ("SRS-ME", "SRS-ME-dagger"):
        assert logos.methods[name] == mini_sd.methods[name].with_changes(**changes)
    others = [name for name in METHODS if name not in ("SRS-ME", "SRS-ME-dagger")]
    assert all(logos.methods[name] == mini_sd.methods[name] for name in others)
    assert bundled_config("mini-many") == logos  # the older name
    assert read_yaml(REPO_ROOT / "configs" / "mini-sd.yaml").unet.cross_attention_dim == 256


def with_default_steps(config: ModelConfig) -> ModelConfig:
    """Return a config whose closed forms have the defaults of `max_steps`, which does not act in them, and of later.

    SRS-ME-dagger is left out, which trained from zero then, and so is what keeps double dagger from the watermarks.
    """
    methods = {name: method for name, method in config.methods.items() if name != "SRS-ME-dagger"}
    methods["SRS-ME-double-dagger"] = methods["SRS-ME-double-dagger"].with_changes(repel_weight=0.0)
    for name, method in methods.items():
        if isinstance(method, SRSMEConfig) and not method.trains:
            methods[name] = method.with_changes(max_steps=1000, retain_preserve_scale=10.0)
        elif name in ("UCE", "SPEED"):  # of which no older file says anything
            methods[name] = METHODS[name]()
    return dataclasses.replace(config, methods=methods)


@pytest.mark.parametrize(("old", "name"), [(OLD_MINI_SD, "mini-sd"), (OLD_MINI_MANY, "mini-sd-logos")])
def test_an_older_yaml_is_read_to_the_same_settings(tmp_path, old, name):
    today = bundled_config(name)
    read = dataclasses.replace(load_yaml(tmp_path, old), gate=today.gate, edit=today.edit)  # of which it says nothing
    assert with_default_steps(read) == with_default_steps(today)
    assert load_yaml(tmp_path, old).methods["SRS-ME"].mode == "closed_form"


def test_an_older_yamls_dataset_is_read_by_todays_keys(tmp_path):
    (tmp_path / "old.yaml").write_text(OLD_MINI_MANY)
    old, new = read_yaml(tmp_path / "old.yaml"), read_yaml(REPO_ROOT / "configs" / "mini-sd-logos.yaml")
    assert old.dataset == new.dataset and old.train == new.train and "world" not in old
    assert old.dataset.num_images == 32000 and old.train.denoiser.iterations == 4500


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("null_spaces: {}", r"model\.yaml: no key null_spaces, did you mean null_space\?"),
        ("methods: {SRSME: {}}", r"model\.yaml, methods: no method SRSME, did you mean SRS-ME"),
        ("methods: {FMN: {learning_rate: 1}}", r"model\.yaml, methods, FMN: .*learning_rate"),
        ("methods: {SRS-ME: {ridge_weigth: 1}}", r"methods, SRS-ME: .*ridge_weigth.*Did you mean: 'ridge_weight'"),
        ("sampling: {num_inference_step: 20}", r"sampling: .*num_inference_step.*Did you mean: 'num_inference_steps'"),
        ("null_space: {rank_rtoll: 1}", r"null_space: .*rank_rtoll.*Did you mean: 'rank_rtol'"),
        ("sampling: {num_inference_steps: many}", r"model\.yaml, sampling: .*many"),
        ("methods: {ESD: {max_steps: 0}}", r"methods, ESD: `max_steps` '0' is not a number from 1"),
        ("null_space: {null_space_method: qr}", r"null_space: `null_space_method` 'qr' is none of"),
        ("methods: {FMN: 3}", r"model\.yaml, methods, FMN"),
        ("[1, 2]", r"model\.yaml is no mapping"),
        ("a: [", r"cannot read .*model\.yaml"),
    ],
)
def test_a_yaml_with_a_typo_or_an_impossible_value_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as error:
        load_yaml(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_yaml_is_merged_over_the_config_that_it_names(tmp_path):
    config = load_yaml(tmp_path, "base_config: mini-sd\nmethods: {FMN: {lr: 7}}")
    assert config.methods["FMN"] == bundled_config("mini-sd").methods["FMN"].with_changes(lr=7.0)
    assert config.methods["ESD"] == bundled_config("mini-sd").methods["ESD"]
    assert load_yaml(tmp_path, "methods: {FMN: {lr: 7}}").methods["FMN"] == METHODS["FMN"](lr=7.0)


DEEP = "a: " + "[" * 5000 + "]" * 5000
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sampling: {num_inference_steps: '${oc.env:HOME}'}", "asks for a value from elsewhere"),
        ("seed: 3\nsampling: {num_inference_steps: '${seed}'}", "asks for a value from elsewhere"),
        ("seed: 'x ${oc.decode:1}'", "asks for a value from elsewhere"),
        ("'${oc.env:HOME}': 3", "asks for a value from elsewhere"),
        ("base_config: ???", "asks for a value from elsewhere"),
        ("a: &a [*a]", "lead back to themselves"),
        ("a: &a {b: *a}", "lead back to themselves"),
        (LAUGHS, "too large"),
        (DEEP, "too deep"),
        ("a: !!python/object/apply:os.system [true]", "cannot read"),
        ("a: !!python/name:os.system", "cannot read"),
        ("a: *gone", "cannot read"),
        ("a: 1\na: 2", "cannot read"),
        ("? [1, 2]\n: 3", "cannot read"),
        ("a: 1\n---\nb: 2", "cannot read"),
        ("a: \x00", "cannot read"),
        ("base_config: mini-sdd", "base_config mini-sdd is no model's file .* did you mean mini-sd"),
        ("base_config: ../harm", "base_config .* is no model's file"),
        ("base_config: concepts", "base_config concepts is no model's file"),
        ("base_config: [1]", "base_config .* is no model's file"),
        ("base_config: null", "base_config None is no model's file"),
    ],
)
def test_a_yaml_that_means_harm_is_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as error:
        load_yaml(tmp_path, text)
    assert "\n" not in str(error.value) and "model.yaml" in str(error.value) and len(str(error.value)) < 600


def test_aliases_that_end_are_read(tmp_path):
    config = load_yaml(tmp_path, "methods: {FMN: &same {lr: 7}, AbConcept: *same}")
    assert config.methods["FMN"].lr == config.methods["AbConcept"].lr == 7


def test_a_base_config_that_leads_back_to_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "REPO_ROOT", tmp_path)
    (tmp_path / "configs").mkdir()
    for name, base in (("a", "b"), ("b", "a"), ("c", "c")):
        (tmp_path / "configs" / f"{name}.yaml").write_text(f"base_config: {base}")
    for name in "abc":
        with pytest.raises(ValueError, match=r"base_config \w leads back to itself"):
            read_model_config(tmp_path / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("name", ["concepts", "logos", "scenes", "../pyproject", "a\nb", "a" * 300, "\x00", "", ".."])
def test_a_models_name_is_no_path_and_no_other_file(name):
    assert bundled_config(name) == read_model_config(DEFAULT_CONFIG)
    assert named_settings(name, "") is None


def test_a_field_says_its_limits():
    entry = next(entry for entry in dataclasses.fields(SRSMEConfig) if entry.name == "ridge_weight")
    assert entry.metadata["above"] == 0 and not entry.metadata["training_only"]
    assert setting(1, "a help").metadata["choices"] == ()


def test_omegaconf_takes_the_settings_as_they_are():
    assert OmegaConf.to_object(OmegaConf.structured(SRSMEConfig)) == SRSMEConfig()
