# SPDX-License-Identifier: Apache-2.0
"""The map as SVG and PNG."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

import pytest

from tests.support import require_module
from vhdkit import Extent, ExtentKind, VhdkitError
from vhdkit.cli.picture import MAX_CELLS, MAX_LANES, Box, Words, as_png, as_svg, colour_of, draw, glyph_of, paler
from vhdkit.cli.tally import Tally, tally

SIZE = 64 << 20


def counted(layer_count: int = 2) -> Tally:
    """The first quarter belongs to the leaf, the second half to the base."""
    quarter = SIZE // 512 // 4
    extents = [
        Extent(0, quarter, ExtentKind.DATA, 0, 0),
        Extent(quarter, quarter, ExtentKind.ZERO, -1),
        Extent(2 * quarter, 2 * quarter, ExtentKind.DATA, layer_count - 1, 0),
    ]
    return tally(extents, SIZE, layer_count, MAX_CELLS)


def test_areas_are_proportional() -> None:
    """In the rows the area of a layer's colour is its share of the disk."""
    drawing = draw(counted(), ["leaf.avhd", "base.vhd"])
    rows = [shape for shape in drawing.shapes if isinstance(shape, Box) and shape.height == 22]
    area = {colour: sum(box.width for box in rows if box.colour == colour) for colour in (colour_of(0), colour_of(1))}
    assert area[colour_of(1)] == 2 * area[colour_of(0)]
    assert all(box.x >= 0 and box.x + box.width <= drawing.width for box in rows)
    assert all(0 <= shape.y <= drawing.height for shape in drawing.shapes)


def test_the_legend_is_leaf_first() -> None:
    """Every layer is named with its number, leaf first; for a very deep chain it says how many are left out."""
    texts = [shape.text for shape in draw(counted(), ["leaf.avhd", "base.vhd"]).shapes if isinstance(shape, Words)]
    leaf, base = (next(i for i, text in enumerate(texts) if text.startswith(sign)) for sign in ("0  leaf", "1  base"))
    assert leaf < base
    deep = draw(counted(254), ["x"] * 254)
    assert any(f"{254 - MAX_LANES} more layers" in shape.text for shape in deep.shapes if isinstance(shape, Words))


def test_svg_is_xml() -> None:
    """Names may contain the special characters of XML."""
    svg = as_svg(draw(counted(), ["<leaf>&.avhd", "base.vhd"]))
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and "<leaf>&.avhd" in "".join(root.itertext())


def test_png_has_the_size_and_the_colours() -> None:
    """The PNG can be opened, and the first part has the leaf's colour."""
    require_module("PIL")
    from io import BytesIO

    from PIL import Image

    drawing = draw(counted(), ["leaf.avhd", "base.vhd"])
    with Image.open(BytesIO(as_png(drawing))) as image:
        assert image.size == (drawing.width, drawing.height)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}
    assert tuple(int(colour_of(0)[at : at + 2], 16) for at in (1, 3, 5)) in colours


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Pillow is missing, one error says how to get it."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(VhdkitError, match=r"vhdkit\[picture\]"):
        as_png(draw(counted(), ["leaf.avhd", "base.vhd"]))


def test_signs() -> None:
    """Each layer is shown by its own character, as far as there are characters."""
    assert [glyph_of(one) for one in (0, 9, 10, 35, 36)] == ["0", "9", "a", "z", "+"]
    assert paler("#000000") == "#aaaaaa"
