"""Several processes do together what one does: the same files, to the last bit."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT

from ldm.cli.devices import init_distributed
from ldm.io.files import file_digest
from ldm.io.sharding import Shard


def test_all_shards_together_are_everything_once():
    for size in (1, 2, 5, 9):
        parts = [Shard(rank, size).select(range(7)) for rank in range(size)]
        assert sorted(itertools.chain(*parts)) == list(range(7)) and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("script", "variables", "result"),
    [
        ("generate", {"SHIFTS": "0-99"}, "--shifts 0-99 --artifacts_dir models "),
        ("generate", {"MERGE": "0-99", "ARTIFACTS": "a"}, "--shifts 0-99 --artifacts_dir a "),
        ("generate", {"SHIFTS": "models", "MERGE": "0"}, None),  # a folder, as the name meant before
        ("erase", {}, "--artifacts_dir models "),
        ("erase", {"SHIFTS": "data"}, "--artifacts_dir data "),
        ("erase", {"SHIFTS": "new/folder"}, "--artifacts_dir new/folder "),
        ("erase", {"SHIFTS": "0-99"}, None),
        ("erase", {"SHIFTS": "0-99", "ARTIFACTS": "a"}, "--artifacts_dir a "),
    ],
)
def test_the_batch_scripts_take_shifts_and_their_folder_by_name(tmp_path, script, variables, result):
    srun = tmp_path / "srun"  # says what it would run
    srun.write_text('#!/bin/sh\necho "$*" ""\n')
    srun.chmod(0o755)
    unset = {name: value for name, value in os.environ.items() if name not in ("SHIFTS", "MERGE", "ARTIFACTS")}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REPO": str(ROOT)}
    environment = {**unset, **path, "PROMPTS": "p", "SAVE": "s", "INDEXES": "0", **variables}
    command = ["bash", f"train-scripts/slurm/{script}.sbatch"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result is None:
        assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
        assert "ARTIFACTS the folder" in done.stderr and "SHIFTS" in done.stderr and "shifts to merge" in done.stderr
    else:
        assert done.returncode == 0 and result in done.stdout


def test_a_process_that_nobody_started_with_others_needs_no_lightning(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "lightning_fabric.plugins.environments", None)  # so that to import it is an error
    assert init_distributed(CPU) == (CPU, Shard())


def test_the_tasks_of_a_job_array_shard_too(monkeypatch):
    for name, value in (("ID", 7), ("MIN", 5), ("COUNT", 3)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert init_distributed(CPU) == (CPU, Shard(2, 3))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "9")  # of such as --array=5-9:2
    with pytest.raises(ValueError, match="one by one"):
        init_distributed(CPU)


def test_what_lightning_does_not_take_from_slurm_is_said_in_one_line(monkeypatch):
    for name, value in (("NTASKS", "2"), ("JOB_NAME", "erase"), ("JOB_ID", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr("lightning_fabric.plugins.environments.slurm.shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="--ntasks-per-node=2"):
        init_distributed(CPU)


# What torchrun starts twice: scripts one after the other, each when the other process has finished the one before.
STAGES = """
import json, runpy, sys
import torch.distributed

for command in json.loads(sys.argv[1]):
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    torch.distributed.barrier()
"""


def run_in_two_processes(commands: list[list], folder: Path) -> None:
    (folder / "stages.py").write_text(STAGES)
    stages = [[str(ROOT / path), *map(str, arguments)] for path, *arguments in commands]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, folder / "stages.py", json.dumps(stages)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def run_in_one_process(script):
    """Run a script in this process, with as many threads as each of the two has: sums are added up in that order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(path: str, *arguments) -> None:
        code, _, err = script(path, *arguments)
        assert code == 0, err

    yield run
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_processes_give_the_same_files_as_one(run_in_one_process, tiny_path, tmp_path):
    prompts = tmp_path / "list.csv"
    names = ["VanGogh", "Picasso", "", "Cezanne", "CCS 2024"]
    rows = [f"{name},{k},{k}\n" for k, name in enumerate(names)]
    prompts.write_text("prompt,evaluation_seed,case_number\n" + "".join(rows))
    model, device = ["--model", tiny_path], ["--device", "cpu"]
    for concept in ("Cezanne", "VanGogh", "Picasso"):
        flags = [
            "--prompt",
            concept,
            "--seeds_per_prompt",
            2,
            "--num_inference_steps",
            2,
            "--save_path",
            tmp_path / "data",
        ]
        run_in_one_process("eval-scripts/generate-data.py", *model, *device, *flags)
    training = [
        "--init",
        "closed_form",
        "--max_steps",
        3,
        "--training_image_dir",
        tmp_path / "data",
        "--devices",
        "cpu",
    ]
    sampling = ["--num_inference_steps", 2, "--images_per_seed", 2, "--sample_batch_size", 2]

    def commands(root: Path) -> list[list]:
        shifts, targets = ["--artifacts_dir", root / "shifts"], ["--erased_index", "0-2"]
        images = ["--shifts", "0-2", "--prompts_path", prompts, "--save_path", root]
        return [
            ["train-scripts/SRSME_Solution.py", *model, *targets, *shifts, "--em_indexes", "0-3", *device],
            ["train-scripts/SRS_ME.py", *model, *targets, *shifts, *training, "--least_effect", "-9"],
            ["eval-scripts/generate-images-merge.py", *model, *shifts, *images, *sampling, *device],
        ]

    for command in commands(tmp_path / "1"):
        run_in_one_process(*command)
    run_in_two_processes(commands(tmp_path / "2"), tmp_path)
    assert len(list((tmp_path / "2").rglob("*.png"))) == 10
    assert len(list((tmp_path / "2").rglob("shift-*.safetensors"))) == 3
    assert file_digest(tmp_path / "1") == file_digest(tmp_path / "2")
