# SPDX-License-Identifier: Apache-2.0
"""`disk add`, `remove`, `change`, `list`, `resize`: a machine's disks, running or not.

Decides how a disk is written as one argument: IMAGE[,OPTION=VALUE...]. The name of an image may contain commas: the
text after one is an option only if it looks like one.
"""

from __future__ import annotations

import os
from typing import Any, Literal, get_args

import click

import vhdkit
from vmm.api.manager import DiskRequest, Manager
from vmm.cli.common import (
    DISK_SIZE,
    VerbGroup,
    epilog,
    format_size,
    output_options,
    print_json,
    print_line,
    print_table,
)
from vmm.model.formats import IMAGE_FORMATS
from vmm.model.spec import UNITS, CacheMode

_VALUED = ("controller", "index", "unit", "serial", "format", "parent-dir", "cache")
_FLAGS = ("read-only", "allow-raw-parent")
_FORMATS = IMAGE_FORMATS
_CACHE_MODES = get_args(CacheMode)
_ONLY_FOR_IMAGES = ("format", "parent-dir", "allow-raw-parent", "cache")


def parse_disk(word: str, *, kind: Literal["vhd", "pass-through", "iso"] = "vhd") -> DiskRequest:
    """Parse IMAGE[,OPTION=VALUE...]; for a drive ("iso") the image may be missing. Raises BadParameter."""
    path, *rest = word.split(",")
    while rest and rest[0] not in _FLAGS and rest[0].partition("=")[0] not in _VALUED:  # most likely part of the name
        if os.path.lexists(path) and not os.path.lexists(f"{path},{rest[0]}"):
            break
        path += "," + rest.pop(0)
    if not path and kind != "iso":
        raise click.BadParameter(f"{word!r} names no image")
    settings: dict[str, Any] = {"parent_dirs": ()}
    for option in rest:
        name, sign, value = option.partition("=")
        if option in _FLAGS:
            settings[option.replace("-", "_")] = True
        elif name not in _VALUED or not sign or not value:
            raise click.BadParameter(
                f"{option!r} in {word!r} is not an option; the options are {', '.join((*_VALUED, *_FLAGS))}"
            )
        elif name == "parent-dir":
            settings["parent_dirs"] += (value,)
        elif name in ("index", "unit"):
            if not value.isdecimal():
                raise click.BadParameter(f"{option!r} in {word!r} is not a number")
            settings["controller_index" if name == "index" else "unit"] = int(value)
        else:
            settings[name] = value
    for name, known in (("controller", tuple(UNITS)), ("format", _FORMATS), ("cache", _CACHE_MODES)):
        if settings.get(name) not in (None, *known):
            raise click.BadParameter(f"{settings[name]!r} is not a {name}; known are {', '.join(known)}")
    if kind != "vhd":
        for option in rest:
            if option.partition("=")[0] in _ONLY_FOR_IMAGES:
                raise click.BadParameter(f"{option!r} in {word!r} applies to images of hard disks only")
    return DiskRequest(path or None, kind=kind, **settings)


