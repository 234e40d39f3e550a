# SPDX-License-Identifier: Apache-2.0
"""The repair of a damaged image: each fault, the consent it needs, and what must never change."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable

import pytest

from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, io_failed, no_space
from tests.harness.vhd_builder import (
    DIFFERENCING,
    DYNAMIC,
    FIXED,
    FREE,
    KIB,
    MIB,
    Block,
    Built,
    Vhd,
    child,
    pattern,
    put,
    relative,
    seal_footer,
    seal_header,
)
from vhdkit import errors
from vhdkit.finding import Severity
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix
from vhdkit.formats.undo import UndoLog, apply_change, belongs, plan_change, roll_back
from vhdkit.formats.vhd.check import check_vhd
from vhdkit.formats.vhd.footers import image_id
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.repair import CONVERT, LOSS, repair_vhd
from vhdkit.formats.vhd.repair_footers import DEAD
from vhdkit.image import read_extents
from vhdkit.units import whole_sectors

SIZE, BLOCK = 8 * MIB, 512 * KIB
ALL = Consent(data_loss=True, writer_is_dead=True)
NONE = Consent()


def sound(**fields: object) -> Vhd:
    """A dynamic image with three blocks and no faults."""
    blocks = {0: Block(pattern(BLOCK, 1)), 5: Block(pattern(BLOCK, 2)), 9: Block(pattern(4096, 3))}
    values: dict[str, object] = {"size": SIZE, "block_size": BLOCK, "chs": (240, 4, 17), "blocks": blocks}
    return Vhd(**(values | fields))  # type: ignore[arg-type]  # every name is one of Vhd's


def repaired(store: MemStore, consent: Consent = NONE) -> tuple[MemStore, list[Fix]]:
    """The store after a repair, and the fixes. An undo-logged change writes the draft to the file."""
    before = store.contents()
    draft = DraftStore(store)
    fixes = repair_vhd(draft, consent)
    assert store.contents() == before, "planning a repair wrote something"
    writes = draft.diff()
    made = store.copy()
    if writes or draft.size() != store.size():
        log = plan_change(made, image_id(draft), writes, draft.size())
        apply_change(made, log)
        taken_back = made.copy()
        roll_back(taken_back, log)
        assert taken_back.contents() == before, "the log does not hold every byte that changed"
    assert made.contents() == draft.pread(0, draft.size())
    return made, fixes


def content(store: MemStore) -> bytes:
    """The image without its parent; zeros where it owns nothing."""
    image = open_dynamic(store)
    buffer = bytearray(image.size_bytes)
    read_extents(store, image.extents(0, whole_sectors(image.size_bytes)), memoryview(buffer))
    return bytes(buffer)


def faults(store: MemStore) -> list[str]:
    """The codes of everything worse than a note."""
    return [one.code for one in check_vhd(store) if one.severity > Severity.NOTE]


def with_header(built: Built, at: int, raw: bytes) -> MemStore:
    """The image with changed bytes in its header and an unchanged checksum."""
    store = built.store()
    store.pwrite(512 + at, raw)
    return store


def leaking() -> MemStore:
    """Unused blocks are between the others."""
    image = sound()
    built = image.build()
    store = built.store()
    store.pwrite(image.table_at + 5 * 4, struct.pack(">I", FREE))
    return store


def cut_short(tail: bytes | None = None) -> MemStore:
    """The last block is stored only up to the end of its data."""
    built = sound().build()
    end = built.starts[9] + 512 + 4096
    store = built.store()
    store.truncate(end)
    store.pwrite(end, sound().footer() if tail is None else tail)
    return store


GOOD = content(sound().build().store())
BAD_CHECKSUM = put(sound().footer(), 64, b"\0\0\0\0")
POISONED = seal_footer(b"v_poison" + sound().footer()[8:])
HARMLESS: dict[str, tuple[Callable[[], MemStore], str]] = {
    "no tail": (lambda: sound(tail=b"").build().store(), "footer"),
    "torn tail": (lambda: sound(tail=put(sound().footer(), 200, b"\xff" * 312)).build().store(), "footer"),
    "bad copy": (lambda: sound(copy=b"x" * 512).build().store(), "footer-copy"),
    "another copy": (lambda: sound(copy=sound(hidden=1).footer()).build().store(), "footer-copy"),
    "both checksums": (lambda: sound(tail=BAD_CHECKSUM, copy=BAD_CHECKSUM).build().store(), "footer-checksum"),
    "header checksum": (lambda: with_header(sound().build(), 36, b"\1\2\3\4"), "header-checksum"),
    "header reserved": (lambda: with_header(sound().build(), 900, b"\1"), "header-checksum"),
    "garbage behind": (lambda: sound(tail=sound().footer() + pattern(5000)).build().store(), "trailing-garbage"),
    "no tail, garbage": (lambda: sound(tail=pattern(300 * KIB)).build().store(), "trailing-garbage"),
    "leak at the end": (lambda: sound(footer_at=9 * MIB).build().store(), "leaked-space"),
    "leak with data": (leaking, "leaked-space"),
    "geometry": (lambda: sound(chs=(1024, 16, 63)).build().store(), "geometry"),
    "no geometry": (lambda: sound(chs=(0, 0, 0)).build().store(), "geometry"),
    "block cut": (cut_short, "block-cut"),
    "block cut, no tail": (lambda: cut_short(b""), "footer"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_redundant_information_is_restored(case: str) -> None:
    """Faults that lose no data are repaired without consent; the disk reads the same, and check finds nothing."""
    make, code = HARMLESS[case]
    store = make()
    made, fixes = repaired(store)
    assert code in [fix.code for fix in fixes if fix.needs is None], fixes
    assert faults(made) == []
    expected = put(GOOD, 5 * BLOCK, bytes(BLOCK)) if case == "leak with data" else GOOD
    assert content(made) == expected
    again, more = repaired(made)
    assert more == [] and again.contents() == made.contents()


def test_a_sound_image_is_left_alone() -> None:
    """A sound image, even one with notes, is not written to."""
    for image in (sound(), sound(aligned=True), sound(entry_count=40), sound(hidden=1), sound(blocks={})):
        store = image.build().store()
        made, fixes = repaired(store, ALL)
        assert fixes == [] and made.contents() == store.contents()


@pytest.mark.parametrize(
    ("tail", "copy"),
    [(b"\xc7" * 512, None), (POISONED, None), (None, POISONED), (POISONED, POISONED)],
    ids=["killed", "poisoned", "copy poisoned", "both poisoned"],
)
def test_marks_of_other_programs_need_consent(tail: bytes | None, copy: bytes | None) -> None:
    """A 0xC7 footer and `v_poison` are mended only if the user says that the writer is dead."""
    store = sound(tail=tail, copy=copy).build().store()
    made, fixes = repaired(store, Consent(data_loss=True))
    assert [fix.needs for fix in fixes if fix.code == "footer-mark"] == [DEAD]
    for place in (0, store.size() - 512):
        assert made.pread(place, 512) == store.pread(place, 512)
    made, fixes = repaired(store, Consent(writer_is_dead=True))
    assert faults(made) == [] and content(made) == GOOD


@pytest.mark.parametrize(
    ("entries", "lost", "doubtful"),
    [
        ({5: 0x7FFFFFFF}, [5], []),
        ({5: 0}, [5], [0]),
        ({5: 1}, [5], [0]),
        ({6: 0x7FFFFFFF, 7: 2}, [6, 7], [0]),
    ],
    ids=["past the end", "over the copy", "over the header", "two"],
)
def test_impossible_entries_need_consent(entries: dict[int, int], lost: list[int], doubtful: list[int]) -> None:
    """INV-BLOCKS-DISJOINT is restored only with consent, and every range that loses its content is reported."""
    store = sound(entries=entries).build().store()
    made, fixes = repaired(store)
    assert [(fix.code, fix.needs) for fix in fixes] == [("bat", LOSS)]
    assert made.contents() == store.contents() and fixes[0].lost == tuple(ranges(lost))
    made, fixes = repaired(store, ALL)
    assert fixes[0].needs is None and fixes[0].lost == tuple(ranges(lost))
    assert [offset // BLOCK for offset, _ in fixes[0].doubtful] == doubtful, "they overlapped this one, too"
    expected = GOOD
    for block in lost:
        expected = put(expected, block * BLOCK, bytes(BLOCK))
    assert content(made) == expected
    assert all(code == "leaked-space" for code in faults(made))


def ranges(blocks: list[int]) -> list[tuple[int, int]]:
    """The blocks as (offset, size), neighbours joined."""
    joined: list[tuple[int, int]] = []
    for block in blocks:
        if joined and sum(joined[-1]) == block * BLOCK:
            joined[-1] = (joined[-1][0], joined[-1][1] + BLOCK)
        else:
            joined.append((block * BLOCK, BLOCK))
    return joined


def test_overlapping_blocks_are_copied_apart() -> None:
    """INV-UNTANGLED: of blocks in one place each gets a copy, all of it doubtful; everything reads as before."""
    built = sound().build()
    same = built.starts[5] // 512
    store = sound(entries={7: same, 12: same}).build().store()
    before = content(store)
    made, fixes = repaired(store)
    assert [(fix.code, fix.needs, fix.lost) for fix in fixes] == [("blocks-overlap", None, ())]
    assert fixes[0].doubtful == tuple(ranges([5, 7, 12]))
    assert content(made) == before and "blocks-overlap" not in faults(made)
    open_dynamic(made.copy(), writable=True)


def test_a_differencing_image_shows_its_parent_there() -> None:
    """A cleared block of a child reads from the parent, and the message says so."""
    image = child(size=SIZE, block_size=BLOCK, blocks={1: Block(pattern(BLOCK))}, entries={2: 0x0FFFFFFF})
    made, fixes = repaired(image.build().store(), ALL)
    assert "parent's content" in fixes[0].message
    assert open_dynamic(made).bat.allocated().tolist().count(True) == 1


def test_space_of_dropped_blocks_is_kept_at_first() -> None:
    """The space of a cleared entry is not freed in the same repair; the next one may free it."""
    built = sound().build()
    store = sound(entries={5: 2}).build().store()
    made, fixes = repaired(store, ALL)
    assert [fix.code for fix in fixes] == ["bat"]
    assert faults(made) == ["leaked-space"]
    assert made.pread(built.starts[5] + 512, BLOCK) == pattern(BLOCK, 2)
    made, fixes = repaired(made)
    assert [fix.code for fix in fixes] == ["leaked-space"] and faults(made) == []


@pytest.mark.parametrize("at", [16, 28, 32], ids=["table offset", "entries", "block size"])
def test_a_header_without_supporting_evidence(at: int) -> None:
    """A new checksum does not make a wrong header right: refused, or repaired with the user's consent only."""
    raw = sound().build().store().pread(512 + at, 4)
    for value in (b"\0\0\1\0", b"\0\x10\0\0", put(raw, 3, bytes([raw[3] ^ 0x40])), b"\xff\xff\xff\xff"):
        store = with_header(sound().build(), at, value)
        made, fixes = repaired(store)
        assert not [fix for fix in fixes if fix.code == "header-checksum" and fix.needs is None], (value, fixes)
        assert made.contents() == store.contents()


