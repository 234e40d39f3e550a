# SPDX-License-Identifier: Apache-2.0
"""The formats of disk images, as machines, snapshots and journals record them.

Decides which format and suffix the children of an image have: a VHDX stands on a VHDX only, a VHD on a VHD or a raw
disk. Pure, and imports little: every command loads it. Must not know how a format is recognised or read.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeGuard, get_args

ImageFormat = Literal["vhd", "vhdx", "raw"]
IMAGE_FORMATS: Final[tuple[ImageFormat, ...]] = get_args(ImageFormat)
_CHILD_SUFFIX: Final = {"vhd": ".avhd", "vhdx": ".avhdx"}
CHILD_SUFFIXES: Final = tuple(_CHILD_SUFFIX.values())


def is_image_format(value: Any) -> TypeGuard[ImageFormat]:
    """True for the name of a format that a record may hold."""
    return value in IMAGE_FORMATS


def child_format(parent: str | None) -> Literal["vhd", "vhdx"]:
    """The format of an image that stands on one of this format; also that of a copy without a parent.

    None is an image of a machine made by a vmm that knew VHD and raw disks only.
    """
    return "vhdx" if parent == "vhdx" else "vhd"


def child_suffix(parent: str | None) -> str:
    """The suffix of an image that stands on one of this format."""
    return _CHILD_SUFFIX[child_format(parent)]
