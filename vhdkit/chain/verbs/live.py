# SPDX-License-Identifier: Apache-2.0
"""Open chains that grow: a new child is stacked on the leaf while the disk is in use.

Decides in which order an open leaf becomes a parent (`INV-LIVE-PRESERVES`). The caller ensures that no request is in
flight during `Freezing.freeze`. The content of a child is decided in `chain.verbs.create`.

    every child written, named and synced       (a power cut leaves empty children: INV-SET-HARMLESS)
    requests held -> every old leaf flushed -> every new chain built -> the caller takes them -> locks of old leaves
                                                                                                 become a reader's

Until the caller takes the new chains, an error anywhere leaves the old ones as they are, and the children are removed.
No lock is released in between: the new chain reads the old leaf through the same store that wrote it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Self

from vhdkit import errors, formats
from vhdkit.chain.engine.blockmap import MAX_LAYERS
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.children import drop_stale_marks
from vhdkit.chain.names.lineage import forget_parent, record_parent
from vhdkit.chain.names.marks import marked
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.create import child_size, require_names, write_child
from vhdkit.chain.verbs.snapshot import check_names, default_child
from vhdkit.folder import NewFile, commit_all, remove_file, scratch_store
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE
from vhdkit.image import NULL_ID, Layer, ParentRef
from vhdkit.store import FileStore

# The parent of a temporary child is never looked for.
_SCRATCH_PARENT = ParentRef.of_paths(NULL_ID, 0, relative=".\\parent", absolute="\\parent", name="parent")


def stack(chain: Chain, child: Layer) -> Chain:
    """The chain with an empty, writable `child` on its leaf, which is flushed and read-only from now on.

    `chain` must not be written to any more: its files belong to the new one. On an error it is as before.
    Raises SyncFailed, NoSpace, IoFailed, and what a damaged leaf raises.
    """
    if len(chain.layers) >= MAX_LAYERS:
        raise errors.InvalidArgument(
            f"the chain has {len(chain.layers)} layers already, and may have {MAX_LAYERS}",
            path=chain.leaf.store.name,
            hint="merge some of them first",
        )
    chain.leaf.seal()
    return Chain([child, as_parent(chain.leaf), *chain.layers[1:]])


def as_parent(leaf: Layer) -> Layer:
    """The image, already flushed, opened again for reading through the same store."""
    return formats.reopened(leaf, writable=False) if leaf.writable else leaf


class Freezing:
    """A live snapshot of several chains, all or none. Use it in a `with` block: leaving it early undoes everything.

    with Freezing(pairs) as freezing:      children are created, durably
        (hold all requests)
        chains = freezing.freeze()
        (serve the new chains)
        freezing.done()
    """

    def __init__(self, pairs: Sequence[tuple[Chain, str | None]]) -> None:
        """Make the children: (chain, path of its new leaf or None for `default_child`) each.

        Raises InvalidArgument, ReadOnly, AlreadyExists, NotFound, AccessDenied, NoSpace, IoFailed, ImageInUse.
        """
        for chain, _ in pairs:
            if not chain.writable:
                raise errors.ReadOnly("is only read here, and stays as it is anyway", path=chain.leaf.store.name)
        self._chains = [chain for chain, _ in pairs]
        self.paths = [default_child(chain.leaf) if new is None else new for chain, new in pairs]
        for path in self.paths:
            NewFile.check(path)
        check_names([chain.leaf.store.name for chain in self._chains], self.paths)
        self._require_names()
        self._children: list[Layer] = []
        self._made = False
        self._kept = False
        try:
            self._make()
        except BaseException:
            self._take_back()
            raise

    def is_for(self, pairs: Sequence[tuple[Chain, str | None]]) -> bool:
        """True if these are the same chains, with the same requested paths."""
        return len(pairs) == len(self._chains) and all(
            chain is own and path in (None, made)
            for (chain, path), own, made in zip(pairs, self._chains, self.paths, strict=True)
        )

    def _make(self) -> None:
        with contextlib.ExitStack() as stack_:
            files = []
            for chain, path in zip(self._chains, self.paths, strict=True):
                new = stack_.enter_context(NewFile(path, like=pending.files_of(chain.layers[:1])))
                write_child(new.store, path, chain.leaf, child_size(path, chain.leaf, None))
                forget_parent(new.store)  # the parent is written to until it is frozen
                files.append(new)
            self._require_names()
            parents = [chain.leaf.store.name for chain in self._chains]
            with marked([(one.path, one.store, parent) for one, parent in zip(files, parents, strict=True)]):
                commit_all(files)
                self._made = True
        for chain, path in zip(self._chains, self.paths, strict=True):
            store = FileStore.open_held(path, writable=True, follow_links=False)
            try:
                for file in pending.files_of(chain.layers[:1]):
                    store.notes_folder = file.notes_folder
                self._children.append(formats.for_children_of(chain.leaf).open(store, writable=True))
            except BaseException:
                store.close()
                raise

    def _require_names(self) -> None:
        """Check that the name by which a child refers to its parent leads to the open file (`INV-NAME-HELD`)."""
        for chain in self._chains:
            require_names(chain.layers[:1])

    def freeze(self) -> list[Chain]:
        """The new chains. The old ones must not be written to meanwhile. Raises what `stack` raises, and `Replaced` if
        the file of a leaf or of its child is no longer under its name.
        """
        self._require_names()
        require_names(self._children)
        return [stack(chain, child) for chain, child in zip(self._chains, self._children, strict=True)]

    def done(self) -> None:
        """Call when the new chains are in use: the children stay, and the old leaves' locks become a reader's."""
        self._kept = True
        for chain, child in zip(self._chains, self._children, strict=True):
            record_parent(child.store, chain.leaf.store, chain.leaf.unique_id or NULL_ID)
            file = pending.file_of(chain.leaf.store)
            if file is not None:
                file.become_reader()

    def _take_back(self) -> None:
        """Remove the children. Raises IoFailed or AccessDenied if one cannot be removed."""
        for child in self._children:
            child.store.close()
        if self._made:
            for chain, path in zip(self._chains, self.paths, strict=True):
                remove_file(path)
                drop_stale_marks(chain.leaf.store.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._kept:
            self._take_back()


def scratch_child(chain: Chain, directory: str | None) -> Chain:
    """A chain with a nameless child on top, in `directory`, which disappears when closed or when the process dies.

    `chain` was opened for reading; its files belong to the new chain. Raises NoSpace, NotFound, AccessDenied.
    """
    store = scratch_store(directory)
    try:
        block_size = chain.leaf.block_size_bytes or DEFAULT_BLOCK_SIZE
        child_format = formats.for_children_of(chain.leaf)
        child_format.create_child(store, chain.size_bytes, _SCRATCH_PARENT, block_size_bytes=block_size)
        child = child_format.open(store, writable=True)
        return stack(chain, child)
    except BaseException:
        store.close()
        raise
