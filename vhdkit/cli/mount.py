# SPDX-License-Identifier: Apache-2.0
"""`mount`, `umount`, `mounts`: an image as files, or the files in it.

Decides which options exclude each other, what the options of /etc/fstab mean, what is printed, and that `--foreground`
unmounts properly after Ctrl-C. How mounts are made and removed is decided in `vhdkit.serve.mount.mounting`.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import click

import vhdkit
from vhdkit.cli.background import start
from vhdkit.cli.common import PATH, Common, epilog, image_options
from vhdkit.cli.failure import Interrupted, WarningLines, show_log
from vhdkit.cli.output import columns, note, print_json, print_text
from vhdkit.cli.unmeant import unmeant_ignored
from vhdkit.errors import printable, quoted
from vhdkit.folder import exists
from vhdkit.serve.mount.mounting import Mounted, MountRequest, mount
from vhdkit.serve.mount.unmounting import Listed, listed, umount
from vhdkit.serve.opening import OpenMode
from vhdkit.units import format_size

_SYSTEM_LOG = "/dev/log"
# Options of /etc/fstab that are mount(8)'s or the system's business.
_OF_MOUNT = {
    "defaults", "auto", "noauto", "nofail", "_netdev", "user", "users", "nouser", "owner", "group", "suid", "nosuid",
    "dev", "nodev", "exec", "noexec", "atime", "noatime", "relatime", "norelatime", "strictatime", "diratime",
    "nodiratime", "async", "sync", "mand", "nomand", "lazytime", "nolazytime", "silent", "loud",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Words:
    """The command line of `mount`."""

    image: str
    mountpoint: str
    rw: bool
    overlay: bool
    keep_overlay: str | None
    as_file: bool
    partition: int | None
    file_system: bool
    allow_other: bool
    foreground: bool


@click.command(
    "mount",
    epilog=epilog(
        "vhdkit mount disk.vhd /mnt/disk",
        "vhdkit mount child.avhd /mnt/files --partition 1 --fs",
        "vhdkit mount disk.vhd /mnt/files --fs --overlay",
        "vhdkit mount child.avhd child.raw --file --rw",
    ),
)
@click.argument("image", type=PATH)
@click.argument("mountpoint", type=PATH)
@click.option("--rw", is_flag=True, help="Allow writing; what is written goes to the image.")
@click.option("--overlay", is_flag=True,
              help="Allow writing, but leave the image unchanged: changes are discarded.")  # fmt: skip
@click.option("--keep-overlay", metavar="FILE", type=PATH,
              help="With --overlay: keep the changes as FILE, a new child of the image.")  # fmt: skip
@click.option("--file", "as_file", is_flag=True,
              help="Mount the disk, or the partition, as one file over the regular file MOUNTPOINT.")  # fmt: skip
@click.option("--partition", metavar="N", type=click.IntRange(min=1), help="With --fs or --file: this partition.")
@click.option("--fs", "file_system", is_flag=True,
              help="Mount the file system in it: as root by the kernel, else by fuse2fs or ntfs-3g.")  # fmt: skip
@click.option("--allow-other", is_flag=True, help="Let other users access it, too.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground until it is unmounted; Ctrl-C unmounts it.")
@click.option("-o", "fstab", metavar="OPTIONS", multiple=True,
              help="As in /etc/fstab: rw, ro, overlay, fs, partition=N, allow_other and more.")  # fmt: skip
@image_options()
def mount_command(common: Common, fstab: tuple[str, ...], **words: Any) -> None:
    """Mount IMAGE, a chain's leaf or a single image, at the empty folder MOUNTPOINT. Read-only by default.

    \b
    disk.raw                  the whole disk, as the chain reads
    partitions/N.raw          each partition; by-label/, by-uuid/ and by-type/
                              have links to them
    layers/K-NAME.raw         the disk as it was at each layer, the newest first
    info.json                 sizes, layers, partitions and file systems

    With --fs MOUNTPOINT shows the files in the disk's file system instead. The command returns when the mount is
    ready; `vhdkit umount MOUNTPOINT` removes all of it.

    \b
    With --json: {"mountpoint", "base", "image", "size_bytes", "writable",
                  "file_system", "driver", "pid", "notes"}
    "base" is the FUSE mount itself, "driver" what mounted the file system in it
    (null without --fs).
    """
    given = _Words(**words)
    for text in fstab:
        given, common = _with_fstab(given, common, text)
    _check(given)
    _log(common, foreground=given.foreground)
    open_mode = OpenMode(
        common.options,
        read_only=not (given.rw or given.overlay),
        overlay=given.overlay,
        keep_overlay=given.keep_overlay,
    )
    request = MountRequest(
        given.image, given.mountpoint, open_mode, given.as_file, given.partition, given.file_system,
        given.allow_other, given.foreground,
    )  # fmt: skip
    mounted = mount(request, lambda body, talks: start(body, talks=talks))
    show = partial(_print_result, mounted, request, common)
    if not given.foreground:
        show()
        return
    with unmeant_ignored():
        _stay(mounted, common, show)


def _check(words: _Words) -> None:
    """Raise UsageError for options that exclude each other."""
    if words.rw and words.overlay:
        raise click.UsageError("--rw and --overlay cannot be combined")
    if words.keep_overlay is not None and not words.overlay:
        raise click.UsageError("--keep-overlay requires --overlay")
    if words.as_file and words.file_system:
        raise click.UsageError("--file and --fs cannot be combined")
    if words.partition is not None and not (words.as_file or words.file_system):
        raise click.UsageError("--partition requires --fs or --file; without these all partitions are shown")


def _with_fstab(words: _Words, common: Common, text: str) -> tuple[_Words, Common]:
    """The command line with what an option string adds, as mount.fuse3 passes it on."""
    flags = {"overlay": "overlay", "file": "as_file", "fs": "file_system", "allow_other": "allow_other",
             "foreground": "foreground", "rw": "rw"}  # fmt: skip
    for option in text.split(","):
        name, sign, value = option.partition("=")
        if name in flags and not sign:
            words = replace(words, **dict[str, Any]({flags[name]: True}))
        elif name == "ro" and not sign:
            words = replace(words, rw=False)
        elif name == "partition" and value.isdecimal():
            words = replace(words, partition=int(value))
        elif name == "keep_overlay" and value:
            words = replace(words, keep_overlay=value)
        elif name == "allow_parent_dir" and value:
            folders = (*common.options.parent_dirs, value)
            common = replace(common, options=replace(common.options, parent_dirs=folders))
        elif name == "allow_raw_parent" and not sign:
            common = replace(common, options=replace(common.options, allow_raw_parent=True))
        elif option and name not in _OF_MOUNT and not name.startswith(("x-", "X-", "comment")):
            raise click.UsageError(f"-o {option!r} is not an option of mount")
    if words.overlay:
        words = replace(words, rw=False)  # mount(8) passes rw unless the line has ro
    return words, common


def _log(common: Common, *, foreground: bool) -> None:
    """Send later messages of the server to standard error in the foreground, else to the system's log.

    What the command itself finds before the server is detached is shown on standard error, too.
    """
    if foreground:
        level = logging.INFO if common.verbose else logging.WARNING
        show_log(level)
    elif exists(_SYSTEM_LOG):
        with contextlib.suppress(OSError):
            handler = logging.handlers.SysLogHandler(_SYSTEM_LOG, logging.handlers.SysLogHandler.LOG_DAEMON)
            handler.ident = f"vhdkit-mount[{os.getpid()}]: "
            logging.basicConfig(level=logging.WARNING, handlers=[handler, WarningLines()], force=True)
    else:
        logging.basicConfig(level=logging.WARNING, handlers=[WarningLines()], force=True)


def _print_result(mounted: Mounted, request: MountRequest, common: Common) -> None:
    for text in mounted.notes:
        note(common, text)
    if common.json:
        found = mounted.file_system
        print_json(
            {
                "mountpoint": mounted.mountpoint,
                "base": mounted.base,
                "image": mounted.image,
                "size_bytes": mounted.size_bytes,
                "writable": mounted.writable,
                "file_system": None if found is None else {"type": found.kind, "label": found.label},
                "driver": mounted.driver,
                "pid": mounted.child.pid,
                "notes": list(mounted.notes),
            }
        )
    elif not common.quiet:
        overlay = request.open_mode.overlay
        kept = (
            f", changes go to {request.open_mode.keep_overlay}"
            if request.open_mode.keep_overlay
            else ", changes are discarded"
        )
        access = ("writable" + (kept if overlay else "")) if mounted.writable else "read-only"
        what = f"{format_size(mounted.size_bytes)}, {access}"
        if mounted.file_system is not None:
            what = f"{mounted.file_system.kind} by {mounted.driver}, {access}"
        print_text(printable(f"{request.image} is at {request.mountpoint}: {what}"))
    sys.stdout.flush()


def _stay(mounted: Mounted, common: Common, show: Callable[[], None]) -> None:
    """Show what was mounted, and wait until it is unmounted, or unmount it when a signal arrives."""
    problem = None
    try:
        show()  # a program that reads that may send a signal at once
        code = mounted.child.wait()
    except Interrupted:
        try:
            problem = umount(mounted.mountpoint)
        except vhdkit.ImageInUse as error:
            note(common, f"{error.problem}: waiting for them")
            umount(mounted.mountpoint, lazy=True)
        code = mounted.child.wait()
    else:
        if code < 0 or mounted.base != mounted.mountpoint:
            with contextlib.suppress(vhdkit.VhdkitError):  # the file system in it, and a mount without a server
                umount(mounted.mountpoint)
    if code < 0:
        raise vhdkit.IoFailed(f"the server was killed by signal {-code}", path=mounted.image)
    if code:
        raise vhdkit.IoFailed(problem or f"the server failed (exit code {code})", path=mounted.image)


@click.command("umount", epilog=epilog("vhdkit umount /mnt/disk"))
@click.argument("mountpoint", type=PATH)
@click.option(
    "--lazy", is_flag=True, help="Do not wait for programs that use it: it is released when the last one closes it."
)
@click.option("--force", is_flag=True,
              help="As root, for a mount that hangs: pending calls fail, unwritten data is lost.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; errors are JSON objects too.")
@click.option("-q", "--quiet", is_flag=True, help="Accepted for scripts: the command prints nothing anyway.")
@click.option("-v", "--verbose", is_flag=True, help="Show where an internal error came from.")
def umount_command(mountpoint: str, lazy: bool, force: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Unmount what `vhdkit mount` mounted at MOUNTPOINT, with all that belongs to it, in the right order.

    Returns when everything that was written is flushed to the image and the image is closed. It also cleans up
    after a killed server.
    """
    problem = umount(mountpoint, lazy=lazy, force=force)
    if problem is not None:
        raise vhdkit.IoFailed(
            f"it is unmounted, but when the image was closed: {problem}", path=mountpoint,
            hint="what was written since the last flush may be lost",
        )  # fmt: skip
    if as_json:
        print_json({"mountpoint": mountpoint})


