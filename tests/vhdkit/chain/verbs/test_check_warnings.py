# SPDX-License-Identifier: Apache-2.0
"""`check --repair` clears what `check` warns of, or the warning itself says that it does not, and why."""

from __future__ import annotations

import ast
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.harness.vhd_builder import FIXED, FREE, Block, Locator, Vhd, bits_of, child, pattern, put, seal_header
from tests.support import ROOT
from tests.vhdkit.formats.vhdx.test_check import WARNINGS
from vhdkit.finding import Finding, Severity
from vhdkit.formats.vhd.layout import EPOCH_UNIX_SECONDS
from vhdkit.units import MIB

BLOCK = 2 * MIB
LEFT = "(`check --repair` leaves it: "
CHS = (120, 4, 17)
TWO = {0: Block(pattern(BLOCK)), 1: Block(pattern(512))}
XEN = {"creator": b"tap\0", "creator_version": 0x00010003}
PARENT_ID = child().parent_id
# Warnings about an image's surroundings or about programs: they say what helps, and that a repair does not.
BESIDE = {
    "parent-written", "children-unseen", "no-locks", "undo-log-ignored", "merge-record-ignored", "merge-unfinished",
    "notes-unwritten", "image-inside",
}  # fmt: skip
# A repair undoes or discards these, as docs/recovery.md shows and tests/test_recovery.py executes.
TYPED = {"change-unfinished", "notes-left-out"}
NOT_OF_CHECK = {"child-not-marked", "trusted-folders-ignored"}


def dynamic(**fields: object) -> Vhd:
    """A sound disk except for the given fields."""
    return Vhd(**({"chs": CHS, "blocks": TWO} | fields))  # type: ignore[arg-type]  # names are Vhd's


def leaf(**fields: object) -> Vhd:
    """A sound child except for the given fields."""
    return child(**({"chs": CHS, "blocks": TWO} | fields))  # type: ignore[arg-type]  # names are Vhd's


def moved_names() -> Vhd:
    """A child whose parent's name is stored behind its blocks."""
    return leaf(locators={0: Locator(b"W2ru", ".\\parent.vhd".encode("utf-16-le"), offset=6 * MIB)})


IMAGES: dict[str, Vhd] = {
    "footer": dynamic(tail=b""),
    "footer killed": dynamic(tail=b"\xc7" * 512),
    "footers-differ": dynamic(copy=Vhd(hidden=1, chs=CHS).footer()),
    "geometry": dynamic(chs=(1024, 16, 63)),
    "no-id": dynamic(unique_id=bytes(16)),
    "size-chs": dynamic(creator=b"vpc ", chs=(60, 4, 17)),
    "size-odd": dynamic(size=4 * MIB + 100),
    "trailing-space": Vhd(disk_type=FIXED, chs=CHS, data_size=5 * MIB),
    "trailing-space creator": Vhd(disk_type=FIXED, creator=b"vpc ", chs=(120, 4, 17), size=4 * MIB),
    "padding": Vhd(disk_type=FIXED, chs=CHS, tail=Vhd(disk_type=FIXED, chs=CHS).footer() + bytes(4096)),
    "locator-length": leaf(locators={0: Locator(b"W2ku", b""), 1: child().locators[0]}),
    "locator-outside-file": leaf(locators={0: Locator(b"W2ku", b"ab", offset=1 << 40), 1: child().locators[0]}),
    "locator-text": leaf(locators={0: Locator(b"W2ku", b"\x00\xd8\x00"), 1: child().locators[0]}),
    "parent-name": leaf(parent_name=b""),
    "parent-names": leaf(locators={0: Locator(b"W2ku", "\\nowhere\\parent.vhd".encode("utf-16-le"))}),
    "leaked-space": dynamic(entries={1: FREE}, blocks={1: Block(pattern(BLOCK)), 0: Block(b"x")}),
    "leaked-space spare": dynamic(
        entries={1: FREE}, blocks={1: TWO[0], 0: TWO[1]}, entry_count=3, junk=struct.pack(">I", 99)
    ),
    "block-cut": dynamic(blocks={0: Block(b"x")}, footer_at=MIB),
    "batmap": leaf(batmap=b"\xc0", blocks={0: Block(b"x", bits_of({0}, BLOCK))}, **XEN),
    "hidden-data": dynamic(blocks={0: Block(pattern(BLOCK), bits_of({0}, BLOCK))}),
    "behind-blocks": moved_names(),
    "bits-past-end": leaf(size=3 * MIB, chs=(90, 4, 17)),
    "chain-size": leaf(size=2 * MIB, chs=(60, 4, 17), blocks={0: Block(b"x")}),
}


