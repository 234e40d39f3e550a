# SPDX-License-Identifier: Apache-2.0
"""What a writable open mends, what it must not touch, and that a read-only open changes nothing."""

from __future__ import annotations

import pytest

from tests.harness.vhd_builder import KIB, Block, Locator, Vhd, child, pattern, put, relative, seal_footer
from vhdkit.errors import CorruptImage, CorruptReason, ImageInUse, NoSpace, VhdkitError
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.footers import FooterState
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.image import read_extents

SMALL = 512 * KIB
KILLED = b"\xc7" * 512
POISONED = seal_footer(put(Vhd().footer(), 0, b"v_poison"))


def _image(**fields: object) -> Vhd:
    values: dict[str, object] = {"size": 2 * SMALL, "block_size": SMALL, "blocks": {0: Block(pattern(SMALL))}}
    return Vhd(**(values | fields))  # type: ignore[arg-type]  # every name is one of Vhd's


def _read(layer: DynamicImage) -> bytes:
    buffer = bytearray(layer.size_bytes)
    read_extents(layer.store, layer.extents(0, len(buffer) // 512), memoryview(buffer))
    return bytes(buffer)


def test_a_sound_image_is_not_touched_by_opening_it() -> None:
    """Opening a sound image for writing writes nothing."""
    store = _image().build().store(frozen=True)
    assert _read(open_dynamic(store, writable=True)) == pattern(SMALL) + bytes(SMALL)


@pytest.mark.parametrize("copy", [b"\0" * 512, put(Vhd().footer(), 300, b"!")])
def test_a_bad_copy_is_restored_from_the_tail(copy: bytes) -> None:
    """INV-FOOTER-COPY: after a writable open both footers are good and equal."""
    image = _image(copy=copy)
    store = image.build().store()
    layer = open_dynamic(store, writable=True)
    assert store.pread(0, 512) == image.footer()
    assert layer.metadata.copy is not None and layer.metadata.copy.state is FooterState.GOOD


@pytest.mark.parametrize("tail", [b"", b"\0" * 512, b"\0" * 2048, put(Vhd().footer(), 300, b"!"), b"half"])
def test_a_lost_trailing_footer_is_rewritten_at_the_end(tail: bytes) -> None:
    """INV-FOOTER-COPY: the footer is rewritten on a sector at the end, and no block loses a byte."""
    image = _image(tail=tail)
    built = image.build()
    store = built.store()
    layer = open_dynamic(store, writable=True)
    assert store.pread(store.size() - 512, 512) == image.footer()
    assert store.size() % 512 == 0 and store.size() - 512 >= built.footer_at
    assert layer.metadata.tail.state is FooterState.GOOD
    assert _read(layer) == pattern(SMALL) + bytes(SMALL)


def test_a_lost_footer_does_not_overwrite_a_locator() -> None:
    """The footer goes behind all structures, not just behind the blocks."""
    image = child(size=SMALL, block_size=SMALL, blocks={0: Block(pattern(SMALL))}, tail=b"")
    image.locators[0].offset = 2 * SMALL
    store = image.build().store()
    store.truncate(2 * SMALL + len(image.locators[0].data))
    layer = open_dynamic(store, writable=True)
    assert store.pread(store.size() - 512, 512) == image.footer()
    assert layer.metadata.locators[0].text == ".\\parent.vhd"


def test_a_511_byte_footer_is_not_damage() -> None:
    """A short footer is valid; the next block goes behind it on a sector."""
    image = _image(footer_size=511)
    built = image.build()
    store = built.store()
    layer = open_dynamic(store, writable=True)
    assert store.size() == built.size
    layer.write(1024, memoryview(pattern(512, 3)))
    layer.close()
    again = open_dynamic(store)
    assert again.metadata.tail.state is FooterState.GOOD and again.block_offset(1) % 4096 == 0
    assert _read(again) == pattern(SMALL) + pattern(512, 3) + bytes(SMALL - 512)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"tail": KILLED}, ImageInUse),
        ({"copy": KILLED}, ImageInUse),
        ({"tail": POISONED}, CorruptImage),
        ({"copy": POISONED}, CorruptImage),
    ],
    ids=["quirk-tail-0xC7", "copy-0xC7", "quirk-tail-poisoned", "copy-poisoned"],
)
def test_marks_of_another_program_are_never_mended(fields: dict[str, object], kind: type[VhdkitError]) -> None:
    """0xC7 and v_poison mean that another program is at work: readable, refused for writing, no byte changed."""
    store = _image(**fields).build().store(frozen=True)
    assert _read(open_dynamic(store)) == pattern(SMALL) + bytes(SMALL)
    with pytest.raises(kind) as caught:
        open_dynamic(store, writable=True)
    assert caught.value.hint is not None
    if isinstance(caught.value, CorruptImage):
        assert caught.value.reason is CorruptReason.FOOTER_POISONED


