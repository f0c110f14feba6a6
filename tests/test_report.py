"""The page is whole in itself, shows what the ledger says, and its commands make the same weights again."""

import base64
import io
import re
import shlex

import pytest
from PIL import Image

from ldm.config.concepts import get_concept
from ldm.experiments.experiment import Experiment
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header
from ldm.ledger.operations import create_shifts, weights_hash
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.experiments.report import render_report, reproduction_commands
from ldm.erasure.merge import applied

from conftest import CPU


@pytest.fixture
def model(mini_path):
    return load_model(mini_path, CPU)


@pytest.fixture
def ledger(model, mini_path, tmp_path):
    """VanGogh erased in closed form, Picasso in two steps of learning, VanGogh given back and erased again."""
    styles = [get_concept("style", index) for index in range(3)]
    source = {"model": str(mini_path), "ckpt_path": None, "config_path": None}
    ledger = Ledger.create(tmp_path / "desk" / HISTORY_FILE, make_header(model, "style", styles, ["a <b>cat & dog"], source))
    given = {**load_model_config("mini-sd").erasure["SRS-ME"], "seed": 0}
    for index, changes in ((1, {}), (2, {"iter_break": 2, "ridge": 0.5, "batch_size": 1})):
        (tmp_path / "data" / styles[index].name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "blue").save(tmp_path / "data" / styles[index].name / "0_0.png")
        ledger.append(create_shifts(ledger, model, [styles[index]], "SRS-ME", {**given, **changes}, tmp_path / "data"))
    ledger.append({}, [1])
    ledger.append(ledger.plan_erasure([styles[1]], False)[0])
    return ledger


def test_the_page_holds_everything_in_itself(ledger, model, tmp_path):
    experiment = Experiment(model, "style", tmp_path / "run", None, {"ddim_steps": 2, "guidance_scale": 2.0, "batch_size": 32}, samples=2,
                            also=ledger.header["protected"])
    page = render_report(ledger, experiment, 2)
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)">', page)
    assert len(pictures) == page.count("<img") == 5  # bars, pictures, leaks, curves, capacity
    for picture, shows in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()
        assert len(shows) > 20
    assert not re.search(r"(src|href)=.(?!data:)|url\(|@import", page)  # nothing is fetched
    assert "a &lt;b&gt;cat &amp; dog" in page and "<b>" not in page  # what a ledger holds is text
    for digest in (ledger.head, model.digest, *(entry["digest"] for entry in ledger.state().values())):
        assert digest[:12] in page
    assert "2 of 3 concepts are erased" in page and "no pixel of 8 pictures" in page


def test_a_ledger_of_nothing_has_a_page_too(model, tmp_path):
    ledger = Ledger.create(tmp_path / HISTORY_FILE, make_header(model, "style", [get_concept("style", 0)], [], {}))
    experiment = Experiment(model, "style", tmp_path / "run", None, {"ddim_steps": 2, "guidance_scale": 2.0, "batch_size": 32}, samples=1)
    page = render_report(ledger, experiment, 1)
    assert "0 of 1 concepts are erased" in page and "No concept was ever erased" in page


def test_its_commands_make_the_same_weights_again(ledger, model, script, tmp_path):
    for line in reproduction_commands(ledger):
        words = shlex.split(line.replace(str(ledger.root), str(tmp_path / "again")))
        data = ["--data_path", tmp_path / "data"] if "--iter_break" in words else []
        assert script(words[1], *words[2:], *data)[0] == 0, line
    again = Ledger(tmp_path / "again" / HISTORY_FILE)
    assert again.header["protected"] == ledger.header["protected"] and len(again.entries) == len(ledger.entries) == 4
    for number in range(1, 5):
        made = []
        for known in (ledger, again):
            with applied(model.unet, list(known.shifts(number).values())):
                made.append(weights_hash(model.unet))
        assert made[0] == made[1]
