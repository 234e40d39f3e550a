# SPDX-License-Identifier: Apache-2.0
"""Fills a layer of an open chain from the layers below it while the disk is in use, and cuts it off from them.

Decides in which order the layer's file and the open chain change, so that reads in between give the same results as
before (`INV-PULL-PRESERVES`). The caller ensures that no request is in flight during `exchange`. What the layer lacks
is decided in `pull_plan`, how it is cut off in `pull`.

    index 0     the leaf                          takes all writes
    ...         layers above
    index       the layer that is filled          through an opening of its own; none of its blocks moves
    ...         the layers it is filled from
    ...         the rest

    1  the lock of the layer becomes a writer's
    2  it takes over what it lacks, part by part          no request waits
    3  between two parts, if the caller wishes, with requests held: the layer is opened again, so that what it has
       taken over is read from it
    4  requests held: it is relinked or made independent, and a new chain is served without the pulled layers

The leaf is not filled like this, as it is written to: a caller freezes it (`live.freezing`), fills what was frozen,
and merges the new leaf into that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vhdkit import errors, formats
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names.lineage import same_content
from vhdkit.chain.verbs.create import require_names
from vhdkit.chain.verbs.merge_parts import file_of_layer
from vhdkit.chain.verbs.merge_steps import drop_earlier_try
from vhdkit.chain.verbs.pull import cut_off, fill, keep_id, prepare_cut
from vhdkit.chain.verbs.pull_plan import plan_pull
from vhdkit.descriptor import close_all
from vhdkit.image import Layer
from vhdkit.store import FileStore
from vhdkit.units import GIB

PART_BYTES = 8 * GIB  # of the disk, examined between two exchanges: the new chain has to look up again what lies where


@dataclass(frozen=True, slots=True, eq=False)
class LivePullPlan:
    """Filling the layer `index` of an open chain from those after it, down to the layer `last`.

    If it `cuts`, the layer does without them in the end.
    """

    chain: Chain
    index: int
    last: int
    cuts: bool

    @property
    def image(self) -> Layer:
        """The layer that is filled."""
        return self.chain.layers[self.index]

    @property
    def pulled(self) -> tuple[Layer, ...]:
        """The layers that it is filled from, the topmost first."""
        return self.chain.layers[self.index + 1 : self.last + 1]

    @property
    def rest(self) -> tuple[Layer, ...]:
        """The layers below those."""
        return self.chain.layers[self.last + 1 :]


@contextlib.contextmanager
def live_pull(chain: Chain, index: int, last: int, *, cuts: bool) -> Iterator[LivePull]:
    """One pull into a layer of an open chain, which is held as a writer while the block runs.

    with live_pull(chain, 1, 3, cuts=True) as pulling:
        pulling.copy()                         the long part, on a separate thread
        (hold all requests)
        chain, problem = pulling.exchange()
        (serve the chain; release; raise the problem)

    Leaving early changes nothing that is served, and what was copied stays. Other images may stand on the layer, as
    long as no program has them open. Raises InvalidArgument, ImageInUse, AccessDenied, `Replaced`, changing nothing.
    """
    assert 0 < index < last < len(chain.layers)
    plan = LivePullPlan(chain, index, last, cuts)
    file = file_of_layer(plan.image)
    if file.is_device:
        raise errors.InvalidArgument("is a device: it cannot be filled from its parents", path=file.name)
    if file is not plan.image.store:
        raise errors.ImageInUse("has an unfinished change", path=file.name, hint="undo it first: see vhdkit check")
    with contextlib.ExitStack() as held:
        file.become_writer()
        held.callback(file.become_reader)
        require_names([plan.image])
        store = held.enter_context(FileStore.open(file.name, writable=True, follow_links=False))
        store.follow(file)
        store.notes_folder = None  # what a killed process had filled is filled again; no client waits for it
        if store.identity != file.identity:
            raise errors.Replaced("was replaced while it was opened", path=store.name)
        held.enter_context(same_content(file.name))
        drop_earlier_try(formats.reopened(plan.image, writable=True, store=store))
        pulling = LivePull(plan, formats.reopened(plan.image, writable=True, store=store))
        pulling.filling.pin_blocks()
        keep_id(pulling.filling)
        try:
            yield pulling
        finally:
            pulling.filling.refuse_writing()
            close_all(file_of_layer(layer) for layer in pulling.gone)


@dataclass(slots=True, eq=False)
class LivePull:
    """A pull whose layer is held; see `live_pull`. `filling` is the layer as it is filled, open for writing.

    `plan` is about the chain that is served at present, `gone` are the layers that it does not have any more.
    """

    plan: LivePullPlan
    filling: Layer
    gone: tuple[Layer, ...] = field(default=())

    def copy(self, progress: Progress | None = None, between: Callable[[], None] | None = None) -> tuple[int, int]:
        """Let the layer take over what it lacks, durably; returns the bytes of data and of zeros.

        `progress` may raise a VhdkitError to stop. `between` is called between two parts, and may `look_again`.
        Raises NoSpace, IoFailed, SyncFailed.
        """
        whole = plan_pull(self.filling, self.plan.pulled, self.plan.rest)
        total, before, data, zeros = whole.touched_bytes, 0, 0, 0

        def show(done_bytes: int, _: int) -> None:
            if progress is not None:
                progress(before + done_bytes, total)

        for part in whole.parts(PART_BYTES):
            if before and between is not None:
                between()
            done = fill(part, show)
            data, zeros, before = data + done[0], zeros + done[1], before + part.touched_bytes
        if self.plan.cuts:
            prepare_cut(whole)
        return data, zeros

    def look_again(self) -> Chain:
        """A chain to serve instead of the old one, which must not be used meanwhile, and whose files belong to it.

        In it the layer is read as it is now. Raises if the layer cannot be opened again; the old chain then stays.
        """
        layers = self.plan.chain.layers
        image = formats.reopened(self.plan.image, writable=False)
        chain = Chain([*layers[: self.plan.index], image, *layers[self.plan.index + 1 :]])
        self.plan = LivePullPlan(chain, self.plan.index, self.plan.last, self.plan.cuts)
        return chain

    def exchange(self) -> tuple[Chain, errors.VhdkitError | None]:
        """After `copy`, the same in the end: the layer is cut off, if that is planned.

        With an error it is not, or perhaps is and still has the pulled layers under it, which makes no difference.
        """
        if not self.plan.cuts:
            return self.look_again(), None
        plan = self.plan
        try:
            require_names(plan.chain.layers[: plan.index + 1])
            cut_off(self.filling, plan.pulled[-1], plan.rest)
        except errors.VhdkitError as error:
            return self.look_again(), error  # even after a failure, its header may be at another place
        image = formats.reopened(plan.image, writable=False)
        self.gone = plan.pulled
        return Chain([*plan.chain.layers[: plan.index], image, *plan.rest]), None
