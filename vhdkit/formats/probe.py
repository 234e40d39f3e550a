# SPDX-License-Identifier: Apache-2.0
"""Which format a file has, and opening it in that format.

Decides by the content of the file, not by its name, with one exception: a file named `.vhd` or `.avhd` without
any VHD footer is refused, never taken for a raw disk. The owner of a raw disk can write what looks like another
format into it, so a caller who knows the format should name it. `formats.FORMATS` lists the formats in the order in
which they are probed.
"""

from __future__ import annotations

from enum import StrEnum

from vhdkit import errors, formats
from vhdkit.formats.foreign import HEAD_BYTES, identify_foreign
from vhdkit.formats.format import Format
from vhdkit.image import Layer
from vhdkit.store import ReadStore, Store

VHD_SET_SUFFIX = ".vhds"


class FormatName(StrEnum):
    """The formats that a file can have; the kind of a VHD is in its footer."""

    RAW = "raw"
    VHD = "vhd"
    VHDX = "vhdx"

    @classmethod
    def _missing_(cls, value: object) -> FormatName | None:
        """A format in `FORMATS` that has no constant here is a name, too."""
        if any(one.name == value for one in formats.FORMATS):
            member = str.__new__(cls, value)
            member._name_ = member._value_ = str(value)
            return member
        return None


def identify(store: ReadStore, *, by_name: bool = True) -> Format:
    """The format of the file. Without `by_name` the file's name is ignored, because it is not its original one.

    Raises UnsupportedFormat for a known format that vhdkit does not read and for compressed files and archives,
    CorruptImage for a `.vhd` or `.avhd` without a footer, InvalidArgument for an empty file.
    """
    if store.size() == 0:
        raise errors.InvalidArgument("is empty: not a disk image", path=store.name, hint=errors.CUT_SHORT_HINT)
    recognised = [one for one in formats.FORMATS if not one.is_plain and one.probe(store)]
    if len(recognised) > 1:
        titles = " and a ".join(one.title for one in recognised)
        names = " or ".join(f"--format {one.name}" for one in recognised)
        raise errors.UnsupportedFormat(
            f"looks like a {titles} at the same time: the guest of one may have written the other",
            path=store.name,
            hint=f"say which one it is: {names}",
        )
    if recognised:
        return recognised[0]
    found = formats.plain()
    if store.name.lower().endswith(VHD_SET_SUFFIX) and by_name:
        raise errors.UnsupportedFormat(
            "is a VHD Set, which holds no disk",
            path=store.name,
            hint="open the .avhdx file beside it, which does",
        )
    foreign = identify_foreign(store.pread(0, HEAD_BYTES))
    if foreign is not None:
        raise errors.UnsupportedFormat(
            f"is {foreign.name}; vhdkit reads VHD, VHDX and raw images",
            path=store.name,
            hint=foreign.hint.format(path=errors.quoted(store.name) if by_name else "FILE")
            + "; if it is a raw disk that only begins like one, add --format raw",
        )
    expected = formats.by_suffix(store.name) if by_name else None
    if expected is not None:
        expected.refuse_name(store)
    return found


def format_of(store: Store, format_name: str | None = None) -> Format:
    """The format of this name, else the one that the file has. Raises as `identify` does."""
    return identify(store) if format_name is None else formats.named(format_name)


def open_layer(
    store: Store,
    *,
    format_name: str | None = None,
    writable: bool = False,
    ignore_bitmaps: bool = False,
) -> Layer:
    """Open one image, without its parents. The layer takes over the store once it is returned.

    Raises CorruptImage, UnsupportedFormat, InvalidArgument.
    """
    return format_of(store, format_name).open(store, writable=writable, ignore_bitmaps=ignore_bitmaps)
