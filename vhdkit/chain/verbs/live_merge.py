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
Therefore, to merge a leaf, a caller freezes it (`live.freezing`), merges what was frozen, and repeats this until
little is left.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vhdkit import errors, formats
from vhdkit.attributes import check_removable
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names.children import children_of, drop_stale_marks
from vhdkit.chain.names.lineage import record_parents, same_content
from vhdkit.chain.names.marks import mark_child
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import linkage_id_of
from vhdkit.chain.records import references
from vhdkit.chain.records.intent import Intent, Named, Phase
from vhdkit.chain.verbs.create import link_of, linkage_of, require_names
from vhdkit.chain.verbs.merge_parts import (
    file_of_layer,
    merge_would_break,
    named,
    named_target,
    refuse_sectors,
    seen_through,
)
from vhdkit.chain.verbs.merge_plan import plan_merge
from vhdkit.chain.verbs.merge_steps import (
    RealNames,
    accept_renewed_id,
    drop_earlier_try,
    fold,
    opened_for_relink,
    remove_sources,
    take_over_disk,
)
from vhdkit.descriptor import close_all
from vhdkit.folder import exists, real_path
from vhdkit.image import Layer
from vhdkit.store import FileStore


@dataclass(frozen=True, slots=True, eq=False)
class LiveMergePlan:
    """A merge of the layers `first` up to, and into, `target` of an open chain; `intent` is its record.

    Which sectors move is planned when they are copied: until then the leaf, if it is merged, is written to.
    """

    chain: Chain
    first: int
    target: int
    intent: Intent

    @property
    def with_leaf(self) -> bool:
        """Whether the leaf itself is merged."""
        return self.first == 0

    @property
    def sources(self) -> tuple[Layer, ...]:
        """The layers that go into the target, the topmost first."""
        return self.chain.layers[self.first : self.target]

    @property
    def below(self) -> tuple[Layer, ...]:
        """The layers below the target."""
        return self.chain.layers[self.target + 1 :]

    @property
    def changing(self) -> tuple[Layer, ...]:
        """The layers that are changed or removed: the sources and the target."""
        return self.chain.layers[self.first : self.target + 1]

    @property
    def held(self) -> tuple[Layer, ...]:
        """All layers down to the target."""
        return self.chain.layers[: self.target + 1]


def plan_live_merge(chain: Chain, first: int, target: int) -> LiveMergePlan:
    """A merge of these layers of an open chain. Changes and locks nothing.

    Raises InvalidArgument for layers of different sizes, which are left to offline merges: data past an end would
    change, or blocks would move.
    """
    assert 0 <= first < target < len(chain.layers)
    refuse_sectors(chain.layers[first : target + 1])
    names = [named(layer) for layer in chain.layers[first : target + 1]]
    plan = LiveMergePlan(chain, first, target, Intent(Phase.COPY, names[-1], tuple(names[:-1]), relink=first > 0))
    if len({layer.size_bytes for layer in plan.held}) > 1:
        raise errors.InvalidArgument(
            "has another size than the disk: such layers cannot be merged while they are served",
            path=file_of_layer(chain.layers[target]).name,
            hint="merge them when the disk is not in use: vhdkit merge",
        )
    return plan


@contextlib.contextmanager
def live_merge(chain: Chain, first: int, target: int, options: OpenOptions | None = None) -> Iterator[LiveMerge]:
    """One merge of layers of an open chain; its files are held, and its record exists, while the block runs.

    with live_merge(chain, 1, 3) as merging:   locks and record
        merging.copy()                         the long part, on a separate thread
        (hold all requests)
        chain, problem = merging.exchange()
        (serve the chain; release; raise the problem)
        merging.done()                         the merged files are removed

    Leaving early changes nothing that is served; copied data stays, and the next merge, or `vhdkit merge --resume`
    when the disk is not served, continues from the record.
    Raises InvalidArgument, HasChildren, ImageInUse, AccessDenied, NoSpace, IoFailed, changing nothing.
    """
    plan = plan_live_merge(chain, first, target)
    sources, files = [one.path for one in plan.intent.sources], [file_of_layer(layer) for layer in plan.sources]
    names = RealNames(plan.intent.target.path, dict(zip(sources, files, strict=True)))
    with contextlib.ExitStack() as held:
        _take_locks(plan, held)
        _refuse_children(plan, options or OpenOptions())
        for one in plan.intent.sources:
            check_removable(one.path)
        store, target_name = _open_target(plan, held)
        plan = replace(plan, intent=replace(plan.intent, target=target_name))
        names.write(plan.intent)
        merging = LiveMerge(plan, names, store)
        try:
            yield merging
        finally:
            if merging.new_target is not None:
                held.pop_all()
                merging.close_merged()


