# SPDX-License-Identifier: Apache-2.0
"""Copies the upper layers of a chain to a new image, whose parent reads like the layer below them.

Decides of which kind, size and block size the new image is, and when the two parents count as the same disk. What
moves is decided in `merge_plan`: it is the plan of a merge of the copied layers into an empty child. Must not know
why layers are copied, nor how the caller knows that the parents are alike.

    source    leaf <- ... <- lowest copied layer <- above <- ...
    new       what the copied layers own         <- parent <- ...        parent reads like `above`

The source is only read, and so is the parent: both chains are held as by readers until the new image has its name. It
appears whole, on the device, or not at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, Size, byte_size, checked
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.engine.steady import steady
from vhdkit.chain.names.marks import marked
from vhdkit.chain.names.noted import refuse_unwritten
from vhdkit.chain.names.opening import refuse_more_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.compare import compare_chains
from vhdkit.chain.verbs.create import child_size, require_names, write_child
from vhdkit.chain.verbs.merge_parts import amount, file_of_layer, index_of_layer, opened, seen_through
from vhdkit.chain.verbs.merge_plan import MergePlan, plan_merge
from vhdkit.chain.verbs.merge_recovery import refuse_during_merge, refuse_mixture
from vhdkit.chain.verbs.merge_steps import fold, take_over_disk
from vhdkit.folder import NewFile, real_path
from vhdkit.folder_lock import folders_held
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE
from vhdkit.image import Layer


@dataclass(frozen=True, slots=True)
class CopiedLayers:
    """What was, or would be, copied. Paths are absolute; sizes are bytes.

    `copied` are the layers, leaf first. `data_bytes` of data and `zero_bytes` of zeros lie in `block_count` blocks of
    the image at `path`, whose parent is `parent`.
    """

    path: str
    parent: str
    copied: tuple[str, ...]
    size_bytes: int
    data_bytes: int
    zero_bytes: int
    block_count: int


@checked
def copy_layers(
    leaf: AnyPath,
    path: AnyPath,
    *,
    above: AnyPath,
    parent: AnyPath,
    same_parent: bool = False,
    block_size_bytes: Size | None = None,
    dry_run: bool = False,
    options: OpenOptions | None = None,
    parent_options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> CopiedLayers:
    """Make `path` a child of `parent` that reads like `leaf`: it owns what `leaf` and the layers above `above` own.

    `above` is an ancestor of `leaf`, and `parent`, an image anywhere, reads like it: the two are compared, unless the
    caller knows it (`same_parent`). The layers may differ in size, format and block size; the new image has the size
    of `leaf`, the format of children of `parent`, and the block size of the lowest copied layer where it can. With
    `dry_run` only the amounts are found. `parent_options` open the chain of `parent`; default `options`. `progress` is
    called for the comparison first, then for the copy.

    Raises InvalidArgument, ParentMismatch if the two differ, AlreadyExists, ImageInUse, NoSpace, IoFailed, and what
    opening the two chains raises. On error `path` does not exist.
    """
    options, new_path = options or OpenOptions(), os.fsdecode(path)
    size = None if block_size_bytes is None else byte_size("block_size_bytes", block_size_bytes)
    parent_options = parent_options or replace(options, format_name=None)
    with opened(leaf, options) as layers, opened(parent, parent_options) as below:
        refuse_mixture(leaf)
        refuse_during_merge(parent, parent_options)
        index = index_of_layer(layers, above, itself="has no layers above itself to copy")
        plan = _plan(new_path, layers, index, below, size)
        if not same_parent:
            _compare(plan, layers[index:], progress)
        with steady(Chain(layers)), _prepare(plan) as (new, target):
            moves = plan_merge(plan.sources, target, below_bytes=seen_through(below), fresh=True)
            counted = amount(moves) if dry_run else _run(plan, new, target, moves, progress)
    return CopiedLayers(
        path=real_path(new_path),
        parent=real_path(file_of_layer(plan.parent).name),
        copied=tuple(real_path(file_of_layer(layer).name) for layer in plan.sources),
        size_bytes=plan.size_bytes,
        data_bytes=counted[0],
        zero_bytes=counted[1],
        block_count=len(moves.units),
    )


@dataclass(frozen=True, slots=True, eq=False)
class CopyPlan:
    """A copy of `sources`, leaf first, to a new child at `path` of `below[0]`, whose sizes are in bytes."""

    path: str
    sources: tuple[Layer, ...]
    below: tuple[Layer, ...]
    size_bytes: int
    block_size_bytes: int

    @property
    def parent(self) -> Layer:
        """The parent of the new image."""
        return self.below[0]


def _plan(
    path: str, layers: Sequence[Layer], index: int, below: Sequence[Layer], block_size_bytes: int | None
) -> CopyPlan:
    """Check that the layers before `index` can be copied into a child of the other chain. Changes nothing.

    Raises InvalidArgument, ParentMismatch.
    """
    sources, above, parent = tuple(layers[:index]), layers[index], below[0]
    refuse_unwritten(below)
    refuse_more_layers(len(below) + 1, path)
    parent_path = errors.printable(parent.store.name)
    if parent.size_bytes != above.size_bytes:
        raise errors.ParentMismatch(
            f"{parent_path} has another size than the layer that it stands for, {errors.printable(above.store.name)}",
            path=path,
            expected=f"{above.size_bytes} bytes",
            found=f"{parent.size_bytes} bytes",
            hint="name a parent that reads like that layer, or copy the whole disk: vhdkit convert",
        )
    for layer in sources:
        if layer.sector_bytes < parent.sector_bytes:
            raise errors.InvalidArgument(
                f"has sectors of {layer.sector_bytes} bytes, and {parent_path}, on which the copy would stand, has"
                f" sectors of {parent.sector_bytes} bytes",
                path=layer.store.name,
                hint="copy the whole disk: vhdkit convert",
            )
    size = child_size(path, parent, sources[0].size_bytes)
    return CopyPlan(path, sources, tuple(below), size, block_size_bytes or _block_size(sources[-1], parent))


def _block_size(lowest: Layer, parent: Layer) -> int:
    """The block size of the lowest copied layer; where no new image can have that, the parent's or the usual one."""
    made = formats.for_children_of(parent)
    for size in (lowest.block_size_bytes, parent.block_size_bytes):
        with contextlib.suppress(errors.InvalidArgument):
            made.check_block_size(size)
            return size
    return DEFAULT_BLOCK_SIZE


