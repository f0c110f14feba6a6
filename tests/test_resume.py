"""A run killed at a random moment and started again ends with the very files of an unbroken one; KILLS=5 tries five for each stage."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from ldm.io.files import file_digest

from conftest import ROOT, start_script

KILLS = int(os.environ.get("KILLS", 1))


@pytest.fixture(scope="module")
def stages(mini_path, tmp_path_factory):
    """What each stage runs in a folder, in order."""
    prompts = tmp_path_factory.mktemp("prompts") / "list.csv"
    prompts.write_text("prompt,evaluation_seed,case_number\n" + "".join(f"VanGogh,{k},{k}\n" for k in range(24)))

    def of(root: Path) -> dict[str, list]:
        common = ["--model", mini_path, "--shifts_path", root / "shifts"]
        return {
            "solution": ["train-scripts/SRSME_Solution.py", *common, "--erased_index", "0-8", "--em_indexes", "0-8", "--device", "cpu"],
            "erasure": ["train-scripts/SRS_ME.py", *common, "--erased_index", "0-8", "--data_path", root / "data", "--devices", "cpu",
                        "--init", "closed-form", "--iter_break", "4", "--batch_size", "2"],
            "generation": ["eval-scripts/generate-images-merge.py", *common, "--merge", "0-8", "--prompts_path", prompts,
                           "--save_path", root / "images", "--ddim_steps", "4", "--batch_size", "4", "--device", "cpu"],
            "scenes": ["eval-scripts/scenes.py", "--model", mini_path, "--save_path", root / "scenes", "--scene", "5", "--methods",
                       "SRS-ME,FMN", "--num_seeds", "2", "--num_pictures", "4", "--ddim_steps", "2", "--batch_size", "4", "--settings",
                       "SRS-ME.iter_break=3", "FMN.iter_break=2", "--model_path", ROOT / "models/classifiers/style.safetensors",
                       "--device", "cpu"]}
    return of


def finish(command: list, log: Path) -> float:
    begin = time.perf_counter()
    process = start_script(command, log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-2000:]
    return time.perf_counter() - begin


@pytest.fixture(scope="module")
def unbroken(stages, tmp_path_factory):
    """The digest of the whole folder after each stage, how long the stage took, and a copy of the folder before it."""
    root, kept = tmp_path_factory.mktemp("unbroken"), {}
    log = tmp_path_factory.mktemp("logs") / "log"
    for concept in ("Cezanne", "VanGogh", "Picasso", "Jackson Pollock", "Caravaggio", "KeithHaring", "Kelly McKernan", "Tyler Edlin",
                    "Kilian Eng"):
        (root / "data" / concept).mkdir(parents=True)
        shutil.copy(next((ROOT / "images").glob("demo.png")), root / "data" / concept / "0_0.png")
    for stage, command in stages(root).items():
        before = tmp_path_factory.mktemp(stage) / "before"
        shutil.copytree(root, before)
        seconds = finish(command, log)
        kept[stage] = file_digest(root), seconds, before
    return kept


@pytest.mark.parametrize("turn", range(KILLS))
@pytest.mark.parametrize("stage", ["solution", "erasure", "generation", "scenes"])
def test_a_killed_run_ends_with_the_same_files_when_it_is_started_again(stages, unbroken, stage, turn, tmp_path):
    digest, seconds, before = unbroken[stage]
    root, log = tmp_path / "root", tmp_path / "log"
    shutil.copytree(before, root)
    moment = random.uniform(0, seconds)
    process = start_script(stages(root)[stage], log)
    process.join(moment)
    process.kill()
    process.join()
    finish(stages(root)[stage], log)
    assert file_digest(root) == digest, f"killed after {moment:.3f} of {seconds:.1f} s"
