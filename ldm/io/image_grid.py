"""A labelled grid of images: rows of prompts, columns of models."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def image_grid(
    rows: Sequence[tuple[str, Sequence[Sequence[Image.Image]]]],
    columns: Sequence[str],
    scale: int = 1,
    border_colors: Sequence[Sequence[str | None]] = (),
) -> Image.Image:
    """Return a labelled grid of images: each row is a label and, for every column, a few images side by side.

    A column's title may have several lines, of which the last decides how wide the column must be: those above may
    stand over its neighbours too. `border_colors` may give the color of a border for each cell.

    Raises ValueError when images differ in size.
    """
    sizes = {image.size for _, cells in rows for images in cells for image in images}
    if len(sizes) > 1:
        (first, second) = sorted(sizes)[:2]
        raise ValueError(
            f"images of {first[0]} x {first[1]} and of {second[0]} x {second[1]} pixels do not go into one grid: "
            "generate all by the same model"
        )
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    width, height = (side * scale for side in rows[0][1][0][0].size)
    gap, left = 6, 20 + max(int(small.getlength(label)) for label, _ in rows)
    top = 11 + 19 * max(title.count("\n") + 1 for title in columns)
    lengths = [max(len(cells[k]) for _, cells in rows) * width for k in range(len(columns))]
    steps = [max(length, int(font.getlength(title.split("\n")[-1]))) for length, title in zip(lengths, columns)]
    starts = [left + sum(steps[:k]) + gap * 3 * k for k in range(len(columns))]
    canvas = Image.new("RGB", (starts[-1] + steps[-1] + gap, top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for start, title in zip(starts, columns):
        for n, line in enumerate(reversed(title.split("\n"))):
            draw.text((start, top - 22 - 19 * n), line, fill="black", font=font)
    for k, (label, cells) in enumerate(rows):
        y = top + k * (height + gap)
        draw.text((8, y + height // 2), label, fill="black", font=small, anchor="lm")
        for column, (start, images) in enumerate(zip(starts, cells)):
            for n, image in enumerate(images):
                canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), (start + n * width, y))
            if border_colors and border_colors[k][column]:
                box = (start - 3, y - 3, start + len(images) * width + 2, y + height + 2)
                draw.rectangle(box, outline=border_colors[k][column], width=3)
    return canvas
