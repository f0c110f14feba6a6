"""The live page itself: its widgets, what their functions do, and its server."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import LRUCache
from starlette.middleware import Middleware

from ldm.config.methods import FORMATS
from ldm.ledger.demo import EXAMPLE_SEED, MAX_PROMPT_CHARS, Comparison, DemoSession
from ldm.ledger.demo_state import RequestError
from ldm.ledger.demo_words import EQUAL, page_title
from ldm.ledger.owner import Owner
from ldm.ledger.page_guard import PageGuard
from ldm.ledger.page_style import STYLE
from ldm.ledger.page_values import Values, comparison_values, ledger_values, others_values

MAX_QUEUE = 100  # requests that may wait; further ones are told so
MAX_SESSIONS = 500  # visitors' windows whose choices are remembered
PROGRESS_STEP = 0.05  # of an image, between two messages about it
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
IMAGES: dict[str, Any] = {"concurrency_id": "images", "concurrency_limit": 2, **PRIVATE}  # two at a time


@contextmanager
def told_to_visitors() -> Iterator[None]:
    """Turn an error into one that the visitor may read; the reason of any other is in the terminal alone."""
    try:
        yield
    except RequestError as error:
        raise gr.Error(str(error), print_exception=error.__cause__ is not None) from error
    except Exception as error:
        raise gr.Error("this failed: the reason is in the terminal of whoever serves this page") from error


def build(demo: DemoSession, folder: Path, owner: Owner | None = None) -> gr.Blocks:
    """Return the page of a `DemoSession`; `folder` is where exports are kept.

    Only with an `owner` has it functions that write to the ledger.
    """
    gr.set_static_paths(folder)  # which are served from where they are, not copied
    with gr.Blocks(title=page_title(demo.state), analytics_enabled=False, delete_cache=(600, 600)) as page:
        widgets = _add_widgets(demo, ledger_values(demo))
        settings = _add_settings(demo)
        with gr.Accordion("All concepts of the ledger", open=False):
            widgets["table"].render()
        _add_export(demo, folder, widgets["names"])
        if owner:
            _add_owner(owner, widgets)
        _add_functions(page, demo, widgets, settings)
    page.queue(max_size=MAX_QUEUE, api_open=False)
    page._queue.pending_messages_per_session = _Messages(page._queue.pending_event_ids_session)
    return page


def _add_widgets(demo: DemoSession, values: Values) -> dict[str, Any]:
    """Add what shows the ledger and a comparison, with their first values; return the widgets by name."""
    widgets: dict[str, Any] = {"overview": gr.HTML(**values["overview"], elem_id="overview")}
    with gr.Row(elem_id="request"):
        box = {"label": "Prompt", "max_length": MAX_PROMPT_CHARS, "max_lines": 1}
        widgets["prompt"] = gr.Textbox(**values["prompt"], **box, scale=4, elem_id="prompt")
        widgets["generate"] = gr.Button("Generate", variant="primary", min_width=120)
    options = {"components": [widgets["prompt"]], "label": "Prompts to try", "elem_id": "examples"}
    widgets["examples"] = gr.Dataset(**values["examples"], **options, layout="gallery")
    if demo.has_switches:
        label = "Other here than in the ledger: search for what is erased to restore it, or the other way round"
        widgets["names"] = gr.Dropdown(**values["names"], label=label, multiselect=True, elem_id="names")
    else:
        label = "Erased here: your own choice, of all that was ever erased"
        widgets["names"] = gr.CheckboxGroup(**values["names"], label=label, elem_id="names")
    with gr.Row(elem_id="images"):
        for name in ("original", "edited", "difference"):
            options = {"elem_id": name, "format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
            widgets[name] = gr.Image(**values[name], **options)
        widgets["equal"] = gr.HTML(EQUAL, **values["equal"], elem_id="equal")
    for name in ("message", "others"):
        widgets[name] = gr.HTML(**values[name], elem_id=name)
    widgets["table"] = gr.HTML(**values["table"], elem_id="table", render=False)
    return widgets


def _add_settings(demo: DemoSession) -> list[gr.Number]:
    """Add the settings of the sampler, and return them."""
    with gr.Accordion("Seed and sampler", open=False), gr.Row():
        seed = gr.Number(EXAMPLE_SEED, label="Seed", precision=0)
        steps = gr.Number(demo.sampling.num_inference_steps, label="Inference steps", precision=0)
        guidance = gr.Number(demo.sampling.guidance_scale, label="Guidance scale")
    return [seed, steps, guidance]


def _add_export(demo: DemoSession, folder: Path, names: Any) -> None:
    """Add what writes the weights of a visitor's choice."""

    def export(names, file_format):
        with told_to_visitors():
            return str(demo.export_zip(demo.chosen(names), file_format, folder))

    with gr.Accordion("Download the model as it is edited here", open=False), gr.Row():
        file_format = gr.Dropdown(list(FORMATS), value="unet", label="Format")
        button = gr.Button("Export")
        download = gr.File(label="The edited weights", height=90, elem_id="download")
    button.click(export, [names, file_format], download, concurrency_limit=1, **PRIVATE)


def _changes(widgets: dict[str, Any], values: Values) -> dict[Any, Any]:
    """Return what a function of the page answers, to change widgets."""
    return {widgets[name]: gr.update(**changes) for name, changes in values.items()}


