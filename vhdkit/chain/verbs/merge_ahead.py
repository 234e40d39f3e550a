# SPDX-License-Identifier: Apache-2.0
"""Reads ahead of a merge: what the next blocks need comes from the device while earlier ones are copied.

Decides how far a merge looks ahead, and what is not worth reading because the file system will share it. It only asks
for pages (`ReadStore.prefetch`): nothing depends on whether they come, and the order of changes stays as it is. Asking
for data has a thread of its own, because in that call the kernel finds memory and fills the device's queue.

    units of the plan   . . . . . . . . . . . . . . . . . . .
                        |copied |  data asked for   |  bitmaps asked for   |
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Generator, Sequence

from vhdkit.chain.verbs.merge_plan import Moves
from vhdkit.image import Layer, Piece
from vhdkit.store import FileStore, ReadStore
from vhdkit.transfer import MIN_SHARED_BYTES, may_share
from vhdkit.units import MIB, PAGE_SIZE, sectors_to_bytes

DATA_BYTES = 32 * MIB  # asked for and not yet copied: keeps a device busy, and is little of any page cache
_UNITS = 32  # whose bitmaps are asked for before their data
_ASK_BYTES, _ASK_UNITS = 2 * MIB, 8  # data is asked for together, as handing work to another thread takes 20 us


def read_ahead(plan: Moves, target: Layer) -> Generator[list[Piece], None, None]:
    """The pieces of each block of the plan, as `MergePlan.blocks` gives them; close it. Raises IoFailed."""
    from concurrent.futures import ThreadPoolExecutor  # a slow import that only merges need

    units = iter(plan.units.tolist())
    layers = [layer for layer in (*plan.sources, target) if layer.block_size_bytes]
    for unit in itertools.islice(units, _UNITS):
        _ask_for_ownership(layers, unit * plan.unit_bytes, plan.unit_bytes)
    sharing = sharing_stores(plan.sources, target.store)
    waiting: deque[tuple[int, list[Piece]]] = deque()
    asked_bytes, can_ask = 0, True
    batch: list[tuple[ReadStore, int, int]] = []
    batch_bytes = batch_units = 0
    with ThreadPoolExecutor(1, thread_name_prefix="vhdkit-ahead") as asking:

        def ask() -> None:
            nonlocal batch, batch_bytes, batch_units, can_ask
            if batch and can_ask:
                try:
                    asking.submit(_ask_for_data, batch)
                except RuntimeError:  # the system allows no more threads
                    can_ask = False
            batch, batch_bytes, batch_units = [], 0, 0

        try:
            for pieces in plan.blocks():
                for unit in itertools.islice(units, 1):
                    _ask_for_ownership(layers, unit * plan.unit_bytes, plan.unit_bytes)
                wanted = _wanted(pieces, sharing)
                size = sum(size for _, _, size in wanted)
                batch += wanted
                batch_bytes, batch_units = batch_bytes + size, batch_units + 1
                if batch_bytes >= _ASK_BYTES or batch_units >= _ASK_UNITS:
                    ask()
                waiting.append((size, pieces))
                asked_bytes += size
                while asked_bytes > DATA_BYTES or len(waiting) > _UNITS:
                    size, ready = waiting.popleft()
                    asked_bytes -= size
                    yield ready
            ask()
            for _, ready in waiting:
                yield ready
        finally:
            asking.shutdown(wait=True, cancel_futures=True)


def _ask_for_ownership(layers: Sequence[Layer], offset_bytes: int, size_bytes: int) -> None:
    for layer in layers:
        end = min(offset_bytes + size_bytes, layer.size_bytes)
        for offset in range(offset_bytes, end, layer.block_size_bytes):
            layer.prefetch_ownership(offset // layer.block_size_bytes)


def _wanted(pieces: Sequence[Piece], sharing: Collection[ReadStore]) -> list[tuple[ReadStore, int, int]]:
    """What will be copied, as (file, offset, size), up to the limit. In long pieces the kernel reads ahead further."""
    wanted, left = [], DATA_BYTES
    for piece in pieces:
        if piece.source is None or not _is_copied(piece, sharing):
            continue
        size = min(piece.size_bytes, left)
        if size:
            wanted.append((piece.source, piece.offset_bytes, size))
            left -= size
    return wanted


def _ask_for_data(wanted: Sequence[tuple[ReadStore, int, int]]) -> None:
    for store, offset, size in wanted:
        store.prefetch(offset, size)


def copied_bytes(pieces: Sequence[Piece], sharing: Collection[ReadStore]) -> int:
    """How much of the pieces will be copied, and so has to be written, because the file system cannot share it."""
    return sum(piece.size_bytes for piece in pieces if _is_copied(piece, sharing))


def _is_copied(piece: Piece, sharing: Collection[ReadStore]) -> bool:
    return piece.source is not None and not (piece.source in sharing and _can_be_shared(piece))


def _can_be_shared(piece: Piece) -> bool:
    """Whether it is long enough and lies on pages; in the target, blocks are taken to lie on pages."""
    is_long = piece.size_bytes >= MIN_SHARED_BYTES + PAGE_SIZE
    return is_long and (piece.offset_bytes - sectors_to_bytes(piece.sector_index)) % PAGE_SIZE == 0


def sharing_stores(layers: Sequence[Layer], target: ReadStore) -> frozenset[ReadStore]:
    """The files of the layers with which the file system can probably share space."""
    if not isinstance(target, FileStore) or not may_share(target.fileno()):
        return frozenset()
    stores = [layer.store for layer in layers if isinstance(layer.store, FileStore)]
    return frozenset(store for store in stores if store.identity[0] == target.identity[0])