@click.command("mounts", epilog=epilog("vhdkit mounts", "vhdkit mounts --json"))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; errors are JSON objects too.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the mount points.")
@click.option("-v", "--verbose", is_flag=True, help="Show where an internal error came from.")
def mounts_command(as_json: bool, quiet: bool, verbose: bool) -> None:
    """List what is mounted by vhdkit, oldest first. A mount whose server is gone is `dead`; umount removes it.

    \b
    With --json: {"mounts": [{"mountpoint", "base", "image", "writable",
                              "driver", "loop", "pid"}]}
    "pid" is null where the server is dead.
    """
    found = listed()
    if as_json:
        print_json({"mounts": [{name: getattr(one, name) for name in Listed.__slots__} for one in found]})
    elif quiet:
        for one in found:
            click.echo(printable(one.mountpoint))
    elif found:
        rows = [["MOUNTPOINT", "IMAGE", "ACCESS", "FILE SYSTEM", "SERVER"], *(_row(one) for one in found)]
        for line in columns(rows):
            click.echo(line)
    else:
        click.echo("nothing is mounted")


def _row(one: Listed) -> list[str]:
    access = "read-write" if one.writable else "read-only"
    driver = one.driver or "-"
    if one.loop is not None:
        driver += f" ({one.loop})"
    server = "dead" if one.pid is None else str(one.pid)
    return [quoted(one.mountpoint), quoted(one.image), access, driver, server]