def _add_functions(page: gr.Blocks, demo: DemoSession, widgets: dict[str, Any], settings: list[gr.Number]) -> None:
    """Let the page read the ledger whenever it is opened, and generate whenever something else is asked for."""

    def load():
        with told_to_visitors():
            demo.reload()
            return _changes(widgets, ledger_values(demo))

    def generate(prompt, seed, num_inference_steps, guidance_scale, names, progress=gr.Progress()):
        shown = 0.0
        with told_to_visitors():
            names = demo.chosen(names)
            for result in demo.compare(prompt, seed, num_inference_steps, guidance_scale, names):
                if isinstance(result, Comparison):
                    return _changes(widgets, comparison_values(result, prompt, names))
                if result - shown >= PROGRESS_STEP:
                    shown = result
                    progress(result, "generating")

    def measure(names):
        with told_to_visitors():
            return _changes(widgets, others_values(demo, demo.chosen(names)))

    def choose(example):
        return example[0]

    everything = [widgets[name] for name in ("overview", "prompt", "examples", "names", "table")]
    shown = [widgets[name] for name in ("original", "edited", "difference", "equal", "message", "others")]
    page.load(load, None, [*everything, *shown], show_progress="hidden", **PRIVATE)
    inputs = [widgets["prompt"], *settings, widgets["names"]]
    # What is asked for while images are generated is generated next: by default Gradio would drop it, silently.
    on_images: dict[str, Any] = {"show_progress_on": shown[:3], "trigger_mode": "always_last", **IMAGES}
    triggers = [widgets["generate"].click, widgets["prompt"].submit, widgets["names"].input]
    examples = widgets["examples"]
    chosen = examples.click(choose, examples, widgets["prompt"], show_progress="hidden", **PRIVATE)
    asked = gr.on(triggers, generate, inputs, shown, **on_images)
    on_others: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", **IMAGES}
    for generated in (asked, chosen.success(generate, inputs, shown, **on_images)):
        generated.success(measure, widgets["names"], widgets["others"], **on_others)


def _add_owner(owner: Owner, widgets: dict[str, Any]) -> None:
    """Add what writes to the ledger: two buttons, each followed by a question that says what will be written."""

    def ask(action):
        def asked(name):
            with told_to_visitors():
                text = owner.foretell(action, name)
            return (action, name), gr.update(value=text), gr.update(visible=True)

        return asked

    def write(asked):
        with told_to_visitors():
            if not asked:
                raise RequestError("nothing waits for a yes: choose a concept, and what to do")
            owner.write(*asked)
            values = ledger_values(owner.demo)
        return {**_changes(widgets, values), **closed(), choice: gr.update(choices=owner_choices())}

    def closed():
        return {waiting: None, confirmation: gr.update(visible=False)}

    def owner_choices():
        choices = []
        for word, names in owner.demo.state.names_by_state.items():
            choices += [(f"{name} ({word.lower()})", name) for name in names]
        return choices

    waiting = (
        gr.State()
    )  # what was asked for: kept by the server, so that no request writes what nobody was asked about
    with gr.Accordion("For the owner: write to the ledger", elem_id="owner"):
        with gr.Row():
            choice = gr.Dropdown(owner_choices(), label="Concept", elem_id="owned")
            erase, restore = gr.Button("Erase for good…"), gr.Button("Restore…")
        with gr.Group(visible=False, elem_id="confirmation") as confirmation:
            question = gr.Textbox(label="This will be written", interactive=False, elem_id="question")
            with gr.Row():
                yes, no = gr.Button("Yes, write it to the ledger", variant="stop"), gr.Button("No, write nothing")
    alone: dict[str, Any] = {"concurrency_id": "owner", "concurrency_limit": 1, **PRIVATE}
    for action, button in (("erase", erase), ("restore", restore)):
        outputs = [waiting, question, confirmation]
        button.click(ask(action), choice, outputs, api_name=f"ask_{action}", **alone)
    shown = [widget for name, widget in widgets.items() if name != "generate"]
    yes.click(write, waiting, [*shown, choice, waiting, confirmation], **alone)
    no.click(closed, None, [waiting, confirmation], **alone)


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
    demo: DemoSession,
    port: int,
    auth: tuple[str, str] | None = None,
    share: bool = False,
    owner: Owner | None = None,
    started: Callable[[str], object] = print,
) -> None:
    """Serve the page on this machine at `port`, and at an address of Gradio's with `share`, until it is stopped.

    `started` is called with its address when it is there. `auth` are the user and password that it asks for, without
    which nothing is shared. All that is written is in a temporary folder, but for what an `owner` writes to the ledger.
    Raises ValueError for a port that it cannot have.
    """
    if share and auth is None:
        raise ValueError("what is shared asks for a password: give a user and a password")
    if port >= 2**16:
        raise ValueError(f"`port` {port} is none that there can be: choose one below {2**16}, such as 7860")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "images")  # where Gradio writes what it shows
        os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # past requests, which it looks through after every one
        page = build(demo, Path(folder) / "exports", owner)
        try:
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
                prevent_thread_lock=True,
                ssr_mode=False,  # here and below: what environment variables could add, past the guard
                mcp_server=False,
                pwa=False,
                run_history=False,
                enable_monitoring=False,
                num_workers=0,
            )
        except OSError as error:
            raise ValueError(
                f"the page cannot be served at `port` {port}, which may be taken: choose another"
            ) from error
        started(page.share_url or f"http://127.0.0.1:{port}")
        page.block_thread()
