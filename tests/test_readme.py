"""Every command of the README and of `make demo` runs as written, in a copy of the repository with shorter prompt lists,
trainings and samplings."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines() if line.startswith("python ")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("clone") / "repo"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.split("\n")
    for name in filter(None, listed):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    for path in (copy / "data").glob("*.csv"):  # two cases of every prompt
        pd.read_csv(path, keep_default_na=False).groupby("prompt", sort=False).head(2).to_csv(path, index=False)
    config = OmegaConf.load(copy / "configs" / "mini-sd.yaml")
    config.world.needs_images, config.world.held_out = 64, 8
    config.train.autoencoder.steps = config.train.denoiser.steps = 2
    config.train.save_every = 1
    config.sampling.ddim_steps = config.evaluation.num_seeds = config.evaluation.num_pictures = 2
    for method in config.erasure.values():
        method.iter_break = min(method.iter_break, 12)
    OmegaConf.save(config, copy / "configs" / "mini-sd.yaml")
    return copy


def test_there_are_commands():
    assert len(COMMANDS) > 15


def run(command, clone) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(clone),
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs_as_written(command, clone):
    run(command, clone)


def test_the_demo_ends_with_a_picture_and_a_table(clone):
    shown = run(f"make demo VENV={sys.prefix} -o {sys.prefix}/.installed", clone)  # nothing is installed
    assert "| Picasso | restored |" in shown and (clone / "demo" / "demo.png").exists()
    assert len(pd.read_csv(clone / "demo" / "demo.csv")) == 12
