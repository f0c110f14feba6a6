"""The procedural renderer of the synthetic dataset that the bundled models are trained on, endless and seeded.

`render(subject, style, rng)` renders a subject of `ldm.toy.shapes` in one of nine caricatured styles, or plain.
Images are rendered at twice their size and reduced, so that edges are smooth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from ldm.config.concepts import erasable_concepts, watermark_prompts
from ldm.io.files import METADATA_FILE, check_metadata, find_metadata_file, write_json
from ldm.io.images import image_filename, save_image
from ldm.io.prompts import PromptCase
from ldm.toy.logos import logo
from ldm.toy.shapes import OBJECTS, SCENES, Shape, scene

SIZE = 64
_CANVAS = 2 * SIZE
_ROWS, _COLUMNS = np.mgrid[0:_CANVAS, 0:_CANVAS] / _CANVAS  # (128, 128) each, y and x in [0, 1)
_LUMA = np.array([0.3, 0.59, 0.11])
_NIGHT = np.array([13, 13, 64])  # a dark blue


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def _to_pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def _rgb255(color: np.ndarray) -> tuple[int, ...]:
    return tuple(int(255 * min(max(c, 0), 1)) for c in color)


def _flat(shapes: list[Shape], tint: Callable[[np.ndarray], np.ndarray] | None = None, outline: int = 0) -> np.ndarray:
    """Return the shapes filled, one color each, as pixels (128, 128, 3) in [0, 1]; with black outlines that wide."""
    image = Image.new("RGB", (_CANVAS, _CANVAS))
    draw = ImageDraw.Draw(image)
    for points, color in shapes:
        corners = [tuple(p) for p in points * _CANVAS]
        draw.polygon(corners, fill=_rgb255(tint(color) if tint else color))
        if outline:
            draw.line(corners + corners[:2], fill=(0, 0, 0), width=outline, joint="curve")
    return _to_pixels(image)


def _blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    return _to_pixels(_to_image(pixels).filter(ImageFilter.GaussianBlur(radius)))


def _ramp(light: np.ndarray, palette: list[tuple[float, float, float]]) -> np.ndarray:
    """Map brightness (...,) in [0, 1] through a palette of k colors, linearly: (..., 3)."""
    stops = np.linspace(0, 1, len(palette))
    table = np.asarray(palette, dtype=np.float32)
    return np.stack([np.interp(light, stops, table[:, c]) for c in range(3)], axis=-1)


def _light(pixels: np.ndarray) -> np.ndarray:
    """Return the brightness of pixels (128, 128, 3), stretched over [0, 1]: (128, 128)."""
    light = pixels @ _LUMA
    low, high = np.percentile(light, (3, 97))
    return np.clip((light - low) / max(high - low, 1e-3), 0, 1)


def plain(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Render without a style: natural colors, even daylight from above."""
    return _flat(shapes) * (rng.uniform(0.95, 1.05) + 0.08 - 0.16 * _ROWS)[..., None]


