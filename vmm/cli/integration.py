# SPDX-License-Identifier: Apache-2.0
"""`vmm agent` and `vmm kvp`: what a machine's guest says of itself, and what the two sides leave for each other.

Decides how this is shown. What it means is in `vmm.guest_access`.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from vmm.cli.common import manager, print_json
from vmm.errors import InvalidSpec, printable
from vmm.guest_access import FREEZE_SECONDS

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def agent() -> None:
    """Ask a machine's guest agent (qemu-guest-agent in the guest)."""


@agent.command("show")
@click.argument("machine")
@json_option
def show_agent(machine: str, as_json: bool) -> None:
    """Heartbeat, operating system and addresses of MACHINE's guest."""
    info = manager().guest(machine).info()
    if as_json:
        print_json(info)
        return
    for name, text in guest_lines(info):
        click.echo(f"{name:<11}{text}")


@agent.command()
@click.argument("machine")
@json_option
def ping(machine: str, as_json: bool) -> None:
    """Ask MACHINE's guest for a sign of life; exit code 0 when it came."""
    beat = manager().guest(machine).ping()
    if as_json:
        print_json(beat)
    else:
        click.echo(f"{machine}: the guest answers")


@agent.command()
@click.argument("machine")
@click.option(
    "--seconds", type=float, default=FREEZE_SECONDS, show_default=True, help="They thaw by themselves after so long."
)
@json_option
def freeze(machine: str, seconds: float, as_json: bool) -> None:
    """Write out and freeze the file systems of MACHINE's guest, for a copy of its disks.

    \b
    Example: vmm agent freeze web && copy-the-disks; vmm agent thaw web
    """
    count = manager().guest(machine).freeze(seconds)
    if as_json:
        print_json({"count": count, "max_seconds": seconds})
    else:
        click.echo(f"{machine}: {_file_systems(count)} frozen for at most {seconds:g} s")


@agent.command()
@click.argument("machine")
@json_option
def thaw(machine: str, as_json: bool) -> None:
    """Thaw them again; fails when they had to thaw before, so that the copy is not of one moment."""
    count = manager().guest(machine).thaw()
    if as_json:
        print_json({"count": count})
    else:
        click.echo(f"{machine}: {_file_systems(count)} thawed")


@agent.command("set-time")
@click.argument("machine")
def set_time(machine: str) -> None:
    """Set the clock of MACHINE's guest to the host's."""
    manager().guest(machine).set_time()
    click.echo(f"{machine}: the guest's clock is set")


@click.group()
def kvp() -> None:
    """Exchange small texts with a machine's guest (key-value data exchange).

    The host's items are set here and read in the guest, the guest's are set there and read here. They are kept while
    the machine is off.
    """


@kvp.command("list")
@click.argument("machine")
@json_option
def list_items(machine: str, as_json: bool) -> None:
    """All items of MACHINE, the guest's and the host's."""
    items = manager().guest(machine).items()
    if as_json:
        print_json(items)
        return
    rows = [
        (pool, printable(key), printable(value)) for pool in ("guest", "host") for key, value in items[pool].items()
    ]
    if not rows:
        click.echo(f"{machine}: nothing has been exchanged")
        return
    width = max(len(key) for _, key, _ in rows)
    click.echo(f"{'set by':<8}{'key':<{width}}  value")
    for pool, key, value in rows:
        click.echo(f"{pool:<8}{key:<{width}}  {value}")


@kvp.command("get")
@click.argument("machine")
@click.argument("key")
@click.option("--pool", type=click.Choice(["guest", "host"]), help="Whose item; else the guest's, then the host's.")
@json_option
def get_item(machine: str, key: str, pool: str | None, as_json: bool) -> None:
    """Print the value of MACHINE's item KEY."""
    value, found_in = manager().guest(machine).get_item(key, pool)
    if as_json:
        print_json({"key": key, "value": value, "pool": found_in})
    elif sys.stdout.isatty():
        # What a guest sets must not reach into the terminal.
        click.echo("\n".join(printable(line) for line in value.split("\n")))
    else:
        click.echo(value)


@kvp.command("set")
@click.argument("machine")
@click.argument("key")
@click.argument("value")
@json_option
def set_item(machine: str, key: str, value: str, as_json: bool) -> None:
    """Set the host's item KEY of MACHINE to VALUE (- for standard input)."""
    if value == "-":
        try:
            value = sys.stdin.buffer.read(1 << 20).decode()
        except UnicodeDecodeError:
            raise InvalidSpec("the value on standard input is no text in UTF-8") from None
    _told(machine, manager().guest(machine).set_item(key, value), as_json)


@kvp.command("delete")
@click.argument("machine")
@click.argument("key")
@json_option
def delete_item(machine: str, key: str, as_json: bool) -> None:
    """Remove the host's item KEY of MACHINE."""
    _told(machine, manager().guest(machine).delete_item(key), as_json)


def _told(machine: str, taken: bool, as_json: bool) -> None:
    if as_json:
        print_json({"taken": taken})
    elif taken:
        click.echo(f"{machine}: done, and the guest knows")
    else:
        click.echo(f"{machine}: done; the guest will be told when it takes part")


def _file_systems(count: int) -> str:
    return "1 file system" if count == 1 else f"{count} file systems"


def guest_lines(info: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each line about a guest, from `GuestAccess.info` or the guest of `vmm show`."""
    seen = info.get("seen_seconds_ago")
    lines = [("heartbeat", info["heartbeat"] + ("" if seen is None else f" ({seen:g} s ago)"))]
    system = info.get("os")
    if system:
        words = " ".join(part for part in (system["name"], system["version"]) if part)
        kernel = f" ({system['kernel']})" if system["kernel"] else ""
        lines.append(("system", printable(words + kernel) or "unknown"))
        lines.append(("host name", printable(system["host_name"]) or "unknown"))
    for interface in info.get("interfaces", ()):
        addresses = ", ".join(interface["addresses"]) or "no address"
        lines.append(("address", printable(f"{addresses} on {interface['name']} ({interface['mac']})")))
    return lines
