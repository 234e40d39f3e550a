# SPDX-License-Identifier: Apache-2.0
"""The thorough check of one VHD: sound images are clean; each fault is found, named and located."""

from __future__ import annotations

import pytest

from tests.harness.vhd_builder import FIXED, FREE, Block, Vhd, bits_of, child, pattern
from vhdkit.finding import Finding, Severity
from vhdkit.formats.vhd import check
from vhdkit.formats.vhd.check import check_vhd
from vhdkit.units import MIB

BLOCK = 2 * MIB


def findings(image: Vhd, *, ignore_bitmaps: bool = False) -> dict[str, Finding]:
    """The findings of check, by code."""
    return {one.code: one for one in check_vhd(image.build().store(frozen=True), ignore_bitmaps=ignore_bitmaps)}


def sound(**fields: object) -> Vhd:
    """A dynamic image with two blocks and the geometry that follows from its size."""
    values: dict[str, object] = {"chs": (120, 4, 17), "blocks": {0: Block(pattern(BLOCK)), 1: Block(b"x" * 512)}}
    return Vhd(**(values | fields))  # type: ignore[arg-type]  # every name is one of Vhd's


@pytest.mark.parametrize(
    "image",
    [
        sound(),
        sound(aligned=True),
        sound(blocks={}),
        child(chs=(120, 4, 17), blocks={1: Block(pattern(512), bits_of({0, 5}, BLOCK))}),
        Vhd(disk_type=FIXED, chs=(120, 4, 17), data=pattern(1000)),
    ],
    ids=["dynamic", "aligned", "empty", "child", "fixed"],
)
def test_sound_images_are_clean(image: Vhd) -> None:
    """A sound image has no findings at all."""
    assert findings(image) == {}


@pytest.mark.parametrize(
    ("image", "code", "severity"),
    [
        (sound(tail=b"\xc7" * 512), "footer", Severity.WARNING),
        (sound(tail=b"v_poison".ljust(512, b"\0")), "footer", Severity.WARNING),
        (sound(tail=b""), "footer", Severity.WARNING),
        (sound(copy=b"x" * 512), "footer", Severity.WARNING),
        (sound(copy=Vhd(hidden=1, chs=(120, 4, 17)).footer()), "footers-differ", Severity.WARNING),
        (sound(chs=(60, 4, 17)), "geometry", Severity.NOTE),
        (sound(chs=(1024, 16, 63)), "geometry", Severity.WARNING),
        (sound(saved_state=7), "saved-state", Severity.NOTE),
        (sound(hidden=1), "hidden", Severity.NOTE),
        (sound(unique_id=bytes(16)), "no-id", Severity.WARNING),
        (sound(entry_count=100), "bat-spare", Severity.NOTE),
        (sound(junk=b"\0" * 504), "bat-padding", Severity.NOTE),
        (
            sound(entries={1: FREE}, blocks={1: Block(pattern(BLOCK)), 0: Block(b"x")}),
            "leaked-space",
            Severity.WARNING,
        ),
        (sound(footer_at=20 * MIB), "leaked-space", Severity.NOTE),
        (sound(entries={1: 0x7FFFFFFF}), "block-outside-file", Severity.ERROR),
        (sound(entries={1: 1}), "block-over-metadata", Severity.ERROR),
        (sound(entries={1: 5}), "blocks-overlap", Severity.ERROR),
        (Vhd(disk_type=FIXED, chs=(120, 4, 17), data_size=5 * MIB), "trailing-space", Severity.WARNING),
        (child(locators={}, parent_name=b""), "parent-unnamed", Severity.ERROR),
    ],
)
def test_each_fault_is_found(image: Vhd, code: str, severity: Severity) -> None:
    """A fault has its code and severity, and nothing is changed (the store is frozen)."""
    found = findings(image)
    assert code in found, found
    assert found[code].severity is severity


def test_data_under_clear_bits_is_found_unless_bitmaps_are_ignored() -> None:
    """Bytes under clear bits of a dynamic disk are a warning with their place, unless they are read as data."""
    image = sound(blocks={0: Block(pattern(8192), bits_of(set(range(8)), BLOCK))})
    built = image.build()
    found = findings(image)["hidden-data"]
    assert found.severity is Severity.WARNING
    assert found.offset_bytes == built.starts[0] + 512 + 8 * 512
    assert "hidden-data" not in findings(image, ignore_bitmaps=True)
    zeros = sound(blocks={0: Block(pattern(4096), bits_of(set(range(8)), BLOCK))})
    assert "hidden-data" not in findings(zeros)


def test_data_under_clear_bits_of_a_child_is_fine() -> None:
    """In a differencing image such sectors come from the parent, whatever the bytes are."""
    image = child(chs=(120, 4, 17), blocks={0: Block(pattern(8192), bits_of({0}, BLOCK))})
    assert findings(image) == {}


def test_a_batmap_that_claims_too_much_is_found() -> None:
    """A batmap bit over a bitmap with clear bits would hide a parent's data from readers that trust it."""
    for batmap, expected in ((b"\x80".ljust(512, b"\0"), True), (bytes(512), False)):
        image = child(
            batmap=batmap,
            creator=b"tap\0",
            creator_version=0x00010003,
            chs=(120, 4, 17),
            blocks={0: Block(pattern(512), bits_of({0}, BLOCK))},
        )
        assert ("batmap" in findings(image)) is expected


def test_many_faults_of_a_kind_are_counted() -> None:
    """Of thousands of bad entries the first are listed and the others are counted."""
    image = Vhd(size=2 << 40 >> 1, entries=dict.fromkeys(range(1000), 2147483647))
    listed = check_vhd(image.build().store())
    assert len(listed) < 40
    assert any("and 984 more BAT entries" in one.message for one in listed)


@pytest.mark.parametrize(
    "image", [Vhd(footer_version=0x00020000), sound(tail=b"", copy=b"x" * 512), sound(block_size=3)]
)
def test_an_image_that_cannot_be_read_gives_its_one_error(image: Vhd) -> None:
    """If footer or header cannot be used, that is the finding, with structure and offset."""
    (found,) = check_vhd(image.build().store("broken.vhd"))
    assert found.severity is Severity.ERROR
    assert found.structure is not None and found.offset_bytes is not None


def test_progress_covers_the_disk_in_order() -> None:
    """The progress of a long check reports how much was checked, never more than there is."""
    calls: list[tuple[int, int]] = []
    size = 600 * BLOCK
    image = Vhd(size=size, blocks={number: Block(b"") for number in range(600)})
    check_vhd(image.build().store(frozen=True), progress=lambda done, total: calls.append((done, total)))
    assert [total for _, total in calls] == [size] * len(calls)
    assert [done for done, _ in calls] == [0, 256 * BLOCK, 512 * BLOCK]


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_bitmaps_are_asked_for_before_they_are_read(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bitmap is prefetched once, before it is read: on a cold disk they would wait for the device one by one."""
    monkeypatch.setattr(check, "_BITMAPS_AHEAD", at_once)
    store = sound().build().store(frozen=True)
    asked: list[int] = []
    known: list[bool] = []
    read = store.pread

    def pread(offset_bytes: int, size_bytes: int) -> bytes:
        known.append(offset_bytes in asked)
        return read(offset_bytes, size_bytes)

    monkeypatch.setattr(store, "prefetch", lambda offset, size: asked.append(offset))
    monkeypatch.setattr(store, "pread", pread)
    assert check_vhd(store) == []
    assert len(set(asked)) == len(asked) == 2 == known.count(True)
