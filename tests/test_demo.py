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

import httpx
import psutil
import pytest
import torch
from accelerate import init_empty_weights
from conftest import CPU, FORK, ROOT
from gradio.server_messages import EstimationMessage
from PIL import Image, ImageChops
from safetensors.torch import load_file
from starlette.testclient import TestClient

from ldm.config.concepts import get_concept
from ldm.config.methods import SamplingConfig
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.diffusion.sampling import generate
from ldm.erasure.merge import applied, merge
from ldm.io.prompts import PromptCase
from ldm.ledger.demo import MAX_EXPORTS, DemoSession, RequestError
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header
from ldm.ledger.operations import create_shifts, weights_hash
from ldm.ledger.page import MAX_BODY_BYTES, MAX_SESSIONS, PageGuard, build

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
    ledger.append({}, ["2"])
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
    with applied(demo.model.unet, [demo.state.shifts["VanGogh"]]):
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
    merged = merge(load_model(mini_path, CPU).unet, [shifts[name] for name in names])
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
    config = load_model_config("mini-sd")
    method = config.methods["SRS-ME"].with_changes(ridge_weight=0.5, seed=0)
    own.append({}, ["1"])
    styles = [get_concept("style", 1)]
    own.append(create_shifts(own, load_model(mini_path, CPU), styles, method, config.null_space, tmp_path / "none"))
    old = demo.state.shifts
    demo.reload()
    after = demo.export_zip(["VanGogh"], "unet", tmp_path / "exports")
    assert after != before and is_merged(after, ["VanGogh"], mini_path, demo.state.shifts)
    assert is_merged(before, ["VanGogh"], mini_path, old) and not is_merged(after, ["VanGogh"], mini_path, old)


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


def test_windows_that_were_forgotten_end_no_queue_and_take_no_memory(demo, tmp_path):
    """Their waiting requests get messages still: without a place for these Gradio's queue would end for all."""
    queue = build(demo, SamplingConfig(), tmp_path)._queue
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
    monkeypatch.setenv("SRSME_PAGE_PASSWORD", "short")
    with pytest.raises(ValueError, match="SRSME_PAGE_PASSWORD has 5 characters: give at least 12"):
        login(True)


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

    def __init__(self, ledger, folder, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{self.port}", folder / "log"
        self.temporary, self.most = folder / "temporary", FORK.Value("i", 0)
        self.temporary.mkdir()
        command = ["eval-scripts/demo.py", ledger.root, "--port", self.port, "--device", "cpu"]
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
        """Return the page's functions by what they are, which the number of their inputs says."""
        names = {0: "load", 5: "generate", 2: "export"}
        dependencies = self.client.get("/config").json()["dependencies"]
        return {names[len(dependency["inputs"])]: dependency["id"] for dependency in dependencies}

    def join(self, function: int, data: list, session: str) -> int:
        """Join the queue, and return the status."""
        body = {"data": data, "fn_index": function, "session_hash": session, "event_data": None, "trigger_id": None}
        headers = {"Content-Type": "application/json"}
        return self.client.post(JOIN, content=json.dumps(body), headers=headers).status_code  # NaN too

    def call(self, function: int, data: list) -> dict:
        """Return what the page gets: `success`, and `output` with `data` or `error`; or the `status` of a refusal."""
        session = uuid.uuid4().hex
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
    assert answer["success"] and "Erased: VanGogh." in answer["output"]["data"][3]
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
    digests = {}
    for seed, (_, answer) in enumerate(draws):
        assert answer["success"], answer
        digests.setdefault(seed % 10, set()).add(answer["output"]["data"][1]["path"])  # named by its content
    assert all(len(paths) == 1 for paths in digests.values()) and len(digests) == 10
    image = server.download(draws[3][1]["output"]["data"][1], tmp_path / "edited.png")
    expected = last(demo.compare(**GOOD | {"seed": 3})).edited
    assert not ImageChops.difference(Image.open(image).convert("RGB"), expected).getbbox()
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

        pages = [visit(server.address) for _ in range(2)]
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
