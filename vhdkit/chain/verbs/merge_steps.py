# SPDX-License-Identifier: Apache-2.0
"""The steps of a merge, independent of where its files come from: moving data and changing names.

Decides how the plan's pieces reach the target and in which order record and names change. `Names` is the interface to
the folder, so that the power-cut tests can use a folder of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from vhdkit import errors, formats
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names import marks
from vhdkit.chain.names.lineage import same_content
from vhdkit.chain.names.marks import mark_child
from vhdkit.chain.records import pending, references
from vhdkit.chain.records.intent import KIND, Intent, Named, Phase, intent_of
from vhdkit.chain.verbs.merge_ahead import copied_bytes, read_ahead, sharing_stores
from vhdkit.chain.verbs.merge_plan import MergePlan, Moves
from vhdkit.folder import exists, remove_file, sidecar_path, write_whole
from vhdkit.image import Layer, Piece
from vhdkit.store import FileStore
from vhdkit.units import MIB, sectors_to_bytes, whole_sectors

_PIECE_BYTES = MIB
_FLUSH_BYTES = 256 * MIB  # copied between two flushes: bounds dirty pages and pending metadata
_SHARED_PER_COPIED = 16  # so many shared bytes count as one: they make no dirty pages, only entries in a journal


class Names(Protocol):
    """A merge's changes to the folder; each is durable when it returns."""

    def write(self, intent: Intent) -> None:
        """Make this the merge's record, replacing an earlier one."""
        ...

    def hand_on(self, intent: Intent) -> None:
        """The target is complete and reads as the leaf, which still exists: it gets its marks of nights."""
        ...

    def remove_record(self) -> None:
        """Remove the record: the merge is complete."""
        ...

    def remove(self, path: str) -> None:
        """Remove a merged layer; a missing one is fine."""
        ...


class RealNames:
    """`Names` in the file system."""

    def __init__(self, target_path: str, held: Mapping[str, FileStore] | None = None) -> None:
        """`held` are the files to be removed, open and locked, by path: no other file is removed under their names."""
        self._target = target_path
        self._record = sidecar_path(target_path, KIND)
        self._held = held or {}

    def write(self, intent: Intent) -> None:
        """See `Names.write`. Raises AccessDenied, NoSpace, IoFailed."""
        with FileStore.open(self._target) as target:  # users who may read the image may read its record
            write_whole(self._record, intent.encode(), like=target)

    def hand_on(self, intent: Intent) -> None:
        """See `Names.hand_on`. If that fails, it is logged."""
        references.hand_on(intent.leaf.path, intent.target.path)

    def remove_record(self) -> None:
        """See `Names.remove_record`. Raises AccessDenied, IoFailed."""
        remove_file(self._record)

    def remove(self, path: str) -> None:
        """See `Names.remove`; also removes the records of other unfinished changes to the layer, even of a merge into
        it that was still copying. Raises AccessDenied, IoFailed, `Replaced` if the name now leads to another file.
        """
        if path in self._held and exists(path):
            self._held[path].require_name()
        remove_file(path)
        marks.forget(path)
        references.forget_marks(path)
        if exists(pending.undo_path(path)):
            remove_file(pending.undo_path(path))
        earlier = intent_of(path)
        if earlier is not None and earlier.phase is Phase.COPY:
            remove_file(sidecar_path(path, KIND))


def drop_earlier_try(target: Layer) -> None:
    """Release what an interrupted merge copied to the end of the file, to which nothing points yet.

    Otherwise each new attempt would leave more of it. Open the target again afterwards: the layer does not know the
    new end of its file. Raises IoFailed, NoSpace, SyncFailed.
    """
    formats.of(target).drop_unreferenced(target)


def accept_renewed_id(child: FileStore, target: Layer, named: Named) -> None:
    """Before the first write through `target`: let its `child` record the id that this write brings.

    The present id is recorded too, so the child finds its parent whether or not the write is made. If the record of
    the merge names the target by both ids (`named`), the child records those. Does nothing for a format whose ids
    stay. The child is held as a writer, and nothing is being written to it through another opening.
    Raises `Replaced`, NoSpace, IoFailed, SyncFailed.
    """
    if named.renewed_id is not None:
        formats.of(target).set_renewed_id(target, named.renewed_id)
    renewed = formats.of(target).renewed_id(target)
    if renewed is None:
        return
    present = named.unique_id if named.renewed_id is not None else target.unique_id
    with opened_for_relink(child) as store:
        child_format = formats.for_children_of(target)
        parent = child_format.facts(store).parent
        assert parent is not None and present is not None
        mark_child(child.name, store, target.store.name, renewed)
        with same_content(child.name):
            child_format.relink(store, replace(parent, linkage_ids=(renewed, present)))


@contextlib.contextmanager
def opened_for_relink(file: FileStore) -> Iterator[FileStore]:
    """A file that is held as a writer, open for writing: itself if it is, else another opening, which has no lock.

    An unfinished change to it is undone; what it reads as stays the same. Raises `Replaced` if the name leads to
    another file, NoSpace, IoFailed.
    """
    if file.writable:
        yield file
        return
    with FileStore.open(file.name, writable=True, follow_links=False) as store:
        store.follow(file)
        if store.identity != file.identity:
            raise errors.Replaced("was replaced while it was opened", path=store.name)
        pending.settle(store, content_stays=True)
        yield store


