"""Whether the loaded parts of a model fit together, and give what sampling and training take for granted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.diffusion.components import UnusableModelError

_TRIAL_STEPS = 10


def check_parts(pipeline: Any, source: str | Path) -> None:
    """Bound the lengths of the pipeline's tokenizers by what its text encoders take, and make sizes single numbers.

    Raises UnusableModelError, naming what is wrong in `source`, for parts that do not fit together.
    """
    unet = pipeline.unet
    for field in ("sample_size", "cross_attention_dim"):
        value = unet.config[field]
        if isinstance(value, list | tuple):  # of one number, see `components`
            unet.register_to_config(**{field: value[0]})
    _check_context(pipeline, source)
    try:
        with torch.random.fork_rng(devices=[]):  # noise that a step adds is taken from no seed
            reason = _scheduler_fault(pipeline.scheduler)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
    if reason:
        raise UnusableModelError(
            f"{source}: its scheduler cannot be used as {Path('scheduler', 'scheduler_config.json')} sets it: {reason}"
        )


def check_text(pipeline: Any, source: str | Path) -> tuple[list[int], set[int]]:
    """Bound the lengths of the pipeline's tokenizers by what its text encoders take; return the widths, and lengths.

    Raises UnusableModelError for a tokenizer and a text encoder that are not of one model.
    """
    widths: list[int] = []
    lengths: set[int] = set()
    for suffix in ("", "_2"):
        encoder, tokenizer = (getattr(pipeline, f"{part}{suffix}", None) for part in ("text_encoder", "tokenizer"))
        if encoder is None or tokenizer is None:
            continue
        config = encoder.config
        length = int(min(tokenizer.model_max_length, config.max_position_embeddings))
        if length < 2:  # its first and its last token
            raise UnusableModelError(f"{source}: its text encoder takes {length} tokens, and no prompt is that short")
        tokenizer.model_max_length = length
        last = max(tokenizer.get_vocab().values(), default=0)
        if last >= config.vocab_size:
            raise UnusableModelError(
                f"{source}: its tokenizer{suffix} has a token {last}, and its text encoder knows {config.vocab_size}"
            )
        widths.append(config.hidden_size)
        lengths.add(length)
    return widths, lengths


def _check_context(pipeline: Any, source: str | Path) -> None:
    """Raise UnusableModelError unless the text encoders give the embeddings that the U-Net takes."""
    widths, lengths = check_text(pipeline, source)
    context_dim = pipeline.unet.config.cross_attention_dim
    if sum(widths) != context_dim or len(lengths) != 1:
        raise UnusableModelError(
            f"{source}: its text encoders give embeddings of size {' + '.join(map(str, widths))} for "
            f"{' and '.join(map(str, sorted(lengths)))} tokens, and its U-Net takes size {context_dim}: they are not "
            "of one model"
        )
    if len(widths) == 2:
        config = pipeline.unet.config
        pooled = pipeline.text_encoder_2.config.projection_dim
        needed, taken = 6 * (config.addition_time_embed_dim or 0) + pooled, config.projection_class_embeddings_input_dim
        if needed != taken:
            raise UnusableModelError(
                f"{source}: six sizes and the pooled embedding are {needed} numbers, and its U-Net takes {taken}: "
                "refiners are not computed here"
            )


def _scheduler_fault(scheduler: Any) -> str:
    """Return what is wrong with a scheduler; nothing when it has noise levels and a first step that are usable."""
    config = scheduler.config
    alphas: Any = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return f"{type(scheduler).__name__} has no alphas_cumprod, the noise levels of Stable Diffusion"
    if len(alphas) != config.num_train_timesteps:
        return f"it has {len(alphas)} noise levels, and num_train_timesteps is {config.num_train_timesteps}"
    if not alphas.isfinite().all() or (alphas < 0).any() or (alphas > 1).any() or (alphas.diff() > 0).any():
        return "its betas are no levels of noise that grow from timestep to timestep"
    if config.get("prediction_type", "epsilon") == "epsilon" and (alphas == 0).any():
        return "rescale_betas_zero_snr leaves no signal at the last timestep, where a prediction of noise says nothing"
    trial = type(scheduler).from_config(config)
    trial.set_timesteps(min(_TRIAL_STEPS, config.num_train_timesteps))
    latents = torch.ones(1, 4, 8, 8) * trial.init_noise_sigma
    timestep = trial.timesteps[0]
    latents = trial.scale_model_input(latents, timestep)
    latents = trial.step(torch.zeros_like(latents), timestep, latents).prev_sample
    return "" if latents.isfinite().all() else "its first step is not finite"
