# SPDX-License-Identifier: Apache-2.0
"""The map as a picture: shapes laid out once, then written as SVG or PNG.

Decides sizes, colours and places. The disk runs in rows from left to right. Each stretch has the colour and the number
of the layer that owns most of it, and is paler if less than half of it is data. Below there is one lane per layer,
leaf first, with bars as high as the layer's share.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np

from vhdkit.cli.tally import UNOWNED, Tally, alike
from vhdkit.errors import VhdkitError
from vhdkit.units import KIB, format_size

PALETTE = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b3a800", "#7f7f7f")
GLYPHS = "0123456789abcdefghijklmnopqrstuvwxyz"
ROW_CELLS = KIB // 2
MAX_ROWS = 16
MAX_CELLS = ROW_CELLS * MAX_ROWS
MAX_LANES = 32  # a deeper chain has the rest in one line of text

_CELL_WIDTH = 2
_LEFT, _RIGHT, _TOP = 84, 24, 84
_ROW_HEIGHT, _ROW_STEP = 22, 26
_LANE_HEIGHT, _LANE_STEP = 24, 48
_WIDTH = _LEFT + ROW_CELLS * _CELL_WIDTH + _RIGHT
_INK, _FAINT, _EMPTY, _PAPER = "#1c1c1c", "#6a6a6a", "#ececec", "#ffffff"
_NUMBER_ROOM = 14  # a stretch narrower than this has no number in it


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True, slots=True)
class Words:
    """A line of text; `y` is its base line, `anchor` is the part of the text that is at `x`."""

    x: float
    y: float
    text: str
    size: int = 13
    colour: str = _INK
    anchor: str = "start"  # start, middle or end


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture as shapes, the later over the earlier."""

    width: int
    height: int
    shapes: tuple[Box | Words, ...]


def colour_of(layer: int) -> str:
    """The layer's colour; neighbours differ, and they stay apart for the colour-blind."""
    return PALETTE[layer % len(PALETTE)]


def glyph_of(layer: int) -> str:
    """The layer as one character: its number, then letters."""
    return GLYPHS[layer] if layer < len(GLYPHS) else "+"


def paler(colour: str) -> str:
    """The colour mixed with paper."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{(part + 2 * 0xFF) // 3:02x}" for part in parts)


def ink_on(colour: str) -> str:
    """The colour in which a number is readable on `colour`."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return _INK if 3 * red + 6 * green + blue > 10 * 0x78 else _PAPER


