# SPDX-License-Identifier: Apache-2.0
"""Merging the layers of an export while clients use it.

Decides in how many passes a chain is merged, how fast, when to give up, and how progress is reported. The order in
which files change is decided in `chain.verbs.live_merge`, how an export is held in `nbd.server`.

    layers below the leaf     one pass; clients wait only for the exchange
    the leaf too              freeze it, merge what was frozen, and repeat while the amount shrinks; when little is
                              left, make a last pass with the clients held
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vhdkit import errors
from vhdkit.chain.verbs.live import freezing
from vhdkit.chain.verbs.live_merge import LiveMerge, live_merge
from vhdkit.disk import Disk
from vhdkit.folder import real_path
from vhdkit.image import Layer
from vhdkit.serve.nbd.server import NbdServer
from vhdkit.serve.opening import ImageExport
from vhdkit.units import MIB, format_size, sectors_to_bytes, whole_sectors

LAST_PASS_BYTES = 8 * MIB  # copied while clients wait: some tens of milliseconds
MAX_PASSES = 8
PATIENT_BYTES = 64 * MIB  # what a disk under constant writes may have left after the last pass
_REST = 1.0  # times the time spent copying; without rest clients kept 0.4 of their rate, with 2.0 they also kept 0.5
_NAP_SECONDS = 0.05  # the longest sleep between checks for cancellation


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """`layer` and those below it go into `into` (None: its parent). If `layer` is None it is the leaf.

    Paths are as the user wrote them. `max_rate_bytes`: the most that is copied per second.
    """

    layer: str | None = None
    into: str | None = None
    max_rate_bytes: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ServedMergePlan:
    """A merge of an export's layers: `merged`, the topmost first, go into `into`; all are paths of layers."""

    export: ImageExport
    merged: tuple[str, ...]
    into: str
    with_leaf: bool
    max_rate_bytes: int | None


def plan_served_merge(export: ImageExport, request: MergeRequest) -> ServedMergePlan:
    """Which layers a request means.

    Raises InvalidArgument for layers that do not exist, ReadOnly if the leaf is not open for writing here.
    """
    layers = export.disk.chain.layers
    top = 1 if export.is_temporary else 0
    first = index_of_layer(export, request.layer, top) if request.layer is not None else top
    target = index_of_layer(export, request.into, top) if request.into is not None else first + 1
    if target >= len(layers):
        raise errors.InvalidArgument("has no parent: there is nothing to merge it into", path=path_of(layers[first]))
    if target <= first:
        raise errors.InvalidArgument(
            f"is not below {errors.printable(path_of(layers[first]))}", path=path_of(layers[target])
        )
    if not export.disk.chain.writable and not export.is_temporary:
        raise errors.ReadOnly("is served read-only; merge its layers with `vhdkit merge`", path=export.image_path)
    if (first == 0 and export.is_temporary) or first < top:
        raise errors.InvalidArgument("is under a temporary overlay", path=export.image_path)
    merged = tuple(path_of(layer) for layer in layers[first:target])
    return ServedMergePlan(export, merged, path_of(layers[target]), first == 0, request.max_rate_bytes)


def index_of_layer(export: ImageExport, path: str, top: int = 0) -> int:
    """Which layer of the export a path means. Raises InvalidArgument."""
    layers = export.disk.chain.layers
    for index, layer in enumerate(layers):
        if index >= top and real_path(path_of(layer)) == real_path(path):
            return index
    names = ", ".join(errors.printable(path_of(layer)) for layer in layers[top:])
    raise errors.InvalidArgument(f"is not a layer of export {export.name!r}; there are {names}", path=path)


def freeze_leaf(server: NbdServer, export: ImageExport) -> float:
    """Give the leaf of an export a child that takes its clients' writes; returns for how many seconds they waited."""
    with freezing([(export.disk.chain, None)]) as prepared:
        flush_beside([export])
        with server.hold([export]) as hold:
            [chain] = prepared.freeze()
            export.exchange(Disk(chain))
            prepared.done()
    return hold.seconds


def flush_beside(exports: Sequence[ImageExport]) -> None:
    """Flush disks while their clients write, so that little is left for the flush that clients have to wait for.

    The second time it takes what was written during the first. Raises SyncFailed, NoSpace, IoFailed.
    """
    with contextlib.suppress(errors.DiskClosed):  # the server ends: that is found out when the exports are held
        for _ in range(2):
            for export in exports:
                if export.disk.chain.writable:
                    export.disk.flush()


