"""A tiny random model of the real classes, and two ways to run scripts: in this process, and in a fork."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# The same products give the same bits wherever their numbers lie in memory, which MKL does not promise by itself.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import json
import multiprocessing
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from ldm.cli.arguments import spelled
from ldm.config.concepts import Concept, get_concept
from ldm.diffusion.load import load_model, silence_hf_logging
from ldm.erasure import gate_fitter, gate_prompts
from ldm.io.files import SETTINGS_FILE
from ldm.io.tensors import METADATA_KEY
from ldm.toy.captions import build_tokenizer
from ldm.toy.train import Denoiser, save_pipeline

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
MIXTURE_WEIGHTS = (0.13, 0.12, 0.42, 0.28, 0.05, 0)  # of the synthetic dataset of mini-sd
TINY = OmegaConf.create(
    {
        "text_encoder": {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        "vae": {
            "sample_size": 16,
            "latent_channels": 4,
            "block_out_channels": [8, 8],
            "norm_num_groups": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
        },
        "unet": {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "cross_attention_dim": 96,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        "scheduler": {"num_train_timesteps": 1000, "timestep_spacing": "trailing", "steps_offset": 1},
    }
)


class NamedModel:
    """A base model that is nothing but its digests, and the size of its embeddings."""

    def __init__(self, *digests: str, context_dim: int = 8, text_digest: str = "text"):
        self.name, self.digests, self.context_dim, self.text_digest = "named", digests, context_dim, text_digest


def make_xl(folder: Path) -> Path:
    """Make a tiny random Stable Diffusion XL: two text encoders, and a pooled embedding that goes to the U-Net too."""
    torch.manual_seed(2)
    tokenizer = build_tokenizer(folder / "tokenizer", 16, MIXTURE_WEIGHTS)
    text_config = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    unet_config = {
        **OmegaConf.to_container(TINY.unet),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**OmegaConf.to_container(TINY.vae)),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=40, **text_config)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=56, projection_dim=32, **text_config)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**unet_config),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_model(folder: Path, seed: int, config=TINY) -> Path:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(folder / "tokenizer", 16, MIXTURE_WEIGHTS)
    vae = AutoencoderKL(**OmegaConf.to_container(config.vae))
    denoiser = Denoiser(config, tokenizer)
    save_pipeline(config, vae, denoiser.unet, denoiser.text_encoder, tokenizer, folder)
    return folder


def save_unchecked(path: Path, tensors, file_type: str, metadata) -> Path:
    """Write what `save_tensors` wrote before it refused NaN and infinity and wrote digests."""
    header = json.dumps({"file_type": file_type, "metadata": metadata}, sort_keys=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={METADATA_KEY: header})
    return path


def compvis_config(model: Path, folder: Path) -> Path:
    """Write a config that says that a checkpoint in CompVis' layout is made of the parts of `model`."""
    OmegaConf.save({"component_configs": str(model)}, folder / "tiny.yaml")
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", 0)


@pytest.fixture(scope="session")
def other_path(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "other", 1)


@pytest.fixture(scope="session")
def mini_path(tmp_path_factory) -> Path:
    """Return a tiny model with images just large enough for LPIPS, and with the name and settings of mini-sd."""
    larger = OmegaConf.merge(TINY, {"unet": {"sample_size": 16}, "vae": {"sample_size": 32}})
    folder = make_model(tmp_path_factory.mktemp("models") / "mini-sd", 3, larger)
    shutil.copy(ROOT / "models" / "mini-sd" / SETTINGS_FILE, folder)
    return folder


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory) -> Path:
    """Return the folder of a tiny random CLIP model and its processor."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(folder / "tokenizer", 16, MIXTURE_WEIGHTS)
    layers = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = ("eos_token_id", "bos_token_id", "pad_token_id")
    text = layers | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {name: getattr(tokenizer, name) for name in names}
    vision = layers | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(5)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_path):
    return load_model(tiny_path, CPU)


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Run `script("train-scripts/x.py", *arguments)` from a foreign folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(ROOT / name), *map(str, arguments)])
        spelled.clear()  # which a process of its own would not have
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def styles(*indexes: int) -> list[Concept]:
    """Return the styles with these indexes."""
    return [get_concept("style", index) for index in indexes]


def is_error(result: tuple[int, str, str], *words: str) -> None:
    """Assert that a run ended in exit code 2 and one line on stderr (after any progress bar) that holds all `words`."""
    code, _, err = result
    lines = [line for line in err.replace("\r", "\n").splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]


PRELOADED = [
    "ldm.cli.session",
    "ldm.diffusion.image_folder",
    "ldm.erasure.capacity",
    "ldm.erasure.erase",
    "ldm.erasure.export",
    "ldm.erasure.memory",
    "ldm.metrics.classify",
    "ldm.metrics.compare",
    "ldm.ledger.operations",
    "ldm.ledger.demo",
    "ldm.ledger.page",
    "ldm.experiments.ablations",
    "ldm.experiments.report",
    "ldm.experiments.scenes",
    "gradio",
]
FORK = multiprocessing.get_context("forkserver")  # a clean process that has imported everything, to fork from
FORK.set_forkserver_preload(PRELOADED)


def _script(arguments: list[str], log: Path, max_file_size: int | None) -> None:
    """Run a script in this process, its output into `log`; no file may grow beyond `max_file_size` bytes."""
    if max_file_size is not None:
        import resource  # which not every system has

        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    with open(log, "w") as opened:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(opened.fileno(), stream.fileno())
    sys.argv = [str(ROOT / arguments[0]), *arguments[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def start_script(command: list, log: Path, max_file_size: int | None = None):
    """Start a script in a process of its own, which has imported everything; its output goes into `log`."""
    process = FORK.Process(target=_script, args=(list(map(str, command)), log, max_file_size))
    process.start()
    return process


@pytest.fixture(scope="module")
def quick_fits():
    """Let gates be fitted against fewer prompts."""
    silence_hf_logging()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_prompts, "_NUM_UNSEEN", 20)
        patch.setattr(gate_fitter, "_MAX_TRIED", 2)
        patch.setattr(gate_fitter, "_NUM_JUDGED", 50)
        patch.setattr(gate_fitter, "_NUM_TRIED", 150)
        patch.setattr(gate_prompts, "_NUM_LOOKALIKES", 20)
        yield