def draw(tally: Tally, names: Sequence[str]) -> Drawing:
    """Lay the picture out; `names` are the layers', leaf first."""
    row_count = -(-tally.cell_count // ROW_CELLS)
    lanes = min(tally.layer_count, MAX_LANES)
    lanes_top = _TOP + row_count * _ROW_STEP + 40
    height = lanes_top + lanes * _LANE_STEP + 52
    data_bytes = int(tally.data.sum())
    shapes: list[Box | Words] = [
        Box(0, 0, _WIDTH, height, _PAPER),
        Words(_LEFT, 36, names[0], 20),
        Words(
            _LEFT,
            60,
            f"{format_size(tally.size_bytes)} disk: {format_size(data_bytes)} data,"
            f" {format_size(tally.size_bytes - data_bytes)} zeros. Which layer owns what, leaf first.",
            13,
            _FAINT,
        ),
    ]
    shapes += _rows(tally, row_count)
    shapes.append(Words(_LEFT, lanes_top - 8, "What each layer owns, the whole disk in one lane:", 13, _FAINT))
    for layer in range(lanes):
        shapes += _lane(tally, layer, names[layer], lanes_top + layer * _LANE_STEP)
    end = f"Light grey is zeros. Paler is less than half data. One step is {format_size(tally.cell_bytes)}."
    if tally.layer_count > lanes:
        end += f" {tally.layer_count - lanes} more layers are not shown as lanes."
    shapes.append(Words(_LEFT, height - 24, end, 13, _FAINT))
    return Drawing(_WIDTH, height, tuple(shapes))


def _rows(tally: Tally, row_count: int) -> Iterator[Box | Words]:
    owners, full = tally.owners(), tally.fill() >= 0.5
    row_bytes = ROW_CELLS * tally.cell_bytes
    for row in range(row_count):
        top = _TOP + row * _ROW_STEP
        first, last = row * ROW_CELLS, min((row + 1) * ROW_CELLS, tally.cell_count)
        yield Words(_LEFT - 8, top + 15, format_size(row * row_bytes), 11, _FAINT, "end")
        yield Box(_LEFT, top, (last - first) * _CELL_WIDTH, _ROW_HEIGHT, _EMPTY)
        looks = owners[first:last] * 2 + full[first:last]
        for start, stop in alike(looks):
            owner = int(owners[first + start])
            if owner == UNOWNED:
                continue
            x, width = _LEFT + start * _CELL_WIDTH, (stop - start) * _CELL_WIDTH
            solid = bool(full[first + start])
            colour = colour_of(owner) if solid else paler(colour_of(owner))
            yield Box(x, top, width, _ROW_HEIGHT, colour)
            if width >= _NUMBER_ROOM:
                yield Words(x + width / 2, top + 15, glyph_of(owner), 11, ink_on(colour), "middle")


def _lane(tally: Tally, layer: int, name: str, top: int) -> Iterator[Box | Words]:
    text = f"{layer}  {name}: {format_size(tally.data_bytes(layer))} data"
    if tally.zero_bytes[layer]:
        text += f", {format_size(tally.zero_bytes[layer])} zeros"
    yield Box(_LEFT - 20, top + 2, 12, 12, colour_of(layer))
    yield Words(_LEFT, top + 13, text)
    base = top + 18 + _LANE_HEIGHT
    yield Box(_LEFT, top + 18, ROW_CELLS * _CELL_WIDTH, _LANE_HEIGHT, _EMPTY)
    share = tally.lane(layer, ROW_CELLS)
    # Any data at all gets two points of height: small changes are often what the reader looks for.
    heights = np.where(share > 0, np.maximum(np.round(share * _LANE_HEIGHT), 2), 0).astype(int)
    for start, stop in alike(heights):
        high = int(heights[start])
        if high:
            yield Box(_LEFT + start * _CELL_WIDTH, base - high, (stop - start) * _CELL_WIDTH, high, colour_of(layer))


def as_svg(drawing: Drawing) -> bytes:
    """The drawing as an SVG file."""
    size = f'width="{drawing.width}" height="{drawing.height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {drawing.width} {drawing.height}"'
        ' font-family="Helvetica, Arial, sans-serif" shape-rendering="crispEdges">'
    ]
    for shape in drawing.shapes:
        if isinstance(shape, Box):
            lines.append(
                f'<rect x="{shape.x:g}" y="{shape.y:g}" width="{shape.width:g}" height="{shape.height:g}"'
                f' fill="{shape.colour}"/>'
            )
        else:
            lines.append(
                f'<text x="{shape.x:g}" y="{shape.y:g}" font-size="{shape.size}" fill="{shape.colour}"'
                f' text-anchor="{shape.anchor}">{escape(shape.text)}</text>'
            )
    return ("\n".join([*lines, "</svg>"]) + "\n").encode()


def as_png(drawing: Drawing) -> bytes:
    """The drawing as a PNG file. Raises VhdkitError when Pillow is not installed."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise VhdkitError(
            "a PNG needs the package Pillow", hint="pip install 'vhdkit[picture]', or use --svg"
        ) from error
    image = Image.new("RGB", (drawing.width, drawing.height), _PAPER)
    canvas = ImageDraw.Draw(image)
    fonts = {
        size: ImageFont.load_default(size)
        for size in {shape.size for shape in drawing.shapes if isinstance(shape, Words)}
    }
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for shape in drawing.shapes:
        if isinstance(shape, Box):
            corner = (shape.x + shape.width - 1, shape.y + shape.height - 1)
            canvas.rectangle(((shape.x, shape.y), corner), fill=shape.colour)
        else:
            canvas.text(
                (shape.x, shape.y), shape.text, fill=shape.colour, font=fonts[shape.size], anchor=anchors[shape.anchor]
            )
    output = io.BytesIO()
    image.save(output, "PNG", optimize=True)
    return output.getvalue()
