# SPDX-License-Identifier: Apache-2.0
"""INV-REPAIR-WHOLE and INV-BOUNDED: repairing any bytes ends in success or a `VhdkitError`, and loses nothing unasked.

Fed: one file, as `fuzz_open`, with the same seeds; `fuzz_vhdx_repair` feeds it images of VHDX. Tried: planning a
repair with no, some and all consent; the change with its undo log; opening, reading and checking what came of it;
repairing again.

- planning writes nothing, and what it says can be printed;
- an image that opened before opens afterwards, and every sector reads the same, everywhere but in the ranges that
  were told to be lost or doubtful;
- the log takes back every byte, and belongs to the file at the beginning and at the end;
- repairing again and again comes to an end.
"""

from __future__ import annotations

import itertools
import sys

from fuzz.loop import main
from fuzz.mutate import mutate_image
from fuzz.sparse import FuzzStore, decode
from vhdkit.errors import InvalidArgument, VhdkitError
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix, Format
from vhdkit.formats.undo import apply_change, belongs, plan_change, roll_back
from vhdkit.formats.vhd.format import VHD
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.identify import FILE_IDENTIFIER
from vhdkit.image import NULL_ID, Layer, read_extents
from vhdkit.store import Store
from vhdkit.units import KIB, MIB, sectors_to_bytes, whole_sectors

SEEDS = "fuzz_open"
_CONSENTS = [Consent(loss, dead) for loss, dead in itertools.product((False, True), repeat=2)]
_WINDOW_SECTORS = whole_sectors(64 * KIB)
_MAX_ROUNDS = 4


def target(data: bytes) -> None:
    """Repair the file with every kind of consent."""
    large = sum(len(raw) * repeat for _, raw, repeat in decode(data).records) > MIB
    image_format = VHDX if decode(data).peek(0, len(FILE_IDENTIFIER)) == FILE_IDENTIFIER else VHD
    for consent in _CONSENTS[-1:] if large else _CONSENTS:
        store = FuzzStore(decode(data), f"image{image_format.suffixes[0]}")
        before = _content(image_format, store)
        lost: list[tuple[int, int]] = []
        for _ in range(_MAX_ROUNDS):
            fixes = _round(image_format, store, consent)
            lost += [one for fix in fixes or () if fix.needs is None for one in (*fix.lost, *fix.doubtful)]
            if not fixes or all(fix.needs for fix in fixes):
                break
        else:
            raise AssertionError(f"repairing does not end: {fixes}")
        if before is not None:
            after = _content(image_format, store)
            assert after is not None, "an image that opened does not open after its repair"
            _compare(before, after, lost)
        for one in image_format.check(store):
            assert str(one).isprintable(), repr(str(one))


def _round(image_format: Format, store: FuzzStore, consent: Consent) -> list[Fix] | None:
    """One repair; None when it is refused."""
    store.frozen = True
    draft = DraftStore(store)
    try:
        fixes = image_format.repair(draft, consent)
        writes = draft.diff()
        changed = bool(writes) or draft.size() != store.size()
        assert changed == any(fix.needs is None for fix in fixes), fixes
        if not changed:
            return fixes
        log = plan_change(store, image_format.file_id(draft) or NULL_ID, writes, draft.size())
    except InvalidArgument:
        return None
    except VhdkitError as error:
        assert str(error).isprintable()
        return None
    finally:
        store.frozen = False
    assert all(fix.message.isprintable() for fix in fixes)
    begin = store.copy()
    try:
        apply_change(store, log)
    except VhdkitError:  # larger than a file can be
        store.truncate(begin.size())
        roll_back(store, log)
        return None
    assert belongs(begin, log) and belongs(store, log)
    undone = store.copy()
    roll_back(undone, log)
    assert undone.size() == begin.size() and undone._sectors == begin._sectors, "the log forgot something"
    return fixes


def _content(image_format: Format, store: Store) -> tuple[int, dict[int, bytes]] | None:
    """Size and some windows of what the image alone reads as; None when it does not open."""
    try:
        layer = image_format.open(store)
    except VhdkitError:
        return None
    return layer.size_bytes, {first: _window(layer, first) for first in _firsts(layer)}


def _firsts(layer: Layer) -> list[int]:
    last = max(whole_sectors(layer.size_bytes) - _WINDOW_SECTORS, 0)
    firsts = {0, last, last // 2}
    if layer.block_size_bytes:
        per_block = whole_sectors(layer.block_size_bytes)
        for number, allocated in enumerate(layer.allocated_blocks()[:4096].tolist()):
            if allocated and len(firsts) < 12:
                firsts.add(min(number * per_block, last))
    return sorted(firsts)


def _window(layer: Layer, first: int) -> bytes:
    count = min(_WINDOW_SECTORS, whole_sectors(layer.size_bytes) - first)
    buffer = bytearray(sectors_to_bytes(count))
    read_extents(layer.store, layer.extents(first, count), memoryview(buffer))
    return bytes(buffer)


def _compare(
    before: tuple[int, dict[int, bytes]], after: tuple[int, dict[int, bytes]], lost: list[tuple[int, int]]
) -> None:
    assert before[0] == after[0], "the disk has another size"
    for first, raw in before[1].items():
        start, stop = sectors_to_bytes(first), sectors_to_bytes(first) + len(raw)
        if any(offset < stop and start < offset + size for offset, size in lost):
            continue
        assert first not in after[1] or after[1][first] == raw, f"sector {first} reads differently"


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_repair", mutate_image, corpus=SEEDS))
