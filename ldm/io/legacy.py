"""The keys that older versions wrote into headers, metadata files, ledgers and YAML files, and their names now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RENAMED_KEYS = {
    # headers of tensors, and metadata of folders
    "kind": "file_type",
    "recipe": "metadata",
    "made_by": "created_by",
    "base": "base_model",
    "erase_cat": "category",
    "erased_index": "concept_index",
    "arguments": "config",
    "together": "joint_with",
    "steps": "iterations",
    "largest_leak": "max_leakage",
    "cut_to_rank": "truncated_to_rank",
    "num_seeds": "seeds_per_prompt",
    "painted": "synthetic",
    # ledgers
    "number": "index",
    "before": "prev_hash",
    "leak": "max_leakage_others",
    # settings
    "ddim_steps": "num_inference_steps",
    "iter_break": "max_steps",
    "scale_factor": "basis_scale",
    "reg_beta": "l1_weight",
    "threshold": "stop_threshold",
    "max_base": "max_directions",
    "keep": "preserve_scale",
    "spare": "vocab_preserve_scale",
    "ridge": "ridge_weight",
    "always": "always_protected_weight",
    "basis": "null_space_method",
    "tolerance": "rank_rtol",
    # model configs
    "solution": "null_space",
    "erasure": "methods",
    "world": "dataset",
    "components": "component_configs",
    "extends": "base_config",
    "num_pictures": "num_training_images",
}
# What older versions did not write down about folders and shifts.
ADDED_KEYS = (
    *("content_digest", "decoder_config", "image_size", "gate_config", "prompts_digest", "text_digest"),
    "gate_prompts_digest",
)
# Keys whose new name depends on what they stand in.
_RENAMED_IN = {
    "config": {"templates": "target_templates", "batch_size": "train_batch_size"},
    "null_space": {"templates": "protected_templates"},
    "sampling": {"batch_size": "sample_batch_size"},
    "dataset": {"pictures": "num_images", "held_out": "num_held_out", "shares": "mixture_weights"},
}
_RENAMED_VALUES = {
    "init": {"closed-form": "closed_form"},
    "anchor": {"blank": "empty", "template": "category"},
}


def renamed_setting(name: str) -> str:
    """Return what a method's setting that older versions called `name` is called now."""
    return (RENAMED_KEYS | _RENAMED_IN["config"]).get(name, name)


def upgrade(value: Any, inside: str = "") -> Any:
    """Return a JSON or YAML value with today's keys, at any depth; what has them already comes back equal.

    `inside` is the key that the value stands under.
    """
    if isinstance(value, list):
        return [upgrade(item, inside) for item in value]
    if not isinstance(value, dict):
        return value
    if inside == "methods":
        return {name: upgrade(settings, "config") for name, settings in value.items()}
    renamed = RENAMED_KEYS | _RENAMED_IN.get(inside, {})
    result = {}
    for key, item in value.items():
        new = renamed.get(key, key)
        result[new] = upgrade(item, str(new))
    if inside == "config":
        _upgrade_config(result)
    return result


def _upgrade_config(config: dict[str, Any]) -> None:
    """Give the settings of a method today's values, in place."""
    for key, renamed in _RENAMED_VALUES.items():
        if isinstance(config.get(key), str):
            config[key] = renamed.get(config[key], config[key])
    if "init" in config and "mode" not in config:
        config["mode"] = "learn" if config.get("max_steps", 1) else "closed_form"
        if not config.get("max_steps", 1):
            del config["max_steps"]  # which said that nothing is trained


def upgrade_digests(value: Any, digests: Sequence[str]) -> Any:
    """Return a JSON value with the first of a base model's digests, today's, wherever it has one of the others."""
    if isinstance(value, list):
        return [upgrade_digests(item, digests) for item in value]
    if isinstance(value, dict):
        return {key: upgrade_digests(item, digests) for key, item in value.items()}
    return digests[0] if value in digests[1:] else value
