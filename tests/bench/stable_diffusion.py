"""Stable Diffusion v1's true architecture with random weights: every script of an erasure, its time and peak memory.

Makes the model in both layouts, then solves the null space, takes three SRS-ME iterations and writes all five formats,
each in a process of its own; and beside it what the original does: two float32 models and four passes an iteration.
40 GB of disk and 15 GB of memory.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.config.models import DEFAULT_CONFIG
from ldm.diffusion.compvis import convert_to_compvis
from ldm.diffusion.load import resolve_config_dir, silence_hf_logging
from ldm.io.paths import REPO_ROOT
from ldm.metrics.tables import to_markdown

SCRIPTS = REPO_ROOT / "train-scripts"
FORMATS = "compvis,diffusers,unet,lora,kohya"


def make(work: Path) -> None:
    """Write the diffusers folder WORK/sd, the checkpoint WORK/sd.ckpt, and two images to train on.

    The checkpoint names a callback as the original does.
    """
    torch.manual_seed(0)
    configs = resolve_config_dir("sd.ckpt", DEFAULT_CONFIG)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae")),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(configs / "tokenizer"),
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet")),
        scheduler=PNDMScheduler.from_config(PNDMScheduler.load_config(configs / "scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    tensors = convert_to_compvis(*(part.state_dict() for part in parts))
    torch.save({"state_dict": tensors, "callbacks": {ModelCheckpoint: {"best_model_path": ""}}}, work / "sd.ckpt")
    for n in range(2):
        (work / "data" / "VanGogh").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(work / "data" / "VanGogh" / f"{n}_0.png")
    pipeline.save_pretrained(work / "sd")


def original(work: Path) -> None:
    """Take three iterations with two float32 models: one frozen, one that trains the coefficients, four passes."""
    options = {"safety_checker": None, "dtype": torch.float32}
    models = [StableDiffusionPipeline.from_pretrained(work / "sd", **options) for _ in range(2)]
    frozen, student = (model.unet.requires_grad_(False) for model in models)
    token_ids = models[0].tokenizer(["VanGogh", ""], padding="max_length", return_tensors="pt").input_ids
    target_embeds, uncond_embeds = models[0].text_encoder(token_ids)[0].detach().split(1)
    suffixes = ("attn2.to_k", "attn2.to_v")
    layers = {name: layer for name, layer in student.named_modules() if name.endswith(suffixes)}
    directions = torch.linalg.qr(torch.randn(768, 537)).Q.T * 1e-4
    coefficients = {name: torch.zeros(layer.out_features, 537, requires_grad=True) for name, layer in layers.items()}

    def make_hook(coefficient):
        return lambda _, inputs, output: output + inputs[0] @ (coefficient @ directions).T

    for name, layer in layers.items():
        layer.register_forward_hook(make_hook(coefficients[name]))
    optimizer = torch.optim.Adam(coefficients.values(), lr=0.1)
    for _ in range(3):
        latents, timestep = torch.randn(1, 4, 64, 64), torch.randint(1000, (1,))
        with torch.no_grad():
            target_noise, uncond_noise = (
                frozen(latents, timestep, embeds).sample for embeds in (target_embeds, uncond_embeds)
            )
        edited_target, edited_uncond = (
            student(latents, timestep, embeds).sample for embeds in (target_embeds, uncond_embeds)
        )
        optimizer.zero_grad()
        ((edited_target - edited_uncond) * (target_noise - uncond_noise)).mean().backward()
        optimizer.step()


def measure(title: str, command: list[object]) -> dict[str, object]:
    """Run a command in a process of its own; return its seconds, and its peak memory as /usr/bin/time tells it."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | {"HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ValueError(f"{title} failed: see above")
    row = {"what": title, "seconds": round(time.perf_counter() - start), "peak GiB": usage.ru_maxrss / 2**20}
    print(row, flush=True)
    return row


def measure_erasure(work: Path, layout: str, model: list[object]) -> list[dict[str, object]]:
    """Measure the scripts of an erasure on the model in one of its layouts."""
    common = [*model, "--artifacts_dir", work / "shifts"]
    solve = [SCRIPTS / "SRSME_Solution.py", *common, "--erased_index", "1", "--em_indexes", "2"]
    rows = [measure(f"{layout}: null space", solve)]
    bfloat16 = ["--unet_dtype", "bfloat16"]
    choices = ([], ["--gradient_checkpointing"], bfloat16, [*bfloat16, "--gradient_checkpointing"])
    for flags in choices if layout == "folder" else choices[:1]:
        erase = [SCRIPTS / "SRS_ME.py", *common, "--erased_index", "1", "--max_steps", "3", *flags]
        erase += ["--training_image_dir", work / "data", "--seed", len(rows)]
        rows.append(measure(" ".join([f"{layout}: three iterations", *flags]), erase))
    export = [SCRIPTS / "Merge_model.py", *common, "--shifts", "1", "--format", FORMATS, "--save_dtype", "float16"]
    rows.append(measure(f"{layout}: five formats", [*export, "--save_path", work / "merged" / layout]))
    return rows


def main() -> None:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("work", type=Path, help="an empty folder with 40 GB of room")
    parser.option("part", choices=("all", "make", "original"), default="all", help="one part alone, in this process")
    args = parser.parse_args()
    silence_hf_logging()
    if args.part != "all":
        {"make": make, "original": original}[args.part](args.work)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [measure("make the model", [__file__, args.work, "--part", "make"])]
    rows += measure_erasure(args.work, "folder", ["--model", args.work / "sd"])
    checkpoint = ["--ckpt_path", args.work / "sd.ckpt", "--config_path", DEFAULT_CONFIG]
    rows += measure_erasure(args.work, "checkpoint", checkpoint)
    baseline = measure("the original's way", [__file__, args.work, "--part", "original"])
    table = pd.DataFrame([*rows, baseline])
    table["times the original"] = table["peak GiB"] / baseline["peak GiB"]
    print(to_markdown(table))


if __name__ == "__main__":
    run(main)