def test_table_entries_behind_the_disk_keep_their_blocks() -> None:
    """Blocks that the table lists behind the disk's end do not count as lost space."""
    image = sound(entry_count=20, junk=struct.pack(">I", 9 * MIB // 512) * 4, footer_at=11 * MIB)
    store = image.build().store()
    store.pwrite(9 * MIB, b"\xff" * 512 + pattern(BLOCK, 9))
    made, fixes = repaired(store, ALL)
    assert fixes == [] and made.contents() == store.contents()


def test_too_much_lost_space_is_left_to_compact() -> None:
    """Space with more data than a backup should hold is reported, not freed."""
    store = sound(footer_at=40 * MIB).build().store()
    for offset in range(8 * MIB, 32 * MIB, 64 * KIB):
        store.pwrite(offset, pattern(64 * KIB))
    made, fixes = repaired(store)
    assert [fix.needs for fix in fixes] == ["vhdkit compact"] and made.contents() == store.contents()


def test_stray_locators_are_cleared() -> None:
    """A locator that points outside the file prevents writing to the image: it is cleared."""
    odd = relative("far.vhd")
    odd.offset = 1 << 40
    image = child(size=SIZE, block_size=BLOCK, chs=(240, 4, 17), locators={0: relative(".\\parent.vhd"), 3: odd})
    store = image.build().store()
    with pytest.raises(errors.CorruptImage):
        open_dynamic(store.copy(), writable=True)
    made, fixes = repaired(store)
    assert [fix.code for fix in fixes] == ["locator-outside-file"] and faults(made) == []
    assert [one.text for one in open_dynamic(made, writable=True).metadata.locators] == [".\\parent.vhd"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"tail": put(Vhd(disk_type=FIXED, size=MIB, chs=(30, 4, 17)).footer(), 64, b"\0\0\0\0")}, "footer-checksum"),
        ({"tail": Vhd(disk_type=FIXED, size=MIB, chs=(30, 4, 17)).footer() + b"garbage" * 100}, "trailing-garbage"),
        ({"data_size": MIB + 4096}, "trailing-space"),
        ({"tail": Vhd(disk_type=FIXED, size=MIB, chs=(30, 4, 17)).footer() + bytes(MIB)}, "padding"),
        ({"chs": (900, 16, 63)}, "geometry"),
    ],
)
def test_fixed_images(fields: dict[str, object], code: str) -> None:
    """The only footer of a fixed disk is restored if it agrees with the file's size; the data never changes."""
    values: dict[str, object] = {"disk_type": FIXED, "size": MIB, "chs": (30, 4, 17), "data": pattern(MIB)}
    store = Vhd(**(values | fields)).build().store()  # type: ignore[arg-type]
    made, fixes = repaired(store)
    assert [fix.code for fix in fixes] == [code] and faults(made) == []
    assert made.size() == MIB + 512 and made.pread(0, MIB) == pattern(MIB)