class ServedMerge:
    """One merge of one export, on a thread other than the loop's."""

    def __init__(self, server: NbdServer, plan: ServedMergePlan) -> None:
        self._server = server
        self._plan = plan
        self._export = plan.export
        self._stop = threading.Event()
        self._done_bytes = self._total_bytes = 0
        self._passes = 0
        self._held_seconds = 0.0
        self._copied = 0

    # -- from the outside ---------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop soon; the next merge reuses what was copied."""
        self._stop.set()

    def document(self) -> dict[str, Any]:
        """The progress."""
        return {
            "layer": self._plan.merged[0],
            "into": self._plan.into,
            "pass": self._passes,
            "done_bytes": self._done_bytes,
            "total_bytes": self._total_bytes,
        }

    def run(self) -> dict[str, Any]:
        """Merge; returns what was done. Raises Cancelled, and ImageInUse if the leaf grows faster than the merge."""
        if self._plan.with_leaf:
            self._converge()
            with live_merge(self._export.disk.chain, 0, 1, self._export.open_mode.options) as merging:
                flush_beside([self._export])
                with self._server.hold([self._export]) as hold:
                    self._copied += sum(merging.copy())
                    self._exchange(merging)
                self._held_seconds = max(self._held_seconds, hold.seconds)
                merging.done()
        else:
            self._pass_over(
                index_of_layer(self._export, self._plan.merged[0]), index_of_layer(self._export, self._plan.into)
            )
        return {
            "export": self._export.name,
            "merged": list(self._plan.merged),
            "into": self._plan.into,
            "leaf": self._export.image_path,
            "copied_bytes": self._copied,
            "passes": self._passes,
            "held_seconds": round(self._held_seconds, 6),
        }

    # -- passes -------------------------------------------------------------------------------------------------

    def _converge(self) -> None:
        """Repeat passes until the leaf is small and the target is its parent."""
        before = None
        while True:
            layers = self._export.disk.chain.layers
            size = owned_bytes(layers[0])
            on_target = index_of_layer(self._export, self._plan.into) == 1
            if on_target and size <= LAST_PASS_BYTES:
                return
            if on_target and before is not None and (self._passes >= MAX_PASSES or size >= before):
                if size <= PATIENT_BYTES:
                    return
                raise errors.ImageInUse(
                    f"grows faster than it can be merged: {format_size(size)} are left after {self._passes} passes",
                    path=path_of(layers[0]),
                    hint="try again when the disk is less busy, or merge it when it is not in use",
                )
            before = size
            self._held_seconds = max(self._held_seconds, freeze_leaf(self._server, self._export))
            self._pass_over(1, index_of_layer(self._export, self._plan.into))

    def _pass_over(self, first: int, target: int) -> None:
        self._passes += 1
        with live_merge(self._export.disk.chain, first, target, self._export.open_mode.options) as merging:
            self._copied += sum(merging.copy(Pace(self)))
            flush_beside([self._export])
            with self._server.hold([self._export]) as hold:
                self._exchange(merging)
            self._held_seconds = max(self._held_seconds, hold.seconds)
            merging.done()

    def _exchange(self, merging: LiveMerge) -> None:
        chain, problem = merging.exchange()
        self._export.exchange(Disk(chain))
        if problem is not None:
            raise problem

    # -- pace ---------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Raise Cancelled if the merge was cancelled or the server is ending."""
        if self._stop.is_set() or self._server.has_ended():
            raise errors.Cancelled(
                f"the merge into {errors.printable(self._plan.into)} was stopped: the disk reads as before",
                hint="merging again continues where it stopped",
            )

    def note(self, done_bytes: int, total_bytes: int) -> None:
        """Record the progress of this pass."""
        self._done_bytes, self._total_bytes = done_bytes, total_bytes

    @property
    def rate(self) -> int | None:
        """The most bytes per second, or None."""
        return self._plan.max_rate_bytes


class Paced(Protocol):
    """Work on a chain under clients."""

    @property
    def rate(self) -> int | None:
        """The most bytes per second, or None."""
        ...

    def note(self, done_bytes: int, total_bytes: int) -> None:
        """Record the progress."""
        ...

    def look(self) -> None:
        """Raise Cancelled if the work is to stop."""
        ...


class Pace:
    """The progress callback of one pass: reports, limits the rate, and stops on request."""

    def __init__(self, work: Paced) -> None:
        self._work = work
        self._began = self._resumed = time.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        self._work.note(done_bytes, total_bytes)
        self._work.look()
        if self._work.rate is None:  # half of the time, leave the processors and the device to the clients
            time.sleep(min(_REST * (time.monotonic() - self._resumed), _NAP_SECONDS))  # the rest itself
            self._resumed = time.monotonic()
        while self._work.rate is not None:
            ahead = done_bytes / self._work.rate - (time.monotonic() - self._began)
            if ahead <= 0:
                return
            time.sleep(min(ahead, _NAP_SECONDS))  # keeps to the rate
            self._work.look()


def owned_bytes(layer: Layer) -> int:
    """How many bytes of the disk a layer owns."""
    if not layer.block_size_bytes:
        return layer.size_bytes
    per_block = whole_sectors(layer.block_size_bytes)
    sectors, end = 0, whole_sectors(layer.size_bytes)
    for block in np.flatnonzero(layer.allocated_blocks()).tolist():
        owned, inside = layer.owned_sectors(block), min(per_block, end - block * per_block)
        sectors += inside if owned is None else int(np.count_nonzero(owned[:inside]))
    return sectors_to_bytes(sectors)


def path_of(layer: Layer) -> str:
    """The path of the file of a layer."""
    return layer.store.name
