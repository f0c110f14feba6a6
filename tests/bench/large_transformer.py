"""A random FLUX of FLUX.1's widths: what erasing from it and merging into it hold in memory, by the scripts themselves.

Makes a folder whose transformer lies in bfloat16 in several files, with text encoders of one layer; erases a concept by
the closed form, and merges it. Anonymous memory is what a process holds; pages that are mapped from files, which the
system may let go, are not in it. What FLUX.1 with its own text encoders would take is told by its configs alone.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.erasure.memory import estimate_memory
from ldm.io.paths import REPO_ROOT
from ldm.metrics.tables import to_markdown

SCRIPTS = REPO_ROOT / "train-scripts"
GIB = 2**30
_FLUX = {
    "transformer": {"num_layers": 19, "num_single_layers": 38},
    "text_encoder": {"num_hidden_layers": 12, "vocab_size": 49408},
    "text_encoder_2": {"num_layers": 24, "vocab_size": 32128},
}


def make(folder: Path, blocks: int, single_blocks: int) -> None:
    """Write a random FLUX of so many double and single blocks, in files of at most 2 GB."""
    sys.path.append(str(REPO_ROOT / "tests"))
    from families import make_tokenizer

    torch.manual_seed(0)
    clip_tokenizer = make_tokenizer(folder, 77, "<bos>", "</s>")
    t5_tokenizer = make_tokenizer(folder, 64, end="</s>")  # of FLUX.1 512, which take eight times as long
    with torch.device("meta"):
        transformer: Any = FluxTransformer2DModel(
            num_layers=blocks, num_single_layers=single_blocks, guidance_embeds=True
        ).to(torch.bfloat16)
    transformer.to_empty(device="cpu")
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    clip = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=1,
        num_attention_heads=12,
        vocab_size=len(clip_tokenizer),
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
    )
    t5 = T5Config(
        d_model=4096,
        d_ff=10240,
        num_heads=64,
        num_layers=1,
        vocab_size=len(t5_tokenizer),
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        shift_factor=0.1159,
    )
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae,
        CLIPTextModel(clip),
        clip_tokenizer,
        T5EncoderModel(t5),
        t5_tokenizer,
        transformer,
    ).save_pretrained(folder, max_shard_size="2GB")


def configs_of_flux(folder: Path, target: Path) -> Path:
    """Write the configs that FLUX.1 has into a folder, from those of a smaller one."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    for part, changes in _FLUX.items():
        path = target / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def measure(title: str, command: list[object]) -> dict[str, object]:
    """Run a command in a process of its own; return its seconds, its most anonymous and its most resident memory."""
    start, held = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | {"HF_HUB_OFFLINE": "1"})
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        held = max(held, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
        time.sleep(0.01)
    if status:
        raise ValueError(f"{title} failed: see above")
    row = {
        "what": title,
        "seconds": round(time.perf_counter() - start),
        "anonymous GiB": held * 1024 / GIB,
        "with mapped files": usage.ru_maxrss * 1024 / GIB,
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("work", type=Path, help="an empty folder with room for the model twice")
    parser.option("blocks", type=int, default=12, help="double blocks; FLUX.1 has 19")
    parser.option("single_blocks", type=int, default=24, help="single blocks; FLUX.1 has 38")
    parser.option("part", choices=("all", "make"), default="all", help="one part alone, in this process")
    args = parser.parse_args()
    folder, sizes = args.work / "model", ["--blocks", args.blocks, "--single_blocks", args.single_blocks]
    if args.part == "make":
        make(folder, args.blocks, args.single_blocks)
        return
    rows = [measure("make the model", [__file__, args.work, *sizes, "--part", "make"])]
    common = ["--model", folder, "--artifacts_dir", args.work / "shifts"]
    erase = [SCRIPTS / "SRS_ME.py", *common, "--concepts", "Greg Rutkowski", "--protect", "Picasso", "--no-gate"]
    erase += ["--unet_dtype", "bfloat16", "--captions_preserve_scale", 0, "--neutral_preserve_scale", 0]
    rows.append(measure("erase", [*erase, "--others_preserve_scale", 0]))
    merge = [SCRIPTS / "Merge_model.py", *common, "--shifts", "Greg Rutkowski", "--save_dtype", "bfloat16"]
    rows.append(measure("merge", [*merge, "--save_path", args.work / "merged"]))
    print(to_markdown(pd.DataFrame(rows)))
    size = sum(path.stat().st_size for path in (folder / "transformer").iterdir())
    print(
        f"the transformer: {size / GIB:.1f} GiB; the largest of its files: "
        f"{max(path.stat().st_size for path in (folder / 'transformer').iterdir()) / GIB:.1f} GiB"
    )
    for title, found in (("this model", folder), ("FLUX.1", configs_of_flux(folder, args.work / "flux"))):
        print(f"\nestimated for {title}, GiB:\n{to_markdown(estimate_memory(found, torch.device('cpu'), 1, None))}")


if __name__ == "__main__":
    run(main)
