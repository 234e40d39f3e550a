# SPDX-License-Identifier: Apache-2.0
"""Which footer is used, and what headers may claim."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.harness.stores import MemStore
from tests.harness.vhd_builder import (
    DYNAMIC,
    FIXED,
    GIB,
    KIB,
    MIB,
    TIB,
    Block,
    Vhd,
    child,
    pattern,
    put,
    relative,
    seal_footer,
)
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Severity
from vhdkit.formats.vhd import geometry, metadata
from vhdkit.formats.vhd.footers import FooterState, read_footers
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.opening import open_dynamic

KILLED = b"\xc7" * 512
BROKEN = put(Vhd().footer(), 200, b"\x01")
POISONED = seal_footer(put(Vhd().footer(), 0, b"v_poison"))
NEWER = seal_footer(put(Vhd().footer(), 12, b"\0\2\0\0"))


def _refusal(store: MemStore) -> CorruptImage:
    store.frozen = True
    with pytest.raises(CorruptImage) as caught:
        read_metadata(store)
    assert caught.value.path == store.name
    return caught.value


def test_a_sound_image_has_no_findings() -> None:
    """Two good footers and a header: no findings, and all fields as they were written."""
    image = Vhd(size=6 * MIB, blocks={0: Block(b"x")})
    found = read_metadata(image.build().store(frozen=True))
    assert (found.findings, found.kind, found.is_differencing) == ((), "dynamic", False)
    assert (found.size_bytes, found.block_count, found.parent_name) == (6 * MIB, 3, "")
    assert found.footer_raw == image.footer()
    assert [one[0] for one in found.structures()] == ["footer copy", "dynamic header", "BAT"]


@pytest.mark.parametrize(
    ("tail", "state", "words"),
    [
        (b"", FooterState.ABSENT, "absent"),
        (b"\0" * 512, FooterState.ABSENT, "absent"),
        (KILLED, FooterState.KILLED, "0xC7"),
        (BROKEN, FooterState.CHECKSUM, "checksum"),
        (POISONED, FooterState.POISONED, "resize"),
        (NEWER, FooterState.VERSION, "version"),
    ],
    ids=["missing", "zeroed", "quirk-dirty-0xC7", "checksum", "quirk-poisoned", "version"],
)
def test_quirk_a_bad_trailing_footer_with_a_good_copy(tail: bytes, state: FooterState, words: str) -> None:
    """Quirk, INV-FOOTER-COPY: without a usable trailing footer the copy at 0 is used, and a finding says so."""
    image = Vhd(blocks={1: Block(pattern(512))}, tail=tail)
    found = read_metadata(image.build().store(frozen=True))
    assert (found.tail.state, found.footer_raw) == (state, image.footer())
    (finding,) = found.findings
    assert (finding.severity, finding.code, finding.structure) == (Severity.WARNING, "footer", "footer")
    assert words in finding.message


@pytest.mark.parametrize("copy", [b"\0" * 512, KILLED, BROKEN, POISONED, NEWER])
def test_a_bad_copy_with_a_good_trailing_footer(copy: bytes) -> None:
    """INV-FOOTER-COPY: with a bad copy the trailing footer is used."""
    image = Vhd(blocks={1: Block(pattern(512))}, copy=copy)
    found = read_metadata(image.build().store(frozen=True))
    assert found.tail.state is FooterState.GOOD and found.copy is not None and not found.copy.state.usable
    assert [one.structure for one in found.findings] == ["footer copy"]


@pytest.mark.parametrize(
    ("tail", "copy", "reason", "structure"),
    [
        (b"\0" * 512, b"\0" * 512, CorruptReason.NO_FOOTER, "footer"),
        (KILLED, b"\0" * 512, CorruptReason.NO_FOOTER, "footer"),
        (BROKEN, b"\0" * 512, CorruptReason.FOOTER_CHECKSUM, "footer"),
        (b"\0" * 512, BROKEN, CorruptReason.FOOTER_CHECKSUM, "footer copy"),
        (POISONED, BROKEN, CorruptReason.FOOTER_POISONED, "footer"),
        (NEWER, NEWER, CorruptReason.FOOTER_VERSION, "footer"),
    ],
)
def test_two_bad_footers_are_refused(tail: bytes, copy: bytes, reason: CorruptReason, structure: str) -> None:
    """With neither footer usable the image is refused, with the reason of the more informative one."""
    built = Vhd(tail=tail, copy=copy).build()
    error = _refusal(built.store())
    assert (error.reason, error.structure) == (reason, structure)
    assert error.offset_bytes == (built.footer_at if structure == "footer" else 0)


def test_the_trailing_footer_is_preferred_to_the_copy() -> None:
    """If both are good but different, the one at the end counts."""
    image = Vhd(size=4 * MIB)
    image.copy = replace(image, unique_id=b"\x77" * 16).footer()
    assert read_metadata(image.build().store()).footer.unique_id == image.unique_id


def test_a_fixed_disks_guest_cannot_fake_a_footer() -> None:
    """What the guest writes into the first sector of a fixed disk is data, even if it is a dynamic footer."""
    fake = Vhd(size=64 * MIB).footer() + Vhd(size=64 * MIB).header()
    store = Vhd(size=MIB, disk_type=FIXED, data=fake).build().store(frozen=True)
    found = read_metadata(store)
    assert (found.kind, found.size_bytes, found.copy, found.header) == ("fixed", MIB, None, None)


def test_a_fixed_footer_at_offset_0_is_not_a_copy() -> None:
    """A fixed disk has no footer copy, so a footer at 0 that says "fixed" is not used."""
    store = Vhd(size=MIB, disk_type=FIXED, data=Vhd(disk_type=FIXED).footer(), tail=b"").build().store()
    assert _refusal(store).reason is CorruptReason.NO_FOOTER


@pytest.mark.parametrize("disk_type", [FIXED, DYNAMIC])
def test_quirk_511_byte_footers(disk_type: int) -> None:
    """Quirk: Virtual PC before 2004 wrote footers of 511 bytes, in fixed and in dynamic images."""
    image = Vhd(size=MIB, disk_type=disk_type, footer_size=511, data=pattern(MIB))
    built = image.build()
    found = read_metadata(built.store(frozen=True))
    assert found.tail.state is FooterState.SHORT and found.tail.offset_bytes == built.footer_at
    assert found.footer_raw == image.footer() and found.size_bytes == MIB
    assert [one.severity for one in found.findings] == [Severity.NOTE]


def test_quirk_511_byte_footer_alone_carries_a_dynamic_image() -> None:
    """Quirk: with a broken copy the short footer is enough."""
    found = read_metadata(Vhd(footer_size=511, copy=BROKEN).build().store(frozen=True))
    assert found.tail.state is FooterState.SHORT and found.kind == "dynamic"


def test_a_damaged_511_byte_footer_is_reported_in_place() -> None:
    """A short footer with a wrong checksum is reported at its offset."""
    image = Vhd(size=MIB, disk_type=FIXED, tail=put(Vhd(size=MIB, disk_type=FIXED).footer(), 99, b"!")[:511])
    error = _refusal(image.build().store())
    assert (error.reason, error.offset_bytes) == (CorruptReason.FOOTER_CHECKSUM, MIB)


def test_quirk_hidden_image_opens() -> None:
    """Quirk: XenServer's `hidden` mark is part of the checksum and does not prevent opening."""
    assert read_metadata(Vhd(hidden=1).build().store()).footer.hidden == 1