def test_a_guests_footer_is_not_a_footer_copy() -> None:
    """A fixed disk's first sector is data, whatever it looks like: never overwritten, never used."""
    for first in (POISONED, sound().footer(), b"\xc7" * 512):
        image = Vhd(disk_type=FIXED, size=MIB, chs=(30, 4, 17), data=first + pattern(MIB - 512))
        store = image.build().store()
        made, fixes = repaired(store, ALL)
        assert fixes == [] and made.contents() == store.contents()


def test_unrepairable_images_are_left_alone() -> None:
    """Without a footer, a header or a table nothing is written, and nothing hangs."""
    for store in (
        MemStore(size_bytes=5 * MIB),
        MemStore(size_bytes=1),
        sound(tail=b"", copy=b"\0" * 512).build().store(),
        with_header(sound().build(), 0, b"nothing!"),
        sound(block_size=BLOCK, entry_count=3).build().store(),
    ):
        made, fixes = repaired(store, ALL)
        assert fixes == [] and made.contents() == store.contents()


@pytest.mark.parametrize("case", [*HARMLESS, "bat"])
def test_inv_repair_whole_in_memory(case: str) -> None:
    """INV-REPAIR-WHOLE: a cut at any write or sync of a repair leaves a state that its log undoes, or the result."""
    store = HARMLESS[case][0]() if case in HARMLESS else sound(entries={5: 2, 7: 0x7FFFFFFF}).build().store()
    draft = DraftStore(store)
    repair_vhd(draft, ALL)
    log = plan_change(store, image_id(draft), draft.diff(), draft.size())
    crash = CrashStore(store)
    cuts = [0]

    def judge() -> None:
        for seed in range(6):
            cuts[0] += 1
            found = crash.after_cut(random.Random(f"{crash.operation_count} {seed}"))
            _undone(found, log, store.contents())

    crash.watcher = judge
    apply_change(crash, log)
    crash.watcher = None
    assert crash.contents() == draft.pread(0, draft.size()) and cuts[0] >= 12