def fold(plan: Moves, target: Layer, progress: Progress | None = None) -> tuple[int, int]:
    """Move everything in the plan to the open target; returns the bytes of data and of zeros.

    The moved data is on the device once the target is closed. Raises NoSpace, IoFailed, SyncFailed.
    """
    data = zeros = unsynced = done = 0
    total, sharing = plan.touched_bytes, sharing_stores(plan.sources, target.store)
    with contextlib.closing(read_ahead(plan, target)) as blocks:
        for pieces in blocks:
            done += plan.unit_bytes
            if not pieces:
                continue
            target.copy_in(pieces)
            moved = sum(piece.size_bytes for piece in pieces if piece.source is not None)
            data += moved
            zeros += sum(piece.size_bytes for piece in pieces) - moved
            copied = copied_bytes(pieces, sharing)
            unsynced += copied + (moved - copied) // _SHARED_PER_COPIED
            if unsynced >= _FLUSH_BYTES:
                target.flush()
                unsynced = 0
            if progress is not None:
                progress(done, total)
    return data, zeros


def fill_target(
    plan: MergePlan, target: Layer, open_again: Callable[[], Layer], progress: Progress | None = None
) -> tuple[int, int]:
    """Make the target complete and durable, at the leaf's size, and close it; returns what `fold` does.

    What belongs to the virtual disk itself, and not to one image of it, is taken over from the leaf.

    `target` is open for writing. After a change of its size it is opened again by `open_again`, for writing, too: the
    layer that changed the size does not know the new one.
    """
    size = plan.size_bytes
    if target.size_bytes < size:
        set_size(target, size)
        target = open_again()
    try:
        done = fold(plan, target, progress)
    except errors.VhdkitError:
        with contextlib.suppress(errors.VhdkitError):  # so that the next attempt finds it and need not copy it again
            target.flush()
        raise
    if target.size_bytes > size:
        target.seal()
        target = open_again()
        set_size(target, size)
        target = open_again()
    take_over_disk(target, plan.sources[0])
    target.close()
    return done


def take_over_disk(target: Layer, leaf: Layer, *, dry_run: bool = False) -> None:
    """Give the filled target the identity of the leaf's virtual disk: see `Format.take_over_disk`."""
    if leaf.format_name == target.format_name:
        formats.of(target).take_over_disk(target, leaf, dry_run=dry_run)


def set_size(target: Layer, size_bytes: int) -> None:
    """Change the virtual size of the target, open for writing, durably. The open layer is unusable afterwards.

    Added space is zeros. Removed space is past the leaf's end and not visible through it. Raises NoSpace, IoFailed,
    SyncFailed; the target then has one size or the other.
    """
    resizable = formats.of(target).resizable(target)
    assert resizable is not None  # `check_size` has refused others
    plan, store = resizable.plan(size_bytes), target.store
    if plan.writes is None:
        resizable.run(plan)
        return
    assert isinstance(store, FileStore)
    kept, (_, end) = min(size_bytes, target.size_bytes), resizable.spare_range()
    store.punch(kept, end - kept)  # in the larger disk it must read as zeros
    store.sync()
    pending.change(store, plan.writes, plan.file_size_bytes)


def check_size(target: Layer, size_bytes: int) -> None:
    """Raise InvalidArgument for a size that the target cannot have."""
    if target.size_bytes == size_bytes:
        return
    resizable = formats.of(target).resizable(target)
    if resizable is None:
        raise errors.InvalidArgument(
            f"is a {target.facts.title}, whose size cannot be changed",
            path=target.store.name,
            hint="merge to a new file with --to",
        )
    resizable.check_size(size_bytes)


def is_complete(plan: MergePlan, leaf: Chain, target: Chain) -> bool:
    """True if the target reads like the leaf wherever a source owns something. Reads all of that."""
    ours, theirs = memoryview(bytearray(_PIECE_BYTES)), memoryview(bytearray(_PIECE_BYTES))
    step = whole_sectors(_PIECE_BYTES)
    for pieces in plan.blocks():
        for first, end in _joined(pieces):
            for position in range(first, end, step):
                size = sectors_to_bytes(min(step, end - position))
                leaf.read_into(position, ours[:size])
                target.read_into(position, theirs[:size])
                if ours[:size] != theirs[:size]:
                    return False
    return True


def _joined(pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """(first sector, end sector) of adjacent pieces joined."""
    start = end = -1
    for piece in pieces:
        if piece.sector_index != end:
            if end > start:
                yield start, end
            start = piece.sector_index
        end = piece.sector_index + piece.sector_count
    if end > start:
        yield start, end


def carry_out(
    intent: Intent,
    names: Names,
    fill: Callable[[], tuple[int, int]],
    repoint: Iterable[Callable[[], None]] = (),
) -> tuple[int, int]:
    """Carry out the whole merge, or the rest of it, in order; returns the result of `fill`, or (0, 0) if it was done.

    `fill` makes the target complete and durable; each of `repoint` moves one child of the leaf to the target.
    If anything is raised in between, the leaf, or the target if the leaf is gone, reads as before.
    """
    done = (0, 0)
    if intent.phase is Phase.COPY:
        names.write(intent)
        done = fill()
    if intent.relink:
        names.write(intent.in_phase(Phase.RELINK))
        for step in repoint:
            step()
    names.write(intent.in_phase(Phase.REMOVE))
    names.hand_on(intent)
    remove_sources(intent, names)
    return done


def remove_sources(intent: Intent, names: Names) -> None:
    """Remove the merged layers, the leaf first, because it cannot be read without the others."""
    for one in intent.sources:
        names.remove(one.path)
    names.remove_record()
