"""Tiny random pipelines of every family of models, of diffusers' own classes, with tokenizers that know a few words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from ldm.config.concepts import load_concepts
from ldm.config.everyday import everyday_captions
from ldm.config.templates import load_template_set
from ldm.toy.captions import build_tokenizer

_SPECIAL = ["<pad>", "<bos>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
_CHAT = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
_PARTS_CHAT = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %} <|im_end|> {% endfor %}"
)


def make_tokenizer(folder: Path, length: int, begin: str = "", end: str = "", chat: str | None = None) -> Any:
    """Return a tokenizer of byte pairs that was trained on names, templates and captions."""
    texts = [
        name for category in ("style", "object") for concept in load_concepts(category) for name in concept.captions
    ]
    texts += [*load_template_set("style").templates, *everyday_captions(300), "system user assistant"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, special_tokens=_SPECIAL, show_progress=False)
    )
    template = " ".join(part for part in (begin, "$A", end) if part)
    if begin or end:
        ids = [(token, tokenizer.token_to_id(token)) for token in (begin, end) if token]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    names: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= {"bos_token": begin} if begin else {}
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, padding_side="right", **names)
    found.chat_template = chat
    return found


def _clips(folder: Path, length: int = 16) -> dict[str, Any]:
    tokenizer = build_tokenizer(folder / "tokenizer", length, (0.13, 0.12, 0.42, 0.28, 0.05, 0))
    config = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": length,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    return {"tokenizer": tokenizer, "config": config}


def _t5(folder: Path, width: int, length: int) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(folder, length, end="</s>")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_ff=48, d_kv=8, num_layers=2, num_heads=2, is_encoder_decoder=False
    )
    return T5EncoderModel(config), tokenizer


def _gemma(folder: Path, width: int, length: int) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(folder, length, begin="<bos>")
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Gemma2Model(config), tokenizer


def _vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=16,
        latent_channels=channels,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        **options,
    )


def _flux(folder: Path) -> Any:
    clip, (t5, t5_tokenizer) = _clips(folder), _t5(folder, 160, 24)
    return diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(shift_factor=0.0),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=32, **clip["config"])),
        tokenizer=clip["tokenizer"],
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=160,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=True,
        ),
    )


def _sd3(folder: Path, with_t5: bool = True) -> Any:
    clip, (t5, t5_tokenizer) = _clips(folder), _t5(folder, 200, 24)
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=200,
            caption_projection_dim=16,
            pooled_projection_dim=64,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(shift_factor=0.0),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=32, projection_dim=32, **clip["config"])),
        tokenizer=clip["tokenizer"],
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=40, projection_dim=32, **clip["config"])),
        tokenizer_2=clip["tokenizer"],
        text_encoder_3=t5 if with_t5 else None,
        tokenizer_3=t5_tokenizer if with_t5 else None,
    )


def _sd3_without_t5(folder: Path) -> Any:
    return _sd3(folder, with_t5=False)


def _pixart(folder: Path, kind: Any = None) -> Any:
    encoder, tokenizer = _t5(folder, 160, 24)
    return (kind or diffusers.PixArtAlphaPipeline)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=160,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _pixart_sigma(folder: Path) -> Any:
    return _pixart(folder, diffusers.PixArtSigmaPipeline)


def _sana(folder: Path) -> Any:
    encoder, tokenizer = _gemma(folder, 160, 400)
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=160,
            sample_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _auraflow(folder: Path) -> Any:
    encoder, tokenizer = _t5(folder, 160, 24)
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=160,
            pos_embed_max_size=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def _flux2(folder: Path) -> Any:
    """Return FLUX.2 dev, whose language model reads images too, so that its tokenizer is part of a processor."""
    tokenizer = make_tokenizer(folder, 100, chat=_PARTS_CHAT)
    image_token = "[IMG]"
    tokenizer.add_tokens([image_token], special_tokens=True)
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=80,
        intermediate_size=32,
        num_hidden_layers=31,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=len(tokenizer) - 1)
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(),
        tokenizer=tokenizer,
        chat_template=_PARTS_CHAT,
        image_token=image_token,
        image_break_token=image_token,
        image_end_token=image_token,
    )
    return diffusers.Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=processor,
        transformer=_flux2_transformer(guidance_embeds=True),
    )


def _flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        sample_size=16,
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _flux2_transformer(guidance_embeds: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=240,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def _flux2_klein(folder: Path) -> Any:
    tokenizer = make_tokenizer(folder, 32, chat=_CHAT)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=80,
        intermediate_size=32,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return diffusers.Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_flux2_vae(),
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        transformer=_flux2_transformer(guidance_embeds=False),
        is_distilled=False,
    )


def _lumina2(folder: Path) -> Any:
    encoder, tokenizer = _gemma(folder, 160, 96)
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=1,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(300, 64, 64),
            cap_feat_dim=160,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(shift_factor=0.0),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


MAKERS: dict[str, Callable[[Path], Any]] = {
    "flux": _flux,
    "sd3": _sd3,
    "sd3-without-t5": _sd3_without_t5,
    "pixart-alpha": _pixart,
    "pixart-sigma": _pixart_sigma,
    "sana": _sana,
    "auraflow": _auraflow,
    "flux2": _flux2,
    "flux2-klein": _flux2_klein,
    "lumina2": _lumina2,
}


def make_family(name: str, folder: Path) -> Path:
    """Write a tiny random model of a family into a folder, as a pipeline of diffusers is saved."""
    torch.manual_seed(5)
    pipeline = MAKERS[name](folder)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            with torch.no_grad():
                for weight in part.parameters():  # none of which is zero, as some last layers begin
                    weight.add_(0.02 * torch.randn_like(weight))
    pipeline.save_pretrained(folder)
    return folder
