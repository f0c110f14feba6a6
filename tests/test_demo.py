"""The live page: every visitor's choice is their own, what means harm is refused, and it works in a real browser."""

import asyncio
import json
import os
import runpy
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import gradio
import httpx
import psutil
import pytest
import torch
from accelerate import init_empty_weights
from conftest import CPU, FORK, ROOT, is_error
from gradio.server_messages import EstimationMessage
from PIL import Image, ImageChops
from safetensors.torch import load_file
from starlette.testclient import TestClient

from ldm.config.concepts import get_concept
from ldm.config.methods import SamplingConfig
from ldm.config.models import bundled_config
from ldm.diffusion.load import load_model
from ldm.diffusion.sampling import generate
from ldm.erasure.merge import applied, merge
from ldm.io.prompts import PromptCase
from ldm.ledger.demo import MAX_CHECKBOXES, MAX_EXPORTS, Comparison, DemoSession, OtherPrompt
from ldm.ledger.demo_state import LedgerState, RequestError, example_prompts, other_prompts
from ldm.ledger.demo_words import (
    MAX_LISTED_NAMES,
    concepts_table,
    describe_difference,
    describe_others,
    list_names,
    overview,
)
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header
from ldm.ledger.operations import create_shifts, weights_hash
from ldm.ledger.owner import Owner
from ldm.ledger.page import MAX_SESSIONS, build, serve
from ldm.ledger.page_guard import MAX_BODY_BYTES, PageGuard
from ldm.ledger.page_values import comparison_values, ledger_values

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def ledger(mini_path, tmp_path_factory):
    """Erase VanGogh and Picasso, and restore Picasso."""
    model, styles = load_model(mini_path, CPU), [get_concept("style", index) for index in range(3)]
    source = {"model": str(mini_path), "ckpt_path": None, "config_path": None}
    root = tmp_path_factory.mktemp("ledger")
    ledger = Ledger.create(root / HISTORY_FILE, make_header(model, "style", styles, [], source))
    config = bundled_config("mini-sd")
    method = config.methods["SRS-ME"].with_changes(ridge_weight=1e-6, seed=0)
    ledger.append(create_shifts(ledger, model, styles[1:], method, config.null_space, root / "none"))
    ledger.append({}, ["2"])
    return ledger


@pytest.fixture
def demo(ledger, mini_path):
    return DemoSession(ledger, load_model(mini_path, CPU), lambda: load_model(mini_path, CPU))


@pytest.fixture
def own_demo(ledger, mini_path, tmp_path):
    """Return a demo of a copy of the ledger, which a test may write to."""
    root = shutil.copytree(ledger.root, tmp_path / "own")
    return DemoSession(Ledger(root / HISTORY_FILE), load_model(mini_path, CPU), lambda: load_model(mini_path, CPU))


def last(results):
    """Return the comparison at the end, after fractions of what is done."""
    *fractions, comparison = results
    assert fractions == sorted(fractions) and fractions[0] > 0 and fractions[-1] == 1
    return comparison


def test_a_choice_of_ones_own_is_that_of_merged_weights_and_touches_nothing(demo):
    before, requests = weights_hash(demo.model.denoiser), [(PromptCase("VanGogh", 3, 0), 0)]
    sampling = SamplingConfig(num_inference_steps=4, guidance_scale=2.0, sample_batch_size=1)
    comparison = last(demo.compare("VanGogh", 3, 4, 2.0, ["VanGogh"]))
    ((_, _, original),) = generate(demo.model, requests, sampling)
    with applied(demo.model.denoiser, [demo.state.shifts["VanGogh"]]):
        ((_, _, edited),) = generate(demo.model, requests, sampling)
    for own, other in ((comparison.original, original), (comparison.edited, edited)):
        assert not ImageChops.difference(own, other).getbbox()
    assert comparison.difference.getbbox() and comparison.leakage > 0.01 and weights_hash(demo.model.denoiser) == before
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


def test_a_comparison_while_a_model_is_loaded_is_the_right_one(demo, mini_path):
    """While diffusers loads a model, parameters of every module in the process become empty."""
    alone, loading, results = last(demo.compare("Picasso", 5, 2, 2.0, ["Picasso"])), threading.Event(), []

    def load_slowly():
        with init_empty_weights():
            loading.set()
            time.sleep(0.3)
        return load_model(mini_path, CPU)

    demo.load_fresh_model = load_slowly
    with tempfile.TemporaryDirectory() as folder:
        exporting = threading.Thread(target=lambda: results.append(demo.export_zip(["VanGogh"], "unet", Path(folder))))
        exporting.start()
        assert loading.wait(10)
        meanwhile = last(demo.compare("Picasso", 5, 2, 2.0, ["Picasso"]))
        exporting.join()
    assert meanwhile.edited.tobytes() == alone.edited.tobytes() and results


def pair(*values: int) -> Comparison:
    """Return a comparison of a black image with one whose pixels have these values."""
    edited = Image.new("RGB", (len(values), 1))
    for x, value in enumerate(values):
        edited.putpixel((x, 0), (value, 0, 0))
    return Comparison(Image.new("RGB", edited.size), edited, 0.0)


@pytest.mark.parametrize(("values", "scale"), [((0, 1), 255), ((3, 20), 12), ((128, 255), 1)])
def test_a_difference_is_scaled_as_far_as_nothing_is_cut_off_and_the_scale_is_said(values, scale):
    comparison = pair(*values)
    assert comparison.max_difference == max(values) and comparison.scale == scale
    shown = [comparison.scaled_difference.getpixel((x, 0)) for x in range(2)]
    assert shown == [(scale * value, 0, 0) for value in values]
    difference = comparison_values(comparison, "x", ["VanGogh"])["difference"]
    assert difference["label"] == f"Difference x {scale}" and difference["visible"]


