# SPDX-License-Identifier: Apache-2.0
"""What is printed, and how it looks: JSON documents, aligned lines, colours on a terminal.

Decides layout and style, nothing about content. Names that come from images are untrusted: every text passes through
`printable`, and no text is interpreted as markup.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from vhdkit import Finding, Severity
from vhdkit.cli.common import Common, print_aside
from vhdkit.cli.styled import Part, line_of
from vhdkit.errors import printable
from vhdkit.jsontext import json_text
from vhdkit.units import KIB, SECTOR_SIZE, DiskSize, format_size

if TYPE_CHECKING:  # imported for pictures and bars only: it takes long
    from rich.console import Console

STYLE_OF = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


def console(*, stderr: bool = False) -> Console:
    """A console for plain text: no markup, no guessed colours, no wrapping. Honours NO_COLOR and pipes."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def is_unicode() -> bool:
    """True when standard output can show line-drawing characters."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def print_json(document: object) -> None:
    """One document on standard output."""
    click.echo(json_text(document, indent=2))


def print_text(*parts: Part) -> None:
    """One line; a part is text or (text, style)."""
    click.echo(line_of(parts), color=True)  # whether there are colours is decided already


def print_pairs(pairs: Iterable[tuple[str, str]], indent: str = "  ") -> None:
    """Names and values in two columns."""
    rows = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print_text(indent, (name.ljust(width), "dim"), "  ", printable(value))


def columns(rows: Sequence[Sequence[str]], align: str = "") -> list[str]:
    """Rows as lines with aligned columns; `align` has an "r" for each column that is aligned right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    kinds = align.ljust(len(widths), "l")
    return [
        "  ".join(
            cell.rjust(width) if kind == "r" else cell.ljust(width)
            for cell, width, kind in zip(row, widths, kinds, strict=False)
        ).rstrip()
        for row in rows
    ]


def print_finding(finding: Finding) -> None:
    """One finding on one line, its severity first."""
    name = finding.severity.name.lower()
    print_text((f"{name}:".ljust(9), STYLE_OF[finding.severity]), printable(str(finding)))


def finding_document(finding: Finding) -> dict[str, Any]:
    """A finding for JSON."""
    return {
        "severity": finding.severity.name.lower(),
        "code": finding.code,
        "message": finding.message,
        "path": finding.path,
        "structure": finding.structure,
        "offset_bytes": finding.offset_bytes,
    }


def note(common: Common, text: str) -> None:
    """Print a note, which is not an error, on standard error."""
    if not common.quiet and not common.json:
        print_aside(f"vhdkit: note: {text}")


def note_rounding(common: Common, size: DiskSize | None) -> None:
    """Note that a disk is larger than requested, because the request was not a whole number of sectors."""
    if size is not None and size.asked:
        note(common, rounding(size))


def rounding(size: DiskSize) -> str:
    """The sentence about a size that was rounded up."""
    return f"{size.asked} is not a whole number of {SECTOR_SIZE}-byte sectors: rounded up to {int(size)} bytes"


def exact_size(size_bytes: int) -> str:
    """ "10.0 GiB (10737418240 bytes)"."""
    return format_size(size_bytes) if size_bytes < KIB else f"{format_size(size_bytes)} ({size_bytes} bytes)"


def count(number: int, noun: str) -> str:
    """ "1 block", "2 blocks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
