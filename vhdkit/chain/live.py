# SPDX-License-Identifier: Apache-2.0
"""Open chains that grow: a new child is stacked on the leaf while somebody reads and writes the disk.

Decides in which order an open leaf becomes a parent, and which image is the newest of its line. The caller sees to it
that no request is in flight meanwhile.

No lock is ever given up: the new chain reads the old leaf through the very store that wrote it.
"""

from __future__ import annotations

import os

from vhdkit import errors
from vhdkit.chain.blockmap import MAX_LAYERS
from vhdkit.chain.chain import Chain
from vhdkit.chain.resolve import (
    MAX_CHAIN_DEPTH,
    NULL_ID,
    OpenOptions,
    allowed_folders,
    find_children,
    unique_id,
)
from vhdkit.folder import real_path, scratch_store
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.vhd.create import DEFAULT_BLOCK_SIZE, ParentLink, create_differencing
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.fixed import FixedImage
from vhdkit.image import Layer
from vhdkit.store import FileStore

_SCRATCH_LINK = ParentLink(NULL_ID, 0, "parent", ".\\parent", "\\parent")  # nobody ever looks for it


def stack(chain: Chain, child: Layer) -> Chain:
    """The chain with an empty, writable `child` on its leaf, which is flushed and read-only from now on.

    Nobody writes to `chain` meanwhile or afterwards: its files belong to the new one. On an error it is as it was.
    Raises SyncFailed, NoSpace, IoFailed, and what a damaged leaf raises.
    """
    if len(chain.layers) >= MAX_LAYERS:
        raise errors.InvalidArgument(
            f"the chain has {len(chain.layers)} layers already, and may have {MAX_LAYERS}",
            path=chain.leaf.store.name,
            hint="merge some of them first",
        )
    seal(chain.leaf)
    return Chain([child, as_parent(chain.leaf), *chain.layers[1:]])


def seal(leaf: Layer) -> None:
    """Flush an image so that nothing of it is left in memory: the second flush is for the footer of the first."""
    leaf.flush()
    leaf.flush()


def as_parent(leaf: Layer) -> Layer:
    """The image opened again for reading, through the same store. It was flushed."""
    if not leaf.writable:
        return leaf
    is_vhd = isinstance(leaf, DynamicImage | FixedImage)  # never guessed: a raw disk's guest may write anything
    ignore_bitmaps = isinstance(leaf, DynamicImage) and leaf.ignore_bitmaps
    return open_layer(
        leaf.store, format_name=FormatName.VHD if is_vhd else FormatName.RAW, ignore_bitmaps=ignore_bitmaps
    )


def scratch_child(chain: Chain, directory: str | None) -> Chain:
    """A chain with a nameless child on top, in `directory`, that is gone when it is closed, or when we are killed.

    `chain` was opened for reading; its files belong to the new chain. Raises NoSpace, NotFound, AccessDenied.
    """
    store = scratch_store(directory)
    try:
        block_size = chain.leaf.block_size_bytes or DEFAULT_BLOCK_SIZE
        create_differencing(store, chain.size_bytes, _SCRATCH_LINK, block_size_bytes=block_size)
        child = open_layer(store, format_name=FormatName.VHD, writable=True)
        return stack(chain, child)
    except BaseException:
        store.close()
        raise


def newest_leaf(path: str | os.PathLike[str], options: OpenOptions) -> str:
    """The image that stands on this one, or on the one that does, and so on: the path itself when none does.

    Looks where a writable open looks for children. Raises HasChildren where two stand on one image, naming both.
    """
    newest = os.fspath(path)
    for _ in range(MAX_CHAIN_DEPTH):
        with FileStore.open(newest) as store:
            folders = allowed_folders(newest, options.parent_dirs)
            children = find_children(
                unique_id(store), folders, apart_from=store.identity, raw_parent=real_path(newest)
            )
        if not children:
            return newest
        if len(children) > 1:
            names = " and ".join(errors.printable(child) for child in children[:2])
            more = f" and {len(children) - 2} more" if len(children) > 2 else ""
            raise errors.HasChildren(
                f"{names}{more} stand on it, and which of them is the newest leaf cannot be told",
                path=newest,
                hint="name the one to serve",
            )
        newest = children[0]
    raise errors.HasChildren(f"more than {MAX_CHAIN_DEPTH} images stand on it, one on the other", path=os.fspath(path))
