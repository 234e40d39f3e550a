# SPDX-License-Identifier: Apache-2.0
"""What the verbs share: options, sizes, tables, JSON, and a progress line.

Decides layout and style, not content. All text from outside passes through `printable`.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

import vhdkit
from vhdkit import json_text
from vmm.cli.progress import ProgressText
from vmm.model.errors import printable

if TYPE_CHECKING:
    from vmm.processes.answers import Started

    AnyType = click.ParamType[Any]
else:
    AnyType = click.ParamType  # not a generic class before click 8.4

Verb = TypeVar("Verb", bound=Callable[..., Any])
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_AGE = re.compile(r"([0-9]{1,6})([mhdw])")
_AGE_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_COLOURS = {
    "running": "green", "paused-critical": "red", "paused": "yellow", "saved": "cyan", "starting": "green",
    "stopping": "yellow",
}  # fmt: skip


class SizeType(AnyType):
    """A size in bytes: 512, 64K, 1.5G, 2TiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is not a size: write 512M, 4G or 1.5T", param, ctx)
        return int(float(found[1]) * _FACTORS[found[2].upper()])


class DiskSizeType(AnyType):
    """The size of a disk, rounded up to whole sectors."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> vhdkit.DiskSize:
        """The size in bytes; if it was rounded, with the size that was given."""
        try:
            return vhdkit.parse_disk_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class SecondsType(AnyType):
    """A duration: a number above 0. NaN and infinity are refused."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number of seconds."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if not math.isfinite(seconds) or seconds <= 0:
            self.fail(f"{value!r} is not a number of seconds above 0", param, ctx)
        return seconds


class AgeType(AnyType):
    """A length of time: 90m, 26h, 8d, 5w."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """The length of time."""
        if isinstance(value, timedelta):
            return value
        found = _AGE.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is not an age: write 90m, 26h, 8d or 5w", param, ctx)
        return timedelta(seconds=int(found[1]) * _AGE_SECONDS[found[2]])


AGE = AgeType()
SIZE = SizeType()
DISK_SIZE = DiskSizeType()
SECONDS = SecondsType()


def format_size(size_bytes: int | None) -> str:
    """ "512.0 MiB"; "-" if the size is unknown."""
    if size_bytes is None:
        return "-"
    amount, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{size_bytes} B" if unit == "B" else f"{amount:.1f} {unit}"


def output_options(verb: Verb) -> Verb:
    """`--json` and `--quiet`."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
        click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON document; an error is printed as JSON, too."
        ),
    ):
        verb = option(verb)
    return verb


class VerbGroup(click.Group):
    """A group whose help shows whole sentences for its verbs; click would cut them off."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None:
                rows.append((name, command.get_short_help_str(limit=1000)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without a verb, show the help, as the program without arguments does."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)


def epilog(*examples: str) -> str:
    """The examples at the end of a verb's help."""
    return "\b\n" + "\n".join(["Examples:" if len(examples) > 1 else "Example:", *(f"  {one}" for one in examples)])


def print_json(document: object) -> None:
    """Print one document on standard output."""
    click.echo(json_text(document, indent=2))


def print_line(text: str) -> None:
    """Print one line on standard output."""
    click.echo(printable(text))


def print_aside(text: str) -> None:
    """Print a line that is not an error on standard error. If that fails, the verb continues."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(printable(text), err=True)


def print_disconnected(started: Started) -> None:
    """Print a line for each adapter that is connected to no switch."""
    for one in started.disconnected:
        print_line(f"{one.adapter} is disconnected: {one.problem}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, states: int | None = None) -> None:
    """Print aligned columns; on a terminal, the column with index `states` is coloured by state."""
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        padded[-1] = padded[-1].rstrip()
        if number == 0:
            padded = [click.style(cell, dim=True) for cell in padded]
        elif states is not None:
            padded[states] = click.style(padded[states], fg=_COLOURS.get(row[states]))
        click.echo("  ".join(padded))


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns; pairs with an empty value are left out."""
    pairs = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(f"{click.style(name.ljust(width), dim=True)}  {printable(value)}")


@contextlib.contextmanager
def progress_line(*, shown: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows progress on one line of a terminal; the line is erased at the end."""
    is_on = shown and sys.stderr.isatty()
    words = ProgressText(format_size)
    width = 0

    def show(document: dict[str, Any]) -> None:
        nonlocal width
        step = printable(str(document.get("step", "")))
        # never more than one line
        text = words.text({**document, "step": step}, shutil.get_terminal_size().columns - 1)
        _show_on_terminal("\r" + text.ljust(width))
        width = len(text)

    try:
        yield show if is_on else lambda document: None
    finally:
        if width:
            _show_on_terminal("\r" + " " * width + "\r")


def _show_on_terminal(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the verb continues without a terminal
        sys.stderr.write(text)
        sys.stderr.flush()


def confirm(question: str, *, yes: bool) -> None:
    """Ask for confirmation on a terminal; without a terminal --yes is needed. Raises Abort, UsageError."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("nothing was done: confirm with --yes")
    click.confirm(question, abort=True, err=True)
