# SPDX-License-Identifier: Apache-2.0
"""Fills an image from its parents, and relinks it below them, or makes it independent of them.

Decides which layers an image is filled from, which locks that needs, and in which order files change. What the image
lacks is decided in `pull_plan`, how it gets another parent or none by its format (`Format.relink`, `Format.detach`).

    image <- upper <- lower <- rest      filled from `upper` and `lower`: it owns what it showed of them
    image <- rest                        relinked: the others keep their files, and may have other children
    image                                independent, if there is no rest

    1  the image takes over what it lacks       durable
    2  it records its new parent, or none       one switch of its header

The disk reads the same at every moment of this (`INV-PULL-PRESERVES`), through the image and through its children,
so its ids stay, children are allowed, and no record is needed: after an interruption the image has its old parent or
its new one, and a repeated call continues. The pulled layers are only read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, checked
from vhdkit.chain.engine.chain import Progress
from vhdkit.chain.names.lineage import forget_parent, inherit_parent, same_content
from vhdkit.chain.names.marks import mark_child
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.create import link_of, linkage_of, require_names
from vhdkit.chain.verbs.merge_parts import amount, file_of_layer, index_of_layer
from vhdkit.chain.verbs.merge_recovery import open_settled, refuse_during_merge
from vhdkit.chain.verbs.merge_steps import drop_earlier_try, fold
from vhdkit.chain.verbs.pull_plan import PullPlan, plan_pull
from vhdkit.folder import real_path
from vhdkit.image import Layer


@dataclass(frozen=True, slots=True)
class Pull:
    """What pulling does, or has done. Paths are absolute; sizes are bytes.

    `pulled` are the layers that the image at `path` was filled from, the topmost first. `parent` is its parent now,
    None for an image that is independent. `data_bytes` were copied, `zero_bytes` became holes.
    """

    path: str
    pulled: tuple[str, ...]
    parent: str | None
    size_bytes: int
    data_bytes: int
    zero_bytes: int


@checked
def pull(
    path: AnyPath,
    *,
    to: AnyPath | None = None,
    relink: bool = False,
    independent: bool = False,
    dry_run: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Pull:
    """Fill the image at `path` from its parents, down to its ancestor `to` (if None, from all of them).

    It then owns all that it showed of these layers. With `relink` it becomes a child of the layer below `to`; with
    `independent` it is filled from all and has no parent any more. The disk, its size and the image's ids stay the
    same, so its children, if it has any, stay valid. Other files do not change. `dry_run` only reports the amounts.

    Raises InvalidArgument, ImageInUse if a program has the image open, NoSpace, IoFailed, SyncFailed, and what opening
    raises. On error, Ctrl-C or a power cut the disk reads as before, and the same call continues.
    """
    if independent and to is not None:
        raise errors.InvalidArgument("an independent image is filled from all its parents: leave out `to`")
    options = options or OpenOptions()
    with _prepare(path, options, relinks=relink or independent, dry_run=dry_run) as layers:
        if len(layers) == 1:
            return _without_parent(layers[0], independent=independent)
        index = len(layers) - 1 if to is None else index_of_layer(layers, to, itself="cannot be filled from itself")
        plan = plan_pull(layers[0], layers[1 : index + 1], layers[index + 1 :])
        rest, above = layers[index + 1 :], layers[1:]
        if dry_run:
            done = amount(plan)
        else:
            keep_id(plan.image)
            done = fill(plan, progress)
        if relink or independent:
            above = rest
            if not dry_run:
                prepare_cut(plan)
                cut_off(plan.image, plan.sources[-1], rest)
        return Pull(
            path=real_path(file_of_layer(plan.image).name),
            pulled=tuple(real_path(file_of_layer(layer).name) for layer in plan.sources),
            parent=real_path(file_of_layer(above[0]).name) if above else None,
            size_bytes=plan.image.size_bytes,
            data_bytes=done[0],
            zero_bytes=done[1],
        )


def _without_parent(image: Layer, *, independent: bool) -> Pull:
    """The result for an image without a parent, which an interrupted call may have made independent already."""
    file = file_of_layer(image)
    if not independent:
        raise errors.InvalidArgument("has no parent: there is nothing to fill it from", path=file.name)
    return Pull(real_path(file.name), (), None, image.size_bytes, 0, 0)


@contextlib.contextmanager
def _prepare(path: AnyPath, options: OpenOptions, *, relinks: bool, dry_run: bool) -> Iterator[list[Layer]]:
    """The open chain, leaf first, held; unless `dry_run` the image is open for writing, every merge of it finished.

    What children of the image read is declared to stay the same.
    """
    name = os.fsdecode(path)
    if relinks:
        refuse_during_merge(name, options)
    with contextlib.nullcontext() if dry_run else same_content(name):
        layers = open_layers(path, options=options) if dry_run else open_settled(path, options, None)
        try:
            if file_of_layer(layers[0]).is_device:
                raise errors.InvalidArgument("is a device: it cannot be filled from its parents", path=name)
            if layers[0].writable and len(layers) > 1:
                drop_earlier_try(layers[0])
                layers[0] = formats.reopened(layers[0], writable=True)
            yield layers
        finally:
            for layer in layers:
                layer.close()


def fill(plan: PullPlan, progress: Progress | None = None) -> tuple[int, int]:
    """Let the image, open for writing, take over what it lacks, durably; returns the bytes of data and of zeros.

    Call `keep_id` before. Raises NoSpace, IoFailed, SyncFailed.
    """
    image = plan.image
    try:
        done = fold(plan, image, progress)
    except errors.VhdkitError:
        with contextlib.suppress(errors.VhdkitError):  # so that the next attempt finds it and need not copy it again
            image.seal()
        raise
    image.seal()
    return done


def keep_id(image: Layer) -> None:
    """Let the image keep its linkage id while it is filled: what a reader sees through it does not change."""
    if image.unique_id is not None:
        formats.of(image).set_renewed_id(image, image.unique_id)


def prepare_cut(plan: PullPlan) -> None:
    """Do to the image, which was filled, what takes long before `cut_off`. Raises NoSpace, IoFailed, SyncFailed."""
    assert plan.is_done()
    if plan.is_last:
        formats.of(plan.image).prepare_detach(plan.image)
        plan.image.seal()


def cut_off(image: Layer, lowest: Layer, rest: Sequence[Layer]) -> None:
    """Make the image, which was prepared, a child of `rest[0]`, or without `rest` one without a parent. Durable.

    `lowest` is the last of the pulled layers; what it noted of the state of its parent holds for the image, too.
    Afterwards the open image can only be closed. Raises InvalidArgument, `Replaced`, NoSpace, IoFailed, SyncFailed;
    the image then has its old parent or its new one.
    """
    file = file_of_layer(image)
    require_names([image, *rest[:1]])
    image.refuse_writing()
    if not rest:
        formats.of(image).detach(file)
        forget_parent(file)
        return
    parent_path, parent_id = file_of_layer(rest[0]).name, linkage_of(rest[0])
    mark_child(file.name, file, parent_path, parent_id)
    formats.of(image).relink(file, link_of(file.name, parent_path, rest[0].facts))
    inherit_parent(file, lowest.store, parent_id)