# -- what is refused, and the files that are held ----------------------------------------------------------------


def _take_locks(plan: LiveMergePlan, held: contextlib.ExitStack) -> None:
    """Make readers' locks writers'; `held` takes them back."""
    for index, layer in enumerate(plan.changing, plan.first):
        file = file_of_layer(layer)
        if file.is_device:
            raise errors.InvalidArgument("is a device: it cannot be merged", path=file.name)
        if file is not layer.store:
            raise errors.ImageInUse("has an unfinished change", path=file.name, hint="undo it first: see vhdkit check")
        if index > 0:  # the leaf's lock is a writer's already
            file.become_writer()
            held.callback(file.become_reader)
    require_names(plan.held)


def _refuse_children(plan: LiveMergePlan, options: OpenOptions) -> None:
    """Raise HasChildren if an image outside the chain is a child of a layer that changes or is removed."""
    inside = {real_path(file_of_layer(layer).name) for layer in plan.held}
    folders = [real_path(os.path.dirname(file_of_layer(layer).name)) for layer in plan.changing]
    names = (*plan.intent.sources, plan.intent.target)
    # As the files are now: an earlier merge, which was stopped, may have changed the target's id.
    ids = [linkage_id_of(file_of_layer(layer)) for layer in plan.changing]
    families = children_of([(id_, one.path) for id_, one in zip(ids, names, strict=True)], options, folders=folders)
    for one, family in zip(names, families, strict=True):
        outside = [child for child in family if child.path not in inside]
        if outside:
            raise merge_would_break(one.path, outside)


def _open_target(plan: LiveMergePlan, held: contextlib.ExitStack) -> tuple[FileStore, Named]:
    """The target's file, open for writing, without what an earlier merge left after its blocks; and its `Named`.

    The lock stays with the chain's own opening. A target that cannot be written to is detected here, before anything
    changes; `copy` opens the image again, because the end of its file may be another one then.
    """
    file = file_of_layer(plan.chain.layers[plan.target])
    store = held.enter_context(FileStore.open(file.name, writable=True, follow_links=False))
    store.follow(file)
    if store.identity != file.identity:
        raise errors.Replaced("was replaced while it was opened", path=store.name)
    references.remove(file)
    with same_content(file.name):  # no record says yet that a merge changes it
        target = _opened(plan, store)
        take_over_disk(target, plan.sources[0], dry_run=True)
        drop_earlier_try(target)
    return store, named_target(target)


def _opened(plan: LiveMergePlan, store: FileStore) -> Layer:
    """The target as it is filled: the open chain continues to read it, so none of its blocks moves."""
    layer = formats.reopened(plan.chain.layers[plan.target], writable=True, store=store)
    layer.pin_blocks()
    return layer


