# SPDX-License-Identifier: Apache-2.0
"""Merges layers of an open chain while the disk is in use.

Decides in which order files and the open chain change, so that reads in between give the same results as before, and
that an interruption at any point leaves what an interrupted offline merge leaves (`INV-MERGE-PRESERVES`). The caller
ensures that no request is in flight during `exchange`. What is moved is decided in `merge_plan`.

    index 0     the leaf                             takes all writes
    ...         layers above the merge
    first       the newest layer that is merged      only read
    ...
    target      what they are merged into            read where nothing above owns a sector; those sectors stay

    1  locks of first..target become a writer's, record: copy
    2  the sources' sectors go into the target       no request waits; no block of it moves, as the open chain reads it
    3  requests held: record: relink, the layer above points to the target, a new chain without the sources
    4  record: remove, the sources are removed, then the record

The leaf itself is merged into its parent (`first` is 0) with requests held from step 2 on, so it should be small then.
Therefore, to merge a leaf, a caller freezes it (`live.Freezing`), merges what was frozen, and repeats this until
little is left.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Self

from vhdkit import errors, formats
from vhdkit.attributes import check_removable
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names.children import drop_stale_marks, standing_on
from vhdkit.chain.names.lineage import record_parents, same_content
from vhdkit.chain.names.marks import mark_child
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import Intent, Named, Phase
from vhdkit.chain.verbs.create import link_of, linkage_of, require_names
from vhdkit.chain.verbs.merge_parts import merge_would_break, named
from vhdkit.chain.verbs.merge_plan import plan_merge
from vhdkit.chain.verbs.merge_steps import RealNames, drop_earlier_try, fold, remove_sources
from vhdkit.folder import exists, real_path
from vhdkit.image import Layer, ParentRef
from vhdkit.store import FileStore, close_all


class LiveMerge:
    """One merge of the layers `first` up to, and into, `target` of an open chain. Use it in a `with` block.

    with LiveMerge(chain, 1, 3) as merging:   locks and record
        merging.copy()                        the long part, on a separate thread
        (hold all requests)
        chain, problem = merging.exchange()
        (serve the chain; release; raise the problem)
        merging.done()                        the merged files are removed

    Leaving early changes nothing that is served; copied data stays, and the next merge, or `vhdkit merge --resume`
    when the disk is not served, continues from the record.
    """

    def __init__(self, chain: Chain, first: int, target: int, options: OpenOptions | None = None) -> None:
        """Raises InvalidArgument, HasChildren, ImageInUse, AccessDenied, NoSpace, IoFailed, changing nothing."""
        assert 0 <= first < target < len(chain.layers)
        self._chain = chain
        self._first, self._target = first, target
        self._options = options or OpenOptions()
        self._files = [_file(layer) for layer in chain.layers[: target + 1]]
        self._refuse_sizes()
        self._intent = self._intended()
        going = zip(self._intent.sources, self._files[first:], strict=False)
        self._names = RealNames(self._intent.target.path, {one.path: file for one, file in going})
        self._exchanged = False
        self._store: FileStore | None = None  # the target, open for writing
        self._upgraded: list[FileStore] = []
        try:
            self._take_locks()
            self._refuse_children()
            for one in self._intent.sources:
                check_removable(one.path)
            self._store = self._open_target()
            self._names.write(self._intent)
        except BaseException:
            self._let_go()
            raise

    # -- what is refused ----------------------------------------------------------------------------------------

    def _refuse_sizes(self) -> None:
        """Refuse layers of different sizes, left to offline merges: data past an end would change, or blocks move."""
        sizes = {layer.size_bytes for layer in self._chain.layers[: self._target + 1]}
        if len(sizes) > 1:
            raise errors.InvalidArgument(
                "is of another size than the disk: such layers are not merged while they are served",
                path=self._files[self._target].name,
                hint="merge them when the disk is not in use: vhdkit merge",
            )

    def _intended(self) -> Intent:
        names = [named(layer) for layer in self._chain.layers[self._first : self._target + 1]]
        return Intent(Phase.COPY, names[-1], tuple(names[:-1]), relink=self._first > 0)

    def _refuse_children(self) -> None:
        """Raise HasChildren if an image outside the chain stands on a layer that changes or is removed."""
        inside = {real_path(file.name) for file in self._files}
        folders = [real_path(os.path.dirname(file.name)) for file in self._files[self._first :]]
        names: Sequence[Named] = (*self._intent.sources, self._intent.target)
        layers = self._chain.layers[self._first : self._target + 1]
        images = [(linkage_of(layer), one.path) for layer, one in zip(layers, names, strict=True)]
        families = standing_on(images, self._options, folders=folders)
        for one, family in zip(names, families, strict=True):
            outside = [child for child in family if child.path not in inside]
            if outside:
                raise merge_would_break(one.path, outside)

    # -- the files ----------------------------------------------------------------------------------------------

    def _take_locks(self) -> None:
        for index, file in enumerate(self._files[self._first :], self._first):
            if file.is_device:
                raise errors.InvalidArgument("is a device: it cannot be merged", path=file.name)
            if file is not self._chain.layers[index].store:
                raise errors.ImageInUse(
                    "has a change that did not finish", path=file.name, hint="finish it first: vhdkit check says how"
                )
            if index > 0:  # the leaf's lock is a writer's already
                file.become_writer()
                self._upgraded.append(file)
        require_names(self._chain.layers[: self._target + 1])

    def _open_target(self) -> FileStore:
        """Open the target's file for writing; the lock stays with the chain's own opening."""
        file = self._files[self._target]
        store = FileStore.open(file.name, writable=True, follow_links=False)
        store.notes_folder = file.notes_folder
        try:
            _check_same(store, file)
            drop_earlier_try(self._opened(store))  # and an unwritable target is detected before anything changes
        except BaseException:
            store.close()
            raise
        return store

    def _opened(self, store: FileStore) -> Layer:
        """The target as it is filled: the open chain continues to read it, so none of its blocks moves."""
        layer = formats.reopened(self._chain.layers[self._target], writable=True, store=store)
        layer.pin_blocks()
        return layer

    def _let_go(self) -> None:
        if self._store is not None:
            self._store.close()
        for file in self._upgraded:
            file.become_reader()

    # -- the steps ----------------------------------------------------------------------------------------------

    def copy(self, progress: Progress | None = None) -> tuple[int, int]:
        """Make the target complete and durable; returns the bytes of data and of zeros that it took.

        `progress` may raise a VhdkitError to stop: see the class. Raises NoSpace, IoFailed, SyncFailed.
        """
        assert self._store is not None
        if self._first == 0:  # the leaf's file is then complete, for a later comparison with the target
            self._chain.leaf.seal()
            self._chain.leaf.store.sync()
        target = self._opened(self._store)
        sources = self._chain.layers[self._first : self._target]
        below = self._chain.layers[self._target + 1 :]
        plan = plan_merge(sources, target, below_bytes=below[0].size_bytes if below else 0)
        try:
            done = fold(plan, target, progress)
        except errors.VhdkitError:
            with contextlib.suppress(errors.VhdkitError):  # so that the next merge finds it and need not copy it again
                target.flush()
            raise
        target.seal()
        target.store.sync()  # the trailing footer, too
        return done

    def exchange(self) -> tuple[Chain, errors.VhdkitError | None]:
        """A chain to serve instead of the old one, which must not be used meanwhile; the new one owns its other files.

        It lacks the sources, or, with an error, is as it was; then the merge can be retried. Raises if the leaf
        cannot be opened again: the old chain reads as before, and refuses to write.
        """
        try:
            require_names(self._chain.layers[: self._target + 1])
        except errors.VhdkitError as error:
            return self._chain, error
        return self._with_leaf_gone() if self._first == 0 else self._with_layer_relinked()

    def _with_layer_relinked(self) -> tuple[Chain, errors.VhdkitError | None]:
        layers = self._chain.layers
        child, above = layers[self._first - 1], layers[: self._first - 1]
        problem: errors.VhdkitError | None = None
        below = layers[self._first :]
        try:
            if child.writable:
                child.seal()
            target = formats.reopened(layers[self._target], writable=False)
            self._names.write(self._intent.in_phase(Phase.RELINK))
        except errors.VhdkitError as error:  # clients' writes may be in the open child alone: keep it
            return self._chain, error
        try:
            self._repoint(child)
            below = (target, *layers[self._target + 1 :])
            self._exchanged = True
        except errors.VhdkitError as error:
            problem = error
        try:  # even after a failure, its header may be at another place
            child = formats.reopened(child, writable=child.writable)
        except BaseException:
            if child.writable:
                child.refuse_writing()
            raise
        return Chain([*above, child, *below]), problem

    def _repoint(self, child: Layer) -> None:
        """Repoint the layer above the merge to the target; unless it is the leaf, through a separate opening."""
        target = self._chain.layers[self._target]
        file, target_path = _file(child), self._intent.target.path
        parent = link_of(file.name, target_path, target.facts)
        mark_child(file.name, child.store, target_path, linkage_of(target))
        with same_content(file.name):
            self._relink(child, parent)

    def _relink(self, child: Layer, parent: ParentRef) -> None:
        file, child_format = _file(child), formats.of(child)
        if child.writable:
            child_format.relink(file, parent)
            return
        file.become_writer()
        try:
            with FileStore.open(file.name, writable=True, follow_links=False) as store:
                store.notes_folder = file.notes_folder
                _check_same(store, file)
                child_format.relink(store, parent)
        finally:
            file.become_reader()

    def _with_leaf_gone(self) -> tuple[Chain, errors.VhdkitError | None]:
        """The target takes the writes from now on, so the leaf must be durably removed first: it would hide them."""
        assert self._store is not None
        store = self._store
        target = self._chain.layers[self._target]
        leaf = formats.reopened(target, writable=True, store=store)
        problem: errors.VhdkitError | None = None
        try:
            self._names.write(self._intent.in_phase(Phase.REMOVE))
            remove_sources(self._intent, self._names)
            drop_stale_marks(self._intent.target.path)
        except errors.VhdkitError as error:
            if exists(self._intent.leaf.path):  # the leaf will be written to, so the target is soon incomplete again
                self._names.write(self._intent)
                return self._chain, error
            problem = error
            leaf.refuse_writing()  # after a power cut the old leaf may reappear
        store.inherit_lock(self._files[self._target])
        self._exchanged = True
        return Chain([leaf, *self._chain.layers[self._target + 1 :]]), problem

    def done(self) -> None:
        """Call when the new chain is in use: remove the merged files. Raises AccessDenied, IoFailed; `merge --resume`
        continues.
        """
        assert self._exchanged
        if self._first > 0:
            self._names.write(self._intent.in_phase(Phase.REMOVE))
            remove_sources(self._intent, self._names)
            drop_stale_marks(self._intent.target.path)
            child = self._chain.layers[self._first - 1]
            record_parents(_file(child).name, self._intent.target.path, linkage_of(self._chain.layers[self._target]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._exchanged:
            self._let_go()
            return
        gone = self._files[self._first : self._target]
        if self._first == 0:
            gone.append(self._files[self._target])  # the new leaf has its own lock and descriptor
        elif self._store is not None:
            self._store.close()
            self._files[self._target].become_reader()
        close_all(gone)


def _check_same(store: FileStore, file: FileStore) -> None:
    if store.identity != file.identity:
        raise errors.Replaced("was replaced while it was opened", path=store.name)


def _file(layer: Layer) -> FileStore:
    file = pending.file_of(layer.store)
    assert file is not None
    return file