def test_an_equal_pair_says_so_instead_of_a_difference():
    values = comparison_values(pair(0, 0), "", [])
    assert not values["difference"]["visible"] and values["difference"]["value"] is None and values["equal"]["visible"]
    assert "unchanged, equal in every pixel" in values["message"]["value"]
    assert values["original"]["alt_text"] == "Image of the original model for: the empty prompt"


def test_two_visitors_of_the_same_image_fetch_a_file_each(tmp_path):
    """Gradio writes an image where its digest says, over an equal one that may be on its way to somebody else."""
    widget = gradio.Image(format="png")
    widget.GRADIO_CACHE = str(tmp_path)
    paths = [widget.postprocess(comparison_values(pair(3), "x", [])["edited"]["value"]).path for _ in range(2)]
    assert paths[0] != paths[1] and len({Image.open(path).tobytes() for path in paths}) == 1


def test_words_say_what_was_measured():
    """A difference is called invisible up to one step of 8 bits, and no further."""
    differences = {0: "unchanged, equal", 1: "no visible change", 2: "changed", 255: "changed"}
    for difference, word in differences.items():
        assert describe_difference(difference).startswith(word)
        assert difference == 0 or f"largest pixel difference {difference} of 255" in describe_difference(difference)


OTHERS = {  # largest pixel differences of two protected prompts and another, and what is said of them
    "none": ((0, 1, 1), "none visible, largest pixel difference 1 of 255"),
    "unprotected": (
        (0, 1, 9),
        "none visible on the 2 that the ledger protects; visible on 1 of 1 that nothing protects",
    ),
    "protected": ((0, 2, 0), "visible on 1 of 3, largest pixel difference 2 of 255"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_changes_on_other_prompts_are_said_as_they_are(case):
    differences, sentence = OTHERS[case]
    names = ("", "<b>", "a dog")
    others = [OtherPrompt(names[k], k < 2, difference, 0.5) for k, difference in enumerate(differences)]
    text = describe_others(others, ["VanGogh"])
    assert f"Changes on other prompts: {sentence}" in text
    assert "the empty prompt (protected)" in text and "&lt;b&gt;" in text and "<b>" not in text
    assert "a dog” (not protected)" in text and "leakage 0.5" in text


@pytest.mark.slow
def test_other_prompts_say_no_erased_concept_and_are_measured_once_for_each_choice(demo):
    state, drawn, compare = demo.state, [], demo.compare
    for names in (["VanGogh"], ["VanGogh", "Picasso"]):
        others = other_prompts(state, names)
        assert not [prompt for prompt in others for name in names if name.lower() in prompt.lower()]
        assert list(others.values()).count(False) == 2 and others["CCS 2024"]
    demo.compare = lambda *request: drawn.append(request[0]) or compare(*request)
    measured = demo.measure_others(["VanGogh"])
    assert [other.prompt for other in measured] == drawn and len(drawn) == len(set(drawn)) >= 4
    prompt = measured[1].prompt
    again = last(compare(prompt, 0, demo.sampling.num_inference_steps, demo.sampling.guidance_scale, ["VanGogh"]))
    assert measured[1].max_difference == again.max_difference and measured[1].leakage == again.leakage
    assert demo.measure_others(["VanGogh"]) is measured and len(drawn) == len(measured)
    assert demo.measure_others([]) == [] and len(drawn) == len(measured)
    with pytest.raises(RequestError, match="no concept"):
        demo.measure_others(["../x"])


def test_the_example_is_made_once_for_each_state_of_the_ledger(own_demo):
    prompt, first = own_demo.example(own_demo.state)
    assert prompt == "VanGogh" and first.max_difference > 0
    own_demo.reload()
    assert own_demo.example(own_demo.state)[1] is first
    Ledger(own_demo.state.ledger.path).append({}, ["1"])
    own_demo.reload()
    prompt, restored = own_demo.example(own_demo.state)
    assert prompt == "VanGogh" and restored.max_difference == 0 and own_demo.state.erased == []


def test_examples_are_of_each_state_of_a_composition_and_of_no_concept(demo):
    prompts = example_prompts(demo.state)
    labels = ["VanGogh (erased)", "Picasso (restored)", "Cezanne (never erased)", "a church by VanGogh"]
    assert list(prompts)[:4] == labels and list(prompts.values())[:3] == ["VanGogh", "Picasso", "Cezanne"]
    *_, plain = prompts.values()
    assert not [name for name in ("vangogh", "picasso", "cezanne") if name in plain.lower()]


def test_the_page_says_which_model_it_is_and_what_is_erased(demo):
    text = overview(demo.state)
    for said in ("mini-sd without VanGogh", demo.model.digest[:12], "<dd>Picasso</dd>", "<dd>Cezanne</dd>"):
        assert said in text
    table = concepts_table(demo.state)
    for word in ("Erased, but too weakly", "Restored", "Never erased"):  # by the effect on a random model
        assert table.count(f"<td>{word}</td>") == 1
    names = [f"concept {k}" for k in range(MAX_LISTED_NAMES + 3)]
    assert list_names(names).endswith(f"concept {MAX_LISTED_NAMES - 1} and 3 more") and list_names([]) == "nothing"
    assert list_names(names, 1) == f"concept 0 and {len(names) - 1} more"


def widgets_of(page, name: str) -> list:
    """Return the widgets of a page by their class' name."""
    return [block for block in page.blocks.values() if type(block).__name__ == name]


@pytest.mark.slow
def test_many_concepts_are_chosen_in_a_list_that_can_be_searched(demo, tmp_path, monkeypatch):
    assert not demo.has_switches and demo.chosen(["Picasso"]) == ["Picasso"]
    assert [box.elem_id for box in widgets_of(build(demo, tmp_path), "CheckboxGroup")] == ["names"]
    monkeypatch.setattr("ldm.ledger.demo.MAX_CHECKBOXES", 2)
    many = DemoSession(demo.state.ledger, demo.model, demo.load_fresh_model)
    page = build(many, tmp_path)
    (names,) = [widget for widget in widgets_of(page, "Dropdown") if widget.elem_id == "names"]
    assert names.multiselect and names.filterable and names.value == []
    assert ("VanGogh (erased in the ledger)", "restore VanGogh") in names.choices
    assert not widgets_of(page, "CheckboxGroup") and MAX_CHECKBOXES > 2
    wishes = ([], ["restore VanGogh"], ["erase Picasso"], ["erase VanGogh"], ["restore Picasso"])  # the last two are so
    wanted = [["VanGogh"], [], ["VanGogh", "Picasso"], ["VanGogh"], ["VanGogh"]]
    assert [many.chosen(wish) for wish in wishes] == wanted
    refused = {
        "erase Cezanne": "no concept that can be erased here",
        "VanGogh": "is no concept",
        "keep VanGogh": "neither",
    }
    for wish, message in refused.items():
        with pytest.raises(RequestError, match=message):
            many.chosen([wish])
    with pytest.raises(RequestError, match="give a list"):
        many.chosen("erase VanGogh")


def test_what_was_loaded_once_is_not_loaded_again_but_its_file_is_checked(own_demo):
    before = own_demo.state.shifts["VanGogh"]
    assert own_demo.reload().shifts["VanGogh"] is before
    path = own_demo.state.ledger.root / own_demo.state.ledger.last_shifts()["VanGogh"]["shift"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not the file that was activated"):
        own_demo.reload()


@pytest.mark.slow
def test_whoever_opens_the_page_gets_the_example_with_it(demo, tmp_path):
    """It is in what the server sends first, before any request of the page."""
    page = build(demo, tmp_path)
    images = {image.elem_id: image for image in widgets_of(page, "Image")}
    assert images["original"].value["path"] and images["edited"].value["path"] and images["edited"].label
    expected = ledger_values(demo)
    assert images["difference"].label == expected["difference"]["label"]
    assert Image.open(images["edited"].value["path"]).convert("RGB").tobytes() == expected["edited"]["value"].tobytes()


@pytest.mark.slow
def test_only_an_owners_page_has_functions_that_write(demo, tmp_path):
    def functions(page):
        return {function.api_name for function in page.fns.values()}

    visitors, owners = build(demo, tmp_path), build(demo, tmp_path, Owner(demo, tmp_path))
    writing = functions(owners) - functions(visitors)
    assert writing == {"ask_erase", "ask_restore", "write", "closed"}
    assert functions(visitors) == {"load", "generate", "generate_1", "measure", "measure_1", "choose", "export"}


def test_an_owner_erases_and_restores_and_old_shifts_are_used_again(own_demo, tmp_path):
    owner, path, before = Owner(own_demo, tmp_path), own_demo.state.ledger.path, weights_hash(own_demo.model.denoiser)
    loads = count_loads(own_demo)
    assert "Erase Cezanne by a new shift" in owner.foretell("erase", "Cezanne")
    owner.write("erase", "Cezanne")
    assert own_demo.state.erased == ["Cezanne", "VanGogh"] and len(loads) == 1
    owner.write("restore", "VanGogh")
    assert own_demo.state.restored == ["VanGogh", "Picasso"]
    assert "by the shift that erased it before" in owner.foretell("erase", "VanGogh")
    owner.write("erase", "VanGogh")
    assert len(loads) == 1 and weights_hash(own_demo.model.denoiser) == before
    assert LedgerState.read(path).erased == ["Cezanne", "VanGogh"] and len(Ledger(path).entries) == 5
    assert last(own_demo.compare("Cezanne", 0, 2, 2.0, ["Cezanne"])).max_difference > 0


def test_an_owner_cannot_write_what_the_ledger_does_not_allow(own_demo, tmp_path):
    owner, path = Owner(own_demo, tmp_path), own_demo.state.ledger.path
    before = path.read_bytes()
    refused = {
        ("erase", "VanGogh"): "is erased already",
        ("restore", "Picasso"): "is not erased",
        ("restore", "Cezanne"): "is not erased",
        ("erase", "../../x"): "choose one of the concepts",
        ("export", "VanGogh"): "erase or restore",
    }
    for (action, name), words in refused.items():
        for call in (owner.foretell, owner.write):
            with pytest.raises(RequestError, match=words):
                call(action, name)

    def fails(*_):
        raise ValueError("`rank_rtol` is too large")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RequestError, match="nothing was written"):
        patch.setattr("ldm.ledger.owner.create_shifts", fails)
        owner.write("erase", "Cezanne")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RequestError, match="no gate was found for Cezanne"):
        patch.setattr("ldm.ledger.owner.create_shifts", lambda *_: {})
        owner.write("erase", "Cezanne")
    with pytest.raises(ValueError, match="nothing is erased or restored by it"):
        Ledger(path).append({})
    assert path.read_bytes() == before


def test_another_process_changes_the_ledger_first(own_demo, tmp_path):
    """What is written is checked against the ledger as it is then, and not as it was when the owner was asked."""
    owner = Owner(own_demo, tmp_path)
    owner.foretell("restore", "VanGogh")
    Ledger(own_demo.state.ledger.path).append({}, ["1"])
    with pytest.raises(RequestError, match="VanGogh is not erased"):
        owner.write("restore", "VanGogh")


def test_nobody_sees_half_a_ledger(demo):
    """What a call has read stays as it was, and a reload replaces all of it at once."""
    before = demo.state
    after = demo.reload()
    assert demo.state is after is not before and after.digests == before.digests and after.erased == ["VanGogh"]


REFUSED = {
    "10,000 characters": ({"prompt": "a" * 10_000}, "10000 characters"),
    "no text": ({"prompt": 5}, "no text"),
    "negative steps": ({"num_inference_steps": -3}, "num_inference_steps is -3"),
    "a path": ({"names": ["../../etc/passwd"]}, "no concept"),
    "a list in a list": ({"names": [["VanGogh"]]}, "no concept"),
    "no list": ({"names": "VanGogh"}, "a list"),
    "infinite guidance": ({"guidance_scale": 1e9}, "guidance_scale is"),
    "guidance that is no number": ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    "no seed": ({"seed": None}, "seed is None"),
    "half a step": ({"num_inference_steps": 2.5}, "whole numbers"),
}
GOOD = {"prompt": "VanGogh", "seed": 0, "num_inference_steps": 2, "guidance_scale": 2.0, "names": ["VanGogh"]}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_image_is_generated_from(demo, case):
    changed, words = REFUSED[case]
    with pytest.raises(RequestError, match=words):
        list(demo.compare(**GOOD | changed))


def is_merged(path, names, mini_path, shifts) -> bool:
    """Return whether a .zip of a U-Net holds the weights of the model with the shifts of `names` merged."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(path).extractall(folder)
        written = load_file(Path(folder) / "diffusion_pytorch_model.safetensors")
    merged = merge(load_model(mini_path, CPU).denoiser, [shifts[name] for name in names])
    return len(merged) > 0 and all(torch.equal(written[name], weight) for name, weight in merged.items())


def test_an_export_is_the_merged_weights(demo, mini_path, tmp_path):
    path = demo.export_zip(["VanGogh"], "unet", tmp_path)
    assert is_merged(path, ["VanGogh"], mini_path, demo.state.shifts)
    for names, file_format, words in (([], "unet", "choose a concept"), (["VanGogh"], "../x", "is no format")):
        with pytest.raises(RequestError, match=words):
            demo.export_zip(names, file_format, tmp_path)


def count_loads(demo) -> list:
    """Return a list that gets an entry whenever the model is loaded anew."""
    loads, load = [], demo.load_fresh_model

    def counted():
        loads.append(0)
        return load()

    demo.load_fresh_model = counted
    return loads


def test_the_same_choice_is_exported_once_and_few_exports_are_kept(demo, tmp_path):
    loads = count_loads(demo)
    first = demo.export_zip(["VanGogh", "Picasso"], "unet", tmp_path)
    written = first.stat().st_mtime_ns
    assert demo.export_zip(["Picasso", "VanGogh"], "unet", tmp_path) == first
    assert len(loads) == 1 and first.stat().st_mtime_ns == written
    choices = [(names, form) for names in (["VanGogh"], ["Picasso"]) for form in ("unet", "lora", "kohya")]
    paths = [demo.export_zip(*choice, tmp_path) for choice in choices]
    assert len(loads) == 1 + len(choices) and len({first, *paths}) == 1 + len(choices)
    kept = [path.exists() for path in (first, *paths)]
    assert kept == [False] * (1 + len(choices) - MAX_EXPORTS) + [True] * MAX_EXPORTS
    assert len(list(tmp_path.iterdir())) == MAX_EXPORTS
    assert demo.export_zip(["Picasso", "VanGogh"], "unet", tmp_path).is_file() and len(loads) == 2 + len(choices)


def test_a_shift_that_was_made_again_is_exported_anew(ledger, mini_path, tmp_path):
    shutil.copytree(ledger.root, tmp_path / "ledger")
    own = Ledger(tmp_path / "ledger" / HISTORY_FILE)
    demo = DemoSession(own, load_model(mini_path, CPU), lambda: load_model(mini_path, CPU))
    before = demo.export_zip(["VanGogh"], "unet", tmp_path / "exports")
    config = bundled_config("mini-sd")
    method = config.methods["SRS-ME"].with_changes(ridge_weight=0.5, seed=0)
    own.append({}, ["1"])
    styles = [get_concept("style", 1)]
    own.append(create_shifts(own, load_model(mini_path, CPU), styles, method, config.null_space, tmp_path / "none"))
    old = demo.state.shifts
    demo.reload()
    after = demo.export_zip(["VanGogh"], "unet", tmp_path / "exports")
    assert after != before and is_merged(after, ["VanGogh"], mini_path, demo.state.shifts)
    assert is_merged(before, ["VanGogh"], mini_path, old) and not is_merged(after, ["VanGogh"], mini_path, old)


@pytest.mark.slow
def test_exports_at_once_are_each_the_right_one(demo, mini_path, tmp_path):
    choices = [["VanGogh"], ["Picasso"], ["VanGogh", "Picasso"]] * 4
    loads = count_loads(demo)
    with ThreadPoolExecutor(len(choices)) as pool:
        paths = list(pool.map(lambda names: demo.export_zip(names, "unet", tmp_path), choices))
    assert len(loads) == 3 and len(set(paths)) == 3
    assert all(is_merged(path, names, mini_path, demo.state.shifts) for path, names in zip(paths, choices, strict=True))


def test_an_export_that_fails_leaves_nothing_and_the_next_is_right(demo, mini_path, other_path, tmp_path, monkeypatch):
    load = demo.load_fresh_model
    demo.load_fresh_model = lambda: load_model(other_path, CPU)
    with pytest.raises(ValueError, match="have changed since it was loaded") as changed:
        demo.export_zip(["VanGogh"], "unet", tmp_path)
    assert not isinstance(changed.value, RequestError)
    demo.load_fresh_model = load

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "make_archive", full)
    with pytest.raises(OSError, match="No space"):
        demo.export_zip(["VanGogh"], "unet", tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(RequestError, match="cannot be written as compvis") as impossible:  # no Stable Diffusion v1
        demo.model.pipeline.text_encoder.config.hidden_act = "gelu"
        demo.load_fresh_model = lambda: demo.model
        demo.export_zip(["VanGogh"], "compvis", tmp_path)
    assert str(tmp_path) not in str(impossible.value) and not list(tmp_path.iterdir())
    demo.load_fresh_model = load
    assert is_merged(demo.export_zip(["VanGogh"], "unet", tmp_path), ["VanGogh"], mini_path, demo.state.shifts)


JOIN = "/gradio_api/queue/join"
BODY = {"data": ["a", 1, 2.5, ["VanGogh"], None], "fn_index": 0, "session_hash": "s"}
FILE = {"path": "http://example.org/large", "meta": {"_type": "gradio.FileData"}}
SENT = {  # method, path, headers, body, and the status that a request is answered with
    "the page": ("GET", "/", {}, None, 200),
    "the page by another name of this machine": ("GET", "/", {"Host": "localhost:7860"}, None, 200),
    "the page by the shared address": ("GET", "/", {"Host": "abc.gradio.live"}, None, 200),
    "an image": ("GET", "/gradio_api/file=/tmp/x.png", {}, None, 200),
    "a request": ("POST", JOIN, {"Origin": "http://127.0.0.1:7860"}, BODY, 200),
    "one by the shared address": (
        "POST",
        JOIN,
        {"Host": "abc.gradio.live", "Origin": "https://abc.gradio.live"},
        BODY,
        200,
    ),
    "a name that was pointed here": ("GET", "/", {"Host": "evil.example:7860"}, None, 403),
    "another port": ("GET", "/", {"Host": "127.0.0.1:80"}, None, 403),
    "another shared address": ("GET", "/", {"Host": "evil.gradio.live"}, None, 403),
    "no host": ("GET", "/", {"Host": ""}, None, 403),
    "another site": ("POST", JOIN, {"Origin": "https://evil.example"}, BODY, 403),
    "another port's site": ("POST", JOIN, {"Origin": "http://127.0.0.1:8000"}, BODY, 403),
    "a site that hides": ("POST", JOIN, {"Origin": "null"}, BODY, 403),
    "another site that reads": ("GET", "/config", {"Origin": "https://evil.example"}, None, 403),
    "an upload": ("POST", "/gradio_api/upload", {}, BODY, 404),
    "a direct call": ("POST", "/gradio_api/run/generate", {}, BODY, 404),
    "a direct call by its older name": ("POST", "/gradio_api/api/generate", {}, BODY, 404),
    "a call": ("POST", "/gradio_api/call/generate", {}, BODY, 404),
    "a component's function": ("POST", "/gradio_api/component_server", {}, BODY, 404),
    "a link that is written": ("GET", "/gradio_api/deep_link?session_hash=s", {}, None, 404),
    "a proxy": ("GET", "/gradio_api/proxy=http://example.org", {}, None, 404),
    "another site's file": ("GET", "/gradio_api/file=http://example.org/x", {}, None, 404),
    "the monitor": ("GET", "/monitoring", {}, None, 404),
    "50 MB": ("POST", JOIN, {}, b"x" * 50_000_000, 413),
    "more than is said": ("POST", JOIN, {}, iter([b"x" * MAX_BODY_BYTES, b"x"]), 413),
    "a large password": ("POST", "/login", {}, b"x" * 100_000, 413),
    "deep JSON": ("POST", JOIN, {}, b'{"data":' + b"[" * 20_000 + b"]" * 20_000 + b"}", 422),
    "no JSON": ("POST", JOIN, {}, b"\xff\x00{", 422),
    "no mapping": ("POST", JOIN, {}, [1], 422),
    "a file in an input": ("POST", JOIN, {}, BODY | {"data": [FILE]}, 422),
    "a file in a list": ("POST", JOIN, {}, BODY | {"data": [[FILE]]}, 422),
    "a long session": ("POST", JOIN, {}, BODY | {"session_hash": "s" * 10_000}, 422),
    "no session": ("POST", JOIN, {}, {"data": [], "fn_index": 0}, 422),
    "no such function": ("POST", JOIN, {}, BODY | {"fn_index": 99}, 404),
    "no whole function": ("POST", JOIN, {}, BODY | {"fn_index": 0.5}, 422),
}


@pytest.mark.parametrize("case", SENT)
def test_only_what_the_page_asks_for_is_answered(case):
    method, path, headers, body, status = SENT[case]
    reached = []

    async def app(scope, receive, send):
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    page = SimpleNamespace(share_url="https://abc.gradio.live", fns={0: None})
    content = json.dumps(body) if isinstance(body, (dict, list)) else body
    client = TestClient(PageGuard(app, page, 7860), base_url="http://127.0.0.1:7860")
    response = client.request(method, path, headers=headers, content=content)
    assert response.status_code == status and len(reached) == (status == 200)
    if body is BODY and status == 200:
        assert json.loads(reached[0]) == BODY | {"trigger_id": None}


@pytest.mark.slow
def test_windows_that_were_forgotten_end_no_queue_and_take_no_memory(demo, tmp_path):
    """Their waiting requests get messages still: without a place for these Gradio's queue would end for all."""
    queue = build(demo, tmp_path)._queue
    for number in range(MAX_SESSIONS + 50):
        queue.pending_messages_per_session[f"window {number}"] = asyncio.Queue()
        queue.pending_event_ids_session[f"window {number}"] = {"request"}
    assert len(queue.pending_messages_per_session) == len(queue.pending_event_ids_session) == MAX_SESSIONS
    for window, waiting in (("window 0", 0), (f"window {MAX_SESSIONS}", 1)):
        queue.send_message(
            SimpleNamespace(alive=True, session_hash=window, _id="request"), EstimationMessage(queue_size=0)
        )
        assert queue.pending_messages_per_session[window].qsize() == waiting
    assert "window 0" not in queue.pending_messages_per_session


def test_what_is_shared_asks_for_a_password(monkeypatch, capsys):
    login = runpy.run_path(str(ROOT / "eval-scripts" / "demo.py"))["login"]
    monkeypatch.delenv("SRSME_PAGE_PASSWORD", raising=False)
    assert login(False) is None
    (user, first), (_, second) = login(True), login(True)
    assert len(first) > 20 and first != second and f"user {user}, password {first}" in capsys.readouterr().out
    monkeypatch.setenv("SRSME_PAGE_PASSWORD", "correct horse")
    assert login(True) == login(False) == (user, "correct horse") and not capsys.readouterr().out
    assert login(True, owner=True) == ("owner", "correct horse")
    monkeypatch.setenv("SRSME_PAGE_PASSWORD", "short")
    with pytest.raises(ValueError, match="SRSME_PAGE_PASSWORD has 5 characters: give at least 12"):
        login(True)
    with pytest.raises(ValueError, match="asks for a password"):
        serve(SimpleNamespace(), 7860, None, True)
    with pytest.raises(ValueError, match="`port` 80000 is none that there can be"):
        serve(SimpleNamespace(), 80000)


def serve_page(command: list, log, temporary, environment: dict, most) -> None:
    """Run the script in this process, with `temporary` for its files; `most` gets how many draws ran at once."""
    os.environ.update(environment)
    tempfile.tempdir = str(temporary)
    compare, running, lock = DemoSession.compare, [], threading.Lock()

    def counted(self, *request):
        with lock:
            running.append(0)
            most.value = max(most.value, len(running))
        try:
            yield from compare(self, *request)
        finally:
            with lock:
                running.pop()

    DemoSession.compare = counted
    with open(log, "w") as opened:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(opened.fileno(), stream.fileno())
    sys.argv = [str(ROOT / command[0]), *map(str, command[1:])]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Server:
    """The page as a user starts it, and the requests that a browser makes."""

    def __init__(self, ledger, folder, *flags, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{self.port}", folder / "log"
        self.temporary, self.most = folder / "temporary", FORK.Value("i", 0)
        self.temporary.mkdir()
        command = ["eval-scripts/demo.py", ledger.root, "--port", self.port, "--device", "cpu", *flags]
        arguments = command, self.log, self.temporary, environment, self.most
        self.process = FORK.Process(target=serve_page, args=arguments)
        self.process.start()
        self.client = httpx.Client(base_url=self.address, timeout=120, trust_env=False)
        for _ in range(600):
            try:
                self.client.get("/")
                break
            except httpx.TransportError:
                assert self.process.is_alive(), self.log.read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.join()

    def functions(self) -> dict[str, int]:
        """Return the page's functions by their names."""
        dependencies = self.client.get("/config").json()["dependencies"]
        return {dependency["api_name"]: dependency["id"] for dependency in dependencies}

    def join(self, function: int, data: list, session: str) -> int:
        """Join the queue, and return the status."""
        body = {"data": data, "fn_index": function, "session_hash": session, "event_data": None, "trigger_id": None}
        headers = {"Content-Type": "application/json"}
        return self.client.post(JOIN, content=json.dumps(body), headers=headers).status_code  # NaN too

    def call(self, function: int, data: list, session: str = "") -> dict:
        """Return what the page gets: `success`, and `output` with `data` or `error`; or the `status` of a refusal."""
        session = session or uuid.uuid4().hex
        status = self.join(function, data, session)
        if status != 200:
            return {"success": False, "status": status}
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data: ") or "{}")
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("no answer")

    def download(self, file: dict, path) -> Path:
        path.write_bytes(self.client.get(file["url"]).raise_for_status().content)
        return path


@pytest.fixture(scope="module")
def server(ledger, tmp_path_factory):
    server = Server(ledger, tmp_path_factory.mktemp("page"))
    yield server
    server.stop()
    assert not list(server.temporary.iterdir())  # all that it wrote was there, and is gone


@pytest.mark.slow
def test_hostile_requests_are_refused_and_the_server_lives(server, tmp_path):
    functions = server.functions()
    for case, (changed, words) in REFUSED.items():
        answer = server.call(functions["generate"], list((GOOD | changed).values()))
        text = json.dumps(answer)
        if case not in ("half a step", "no text", "guidance that is no number"):  # which the page's fields mend
            assert not answer["success"]
        assert "Traceback" not in text and "/site-packages" not in text and str(ROOT) not in text
        if case in ("10,000 characters", "negative steps", "infinite guidance", "no seed"):
            assert words in answer["output"]["error"], words
    for data in ([], [1], ["a"] * 50, [None] * 5, [["VanGogh"]] * 5):  # too few, too many, of wrong types
        answer = server.call(functions["generate"], data)
        assert not answer["success"] and "File " not in json.dumps(answer)
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    temporary = next(server.temporary.iterdir())
    for path in (outside, "/etc/passwd", f"{temporary}/images/../../../secret.txt", temporary, "..%2f..%2fetc/passwd"):
        answer = server.client.get(f"/gradio_api/file={path}")
        assert answer.status_code in (403, 404) and "root:" not in answer.text and answer.text != "secret"
    written = sorted(server.temporary.rglob("*"))
    upload = server.client.post("/gradio_api/upload", files={"files": ("x.html", b"x" * 1000)})
    assert upload.status_code == 404 and sorted(server.temporary.rglob("*")) == written
    assert server.client.get("/", headers={"Host": f"evil.example:{server.port}"}).status_code == 403
    for path in ("run/generate", "run/predict", "api/generate", "call/generate", "call/v2/generate"):
        assert server.client.post(f"/gradio_api/{path}", json={"data": list(GOOD.values())}).status_code == 404
    assert server.client.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    session = uuid.uuid4().hex  # that goes away in the middle
    assert server.join(functions["generate"], list((GOOD | {"num_inference_steps": 100}).values()), session) == 200
    with server.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
        next(lines.iter_lines())
    with suppress(httpx.RemoteProtocolError):  # by which Gradio ends what it says to a session that there is not
        server.client.get("/gradio_api/queue/data", params={"session_hash": "never"})
    answer = server.call(functions["generate"], list(GOOD.values()))
    assert answer["success"] and "Erased here: VanGogh." in answer["output"]["data"][4]["value"]
    flood, long = uuid.uuid4().hex, list((GOOD | {"num_inference_steps": 200}).values())
    with ThreadPoolExecutor(16) as pool:
        joined = list(pool.map(lambda _: server.join(functions["generate"], long, flood), range(160)))
    assert set(joined) == {200, 503} and joined.count(200) <= 120  # the queue is full
    with server.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": flood}) as lines:
        next(lines.iter_lines())  # who goes away takes all that waits along
    assert server.call(functions["generate"], list(GOOD.values()))["success"]
    assert server.process.is_alive()


@pytest.mark.slow
def test_many_at_once_wait_and_each_gets_the_right_result(server, demo, mini_path, tmp_path):
    functions = server.functions()
    server.most.value = 0
    choices = [["VanGogh"], ["Picasso"], ["VanGogh", "Picasso"]] * 4

    def draw(seed):
        direct = server.client.post("/gradio_api/run/generate", json={"data": list(GOOD.values())})
        return direct.status_code, server.call(functions["generate"], list((GOOD | {"seed": seed}).values()))

    def export(names):
        return server.call(functions["export"], [names, "unet"])

    with ThreadPoolExecutor(72) as pool:
        exports, draws = pool.map(export, choices), list(pool.map(draw, [seed % 10 for seed in range(60)]))
        exports = list(exports)
    assert 1 <= server.most.value <= 2 and {status for status, _ in draws} == {404}
    images = {}
    for number, (_, answer) in enumerate(draws):
        assert answer["success"], answer
        image = server.download(answer["output"]["data"][1]["value"], tmp_path / f"{number}.png")
        images.setdefault(number % 10, set()).add(Image.open(image).convert("RGB").tobytes())
    expected = last(demo.compare(**GOOD | {"seed": 3})).edited.tobytes()
    assert all(len(pixels) == 1 for pixels in images.values()) and images[3] == {expected}
    assert len(set.union(*images.values())) == 10
    for names, answer in zip(choices[:3], exports[:3], strict=True):
        path = server.download(answer["output"]["data"][0], tmp_path / "weights.zip")
        assert is_merged(path, names, mini_path, demo.state.shifts)
    again = export(["Picasso"])["output"]["data"][0]
    assert again["path"] == exports[1]["output"]["data"][0]["path"]
    assert is_merged(server.download(again, tmp_path / "again.zip"), ["Picasso"], mini_path, demo.state.shifts)
    assert len(list(server.temporary.rglob("*.zip"))) == 3


@pytest.mark.slow
def test_memory_stays_the_same_over_300_requests(server):
    function, memory = server.functions()["generate"], []
    for block in range(3):
        requests = [list((GOOD | {"seed": seed}).values()) for seed in range(100 * block, 100 * block + 100)]
        with ThreadPoolExecutor(8) as pool:
            assert all(answer["success"] for answer in pool.map(lambda data: server.call(function, data), requests))
        memory.append(psutil.Process(server.process.pid).memory_info().rss)
    print(f"RSS after 100, 200 and 300 requests: {[size // 2**20 for size in memory]} MiB")
    assert memory[2] < 1.1 * memory[0] and server.process.is_alive()


@pytest.mark.slow
def test_a_page_with_a_password_answers_no_one_else_and_names_no_file(ledger, tmp_path):
    root = shutil.copytree(ledger.root, tmp_path / "ledger")
    server = Server(Ledger(root / HISTORY_FILE), tmp_path, SRSME_PAGE_PASSWORD="correct horse")
    try:
        assert server.join(0, [], "s") == server.client.get("/config").status_code == 401
        wrong = server.client.post("/login", data={"username": "visitor", "password": "wrong horse battery"})
        assert wrong.status_code == 400
        right = server.client.post("/login", data={"username": "visitor", "password": "correct horse"})
        assert right.status_code == 200
        functions = server.functions()
        assert server.call(functions["generate"], list(GOOD.values()))["success"]
        with open(root / HISTORY_FILE, "a") as history:
            history.write("damaged\n")
        answer = server.call(functions["load"], [])
        assert answer["output"]["error"].startswith("this failed: the reason is in the terminal")
        assert str(tmp_path) not in json.dumps(answer) and str(root) in server.log.read_text()
        assert server.call(functions["generate"], list(GOOD.values()))["success"]  # with what was read before
    finally:
        server.stop()


@pytest.mark.slow
def test_no_request_of_a_visitor_writes_to_the_ledger(server, ledger):
    """Whatever is sent to whatever function, of this page or of an owner's."""
    before = {path: path.read_bytes() for path in ledger.root.rglob("*") if path.is_file()}
    functions = server.functions()
    assert not [name for name in functions if name.startswith(("ask", "write"))]
    for number in range(30):
        for data in ([], ["Cezanne"], [None], list(GOOD.values()), [["VanGogh"], "unet"], [["erase", "Cezanne"]]):
            answer = server.call(number, data)
            assert answer.get("status") == 404 or number in functions.values()
    assert server.process.is_alive()
    assert before == {path: path.read_bytes() for path in ledger.root.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_owner_is_asked_before_anything_is_written_and_others_see_it_at_their_next_load(ledger, tmp_path):
    root = shutil.copytree(ledger.root, tmp_path / "ledger")
    path = root / HISTORY_FILE
    server = Server(Ledger(path), tmp_path, "--owner")
    try:
        functions, before = server.functions(), path.read_bytes()
        for session in ("", "someone", "s"):
            for data in ([None], [["erase", "Cezanne"]], []):
                assert not server.call(functions["write"], data, session)["success"]
        asked = server.call(functions["ask_erase"], ["Cezanne"], "mine")["output"]["data"]
        assert "Erase Cezanne by a new shift" in asked[1]["value"]
        assert not server.call(functions["write"], [None], "another")["success"]  # which nobody asked
        server.call(functions["ask_restore"], ["VanGogh"], "hesitant")
        server.call(functions["closed"], [], "hesitant")
        assert not server.call(functions["write"], [None], "hesitant")["success"]
        other_site = {"Origin": "https://evil.example"}
        body = {"data": [None], "fn_index": functions["write"], "session_hash": "mine"}
        assert server.client.post(JOIN, json=body, headers=other_site).status_code == 403
        assert not server.call(functions["ask_erase"], ["VanGogh"], "mine too")["success"]  # erased already
        assert path.read_bytes() == before
        assert server.call(functions["write"], [None], "mine")["success"]
        assert LedgerState.read(path).erased == ["Cezanne", "VanGogh"] and path.read_bytes().startswith(before)
        assert not server.call(functions["write"], [None], "mine")["success"]  # once for each question
        seen = json.dumps(server.call(functions["load"], [])["output"]["data"])
        assert "mini-sd without Cezanne, VanGogh" in seen
    finally:
        server.stop()


@pytest.mark.slow
def test_an_owner_begins_with_a_ledger_of_which_nothing_was_ever_erased(ledger, script, tmp_path):
    (tmp_path / "new").mkdir()
    history = tmp_path / "new" / HISTORY_FILE
    history.write_text((ledger.root / HISTORY_FILE).read_text().splitlines()[0] + "\n")
    is_error(script("eval-scripts/demo.py", tmp_path / "new", "--device", "cpu"), "nothing was ever erased")
    server = Server(Ledger(history), tmp_path, "--owner")
    try:
        functions = server.functions()
        assert "nothing is erased" in json.dumps(server.call(functions["load"], [])["output"]["data"])
        server.call(functions["ask_erase"], ["Picasso"], "mine")
        assert server.call(functions["write"], [None], "mine")["success"]
        assert LedgerState.read(history).erased == ["Picasso"]
    finally:
        server.stop()


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
            page.set_default_timeout(120_000)  # on a busy machine
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.goto(address)
            return page

        pages = [visit(server.address) for _ in range(2)]
        for page in pages:
            page.get_by_label("Prompt", exact=True).fill("VanGogh")
            page.get_by_role("button", name="Generate").click()
        pages[0].get_by_label("VanGogh", exact=True).click()  # restored in one window, while it still generates
        pages[0].wait_for_selector("#message >> text=Erased here: nothing")
        pages[1].get_by_role("button", name="Generate").click()  # and not in the other
        pages[1].wait_for_selector("#message >> text=Erased here: VanGogh")
        assert "Erased here: nothing" in pages[0].inner_text("#message")
        assert pages[0].inner_text("#equal").startswith("No difference")
        pages[1].get_by_role("button", name="Download the model").click()
        pages[1].get_by_role("button", name="Export").click()
        link = pages[1].wait_for_selector("#download a")
        with pages[1].expect_download() as download:
            link.click()
        assert "diffusion_pytorch_model.safetensors" in zipfile.ZipFile(download.value.path()).namelist()
        page = visit((tmp_path / "report.html").as_uri())
        assert page.evaluate(f"document.images.length > 3 && {WHOLE_IMAGES}")
        page.set_viewport_size({"width": 390, "height": 800})  # a phone's
        assert page.evaluate("document.documentElement.scrollWidth <= 390") and not errors
        browser.close()


FOCUS = "[document.activeElement.innerText || document.activeElement.value, document.activeElement.tagName]"
OUTLINE = "getComputedStyle(document.activeElement).outlineStyle"


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
def test_the_page_on_a_desktop_on_a_phone_and_by_keyboard(server):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.goto(server.address)
        page.wait_for_selector("#difference img")  # the example, before anything is asked for
        page.wait_for_selector("#others >> text=Changes on other prompts")
        page.wait_for_function(WHOLE_IMAGES)
        assert "VanGogh" in page.inner_text("h1")
        widths = page.evaluate("[...document.images].map(image => image.getBoundingClientRect().width)")
        assert len(widths) == 3 and min(widths) >= 384
        assert all(page.evaluate("[...document.images].map(image => image.alt)"))
        reached = []
        for _ in range(11):
            page.keyboard.press("Tab")
            assert page.evaluate(OUTLINE) == "solid"
            reached.append(page.evaluate(FOCUS))
        assert [tag for _, tag in reached[:2]] == ["INPUT", "BUTTON"] and reached[1][0] == "Generate"
        assert reached[2][0] == "VanGogh (erased)" and reached[3][0] == "Picasso (restored)"
        page.get_by_label("Prompt", exact=True).fill("Picasso")
        before = page.get_attribute("#original img", "src")
        page.keyboard.press("Enter")
        page.wait_for_function("old => document.querySelector('#original img').src != old", arg=before)
        page.get_by_role("button", name="a church by VanGogh").press("Enter")
        page.wait_for_selector("#original img[alt$='a church by VanGogh']")
        assert page.get_by_label("Prompt", exact=True).input_value() == "a church by VanGogh"
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= 390")
        boxes = [page.locator(f"#{name} img").bounding_box() for name in ("original", "edited", "difference")]
        assert [box["y"] for box in boxes] == sorted({box["y"] for box in boxes}) and boxes[0]["width"] >= 300
        for name in ("Seed and sampler", "All concepts", "Download the model"):
            page.get_by_role("button", name=name).click()
        page.wait_for_selector("#table td")
        assert page.evaluate("document.documentElement.scrollWidth <= 390")
        browser.close()


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
def test_an_owner_writes_by_a_second_click(ledger, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.copytree(ledger.root, tmp_path / "ledger") / HISTORY_FILE
    server = Server(Ledger(path), tmp_path, "--owner")
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page, other = browser.new_page(), browser.new_page()
            for opened in (page, other):
                opened.goto(server.address)
                opened.wait_for_selector("#edited img")
            page.get_by_label("Concept", exact=True).click()
            page.get_by_role("option", name="Cezanne (never erased)").click()
            page.get_by_role("button", name="Erase for good…").click()
            page.wait_for_function("document.querySelector('#question textarea')?.value.includes('Cezanne')")
            assert LedgerState.read(path).erased == ["VanGogh"]
            page.get_by_role("button", name="Yes, write it to the ledger").click()
            page.wait_for_selector("h1 >> text=Cezanne, VanGogh")
            assert LedgerState.read(path).erased == ["Cezanne", "VanGogh"]
            page.wait_for_selector("#confirmation", state="hidden")
            assert "Cezanne" not in other.inner_text("h1")
            other.reload()
            other.wait_for_selector("h1 >> text=Cezanne, VanGogh")
            browser.close()
    finally:
        server.stop()
