# SPDX-License-Identifier: Apache-2.0
"""The folder of an export while it is being written: its name, and what may not be in its way.

Decides that the folder appears under its name as a whole, and what the copy of a disk in it is called. Must not know
what is exported.
"""

from __future__ import annotations

import os

from vmm.model.errors import AlreadyExists, of_os_error
from vmm.model.formats import child_format
from vmm.model.spec import DiskSpec


def copy_name(disk: DiskSpec) -> str:
    """The file name of a copy of a disk that has no parent: a VHDX of a VHDX disk, else a VHD."""
    return f"{disk.id}.{child_format(disk.format)}"


def check_target(folder: str) -> str:
    """The absolute path of a folder that must not exist yet, while its parent must. Raises AlreadyExists, NotFound."""
    target = os.path.abspath(folder)
    if os.path.lexists(target):
        raise AlreadyExists("already exists", path=target, hint="name a new folder")
    try:
        os.stat(os.path.dirname(target))
    except OSError as error:
        raise of_os_error(error, "use the folder", path=os.path.dirname(target)) from error
    return target


def make_part(target: str, name: str) -> str:
    """Create the folder beside the target that collects the files. Raises AlreadyExists, AccessDenied, NoSpace."""
    part = f"{target}.part"
    try:
        os.mkdir(part, 0o700)
    except FileExistsError as error:  # it may belong to another user or a running command: do not remove it
        raise AlreadyExists(
            "is in the way of the new folder", machine=name, path=part,
            hint="remove it if an interrupted export left it there, or name another folder",
        ) from error  # fmt: skip
    except OSError as error:
        raise of_os_error(error, "make the folder", machine=name, path=part) from error
    return part
