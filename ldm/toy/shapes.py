"""The subjects of the synthetic dataset as lists of flat shapes, before any style is applied.

A shape is `(points, color)`: points (n, 2) in the unit square, x to the right and y down; color RGB in [0, 1]. Shapes
are rendered in order, so that the first one is the background. Everything is a function of a numpy Generator.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

Shape = tuple[np.ndarray, np.ndarray]

SCENES = ("landscape", "portrait", "still life", "city", "cat")
OBJECTS = (
    "chain saw",
    "church",
    "gas pump",
    "tench",
    "garbage truck",
    "english springer",
    "golf ball",
    "parachute",
    "french horn",
)


def rgb(rng: np.random.Generator, red: float, green: float, blue: float, spread: float = 0.06) -> np.ndarray:
    """Return a color near the given one, uniformly within `spread` in each channel."""
    return np.clip(np.array([red, green, blue]) + rng.uniform(-spread, spread, 3), 0, 1)


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Return the corners of a rectangle with the sides parallel to the axes, (4, 2)."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=float)


def oval(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 2 * np.pi) -> np.ndarray:
    """Return an ellipse about (x, y), or its arc between two angles in radians, as a polygon (22, 2)."""
    angle = np.linspace(start, stop, 22)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def bar(points: list[list[float]] | np.ndarray, width: float) -> np.ndarray:
    """Return a polyline with a width as one polygon."""
    line = np.asarray(points, dtype=float)
    along = np.gradient(line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-9)
    return np.concatenate([line + across * width / 2, (line - across * width / 2)[::-1]])


def place(
    shapes: list[Shape],
    rng: np.random.Generator,
    min_scale: float = 0.82,
    max_scale: float = 1.05,
    max_tilt: float = 0.12,
    max_offset: float = 0.07,
    may_mirror: bool = True,
) -> list[Shape]:
    """Return the shapes scaled, rotated, translated and perhaps mirrored about the middle, all together."""
    angle = rng.uniform(-max_tilt, max_tilt)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = rng.uniform(min_scale, max_scale) * rotation
    offset = 0.5 + rng.uniform(-max_offset, max_offset, 2)
    mirror = np.array([rng.choice([-1.0, 1.0]) if may_mirror else 1.0, 1.0])
    return [((points - 0.5) * mirror @ linear.T + offset, color) for points, color in shapes]


def _sky_and_ground(rng: np.random.Generator, sky: np.ndarray, ground: np.ndarray) -> list[Shape]:
    level = rng.uniform(0.6, 0.75)
    return [(box(-1, -1, 2, 2), sky), (box(-1, level, 2, 2), ground)]


def landscape(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of hills below a sun, and one to three trees."""
    horizon = rng.uniform(0.42, 0.6)
    shapes = [
        (box(-1, -1, 2, 2), rgb(rng, 0.55, 0.72, 0.9)),
        (oval(rng.uniform(0.12, 0.88), rng.uniform(0.1, 0.28), 0.09, 0.09), rgb(rng, 0.98, 0.88, 0.5)),
    ]
    x = np.linspace(-0.1, 1.1, 16)
    for depth, color in ((0.0, (0.5, 0.6, 0.66)), (0.14, (0.45, 0.6, 0.34)), (0.32, (0.36, 0.52, 0.22))):
        ridge = horizon + depth + 0.08 * np.sin(rng.uniform(3, 8) * x + rng.uniform(0, 6))
        shapes.append((np.concatenate([np.stack([x, ridge], 1), [[1.1, 1.1], [-0.1, 1.1]]]), rgb(rng, *color)))
    for _ in range(rng.integers(1, 4)):
        x0, y0, size = rng.uniform(0.1, 0.9), rng.uniform(0.66, 0.86), rng.uniform(0.1, 0.17)
        shapes.append((box(x0 - 0.02, y0 - size, x0 + 0.02, y0 + 0.02), rgb(rng, 0.36, 0.25, 0.15)))
        shapes.append((oval(x0, y0 - size, size * 0.75, size), rgb(rng, 0.2, 0.42, 0.18)))
    return shapes


