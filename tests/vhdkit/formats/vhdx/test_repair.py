# SPDX-License-Identifier: Apache-2.0
"""The repair of a damaged VHDX: each fault, the consent it needs, and what must never change."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, io_failed, no_space
from tests.vhdkit.formats.vhdx.damaged import (
    ALL,
    BLOCKS,
    H1,
    H2,
    HARMLESS,
    LOSSY,
    T1,
    T2,
    Change,
    base,
    both,
    child,
    content,
    dirty,
    entry,
    faults,
    held,
    judge,
    patched,
    repaired,
    same,
    state,
)  # fmt: skip
from tests.vhdkit.formats.vhdx.images import (
    BAT,
    LOG,
    LOG_GUID,
    METADATA,
    PARENT,
    add_log,
    image,
    page,
    set_header,
    set_regions,
)
from vhdkit import errors
from vhdkit.finding import Severity
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.undo import UndoLog, apply_change, belongs, plan_change, roll_back
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import BlockState
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.layout import RegionEntry
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.formats.vhdx.repair_headers import LOSS
from vhdkit.image import NULL_ID
from vhdkit.units import KIB, MIB


@pytest.mark.parametrize("case", HARMLESS)
@pytest.mark.parametrize("make", [base, child])
def test_what_is_certain_is_restored(case: str, make: Callable[[], MemStore]) -> None:
    """Faults that lose nothing are repaired without consent; the disk reads the same, and `check` finds nothing."""
    code, damage = HARMLESS[case]
    store = make()
    if case in ("log", "block cut"):
        damage(store)
        expected = content(store)
    else:
        expected = content(store)
        damage(store)
    made, fixes = repaired(store)
    assert code in [fix.code for fix in fixes if fix.needs is None], fixes
    assert not any(fix.lost or fix.doubtful for fix in fixes)
    assert faults(made) == [] and content(made) == expected
    assert [one.code for one in VHDX.check(made) if one.code == code] == []
    assert repaired(made)[1] == []
    VHDX.open(made, writable=True).close()


def test_a_repair_keeps_the_id_that_children_record() -> None:
    """The FileWriteGuid is new, the DataWriteGuid stays; both headers agree except for number and checksum."""
    store = base()
    linkage = VHDX.linkage_id(store)
    file_id = layout.parse_header(store.pread(H1, 4096)).file_write_guid
    store.pwrite(H2, bytes(4096))
    made, _ = repaired(store)
    first, second = (layout.parse_header(made.pread(one, 4096)) for one in (H1, H2))
    assert VHDX.linkage_id(made) == linkage == first.data_write_guid and first.file_write_guid != file_id
    assert replace(first, checksum=0, sequence_number=0) == replace(second, checksum=0, sequence_number=0)
    assert second.sequence_number == first.sequence_number + 1


def test_a_sound_image_is_left_alone() -> None:
    """A sound image is not written to."""
    for store in (base(), child(), image(), image(fixed=True), image(sector_bytes=4096), image(parent=PARENT)):
        made, fixes = repaired(store, ALL)
        assert fixes == [] and held(made) == held(store)


def test_what_cannot_be_repaired_is_left_alone() -> None:
    """Newer versions, unknown required regions, lost metadata, short files: nothing is written, nothing hangs."""
    cases: list[Change] = [
        lambda s: set_header(s, version=2),
        lambda s: set_header(s, log_version=3, log_guid=LOG_GUID),
        lambda s: set_regions(s, lambda e: e.append(RegionEntry(uuid.UUID(int=9).bytes, 64 * MIB, MIB, 1))),
        patched(METADATA, raw=bytes(MIB)),
        lambda s: s.truncate(100 * KIB),
        lambda s: s.truncate(0),
        both(patched(H1, H2, T1, T2), both(patched(0), patched(METADATA, raw=bytes(MIB)))),
    ]
    for number, damage in enumerate(cases):
        store = base()
        damage(store)
        made, fixes = repaired(store, ALL)
        assert fixes == [], (number, fixes)
        assert held(made) == held(store)


def test_a_repair_without_region_tables_says_what_it_lacks() -> None:
    """Neither metadata, nor a BAT, nor a single possible BAT: nothing is written, and the reason is printed."""
    cases: dict[str, Change] = {
        "no metadata were found": patched(METADATA, raw=bytes(layout.METADATA_TABLE_SIZE)),
        f"at byte {METADATA:#x} (a disk of {4 * MIB} bytes in blocks of 1.0 MiB) can be read, but no BAT": patched(
            BAT, raw=b"\xff" * 64
        ),
        "several places may hold the BAT": lambda s: s.pwrite(
            s.size(), s.pread(BAT, MIB) + bytes(range(256)) * 8 * KIB
        ),
    }
    for reason, damage in cases.items():
        store = base()
        both(patched(T1, T2), damage)(store)
        made, fixes = repaired(store, ALL)
        assert [(one.code, one.needs) for one in fixes] == [("region-table", "a copy by hand")]
        assert reason in fixes[0].message and "vhdkit dump" in fixes[0].message
        assert held(made) == held(store)
    store = base()
    store.truncate(MIB + 512)
    assert repaired(store, ALL)[1][-1].message.startswith(
        "no region table leads to the metadata and the BAT, and no met"
    )


@pytest.mark.parametrize("case", LOSSY)
@pytest.mark.parametrize("make", [base, child])
def test_what_is_not_certain_needs_consent(case: str, make: Callable[[], MemStore]) -> None:
    """Without consent nothing is lost; with it the image is sound, and unchanged outside the named ranges."""
    code, damage = LOSSY[case]
    store = make()
    expected = content(store)
    damage(store)
    made, fixes = repaired(store)
    assert code in [fix.code for fix in fixes if fix.needs == LOSS], fixes
    announced = [one for fix in fixes for one in (*fix.lost, *fix.doubtful)]
    made, fixes = repaired(made, ALL)
    assert not any(fix.needs for fix in fixes) and faults(made) == []
    named = [one for fix in fixes for one in (*fix.lost, *fix.doubtful)]
    assert code != "bat" or set(announced) == set(named)
    judge(store, expected, made, fixes)
    assert repaired(made, ALL)[1] == []
    VHDX.open(made, writable=True).close()


BITMAPS: dict[str, tuple[str, Change]] = {
    "no bitmap": ("bitmap-missing", entry(4096, 0)),
    "bitmap outside": ("bitmap-missing", entry(4096, 6, 64 * MIB)),
    "bitmap over a structure": ("bitmap-missing", entry(4096, 6, METADATA)),
    "bitmap in state 3": ("bat", state(4096, 3)),
    "bitmap over a block": ("blocks-overlap", same(4096, 0)),
}


@pytest.mark.parametrize("case", BITMAPS)
def test_sector_bitmaps(case: str) -> None:
    """With consent, a lost bitmap is guessed from the data; one that overlaps a block makes way for it."""
    code, damage = BITMAPS[case]
    store = child()
    expected = content(store)
    damage(store)
    made, fixes = repaired(store)
    if code != "blocks-overlap":
        assert [fix.needs for fix in fixes] == [LOSS] and held(made) == held(store)
        made, fixes = repaired(store, ALL)
    assert code in [fix.code for fix in fixes] and set(faults(made)) <= {"bits-absent"}
    judge(store, expected, made, fixes)
    if code == "bitmap-missing" or case == "bitmap in state 3":
        assert content(made) == expected, "every sector that was written holds data"
    assert all(3 * MIB <= offset < 4 * MIB or code == "blocks-overlap" for fix in fixes for offset, _ in fix.doubtful)


def test_overlapping_blocks_are_copied_apart() -> None:
    """Each block reads as its entry says; what they share is doubtful, and nothing is lost."""
    store = base()
    expected = bytearray(content(store))
    expected[MIB : 2 * MIB] = expected[0:MIB]
    same(1, 0)(store)
    made, fixes = repaired(store)
    assert [(fix.code, fix.needs, fix.lost) for fix in fixes] == [("blocks-overlap", None, ())]
    assert fixes[0].doubtful == ((0, 2 * MIB),)
    assert content(made) == bytes(expected) and faults(made) == []


def test_states_without_a_parent() -> None:
    """The meaning of partially present blocks and of bitmaps is certain without a parent, so no consent is needed."""
    store = base()
    expected = content(store)
    state(2, BlockState.PARTIALLY_PRESENT)(store)
    store.pwrite(BAT, bytes([store.pread(BAT, 1)[0] | 0x40]))
    made, fixes = repaired(store)
    assert [(fix.code, fix.needs) for fix in fixes] == [("bat-reserved", None), ("block-state", None)]
    assert fixes[0].doubtful == ((0, MIB),) and fixes[1].doubtful == ((2 * MIB, MIB),)
    assert content(made) == expected and faults(made) == []


def test_stray_bits_are_cleared() -> None:
    """Bits of absent blocks are cleared; those past the end of the disk stay, as Windows sets them."""
    store = child()
    expected = content(store)
    bitmap = int.from_bytes(store.pread(BAT + 8 * 4096, 8), "little") & ~0xFFFFF
    store.pwrite(bitmap + 256, b"\xff\x01")  # block 1
    store.pwrite(bitmap + 256 * BLOCKS, b"\x03")
    assert faults(store) == ["bits-absent"] and content(store) == expected
    made, fixes = repaired(store)
    assert [fix.message for fix in fixes] == ["cleared 9 bits of blocks that are not present"]
    assert [one.code for one in VHDX.check(made)] == ["bits-past-end"] and content(made) == expected


def test_headers_that_are_lost_keep_an_id_on_which_they_agree() -> None:
    """If both signatures are lost, a DataWriteGuid on which both slots agree is kept; else children need a rebase."""
    store = base()
    linkage = VHDX.linkage_id(store)
    patched(H1, H2, raw=b"\0\0\0\0")(store)
    made, fixes = repaired(store, ALL)
    assert VHDX.linkage_id(made) == linkage and "still recognise" in fixes[0].message
    store.pwrite(H1, bytes(4096))
    made, fixes = repaired(store, ALL)
    assert VHDX.linkage_id(made) != linkage and "rebase" in fixes[0].message


@pytest.mark.parametrize("log", ["no log", "log place"])
def test_a_new_log_does_not_bring_lost_blocks_into_the_file(log: str) -> None:
    """A block outside the file is lost: zeros must not be taken for it when the file grows for a log."""
    store = base()
    expected = content(store)
    entry(0, 6, store.size() + 2 * MIB)(store)
    HARMLESS[log][1](store)
    made, fixes = repaired(store)
    assert ("bat", LOSS) in [(fix.code, fix.needs) for fix in fixes]
    made, fixes = repaired(made, ALL)
    assert [one for fix in fixes for one in fix.lost] == [(0, MIB)] and faults(made) == []
    judge(store, expected, made, fixes)


def test_pending_changes_are_not_lost_with_a_checksum() -> None:
    """If the only header left does not name a log with changes to replay, using it needs consent."""
    store = base()
    dirty(store)
    set_header(store, log_guid=NULL_ID)
    patched(H1 + 3000)(store)
    store.pwrite(H2, bytes(4096))
    assert [fix.needs for fix in repaired(store)[1]] == [LOSS]


def test_the_doubtful_blocks_of_a_discarded_log_are_named() -> None:
    """Blocks whose BAT entries or bits differ in the discarded log may be out of date."""
    store = child()
    raw = bytearray(store.pread(BAT, 4096))
    raw[16:24] = bytes(8)
    bitmap = int.from_bytes(store.pread(BAT + 8 * 4096, 8), "little") & ~0xFFFFF
    changes = [LogChange(BAT, 4096, bytes(raw)), LogChange(bitmap, 4096, page(b"\1"))]
    add_log(store, [[], changes])
    store.pwrite(LOG, bytes(4096))  # the tail
    fixes = repaired(store, ALL)[1]
    assert [fix.code for fix in fixes] == ["log-discarded"]
    assert fixes[0].doubtful == ((0, 4 * MIB),)
    add_log(store, [[], changes[:1]])
    store.pwrite(LOG, bytes(4096))
    assert repaired(store, ALL)[1][0].doubtful == ((2 * MIB, MIB),)


# By the block, 4096 for the bitmap: faults that say nothing about the blocks 1 and 2, whose places others may get.
ENTRIES: dict[int, list[Change]] = {
    0: [entry(0, 6, 64 * MIB), state(0, 5), state(0, 4), same(0, 2), entry(0, 6, BAT),
        lambda s: s.pwrite(BAT, bytes([s.pread(BAT, 1)[0] | 0x18]))],
    1: [entry(1, 4), same(1, 2), entry(1, 6, METADATA), entry(1, 5, 96 * MIB)],
    3: [same(3, 2), entry(3, 6, BAT), state(3, 5)],
    4096: [entry(4096, 6, BAT), same(4096, 2), entry(4096, 0), state(4096, 1)],
}  # fmt: skip
FAULTS = st.tuples(*(st.sampled_from([None, *several]) for several in ENTRIES.values()))
FRONT = st.sampled_from([one for _, one in HARMLESS.values() if one is not dirty][:-1])


@settings(max_examples=15, deadline=None)
@given(st.booleans(), FAULTS, st.lists(FRONT, max_size=2))
@example(False, (None,) * 4, [HARMLESS["table 2"][1], HARMLESS["metadata signature"][1]])
def test_any_damage_at_once(of_child: bool, entries: tuple[Change | None, ...], front: list[Change]) -> None:
    """INV-REPAIR-WHOLE: after several faults the image is sound and unchanged outside the named ranges, or refused."""
    store = child() if of_child else base()
    expected = content(store)
    for damage in (*entries, *front):
        if damage is not None:
            damage(store)
    made, fixes = repaired(store, ALL)
    if any(fix.needs for fix in fixes) or any(one.severity == Severity.ERROR for one in VHDX.check(made)):
        return
    judge(store, expected, made, fixes)
    again, more = repaired(made, ALL)
    assert more == [] and held(again) == held(made) and faults(made) == []
    made, fixes = repaired(store)
    if not any(fix.needs for fix in fixes):
        assert not any(fix.lost for fix in fixes)
        judge(store, expected, made, fixes)


@pytest.mark.parametrize("case", ["header 1", "log", "both table checksums", "identifier", "no log"])
def test_inv_repair_whole_in_memory(case: str) -> None:
    """INV-REPAIR-WHOLE: a cut at any write or sync of a repair leaves the result, or a state that its log undoes."""
    store = child()
    HARMLESS[case][1](store)
    same(1, 0)(store)
    draft = DraftStore(store)
    VHDX.repair(draft, ALL)
    log = plan_change(store, NULL_ID, draft.diff(), draft.size())
    crash = CrashStore(store)
    cuts = [0]

    def judge_cut() -> None:
        for seed in range(4):
            cuts[0] += 1
            _undone(crash.after_cut(random.Random(f"{crash.operation_count} {seed}")), log, held(store))

    crash.watcher = judge_cut
    apply_change(crash, log)
    crash.watcher = None
    assert cuts[0] >= 12 and held(crash)[0] == draft.size()


def _undone(found: MemStore, log: UndoLog, before: tuple[int, dict[int, bytes]]) -> None:
    """The log applies to what a cut left, and restores every byte."""
    assert belongs(found, log)
    roll_back(found, log)
    assert held(found) == before


@pytest.mark.parametrize("operation", ["read", "write", "sync"])
def test_faults_while_planning_and_writing(operation: str) -> None:
    """EIO and ENOSPC at the n-th call, for every n: a typed error, and a log that undoes what was done."""
    store = child()
    same(1, 0)(store)
    patched(H1, T1)(store)
    for at in range(1, 900, 1 if operation != "read" else 23):
        faulty = FaultyStore(store, Fault(operation, io_failed if operation == "read" else no_space, at=at))
        log = None
        try:
            draft = DraftStore(faulty)
            VHDX.repair(draft, ALL)
            log = plan_change(faulty, NULL_ID, draft.diff(), draft.size())
            apply_change(faulty, log)
        except errors.VhdkitError:
            faulty.faults.clear()
            if log is not None:
                roll_back(faulty, log)
            assert held(faulty) == held(store)
        else:
            break
    assert at > 1


def test_a_cut_bitmap_that_nothing_needs_is_reported() -> None:
    """A file that ends inside a sector bitmap without partially present blocks is extended, and the repair says so."""
    store = child()
    expected = content(store)
    state(3, BlockState.ZERO)(store)
    bitmap = int.from_bytes(store.pread(BAT + 8 * 4096, 8), "little") & ~0xFFFFF
    store.pwrite(BAT + 8 * 4096, (store.size() | BlockState.FULLY_PRESENT).to_bytes(8, "little"))
    store.pwrite(store.size(), store.pread(bitmap, MIB)[: MIB // 2].ljust(MIB // 2, b"\0"))
    made, fixes = repaired(store)
    assert [(fix.code, fix.needs, fix.lost) for fix in fixes] == [("block-cut", None, ())]
    assert made.size() % MIB == 0 and content(made)[: 3 * MIB] == expected[: 3 * MIB]
