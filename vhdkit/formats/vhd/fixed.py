# SPDX-License-Identifier: Apache-2.0
"""Fixed images: the data of the disk, then one footer."""

from __future__ import annotations

from vhdkit.formats.linear import LinearImage
from vhdkit.formats.vhd.facts import facts_of
from vhdkit.formats.vhd.metadata import Metadata, read_metadata
from vhdkit.store import Store


class FixedImage(LinearImage):
    """A linear image with a footer after its data, which writing never touches."""

    def __init__(self, store: Store, metadata: Metadata, *, writable: bool) -> None:
        super().__init__(store, facts_of(metadata), writable=writable)
        self.metadata = metadata


def open_fixed(store: Store, *, writable: bool = False) -> FixedImage:
    """Open a fixed VHD. Raises CorruptImage."""
    metadata = read_metadata(store)
    assert metadata.header is None
    return FixedImage(store, metadata, writable=writable)
