"""Make the files of this folder by version 0.1: run this with a checkout of it (commit bbd58ad) as the working folder.

They show that today's code reads what version 0.1 wrote (tests/test_legacy.py), and are never made again. The model
is not stored: its weights are a formula, so that neither torch's random numbers nor today's concepts change its digest.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
BUILD_DIR = Path("/tmp/srs-me-v0.1")  # which a ledger's header names
WORDS = "watermark srs me ccs 2024 a painting by painting of cezanne vangogh van gogh picasso cat church photo"
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-"


def fill(module: torch.nn.Module, seed: int) -> None:
    """Give every weight a value k / 4096 with |k| <= 1000, which float16 holds exactly."""
    for number, weight in enumerate(module.parameters()):
        positions = torch.arange(weight.numel()) * 7919 + (number + seed) * 104729
        weight.data = ((positions % 2001 - 1000).float() / 4096).view_as(weight)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a byte-pair tokenizer of a few words, saved in `folder`."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=240, end_of_word_suffix="</w>", initial_alphabet=list(ALPHABET), show_progress=False
    )
    tokenizer.train_from_iterator([WORDS, *ALPHABET], trainer)
    folder.mkdir(parents=True)
    tokenizer.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=8).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_model(folder: Path) -> None:
    """Write a Stable Diffusion of 16 pixels, whose tokenizer lies in this folder, as a diffusers folder."""
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "tokenizer")
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=8,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 4),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=2,
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        sample_size=16,
        latent_channels=4,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text_encoder = CLIPTextModel(text_config)
    for seed, module in enumerate((unet, vae, text_encoder)):
        fill(module, 1000 * seed)
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, timestep_spacing="trailing", steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)


def main() -> None:
    shutil.rmtree(BUILD_DIR, ignore_errors=True)
    shutil.rmtree(HERE / "tokenizer", ignore_errors=True)
    build_tokenizer(HERE / "tokenizer")
    model = BUILD_DIR / "tiny"
    build_model(model)
    data, shifts = BUILD_DIR / "data", BUILD_DIR / "shifts"
    (data / "VanGogh").mkdir(parents=True)
    Image.new("RGB", (16, 16), "blue").save(data / "VanGogh" / "0_0.png")
    prompts = BUILD_DIR / "prompts.csv"
    prompts.write_text("prompt,evaluation_seed,case_number\nVanGogh,1,0\nPicasso,2,1\n,3,2\n")
    common = ["--model", model, "--device", "cpu"]
    shift_flags = ["--shifts_path", shifts, "--erase_cat", "style"]
    run(
        "train-scripts/SRSME_Solution.py",
        *common,
        *shift_flags,
        *["--erased_index", "1", "--em_indexes", "0,2", "--tolerance", "1e-6"],
    )
    training = ["--model", model, *shift_flags, *f"--data_path {data} --erased_index 1 --lr 0.1 --devices cpu".split()]
    settings = [
        "--iter_break",
        "2",
        "--max_base",
        "4",
        "--threshold",
        "-1",
        "--init",
        "closed-form",
        "--anchor",
        "template",
    ]
    run("train-scripts/SRS_ME.py", *training, *settings)
    run("train-scripts/FMN.py", *training, "--iter_break", 1)
    generation = ["--prompts_path", prompts, "--save_path", BUILD_DIR / "images", "--ddim_steps", 3]
    run("eval-scripts/generate-images-merge.py", *common, *shift_flags, "--merge", 1, *generation)
    merge = ["--merge", 1, "--save_path", BUILD_DIR / "merged", "--format", "diffusers,lora"]
    run("train-scripts/Merge_model.py", *common, *shift_flags, *merge)
    painting = ["--model_name", "paint", "--prompt", "VanGogh", "--num_seeds", 2, "--save_path", BUILD_DIR / "painted"]
    run("eval-scripts/generate-data.py", *painting)
    make_ledger(common)
    subprocess.run([sys.executable, "-c", CLASSIFIER], check=True, env=ENVIRONMENT)
    collect()


def make_ledger(common: list) -> None:
    """Erase VanGogh, restore it, erase it again by the same shift, and erase Picasso."""
    root = ["--root", BUILD_DIR / "ledger"]
    settings = ["--init", "closed-form", "--iter_break", "0", "--max_base", "3", "--anchor", "blank", "--ridge", "0.01"]
    run("train-scripts/ledger.py", "init", *root, *common, "--concepts", "0-2", "--protect", "a cat")
    run("train-scripts/ledger.py", "erase", "VanGogh", *root, *settings)
    run("train-scripts/ledger.py", "restore", "VanGogh", *root)
    run("train-scripts/ledger.py", "erase", "VanGogh", *root)
    run("train-scripts/ledger.py", "erase", "Picasso", *root, *settings)


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
CLASSIFIER = f"""
from pathlib import Path
from torch import nn
from ldm.metrics.classify import Classifier, save_classifier
classes = ["blank", "Cezanne", "VanGogh", "Picasso"]
recipe = {{"made_by": "artist-cls-train.py", "erase_cat": "style", "classes": classes, "accuracy": 0.25}}
save_classifier(Classifier(nn.Linear(3, 4), 4, 64), Path("{BUILD_DIR}/classifier.safetensors"), recipe)
"""


def run(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, env=ENVIRONMENT)


def collect() -> None:
    """Copy what the tests read from the folder that it was made in."""
    for name in ("shifts", "images", "data", "ledger"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(BUILD_DIR / name, HERE / name, ignore=shutil.ignore_patterns(".lock"))
    for basis in (HERE / "ledger").rglob("basis-*"):  # which nothing reads again
        basis.unlink()
    for name in ("prompts.csv", "classifier.safetensors"):
        shutil.copy(BUILD_DIR / name, HERE / name)
    for folder in ("merged/tiny-1", "merged/tiny-1-lora", "painted/VanGogh"):
        (HERE / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(BUILD_DIR / folder / "recipe.json", HERE / folder)
    for name in ("concepts.yaml", "many.yaml", "mini-sd.yaml", "mini-many.yaml", "stable-diffusion/v1-inference.yaml"):
        (HERE / "configs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path("configs") / name, HERE / "configs" / name)


if __name__ == "__main__":
    main()
