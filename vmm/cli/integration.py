# SPDX-License-Identifier: Apache-2.0
"""`vmm agent` and `vmm kvp`: what a guest reports about itself, and the items that guest and host exchange.

Decides how these are shown. What they mean is decided in `vmm.api.guest_access`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from vmm.api.guest_access import FREEZE_SECONDS
from vmm.api.manager import Manager
from vmm.cli.common import (
    SECONDS,
    VerbGroup,
    epilog,
    output_options,
    print_aside,
    print_json,
    print_line,
    print_pairs,
    print_table,
)
from vmm.model.errors import InvalidSpec, printable

if TYPE_CHECKING:
    from vmm.model.guest import GuestInfo

MAX_INPUT_BYTES = 1 << 20  # limit for standard input, above what an item can hold


@click.group("agent", cls=VerbGroup)
def agent_command() -> None:
    """Query the agent inside a machine (qemu-guest-agent)."""


@agent_command.command("show", epilog=epilog("vmm agent show web"))
@click.argument("name")
@output_options
def show_agent(name: str, as_json: bool, quiet: bool) -> None:
    """Show heartbeat, operating system and addresses of the guest of the machine NAME."""
    info = Manager().guest(name).info()
    if as_json:
        print_json(asdict(info))
    elif not quiet:
        print_pairs(guest_pairs(info))


@agent_command.command("ping", epilog=epilog("vmm agent ping web && echo it lives"))
@click.argument("name")
@output_options
def ping(name: str, as_json: bool, quiet: bool) -> None:
    """Ask the guest of the machine NAME for a sign of life; exit code 0 if it answers."""
    beat = Manager().guest(name).ping()
    if as_json:
        print_json(asdict(beat))
    elif not quiet:
        print_line(f"{name}: the guest answers")


@agent_command.command("freeze", epilog=epilog("vmm agent freeze web && copy-the-disks && vmm agent thaw web"))
@click.argument("name")
@click.option(
    "--seconds",
    type=SECONDS,
    default=FREEZE_SECONDS,
    show_default=True,
    help="The file systems thaw by themselves after this time.",
)
@output_options
def freeze(name: str, seconds: float, as_json: bool, quiet: bool) -> None:
    """Flush and freeze the file systems of the guest of the machine NAME, for a copy of its disks."""
    count = Manager().guest(name).freeze(seconds)
    if as_json:
        print_json({"count": count, "max_seconds": seconds})
    elif not quiet:
        print_line(f"{name}: {_file_systems(count)} frozen for at most {seconds:g} s")


@agent_command.command("thaw", epilog=epilog("vmm agent thaw web"))
@click.argument("name")
@output_options
def thaw(name: str, as_json: bool, quiet: bool) -> None:
    """Thaw the file systems that `freeze` froze; fails if they thawed earlier, so that a copy is not of one moment."""
    count = Manager().guest(name).thaw()
    if as_json:
        print_json({"count": count})
    elif not quiet:
        print_line(f"{name}: {_file_systems(count)} thawed")


@agent_command.command("set-time", epilog=epilog("vmm agent set-time web"))
@click.argument("name")
@output_options
def set_time(name: str, as_json: bool, quiet: bool) -> None:
    """Set the clock of the guest of the machine NAME to the host's."""
    Manager().guest(name).set_time()
    if as_json:
        print_json({})
    elif not quiet:
        print_line(f"{name}: the guest's clock is set")


@click.group("kvp", cls=VerbGroup)
def kvp_command() -> None:
    """Exchange short texts with a machine's guest (key-value data exchange).

    The host's items are set here and read in the guest; the guest's items are set there and read here. Items are kept
    while the machine is off.
    """


@kvp_command.command("list", epilog=epilog("vmm kvp list web"))
@click.argument("name")
@output_options
def list_items(name: str, as_json: bool, quiet: bool) -> None:
    """List all items of the machine NAME, the guest's and the host's."""
    items = Manager().guest(name).items()
    if as_json:
        print_json(items)
        return
    rows = [(pool, key, value) for pool in ("guest", "host") for key, value in items[pool].items()]
    if quiet:
        return
    if rows:
        print_table(("SET BY", "KEY", "VALUE"), rows)
    else:
        print_aside(f"{name}: nothing has been exchanged")


@kvp_command.command("get", epilog=epilog("vmm kvp get web address"))
@click.argument("name")
@click.argument("key")
@click.option(
    "--pool", type=click.Choice(["guest", "host"]), help="Whose item; by default the guest's, then the host's."
)
@output_options
def get_item(name: str, key: str, pool: str | None, as_json: bool, quiet: bool) -> None:
    """Print the value of the item KEY of the machine NAME."""
    item = Manager().guest(name).get_item(key, pool)
    if as_json:
        print_json({"key": key, **asdict(item)})
    elif sys.stdout.isatty():
        # Control characters from a guest must not reach the terminal.
        click.echo("\n".join(printable(line) for line in item.value.split("\n")))
    elif not quiet:
        click.echo(item.value)


@kvp_command.command("set", epilog=epilog("vmm kvp set web role database", "vmm kvp set web key - < id.pub"))
@click.argument("name")
@click.argument("key")
@click.argument("value")
@output_options
def set_item(name: str, key: str, value: str, as_json: bool, quiet: bool) -> None:
    """Set the host's item KEY of the machine NAME to VALUE (- for standard input)."""
    if value == "-":
        try:
            value = sys.stdin.buffer.read(MAX_INPUT_BYTES).decode()
        except UnicodeDecodeError:
            raise InvalidSpec("the value on standard input is not valid UTF-8") from None
    _report(name, Manager().guest(name).set_item(key, value), as_json, quiet)


@kvp_command.command("delete", epilog=epilog("vmm kvp delete web role"))
@click.argument("name")
@click.argument("key")
@output_options
def delete_item(name: str, key: str, as_json: bool, quiet: bool) -> None:
    """Remove the host's item KEY of the machine NAME."""
    _report(name, Manager().guest(name).delete_item(key), as_json, quiet)


def _report(name: str, taken: bool, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({"taken": taken})
    elif not quiet:
        print_line(
            f"{name}: done, and the guest has received it"
            if taken
            else f"{name}: done; the guest will receive it later"
        )


def _file_systems(count: int) -> str:
    return "1 file system" if count == 1 else f"{count} file systems"


def guest_pairs(info: GuestInfo) -> list[tuple[str, str]]:
    """Names and texts that describe a guest."""
    seen = info.seen_seconds_ago
    pairs = [("heartbeat", info.heartbeat + ("" if seen is None else f" ({seen:g} s ago)"))]
    if (system := info.os) is not None:
        words = " ".join(part for part in (system.name, system.version) if part)
        kernel = f" (kernel {system.kernel})" if system.kernel else ""
        pairs.append(("guest system", words + kernel))
        pairs.append(("guest name", system.host_name))
    for interface in info.interfaces:
        addresses = ", ".join(interface.addresses) or "no address"
        pairs.append(("guest address", f"{addresses} on {interface.name} ({interface.mac})"))
    return pairs
