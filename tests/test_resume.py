"""A run killed at a random moment, or for which the disk is full, and started again ends with an unbroken one's files.

KILLS=20 tries twenty for each stage.
"""

import os
import random
import shutil
import time
from pathlib import Path

import pytest
from conftest import ROOT, start_script

from ldm.config.concepts import erasable_concepts
from ldm.io.files import file_digest

STAGES = ("null space", "erasure", "generation", "merge", "scenes")
MIN_FILE_SIZE = 20_000  # bytes, so that the log has room
KILLS = int(os.environ.get("KILLS", "1"))


@pytest.fixture(scope="module")
def stages(mini_path, tmp_path_factory):
    """Return what each stage runs in a folder, in order."""
    prompts = tmp_path_factory.mktemp("prompts") / "list.csv"
    prompts.write_text("prompt,evaluation_seed,case_number\n" + "".join(f"VanGogh,{k},{k}\n" for k in range(24)))
    classifier = ROOT / "models" / "classifiers" / "style.safetensors"

    def commands(root: Path) -> dict[str, list]:
        model, device = ["--model", mini_path], ["--device", "cpu"]
        shifts = ["--artifacts_dir", root / "shifts"]
        targets = ["--erased_index", "0-8"]
        training = ["--init", "closed_form", "--max_steps", "4", "--train_batch_size", "2"]
        sampling = ["--sample_batch_size", "4", "--num_inference_steps"]
        images = ["--shifts", "0-8", "--prompts_path", prompts, "--save_path", root / "images"]
        scene = ["--scene", "5", "--methods", "SRS-ME,FMN", "--save_path", root / "scenes", "--classifier", classifier]
        size = ["--seeds_per_prompt", "2", "--num_training_images", "4"]
        formats = ["--format", "compvis,diffusers,lora,kohya,unet", "--save_path", root / "merged"]
        settings = ["--set", "SRS-ME.max_steps=3", "FMN.max_steps=2"]
        return {
            "null space": [
                "train-scripts/SRSME_Solution.py",
                *model,
                *shifts,
                *targets,
                "--em_indexes",
                "0-8",
                *device,
            ],
            "erasure": [
                "train-scripts/SRS_ME.py",
                *model,
                *shifts,
                *targets,
                "--training_image_dir",
                root / "data",
                "--devices",
                "cpu",
                "--least_effect",
                "-9",
                *training,
            ],
            "generation": ["eval-scripts/generate-images-merge.py", *model, *shifts, *images, *sampling, "4", *device],
            "merge": ["train-scripts/Merge_model.py", *model, *shifts, "--shifts", "0,3", *formats, *device],
            "scenes": ["eval-scripts/scenes.py", *model, *scene, *size, *sampling, "2", *settings, *device],
        }

    return commands


def finish(command: list, log: Path) -> float:
    start = time.perf_counter()
    process = start_script(command, log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-2000:]
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def unbroken(stages, tmp_path_factory):
    """Return, for each stage, the digest of the whole folder after it, its seconds, and a copy of the one before it."""
    root, results = tmp_path_factory.mktemp("unbroken"), {}
    log = tmp_path_factory.mktemp("logs") / "log"
    for concept in erasable_concepts("style"):
        (root / "data" / concept.name).mkdir(parents=True)
        shutil.copy(ROOT / "images" / "demo.png", root / "data" / concept.name / "0_0.png")
    for stage, command in stages(root).items():
        before = tmp_path_factory.mktemp(stage.replace(" ", "-")) / "before"
        shutil.copytree(root, before)
        seconds = finish(command, log)
        results[stage] = file_digest(root), seconds, before
    return results


@pytest.mark.kill
@pytest.mark.parametrize("turn", range(KILLS))
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_with_the_same_files_when_it_is_started_again(stages, unbroken, stage, turn, tmp_path):
    digest, seconds, before = unbroken[stage]
    root, log = tmp_path / "root", tmp_path / "log"
    shutil.copytree(before, root)
    moment = random.Random(f"{stage} {turn}").uniform(0, seconds)
    process = start_script(stages(root)[stage], log)
    process.join(moment)
    process.kill()
    process.join()
    finish(stages(root)[stage], log)
    assert file_digest(root) == digest, f"killed after {moment:.3f} of {seconds:.1f} s"


@pytest.mark.kill
@pytest.mark.parametrize("turn", range(KILLS))
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_for_which_the_disk_is_full_says_so_and_ends_with_the_same_files_later(
    stages, unbroken, stage, turn, tmp_path
):
    """No file may grow beyond a random size, which stands for the disk that ends there."""
    digest, _, before = unbroken[stage]
    root, log = tmp_path / "root", tmp_path / "log"
    shutil.copytree(before, root)
    limit = random.Random(f"{stage} {turn}").randint(MIN_FILE_SIZE, 300_000)
    process = start_script(stages(root)[stage], log, max_file_size=limit)
    process.join()
    lines = [line for line in log.read_text().replace("\r", "\n").splitlines() if "error:" in line]
    assert process.exitcode == (2 if lines else 0) and len(lines) <= 1, f"{limit} bytes: {log.read_text()[-2000:]}"
    assert "Traceback" not in log.read_text() and not list(root.rglob(".partial*")), f"{limit} bytes"
    finish(stages(root)[stage], log)
    assert file_digest(root) == digest, f"no file beyond {limit} bytes"
