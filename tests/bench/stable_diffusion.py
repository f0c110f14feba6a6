"""Stable Diffusion v1's true architecture with random weights: every script of an erasure, its time and peak memory.

Makes the model in both layouts, then solves, takes three SRS-ME steps and writes all five formats, each in a process of its
own; and beside it what the original does: two float32 models and four passes a step. 40 GB of disk and 15 GB of memory.
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

from ldm import cli
from ldm.diffusion.compvis import convert_to_compvis
from ldm.io.paths import REPO_ROOT
from ldm.metrics.tables import to_markdown
from ldm.diffusion.load import DEFAULT_CONFIG, resolve_config_dir, silence_hf_logging

SCRIPTS = REPO_ROOT / "train-scripts"


def make(work: Path) -> None:
    """The diffusers folder WORK/sd and the checkpoint WORK/sd.ckpt, which names a callback as the original does; two pictures."""
    torch.manual_seed(0)
    configs = resolve_config_dir("sd.ckpt", DEFAULT_CONFIG)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae")),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(configs / "tokenizer"),
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet")),
        scheduler=PNDMScheduler.from_config(PNDMScheduler.load_config(configs / "scheduler")),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    tensors = convert_to_compvis(pipeline.unet.state_dict(), pipeline.vae.state_dict(), pipeline.text_encoder.state_dict())
    torch.save({"state_dict": tensors, "callbacks": {ModelCheckpoint: {"best_model_path": ""}}}, work / "sd.ckpt")
    for n in range(2):
        (work / "data" / "VanGogh").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(work / "data" / "VanGogh" / f"{n}_0.png")
    pipeline.save_pretrained(work / "sd")


def original(work: Path) -> None:
    """Three steps with two float32 models: one frozen, one that learns the shift's coefficients, four passes."""
    models = [StableDiffusionPipeline.from_pretrained(work / "sd", safety_checker=None, dtype=torch.float32) for _ in range(2)]
    frozen, student = (model.unet.requires_grad_(False) for model in models)
    tokens = models[0].tokenizer(["VanGogh", ""], padding="max_length", return_tensors="pt").input_ids
    concept, blank = models[0].text_encoder(tokens)[0].detach().split(1)
    layers = {name: layer for name, layer in student.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    directions = torch.linalg.qr(torch.randn(768, 537)).Q.T * 1e-4
    coefficients = {name: torch.zeros(layer.out_features, 537, requires_grad=True) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, given, output, name=name: output + given[0] @ (coefficients[name] @ directions).T)
    optimizer = torch.optim.Adam(coefficients.values(), lr=0.1)
    for _ in range(3):
        latents, step = torch.randn(1, 4, 64, 64), torch.randint(1000, (1,))
        with torch.no_grad():
            old = frozen(latents, step, concept).sample - frozen(latents, step, blank).sample
        new = student(latents, step, concept).sample - student(latents, step, blank).sample
        optimizer.zero_grad()
        (new * old).mean().backward()
        optimizer.step()


def measured(title: str, command: list) -> dict:
    """Run a command in a process of its own; its seconds, and its peak memory as /usr/bin/time tells it."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | {"HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ValueError(f"{title} failed: see above")
    row = {"what": title, "seconds": round(time.perf_counter() - start), "peak GiB": usage.ru_maxrss / 2 ** 20}
    print(row, flush=True)
    return row


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("work", type=Path, help="an empty folder with 40 GB of room")
    parser.add_argument("--part", choices=("all", "make", "original"), default="all", help="one part alone, in this process")
    args = parser.parse_args()
    silence_hf_logging()
    if args.part != "all":
        {"make": make, "original": original}[args.part](args.work)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [measured("make the model", [__file__, args.work, "--part", "make"])]
    for name, model in (("folder", ["--model", args.work / "sd"]), ("checkpoint", ["--ckpt_path", args.work / "sd.ckpt", "--config_path", DEFAULT_CONFIG])):
        kept = [*model, "--shifts_path", args.work / "shifts"]
        rows.append(measured(f"{name}: solution", [SCRIPTS / "SRSME_Solution.py", *kept, "--erased_index", "1", "--em_indexes", "2"]))
        choices = ([], ["--gradient_checkpointing"], ["--dtype", "bfloat16"], ["--dtype", "bfloat16", "--gradient_checkpointing"])
        for flags in choices if name == "folder" else choices[:1]:
            rows.append(measured(" ".join([f"{name}: three steps", *flags]), [
                SCRIPTS / "SRS_ME.py", *kept, "--erased_index", "1", "--iter_break", "3", "--data_path", args.work / "data", *flags,
                "--seed", len(rows)]))
        rows.append(measured(f"{name}: five formats", [
            SCRIPTS / "Merge_model.py", *kept, "--merge", "1", "--format", "compvis,diffusers,unet,lora,kohya", "--dtype", "float16",
            "--save_path", args.work / "merged" / name]))
    baseline = measured("the original's way", [__file__, args.work, "--part", "original"])
    table = pd.DataFrame([*rows, baseline])
    table["times the original"] = table["peak GiB"] / baseline["peak GiB"]
    print(to_markdown(table))


if __name__ == "__main__":
    cli.run(main)