def warnings(path: Path) -> list[Finding]:
    """The warnings about this file."""
    return [one for one in vhdkit.check(path) if one.severity is Severity.WARNING and one.path == str(path)]


@pytest.mark.parametrize("case", IMAGES)
def test_a_repair_clears_a_warning_or_the_warning_says_why_not(case: str, tmp_path: Path) -> None:
    """After a repair an image has only those warnings that announced that they would stay."""
    dynamic(unique_id=PARENT_ID, blocks={}).build().write(tmp_path / "parent.vhd")
    path = IMAGES[case].build().write(tmp_path / "image.vhd")
    before = warnings(path)
    assert case.split()[0] in [one.code for one in before], before
    staying = {one.code for one in before if LEFT in one.message}
    after = vhdkit.repair(path).findings
    left = [one for one in after if one.severity > Severity.NOTE and one.path == str(path)]
    assert {one.code for one in left} == staying and all(LEFT in one.message for one in left), left
    assert all(one.message.endswith(")") for one in left)


def codes() -> Iterator[str]:
    """The codes of all warnings in the sources, as far as they are literals."""
    for file in (ROOT / "vhdkit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            if node.func.id == "_warning" or (node.func.id == "Finding" and "WARNING" in ast.dump(node.args[0])):
                yield from texts[:1]


OF_VHDX = {*WARNINGS, "bitmap-unexpected"}  # repaired in tests/vhdkit/formats/vhdx/test_check.py


def test_every_kind_of_warning_is_covered() -> None:
    """A new warning needs an image here that has it, or an entry in one of the lists."""
    known = {case.split()[0] for case in IMAGES} | BESIDE | TYPED | NOT_OF_CHECK | OF_VHDX
    assert set(codes()) <= known, set(codes()) - known
    assert len(set(codes())) > 15


def test_warnings_about_the_surroundings_say_that_they_stay() -> None:
    """Where the file itself is not at fault, the message says that a repair does not help."""
    for code in BESIDE - {"parent-written"}:
        files = [one.read_text() for one in (ROOT / "vhdkit").rglob("*.py") if f'"{code}"' in one.read_text()]
        assert any("left_by_repair(" in text or "check --repair" in text for text in files), code


def test_qemus_forced_size_is_healthy(tmp_path: Path) -> None:
    """The largest geometry means that the current size counts: neither a warning nor a reason to repair."""
    path = dynamic(chs=(65535, 16, 255), creator=b"qem2").build().write(tmp_path / "image.vhd")
    assert vhdkit.check(path) == [] and vhdkit.repair(path).fixes == ()


def test_xenservers_parent_timestamp_is_healthy(tmp_path: Path) -> None:
    """The time at which the parent's file was written is as good as its creation time; any other time is a note."""
    parent = dynamic(unique_id=PARENT_ID, blocks={}).build().write(tmp_path / "parent.vhd")
    os.utime(parent, (1_700_000_000, 1_700_000_000))
    path = tmp_path / "image.vhd"
    for stamp, expected in ((1_700_000_000 - EPOCH_UNIX_SECONDS, []), (7, ["parent-timestamp"])):
        leaf(parent_timestamp=stamp).build().write(path)
        assert [(one.code) for one in vhdkit.check(path)] == expected


def test_a_blank_parent_name_is_filled_in_without_the_parent(tmp_path: Path) -> None:
    """The header gets the name that the locators have, even if the parent is missing; nothing else changes."""
    path = leaf(parent_name=b"").build().write(tmp_path / "image.vhd")
    raw = path.read_bytes()
    assert "parent-name" in [fix.code for fix in vhdkit.repair(path).fixes]
    named = seal_header(put(raw[512:1536], 64, "parent.vhd".encode("utf-16-be")))
    assert path.read_bytes() == put(raw, 512, named)