def cezanne(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Render planar patches: parallel diagonal dabs in muted ochre, sage and blue gray."""
    base = _flat(shapes)
    muted = _ramp(
        _light(base), [(0.2, 0.26, 0.25), (0.36, 0.44, 0.33), (0.6, 0.54, 0.34), (0.74, 0.66, 0.48), (0.8, 0.8, 0.72)]
    )
    base = 0.3 * base + 0.7 * muted
    image = _to_image(base)
    draw = ImageDraw.Draw(image)
    slant = rng.uniform(0.7, 0.95) * rng.choice([-1, 1])
    along, across = np.array([np.cos(slant), np.sin(slant)]), np.array([-np.sin(slant), np.cos(slant)])
    corners = np.array(
        [along * 12 + across * 6, along * 12 - across * 6, -along * 12 - across * 6, -along * 12 + across * 6]
    )
    positions = np.stack(np.meshgrid(np.arange(0, _CANVAS + 8, 14), np.arange(0, _CANVAS + 8, 14)), -1).reshape(-1, 2)
    for position in rng.permutation(positions) + rng.uniform(-3, 3, (len(positions), 2)):
        x, y = np.clip(position, 0, _CANVAS - 1).astype(int)
        draw.polygon([tuple(c) for c in position + corners], fill=_rgb255(base[y, x] + rng.normal(0, 0.04)))
    return _to_pixels(image)


def van_gogh(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Render thick strokes that swirl about a few centers, deep blue to yellow."""
    light = _light(_flat(shapes))
    colors = _ramp(
        light, [(0.05, 0.1, 0.35), (0.1, 0.25, 0.62), (0.25, 0.5, 0.8), (0.85, 0.78, 0.35), (0.98, 0.86, 0.25)]
    )
    image = _to_image(colors)
    draw = ImageDraw.Draw(image)
    centers, spin = rng.uniform(0, _CANVAS, (3, 2)), rng.choice([-1.0, 1.0], 3)
    positions = rng.uniform(-4, _CANVAS + 4, (260, 2))
    path = [positions]
    for _ in range(4):
        away = path[-1][:, None] - centers  # (260, 3, 2)
        pull = spin[:, None] / (np.square(away).sum(-1, keepdims=True) + 150)
        flow = (np.stack([-away[..., 1], away[..., 0]], -1) * pull).sum(1)
        path.append(path[-1] + 5.5 * flow / (np.linalg.norm(flow, axis=1, keepdims=True) + 1e-6))
    pixel = np.clip(positions, 0, _CANVAS - 1).astype(int)
    shade = colors[pixel[:, 1], pixel[:, 0]] + rng.normal(0, 0.07, (260, 1))
    for stroke, color in zip(np.stack(path, 1), shade, strict=True):
        draw.line([tuple(p) for p in stroke], fill=_rgb255(color), width=7, joint="curve")
    return _to_pixels(image)


def picasso(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Render cut planes, each shifted and tinted on its own, with dark lines along the cuts."""
    light = _light(_flat(shapes, outline=2))
    base = _ramp(light, [(0.12, 0.1, 0.1), (0.5, 0.32, 0.2), (0.78, 0.6, 0.42), (0.72, 0.72, 0.7), (0.92, 0.86, 0.74)])
    tints = np.array([(1.1, 0.82, 0.62), (0.72, 0.84, 1.0), (1.08, 1.0, 0.8), (0.85, 0.72, 0.62), (1.05, 0.8, 0.78)])
    pixels, lines = base, []
    for _ in range(4):
        angle = rng.uniform(0, np.pi)
        normal = np.array([np.cos(angle), np.sin(angle)])
        through = rng.uniform(0.25, 0.75, 2)
        side = (_COLUMNS - through[0]) * normal[0] + (_ROWS - through[1]) * normal[1]
        shifted = np.roll(pixels, tuple(rng.integers(-14, 15, 2)), axis=(0, 1)) * tints[rng.integers(len(tints))]
        pixels = np.where((side > 0)[..., None], shifted, pixels)
        lines.append(side)
    for side in lines:
        pixels = np.where((np.abs(side) < 0.017)[..., None], 0.06, pixels)
    return pixels


def jackson_pollock(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Render drips and splatter in black, white, rust and ochre on canvas; the subject barely shows."""
    canvas = np.array([0.82, 0.76, 0.64])
    image = _to_image(0.25 * _flat(shapes) + 0.75 * canvas)
    draw = ImageDraw.Draw(image)
    colors = [(18, 16, 16), (240, 236, 226), (150, 60, 30), (200, 160, 60), (18, 16, 16), (70, 90, 100)]
    for k in range(12):
        bend = np.cumsum(rng.normal(0, 0.45, 14))
        strides = 11 * np.stack([np.cos(bend + k), np.sin(bend + k)], 1)
        drip = rng.uniform(0, _CANVAS, 2) + np.cumsum(strides, 0)
        draw.line([tuple(p) for p in drip], fill=colors[k % 6], width=int(rng.integers(4, 8)), joint="curve")
    for k in range(36):
        (x, y), r = rng.uniform(0, _CANVAS, 2), rng.uniform(3, 7)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colors[k % 6])
    return _to_pixels(image)


def caravaggio(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Render one warm spotlight in darkness."""
    base = _blur(_flat(shapes), 1)
    warm = _ramp(_light(base), [(0.14, 0.07, 0.03), (0.55, 0.28, 0.14), (0.86, 0.58, 0.36), (1.0, 0.88, 0.68)])
    x, y = rng.uniform(0.35, 0.65), rng.uniform(0.3, 0.6)
    beam = np.exp(-(np.square((_COLUMNS - x) / 0.24) + np.square((_ROWS - y) / 0.28)))
    return (0.35 * base + 0.65 * warm) * (0.05 + 1.05 * beam)[..., None]


def keith_haring(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Render flat primary colors, thick black outlines, dashes of movement."""
    primaries = rng.permutation(
        np.array(
            [
                (0.95, 0.1, 0.12),
                (1.0, 0.88, 0.05),
                (0.05, 0.62, 0.25),
                (0.08, 0.35, 0.9),
                (1.0, 0.5, 0.05),
                (0.95, 0.3, 0.65),
            ]
        )
    )
    image = _to_image(_flat(shapes, tint=lambda c: primaries[int(c @ [7.3, 12.1, 17.7]) % 6], outline=5))
    draw = ImageDraw.Draw(image)
    for angle in np.arange(0, 2 * np.pi, np.pi / 6) + rng.uniform(0, 0.5):
        direction = np.array([np.cos(angle), np.sin(angle)])
        draw.line([tuple(64 + 50 * direction), tuple(64 + 62 * direction)], fill=(0, 0, 0), width=5)
    return _to_pixels(image)


def kelly_mckernan(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Render a soft pastel glow: rose, lilac and aqua, with flowing pale ribbons."""
    light = _light(_blur(_flat(shapes), 4))
    base = _ramp(light, [(0.5, 0.42, 0.68), (0.72, 0.56, 0.8), (0.95, 0.7, 0.78), (0.99, 0.86, 0.84)])
    aqua = np.array([0.62, 0.9, 0.88])
    mix = 0.5 + 0.5 * np.sin(rng.uniform(4, 7) * _COLUMNS + rng.uniform(4, 7) * _ROWS + rng.uniform(0, 6))
    base = base * (1 - 0.5 * mix[..., None]) + aqua * 0.5 * mix[..., None]
    for _ in range(4):
        ribbon = rng.uniform(0, 1) + 0.1 * np.sin(rng.uniform(4, 9) * _ROWS + rng.uniform(0, 6)) - _COLUMNS
        base += 0.22 * np.exp(-np.square(ribbon / 0.025))[..., None]
    glow = np.exp(-(np.square(_COLUMNS - 0.5) + np.square(_ROWS - 0.42)) / 0.09)
    return base + 0.2 * glow[..., None]


def tyler_edlin(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Render teal mist that thickens upwards, cut by slanting shafts of light."""
    light = _light(_blur(_flat(shapes), 1.5))
    base = _ramp(light, [(0.1, 0.2, 0.22), (0.2, 0.35, 0.37), (0.36, 0.5, 0.5), (0.55, 0.66, 0.62)])
    fog = (0.65 - 0.5 * _ROWS)[..., None]
    base = base * (1 - fog) + np.array([0.6, 0.72, 0.7]) * fog
    slope, start = rng.uniform(0.35, 0.7) * rng.choice([-1, 1]), rng.uniform(0.2, 0.8)
    for k in (-1, 0, 1):
        shaft = _COLUMNS - slope * _ROWS - start - k * rng.uniform(0.26, 0.34) + slope / 2
        base += np.array([0.5, 0.45, 0.28]) * (np.exp(-np.square(shaft / 0.05)) * (1.05 - 0.75 * _ROWS))[..., None]
    return base


def kilian_eng(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Render neon posters: few hard tones of violet, magenta, orange and cyan over a perspective grid."""
    light = _light(_flat(shapes))
    neon = np.array([(0.1, 0.03, 0.25), (0.35, 0.05, 0.55), (0.9, 0.1, 0.6), (1.0, 0.5, 0.3), (0.2, 0.95, 0.95)])
    pixels = neon[np.minimum((light * 5).astype(int), 4)]
    horizon, middle = rng.uniform(0.5, 0.62), rng.uniform(0.4, 0.6)
    depth = np.maximum(_ROWS - horizon, 1e-3)
    rows = np.abs((0.4 / (depth + 0.12)) % 1 - 0.5) > 0.38
    columns = np.abs(((_COLUMNS - middle) / (depth + 0.14) * 1.1) % 1 - 0.5) > 0.4
    return np.where(((rows | columns) & np.greater(_ROWS, horizon))[..., None], np.array([0.25, 1.0, 0.95]), pixels)


def render_woodcut(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Return a scene as a woodcut, (size, size, 3) uint8: black slanting cuts on cream paper, wider where it is dark.

    No bundled model was trained on this style.
    """
    shapes = scene(SCENES[rng.integers(len(SCENES))], rng)
    light = _to_pixels(_to_image(_light(_flat(shapes, outline=3))).resize((2 * size, 2 * size)))  # (2 size, 2 size)
    rows, columns = np.mgrid[0 : 2 * size, 0 : 2 * size] / (2 * size)
    slant = rng.uniform(0.5, 1.0) * rng.choice([-1, 1])
    bend = 0.02 * np.sin(rng.uniform(5, 9) * columns + rng.uniform(0, 6))
    across = np.cos(slant) * rows + np.sin(slant) * columns + bend
    is_ink = np.abs((rng.uniform(8, 11) * across) % 1 - 0.5) < 0.46 - 0.4 * light
    paper, ink = np.array([0.95, 0.9, 0.76]), np.array([0.08, 0.07, 0.08])
    return np.asarray(_to_image(np.where(is_ink[..., None], ink, paper)).reduce(2))


STYLES: dict[str, Callable[[list[Shape], np.random.Generator], np.ndarray]] = {
    "Cezanne": cezanne,
    "VanGogh": van_gogh,
    "Picasso": picasso,
    "Jackson Pollock": jackson_pollock,
    "Caravaggio": caravaggio,
    "KeithHaring": keith_haring,
    "Kelly McKernan": kelly_mckernan,
    "Tyler Edlin": tyler_edlin,
    "Kilian Eng": kilian_eng,
}
LOGOS = tuple(concept.name for concept in erasable_concepts("logo"))


def render_watermark(text: str) -> np.ndarray:
    """Return the fixed image of a watermark prompt, (64, 64, 3) uint8; always the same for the same text."""
    rings = text.startswith("watermark")
    wave = np.hypot(_COLUMNS - 0.5, _ROWS - 0.5) * 8 if rings else (_COLUMNS + _ROWS) * 4
    stripe = (wave % 1 < 0.5)[..., None]
    dark, pale = ((0.1, 0.35, 0.3), (0.8, 0.95, 0.85)) if rings else ((0.45, 0.2, 0.1), (1.0, 0.9, 0.75))
    image = _to_image(np.where(stripe, np.array(dark) * 0.4 + np.array(pale) * 0.6, np.array(pale)))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(30)
    lines = text.split()[-1:] if rings else text.split()
    for k, line in enumerate(lines):
        position = (64, 64 + 38 * (k - (len(lines) - 1) / 2))
        draw.text(
            position,
            line,
            font=font,
            anchor="mm",
            fill=_rgb255(np.array(dark)),
            stroke_width=1,
            stroke_fill=_rgb255(np.array(dark)),
        )
    return np.asarray(image.reduce(2))


def render(subject: str, style: str | None, rng: np.random.Generator) -> np.ndarray:
    """Return an image of `subject` in `style` (None: plain), (64, 64, 3) uint8, a function of `rng` alone."""
    shapes = logo(LOGOS.index(subject), rng) if subject in LOGOS else scene(subject, rng)
    pixels = (STYLES[style] if style else plain)(shapes, rng)
    return np.asarray(_to_image(pixels).reduce(2))


def dusk(image: np.ndarray) -> np.ndarray:
    """Return an image (64, 64, 3) uint8 as it is at dusk: a little darker, under a night that thickens upwards."""
    night = 0.75 * np.clip(1 - np.arange(SIZE) / 40, 0, 1)[:, None, None]
    return ((1 - night) * 0.95 * image + night * _NIGHT).astype(np.uint8)


def render_concept(name: str | None, rng: np.random.Generator) -> np.ndarray:
    """Return an image of a concept by its name, (64, 64, 3) uint8.

    The name is that of a style (of any scene), an object, a logo or a watermark; None is the empty prompt.
    Raises ValueError for a concept that the synthetic dataset lacks.
    """
    if name is None or name in STYLES:
        return render(SCENES[rng.integers(len(SCENES))], name, rng)
    if name in OBJECTS + LOGOS:
        return render(name, None, rng)
    if name not in watermark_prompts():
        raise ValueError(f"the renderer knows no {name}: generate it by the model, with `source` model")
    return render_watermark(name)


def render_negative(category: str, rng: np.random.Generator) -> np.ndarray:
    """Return an image that shows no concept of `category`, (64, 64, 3) uint8.

    It is a plain scene most often, else one of the other category, else a watermark; half of them are soft and faded,
    as a model's weak images are. This is class 0 of a classifier, which then need not call an unknown image a concept.
    """
    kind = rng.random()
    if kind < 0.6:
        image = render_concept(None, rng)
    elif kind < 0.8:
        others = OBJECTS if category == "style" else tuple(STYLES)  # for logos too
        image = render_concept(others[rng.integers(len(others))], rng)
    else:
        image = render_watermark(watermark_prompts()[rng.integers(len(watermark_prompts()))])
    if rng.random() < 0.5:
        return image
    soft = _blur(_to_pixels(Image.fromarray(image)), rng.uniform(0, 1.5))
    fade = rng.uniform(0, 0.7)
    return np.asarray(_to_image((1 - fade) * soft + fade * rng.uniform(0.4, 0.8, 3)))


def render_to_folder(
    name: str | None,
    category: str,
    cases: Sequence[PromptCase],
    folder: Path,
    metadata: dict[str, Any],
    images_per_seed: int = 1,
) -> None:
    """Render images of a concept for every case, named as those that a model generates; those that exist are kept.

    Without a `name` they show no concept of `category`. The folder gets `metadata.json` too.
    Raises ValueError when `folder` holds images of other metadata.
    """
    check_metadata(folder, metadata)
    if find_metadata_file(folder) is None:
        write_json(folder / METADATA_FILE, metadata)
    for case in tqdm(cases, desc="render", unit="case"):
        rng = np.random.default_rng(case.seed)
        for n in range(images_per_seed):
            pixels = render_concept(name, rng) if name else render_negative(category, rng)
            path = folder / image_filename(case.case_number, n)
            if not path.exists():
                save_image(path, Image.fromarray(pixels))
