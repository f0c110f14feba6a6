"""Which adapter serves which pipeline of diffusers. A new family is a class, in a file of its own, and a row here."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from ldm.diffusion.family import Family, unwrapped
from ldm.diffusion.family_flux import Flux
from ldm.diffusion.family_language import Flux2, Lumina2
from ldm.diffusion.family_masked import AuraFlow, PixArt, Sana
from ldm.diffusion.family_sd3 import StableDiffusion3
from ldm.diffusion.family_stable_diffusion import StableDiffusion, StableDiffusionXL, TextAlone

TEXT_ALONE = TextAlone()
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
    "StableDiffusion3Pipeline": StableDiffusion3(),
    "FluxPipeline": Flux(),
    "PixArtAlphaPipeline": PixArt(),
    "PixArtSigmaPipeline": PixArt(),
    "SanaPipeline": Sana(),
    "AuraFlowPipeline": AuraFlow(),
    "Flux2Pipeline": Flux2(),
    "Flux2KleinPipeline": Flux2(),
    "Lumina2Pipeline": Lumina2(),
}
_DENOISERS: dict[str, str] = {  # by class, a pipeline of each; of U-Nets the config decides
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "PixArtTransformer2DModel": "PixArtAlphaPipeline",
    "SanaTransformer2DModel": "SanaPipeline",
    "AuraFlowTransformer2DModel": "AuraFlowPipeline",
    "Flux2Transformer2DModel": "Flux2Pipeline",
    "Lumina2Transformer2DModel": "Lumina2Pipeline",
}
_UNET_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_NOT_IN_ALL = {"lora_scale", "clip_skip"}  # of the arguments of `encode_prompt`: those that older ones do not have


def family_of(denoiser: Any) -> Family:
    """Return the adapter of a denoiser, by its class. Raises ValueError for one that is not known."""
    name = type(denoiser).__name__
    if name == "UNet2DConditionModel":
        is_xl = denoiser.config.get("addition_embed_type") == "text_time"
        return FAMILIES["StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"]
    if name not in _DENOISERS:
        known = ", ".join(["UNet2DConditionModel", *_DENOISERS])
        raise ValueError(f"nothing here erases from a {name}: give a model whose denoiser is one of {known}")
    return FAMILIES[_DENOISERS[name]]


def base_pipeline(pipe: Any) -> str:
    """Return the class of `FAMILIES` that a pipeline reads prompts as: its own, or, as of image to image, its base.

    Raises ValueError for a pipeline that reads them in another way.
    """
    own, transformer = type(pipe), unwrapped(getattr(pipe, "transformer", None))
    for name in (own.__name__, *_UNET_PIPELINES, _DENOISERS.get(type(transformer).__name__)):
        if name in FAMILIES and _arguments(own) == _arguments(getattr(diffusers, name)):
            return name
    raise ValueError(
        f"{own.__name__} does not encode prompts as Stable Diffusion or another known family: give a pipeline that "
        f"does, as {', '.join(FAMILIES)}"
    )


def _arguments(pipeline_class: type) -> set[str]:
    """Return the names of what `encode_prompt` of a class of pipelines takes; none where there is no such method."""
    encode_prompt = getattr(pipeline_class, "encode_prompt", None)
    return set(inspect.signature(encode_prompt).parameters) - _NOT_IN_ALL if encode_prompt is not None else set()