def test_quirk_saved_state_and_features_are_accepted() -> None:
    """Quirk: an image with a saved state, a temporary disk, or a later minor version opens."""
    image = Vhd(saved_state=1, features=3, footer_version=0x00010005, header_version=0x00010001)
    assert read_metadata(image.build().store()).findings == ()


@pytest.mark.parametrize("header_offset", [512, 1024, 4096, 3 * MIB])
def test_quirk_header_elsewhere(header_offset: int) -> None:
    """Quirk: the header usually follows the copy, but is where the footer says."""
    image = Vhd(header_offset=header_offset, blocks={1: Block(pattern(512), start=5 * MIB)})
    assert open_dynamic(image.build().store(frozen=True)).block_offset(1) == 5 * MIB + 512


def test_quirk_bat_between_locator_areas() -> None:
    """Quirk: Hyper-V puts the BAT at 0x2000 between locators at 0x1000 and 0x3000, the first data at 0x14000."""
    first, second = relative("a.vhd"), relative("b.vhd")
    first.offset, first.space = 0x1000, 0x1000
    second.offset, second.space = 0x3000, 0x10000
    image = child(
        table_offset=0x2000,
        locators={0: first, 1: second},
        blocks={0: Block(pattern(512))},
        first_block=0x13E00,
    )
    store = image.build().store(frozen=True)
    layer = open_dynamic(store)
    assert [one.text for one in layer.metadata.locators] == ["a.vhd", "b.vhd"]
    assert layer.block_offset(0) == 0x14000
    assert layer.metadata.structures()[3:] == [
        ("parent locator 1 (W2ru)", 0x1000, 0x1000),
        ("parent locator 2 (W2ru)", 0x3000, 0x10000),
    ]


@pytest.mark.parametrize(
    ("size", "disk_type", "good"),
    [
        (512, DYNAMIC, True),
        (0, DYNAMIC, False),
        (511, DYNAMIC, False),
        (2 * TIB, DYNAMIC, True),
        (2 * TIB + 512, DYNAMIC, False),
        (2**64 - 512, DYNAMIC, False),
        (64 * TIB, FIXED, True),
        (64 * TIB + 512, FIXED, False),
        (0, FIXED, False),
    ],
)
def test_virtual_size_at_its_limits(size: int, disk_type: int, good: bool) -> None:
    """A virtual size at the limit is accepted; one sector more, or less than one sector, is not."""
    image = Vhd(size=size, disk_type=disk_type, block_size=256 * MIB)
    if size > TIB * 65:
        raw = image.footer()
        store = MemStore("built.vhd")
        store.pwrite(0, raw + Vhd().header() + bytes(4096) + raw)
    else:
        store = image.build().store()
    if good:
        assert read_metadata(store).size_bytes == size
        return
    assert _refusal(store).reason is CorruptReason.VIRTUAL_SIZE


