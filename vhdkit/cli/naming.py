# SPDX-License-Identifier: Apache-2.0
"""Names of new images that suggest a format other than the image's.

Decides which file name extension stands for which format. A VHD opens under any name, but people expect `disk.qcow2`
to be QCOW2, and programs that go by names (a backup program, another hypervisor) fail later.
"""

from __future__ import annotations

import os

import click

from vhdkit import formats
from vhdkit.cli.common import Common
from vhdkit.cli.output import note
from vhdkit.errors import printable

_RAW = "raw disk"
_FORMATS = {
    ".raw": _RAW,
    ".vhdx": "VHDX image",
    ".avhdx": "VHDX image",
    ".qcow": "QCOW image",
    ".qcow2": "QCOW2 image",
    ".qed": "QED image",
    ".vmdk": "VMDK image",
    ".vdi": "VDI image",
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


def refuse_other_name(path: str) -> None:
    """Raise UsageError for a name that suggests a format other than VHD. For use where no format was given."""
    called = _FORMATS.get(os.path.splitext(path)[1].lower())
    if called is None:
        return
    name = printable(path)
    if called is _RAW:
        raise click.UsageError(f"{name} has the name of a raw disk: add --format raw, or --format dynamic for a VHD")
    raise click.UsageError(
        f"{name} has the name of a {called}, which vhdkit does not make: name it .vhd, or add --format dynamic"
        " for a VHD under this name"
    )


def note_other_name(common: Common, path: str, *, raw: bool = False) -> None:
    """Note that the new image, a VHD or a raw disk, has the name of something else."""
    called = _FORMATS.get(os.path.splitext(path)[1].lower())
    if raw:
        if formats.by_suffix(path) is not None:
            note(common, f"{path} is a raw disk under the name of a VHD; opening it requires --format raw")
        elif called not in (None, _RAW, "CD image"):
            note(common, f"{path} is a raw disk under the name of a {called}")
    elif called is not None:
        note(common, f"{path} is a VHD under the name of a {called}")
