"""The page is whole in itself, shows what the ledger says, and its commands make the same weights again."""

import base64
import io
import re
import shlex
from dataclasses import replace

import pytest
from conftest import CPU
from PIL import Image

from ldm.cli.reproduce import reproduction_commands
from ldm.config.concept_lists import make_concept
from ldm.config.concepts import OWN, get_concept
from ldm.config.methods import SamplingConfig
from ldm.config.models import bundled_config
from ldm.diffusion.load import load_model
from ldm.erasure.merge import applied
from ldm.experiments.experiment import Experiment
from ldm.experiments.report import choose_shown, render_report
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header
from ldm.ledger.operations import create_shifts, weights_hash
from ldm.metrics.classify import classifier_path, load_classifier

SAMPLING = SamplingConfig(num_inference_steps=2, guidance_scale=2.0, sample_batch_size=32)


@pytest.fixture
def model(mini_path):
    return load_model(mini_path, CPU)


@pytest.fixture
def ledger(model, mini_path, tmp_path):
    """Erase VanGogh in closed form, Picasso in two iterations of training; restore VanGogh and erase it again."""
    styles = [get_concept("style", index) for index in range(3)]
    source = {"model": str(mini_path), "ckpt_path": None, "config_path": None}
    header = make_header(model, "style", styles, ["a <b>cat & dog"], source)
    ledger = Ledger.create(tmp_path / "ledger" / HISTORY_FILE, header)
    config = bundled_config("mini-sd")
    method = config.methods["SRS-ME"].with_changes(seed=0)
    training = {"mode": "learn", "max_steps": 2, "ridge_weight": 0.5, "train_batch_size": 1}
    for index, changes in ((1, {}), (2, training)):
        (tmp_path / "data" / styles[index].name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "blue").save(tmp_path / "data" / styles[index].name / "0_0.png")
        settings = method.with_changes(**changes)
        ledger.append(create_shifts(ledger, model, [styles[index]], settings, config.null_space, tmp_path / "data"))
    ledger.append({}, ["1"])
    ledger.append(ledger.plan_erasure([styles[1]], False)[0])
    return ledger


def test_the_page_holds_everything_in_itself(ledger, model, tmp_path):
    experiment = Experiment(model, "style", tmp_path / "run", None, SAMPLING, seeds_per_prompt=2)
    experiment.extra_prompts = ledger.header["protected"]
    page = render_report(ledger, experiment, 2, reproduction_commands(ledger))
    images = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)">', page)
    assert len(images) == page.count("<img") == 5  # timeline, images, leakage, curves, capacity
    for image, description in images:
        Image.open(io.BytesIO(base64.b64decode(image))).verify()
        assert len(description) > 20
    assert not re.search(r"(src|href)=.(?!data:)|url\(|@import", page)  # nothing is fetched
    assert "a &lt;b&gt;cat &amp; dog" in page and "<b>" not in page  # what a ledger holds is text
    digests = [record["digest"] for record in ledger.active_shifts().values()]
    for digest in (ledger.last_hash, model.digest, *digests):
        assert digest[:12] in page
    assert "2 of 3 concepts are erased" in page and "no pixel of 6 images" in page
    assert page.count('<th scope="col">unchanged</th>') == 3  # by status, by prompt, and of the watermarks
    for command in reproduction_commands(ledger):
        assert command.split(" --")[0] in page


def test_the_page_tells_what_happens_to_prompts_that_nothing_protects(ledger, model, tmp_path):
    experiment = Experiment(model, "style", tmp_path / "run", None, SAMPLING, seeds_per_prompt=1)
    experiment.extra_prompts, experiment.unprotected_prompts = ledger.header["protected"], 2
    page = render_report(ledger, experiment, 1, reproduction_commands(ledger))
    sections = {section[: section.index("<")]: section for section in page.split("<h2>")[1:]}
    for title in ("Results", "Leakage", "Capacity"):
        for group in ("captions", "words", "kin", "near_misses"):
            assert f"<td>{group}</td><td>2</td>" in sections[title], (title, group)
        assert "<td>compositions</td>" in sections[title]
    for title in ("Results", "Leakage"):
        assert "<td>erased compositions</td>" in sections[title]
    assert '<th scope="col">unchanged_outputs</th>' in sections["Leakage"]


def test_the_page_of_many_concepts_shows_some_of_each_state(ledger, model, tmp_path):
    names = [[concept.name for concept in choose_shown(ledger, most)] for most in (1, 2, 3, 24)]
    assert names == [["Cezanne", "VanGogh"], ["Cezanne", "VanGogh"], *[["Cezanne", "VanGogh", "Picasso"]] * 2]
    experiment = Experiment(model, "style", tmp_path / "run", None, SAMPLING, seeds_per_prompt=1)
    shown = choose_shown(ledger, 2)
    experiment.extra_prompts = ledger.prompts
    experiment.only = [*ledger.header["protected"], *(concept.prompt for concept in shown)]
    page = render_report(ledger, experiment, 1, [], shown)
    assert (
        "2 of 3 concepts are erased. Images, their results, timeline and the heat map of leakage are of 2 of them."
        in page
    )
    sections = {section[: section.index("<")]: section for section in page.split("<h2>")[1:]}
    assert "Picasso" in sections["What is erased"] and "Picasso" not in sections["Results"]
    assert "Nothing that is erased has a gate" in sections["Gates"]
    others = [*ledger.header["protected"], "Picasso"]  # as another run shows, where the state is another
    table, _ = replace(experiment, only=others, _tables={}).evaluate(ledger.shifts(), "now")
    assert "Picasso" in set(table["prompt"]) and "Cezanne" not in set(table["prompt"])


