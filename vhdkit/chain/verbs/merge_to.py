# SPDX-License-Identifier: Apache-2.0
"""Merges layers of a chain into a new file, and leaves the chain as it is.

Decides of which kind the new image is (that of the lowest merged layer) and what its parent is (the parent of that
layer, if there is one). The file appears whole or not at all. What is moved is decided in `merge_plan`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vhdkit import formats
from vhdkit.chain.engine.chain import Progress
from vhdkit.chain.names.lineage import inherit_parent, record_parent
from vhdkit.chain.names.marks import marked
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.create import linkage_of, names_of
from vhdkit.chain.verbs.merge_in_place import Merge
from vhdkit.chain.verbs.merge_parts import amount, file_of_layer, seen_through
from vhdkit.chain.verbs.merge_plan import plan_merge
from vhdkit.chain.verbs.merge_steps import fold
from vhdkit.folder import NewFile, real_path
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE, CreateRequest
from vhdkit.image import Layer, ParentRef


@dataclass(frozen=True, slots=True, eq=False)
class MergeToPlan:
    """A merge of `sources`, leaf first, into a new file at `path`, on the parent `below[0]`, if there is one."""

    path: str
    sources: tuple[Layer, ...]
    below: tuple[Layer, ...]

    @property
    def size_bytes(self) -> int:
        """The virtual size of the result."""
        return self.sources[0].size_bytes


def merge_to(layers: Sequence[Layer], index: int, path: str, dry_run: bool, progress: Progress | None) -> Merge:
    """Merge the open layers down to `index` into a new file at `path`; see `merge`."""
    plan = MergeToPlan(path, tuple(layers[: index + 1]), tuple(layers[index + 1 :]))
    merged = tuple(real_path(file_of_layer(layer).name) for layer in plan.sources)
    with _prepare(plan) as (new, target):
        moves = plan_merge(plan.sources, target, below_bytes=seen_through(plan.below), fresh=True)
        counted = amount(moves) if dry_run else fold(moves, target, progress)
        if not dry_run:
            _complete(plan, new, target)
    return Merge(real_path(path), merged, (), (), plan.size_bytes, *counted, len(moves.units))


@contextlib.contextmanager
def _prepare(plan: MergeToPlan) -> Iterator[tuple[NewFile, Layer]]:
    """The new file, without its name, and the empty image in it."""
    with NewFile(plan.path, like=pending.files_of(plan.sources)) as new:
        _write_empty(plan, new)
        yield new, formats.of(plan.sources[-1]).open(new.store, writable=True)


def _complete(plan: MergeToPlan, new: NewFile, target: Layer) -> None:
    """The content is complete: give the file its name, and note the parent's state as the lowest source knew it."""
    target.seal()
    if plan.below:
        parent, parent_id = plan.below[0].store, linkage_of(plan.below[0])
        if not inherit_parent(new.store, plan.sources[-1].store, parent_id):
            record_parent(new.store, parent, parent_id)
    with marked([(plan.path, new.store, file_of_layer(plan.below[0]).name)] if plan.below else []):
        new.commit()


def _write_empty(plan: MergeToPlan, new: NewFile) -> None:
    """An image like the lowest source, and on the same parent."""
    lowest = plan.sources[-1]
    image_format, facts = formats.of(lowest), lowest.facts
    if plan.below:
        assert facts.parent is not None
        names = names_of(new.path, file_of_layer(plan.below[0]).name, facts.parent.linkage_id, facts.parent.timestamp)
        parent: ParentRef = replace(names, linkage_ids=facts.parent.linkage_ids)  # also those of an id that may change
        image_format.create_child(
            new.store, plan.size_bytes, parent, block_size_bytes=lowest.block_size_bytes, disk=lowest
        )
        return
    block_size_bytes = lowest.block_size_bytes or DEFAULT_BLOCK_SIZE
    request = CreateRequest(plan.size_bytes, facts.kind, block_size_bytes, sector_bytes=lowest.sector_bytes)
    image_format.create(new.store, request)
