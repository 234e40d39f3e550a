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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vhdkit import errors, formats
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.children import drop_stale_marks
from vhdkit.chain.names.lineage import forget_parent, record_parent
from vhdkit.chain.names.marks import marked
from vhdkit.chain.names.opening import refuse_more_layers
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.create import child_size, require_names, write_child
from vhdkit.chain.verbs.snapshot import check_names, default_child
from vhdkit.folder import NewFile, commit_all, remove_file, scratch_store
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE
from vhdkit.image import NULL_ID, Layer, ParentRef
from vhdkit.store import FileStore

# The parent of a temporary child is never looked for. Some formats require an id.
_SCRATCH_PARENT = ParentRef.of_paths(b"vhdkit's scratch", 0, relative=".\\parent", absolute="\\parent", name="parent")


def stack(chain: Chain, child: Layer) -> Chain:
    """The chain with an empty, writable `child` on its leaf, which is flushed and read-only from now on.

    `chain` must not be written to any more: its files belong to the new one. On an error it is as before.
    Raises SyncFailed, NoSpace, IoFailed, and what a damaged leaf raises.
    """
    refuse_more_layers(len(chain.layers) + 1, child.store.name)
    chain.leaf.seal()
    return Chain([child, as_parent(chain.leaf), *chain.layers[1:]])


def as_parent(leaf: Layer) -> Layer:
    """The image, already flushed, opened again for reading through the same store."""
    return formats.reopened(leaf, writable=False) if leaf.writable else leaf


@dataclass(frozen=True, slots=True, eq=False)
class FreezePlan:
    """A live snapshot of several chains; `paths` are those of the new leaves."""

    chains: tuple[Chain, ...]
    paths: tuple[str, ...]

    @property
    def leaves(self) -> list[str]:
        """The paths of the leaves that are frozen."""
        return [chain.leaf.store.name for chain in self.chains]

    def is_for(self, pairs: Sequence[tuple[Chain, str | None]]) -> bool:
        """True if these are the same chains, with the same requested paths."""
        return len(pairs) == len(self.chains) and all(
            chain is own and path in (None, made)
            for (chain, path), own, made in zip(pairs, self.chains, self.paths, strict=True)
        )


def plan_freeze(pairs: Sequence[tuple[Chain, str | None]]) -> FreezePlan:
    """The names of the new leaves: (chain, path of its new leaf or None for `default_child`) each. Makes nothing.

    Raises InvalidArgument, ReadOnly, AlreadyExists, NotFound, AccessDenied, `Replaced`.
    """
    for chain, _ in pairs:
        if not chain.writable:
            raise errors.ReadOnly("is opened read-only, so it needs no snapshot", path=chain.leaf.store.name)
    paths = tuple(default_child(chain.leaf) if new is None else new for chain, new in pairs)
    for (chain, _), path in zip(pairs, paths, strict=True):
        NewFile.check(path)
        refuse_more_layers(len(chain.layers) + 1, path)
    plan = FreezePlan(tuple(chain for chain, _ in pairs), paths)
    check_names(plan.leaves, paths)
    _require_names(plan)
    return plan


@contextlib.contextmanager
def freezing(pairs: Sequence[tuple[Chain, str | None]]) -> Iterator[Freezing]:
    """A live snapshot of several chains, all or none: their children exist, durably, while the block runs.

    with freezing(pairs) as prepared:      children are created, durably
        (hold all requests)
        chains = prepared.freeze()
        (serve the new chains)
        prepared.done()

    Leaving before `done` removes the children. Raises what `plan_freeze` raises, NoSpace, IoFailed, ImageInUse.
    """
    plan = plan_freeze(pairs)
    with contextlib.ExitStack() as undo:
        _make_children(plan, undo)
        prepared = Freezing(plan, _opened_children(plan, undo))
        try:
            yield prepared
        except GeneratorExit:  # dropped without being left, perhaps in a forked process: the children are not its own
            undo.pop_all()
            raise
        finally:
            if prepared.is_kept:
                undo.pop_all()


def _make_children(plan: FreezePlan, undo: contextlib.ExitStack) -> None:
    """Write all children and give them their names, or none; `undo` removes them."""
    with contextlib.ExitStack() as stack_:
        files = []
        for chain, path in zip(plan.chains, plan.paths, strict=True):
            new = stack_.enter_context(NewFile(path, like=pending.files_of(chain.layers[:1])))
            write_child(new.store, path, chain.leaf, child_size(path, chain.leaf, None))
            forget_parent(new.store)  # the parent is written to until it is frozen
            files.append(new)
        _require_names(plan)
        with marked([(one.path, one.store, parent) for one, parent in zip(files, plan.leaves, strict=True)]):
            commit_all(files)
            undo.callback(_remove_children, plan)


def _remove_children(plan: FreezePlan) -> None:
    for leaf, path in zip(plan.leaves, plan.paths, strict=True):
        remove_file(path)
        drop_stale_marks(leaf)


def _opened_children(plan: FreezePlan, undo: contextlib.ExitStack) -> tuple[Layer, ...]:
    """The children, held and open for writing; `undo` closes their files."""
    children = []
    for chain, path in zip(plan.chains, plan.paths, strict=True):
        store = FileStore.open_held(path, writable=True, follow_links=False)
        undo.callback(store.close)
        for file in pending.files_of(chain.layers[:1]):
            store.follow(file)
        children.append(formats.for_children_of(chain.leaf).open(store, writable=True))
    return tuple(children)


def _require_names(plan: FreezePlan) -> None:
    """Check that the name by which a child refers to its parent leads to the open file (`INV-NAME-HELD`)."""
    for chain in plan.chains:
        require_names(chain.layers[:1])


@dataclass(slots=True, eq=False)
class Freezing:
    """A live snapshot whose children exist; see `freezing`. `is_kept` is set once they are in use."""

    plan: FreezePlan
    children: tuple[Layer, ...]
    is_kept: bool = False

    def freeze(self) -> list[Chain]:
        """The new chains. The old ones must not be written to meanwhile. Raises what `stack` raises, and `Replaced` if
        the file of a leaf or of its child is no longer under its name.
        """
        _require_names(self.plan)
        require_names(self.children)
        return [stack(chain, child) for chain, child in zip(self.plan.chains, self.children, strict=True)]

    def done(self) -> None:
        """Call when the new chains are in use: the children stay, and the old leaves' locks become a reader's."""
        self.is_kept = True
        for chain, child in zip(self.plan.chains, self.children, strict=True):
            recorded = child.facts.parent
            record_parent(child.store, chain.leaf.store, NULL_ID if recorded is None else recorded.linkage_id)
            file = pending.file_of(chain.leaf.store)
            if file is not None:
                file.become_reader()


def scratch_child(chain: Chain, directory: str | None) -> Chain:
    """A chain with a nameless child on top, in `directory`, which disappears when closed or when the process dies.

    `chain` was opened for reading; its files belong to the new chain. Raises NoSpace, NotFound, AccessDenied.
    """
    store = scratch_store(directory)
    try:
        block_size = chain.leaf.block_size_bytes or DEFAULT_BLOCK_SIZE
        child_format = formats.for_children_of(chain.leaf)
        child_format.create_child(
            store, chain.size_bytes, _SCRATCH_PARENT, block_size_bytes=block_size, disk=chain.leaf
        )
        for file in pending.files_of(chain.layers[:1]):
            store.follow(file)
        child = child_format.open(store, writable=True)
        return stack(chain, child)
    except BaseException:
        store.close()
        raise