def test_the_size_limits_are_the_documented_ones() -> None:
    """A BAT cannot address more than 2 TiB; 64 TiB of fixed disk keep offsets inside 63 bits."""
    assert (geometry.MAX_DYNAMIC_BYTES, geometry.MAX_FIXED_BYTES) == (2 * TIB, 64 * TIB)
    assert geometry.MAX_CREATE_BYTES == 2040 * GIB


@pytest.mark.parametrize(
    ("block_size", "good"),
    [(512 * KIB << shift, True) for shift in range(10)]
    + [(256 * KIB, False), (512 * MIB, False), (512 * KIB + 512, False), (3 * MIB, False), (0, False), (2**31, False)],
)
def test_quirk_block_sizes_from_512_kib_to_256_mib(block_size: int, good: bool) -> None:
    """Quirk: every power of two from 512 KiB to 256 MiB is read, the next ones outside are refused."""
    image = Vhd(size=MIB)
    built = image.build()
    built.pieces = [(at, raw) for at, raw in built.pieces if at != 512]
    built.pieces.append((512, replace(image, block_size=block_size, entry_count=2).header()) if block_size else
                        (512, _with_block_size(image, 0)))  # fmt: skip
    store = built.store()
    if good:
        header = read_metadata(store).header
        assert header is not None and header.block_size == block_size
        return
    error = _refusal(store)
    assert (error.reason, error.found) == (CorruptReason.BLOCK_SIZE, block_size)


def _with_block_size(image: Vhd, block_size: int) -> bytes:
    raw = put(image.header(), 32, block_size.to_bytes(4, "big"))
    total = 0xFFFFFFFF - (sum(raw) - sum(raw[36:40])) & 0xFFFFFFFF
    return put(raw, 36, total.to_bytes(4, "big"))


def test_the_block_size_limits_are_the_documented_ones() -> None:
    """512 KiB bounds the map at 4 Mi entries; Windows writes no more than 256 MiB."""
    assert (metadata.MIN_BLOCK_SIZE, metadata.MAX_BLOCK_SIZE) == (512 * KIB, 256 * MIB)


def test_quirk_xen_batmap_is_found_behind_the_bat() -> None:
    """Quirk: XenServer's batmap header follows the BAT, its body is where it says, locators come after it."""
    image = child(creator=b"tap\0", creator_version=0x00010003, batmap=b"\x80", blocks={0: Block(pattern(2 * MIB))})
    found = read_metadata(image.build().store(frozen=True))
    assert found.batmap is not None and found.batmap.batmap_size == 1
    assert found.structures()[3:] == [
        ("parent locator 1 (W2ru)", 3072, 512),
        ("batmap header", 2048, 512),
        ("batmap", 2560, 512),
    ]


@pytest.mark.parametrize(
    ("creator", "version"), [(b"tap\0", 0x00000001), (b"win ", 0x000A0000), (b"qemu", 0x00050003)]
)
def test_only_xenservers_batmap_counts(creator: bytes, version: int) -> None:
    """Only XenServer from version 1.1 on writes one; the same bytes elsewhere are ignored."""
    image = Vhd(creator=creator, creator_version=version, batmap=b"\x80", chs=(120, 4, 17))
    assert read_metadata(image.build().store()).batmap is None


def test_footers_of_tiny_files() -> None:
    """A file shorter than a footer has none, and the search for one raises no error."""
    for size in (0, 1, 510, 511, 512, 1023):
        store = MemStore("tiny.vhd")
        store.truncate(size)
        tail, copy = read_footers(store)
        assert (tail.state, copy.state) == (FooterState.ABSENT, FooterState.ABSENT)
        assert tail.offset_bytes == max(size - 512, 0)


def test_quirk_size_of_creators_meaning_chs_is_explained() -> None:
    """Quirk: if the two sizes differ and CHS counts, a finding gives both."""
    found = read_metadata(Vhd(creator=b"qemu", chs=(120, 4, 17), size=4 * MIB).build().store())
    assert found.size_bytes == 8160 * 512
    assert [one.code for one in found.findings] == ["size-chs"]
    assert "4194304" in found.findings[0].message and str(8160 * 512) in found.findings[0].message


def test_an_odd_current_size_is_reported() -> None:
    """A size that is not a whole number of sectors is rounded down and reported."""
    found = read_metadata(Vhd(size=4 * MIB + 100).build().store())
    assert found.size_bytes == 4 * MIB
    assert [one.code for one in found.findings] == ["size-odd"]


def test_quirk_parent_timestamp_is_not_judged() -> None:
    """Quirk: Hyper-V writes 0, others a time; the reader keeps either."""
    for stamp in (0, 1, 0xFFFFFFFF):
        header = read_metadata(child(parent_timestamp=stamp).build().store()).header
        assert header is not None and header.parent_timestamp == stamp