def test_a_page_of_gates_alone_says_how_firm_they_are(script, mini_path, tmp_path):
    concepts, root = ["VanGogh", "a red fox"], ["--ledger_dir", tmp_path / "ledger"]
    few = ["--retain_captions", 20, "--retain_words", 10, "--compositions", 5, "--misspellings", 0]
    ledger = "train-scripts/ledger.py"
    assert script(ledger, "init", *root, "--model", mini_path, "--concepts", *concepts)[0] == 0
    assert script(ledger, "erase", "a red fox", *root, "--mode", "gate", "--least_effect", "-9", *few)[0] in (0, 3)
    kept, model = Ledger(tmp_path / "ledger" / HISTORY_FILE), load_model(mini_path, CPU)
    experiment = Experiment(
        model, OWN, tmp_path / "run", None, SAMPLING, seeds_per_prompt=1, extra_prompts=kept.prompts
    )
    page = render_report(kept, experiment, 1, [])
    sections = {section[: section.index("<")]: section for section in page.split("<h2>")[1:]}
    assert "<p>1 gate, as measured" in sections["Gates"] and "<td>red fox</td>" in sections["Gates"]
    assert "its gates change no weights" in sections["Capacity"]


def test_a_ledger_of_nothing_has_a_page_too(model, tmp_path):
    header = make_header(model, "style", [get_concept("style", 0)], [], {})
    ledger = Ledger.create(tmp_path / HISTORY_FILE, header)
    experiment = Experiment(model, "style", tmp_path / "run", None, SAMPLING, seeds_per_prompt=1)
    page = render_report(ledger, experiment, 1, reproduction_commands(ledger))
    assert "0 of 1 concepts are erased" in page and "No concept was ever erased" in page


def test_a_ledger_of_concepts_by_text_has_a_page_too(model, script, mini_path, tmp_path):
    concepts = [make_concept("a red fox"), make_concept("Velmira")]
    source = {"model": str(mini_path), "ckpt_path": None, "config_path": None}
    ledger = Ledger.create(tmp_path / HISTORY_FILE, make_header(model, OWN, concepts, ["a cat"], source))
    config = bundled_config("mini-sd")
    method = config.methods["SRS-ME"]
    ledger.append(create_shifts(ledger, model, concepts[:1], method, config.null_space, tmp_path))
    size = ["--seeds_per_prompt", "1", "--num_inference_steps", "1", "--unprotected_prompts", "2", "--num_shown", "1"]
    report = ["eval-scripts/report.py", tmp_path, "--save_path", tmp_path / "run", "--device", "cpu"]
    code, _, err = script(*report, *size)
    page = (tmp_path / "run" / "report.html").read_text() if code == 0 else err
    assert "1 of 2 concepts are erased" in page and "red fox (erased)" in page, err
    assert "Velmira (protected)" in page and "--concepts &#39;a red fox&#39; Velmira" in page


def test_its_commands_make_the_same_weights_again(ledger, model, script, tmp_path):
    for line in reproduction_commands(ledger):
        words = shlex.split(line.replace(str(ledger.root), str(tmp_path / "again")))
        data = ["--training_image_dir", tmp_path / "data"] if "--max_steps" in words else []
        assert script(words[1], *words[2:], *data)[0] == 0, line
    again = Ledger(tmp_path / "again" / HISTORY_FILE)
    assert again.header["protected"] == ledger.header["protected"] and len(again.entries) == len(ledger.entries) == 4
    for number in range(1, 5):
        hashes = []
        for known in (ledger, again):
            with applied(model.denoiser, list(known.shifts(number).values())):
                hashes.append(weights_hash(model.denoiser))
        assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_the_page_says_what_the_erasure_is_worth(ledger, model, tmp_path):
    classifier = load_classifier(classifier_path("style"), CPU)[0]
    experiment = Experiment(model, "style", tmp_path / "run", classifier, SAMPLING, seeds_per_prompt=1)
    page = render_report(ledger, experiment, 1, [], num_probed=1)
    section = page.partition("What the erasure is worth")[2].partition("</section>")[0]
    assert "Of VanGogh:" in section
    for text in ("prompts that say the name", "the 20 most changed", "nearer than the empty prompt", "this ledger"):
        assert text in section


def test_probes_without_a_judge_are_refused(ledger, model, tmp_path):
    experiment = Experiment(model, "style", tmp_path / "run", None, SAMPLING, seeds_per_prompt=1)
    with pytest.raises(ValueError, match="probes need a classifier that knows an erased concept"):
        render_report(ledger, experiment, 1, [], num_probed=1)
