# SPDX-License-Identifier: Apache-2.0
"""`vmm console` and `vmm screen`: at a machine's serial console, and a look at its screen.

Decides what people are told when they come and when they leave, and which viewer is started where there is a display.
How a terminal is joined is in `terminal`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import click

from vmm.cli.common import manager, print_json
from vmm.cli.terminal import Ended, Join
from vmm.errors import InvalidSpec, TimedOut, VmmError
from vmm.guest_access import GuestAccess


@click.command()
@click.argument("machine")
@click.option("--no-scrollback", is_flag=True, help="Do not show what was said before.")
@click.option(
    "--log", "wants_log", is_flag=True, help="Print what is kept of the past, and end; works when it is off."
)
@click.option("--watch", is_flag=True, help="Only look; nothing is typed.")
@click.option("--shared", is_flag=True, help="Type together with others who share.")
@click.option("--take", is_flag=True, help="Take the keyboard from whoever has it.")
@click.option("--expect", metavar="TEXT", help="End when the guest has said this.")
@click.option("--timeout", type=float, metavar="SECONDS", help="End after so long; exit code 9 with --expect.")
def console(
    machine: str,
    no_scrollback: bool,
    wants_log: bool,
    watch: bool,
    shared: bool,
    take: bool,
    expect: str | None,
    timeout: float | None,
) -> None:
    """Join this terminal to MACHINE's serial console. Ctrl-] leaves; the machine runs on.

    Many may watch, one types. Without a terminal the input is sent as it is, and the command ends when that is used up
    and the guest has been quiet for a second.

    \b
    Example: vmm console web
             echo 'systemctl status' | vmm console web
             vmm console web --expect 'login:' --timeout 60 </dev/null
    """
    if watch + shared + take > 1:
        raise InvalidSpec("--watch, --shared and --take exclude each other")
    if timeout is not None and timeout <= 0:
        raise InvalidSpec("--timeout wants a number above 0")
    if expect == "":
        raise InvalidSpec("--expect wants a text")
    guest = manager().guest(machine)
    if wants_log:
        sys.stdout.buffer.write(guest.console_log())
        sys.stdout.buffer.flush()
        return
    _join(guest, machine, watch=watch, shared=shared, take=take, no_scrollback=no_scrollback, expect=expect,
          timeout=timeout)  # fmt: skip


def _join(
    guest: GuestAccess,
    machine: str,
    *,
    watch: bool,
    shared: bool,
    take: bool,
    no_scrollback: bool,
    expect: str | None,
    timeout: float | None,
) -> None:
    is_terminal = sys.stdin.isatty()
    typing = "never" if watch else "shared" if shared else "take" if take else "alone"

    def connect(is_again: bool):  # type: ignore[no-untyped-def]
        link, may_type = guest.open_console(
            typing=typing, scrollback_bytes=0 if is_again or no_scrollback else None  # type: ignore[arg-type]
        )  # fmt: skip
        if not is_again and not may_type and not watch:
            click.echo(f"{machine}: somebody else types; this only shows (--shared or --take to type)", err=True)
        return link

    if is_terminal:
        click.echo(f"{machine}: this is its console; Ctrl-] leaves", err=True)
    join = Join(
        connect, sys.stdin.fileno(), sys.stdout.fileno(), expect=None if expect is None else expect.encode(),
        timeout_seconds=timeout, is_coming_back=guest.has_console,
    )  # fmt: skip
    ended = join.run()
    if is_terminal:
        click.echo("", err=True)
    if ended is Ended.TIMED_OUT and expect is not None:
        raise TimedOut(f"the guest did not say {expect!r} within {timeout:g} s", machine=machine)
    if ended is Ended.CONSOLE_GONE:
        if expect is not None:
            raise VmmError(f"the console ended before the guest said {expect!r}", machine=machine)
        click.echo(f"{machine}: the console ended: the machine is off", err=True)


@click.command()
@click.argument("machine")
@click.option("--png", metavar="FILE", help="Take a picture and put it there (- for standard output).")
@click.option("--no-viewer", is_flag=True, help="Only say where the screen is.")
@click.option("--json", "as_json", is_flag=True, help="Say it as JSON, and start no viewer.")
def screen(machine: str, png: str | None, no_viewer: bool, as_json: bool) -> None:
    """Look at MACHINE's screen: by VNC with keyboard and mouse, or a picture of it with --png.

    \b
    Example: vmm screen web
             vmm screen web --png web.png
    """
    guest = manager().guest(machine)
    if png is not None:
        _take_picture(guest, png)
        return
    path = guest.vnc_socket()
    if as_json:
        print_json({"machine": machine, "vnc_socket": path})
        return
    from vmm.kvm.screen import viewer_command, viewers

    found = {name: program for name in viewers() if (program := shutil.which(name)) is not None}
    command = viewer_command(path, found)
    has_display = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if command is not None and has_display and not no_viewer:
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        click.echo(f"started {command[0]}")
        return
    click.echo(f"the screen is a VNC server on the socket {path}")
    hint = command or viewer_command(path, {name: name for name in viewers()}) or []
    click.echo(f"look at it here:           {' '.join(hint)}")
    click.echo(f"from another computer:     ssh -N -L 5901:{path} {_user()}@{os.uname().nodename}")
    click.echo("                           and there a VNC viewer on localhost:5901")


def _take_picture(guest: GuestAccess, path: str) -> None:
    picture = guest.screen()
    if path == "-":
        sys.stdout.buffer.write(picture)
        sys.stdout.buffer.flush()
        return
    from vmm.paths import write_whole

    write_whole(path, picture, mode=0o644, durable=False)
    click.echo(f"{path}: {len(picture)} bytes")


def _user() -> str:
    return os.environ.get("USER") or "root"
