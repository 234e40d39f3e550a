# SPDX-License-Identifier: Apache-2.0
"""Names of new images, and the format that they suggest.

Decides which file name extension stands for which format, and when a name that contradicts the format is refused. An
image opens under any name, but people expect `disk.qcow2` to be QCOW2, and programs that go by names (another
hypervisor, for example) fail later.
"""

from __future__ import annotations

import os

import click

from vhdkit import DiskFormat, formats
from vhdkit.cli.common import Common
from vhdkit.cli.output import note
from vhdkit.errors import printable
from vhdkit.formats.format import Format

_RAW = "raw disk"
_FORMATS = {
    ".raw": _RAW,
    ".qcow": "QCOW image",
    ".qcow2": "QCOW2 image",
    ".qed": "QED image",
    ".vmdk": "VMDK image",
    ".vdi": "VDI image",
    ".vhds": "VHD Set",
    ".hdd": "Parallels image",
    ".hds": "Parallels image",
    ".vma": "VMA archive",
    ".iso": "CD image",
    ".gz": "gzip file",
    ".bz2": "bzip2 file",
    ".xz": "xz file",
    ".zst": "zstd file",
    ".zip": "zip archive",
    ".7z": "7z archive",
    ".tar": "tar archive",
    ".ova": "tar archive",
}
_BY_NAME = {
    ".vhd": DiskFormat.DYNAMIC,
    ".avhd": DiskFormat.DYNAMIC,
    ".vhdx": DiskFormat.VHDX,
    ".avhdx": DiskFormat.VHDX,
}
_RAW_NAMES = (".raw", ".img")


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def format_by_name(path: str, *, raw: bool = False) -> DiskFormat | None:
    """The format that a new image of this name is made in when none is given; with `raw` also a raw disk."""
    if raw and _suffix(path) in _RAW_NAMES:
        return DiskFormat.RAW
    return _BY_NAME.get(_suffix(path))


def refuse_other_name(path: str) -> None:
    """Raise UsageError, if no format is given, for the name of a raw disk or of a format that is not made."""
    called = _FORMATS.get(_suffix(path))
    if called is None:
        return
    name = printable(path)
    if called is _RAW:
        raise click.UsageError(f"{name} has the name of a raw disk: add --format raw, or --format dynamic for a VHD")
    raise click.UsageError(
        f"{name} has the name of a {called}, which vhdkit does not make: name it .vhdx or .vhd, or add"
        " --format vhdx or --format dynamic to make it under this name"
    )


def refuse_contradiction(path: str, kind: DiskFormat, option: str) -> None:
    """Raise UsageError for a VHD under the name of a VHDX, or the other way round: Windows opens neither."""
    named, made = formats.by_suffix(path), formats.making(kind)
    if named is None or named is made or made.is_plain:
        return
    other = DiskFormat.VHDX if kind is DiskFormat.DYNAMIC else DiskFormat.DYNAMIC
    if kind is DiskFormat.FIXED:
        other = DiskFormat.VHDX_FIXED
    if kind is DiskFormat.VHDX_FIXED:
        other = DiskFormat.FIXED
    raise click.UsageError(
        f"{printable(path)} has the name of a {named.title}, and a {kind.label} was asked for: say {option} {other},"
        f" or call it {made.suffixes[0]}"
    )


def note_other_name(common: Common, path: str, made: Format) -> None:
    """Note that the new image has the name of something else."""
    called, named = _FORMATS.get(_suffix(path)), formats.by_suffix(path)
    if made.is_plain:
        if named is not None:
            note(common, f"{path} is a raw disk under the name of a {named.title}; opening it requires --format raw")
        elif called not in (None, _RAW, "CD image"):
            note(common, f"{path} is a raw disk under the name of a {called}")
    elif called is not None:
        note(common, f"{path} is a {made.title} under the name of a {called}")
    elif named is not None and named is not made:
        note(common, f"{path} is a {made.title} under the name of a {named.title} image")