def portrait(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a head and shoulders before a wall."""
    skin = rgb(rng, 0.86, 0.66, 0.52, 0.1)
    hair = rgb(rng, 0.35, 0.22, 0.12, 0.14)
    person = [
        (oval(0.5, 1.12, 0.42, 0.4), rgb(rng, 0.4, 0.35, 0.5, 0.25)),
        (oval(0.5, 0.4, 0.25, 0.3), hair),
        (box(0.43, 0.6, 0.57, 0.78), skin * 0.9),
        (oval(0.5, 0.46, 0.19, 0.25), skin),
        (oval(0.5, 0.26, 0.2, 0.1), hair),
    ]
    for x in (0.42, 0.58):
        person.append((oval(x, 0.44, 0.045, 0.028), rgb(rng, 0.96, 0.96, 0.94, 0.02)))
        person.append((oval(x, 0.44, 0.02, 0.025), rgb(rng, 0.12, 0.12, 0.16)))
    person.append((bar([[0.5, 0.45], [0.48, 0.53], [0.51, 0.54]], 0.02), skin * 0.72))
    person.append((oval(0.5, 0.61, 0.065, 0.022), rgb(rng, 0.72, 0.25, 0.25)))
    return [(box(-1, -1, 2, 2), rgb(rng, 0.6, 0.62, 0.6, 0.2)), *place(person, rng, 0.85, 1.05, 0.06)]


def still_life(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a vase with flowers and three to five fruits on a table."""
    level = rng.uniform(0.58, 0.68)
    shapes = [
        (box(-1, -1, 2, 2), rgb(rng, 0.66, 0.66, 0.62, 0.12)),
        (box(-1, level, 2, 2), rgb(rng, 0.6, 0.42, 0.26)),
    ]
    x = rng.uniform(0.25, 0.75)
    vase = rgb(rng, 0.3, 0.45, 0.7, 0.2)
    shapes += [(oval(x, level - 0.06, 0.12, 0.18), vase), (box(x - 0.05, level - 0.34, x + 0.05, level - 0.15), vase)]
    for angle in np.linspace(-0.9, 0.9, 5):
        flower_x, flower_y = x + 0.24 * np.sin(angle), level - 0.38 - 0.1 * np.cos(angle)
        shapes.append((bar([[x, level - 0.3], [flower_x, flower_y]], 0.014), rgb(rng, 0.25, 0.45, 0.2)))
        shapes.append((oval(flower_x, flower_y, 0.055, 0.055), rgb(rng, 0.85, 0.45, 0.4, 0.15)))
    for _ in range(rng.integers(3, 6)):
        fruit = ((0.82, 0.22, 0.18), (0.9, 0.6, 0.18), (0.55, 0.68, 0.24))[rng.integers(3)]
        size = rng.uniform(0.06, 0.09)
        shapes.append((oval(rng.uniform(0.1, 0.9), level + rng.uniform(0.08, 0.24), size, size), rgb(rng, *fruit)))
    return shapes


def city(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a row of houses with lit windows."""
    shapes = [(box(-1, -1, 2, 2), rgb(rng, 0.66, 0.74, 0.84)), (box(-1, 0.88, 2, 2), rgb(rng, 0.36, 0.36, 0.38))]
    x = -0.05
    while x < 1:
        wide, top = rng.uniform(0.16, 0.26), rng.uniform(0.2, 0.55)
        shapes.append((box(x, top, x + wide, 0.9), rgb(rng, 0.52, 0.46, 0.44, 0.15)))
        window = rgb(rng, 0.92, 0.88, 0.66, 0.05)
        for row in np.arange(top + 0.06, 0.78, 0.13):
            columns = (x + wide * 0.28, x + wide * 0.7)
            shapes += [(box(column - 0.026, row, column + 0.026, row + 0.065), window) for column in columns]
        x += wide + rng.uniform(0.0, 0.03)
    return shapes


def cat(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a sitting cat in a room."""
    fur = rgb(rng, *((0.85, 0.55, 0.25), (0.3, 0.3, 0.32), (0.72, 0.66, 0.58))[rng.integers(3)])
    body = [
        (bar([[0.7, 0.85], [0.86, 0.75], [0.86, 0.55], [0.78, 0.5]], 0.07), fur * 0.85),
        (oval(0.5, 0.76, 0.24, 0.25), fur),
        (oval(0.5, 0.8, 0.12, 0.18), np.clip(fur * 1.25, 0, 1)),
        (np.array([[0.3, 0.36], [0.32, 0.1], [0.5, 0.26]]), fur * 0.9),
        (np.array([[0.7, 0.36], [0.68, 0.1], [0.5, 0.26]]), fur * 0.9),
        (oval(0.5, 0.38, 0.21, 0.18), fur),
    ]
    for x in (0.42, 0.58):
        body += [
            (oval(x, 0.36, 0.045, 0.04), rgb(rng, 0.7, 0.85, 0.3)),
            (oval(x, 0.36, 0.015, 0.036), np.array([0.05, 0.05, 0.05])),
        ]
    body.append((np.array([[0.46, 0.43], [0.54, 0.43], [0.5, 0.47]]), rgb(rng, 0.85, 0.45, 0.45)))
    room = [(box(-1, -1, 2, 2), rgb(rng, 0.68, 0.7, 0.66, 0.14)), (box(-1, 0.82, 2, 2), rgb(rng, 0.55, 0.42, 0.32))]
    return room + place(body, rng, max_tilt=0.06)


def chain_saw(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a chain saw."""
    body = rgb(rng, 0.92, 0.36, 0.1)
    corners = itertools.product(np.arange(0.0, 0.48, 0.07), (0.455, 0.645))
    teeth = [(box(x, y, x + 0.035, y + 0.04), np.array([0.2, 0.2, 0.2])) for x, y in corners]
    saw = [
        *teeth,
        (box(-0.02, 0.49, 0.56, 0.65), rgb(rng, 0.78, 0.8, 0.82, 0.03)),
        (box(0.02, 0.55, 0.52, 0.59), np.array([0.45, 0.46, 0.48])),
        (box(0.52, 0.42, 0.92, 0.74), body),
        (bar([[0.56, 0.44], [0.62, 0.26], [0.8, 0.26], [0.86, 0.44]], 0.06), np.array([0.15, 0.15, 0.16])),
        (bar([[0.9, 0.5], [1.02, 0.56], [0.98, 0.72], [0.86, 0.72]], 0.06), np.array([0.15, 0.15, 0.16])),
        (oval(0.72, 0.58, 0.09, 0.09), body * 0.6),
    ]
    return _sky_and_ground(rng, rgb(rng, 0.7, 0.72, 0.66), rgb(rng, 0.5, 0.4, 0.28)) + place(saw, rng, 0.8, 0.95, 0.25)


def church(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a church with a tower."""
    wall, roof = rgb(rng, 0.94, 0.92, 0.86, 0.04), rgb(rng, 0.45, 0.26, 0.22)
    window = np.array([0.25, 0.3, 0.42])
    building = [
        (box(0.38, 0.52, 0.95, 0.9), wall * 0.92),
        (np.array([[0.34, 0.54], [0.46, 0.36], [0.9, 0.36], [1.0, 0.54]]), roof),
        (box(0.14, 0.36, 0.4, 0.9), wall),
        (np.array([[0.1, 0.38], [0.27, 0.06], [0.44, 0.38]]), roof * 0.85),
        (box(0.255, -0.06, 0.285, 0.1), np.array([0.2, 0.18, 0.16])),
        (box(0.21, -0.02, 0.33, 0.015), np.array([0.2, 0.18, 0.16])),
        (oval(0.27, 0.48, 0.05, 0.05), window),
        (box(0.21, 0.7, 0.33, 0.9), rgb(rng, 0.4, 0.24, 0.14)),
    ]
    building += [(box(x, 0.62, x + 0.08, 0.8), window) for x in (0.48, 0.64, 0.8)]
    return _sky_and_ground(rng, rgb(rng, 0.5, 0.7, 0.92), rgb(rng, 0.4, 0.6, 0.28)) + place(
        building, rng, 0.75, 0.92, 0.03
    )


def gas_pump(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a gas pump."""
    body = rgb(rng, 0.85, 0.15, 0.15)
    pump = [
        (bar([[0.66, 0.4], [0.84, 0.42], [0.88, 0.7], [0.78, 0.84], [0.74, 0.5]], 0.05), np.array([0.1, 0.1, 0.1])),
        (box(0.26, 0.9, 0.74, 0.97), np.array([0.4, 0.4, 0.42])),
        (box(0.31, 0.14, 0.69, 0.92), body),
        (oval(0.5, 0.12, 0.13, 0.11), rgb(rng, 0.97, 0.95, 0.9, 0.02)),
        (box(0.37, 0.26, 0.63, 0.46), np.array([0.95, 0.95, 0.92])),
        (box(0.4, 0.3, 0.6, 0.34), np.array([0.15, 0.15, 0.2])),
        (box(0.4, 0.38, 0.6, 0.42), np.array([0.15, 0.15, 0.2])),
        (box(0.37, 0.56, 0.63, 0.82), np.clip(body * 0.65, 0, 1)),
    ]
    return _sky_and_ground(rng, rgb(rng, 0.72, 0.8, 0.86), rgb(rng, 0.52, 0.52, 0.54)) + place(
        pump, rng, 0.85, 1.0, 0.04
    )


def tench(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a tench under water."""
    skin = rgb(rng, 0.45, 0.5, 0.18)
    fish = [
        (np.array([[0.76, 0.5], [1.02, 0.3], [0.96, 0.5], [1.02, 0.7]]), skin * 0.75),
        (np.array([[0.36, 0.36], [0.5, 0.18], [0.62, 0.36]]), skin * 0.7),
        (np.array([[0.4, 0.64], [0.5, 0.8], [0.58, 0.64]]), skin * 0.7),
        (oval(0.44, 0.5, 0.4, 0.2), skin),
        (oval(0.42, 0.58, 0.3, 0.1), np.clip(skin * 1.5, 0, 1)),
        (bar([[0.24, 0.36], [0.29, 0.5], [0.24, 0.64]], 0.025), skin * 0.6),
        (oval(0.15, 0.46, 0.04, 0.04), rgb(rng, 0.9, 0.4, 0.15)),
        (oval(0.15, 0.46, 0.02, 0.02), np.array([0.05, 0.05, 0.05])),
    ]
    water = rgb(rng, 0.25, 0.5, 0.62)
    waves = [(box(-1, y, 2, y + 0.05), np.clip(water * 1.15, 0, 1)) for y in np.arange(0.08, 1, 0.24)]
    return [(box(-1, -1, 2, 2), water), *waves, *place(fish, rng, 0.82, 0.98, 0.3)]


def garbage_truck(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a garbage truck."""
    green = rgb(rng, 0.16, 0.55, 0.28)
    tyre, hub = np.array([0.1, 0.1, 0.1]), np.array([0.7, 0.7, 0.7])
    truck = [
        (np.array([[0.3, 0.24], [0.9, 0.24], [1.02, 0.5], [1.0, 0.76], [0.3, 0.76]]), green),
        (box(0.0, 0.42, 0.29, 0.76), rgb(rng, 0.95, 0.95, 0.92, 0.03)),
        (box(0.04, 0.46, 0.2, 0.6), np.array([0.3, 0.45, 0.6])),
        (box(0.0, 0.74, 1.0, 0.8), np.array([0.25, 0.25, 0.27])),
    ]
    truck += [(box(x, 0.3, x + 0.04, 0.7), green * 0.6) for x in (0.42, 0.58, 0.74)]
    for x in (0.16, 0.62, 0.84):
        truck += [(oval(x, 0.81, 0.095, 0.095), tyre), (oval(x, 0.81, 0.04, 0.04), hub)]
    return _sky_and_ground(rng, rgb(rng, 0.78, 0.82, 0.86), rgb(rng, 0.46, 0.45, 0.46)) + place(
        truck, rng, 0.82, 0.97, 0.04
    )


def english_springer(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of an English springer on grass."""
    brown, white = rgb(rng, 0.4, 0.2, 0.1), rgb(rng, 0.96, 0.94, 0.9, 0.03)
    dog = [
        (oval(0.62, 0.84, 0.34, 0.26), white),
        (oval(0.78, 0.8, 0.17, 0.18), brown),
        (oval(0.42, 0.76, 0.17, 0.26), white),
        (oval(0.42, 0.38, 0.22, 0.23), brown),
        (np.array([[0.38, 0.16], [0.46, 0.16], [0.5, 0.6], [0.34, 0.6]]), white),
        (oval(0.42, 0.53, 0.13, 0.11), white),
        (oval(0.2, 0.48, 0.09, 0.23), brown * 0.75),
        (oval(0.64, 0.48, 0.09, 0.23), brown * 0.75),
        (oval(0.42, 0.49, 0.055, 0.04), np.array([0.08, 0.06, 0.06])),
    ]
    dog += [(oval(x, 0.37, 0.03, 0.03), np.array([0.05, 0.05, 0.05])) for x in (0.33, 0.51)]
    return _sky_and_ground(rng, rgb(rng, 0.62, 0.76, 0.86), rgb(rng, 0.38, 0.58, 0.25)) + place(
        dog, rng, 0.85, 1.0, 0.08
    )


def golf_ball(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a golf ball on a lawn."""
    ball = [
        (oval(0.5, 0.8, 0.36, 0.07), np.array([0.12, 0.3, 0.1])),
        (oval(0.5, 0.5, 0.33, 0.33), np.array([0.78, 0.8, 0.82])),
        (oval(0.47, 0.47, 0.28, 0.28), np.array([0.98, 0.98, 0.98])),
    ]
    for ring, count in ((0.0, 1), (0.12, 6), (0.23, 11)):
        for angle in np.linspace(0, 2 * np.pi, count, endpoint=False):
            x, y = 0.5 + ring * np.cos(angle), 0.5 + ring * np.sin(angle)
            ball += [(oval(x, y, 0.026, 0.026), np.array([0.66, 0.69, 0.73]))]
    field = [
        (box(-1, -1, 2, 2), rgb(rng, 0.3, 0.62, 0.24)),
        (box(-1, -1, 2, rng.uniform(0.1, 0.25)), rgb(rng, 0.2, 0.48, 0.18)),
    ]
    return field + place(ball, rng, 0.7, 1.1, 0.5, 0.12)


def parachute(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a parachute between clouds."""
    sky = rgb(rng, 0.42, 0.68, 0.95)
    stripes = [rgb(rng, 0.92, 0.2, 0.2), rgb(rng, 0.98, 0.82, 0.2)]
    fall = [(bar([[x, 0.42], [0.5, 0.84]], 0.014), np.array([0.2, 0.2, 0.25])) for x in (0.1, 0.3, 0.5, 0.7, 0.9)]
    edges = np.linspace(np.pi, 2 * np.pi, 6)
    for k in range(5):
        rim = np.linspace(edges[k], edges[k + 1], 6)
        slice_ = np.stack([0.5 + 0.44 * np.cos(rim), 0.44 + 0.38 * np.sin(rim)], axis=1)
        fall.append((np.concatenate([slice_, [[0.5, 0.4]]]), stripes[k % 2]))
    fall += [
        (box(0.46, 0.82, 0.54, 0.96), np.array([0.15, 0.15, 0.3])),
        (oval(0.5, 0.8, 0.04, 0.04), rgb(rng, 0.85, 0.65, 0.5)),
    ]
    clouds = [(oval(rng.uniform(0, 1), rng.uniform(0.1, 0.95), 0.16, 0.06), np.clip(sky * 1.3, 0, 1)) for _ in range(3)]
    return [(box(-1, -1, 2, 2), sky), *clouds, *place(fall, rng, 0.75, 1.0, 0.12)]


def french_horn(rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a French horn before a wall."""
    gold = rgb(rng, 0.9, 0.7, 0.2)
    wall = rgb(rng, 0.42, 0.16, 0.2)
    angle = np.linspace(0, 2 * np.pi, 22)
    horn = []
    for radius, shade in ((0.3, 1.0), (0.2, 0.82)):
        ring = np.stack([0.5 + radius * np.cos(angle), 0.45 + radius * np.sin(angle)], axis=1)
        horn.append((bar(ring, 0.055), gold * shade))
    horn += [
        (np.array([[0.68, 0.5], [0.8, 0.46], [1.0, 0.86], [0.66, 1.0]]), gold),
        (oval(0.84, 0.94, 0.19, 0.09), np.clip(gold * 1.2, 0, 1)),
        (oval(0.84, 0.94, 0.12, 0.05), gold * 0.45),
        (bar([[0.32, 0.24], [0.16, 0.12], [0.05, 0.1]], 0.045), gold),
    ]
    horn += [(box(x, 0.4, x + 0.05, 0.56), gold * 0.62) for x in (0.4, 0.475, 0.55)]
    return [(box(-1, -1, 2, 2), wall), (box(-1, 0.8, 2, 2), wall * 0.6), *place(horn, rng, 0.8, 0.95, 0.25)]


_SUBJECTS: dict[str, Callable[[np.random.Generator], list[Shape]]] = {
    "landscape": landscape,
    "portrait": portrait,
    "still life": still_life,
    "city": city,
    "cat": cat,
    "chain saw": chain_saw,
    "church": church,
    "gas pump": gas_pump,
    "tench": tench,
    "garbage truck": garbage_truck,
    "english springer": english_springer,
    "golf ball": golf_ball,
    "parachute": parachute,
    "french horn": french_horn,
}


def scene(subject: str, rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of one seeded image of `subject` (one of SCENES or OBJECTS), background first."""
    return _SUBJECTS[subject](rng)
