# SPDX-License-Identifier: Apache-2.0
"""Checking chains: findings about the relation between files, and findings of single files passed on."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

import vhdkit
from tests.harness.vhd_builder import PARENT_ID, Block, Vhd, bits_of, child, pattern
from vhdkit import Severity, errors
from vhdkit.units import MIB

CHS = (120, 4, 17)


def codes(path: Path) -> dict[str, Severity]:
    """The codes of the findings."""
    return {one.code: one.severity for one in vhdkit.check(path)}


def parent(**fields: object) -> Vhd:
    """A sound parent."""
    return Vhd(**({"unique_id": PARENT_ID, "chs": CHS} | fields))  # type: ignore[arg-type]  # Vhd's names


def test_a_chain_we_made_is_clean(tmp_path: Path) -> None:
    """Our own images, with content, have no findings."""
    path = tmp_path / "base.vhd"
    vhdkit.create_image(path, 5 << 20)
    for name in ("a.avhd", "b.avhd"):
        vhdkit.create_child(tmp_path / name, path)
        path = tmp_path / name
        with vhdkit.open_disk(path, writable=True) as disk:
            disk.write(1000, b"x" * 100_000)
            disk.write_zeroes(3 << 20, 1 << 20)
    assert vhdkit.check(path) == []


def test_findings_of_a_raw_image(tmp_path: Path) -> None:
    """A raw image is sound; a partial sector at its end is a note."""
    (tmp_path / "a.img").write_bytes(bytes(1024))
    (tmp_path / "b.img").write_bytes(bytes(1000))
    assert codes(tmp_path / "a.img") == {}
    assert codes(tmp_path / "b.img") == {"size-odd": Severity.NOTE}


def test_missing_and_wrong_parents_are_errors(tmp_path: Path) -> None:
    """INV-PARENT-ID: without its parent, or with another disk in its place, a chain has an error."""
    leaf = child(chs=CHS).build().write(tmp_path / "child.avhd")
    assert codes(leaf) == {"parent-missing": Severity.ERROR}
    parent(unique_id=uuid.UUID(int=3).bytes).build().write(tmp_path / "parent.vhd")
    assert codes(leaf) == {"parent-mismatch": Severity.ERROR}
    (tmp_path / "parent.vhd").unlink()
    (tmp_path / "parent.vhd").symlink_to("/etc/passwd")
    assert codes(leaf) == {"parent-refused": Severity.ERROR}


def test_faults_of_every_layer_are_listed_with_their_file(tmp_path: Path) -> None:
    """A fault in a parent is reported for the parent's file."""
    leaf = child(chs=CHS).build().write(tmp_path / "child.avhd")
    blocks = {0: Block(pattern(8192), bits_of({0}, 2 << 20))}
    base = parent(blocks=blocks).build().write(tmp_path / "parent.vhd")
    (finding,) = vhdkit.check(leaf)
    assert finding.code == "hidden-data" and finding.path == str(base)


def test_different_sizes_are_reported(tmp_path: Path) -> None:
    """A larger child is a note, a smaller one a warning."""
    parent().build().write(tmp_path / "parent.vhd")
    larger = child(size=8 << 20, chs=(240, 4, 17)).build().write(tmp_path / "l.avhd")
    smaller = child(size=2 << 20, chs=(60, 4, 17)).build().write(tmp_path / "s.avhd")
    assert codes(larger) == {"chain-size": Severity.NOTE}
    assert codes(smaller) == {"chain-size": Severity.WARNING}


@pytest.mark.parametrize("size", [MIB, 3 * MIB])
def test_the_length_of_a_raw_parent_is_not_a_finding(tmp_path: Path, size: int) -> None:
    """A raw parent does not record the size of its disk: its file may be longer or shorter than the child's disk."""
    raw, leaf = tmp_path / "base.raw", tmp_path / "leaf.avhd"
    vhdkit.create_image(raw, 2 * MIB, disk_format=vhdkit.DiskFormat.RAW)
    options = vhdkit.OpenOptions(allow_raw_parent=True)
    vhdkit.create_child(leaf, raw, options=options)
    with raw.open("r+b") as file:
        file.truncate(size)
    found = {one.code for one in vhdkit.check(leaf, options=options)}
    assert found <= {"parent-written"}


def test_loops_are_found(tmp_path: Path) -> None:
    """Two images that are each other's parents are an error, and the check ends."""
    ids = [uuid.UUID(int=1).bytes, uuid.UUID(int=2).bytes]
    for number in (0, 1):
        image = child(f"{1 - number}.vhd", unique_id=ids[number], parent_id=ids[1 - number], chs=CHS)
        image.build().write(tmp_path / f"{number}.vhd")
    assert codes(tmp_path / "0.vhd") == {"chain-loop": Severity.ERROR}


@pytest.mark.parametrize("size", [1, 100, 511, 512, 1500])
def test_a_truncated_file_is_a_finding(tmp_path: Path, size: int) -> None:
    """A `.vhd` that was truncated is an error of the image, reported in one finding."""
    path = parent().build().write(tmp_path / "cut.vhd")
    with path.open("r+b") as file:
        file.truncate(size)
    assert Severity.ERROR in codes(path).values()


def test_an_image_in_use_is_not_checked(tmp_path: Path) -> None:
    """An image that is being written to is not judged."""
    vhdkit.create_image(tmp_path / "a.vhd", 1 << 20)
    with vhdkit.open_disk(tmp_path / "a.vhd", writable=True), pytest.raises(errors.ImageInUse):
        vhdkit.check(tmp_path / "a.vhd")


def test_progress_covers_all_layers(tmp_path: Path) -> None:
    """The progress of a chain never goes back: each parent adds to the total."""
    paths = [tmp_path / name for name in ("leaf.avhd", "base.vhd")]
    vhdkit.create_image(paths[1], 8 << 20)
    with vhdkit.open_disk(paths[1], writable=True) as disk:
        disk.write(0, b"x")
    vhdkit.create_child(paths[0], paths[1])
    with vhdkit.open_disk(paths[0], writable=True) as disk:
        disk.write(3 << 20, b"x")
    seen: list[tuple[int, int]] = []
    vhdkit.check(paths[0], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2 << 20, 8 << 20), (8 << 20, 16 << 20)]
