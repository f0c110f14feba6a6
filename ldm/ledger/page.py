"""The live page itself: its widgets, and what requests its server answers at all."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import numpy as np
from gradio.utils import LRUCache
from pydantic import BaseModel, Field, ValidationError
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm.config.methods import FORMATS, SamplingConfig
from ldm.ledger.demo import MAX_PROMPT_CHARS, Comparison, DemoSession, RequestError
from ldm.metrics.tables import format_cell

MAX_QUEUE = 100  # requests that may wait; further ones are told so
MAX_SESSIONS = 500  # visitors' windows whose checkboxes are remembered
PROGRESS_STEP = 0.05  # of an image, between two messages about it
STYLE = "#original img, #edited img, #difference img { width: 100%; object-fit: contain; image-rendering: pixelated; }"
MAX_BODY_BYTES = 64 * 1024  # of a request: a prompt of four bytes a character, and the names of many concepts
MAX_SESSION_CHARS = 64  # of the name that a browser gives its window, which the server keeps
# What a browser that shows the page asks for. Gradio's server has more: uploads, direct calls past the queue, proxies.
_READ = re.compile(
    r"((config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|logout)/?|(assets|static|svelte)/.*"
    r"|gradio_api/(info|app_id|user|login_check|startup-events|theme\.css|queue/data)/?"
    r"|gradio_api/heartbeat/\w{1,64}|gradio_api/file=(?!https?:).*)?",
    re.IGNORECASE,
)
_JOIN = "gradio_api/queue/join"
_WRITE = (_JOIN, "login")


@contextmanager
def told_to_visitors() -> Iterator[None]:
    """Turn an error into one that the visitor may read; the reason of any other is in the terminal alone."""
    try:
        yield
    except RequestError as error:
        raise gr.Error(str(error), print_exception=error.__cause__ is not None) from error
    except Exception as error:
        raise gr.Error("this failed: the reason is in the terminal of whoever serves this page") from error


def describe(comparison: Comparison, names: Sequence[str]) -> str:
    """Return a sentence about what erasing the concepts `names` changes."""
    max_difference = np.asarray(comparison.difference).max()
    return (
        f"Erased: {', '.join(names) or 'nothing'}. Largest pixel difference {max_difference} of 255; leakage (the "
        f"relative change of this prompt's keys and values) {comparison.leakage:.1e}."
    )


def build(demo: DemoSession, sampling: SamplingConfig, folder: Path) -> gr.Blocks:
    """Return the page of a `DemoSession`; `folder` is where exports are kept."""

    def generate(prompt, seed, num_inference_steps, guidance_scale, names, progress=gr.Progress()):
        shown = 0.0
        with told_to_visitors():
            for result in demo.compare(prompt, seed, num_inference_steps, guidance_scale, names):
                if isinstance(result, Comparison):
                    return result.original, result.edited, result.difference, describe(result, names)
                if result - shown >= PROGRESS_STEP:
                    shown = result
                    progress(result, "generating")

    def export(names, file_format):
        with told_to_visitors():
            return str(demo.export_zip(names, file_format, folder))

    def load():
        with told_to_visitors():
            state = demo.reload()
        return gr.CheckboxGroup(list(state.shifts), value=state.erased), state.table.map(format_cell)

    gr.set_static_paths(folder)  # which are served from where they are, not copied
    shifts, erased = demo.state.shifts, demo.state.erased
    title = f"{demo.model.name}: concepts erased"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as page:
        with gr.Row():
            prompt = gr.Textbox(next(iter(shifts)), label="prompt", max_length=MAX_PROMPT_CHARS, scale=3)
            seed = gr.Number(0, label="seed", precision=0)
            steps = gr.Number(sampling.num_inference_steps, label="inference steps", precision=0)
            guidance = gr.Number(sampling.guidance_scale, label="guidance scale")
        names = gr.CheckboxGroup(list(shifts), value=erased, label="erased")
        button = gr.Button("generate", variant="primary")
        images = []
        with gr.Row():
            for name in ("original", "edited", "difference"):
                options = {"label": name, "alt_text": name, "elem_id": name, "format": "png", "height": 300}
                images.append(gr.Image(**options, interactive=False, buttons=["download"]))
        message = gr.Markdown(elem_id="message")
        status = gr.Dataframe(label="the ledger", interactive=False)
        with gr.Row():
            file_format = gr.Dropdown(list(FORMATS), value="unet", label="format")
            export_button = gr.Button("export")
            download = gr.File(label="the edited weights", height=90, elem_id="download")
        page.load(load, None, [names, status], api_visibility="private")
        inputs = [prompt, seed, steps, guidance, names]
        triggers = [button.click, prompt.submit, names.input]
        gr.on(triggers, generate, inputs, [*images, message], concurrency_limit=2, api_visibility="private")
        export_button.click(export, [names, file_format], download, concurrency_limit=1, api_visibility="private")
    page.queue(max_size=MAX_QUEUE, api_open=False)
    page._queue.pending_messages_per_session = _Messages(page._queue.pending_event_ids_session)
    return page


class _Messages(LRUCache):
    """What is still to be said to the last `MAX_SESSIONS` windows, in place of Gradio's own.

    Of those, a message to a window that was forgotten meanwhile ends the queue; here it goes nowhere.
    """

    def __init__(self, event_ids: dict[str, set[str]]):
        super().__init__(MAX_SESSIONS)
        self._event_ids = event_ids  # of all windows, which Gradio never forgets

    def popitem(self, last: bool = True) -> tuple[str, asyncio.Queue]:
        session, messages = super().popitem(last)
        self._event_ids.pop(session, None)
        return session, messages

    def __missing__(self, session: str) -> asyncio.Queue:
        return asyncio.Queue()


def serve(
    demo: DemoSession, sampling: SamplingConfig, port: int, auth: tuple[str, str] | None = None, share: bool = False
) -> None:
    """Serve the page on this machine at `port`, and at an address of Gradio's with `share`, until it is stopped.

    `auth` are the user and password that it asks for. All that is written is in a temporary folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "images")  # where Gradio writes what it shows
        os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # past requests, which it looks through after every one
        page = build(demo, sampling, Path(folder) / "exports")
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=share,
            auth=auth,
            app_kwargs={"middleware": [Middleware(PageGuard, page=page, port=port)]},
            state_session_capacity=MAX_SESSIONS,
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none from a network
            css=STYLE,
            footer_links=[],
            quiet=True,
            ssr_mode=False,  # here and below: what environment variables could add, past the guard
            mcp_server=False,
            pwa=False,
            run_history=False,
            enable_monitoring=False,
            num_workers=0,
        )