# -- the steps ---------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class LiveMerge:
    """A merge whose files are held; see `live_merge`. `store` is the target's file, open for writing.

    `new_target` is the target in the new chain, once there is one.
    """

    plan: LiveMergePlan
    names: RealNames
    store: FileStore
    new_target: Layer | None = None

    @property
    def _intent_now(self) -> Intent:
        """The record with the present id of a leaf that was written to since the merge began."""
        intent, sources = self.plan.intent, self.plan.sources
        return replace(intent, sources=(named(sources[0]), *intent.sources[1:]))

    def copy(self, progress: Progress | None = None) -> tuple[int, int]:
        """Make the target complete and durable; returns the bytes of data and of zeros that it took.

        `progress` may raise a VhdkitError to stop: see `live_merge`. Raises NoSpace, IoFailed, SyncFailed.
        """
        plan = self.plan
        if plan.with_leaf:  # the leaf's file is then complete, for a later comparison with the target
            plan.chain.leaf.seal()
            plan.chain.leaf.store.sync()
        target = _opened(plan, self.store)
        for layer in plan.sources:  # a killed writer may have left an id that is not on the device yet
            file_of_layer(layer).sync()
        accept_renewed_id(file_of_layer(plan.sources[-1]), target, plan.intent.target)
        moves = plan_merge(plan.sources, target, below_bytes=seen_through(plan.below))
        try:
            done = fold(moves, target, progress)
        except errors.VhdkitError:
            with contextlib.suppress(errors.VhdkitError):  # so that the next merge finds it and need not copy it again
                target.flush()
            raise
        take_over_disk(target, plan.sources[0])
        target.seal()
        target.store.sync()  # the trailing footer, too
        return done

    def exchange(self) -> tuple[Chain, errors.VhdkitError | None]:
        """A chain to serve instead of the old one, which must not be used meanwhile; the new one owns its other files.

        It lacks the sources, or, with an error, is as it was; then the merge can be retried. Raises if the leaf
        cannot be opened again: the old chain reads as before, and refuses to write.
        """
        try:
            require_names(self.plan.held)
        except errors.VhdkitError as error:
            return self.plan.chain, error
        return self._with_leaf_gone() if self.plan.with_leaf else self._with_layer_relinked()

    def _with_layer_relinked(self) -> tuple[Chain, errors.VhdkitError | None]:
        plan, layers = self.plan, self.plan.chain.layers
        child, above = layers[plan.first - 1], layers[: plan.first - 1]
        problem: errors.VhdkitError | None = None
        below = layers[plan.first :]
        try:
            if child.writable:
                child.seal()
            target = formats.reopened(layers[plan.target], writable=False)
            self.names.write(plan.intent.in_phase(Phase.RELINK))
        except errors.VhdkitError as error:  # clients' writes may be in the open child alone: keep it
            return plan.chain, error
        try:
            self._repoint(child, target)
            below = (target, *plan.below)
        except errors.VhdkitError as error:
            problem = error
        try:  # even after a failure, its header may be at another place
            child = formats.reopened(child, writable=child.writable, store=file_of_layer(child))
        except BaseException:
            if child.writable:
                child.refuse_writing()
            raise
        self.new_target = target if problem is None else None
        return Chain([*above, child, *below]), problem

    def _repoint(self, child: Layer, target: Layer) -> None:
        """Repoint the layer above the merge to the target as it is now; unless it is the leaf, through another opening
        of its file, for which its lock becomes a writer's.
        """
        file, target_path = file_of_layer(child), self.plan.intent.target.path
        parent = link_of(file.name, target_path, target.facts)
        mark_child(file.name, child.store, target_path, linkage_of(target))
        with same_content(file.name), contextlib.ExitStack() as held:
            if not child.writable:
                file.become_writer()
                held.callback(file.become_reader)
            formats.of(child).relink(held.enter_context(opened_for_relink(file)), parent)

    def _with_leaf_gone(self) -> tuple[Chain, errors.VhdkitError | None]:
        """The target takes the writes from now on, so the leaf must be durably removed first: it would hide them."""
        plan, old = self.plan, self.plan.chain.layers[self.plan.target]
        leaf = formats.reopened(old, writable=True, store=self.store)
        problem: errors.VhdkitError | None = None
        try:
            self.names.write(self._intent_now.in_phase(Phase.REMOVE))
            remove_sources(plan.intent, self.names)
            drop_stale_marks(plan.intent.target.path)
        except errors.VhdkitError as error:
            if exists(plan.intent.leaf.path):  # the leaf will be written to, so the target is soon incomplete again
                self.names.write(plan.intent)
                return plan.chain, error
            problem = error
            leaf.refuse_writing()  # after a power cut the old leaf may reappear
        self.store.inherit_lock(file_of_layer(old))
        self.new_target = leaf
        return Chain([leaf, *plan.below]), problem

    def done(self) -> None:
        """Call when the new chain is in use: remove the merged files. Raises AccessDenied, IoFailed; `merge --resume`
        continues.
        """
        assert self.new_target is not None
        plan, target_path = self.plan, self.plan.intent.target.path
        if not plan.with_leaf:
            self.names.write(plan.intent.in_phase(Phase.REMOVE))
            self.names.hand_on(plan.intent)
            remove_sources(plan.intent, self.names)
            drop_stale_marks(target_path)
            child = file_of_layer(plan.chain.layers[plan.first - 1])
            record_parents(child.name, target_path, linkage_of(self.new_target))

    def close_merged(self) -> None:
        """Close what the new chain does not use: the sources, and the second opening of the target."""
        gone, target = [file_of_layer(layer) for layer in self.plan.sources], file_of_layer(self.plan.changing[-1])
        if self.plan.with_leaf:
            gone.append(target)  # the new leaf has its own lock and descriptor
        else:
            self.store.close()
            target.become_reader()
        close_all(gone)