def _compare(plan: CopyPlan, above: Sequence[Layer], progress: Progress | None) -> None:
    """Raise ParentMismatch unless the new parent reads like the layer below the copied ones."""
    found = compare_chains(Chain(above), Chain(plan.below), progress)
    if not found.same_content:
        raise errors.ParentMismatch(
            f"{errors.printable(plan.parent.store.name)} does not read like"
            f" {errors.printable(above[0].store.name)}: they differ in {found.different_sector_count} sectors, first"
            f" at byte {found.first_difference_bytes:#x}",
            path=plan.path,
            hint="name a parent that reads like that layer, or copy the whole disk: vhdkit convert",
        )


@contextlib.contextmanager
def _prepare(plan: CopyPlan) -> Iterator[tuple[NewFile, Layer]]:
    """The new file, without its name, and the empty child in it."""
    with NewFile(plan.path, like=pending.files_of(plan.sources)) as new:
        write_child(new.store, plan.path, plan.parent, plan.size_bytes, block_size_bytes=plan.block_size_bytes)
        target = formats.for_children_of(plan.parent).open(new.store, writable=True)
        take_over_disk(target, plan.sources[0])
        yield new, target


def _run(plan: CopyPlan, new: NewFile, target: Layer, moves: MergePlan, progress: Progress | None) -> tuple[int, int]:
    """Fill the new image and give it its name; returns the bytes of data and of zeros."""
    new.start_early()
    counted = fold(moves, target, progress)
    target.seal()
    parent_path = file_of_layer(plan.parent).name
    with (
        folders_held([os.path.dirname(real_path(parent_path))]),
        marked([(plan.path, new.store, parent_path)]),
    ):
        require_names(plan.below[:1])
        new.commit()
    return counted
