# SPDX-License-Identifier: Apache-2.0
"""Every way an image can be wrong, provoked once: a new `CorruptReason` needs a row here.

Each row makes files in a folder and opens them as a user would; locators, of which a bad one is not an error while
another is good, answer with a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.vhd_builder import (
    DYNAMIC,
    FIXED,
    GIB,
    KIB,
    MIB,
    PARENT_ID,
    TIB,
    Block,
    Locator,
    Vhd,
    child,
    pattern,
    put,
    seal_footer,
    seal_header,
)
from tests.vhdkit.formats.vhdx.test_metadata import CASES, CHILD_CASES
from vhdkit.chain.names import opening
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.store import FileStore

SMALL = 512 * KIB
FOOTER, HEADER = Vhd().footer(), Vhd().header()


def _both(raw: bytes) -> Vhd:
    return Vhd(tail=raw, copy=raw)


def _with_header(raw: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        built = Vhd().build()
        built.pieces.append((512, raw))
        built.write(path)

    return write


def _loop(path: Path) -> None:
    child("b.vhd", unique_id=PARENT_ID).build().write(path)
    child(path.name, unique_id=PARENT_ID).build().write(path.with_name("b.vhd"))


def _two_blocks(distance: int) -> Vhd:
    image = Vhd(size=2 * SMALL, block_size=SMALL, blocks={0: Block(pattern(SMALL))})
    image.entries = {1: image.build().starts[0] // 512 + distance}
    return image


RAISED: dict[CorruptReason, Vhd | Callable[[Path], None]] = {
    CorruptReason.NO_FOOTER: _both(bytes(512)),
    CorruptReason.FOOTER_CHECKSUM: _both(put(FOOTER, 100, b"\x01")),
    CorruptReason.FOOTER_VERSION: _both(seal_footer(put(FOOTER, 12, b"\0\2"))),
    CorruptReason.FOOTER_POISONED: _both(seal_footer(put(FOOTER, 0, b"v_poison"))),
    CorruptReason.DISK_TYPE: _both(seal_footer(put(FOOTER, 60, b"\0\0\0\5"))),
    CorruptReason.VIRTUAL_SIZE: Vhd(size=2 * TIB + 512, disk_type=DYNAMIC, block_size=256 * MIB),
    CorruptReason.DATA_OUTSIDE_FILE: Vhd(size=MIB, disk_type=FIXED, data_size=MIB - 512),
    CorruptReason.HEADER_OUTSIDE_FILE: _both(seal_footer(put(FOOTER, 16, b"\0" * 4 + b"\x7f\xff\xff\xff"))),
    CorruptReason.HEADER_COOKIE: _with_header(put(HEADER, 0, b"cxsparsE")),
    CorruptReason.HEADER_CHECKSUM: _with_header(put(HEADER, 1000, b"\x01")),
    CorruptReason.HEADER_VERSION: _with_header(seal_header(put(HEADER, 24, b"\0\2"))),
    CorruptReason.BLOCK_SIZE: _with_header(seal_header(put(HEADER, 32, b"\0\1\0\0"))),
    CorruptReason.BAT_OUTSIDE_FILE: _with_header(Vhd(table_offset=GIB).header()),
    CorruptReason.BAT_TOO_SHORT: Vhd(entry_count=1),
    CorruptReason.STRUCTURES_OVERLAP: _with_header(Vhd(table_offset=1024).header()),
    CorruptReason.BLOCK_OUTSIDE_FILE: Vhd(entries={1: 0x00FFFFFF}),
    CorruptReason.BLOCK_OVER_METADATA: Vhd(size=8 * MIB, entries={1: 2}, blocks={0: Block(b"x")}),
    CorruptReason.BLOCKS_OVERLAP: _two_blocks(1),
    CorruptReason.CHAIN_LOOP: _loop,
}
LOCATORS = {
    CorruptReason.LOCATOR_OUTSIDE_FILE: Locator(b"W2ru", b"a\0", offset=GIB),
    CorruptReason.LOCATOR_LENGTH: Locator(b"W2ru", b"a\0", length=0),
    CorruptReason.LOCATOR_TEXT: Locator(b"W2ru", b"\0\xd8"),
}


VHDX_REASONS = {reason for reason, _ in (CASES | CHILD_CASES).values()} | {
    CorruptReason.LOG_ENTRY,  # in tests of their own there
    CorruptReason.BAT_RESERVED,
    CorruptReason.HEADER_NUMBER,
}


def test_every_reason_is_provoked_here() -> None:
    """The tables and the enum agree; those of chains are provoked in chain/names/test_opening*.py."""
    of_chains = {CorruptReason.CHAIN_DEPTH, CorruptReason.CHAIN_SECTOR_SIZE}
    assert set(RAISED) | set(LOCATORS) | VHDX_REASONS | of_chains == set(CorruptReason)


@pytest.mark.parametrize("reason", RAISED)
def test_opening_raises_the_reason(reason: CorruptReason, tmp_path: Path) -> None:
    """The file is refused for this reason, with its path; both ways of opening agree and change nothing."""
    path, make = tmp_path / "leaf.vhd", RAISED[reason]
    if isinstance(make, Vhd):
        make.build().write(path)
    else:
        make(path)
    before = (path.stat().st_size, path.stat().st_mtime_ns)
    # In a loop the leaf also has a child, so a writable open is refused earlier.
    ways = {CorruptReason.CHAIN_LOOP: (False,), CorruptReason.BLOCKS_OVERLAP: (True,)}  # the latter can be read
    for writable in ways.get(reason, (False, True)):
        with pytest.raises(CorruptImage) as caught:
            opening.open_layers(path, writable=writable)
        assert caught.value.reason is reason
        assert Path(caught.value.path or "").parent == tmp_path
        assert str(caught.value).isprintable()
        if reason is not CorruptReason.CHAIN_LOOP:
            assert caught.value.structure is not None and caught.value.offset_bytes is not None
    assert (path.stat().st_size, path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("reason", LOCATORS)
def test_a_locator_has_the_reason(reason: CorruptReason, tmp_path: Path) -> None:
    """A bad locator has the fault and no text."""
    path = child(locators={0: LOCATORS[reason]}).build().write(tmp_path / "leaf.vhd")
    with FileStore.open(path) as store:
        (locator,) = read_metadata(store).locators
    assert (locator.fault, locator.text) == (reason, None)