class _Join(BaseModel):
    """What a browser sends to join the queue. No input of the page is a mapping, which Gradio would take for a file."""

    data: list[str | int | float | bool | list[str] | None]
    fn_index: int
    session_hash: str = Field(max_length=MAX_SESSION_CHARS)
    trigger_id: int | None = None


class PageGuard:
    """Middleware that lets through what a browser asks which shows the page from its own address, and nothing else.

    Refused are other names of this machine, which another site can point here (DNS rebinding), requests that another
    site's page makes, what the page does not use, and large or malformed bodies: before anything is read or written.
    `page` is what is served, at `port`. (Starlette's TrustedHostMiddleware knows no ports, and takes its hosts before
    Gradio knows the shared address.)
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, port: int):
        self.app, self.page, self.port = app, page, port

    def hosts(self) -> set[str]:
        """Return what the header Host may be: this machine's own names with the port, and the shared address."""
        hosts = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        if self.port == 80:  # which browsers leave out
            hosts |= {host.removesuffix(":80") for host in hosts}
        shared = self.page.share_url or ""  # Gradio's tunnel leaves Host as the browser sent it
        return hosts | {shared.partition("://")[2].strip("/")} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the page has no other, and Gradio's server answers none
            await self.app(scope, receive, send)
            return
        status, text, body = 404, "not part of this page", b""
        path = scope["path"].removeprefix("/")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if host not in self.hosts():
            status, text = 403, "this page has another address"
        elif origin is not None and origin.partition("://")[2] != host:
            status, text = 403, "this page is not for other sites"
        elif scope["method"] in ("GET", "HEAD") and _READ.fullmatch(path):
            status = 200
        elif scope["method"] == "POST" and path in _WRITE:
            status, text, body = await self._read(path, headers, receive)
        if status != 200:
            await PlainTextResponse(text, status)(scope, receive, send)
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)

    async def _read(self, path: str, headers: dict[str, str], receive: Receive) -> tuple[int, str, bytes]:
        """Return 200 and a request's body, checked; or the status and text that it is refused with."""
        too_large = 413, f"more than {MAX_BODY_BYTES} bytes", b""
        if int(headers.get("content-length", 0)) > MAX_BODY_BYTES:
            return too_large
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                return too_large
        if path != _JOIN:
            return 200, "", body
        try:
            request = _Join.model_validate_json(body)
        except ValidationError:
            return 422, "not what this page sends", b""
        if request.fn_index not in self.page.fns:
            return 404, "not part of this page", b""
        return 200, "", request.model_dump_json().encode()  # only what was checked goes on