def test_an_image_with_a_bad_table_is_not_mended() -> None:
    """With a BAT entry outside the file the end of the data is unknown: refused, unchanged."""
    store = _image(tail=b"", entries={1: 0x00FFFFFF}).build().store(frozen=True)
    with pytest.raises(CorruptImage) as caught:
        open_dynamic(store, writable=True)
    assert caught.value.reason is CorruptReason.BLOCK_OUTSIDE_FILE


def test_a_short_last_block_is_completed_before_writing() -> None:
    """Quirk: a block cut by the end of the file is completed with zeros, and the footer moves behind it."""
    image = _image(size=SMALL)
    built = image.build()
    footer = built.pieces.pop()[1]
    cut = built.starts[0] + 512 + 10 * 512
    store = built.store()
    store.truncate(cut)
    store.pwrite(cut, footer)
    layer = open_dynamic(store, writable=True)
    kept = pattern(SMALL)[: 10 * 512]
    assert _read(layer) == kept + bytes(SMALL - len(kept))
    assert layer.metadata.tail.offset_bytes >= built.starts[0] + 512 + SMALL
    layer.write(1023, memoryview(pattern(512, 5)))
    layer.close()
    assert _read(open_dynamic(store)) == kept + bytes(SMALL - len(kept) - 512) + pattern(512, 5)


@pytest.mark.parametrize("fields", [{"tail": b""}, {"copy": b"\0" * 512}, {"footer_size": 511}])
def test_a_read_only_open_changes_nothing(fields: dict[str, object]) -> None:
    """Whatever is damaged, a read-only open does not change the file."""
    store = _image(**fields).build().store(frozen=True)
    assert _read(open_dynamic(store)) == pattern(SMALL) + bytes(SMALL)


@pytest.mark.parametrize("code", [b"what", b"W2ku"])
@pytest.mark.parametrize("offset", [1 << 24, 1 << 40, (1 << 63) - 512, (1 << 64) - 1])
def test_a_locator_outside_the_file_keeps_the_image_read_only(code: bytes, offset: int) -> None:
    """INV-BOUNDED: a locator that points past the end, even of an unused kind, neither grows the file nor overflows:
    the image opens read-only, and a writable open is refused without a change."""
    stray = Locator(code, b"", space=512, length=20, offset=offset)
    store = child(locators={0: relative(".\\parent.vhd"), 1: stray}, tail=b"").build().store(frozen=True)
    with pytest.raises(CorruptImage) as caught:
        open_dynamic(store, writable=True)
    assert caught.value.reason is CorruptReason.LOCATOR_OUTSIDE_FILE
    open_dynamic(store)


def test_a_file_of_exabytes_without_a_footer_is_an_error_not_an_overflow() -> None:
    """INV-BOUNDED: if no footer can be appended, a writable open reports it and changes nothing."""
    store = child(tail=b"").build().store()
    store.truncate((1 << 63) - 1)
    store.frozen = True
    with pytest.raises(NoSpace):
        open_dynamic(store, writable=True)


def test_a_partial_sector_stays_zeros() -> None:
    """INV-FLUSHED-OR-NEWER: a file that ends inside a sector reads zeros there, and still does when it is mended."""
    built = _image(tail=b"").build()
    store = built.store()
    store.truncate(built.starts[0] + 512 + 5 * 512 + 300)
    before = _read(open_dynamic(store))
    assert before[5 * 512 : 6 * 512] == bytes(512) != pattern(SMALL)[5 * 512 : 6 * 512]
    assert _read(open_dynamic(store, writable=True)) == before == _read(open_dynamic(store))
