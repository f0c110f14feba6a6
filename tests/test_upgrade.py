"""The keys of older versions become today's; what has these already stays as it is."""

import pytest

from ldm.io.legacy import RENAMED_KEYS, upgrade

OLD_SHIFT = {
    "kind": "weight shift",
    "recipe": {
        "made_by": "SRS_ME.py",
        "base": "mini-sd",
        "erase_cat": "style",
        "erased_index": 1,
        "together": [0, 1],
        "steps": 0,
        "arguments": {
            "init": "closed-form",
            "anchor": "template",
            "iter_break": 0,
            "templates": 6,
            "batch_size": 4,
            "scale_factor": 0.05,
            "max_base": None,
        },
    },
}
NEW_SHIFT = {
    "file_type": "weight shift",
    "metadata": {
        "created_by": "SRS_ME.py",
        "base_model": "mini-sd",
        "category": "style",
        "concept_index": 1,
        "joint_with": [0, 1],
        "iterations": 0,
        "config": {
            "init": "closed_form",
            "anchor": "category",
            "mode": "closed_form",
            "target_templates": 6,
            "train_batch_size": 4,
            "basis_scale": 0.05,
            "max_directions": None,
        },
    },
}
OLD_YAML = {
    "extends": "mini-sd",
    "components": "v1",
    "world": {"pictures": 10, "held_out": 2, "shares": [1.0]},
    "sampling": {"ddim_steps": 20, "guidance_scale": 1.5, "batch_size": 64},
    "solution": {"basis": "svd", "tolerance": 1e-3, "templates": 4, "always": 30},
    "evaluation": {"num_seeds": 20, "num_pictures": 50},
    "erasure": {
        "SRS-ME": {"init": "zero", "keep": 1, "spare": 2, "ridge": 0.1, "iter_break": 300, "templates": 4},
        "ESD": {"ddim_steps": 10, "batch_size": 4, "reg_beta": 0.5, "threshold": 0.1},
    },
}
NEW_YAML = {
    "base_config": "mini-sd",
    "component_configs": "v1",
    "dataset": {"num_images": 10, "num_held_out": 2, "mixture_weights": [1.0]},
    "sampling": {"num_inference_steps": 20, "guidance_scale": 1.5, "sample_batch_size": 64},
    "null_space": {
        "null_space_method": "svd",
        "rank_rtol": 1e-3,
        "protected_templates": 4,
        "always_protected_weight": 30,
    },
    "evaluation": {"seeds_per_prompt": 20, "num_training_images": 50},
    "methods": {
        "SRS-ME": {
            "init": "zero",
            "mode": "learn",
            "preserve_scale": 1,
            "vocab_preserve_scale": 2,
            "ridge_weight": 0.1,
            "max_steps": 300,
            "target_templates": 4,
        },
        "ESD": {"num_inference_steps": 10, "train_batch_size": 4, "l1_weight": 0.5, "stop_threshold": 0.1},
    },
}


@pytest.mark.parametrize(("old", "new"), [(OLD_SHIFT, NEW_SHIFT), (OLD_YAML, NEW_YAML)], ids=["shift", "yaml"])
def test_old_keys_become_todays_at_any_depth_and_todays_stay(old, new):
    assert upgrade(old) == new
    assert upgrade(new) == new
    assert upgrade([old, {"a": [old]}]) == [new, {"a": [new]}]


def test_no_key_of_today_is_an_older_one():
    assert not RENAMED_KEYS.keys() & set(RENAMED_KEYS.values())


@pytest.mark.parametrize("value", [None, 1, "kind", [], {}, [1, "base"]])
def test_values_are_no_keys(value):
    assert upgrade(value) == value


def test_what_is_upgraded_is_a_copy():
    inner = {"steps": 1}
    assert upgrade({"recipe": inner}) == {"metadata": {"iterations": 1}} and inner == {"steps": 1}
