# SPDX-License-Identifier: Apache-2.0
"""`map`: which layer owns which part of the disk, as a picture, a table or JSON.

Decides how the map looks on a terminal and what an entry contains. Runs of the map are printed as they are found, so
memory does not grow with the disk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np
from rich.text import Text

import vhdkit
from vhdkit import Disk, Extent, ExtentKind, Progress
from vhdkit.chain.records.pending import files_of
from vhdkit.chain.verbs.create import replacing
from vhdkit.cli.common import PATH, Common, epilog, image_options, progress_option
from vhdkit.cli.output import console, is_unicode, print_text
from vhdkit.cli.picture import MAX_CELLS, Drawing, as_png, as_svg, colour_of, draw, glyph_of
from vhdkit.cli.progress import progress_shown
from vhdkit.cli.tally import UNOWNED, Tally, alike, tally
from vhdkit.errors import printable
from vhdkit.folder import NewFile
from vhdkit.jsontext import json_text
from vhdkit.units import GIB, SECTOR_SIZE, format_size, round_up

_MAX_ROWS = 8
_SLICE_BYTES = 4 * GIB
_MAX_SLICES = 4096  # of a raw file that claims exabytes
_LABEL_WIDTH = 11
_LEVELS, _ASCII_LEVELS = " ░▒▓█", " .:+#"
_LEVEL_BOUNDS = (0.25, 0.5, 0.95)  # the shares from which a lane shows the third, fourth and fifth level


@click.command(
    "map",
    epilog=epilog(
        "vhdkit map leaf.avhd", "vhdkit map leaf.avhd --json", "vhdkit map leaf.avhd --svg map.svg --png map.png"
    ),
)
@click.argument("image", type=PATH)
@click.option("--extents", is_flag=True, help="Print a table of all runs of sectors instead of the picture.")
@click.option("--svg", type=PATH, metavar="FILE", help="Write the picture as SVG.")
@click.option("--png", type=PATH, metavar="FILE", help="Write the picture as PNG (needs Pillow).")
@click.option("--force", is_flag=True, help="Replace an existing FILE.")
@image_options()
@progress_option
def map_command(
    image: str, extents: bool, svg: str | None, png: str | None, force: bool, common: Common, progress: bool | None,
) -> None:  # fmt: skip
    """Show which layer owns which part of the disk, exact to the sector.

    The picture on a terminal: every character stands for a piece of the disk and shows the number of the layer that
    owns most of it, or "·" for zeros; below, there is one lane per layer, leaf first, denser where it owns more.

    \b
    With --json: a list like qemu-img's, in order and without gaps, in bytes:
      [{"start", "length", "depth", "present", "zero", "data", "offset", "layer"}]
    "depth" counts layers from the leaf (0); "present" is false where no layer
    owns the run, which then reads as zeros; "zero" and "data" say what it holds;
    "offset" is where the data lies in the file that "layer" names (both are left
    out where there is none).
    """
    if common.json and extents:
        raise click.UsageError("--json and --extents cannot be combined")
    with vhdkit.open_disk(image, options=common.options) as disk:
        names = [layer.store.name for layer in disk.chain.layers]
        with progress_shown(common, progress, "scanning") as show:
            for path, write in ((svg, as_svg), (png, as_png)):
                if path is not None:
                    _write_picture(disk, path, write, force, show)
        for path in (svg, png):
            if path is not None and not common.json and not common.quiet:
                click.echo(f"wrote {printable(path)}")
        if common.json:
            _print_json(disk, names)
        elif extents:
            _print_table(disk, names)
        elif svg is None and png is None:
            with progress_shown(common, progress, "scanning") as show:
                counted = _tally(disk, _terminal_cells() * _MAX_ROWS, show)
            _print_picture(counted, names)


def _tally(disk: Disk, max_cells: int, progress: Progress | None) -> Tally:
    return tally(_slices(disk, progress), disk.size_bytes, len(disk.chain.layers), max_cells)


def _slices(disk: Disk, progress: Progress | None) -> Iterator[Extent]:
    """All runs, cut at slices of the disk so that progress can be reported between them."""
    slice_bytes = max(_SLICE_BYTES, round_up(disk.size_bytes // _MAX_SLICES, SECTOR_SIZE))
    for offset in range(0, disk.size_bytes, slice_bytes):
        yield from disk.extents(offset, min(slice_bytes, disk.size_bytes - offset), find_holes=True)
        if progress is not None:
            progress(offset, disk.size_bytes)


def _write_picture(
    disk: Disk, path: str, write: Callable[[Drawing], bytes], replace: bool, progress: Progress | None
) -> None:
    names = [printable(_short(layer.store.name)) for layer in disk.chain.layers]
    held = replacing(path, disk.chain.layers, replace=replace)
    like = files_of(disk.chain.layers)
    with held as old, NewFile(path, replace=replace, old=old, like=like) as new:
        new.store.pwrite(0, write(draw(_tally(disk, MAX_CELLS, progress), names)))
        new.commit()


def _short(name: str) -> str:
    return os.path.basename(name)


# -- as JSON and as a table ---------------------------------------------------------------------------------------


def entry(extent: Extent, names: list[str]) -> dict[str, Any]:
    """One run for JSON, in the form of `qemu-img map`, with the layer's file."""
    owned = extent.layer_index >= 0
    is_data = extent.kind is ExtentKind.DATA
    document: dict[str, Any] = {
        "start": extent.offset_bytes,
        "length": extent.size_bytes,
        "depth": extent.layer_index if owned else len(names) - 1,
        "present": owned,
        "zero": not is_data,
        "data": is_data,
    }
    if extent.store_offset_bytes is not None:
        document["offset"] = extent.store_offset_bytes
    if owned:
        document["layer"] = names[extent.layer_index]
    return document


