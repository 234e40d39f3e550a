# SPDX-License-Identifier: Apache-2.0
"""Opens an image of a repository with all its parents, and says how a child in it names its parent.

Decides that manifests alone say which image is the parent of which: names inside images are not followed, so none
leads out of the repository. Every file is reached through the folders of the repository, must be an image that is not
raw, and have the id that its child records. Must not know what is read.

A child names its parent by a relative path, and by nothing else: a repository can be moved or copied as a whole, and
any program that follows relative paths opens every night of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from vhdkit import errors, formats
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import ImageRecord
from vhdkit.backup.names import BASES, ImagePlace
from vhdkit.backup.repository import MachineFolder
from vhdkit.chain.names.opening import limit_tables
from vhdkit.chain.names.parents import other_sectors
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.create import linkage_of
from vhdkit.image import Layer, ParentRef
from vhdkit.store import FileStore

_UP_TO_REPOSITORY = "..\\..\\..\\..\\"  # from machines/MACHINE/images/DISK/


@contextlib.contextmanager
def opened_layers(machine: MachineFolder, chain: Iterable[ImageRecord]) -> Iterator[list[Layer]]:
    """The layers of a chain of the repository, open for reading and held as by a reader while the block runs.

    Raises DamagedRepository, CorruptImage, NotFound, ImageInUse, IoFailed.
    """
    layers: list[Layer] = []
    try:
        for record in chain:
            with machine.folder_of(record.place) as folder:
                store = folder.file(record.place.name)
            try:
                store.lock(writer=False)
                layers.append(_opened(store, layers))
            except BaseException:
                store.close()
                raise
            limit_tables(layers)
        if layers and layers[-1].facts.parent is not None:
            raise DamagedRepository(
                "has a parent, though the manifest says that it has none", path=layers[-1].facts.path
            )
        yield layers
    finally:
        for layer in layers:
            layer.close()


def _opened(store: FileStore, above: list[Layer]) -> Layer:
    """The next layer of a chain, as it must be read. Raises DamagedRepository, CorruptImage."""
    view = pending.view(store)
    found = formats.probed(view)
    if found.is_plain:
        raise DamagedRepository("is not an image of a format that a repository has", path=store.name)
    if above:
        child = above[-1].facts
        if child.parent is None or found.linkage_id(view) not in child.parent.linkage_ids:
            raise DamagedRepository(
                f"is not the parent that {errors.printable(child.path)} records, though the manifest says so",
                path=store.name,
                hint="restore the file from a copy of the repository",
            )
    layer = found.open(view)
    different = other_sectors(above[-1].facts, layer.facts) if above else None
    if different is not None:
        raise different
    return layer


def link_to(parent: Layer, place: ImagePlace) -> ParentRef:
    """What a child beside the images of its disk records of its parent at this place."""
    folder = ".\\" if place.disk_id is not None else f"{_UP_TO_REPOSITORY}{BASES}\\"
    relative = f"{folder}{place.name}"
    # A format has two fields for paths: the relative one stands in both.
    return ParentRef.of_paths(
        linkage_of(parent), parent.facts.timestamp or 0, relative=relative, absolute=relative, name=place.name
    )
