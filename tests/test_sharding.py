"""Several processes do together what one does: the same files, to the last bit."""

import os
import subprocess
import sys

import pytest

from ldm import cli
from ldm.io.files import file_digest
from ldm.io.sharding import Shard

from conftest import CPU, ROOT


def test_all_shares_together_are_everything_once():
    for size in (1, 2, 5, 9):
        parts = [Shard(rank, size).of(range(7)) for rank in range(size)]
        assert sorted(sum(parts, [])) == list(range(7)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_tasks_of_a_job_array_share_too(monkeypatch):
    for name, value in (("ID", 7), ("MIN", 5), ("COUNT", 3)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert cli.join(CPU) == (CPU, Shard(2, 3))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "9")  # of such as --array=5-9:2
    with pytest.raises(ValueError, match="one by one"):
        cli.join(CPU)


def test_what_lightning_does_not_take_from_slurm_is_said_in_one_line(monkeypatch):
    for name, value in (("NTASKS", "2"), ("JOB_NAME", "erase"), ("JOB_ID", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr("lightning_fabric.plugins.environments.slurm.shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="--ntasks-per-node=2"):
        cli.join(CPU)


def run(processes: int, script: str, *arguments) -> None:
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                     f"--nproc_per_node={processes}"]
    done = subprocess.run([*start, ROOT / script, *map(str, arguments)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_give_the_same_files_as_one(tiny_path, tmp_path):
    prompts = tmp_path / "list.csv"
    names = ["VanGogh", "Picasso", "", "Cezanne", "CCS 2024"]
    prompts.write_text("prompt,evaluation_seed,case_number\n" + "".join(f"{name},{k},{k}\n" for k, name in enumerate(names)))
    flags, device = ["--model", tiny_path, "--erased_index", "0-2"], ["--device", "cpu"]
    for processes in (1, 2):
        root = tmp_path / str(processes)
        shifts, draw = ["--shifts_path", root / "shifts"], ["--prompts_path", prompts, "--save_path", root, "--batch_size", 2]
        run(processes, "train-scripts/SRSME_Solution.py", *flags, *shifts, "--em_indexes", "0-3", *device)
        for concept in ("Cezanne", "VanGogh", "Picasso"):
            run(1, "eval-scripts/generate-data.py", "--model", tiny_path, "--prompt", concept, "--num_seeds", 2, "--ddim_steps", 2,
                "--save_path", tmp_path / "data", *device)
        run(processes, "train-scripts/SRS_ME.py", *flags, *shifts, "--data_path", tmp_path / "data", "--devices", "cpu",
            "--init", "closed-form", "--iter_break", 3)
        run(processes, "eval-scripts/generate-images-merge.py", "--model", tiny_path, *shifts, "--merge", "0-2", *draw,
            "--ddim_steps", 2, "--num_samples", 2, *device)
    assert len(list((tmp_path / "2").rglob("*.png"))) == 10 and len(list((tmp_path / "2").rglob("shift-*.safetensors"))) == 3
    assert file_digest(tmp_path / "1") == file_digest(tmp_path / "2")
