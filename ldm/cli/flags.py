"""Every flag's other spellings: the original repository's, which `--help` shows, and our older ones, which it hides."""

from __future__ import annotations

# Flags of the original repository (Dlut-lab-zmn/SRS-ME), valid for ever: today's name -> theirs.
ORIGINAL = {
    "category": ("--erase_cat",),
    "scene": ("--scenei",),
    "scene_time": ("--timei",),
    "max_steps": ("--iter_break",),
    "basis_scale": ("--scale_factor",),
    "l1_weight": ("--reg_beta",),
    "stop_threshold": ("--threshold",),
    "max_directions": ("--max_base",),
    "num_inference_steps": ("--ddim_steps",),
    "images_per_seed": ("--num_samples",),
    "start_case": ("--from_case",),
    "classifier": ("--model_path",),
    "original_dir": ("--path1",),
    "edited_dir": ("--path2",),
    "image_dir": ("--path",),
    "source": ("--model_name",),
    "max_lr": ("--lr-max",),
}
# Our own flags of version 0.1, still accepted: today's name -> theirs.
OLDER = {
    "preserve_scale": ("--keep",),
    "vocab_preserve_scale": ("--spare",),
    "ridge_weight": ("--ridge",),
    "target_templates": ("--templates",),
    "protected_templates": ("--templates",),
    "always_protected_weight": ("--always",),
    "null_space_method": ("--basis",),
    "rank_rtol": ("--tolerance",),
    "train_batch_size": ("--batch_size",),  # the original's in artist-cls-train.py, which says so itself
    "sample_batch_size": ("--batch_size",),
    "estimate_memory": ("--plan",),
    "unet_dtype": ("--dtype",),
    "save_dtype": ("--dtype",),
    "effect_fraction": ("--share",),
    "shifts": ("--merge",),
    "artifacts_dir": ("--shifts_path",),
    "ledger_dir": ("--root",),
    "set": ("--settings",),
    "init_weights": ("--weights",),
    "imagenet_weights": ("--imagenet_path",),
    "inception_weights": ("--inception_path",),
    "seeds_per_prompt": ("--num_seeds",),
    "num_training_images": ("--num_pictures",),
    "num_rendered": ("--num_painted",),
    "num_held_out": ("--held_out",),
    "training_image_dir": ("--data_path",),
    "data_dir": ("--path",),
    "cases_per_concept": ("--num",),
    "images_per_cell": ("--num",),
    "image_dirs": ("--paths",),
    "column_titles": ("--titles",),
    "scale": ("--zoom",),
    "sweep_values": ("--values",),
    "models_dir": ("--models_path",),
    "classifier_dir": ("--model_path",),
    "checkpoint_dir": ("--work_path",),
    "min_score": ("--threshold",),
}
# Values that are called otherwise today: a text would be taken for what it says.
RENAMED_VALUES = {"anchor": {"blank": "empty", "template": "category"}}
# Values that are spelt otherwise today, and mean the same.
OLDER_VALUES = {
    "init": {"closed-form": "closed_form"},
    "mode": {"closed-form": "closed_form"},
    "source": {"0": "model", "paint": "synthetic"},
}
