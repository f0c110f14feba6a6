"""The live page: every visitor's choice is their own, what means harm is refused, and it works in a real browser."""

import shutil
import socket
import threading
import time
import urllib.request
import zipfile

import psutil
import pytest
import torch
from conftest import CPU, start_script
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import ImageChops
from safetensors.torch import load_file

from ldm.config.concepts import get_concept
from ldm.config.methods import SamplingConfig
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.diffusion.sampling import generate
from ldm.erasure.merge import applied, merge
from ldm.io.prompts import PromptCase
from ldm.ledger.demo import DemoSession
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header
from ldm.ledger.operations import create_shifts, weights_hash

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def ledger(mini_path, tmp_path_factory):
    """Erase VanGogh and Picasso, and restore Picasso."""
    model, styles = load_model(mini_path, CPU), [get_concept("style", index) for index in range(3)]
    source = {"model": str(mini_path), "ckpt_path": None, "config_path": None}
    root = tmp_path_factory.mktemp("ledger")
    ledger = Ledger.create(root / HISTORY_FILE, make_header(model, "style", styles, [], source))
    config = load_model_config("mini-sd")
    method = config.methods["SRS-ME"].with_changes(ridge_weight=1e-6, seed=0)
    ledger.append(create_shifts(ledger, model, styles[1:], method, config.null_space, root / "none"))
    ledger.append({}, [2])
    return ledger


@pytest.fixture
def demo(ledger, mini_path):
    return DemoSession(ledger, load_model(mini_path, CPU), lambda: load_model(mini_path, CPU))


def last(results):
    """Return the comparison at the end, after fractions of what is done."""
    *fractions, comparison = results
    assert fractions == sorted(fractions) and fractions[0] > 0 and fractions[-1] == 1
    return comparison


def test_a_choice_of_ones_own_is_that_of_merged_weights_and_touches_nothing(demo):
    before, requests = weights_hash(demo.model.unet), [(PromptCase("VanGogh", 3, 0), 0)]
    sampling = SamplingConfig(num_inference_steps=4, guidance_scale=2.0, sample_batch_size=1)
    comparison = last(demo.compare("VanGogh", 3, 4, 2.0, ["VanGogh"]))
    ((_, _, original),) = generate(demo.model, requests, sampling)
    with applied(demo.model.unet, [demo.shifts["VanGogh"]]):
        ((_, _, edited),) = generate(demo.model, requests, sampling)
    for own, other in ((comparison.original, original), (comparison.edited, edited)):
        assert not ImageChops.difference(own, other).getbbox()
    assert comparison.difference.getbbox() and comparison.leakage > 0.01 and weights_hash(demo.model.unet) == before
    again = last(demo.compare("VanGogh", 3, 4, 2.0, []))
    assert again.original is comparison.original and not again.difference.getbbox() and again.leakage == 0


def test_visitors_at_the_same_time_each_get_their_own_images(demo):
    visits = [(prompt, names) for prompt in ("VanGogh", "Picasso") for names in ([], [prompt])]

    def edited(prompt, names):
        return last(demo.compare(prompt, 5, 4, 2.0, names)).edited.tobytes()

    alone, results = [edited(*visit) for visit in visits], {}
    assert len(set(alone)) == 4

    def visit(k):
        results[k] = [edited(*visits[k]) for _ in range(3)]

    visitors = [threading.Thread(target=visit, args=(k,)) for k in range(4)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert all(results[k] == [alone[k]] * 3 for k in range(4))


REFUSED = {
    "10,000 characters": ({"prompt": "a" * 10_000}, "10000 characters"),
    "negative steps": ({"num_inference_steps": -3}, "num_inference_steps is -3"),
    "a path": ({"names": ["../../etc/passwd"]}, "no concept|not in the list"),
    "infinite guidance": ({"guidance_scale": 1e9}, "guidance_scale is"),
    "no seed": ({"seed": None}, "seed is None"),
    "half a step": ({"num_inference_steps": 2.5}, "whole numbers|steps"),
}
GOOD = {"prompt": "VanGogh", "seed": 0, "num_inference_steps": 2, "guidance_scale": 2.0, "names": ["VanGogh"]}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_image_is_generated_from(demo, case):
    changed, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        list(demo.compare(**GOOD | changed))


def test_an_export_is_the_merged_weights(demo, mini_path, tmp_path):
    path = demo.export_zip(["VanGogh"], "unet", tmp_path)
    zipfile.ZipFile(path).extractall(tmp_path)
    merged = merge(load_model(mini_path, CPU).unet, [demo.shifts["VanGogh"]])
    written = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name], weight) for name, weight in merged.items())
    for names, file_format, words in (([], "unet", "choose a concept"), (["VanGogh"], "../x", "is no format")):
        with pytest.raises(ValueError, match=words):
            demo.export_zip(names, file_format, tmp_path)


@pytest.fixture(scope="module")
def server(ledger, tmp_path_factory):
    """Start the page as a user does, and return its process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("page") / "log"
    process = start_script(["eval-scripts/demo.py", ledger.root, "--port", port, "--device", "cpu"], log)
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


@pytest.mark.slow
def test_hostile_requests_are_refused_and_the_server_lives(server):
    process, address = server
    client = Client(address, verbose=False)
    for changed, words in REFUSED.values():
        if changed == {"num_inference_steps": 2.5}:
            continue  # the page's field rounds it
        with pytest.raises((AppError, ValueError), match=words):
            client.predict(*(GOOD | changed).values(), api_name="/generate")
    memory = []
    for _ in range(3):  # fifty at once, three times
        jobs = [client.submit(*(GOOD | {"seed": seed}).values(), api_name="/generate") for seed in range(50)]
        assert all(len(job.result(120)) == 4 for job in jobs)
        memory.append(psutil.Process(process.pid).memory_info().rss)
    assert memory[2] < 1.1 * memory[1] and process.is_alive()


WHOLE_IMAGES = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
def test_the_page_and_the_report_in_a_browser(server, ledger, script, mini_path, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["--model", mini_path, "--save_path", tmp_path, "--device", "cpu"]
    size = ["--seeds_per_prompt", "2", "--num_inference_steps", "2"]
    assert script("eval-scripts/report.py", ledger.root, *flags, *size)[0] == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        errors = []

        def visit(address):
            page = browser.new_context().new_page()
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.goto(address)
            return page

        pages = [visit(server[1]) for _ in range(2)]
        for page in pages:
            page.get_by_label("prompt").fill("VanGogh")
            page.get_by_role("button", name="generate").click()
        erased = [page.wait_for_selector("#edited img").get_attribute("src") for page in pages]
        pages[0].get_by_label("VanGogh", exact=True).click()  # restored in one window
        pages[0].wait_for_function("old => document.querySelector('#edited img').src != old", arg=erased[0])
        pages[1].get_by_role("button", name="generate").click()  # and not in the other
        pages[1].wait_for_selector("#message >> text=Erased: VanGogh")
        assert "Erased: nothing" in pages[0].inner_text("#message")
        pages[1].get_by_role("button", name="export").click()
        link = pages[1].wait_for_selector("#download a")
        with pages[1].expect_download() as download:
            link.click()
        assert "diffusion_pytorch_model.safetensors" in zipfile.ZipFile(download.value.path()).namelist()
        page = visit((tmp_path / "report.html").as_uri())
        assert page.evaluate(f"document.images.length > 3 && {WHOLE_IMAGES}")
        page.set_viewport_size({"width": 390, "height": 800})  # a phone's
        assert page.evaluate("document.documentElement.scrollWidth <= 390") and not errors
        browser.close()
