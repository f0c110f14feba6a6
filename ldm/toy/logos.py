"""The made-up logos of the larger synthetic dataset: a charge on a field, each of one shape and color.

Of two logos at most one of the four choices is the same: with digits a, b of an index, the choices are a, b, a + b and
a + 2b modulo 11 (a Reed-Solomon code). So no logo can be told from others by one feature, nor put together from two.
"""

from __future__ import annotations

import itertools

import numpy as np

from ldm.toy.shapes import Shape, box, oval, place, rgb

_COLORS = (
    (0.85, 0.1, 0.12),
    (0.98, 0.55, 0.05),
    (0.98, 0.9, 0.15),
    (0.5, 0.85, 0.2),
    (0.05, 0.45, 0.2),
    (0.15, 0.8, 0.8),
    (0.1, 0.25, 0.85),
    (0.5, 0.15, 0.65),
    (0.98, 0.45, 0.75),
    (0.45, 0.26, 0.12),
    (0.1, 0.1, 0.12),
)


def _corners(number: int, inner: float | None = None, start: float = -np.pi / 2) -> np.ndarray:
    """Return a regular polygon of radius 0.5 about the middle; with `inner`, a star whose notches have that radius."""
    points = number if inner is None else 2 * number
    angle = start + np.arange(points) * 2 * np.pi / points
    radius = np.full(points, 0.5) if inner is None else np.tile([0.5, inner], number)
    return 0.5 + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def _crescent() -> np.ndarray:
    return np.concatenate(
        [oval(0.5, 0.5, 0.5, 0.5, 0.9, 2 * np.pi - 0.9), oval(0.66, 0.5, 0.4, 0.36, 2 * np.pi - 1.1, 1.1)]
    )


def _heart() -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 40)
    across = 16 * np.sin(angle) ** 3
    up = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return 0.5 + np.stack([across, -up - 2.5], 1) / 33


_SHAPES = (
    oval(0.5, 0.5, 0.5, 0.5),
    box(0.06, 0.06, 0.94, 0.94),
    _corners(3) + np.array([0, 0.1]),
    _corners(4),
    _corners(6),
    _corners(5, 0.21),
    np.array(
        [
            [0.34, 0],
            [0.66, 0],
            [0.66, 0.34],
            [1, 0.34],
            [1, 0.66],
            [0.66, 0.66],
            [0.66, 1],
            [0.34, 1],
            [0.34, 0.66],
            [0, 0.66],
            [0, 0.34],
            [0.34, 0.34],
        ]
    ),
    _crescent(),
    _heart(),
    _corners(12, 0.38),
    np.array([[0, 0.32], [0.5, 0.32], [0.5, 0.04], [1, 0.5], [0.5, 0.96], [0.5, 0.68], [0, 0.68]]),
)
_CODES = [(a, b, (a + b) % 11, (a + 2 * b) % 11) for a, b in itertools.product(range(11), repeat=2) if (a + b) % 11]


def logo(index: int, rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of one seeded image of the logo of that index (0 to 109) on a pale wall, background first."""
    field, field_color, charge, charge_color = _CODES[index]
    parts = [
        (0.5 + 0.84 * (_SHAPES[field] - 0.5), rgb(rng, *_COLORS[field_color], 0.04)),
        (0.5 + 0.42 * (_SHAPES[charge] - 0.5), rgb(rng, 0.97, 0.97, 0.97, 0.02)),
        (0.5 + 0.35 * (_SHAPES[charge] - 0.5), rgb(rng, *_COLORS[charge_color], 0.04)),
    ]
    gray = rng.uniform(0.7, 0.9)
    wall = (box(-1, -1, 2, 2), rgb(rng, gray, gray, gray, 0.03))
    return [wall, *place(parts, rng, 0.85, 1.05, 0.1, 0.05, may_mirror=False)]  # an arrow's mirror is another sign
