"""A live page about a ledger, on this machine alone unless --share is given: the original's picture, that of a state of one's own, and
their difference.

Each visitor has switches of their own; they change no weights that others see, and nothing in the ledger. A button exports the state.
"""

import shutil
import tempfile
from pathlib import Path

import gradio as gr

from ldm import cli
from ldm.io.paths import REPO_ROOT
from ldm.ledger.demo import DemoSession, MAX_PROMPT_CHARS
from ldm.erasure.export import FORMATS
from ldm.metrics.tables import format_cell
from ldm.config.models import load_model_config

WAITING = 100  # requests that may wait; further ones are told so
STYLE = "#original img, #present img, #difference img { width: 100%; object-fit: contain; image-rendering: pixelated; }"


def build(desk: DemoSession, sampling, folder: str) -> gr.Blocks:
    """The page; `folder` is for the export that is under way."""
    def draw(prompt, seed, steps, guidance, names, progress=gr.Progress()):
        pictures = None
        try:
            for pictures in desk.draw(prompt, seed, steps, guidance, names):
                if isinstance(pictures, float):
                    progress(pictures, "drawing")
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        off = max(high for _, high in pictures.difference.getextrema())
        return pictures.original, pictures.present, pictures.difference, (
            f"Erased: {', '.join(names) or 'nothing'}. Largest pixel difference {off} of 255; this prompt's keys and values move by "
            f"{pictures.leak:.1e}.")

    def save(names, kind):
        try:  # one export at a time, which Gradio copies before the next
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            return str(desk.write(names, kind, kept))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def opened():
        rows = desk.reload().map(format_cell)
        return gr.CheckboxGroup(list(desk.shifts), value=desk.erased), rows

    kept = Path(folder)
    with gr.Blocks(title=f"{desk.model.name}: concepts erased", analytics_enabled=False, delete_cache=(600, 600)) as page:
        with gr.Row():
            prompt = gr.Textbox(next(iter(desk.shifts)), label="prompt", max_length=MAX_PROMPT_CHARS, scale=3)
            seed = gr.Number(0, label="seed", precision=0)
            steps = gr.Number(sampling.ddim_steps, label="steps", precision=0)
            guidance = gr.Number(sampling.guidance_scale, label="guidance")
        names = gr.CheckboxGroup(list(desk.shifts), value=desk.erased, label="erased")
        button = gr.Button("draw", variant="primary")
        with gr.Row():
            pictures = [gr.Image(label=name, alt_text=name, format="png", height=300, interactive=False, elem_id=name, buttons=["download"])
                        for name in ("original", "present", "difference")]
        said = gr.Markdown(elem_id="said")
        status = gr.Dataframe(label="the ledger", interactive=False)
        with gr.Row():
            kind = gr.Dropdown(list(FORMATS), value="unet", label="format")
            file = gr.Button("export")
            download = gr.File(label="the present state", height=90, elem_id="download")
        page.load(opened, None, [names, status])
        gr.on([button.click, prompt.submit, names.input], draw, [prompt, seed, steps, guidance, names], [*pictures, said],
              concurrency_limit=2)
        file.click(save, [names, kind], download, concurrency_limit=1)
    return page


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("ledger", type=Path, nargs="?", default=REPO_ROOT / "models" / "ledger", help="a ledger's folder, or its .jsonl file")
    cli.add_model(parser)
    parser.set_defaults(model=None)
    parser.add_argument("--port", type=cli.positive, default=7860)
    parser.add_argument("--share", action="store_true", help="let others in, by a public address of Gradio's")
    cli.add_device(parser)
    args = parser.parse_args()
    ledger, model = cli.open_ledger(args, args.ledger)
    desk = DemoSession(ledger, model, lambda: cli.load_model(args, model.device))
    if not desk.shifts:
        raise ValueError(f"nothing was ever erased in {args.ledger}: python train-scripts/ledger.py erase CONCEPT --root {args.ledger}")
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none that a network would have to bring
    with tempfile.TemporaryDirectory() as folder:
        build(desk, load_model_config(model.base).sampling, folder).queue(max_size=WAITING).launch(
            server_name="127.0.0.1", server_port=args.port, share=args.share, theme=theme, css=STYLE, footer_links=[], quiet=True,
            show_error=True)


if __name__ == "__main__":
    cli.run(main)
