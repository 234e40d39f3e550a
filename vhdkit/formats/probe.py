# SPDX-License-Identifier: Apache-2.0
"""Which format a file has, and opening it in that format.

Decides by the content of the file, not by its name, with one exception: a file called `.vhd` or `.avhd` without
any VHD footer is refused, never taken for a raw disk. The owner of a raw disk can write what looks like another
format into it, so a caller who knows the format should name it.
"""

from __future__ import annotations

from enum import StrEnum

from vhdkit import errors
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.foreign import HEAD_BYTES, identify_foreign
from vhdkit.formats.raw import open_raw
from vhdkit.formats.vhd.dynamic import open_dynamic
from vhdkit.formats.vhd.fixed import open_fixed
from vhdkit.formats.vhd.layout import DISK_TYPE_FIXED
from vhdkit.formats.vhd.metadata import FooterState, looks_like_vhd, read_footers, read_metadata
from vhdkit.image import Layer
from vhdkit.store import ReadStore, Store

VHD_SUFFIXES = (".vhd", ".avhd")


class FormatName(StrEnum):
    """The two families a file can be; which kind of VHD it is stands in its footer."""

    RAW = "raw"
    VHD = "vhd"


def identify(store: ReadStore, *, by_name: bool = True) -> FormatName:
    """The format of the file. Without `by_name` the file's name says nothing: it is not the one it came with.

    Raises UnsupportedFormat for a known format vhdkit does not read and for what is compressed or an archive,
    CorruptImage for a `.vhd` or `.avhd` without a footer, InvalidArgument for an empty file.
    """
    if store.size() == 0:
        raise errors.InvalidArgument("is empty: not a disk image", path=store.name)
    if looks_like_vhd(store):
        return FormatName.VHD
    foreign = identify_foreign(store.pread(0, HEAD_BYTES))
    if foreign is not None:
        raise errors.UnsupportedFormat(
            f"is {foreign.name}; vhdkit reads VHD, AVHD and raw images",
            path=store.name,
            hint=foreign.hint.format(path=errors.quoted(store.name) if by_name else "FILE")
            + "; if it is a raw disk that only begins like one, say --format raw",
        )
    if by_name and store.name.lower().endswith(VHD_SUFFIXES):
        tail, _ = read_footers(store)
        killed = tail.state is FooterState.KILLED
        raise CorruptImage(
            CorruptReason.NO_FOOTER,
            "the file has no VHD footer, neither at its end nor at its beginning"
            + (f" (the end was {tail.state})" if killed else ""),
            path=store.name,
            structure=tail.structure,
            offset_bytes=tail.offset_bytes,
            hint="the file is cut short or is not a VHD; if it is a raw disk, say --format raw",
        )
    return FormatName.RAW


def open_layer(
    store: Store,
    *,
    format_name: FormatName | None = None,
    writable: bool = False,
    ignore_bitmaps: bool = False,
) -> Layer:
    """Open one image, without its parents. The layer takes over the store once it is returned.

    Raises CorruptImage, UnsupportedFormat, InvalidArgument.
    """
    if (format_name or identify(store)) is FormatName.RAW:
        return open_raw(store, writable=writable)
    if read_metadata(store).footer.disk_type == DISK_TYPE_FIXED:
        return open_fixed(store, writable=writable)
    return open_dynamic(store, writable=writable, ignore_bitmaps=ignore_bitmaps)