def _undone(found: MemStore, log: UndoLog, before: bytes) -> None:
    """The log applies to what a cut left, and restores every byte, also after another cut."""
    assert belongs(found, log)
    again = CrashStore(found)
    roll_back(again, log)
    assert again.contents() == before


@pytest.mark.parametrize("operation", ["read", "write", "sync"])
def test_faults_while_planning_and_writing(operation: str) -> None:
    """EIO and ENOSPC at the n-th call, for every n: a typed error, and a log that undoes what was done."""
    store = sound(tail=b"", copy=sound().footer(), entries={5: 2}, chs=(1, 1, 1)).build().store()
    for at in range(1, 60):
        faulty = FaultyStore(store, Fault(operation, io_failed if operation == "read" else no_space, at=at))
        log = None
        try:
            draft = DraftStore(faulty)
            repair_vhd(draft, ALL)
            log = plan_change(faulty, image_id(draft), draft.diff(), draft.size())
            apply_change(faulty, log)
        except errors.VhdkitError:
            faulty.faults.clear()
            if log is not None:
                roll_back(faulty, log)
            assert faulty.contents() == store.contents()
        else:
            break
    assert at > 1


def test_hostile_tables_are_repaired_in_bounds() -> None:
    """INV-BOUNDED: a table of a million equal or crossing entries, and headers with huge claims, take seconds."""
    size = 512 * 1024 * MIB
    count = size // BLOCK
    equal = struct.pack(">I", 20000) * count
    crossing = b"".join(struct.pack(">I", 20000 + number) for number in range(count))
    for table in (equal, crossing):
        image = Vhd(size=size, block_size=BLOCK, footer_at=16 * MIB, chs=(65535, 16, 255))
        store = image.build().store()
        store.pwrite(image.table_at, table)
        start = time.process_time()
        made, fixes = repaired(store, ALL)
        assert time.process_time() - start < 10
        assert ("blocks-overlap", CONVERT) in [(fix.code, fix.needs) for fix in fixes]
        assert (
            set(faults(made)) <= {"blocks-overlap", "leaked-space", "block-cut"}
            and open_dynamic(made).damage is not None
        )


