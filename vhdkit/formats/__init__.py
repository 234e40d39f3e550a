# SPDX-License-Identifier: Apache-2.0
"""Image formats: each fulfils `formats.format.Format`, and its open images `image.Layer`.

`FORMATS` is the only list of them, in the order in which a file is probed; raw comes last and accepts any file.
The functions here look things up in that list. Which format a file without a given one has, and what is refused, is
decided in `formats.probe`.
"""

from __future__ import annotations

from vhdkit.formats.format import Format
from vhdkit.formats.raw import RAW
from vhdkit.formats.vhd.format import VHD
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.image import Layer
from vhdkit.store import ReadStore, Store

FORMATS: tuple[Format, ...] = (VHD, VHDX, RAW)


def named(name: str) -> Format:
    """The format of this name, which must exist."""
    return next(one for one in FORMATS if one.name == name)


def of(layer: Layer) -> Format:
    """The format of an open layer."""
    return named(layer.format_name)


def making(kind: str) -> Format:
    """The format whose `create` makes this kind, which must exist."""
    return next(one for one in FORMATS if kind in one.kinds)


def for_children_of(layer: Layer) -> Format:
    """The format of children of this layer."""
    return named(of(layer).child_format)


def plain() -> Format:
    """The format that any file can be taken for: raw."""
    return next(one for one in FORMATS if one.is_plain)


def by_suffix(path: str) -> Format | None:
    """The format that files of this name are expected to have, None where any is possible."""
    return next((one for one in FORMATS if path.lower().endswith(one.suffixes)), None)


def probed(store: ReadStore) -> Format:
    """The first format that recognises the file; raw takes any. Raises IoFailed."""
    return next(one for one in FORMATS if one.probe(store))


def file_id(store: ReadStore) -> bytes | None:
    """The id by which records and undo logs name the image; see `Format.file_id`."""
    return next((found for one in FORMATS if (found := one.file_id(store)) is not None), None)


def linkage_id(store: ReadStore) -> bytes | None:
    """The id by which children name the image; see `Format.linkage_id`."""
    return next((found for one in FORMATS if (found := one.linkage_id(store)) is not None), None)


def present_id(store: ReadStore) -> bytes | None:
    """The id by which the record of a merge names the image; see `ImageFacts.present_id`."""
    return file_id(store) or linkage_id(store)


def parent_ids(store: ReadStore) -> frozenset[bytes]:
    """What the file may record for its parent, whatever its format; see `Format.parent_ids`."""
    return frozenset[bytes]().union(*(one.parent_ids(store) for one in FORMATS))


def is_torn(sector: bytes, before: bytes, after: bytes) -> bool:
    """Whether a format takes the sector for what an interrupted write left; see `Format.is_torn`."""
    return any(one.is_torn(sector, before, after) for one in FORMATS)


def reopened(layer: Layer, *, writable: bool, store: Store | None = None) -> Layer:
    """Open the image again as its file is now, through the same store and its lock, or through another `store`.

    The format is not probed again: the guest of a raw disk may write anything. The layer must have been flushed.
    """
    return of(layer).open(store or layer.store, writable=writable, ignore_bitmaps=layer.ignore_bitmaps)
