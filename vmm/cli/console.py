# SPDX-License-Identifier: Apache-2.0
"""`vmm console` and `vmm screen`: using a machine's serial console, and seeing its screen.

Decides what users see when they connect and disconnect, and which viewer is started if a display exists. How a
terminal is connected is decided in `terminal`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import click

from vmm.api.guest_access import GuestAccess
from vmm.api.manager import Manager
from vmm.cli.common import SECONDS, epilog, output_options, print_aside, print_json, print_line
from vmm.cli.terminal import Ended, Join
from vmm.model.errors import InvalidSpec, TimedOut, VmmError

if TYPE_CHECKING:
    from vmm.kvm.console import Typing


@click.command(
    "console",
    epilog=epilog(
        "vmm console web",
        "echo 'systemctl status' | vmm console web",
        "vmm console web --expect 'login:' --timeout 60 </dev/null",
    ),
)
@click.argument("name")
@click.option("--no-scrollback", is_flag=True, help="Do not show earlier output.")
@click.option(
    "--log", "wants_log", is_flag=True, help="Print the recorded output and exit; works while the machine is off, too."
)
@click.option("--watch", is_flag=True, help="Only watch; send no input.")
@click.option("--shared", is_flag=True, help="Share the keyboard with all who use --shared.")
@click.option("--take", is_flag=True, help="Take over the keyboard from its present user.")
@click.option("--expect", metavar="TEXT", help="Exit when the guest has printed TEXT.")
@click.option(
    "--timeout", type=SECONDS, metavar="SECONDS", help="Exit after this time; with --expect, with exit code 9."
)
def console_command(
    name: str,
    no_scrollback: bool,
    wants_log: bool,
    watch: bool,
    shared: bool,
    take: bool,
    expect: str | None,
    timeout: float | None,
) -> None:
    """Connect this terminal to the serial console of the machine NAME. Ctrl-] disconnects; the machine keeps running.

    Any number of terminals can watch; one can type. If standard input is not a terminal, it is sent as it is, and the
    command exits when the input has been sent and the guest has been silent for a second.
    """
    if watch + shared + take > 1:
        raise InvalidSpec("--watch, --shared and --take are mutually exclusive")
    if expect == "":
        raise InvalidSpec("--expect needs a text to wait for")
    guest = Manager().guest(name)
    if wants_log:
        sys.stdout.buffer.write(guest.console_log())
        sys.stdout.buffer.flush()
        return
    typing: Typing = "never" if watch else "shared" if shared else "take" if take else "alone"
    ended = _join(guest, name, typing, no_scrollback=no_scrollback, expect=expect, timeout=timeout)
    if ended is Ended.TIMED_OUT and expect is not None:
        raise TimedOut(f"the guest did not print {expect!r} within {timeout:g} s", machine=name)
    if ended is Ended.CONSOLE_GONE:
        if expect is not None:
            raise VmmError(f"the console ended before the guest printed {expect!r}", machine=name)
        print_aside(f"{name}: the console ended: the machine is off")


def _join(
    guest: GuestAccess, name: str, typing: Typing, *, no_scrollback: bool, expect: str | None, timeout: float | None
) -> Ended:
    is_terminal = sys.stdin.isatty()

    def connect(is_again: bool) -> socket.socket:
        size = 0 if is_again or no_scrollback else None
        console = guest.open_console(typing=typing, scrollback_bytes=size)
        if not is_again:
            if not console.may_type and typing != "never":
                print_aside(
                    f"{name}: the keyboard is in use; this terminal only watches (to type: --take, or --shared"
                    " in both)"
                )
            elif is_terminal:
                print_aside(f"{name}: connected to the console; Ctrl-] disconnects")
        return console.link

    join = Join(
        connect, sys.stdin.fileno(), sys.stdout.fileno(), expect=None if expect is None else expect.encode(),
        timeout_seconds=timeout, is_coming_back=guest.has_console,
    )  # fmt: skip
    ended = join.run()
    if is_terminal:
        print_aside("")
    return ended


@click.command("screen", epilog=epilog("vmm screen web", "vmm screen web --png web.png"))
@click.argument("name")
@click.option("--png", metavar="FILE", help="Write a picture to FILE (- for standard output).")
@click.option("--no-viewer", is_flag=True, help="Only print where the screen can be reached.")
@output_options
def screen_command(name: str, png: str | None, no_viewer: bool, as_json: bool, quiet: bool) -> None:
    """Look at the screen of the machine NAME: over VNC with keyboard and mouse, or with --png as a picture.

    A viewer is started if one is installed and a display exists; with --json none is started.
    """
    guest = Manager().guest(name)
    if png is not None:
        size = _take_picture(guest, png)
        if as_json and png != "-":
            print_json({"name": name, "path": png, "size_bytes": size})
        elif not quiet and png != "-":
            print_line(f"{png}: a picture of {size} bytes")
        return
    path = guest.vnc_socket()
    if as_json:
        print_json({"name": name, "vnc_socket": path})
        return
    from vmm.kvm.screen import viewer_command, viewers

    found = {one: program for one in viewers() if (program := shutil.which(one)) is not None}
    command = viewer_command(path, found)
    has_display = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if command is not None and has_display and not no_viewer:
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        words = [f"started {command[0]}"]
    else:
        install = "" if command else "   (sudo apt install virt-viewer)"
        command = command or viewer_command(path, {viewers()[0]: viewers()[0]}) or []
        words = [
            f"the screen is a VNC server on the socket {path}",
            f"from this computer:       {' '.join(command)}{install}",
            f"from another computer:  ssh -N -L 5901:{path} {_user()}@{os.uname().nodename}",
            "                        and there connect a VNC viewer to localhost:5901",
        ]
    if not quiet:
        for line in words:
            print_line(line)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # the user id has no name
        return str(os.geteuid())


def _take_picture(guest: GuestAccess, path: str) -> int:
    """Write a picture to the file, completely or not at all; returns its size in bytes."""
    picture = guest.screen()
    if path == "-":
        sys.stdout.buffer.write(picture)
        sys.stdout.buffer.flush()
    elif os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe is written to, not replaced
        with open(path, "wb") as file:
            file.write(picture)
    else:
        from vmm.model.paths import write_whole

        write_whole(os.path.realpath(path), picture, mode=0o644, durable=False)
    return len(picture)
