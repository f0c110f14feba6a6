"""PNG files that end early, which PIL reads with a black rest: in their rows, or in their palette."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type
# The first pixel and the step, across and down, of each pass of an interlaced image.
_PASSES = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
_PIECE = 2**20  # bytes that are decompressed at once


def check_png(path: Path, image: Image.Image) -> None:
    """Raise ValueError for a PNG with too few rows, or with pixels of colors that its palette does not have.

    `image` is the file, opened. The rows are counted without being kept. (PNG specification, sections 8, 10 and 11.)
    """
    num_colors, found, expected = 0, 0, 0
    decompressor = zlib.decompressobj()
    for kind, data in _chunks(path):
        if kind == b"IHDR":
            expected = _num_bytes(data)
        elif kind == b"PLTE":
            num_colors = len(data) // 3
        while kind == b"IDAT" and data and found < expected:
            found += len(decompressor.decompress(data, _PIECE))
            data = decompressor.unconsumed_tail
    if found < expected:
        raise ValueError("its rows end early")
    if num_colors and image.mode == "P" and max(image.tobytes()) >= num_colors:
        raise ValueError("it has colors that its palette does not have")


def _chunks(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield the chunks of a PNG file: kind, data."""
    with open(path, "rb") as opened:
        opened.seek(8)
        while len(head := opened.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            yield kind, opened.read(size)
            opened.read(4)  # its checksum, which PIL looks at


def _num_bytes(header: bytes) -> int:
    """Return how many bytes the rows of an image have, by its header: each begins with one for its filter."""
    width, height, depth, color_type, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _CHANNELS[color_type]
    total = 0
    for left, across, top, down in _PASSES if interlaced else ((0, 1, 0, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * bits // 8))
    return total
