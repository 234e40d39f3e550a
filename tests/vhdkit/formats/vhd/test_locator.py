# SPDX-License-Identifier: Apache-2.0
"""Parent locators: every kind and encoding, in any slot, with the space in bytes or sectors, and damaged ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from tests.harness.vhd_builder import GIB, Locator, Vhd, absolute, child, put, relative
from vhdkit.errors import CorruptReason
from vhdkit.formats.vhd import locator
from vhdkit.formats.vhd.layout import LocatorEntry
from vhdkit.formats.vhd.metadata import Metadata, read_metadata

LIMIT = locator.MAX_LOCATOR_BYTES
NAMES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=300)


def _metadata(image: Vhd) -> Metadata:
    return read_metadata(image.build().store(frozen=True))


def _one(one: Locator) -> locator.Locator:
    (found,) = _metadata(child(locators={0: one})).locators
    return found


@pytest.mark.parametrize(
    ("code", "raw", "text"),
    [
        (b"W2ru", ".\\päre nt.vhd".encode("utf-16-le"), ".\\päre nt.vhd"),
        (b"W2ku", "C:\\disks\\父.vhd".encode("utf-16-le"), "C:\\disks\\父.vhd"),
        (b"MacX", b"file:///Users/x/a%20b.vhd", "/Users/x/a b.vhd"),
        (b"MacX", b"file://localhost/Users/p%C3%A4.vhd", "/Users/pä.vhd"),
        (b"MacX", b"FILE:///x.vhd", "/x.vhd"),
        (b"MacX", b"./base.vhd", "./base.vhd"),
        (b"Wi2r", b".\\old.vhd", ".\\old.vhd"),
        (b"Wi2k", b"C:\\old\\p\xe4.vhd", "C:\\old\\pä.vhd"),
        (b"W2ru", "a.vhd\0junk".encode("utf-16-le"), "a.vhd"),
        (b"MacX", b"a.vhd\0", "a.vhd"),
    ],
)
def test_every_kind_of_locator_is_read(code: bytes, raw: bytes, text: str) -> None:
    """UTF-16 little-endian for W2ru and W2ku, a UTF-8 file URL for MacX, 8-bit text for the oldest two."""
    found = _one(Locator(code, raw))
    assert (found.text, found.fault, found.platform_code, found.data_length_bytes) == (text, None, code, len(raw))


def test_an_unknown_kind_is_kept_without_text() -> None:
    """A locator of an unknown kind is listed without text, and is not a fault."""
    found = _one(Locator(b"Mac ", b"\0\1\2alias"))
    assert (found.text, found.fault) == (None, None)
    assert found.structure == "parent locator 1 (Mac )"


@pytest.mark.parametrize("slots", [(0, 1), (6, 7), (7, 0), (3,), tuple(range(8))])
def test_quirk_locators_in_any_slot(slots: tuple[int, ...]) -> None:
    """Quirk: Hyper-V fills slots 1 and 2, DiscUtils 7 and 8; empty slots between them are skipped."""
    image = child(locators={slot: relative(f"p{slot}.vhd") for slot in slots})
    found = _metadata(image).locators
    assert [(one.slot, one.text) for one in found] == [(slot, f"p{slot}.vhd") for slot in sorted(slots)]


@pytest.mark.parametrize(
    ("stated", "length", "space"),
    [
        (1, 30, 512),  # sectors, as in the specification
        (2, 30, 1024),
        (511, 30, 511 * 512),
        (512, 30, 512),  # bytes, as in Virtual PC, Hyper-V and XenServer
        (1024, 30, 1024),
        (65536, 30, 65536),
        (0, 30, 30),
        (1, 700, 700),  # less than the text, which is complete all the same
    ],
)
def test_quirk_data_space_in_sectors_or_bytes(stated: int, length: int, space: int) -> None:
    """Quirk: a space below 512 can only be sectors, from 512 on it is bytes; the text is read either way."""
    assert locator.space_bytes(LocatorEntry(b"W2ru", stated, length, 0, 0)) == space
    raw = ("x" * (length // 2)).encode("utf-16-le")
    image = child(locators={0: Locator(b"W2ru", raw, space=stated)})
    metadata = _metadata(image)
    assert metadata.locators[0].text == "x" * (length // 2)
    assert metadata.structures()[-1][2] == space


def test_quirk_header_name_without_nul_fills_512_bytes() -> None:
    """Quirk: a parent name may fill its field to the last byte, without a NUL."""
    name = "n" * 252 + ".vhd"
    metadata = _metadata(child(parent_name=name.encode("utf-16-be"), locators={}))
    assert metadata.parent_name == name and len(name) == 256


def test_quirk_a_whole_path_in_the_header_name() -> None:
    """Quirk: children called .avhd carry a full Windows path there; it ends at its NUL."""
    name = "C:\\vm\\disk one.vhd"
    metadata = _metadata(child(parent_name=(name + "\0" + "old rest").encode("utf-16-be")))
    assert metadata.parent_name == name


def test_a_header_name_with_lone_surrogates_is_shown() -> None:
    """Lone surrogates become a replacement character; no error is raised."""
    metadata = _metadata(child(parent_name=b"\xd8\x00" + "a".encode("utf-16-be")))
    assert metadata.parent_name == "\ufffda" or "\ufffd" in metadata.parent_name


@pytest.mark.parametrize(
    ("one", "fault"),
    [
        (Locator(b"W2ru", b"a\0", length=0), CorruptReason.LOCATOR_LENGTH),
        (Locator(b"W2ru", b"a\0", length=LIMIT + 1), CorruptReason.LOCATOR_LENGTH),
        (Locator(b"W2ru", b"a\0", length=0xFFFFFFFF), CorruptReason.LOCATOR_LENGTH),
        (Locator(b"??\n?", b"a\0", length=LIMIT + 1), CorruptReason.LOCATOR_LENGTH),
        (Locator(b"W2ru", b"a\0", offset=GIB), CorruptReason.LOCATOR_OUTSIDE_FILE),
        (Locator(b"W2ru", b"a\0", offset=2**64 - 1), CorruptReason.LOCATOR_OUTSIDE_FILE),
        (Locator(b"W2ru", b"a\0", length=LIMIT), CorruptReason.LOCATOR_OUTSIDE_FILE),
        (Locator(b"W2ru", b"a\0b"), CorruptReason.LOCATOR_TEXT),
        (Locator(b"W2ru", b"\x00\xd8"), CorruptReason.LOCATOR_TEXT),
        (Locator(b"W2ku", b"\0\0"), CorruptReason.LOCATOR_TEXT),
        (Locator(b"MacX", b"file:///\xff"), CorruptReason.LOCATOR_TEXT),
    ],
)
def test_a_damaged_locator_has_a_fault_and_no_text(one: Locator, fault: CorruptReason) -> None:
    """Another locator may still work, so the image opens, and this one says what is wrong with it."""
    metadata = _metadata(child(locators={1: one, 5: relative("good.vhd")}))
    bad, good = metadata.locators
    assert (bad.slot, bad.text, bad.fault) == (1, None, fault)
    assert (good.slot, good.text, good.fault) == (5, "good.vhd", None)


@pytest.mark.parametrize(("length", "good"), [(LIMIT - 2, True), (LIMIT, True), (LIMIT + 2, False)])
def test_locator_length_at_its_limit(length: int, good: bool) -> None:
    """64 KiB of text are read; more is not even tried."""
    found = _one(Locator(b"W2ku", b"x\0" * (length // 2)))
    assert found.text == ("x" * (length // 2) if good else None)
    assert (found.fault is None) == good


@given(NAMES, st.sampled_from([b"W2ru", b"W2ku"]))
def test_utf16_text_survives_writing_and_reading(name: str, code: bytes) -> None:
    """Any text without NUL survives, including astral characters."""
    assert locator.decode(code, locator.encode(code, name)) == name


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1))
def test_mac_paths_survive_as_urls(name: str) -> None:
    """An absolute path becomes a file URL and is restored from it."""
    assert locator.decode(b"MacX", locator.encode(b"MacX", "/" + name)) == "/" + name


@given(NAMES)
def test_header_name_survives_up_to_its_512_bytes(name: str) -> None:
    """The field is always 512 bytes; a name that fits is kept completely."""
    raw = locator.encode_parent_name(name)
    assert len(raw) == 512
    if len(name.encode("utf-16-be")) <= 512:
        assert locator.decode_parent_name(raw) == name


@given(st.lists(st.tuples(st.sampled_from([b"W2ru", b"W2ku"]), NAMES), min_size=1, max_size=8))
def test_placed_locators_do_not_overlap_and_read_back(texts: list[tuple[bytes, str]]) -> None:
    """Locators are placed on consecutive sectors and hold what they were given."""
    entries, writes, end = locator.place_locators(texts, 8192)
    store = MemStore()
    store.truncate(end)
    position = 8192
    for offset, raw in writes:
        assert offset == position and len(raw) % 512 == 0
        store.pwrite(offset, raw)
        position = offset + len(raw)
    assert position == end and len(entries) == 8
    for (code, text), entry in zip(texts, entries, strict=False):
        assert entry.data_space % 512 == 0 and entry.platform_code == code
        assert locator.decode(code, store.pread(entry.data_offset, entry.data_length)) == text
    assert all(entry.platform_code == b"\0\0\0\0" for entry in entries[len(texts) :])


def test_an_image_that_is_not_differencing_has_no_locators() -> None:
    """The entries of a dynamic disk are ignored."""
    image = Vhd(locators={0: absolute("/etc/passwd")})
    assert _metadata(image).locators == ()


def test_the_reserved_field_of_an_entry_is_ignored() -> None:
    """The reserved word between length and offset belongs to neither."""
    image = child()
    built = image.build()
    offset = 512 + 576 + 12
    store = built.store()
    raw = put(store.pread(512, 1024), offset - 512, b"\xff\xff\xff\xff")
    total = 0xFFFFFFFF - (sum(raw) - sum(raw[36:40])) & 0xFFFFFFFF
    store.pwrite(512, put(raw, 36, total.to_bytes(4, "big")))
    assert read_metadata(store).locators[0].text == ".\\parent.vhd"