@pytest.mark.parametrize("kind", [DYNAMIC, DIFFERENCING])
def test_headers_with_impossible_claims(kind: int) -> None:
    """test_vhd_validate_header: impossible block sizes, counts, offsets and cookies end in bounds, without a write."""
    patches = {
        "bad_blocksize": [(32, struct.pack(">I", one)) for one in (0, 1, 511, 3 * MIB, 1 << 31, 0xFFFFFFFF)],
        "bad_offset": [(16, struct.pack(">Q", one)) for one in (0, 511, 1 << 40, 1 << 63, (1 << 64) - 1)],
        "bad_count": [(28, struct.pack(">I", one)) for one in (0, 1, 0xFFFFFFFF)],
        "bad_version": [(24, b"\xff\xff\xff\xff")],
        "bad_cookie": [(0, b"cxsparsf")],
    }
    for name, several in patches.items():
        for at, raw in several:
            store = sound(disk_type=kind).build().store()
            header = seal_header(put(store.pread(512, 1024), at, raw))
            store.pwrite(512, header)
            made, fixes = repaired(store, ALL)
            assert made.contents() == store.contents() or name == "bad_count", (name, at, raw, fixes)
    for far in (1 << 40, 1 << 63, (1 << 64) - 1024):
        footer = seal_footer(put(sound(disk_type=kind).footer(), 16, struct.pack(">Q", far)))
        store = sound(disk_type=kind, tail=footer, copy=footer).build().store()
        made, fixes = repaired(store, ALL)
        assert made.contents() == store.contents() and fixes == []