def _print_json(disk: Disk, names: list[str]) -> None:
    separator = "["
    for extent in disk.extents(find_holes=True):
        sys.stdout.write(separator + json_text(entry(extent, names)))  # click.echo would flush each time
        separator = ",\n "
    sys.stdout.write("]\n")


def _print_table(disk: Disk, names: list[str]) -> None:
    click.echo(f"{'start':>14} {'length':>14} {'what':<5} {'offset in file':>14}  layer")
    for extent in disk.extents(find_holes=True):
        place = "" if extent.store_offset_bytes is None else f"{extent.store_offset_bytes:#x}"
        layer = (
            f"{extent.layer_index} {printable(_short(names[extent.layer_index]))}" if extent.layer_index >= 0 else "-"
        )
        print(f"{extent.offset_bytes:#14x} {extent.size_bytes:#14x} {extent.kind:<5} {place:>14}  {layer}")


# -- as a picture on the terminal ---------------------------------------------------------------------------------


def _terminal_cells() -> int:
    """Characters in a row: a power of two, so that rows begin at round places."""
    room = console().width - _LABEL_WIDTH - 2
    return 128 if room >= 128 else 64 if room >= 64 else 32


def _print_picture(counted: Tally, names: list[str]) -> None:
    screen = console()
    data_bytes = int(counted.data.sum())
    zeros = format_size(counted.size_bytes - data_bytes)
    print_text(
        (printable(names[0]), "bold"),
        f": {format_size(counted.size_bytes)} disk, {format_size(data_bytes)} data, {zeros} zeros",
    )
    row_cells = min(_terminal_cells(), counted.cell_count)
    for line in _grid(counted, row_cells):
        screen.print(line)
    print_text((f"{'':{_LABEL_WIDTH}} one character is {format_size(counted.cell_bytes)}; {_dot()} is zeros", "dim"))
    for layer, name in enumerate(names):
        for line in _legend(counted, layer, printable(_short(name)), row_cells):
            screen.print(line)


def _dot() -> str:
    return "·" if is_unicode() else "."


def _grid(counted: Tally, row_cells: int) -> Iterator[Text]:
    owners, full = counted.owners(), counted.fill() >= 0.5
    for first in range(0, counted.cell_count, row_cells):
        line = Text(f"{format_size(first * counted.cell_bytes):>{_LABEL_WIDTH}} ")
        last = min(first + row_cells, counted.cell_count)
        looks = owners[first:last] * 2 + full[first:last]
        for start, stop in alike(looks):
            owner = int(owners[first + start])
            if owner == UNOWNED:
                line.append(_dot() * (stop - start), "dim")
            else:
                colour = colour_of(owner)
                style = f"black on {colour}" if full[first + start] else colour
                line.append(glyph_of(owner) * (stop - start), style)
        yield line


def _legend(counted: Tally, layer: int, name: str, row_cells: int) -> Iterator[Text]:
    colour = colour_of(layer)
    words = f"{format_size(counted.data_bytes(layer))} data"
    if counted.zero_bytes[layer]:
        words += f", {format_size(counted.zero_bytes[layer])} zeros"
    yield Text.assemble(f"{'':{_LABEL_WIDTH}} ", (f"{layer} {name}", f"bold {colour}"), f"  {words}")
    levels = _LEVELS if is_unicode() else _ASCII_LEVELS
    share = counted.lane(layer, row_cells)
    level = np.where(share > 0, 1 + np.digitize(share, _LEVEL_BOUNDS), 0)
    picture = "".join(levels[one] for one in level.tolist())
    edge = "│" if is_unicode() else "|"
    yield Text.assemble(f"{'':{_LABEL_WIDTH - 1}} {edge}", (picture, colour), edge)
