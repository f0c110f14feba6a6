"""The live page: every visitor has a state of their own, what means harm is refused, and it works in a real browser."""

import shutil
import socket
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import ImageChops
from safetensors.torch import load_file

from ldm.config.concepts import get_concept
from ldm.ledger.demo import DemoSession
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header
from ldm.ledger.operations import create_shifts, weights_hash
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.diffusion.sampling import generate
from ldm.io.prompts import PromptCase
from ldm.erasure.merge import applied, merge

from conftest import CPU, start_script

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def ledger(mini_path, tmp_path_factory):
    """VanGogh and Picasso erased, Picasso given back."""
    model, styles = load_model(mini_path, CPU), [get_concept("style", index) for index in range(3)]
    source = {"model": str(mini_path), "ckpt_path": None, "config_path": None}
    ledger = Ledger.create(tmp_path_factory.mktemp("desk") / HISTORY_FILE, make_header(model, "style", styles, [], source))
    given = {**load_model_config("mini-sd").erasure["SRS-ME"], "ridge": 1e-6, "seed": 0}
    ledger.append(create_shifts(ledger, model, styles[1:], "SRS-ME", given, Path("none")))
    ledger.append({}, [2])
    return ledger


@pytest.fixture
def desk(ledger, mini_path):
    return DemoSession(ledger, load_model(mini_path, CPU), lambda: load_model(mini_path, CPU))


def last(drawing):
    """The pictures at a drawing's end, and how much was done before."""
    *done, pictures = drawing
    assert done == sorted(done) and 0 < done[0] and done[-1] == 1
    return pictures


def test_a_state_of_ones_own_is_that_of_merged_weights_and_touches_nothing(desk):
    before, cases = weights_hash(desk.model.unet), [(PromptCase("VanGogh", 3, 0), 0)]
    pictures = last(desk.draw("VanGogh", 3, 4, 2.0, ["VanGogh"]))
    (_, _, original), = generate(desk.model, cases, 4, 2.0, 1)
    with applied(desk.model.unet, [desk.shifts["VanGogh"]]):
        (_, _, present), = generate(desk.model, cases, 4, 2.0, 1)
    for ours, theirs in ((pictures.original, original), (pictures.present, present)):
        assert not ImageChops.difference(ours, theirs).getbbox()
    assert pictures.difference.getbbox() and pictures.leak > 0.01 and weights_hash(desk.model.unet) == before
    again = last(desk.draw("VanGogh", 3, 4, 2.0, []))
    assert again.original is pictures.original and not again.difference.getbbox() and again.leak == 0


def test_visitors_at_the_same_time_each_get_their_own_pictures(desk):
    states = [["VanGogh"], ["Picasso"], ["VanGogh", "Picasso"], []]
    alone, found = [last(desk.draw("VanGogh", 5, 4, 2.0, names)).present.tobytes() for names in states], {}
    assert len(set(alone)) == 4

    def visit(k):
        found[k] = [last(desk.draw("VanGogh", 5, 4, 2.0, states[k])).present.tobytes() for _ in range(3)]
    visitors = [threading.Thread(target=visit, args=(k,)) for k in range(4)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert all(found[k] == [alone[k]] * 3 for k in range(4))


REFUSED = {"10,000 characters": ({"prompt": "a" * 10_000}, "10000 characters"), "negative steps": ({"steps": -3}, "steps is -3"),
           "a path": ({"names": ["../../etc/passwd"]}, "no concept|not in the list"), "infinite guidance": ({"guidance": 1e9}, "guidance is"),
           "no seed": ({"seed": None}, "seed is None"), "half a step": ({"steps": 2.5}, "whole numbers|steps")}
GOOD = {"prompt": "VanGogh", "seed": 0, "steps": 2, "guidance": 2.0, "names": ["VanGogh"]}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_picture_is_drawn_from(desk, case):
    changed, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        list(desk.draw(**GOOD | changed))


def test_an_export_is_the_merged_weights(desk, mini_path, tmp_path):
    path = desk.write(["VanGogh"], "unet", tmp_path)
    zipfile.ZipFile(path).extractall(tmp_path)
    merged = merge(load_model(mini_path, CPU).unet, [desk.shifts["VanGogh"]])
    written = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name], weight) for name, weight in merged.items())
    for names, kind, words in (([], "unet", "switch a concept off"), (["VanGogh"], "../x", "is no format")):
        with pytest.raises(ValueError, match=words):
            desk.write(names, kind, tmp_path)


@pytest.fixture(scope="module")
def server(ledger, tmp_path_factory):
    """The page as a user starts it: its process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("page") / "log"
    process = start_script(["eval-scripts/app.py", ledger.root, "--port", port, "--device", "cpu"], log)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}").close()
            break
        except OSError:
            assert process.is_alive(), log.read_text()
            time.sleep(0.1)
    yield process, f"http://127.0.0.1:{port}"
    process.terminate()
    process.join()


def test_hostile_requests_are_refused_and_the_server_lives(server):
    process, address = server
    client = Client(address, verbose=False)
    for changed, words in REFUSED.values():
        if changed == {"steps": 2.5}:
            continue  # the page's field rounds it
        with pytest.raises((AppError, ValueError), match=words):
            client.predict(*(GOOD | changed).values(), api_name="/draw")
    memory = []
    for _ in range(3):  # fifty at once, three times
        jobs = [client.submit(*(GOOD | {"seed": seed}).values(), api_name="/draw") for seed in range(50)]
        assert all(len(job.result(120)) == 4 for job in jobs)
        memory.append(psutil.Process(process.pid).memory_info().rss)
    assert memory[2] < 1.1 * memory[1] and process.is_alive()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
def test_the_page_and_the_report_in_a_browser(server, ledger, script, mini_path, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    assert script("eval-scripts/report.py", ledger.root, "--model", mini_path, "--save_path", tmp_path, "--num_seeds", "2", "--ddim_steps", "2",
                  "--device", "cpu")[0] == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        said = []

        def visit(address):
            page = browser.new_context().new_page()
            page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
            page.goto(address)
            return page
        pages = [visit(server[1]) for _ in range(2)]
        for page in pages:
            page.get_by_label("prompt").fill("VanGogh")
            page.get_by_role("button", name="draw").click()
        erased = [page.wait_for_selector("#present img").get_attribute("src") for page in pages]
        pages[0].get_by_label("VanGogh", exact=True).click()  # given back in one window
        pages[0].wait_for_function("old => document.querySelector('#present img').src != old", arg=erased[0])
        pages[1].get_by_role("button", name="draw").click()  # and not in the other
        pages[1].wait_for_selector("#said >> text=Erased: VanGogh")
        assert "Erased: nothing" in pages[0].inner_text("#said")
        pages[1].get_by_role("button", name="export").click()
        link = pages[1].wait_for_selector("#download a")
        with pages[1].expect_download() as download:
            link.click()
        assert "diffusion_pytorch_model.safetensors" in zipfile.ZipFile(download.value.path()).namelist()
        page = visit((tmp_path / "report.html").as_uri())
        assert page.evaluate("[...document.images].length > 3 && [...document.images].every(image => image.complete && image.naturalWidth > 0)")
        page.set_viewport_size({"width": 390, "height": 800})  # a phone's
        assert page.evaluate("document.documentElement.scrollWidth <= 390") and not said
        browser.close()
