# SPDX-License-Identifier: Apache-2.0
"""Filling a layer of an export from the layers below it while clients use it.

Decides which layers a request means, when the served chain is exchanged, and what is done with a leaf, which clients
write to. The order in which files change is decided in `chain.verbs.live_pull`, how an export is held in `nbd.server`.

    a layer below the leaf    filled in parts; clients wait for an exchange after each
    the leaf                  freeze it, fill what was frozen, and merge the new leaf into it (`merging`)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vhdkit import errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.live_pull import LivePull, live_pull
from vhdkit.disk import Disk
from vhdkit.folder import real_path
from vhdkit.serve.control.merging import (
    MergeRequest,
    Pace,
    ServedMerge,
    freeze_leaf,
    index_of_layer,
    path_of,
    plan_served_merge,
)
from vhdkit.serve.nbd.server import NbdServer
from vhdkit.serve.opening import ImageExport


@dataclass(frozen=True, slots=True)
class PullRequest:
    """`layer` (None: the leaf) is filled from those below it, down to `to` (None: the base).

    With `cuts` it then does without these. Paths are as the user wrote them. `max_rate_bytes`: the most that is copied
    per second.
    """

    layer: str | None = None
    to: str | None = None
    cuts: bool = False
    max_rate_bytes: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ServedPullPlan:
    """A pull into the layer `image` of an export from `pulled`, the topmost first; all are paths of layers."""

    export: ImageExport
    image: str
    pulled: tuple[str, ...]
    with_leaf: bool
    cuts: bool
    max_rate_bytes: int | None


def plan_served_pull(export: ImageExport, request: PullRequest) -> ServedPullPlan:
    """Which layers a request means.

    Raises InvalidArgument for layers that do not exist, and if the next start would not find the disk without those
    that are cut off; ReadOnly if the leaf is not open for writing here.
    """
    layers = export.disk.chain.layers
    top = 1 if export.is_temporary else 0
    index = index_of_layer(export, request.layer, top) if request.layer is not None else top
    last = index_of_layer(export, request.to, top) if request.to is not None else len(layers) - 1
    image = path_of(layers[index])
    if index == len(layers) - 1:
        raise errors.InvalidArgument("has no parent: there is nothing to fill it from", path=image)
    if last <= index:
        raise errors.InvalidArgument(f"is not below {errors.printable(image)}", path=path_of(layers[last]))
    if not export.disk.chain.writable and not export.is_temporary:
        raise errors.ReadOnly("is served read-only; fill its layers with `vhdkit pull`", path=export.image_path)
    pulled = tuple(path_of(layer) for layer in layers[index + 1 : last + 1])
    if request.cuts:
        _refuse_unfindable(export, image, pulled)
    return ServedPullPlan(export, image, pulled, index == 0, request.cuts, request.max_rate_bytes)


def _refuse_unfindable(export: ImageExport, image: str, cut_off: Sequence[str]) -> None:
    """Raise InvalidArgument if the next start with --follow-leaf would begin at one of these layers: from there it
    would find an older state of the disk, and serve that."""
    asked = export.asked_path
    if export.open_mode.follow_leaf and real_path(asked) in map(real_path, cut_off):
        raise errors.InvalidArgument(
            f"is served as the newest image above {errors.printable(asked)} (--follow-leaf); cut off from that, it"
            " would not be found any more, and the next start would serve an older state of the disk",
            path=image,
            hint="leave out --independent and --relink; or serve this image by its own name, and pull then",
        )


class ServedPull:
    """One pull into a layer of one export, on a thread other than the loop's."""

    def __init__(self, server: NbdServer, plan: ServedPullPlan) -> None:
        self._server = server
        self._plan = plan
        self._export = plan.export
        self._stop = threading.Event()
        self._done_bytes = self._total_bytes = 0
        self._held_seconds = 0.0
        self._merging: ServedMerge | None = None  # once the leaf is filled

    # -- from the outside ---------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop soon; the next pull finds what was copied."""
        self._stop.set()
        if self._merging is not None:
            self._merging.cancel()

    def document(self) -> dict[str, Any]:
        """The progress."""
        return {
            "layer": self._plan.image,
            "to": self._plan.pulled[-1],
            "done_bytes": self._done_bytes,
            "total_bytes": self._total_bytes,
        }

    def run(self) -> dict[str, Any]:
        """Pull; returns what was done. Raises Cancelled, and what the merge of a new leaf raises.

        If the leaf could not be filled, it becomes the leaf again, so that the next pull continues with it.
        """
        plan, export = self._plan, self._export
        if plan.with_leaf:
            self._held_seconds = freeze_leaf(self._server, export)
        try:
            with self._opened() as pulling:
                copied, zeros = pulling.copy(Pace(self), lambda: self._exchange(pulling))
                self._exchange(pulling, is_last=True)
        except errors.VhdkitError as error:
            if plan.with_leaf:
                self._give_up(error)
            raise
        if plan.with_leaf:
            self._merging = self._merge_of_leaf()
            self.look()
            self._held_seconds = max(self._held_seconds, self._merging.run()["held_seconds"])
        layers = [path_of(layer) for layer in export.disk.chain.layers]
        below = layers[layers.index(plan.image) + 1 :]
        return {
            "export": export.name,
            "layer": plan.image,
            "pulled": list(plan.pulled),
            "parent": below[0] if below else None,
            "copied_bytes": copied,
            "zero_bytes": zeros,
            "held_seconds": round(self._held_seconds, 6),
        }

    def _merge_of_leaf(self) -> ServedMerge:
        request = MergeRequest(into=self._plan.image, max_rate_bytes=self._plan.max_rate_bytes)
        return ServedMerge(self._server, plan_served_merge(self._export, request))

    def _give_up(self, error: errors.VhdkitError) -> None:
        """Merge the new leaf, which holds little, into the one that was to be filled; else `error` says what to do."""
        try:
            if self._server.has_ended():  # there is no time for that
                raise error
            self._merging = self._merge_of_leaf()
            self._merging.run()
        except errors.VhdkitError:
            image, leaf = errors.quoted(self._plan.image), errors.printable(self._export.image_path)
            error.hint = (
                f"the disk goes on in {leaf}; to go on in {image}, merge that: vhdkit ctl SOCKET merge EXPORT --into"
                f" {image}"
            )

    def _opened(self) -> Any:
        export, plan = self._export, self._plan
        index, last = index_of_layer(export, plan.image), index_of_layer(export, plan.pulled[-1])
        return live_pull(export.disk.chain, index, last, cuts=plan.cuts)

    def _exchange(self, pulling: LivePull, *, is_last: bool = False) -> None:
        problem: errors.VhdkitError | None = None
        with self._server.hold([self._export]) as hold:
            chain: Chain
            if is_last:
                chain, problem = pulling.exchange()
            else:
                chain = pulling.look_again()
            self._export.exchange(Disk(chain))
        self._held_seconds = max(self._held_seconds, hold.seconds)
        if problem is not None:
            raise problem

    # -- pace ---------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Raise Cancelled if the pull was cancelled or the server is ending."""
        if self._stop.is_set() or self._server.has_ended():
            raise errors.Cancelled(
                f"filling {errors.printable(self._plan.image)} was stopped: the disk reads as before",
                hint="pulling again continues where it stopped",
            )

    def note(self, done_bytes: int, total_bytes: int) -> None:
        """Record the progress."""
        self._done_bytes, self._total_bytes = done_bytes, total_bytes

    @property
    def rate(self) -> int | None:
        """The most bytes per second, or None."""
        return self._plan.max_rate_bytes
