# SPDX-License-Identifier: Apache-2.0
"""Repointing a differencing image to where its parent lies now.

Decides that the names of the parent change, never its identity (`INV-PARENT-ID`) nor a byte of the disk. In which
order the names reach the device is `formats.vhd.relink`'s decision.
"""

from __future__ import annotations

import os

from vhdkit import errors
from vhdkit.chain import pending
from vhdkit.chain.create import link_to
from vhdkit.chain.resolve import NULL_ID, OpenOptions, format_id, open_layers, unique_id
from vhdkit.folder import real_path
from vhdkit.formats.vhd.dynamic import open_dynamic
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.relink import relink
from vhdkit.store import FileStore


def rebase(
    path: str | os.PathLike[str], parent_path: str | os.PathLike[str], *, options: OpenOptions | None = None
) -> None:
    """Let the differencing image at `path` name `parent_path` as its parent, which it must be by its id.

    The relative and the absolute path are stored. The parent's own chain must open. Raises InvalidArgument for an
    image without a parent, ParentMismatch for another parent, ImageInUse when the image is open anywhere, and what
    opening the two raises. On error the image has its old names.
    """
    image_path = real_path(path)
    with FileStore.open(image_path, writable=True) as store:
        store.lock(writer=True)
        pending.settle(store)
        header = read_metadata(store).header
        if header is None or not read_metadata(store).is_differencing:
            raise errors.InvalidArgument("has no parent: only differencing images do", path=os.fspath(path))
        _check_parent(store, header.parent_unique_id, os.fspath(parent_path), options)
        image = open_dynamic(store, writable=True)
        relink(
            image,
            link_to(image_path, os.fspath(parent_path), header.parent_unique_id, header.parent_timestamp),
        )


def _check_parent(store: FileStore, parent_id: bytes, parent_path: str, options: OpenOptions | None) -> None:
    """Raise unless `parent_path` is the recorded parent and opens with its own parents."""
    if parent_id == NULL_ID and not (options and options.allow_raw_parent):
        raise errors.ParentRefused(
            "the image records no id of its parent, which may be any raw file",
            path=store.name,
            hint="if you are sure, say --allow-raw-parent",
        )
    with FileStore.open(parent_path) as parent:
        if parent.identity == store.identity:
            raise errors.InvalidArgument("cannot be its own parent", path=store.name)
        found = unique_id(parent)
        if found != parent_id:
            raise errors.ParentMismatch(
                f"{errors.printable(parent_path)} is not its parent",
                path=store.name,
                expected=f"id {format_id(parent_id)}",
                found=f"id {format_id(found)}" if found != NULL_ID else "no id",
            )
    for layer in open_layers(parent_path, options=options):
        layer.close()
