"""Serve a live page about a ledger: a prompt's image by the original, by the edited model, and how they differ.

It is seen on this machine alone unless --share is given. Each visitor chooses which concepts are erased; that changes
no weights that others see, and nothing in the ledger. A button exports the weights of that choice.
"""

import shutil
import tempfile
from pathlib import Path

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.config.methods import FORMATS, SamplingConfig
from ldm.metrics.tables import format_cell

MAX_QUEUE = 100  # requests that may wait; further ones are told so
STYLE = "#original img, #edited img, #difference img { width: 100%; object-fit: contain; image-rendering: pixelated; }"


def build(demo, sampling: SamplingConfig, folder: Path):
    """Return the page of a `DemoSession`; `folder` is for the export that is under way."""
    import gradio as gr

    from ldm.ledger.demo import MAX_PROMPT_CHARS

    def generate(prompt, seed, num_inference_steps, guidance_scale, names, progress=gr.Progress()):
        result = None
        try:
            for result in demo.compare(prompt, seed, num_inference_steps, guidance_scale, names):
                if isinstance(result, float):
                    progress(result, "generating")
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        max_difference = max(high for _, high in result.difference.getextrema())
        message = (
            f"Erased: {', '.join(names) or 'nothing'}. Largest pixel difference {max_difference} of 255; leakage (the "
            f"relative change of this prompt's keys and values) {result.leakage:.1e}."
        )
        return result.original, result.edited, result.difference, message

    def export(names, file_format):
        try:  # one export at a time, which Gradio copies before the next
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return str(demo.export_zip(names, file_format, folder))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def load():
        table = demo.reload().map(format_cell)
        return gr.CheckboxGroup(list(demo.shifts), value=demo.erased), table

    title = f"{demo.model.name}: concepts erased"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as page:
        with gr.Row():
            prompt = gr.Textbox(next(iter(demo.shifts)), label="prompt", max_length=MAX_PROMPT_CHARS, scale=3)
            seed = gr.Number(0, label="seed", precision=0)
            steps = gr.Number(sampling.num_inference_steps, label="inference steps", precision=0)
            guidance = gr.Number(sampling.guidance_scale, label="guidance scale")
        names = gr.CheckboxGroup(list(demo.shifts), value=demo.erased, label="erased")
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
        page.load(load, None, [names, status])
        inputs = [prompt, seed, steps, guidance, names]
        triggers = [button.click, prompt.submit, names.input]
        gr.on(triggers, generate, inputs, [*images, message], concurrency_limit=2)
        export_button.click(export, [names, file_format], download, concurrency_limit=1)
    return page


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_ledger(parser)
    arguments.add_model(parser, default=None)
    parser.option("port", type=arguments.positive_int, default=7860, help="of the page")
    parser.option("share", action="store_true", help="let others in, by a public address of Gradio's")
    arguments.add_device(parser)
    args = parser.parse_args()
    import gradio as gr

    from ldm.cli import session
    from ldm.config.models import load_model_config
    from ldm.ledger.demo import DemoSession

    ledger, model = session.open_ledger(args, args.ledger)
    demo = DemoSession(ledger, model, lambda: session.load_model(args, model.device))
    if not demo.shifts:
        advice = f"python train-scripts/ledger.py erase CONCEPT --ledger_dir {args.ledger}"
        raise ValueError(f"nothing was ever erased in {args.ledger}: {advice}")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # none that a network would have to bring
    with tempfile.TemporaryDirectory() as folder:
        page = build(demo, load_model_config(model.config_name).sampling, Path(folder) / "export")
        server = {"server_name": "127.0.0.1", "server_port": args.port, "share": args.share, "show_error": True}
        theme = gr.themes.Base(**fonts)
        page.queue(max_size=MAX_QUEUE).launch(**server, theme=theme, css=STYLE, footer_links=[], quiet=True)


if __name__ == "__main__":
    run(main)