@click.group("disk", cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
def disk_command() -> None:
    """Add, remove, list and resize the disks of a machine, on SCSI also while it runs; change media in drives."""


@disk_command.command(
    "add",
    epilog=epilog(
        "vmm disk add web data.vhd", "vmm disk add web data.vhd,controller=scsi,unit=5", "vmm disk add web --cdrom"
    ),
)
@click.argument("name")
@click.argument("disk", metavar="[IMAGE][,OPTION=VALUE...]", required=False)
@click.option(
    "--pass-through", is_flag=True, help="IMAGE is a block device or an iscsi:// LUN, given to the guest as a whole."
)
@click.option("--cdrom", is_flag=True, help="Add a drive with the ISO image IMAGE; without IMAGE, an empty drive.")
@output_options
def add_command(name: str, disk: str | None, pass_through: bool, cdrom: bool, as_json: bool, quiet: bool) -> None:
    """Add a disk to the machine NAME. A running machine gets it at once, on SCSI.

    Options: controller=ide|scsi|virtio, index=N, unit=N, serial=TEXT, read-only, format=vhd|vhdx|raw,
    parent-dir=DIR, allow-raw-parent, cache=writeback|none. Without controller=, the disk is on IDE while there is
    room; a read-only disk, or one with sectors of 4096 bytes, is on SCSI or virtio. With cache=none the host keeps
    little of the image in its page cache, for a guest with enough memory to cache the disk itself.
    """
    if pass_through and cdrom:
        raise click.UsageError("--pass-through and --cdrom are mutually exclusive")
    if disk is None and not cdrom:
        raise click.UsageError("name an IMAGE; only a drive (--cdrom) may be empty")
    added = Manager().add_disk(
        name, parse_disk(disk or "", kind="iso" if cdrom else "pass-through" if pass_through else "vhd")
    )
    if as_json:
        print_json(added.model_dump(mode="json"))
    elif not quiet:
        print_line(f"{name}: {added.id} on {added.place}, serial {added.serial}: {added.path or 'empty'}")


@disk_command.command("remove", epilog=epilog("vmm disk remove web disk-1"))
@click.argument("name")
@click.argument("disk", metavar="DISK")
@output_options
def remove_command(name: str, disk: str, as_json: bool, quiet: bool) -> None:
    """Remove DISK (its id, serial or image) from the machine NAME. The image stays.

    A running guest is asked to release the disk, and may refuse.
    """
    removed = Manager().remove_disk(name, disk)
    if as_json:
        print_json(removed.model_dump(mode="json"))
    elif not quiet:
        print_line(f"{name}: {removed.id} is removed" + (f"; {removed.path} stays" if removed.path else ""))


@disk_command.command(
    "change",
    epilog=epilog("vmm disk change web disk-1 tools.iso", "vmm disk change web disk-1 --eject"),
)
@click.argument("name")
@click.argument("drive", metavar="DRIVE")
@click.argument("file", metavar="[FILE]", required=False)
@click.option("--eject", is_flag=True, help="Remove the medium and leave the drive empty.")
@click.option("--force", is_flag=True, help="Change it even if the guest has locked the drive and may be reading it.")
@output_options
def change_command(
    name: str, drive: str, file: str | None, eject: bool, force: bool, as_json: bool, quiet: bool
) -> None:
    """Put the ISO image FILE into DRIVE (its id, serial or present image) of the machine NAME, or remove the medium.

    If the machine is running, the guest finds another medium, as if the button of a real drive had been pressed; a
    guest that has locked the drive is asked to release it. A saved machine finds the new medium when it is started.
    """
    if (file is None) is not eject:
        raise click.UsageError("name a FILE for the drive, or use --eject")
    changed = Manager().change_medium(name, drive, file, force=force)
    if as_json:
        print_json(changed.model_dump(mode="json"))
    elif not quiet:
        print_line(f"{name}: {changed.id} on {changed.place}: {changed.path or 'empty'}")


@disk_command.command("list", epilog=epilog("vmm disk list web"))
@click.argument("name")
@output_options
def list_command(name: str, as_json: bool, quiet: bool) -> None:
    """List the disks of the machine NAME."""
    disks = Manager().disks(name)
    if as_json:
        print_json(
            [
                {**one.disk.model_dump(mode="json"), "size_bytes": one.size_bytes, "problem": one.problem}
                for one in disks
            ]
        )
    elif not quiet:
        rows = [
            [
                one.disk.id,
                one.disk.place,
                one.disk.kind_word,
                format_size(one.size_bytes),
                one.disk.serial,
                one.disk.path or "empty",
                one.problem or "",
            ]
            for one in disks
        ]
        print_table(("DISK", "PLACE", "KIND", "SIZE", "SERIAL", "IMAGE", "NOTE"), rows)


@disk_command.command(
    "resize", epilog=epilog("vmm disk resize web disk-1 40G", "vmm disk resize web disk-1 10G --shrink")
)
@click.argument("name")
@click.argument("disk", metavar="DISK")
@click.argument("size", type=DISK_SIZE)
@click.option("--shrink", is_flag=True, help="Allow a smaller size. Only while the machine is off.")
@output_options
def resize_command(name: str, disk: str, size: vhdkit.DiskSize, shrink: bool, as_json: bool, quiet: bool) -> None:
    """Resize DISK of the machine NAME to SIZE. A disk of a running machine can only grow, on SCSI and virtio.

    SIZE is rounded up to whole sectors of 512 bytes; a disk with sectors of 4096 bytes needs whole ones of these. The
    guest is notified.

    What `vhdkit resize` refuses is refused here, too: a file system or partition that a smaller size would cut off is
    named.
    """
    size_bytes = Manager().resize_disk(name, disk, int(size), shrink=shrink)
    if as_json:
        print_json({"disk": disk, "size_bytes": size_bytes})
    elif not quiet:
        rounded = (
            f" ({size.asked} is not a whole number of sectors: rounded up to {int(size)} bytes)" if size.asked else ""
        )
        print_line(f"{name}: {disk} has {format_size(size_bytes)}{rounded}")
