# SPDX-License-Identifier: Apache-2.0
"""`events` and `logs`: what happened to a machine, and what its programs wrote."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from vhdkit import json_text
from vmm.api.manager import Manager
from vmm.cli.common import epilog, output_options, print_json, print_line
from vmm.model.errors import of_os_error, printable
from vmm.model.events import Event, Followed

_LOGS = ("worker", "keeper", "qemu", "disks", "console")
_LOOK_SECONDS = 0.2  # for a reader, for hours
_FOLLOW_HELP = "Keep printing new events until Ctrl-C, or the machine is deleted."


@click.command("events", epilog=epilog("vmm events web", "vmm events web --follow", "vmm events web --json --follow"))
@click.argument("name")
@click.option("--follow", "-f", is_flag=True, help="Keep printing new events until Ctrl-C or the machine is deleted.")
@output_options
def events_command(name: str, follow: bool, as_json: bool, quiet: bool) -> None:
    """Show what happened to the machine NAME, oldest first.

    With --json: one list; with --json --follow: one object per line: {"time_unix_seconds", "event", ...its fields}.
    """
    manager = Manager()
    if as_json and not follow:
        print_json([event_document(event) for event in manager.events(name)])
        return
    for event in _flushed(manager.follow_events(name, past=True) if follow else iter(manager.events(name))):
        if as_json:
            click.echo(json_text(event_document(event)))
        elif not quiet:
            print_line(event_words(event))


def event_document(event: Event) -> dict[str, Any]:
    """An event as JSON; the key of its time names the unit."""
    found = {} if event.time is None else {"time_unix_seconds": event.time}
    details = {("time_unix_seconds" if key == "time" else key): value for key, value in event.details.items()}
    return {**found, "event": event.name, **details}


def _flushed(events: Iterator[Event | None]) -> Iterator[Event]:
    """The events; printed output is flushed while nothing happens."""
    for event in events:
        if event is not None:
            yield event
        else:
            sys.stdout.flush()  # for readers at the other end of a pipe


def _words(value: object) -> str:
    if isinstance(value, list):
        return " and ".join(str(one) for one in value) or "none"
    return str(value)


def event_words(event: Event) -> str:
    """An event on one line."""
    moment = event.details.get("time", 0) if event.time is None else event.time
    try:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(moment)))
    except (ValueError, TypeError, OverflowError, OSError):  # the file was edited by hand
        when = f"{moment}"
    details = ", ".join(f"{key}: {_words(value)}" for key, value in event.details.items() if key != "time")
    return f"{when}  {event.name}" + (f"  ({details})" if details else "")


@click.command("logs", epilog=epilog("vmm logs web", "vmm logs web --of console", "vmm logs web --of qemu --follow"))
@click.argument("name")
@click.option("--of", "log", type=click.Choice(_LOGS), help="Only the log of this program.")
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Keep printing new lines until Ctrl-C or the machine is deleted.",
)
@click.option(
    "--lines",
    "-n",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="How many lines at the end of each log.",
)
@output_options
def logs_command(name: str, log: str | None, follow: bool, lines: int, as_json: bool, quiet: bool) -> None:
    """Show the logs of the machine NAME: of its worker, its supervisor, QEMU, and its disk server.

    `--of console` is what the guest wrote to its serial console. With --json: {program: {"path", "lines"}}.
    """
    manager = Manager()
    wanted = [log] if log is not None else [one for one in _LOGS if one != "console"]
    paths = {one: manager.log_path(name, one) for one in wanted}  # type: ignore[arg-type]
    if follow and len(wanted) != 1:
        raise click.UsageError("--follow needs --of PROGRAM")
    found = {one: _tail(path, lines) for one, path in paths.items()}
    if as_json:
        print_json({one: {"path": paths[one], "lines": found[one]} for one in wanted})
        return
    if quiet:
        return
    for one in wanted:
        if len(wanted) > 1:
            click.echo(click.style(f"{one}: {printable(paths[one])}", dim=True))
        for line in found[one]:
            print_line(line)
    if follow:
        for line in _following(paths[wanted[0]]):
            print_line(line)


def _tail(path: str, count: int) -> list[str]:
    """The last lines of a log; none if the log does not exist."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - (1 << 20)))
            lines = [line.decode(errors="replace") for line in file.read().splitlines()]
            return lines[len(lines) - count :] if count < len(lines) else lines
    except FileNotFoundError:
        return []
    except OSError as error:
        raise of_os_error(error, "read the log", path=path) from error


def _following(path: str) -> Iterator[str]:
    """New lines as they are written, also after the log is rotated, until the machine is deleted."""
    position = None
    rest = b""
    try:
        followed = Followed(path)
    except OSError as error:
        raise of_os_error(error, "read the log", path=path) from error
    with followed:
        while not followed.is_gone():
            try:
                with followed.open() as file:
                    end = file.seek(0, 2)
                    position = end if position is None else 0 if end < position else position
                    file.seek(position)
                    data = file.read()
            except FileNotFoundError:
                data, position = b"", 0
            except OSError as error:
                raise of_os_error(error, "read the log", path=path) from error
            position += len(data)
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace").rstrip("\r")
            sys.stdout.flush()  # for readers at the other end of a pipe
            time.sleep(_LOOK_SECONDS)  # until Ctrl-C
