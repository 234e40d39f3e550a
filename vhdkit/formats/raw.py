# SPDX-License-Identifier: Apache-2.0
"""Raw images: the bytes of the disk and nothing else, in a file or on a block device."""

from __future__ import annotations

from vhdkit import errors
from vhdkit.finding import Finding, Severity
from vhdkit.formats.linear import LinearImage
from vhdkit.store import ReadStore, Store
from vhdkit.units import SECTOR_SIZE, round_up

_MAX_RAW_BYTES = 1 << 62  # the system counts a file's bytes in 63 bits


def open_raw(store: Store, *, writable: bool = False) -> LinearImage:
    """A raw image over `store`. A last part sector counts as a whole one that ends in zeros.

    Raises InvalidArgument for an empty file.
    """
    size = store.size()
    if size == 0:
        raise errors.InvalidArgument("is empty: not a disk image", path=store.name)
    return LinearImage(store, round_up(size, SECTOR_SIZE), writable=writable)


def check_raw_size(size_bytes: int) -> None:
    """Raise InvalidArgument for a size that no raw disk can have."""
    if size_bytes <= 0 or size_bytes % SECTOR_SIZE:
        raise errors.InvalidArgument(
            f"a raw disk is one or more whole {SECTOR_SIZE}-byte sectors, not {size_bytes} bytes"
        )
    if size_bytes > _MAX_RAW_BYTES:
        raise errors.InvalidArgument(f"no file can be as long as a raw disk of {size_bytes} bytes")


def create_raw(store: Store, size_bytes: int) -> None:
    """Make `store` a raw image of zeros. `size_bytes` is whole sectors."""
    assert size_bytes > 0 and size_bytes % SECTOR_SIZE == 0
    store.truncate(size_bytes)


def examine_raw(store: ReadStore) -> list[Finding]:
    """What there is to say about a raw image."""
    size = store.size()
    if size == 0:
        return [Finding(Severity.ERROR, "empty", "is empty: not a disk image", store.name)]
    if size % SECTOR_SIZE:
        message = f"{size} bytes is not a whole number of sectors; the rest of the last one reads as zeros"
        return [Finding(Severity.NOTE, "size-odd", message, store.name)]
    return []
