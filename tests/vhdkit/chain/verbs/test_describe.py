# SPDX-License-Identifier: Apache-2.0
"""The facts behind `info` and `chain`."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from tests.harness.vhd_builder import PARENT_ID, Vhd, child
from vhdkit import errors
from vhdkit.chain.verbs.describe import describe_chain, describe_image

MIB = 1 << 20


def test_an_image_is_described_by_its_footer_and_header(tmp_path: Path) -> None:
    """Creator, sizes, geometry, ids and block counts are those of the file."""
    path = Vhd(creator=b"vbox", creator_version=0x00040002, chs=(120, 4, 17), timestamp=5, hidden=1).build()
    info = describe_image(path.write(tmp_path / "a.vhd"))
    assert (info.kind, info.creator, info.creator_version) == ("dynamic", "vbox", "4.2")
    assert (info.virtual_size_bytes, info.geometry, info.block_count) == (4 * MIB, (120, 4, 17), 2)
    assert info.created_unix_seconds == 946684805
    assert info.hidden and not info.in_use and info.allocated_block_count == 0


def test_a_size_from_the_geometry_is_reported(tmp_path: Path) -> None:
    """If the creator means cylinders x heads x sectors, this is the virtual size, and the description says so."""
    info = describe_image(Vhd(creator=b"vpc ", chs=(100, 4, 17)).build().write(tmp_path / "a.vhd"))
    assert info.size_from_geometry
    assert info.virtual_size_bytes == 100 * 4 * 17 * 512 != info.current_size_bytes


def test_images_in_use_are_described(tmp_path: Path) -> None:
    """No lock is needed, and the description says that another program is writing."""
    path = tmp_path / "a.vhd"
    vhdkit.create_image(path, MIB)
    with vhdkit.open_disk(path, writable=True):
        assert describe_image(path).in_use
        assert describe_chain(path).layers[0].image.in_use
    assert not describe_image(path).in_use


def test_an_orphan_is_described_with_its_problem(tmp_path: Path) -> None:
    """A child whose parent is missing is described, alone and as a broken chain."""
    leaf = child().build().write(tmp_path / "child.avhd")
    info = describe_image(leaf)
    assert info.parent is not None and info.parent.path is None
    assert "not found" in (info.parent.problem or "")
    assert info.parent.locators == (("W2ru", ".\\parent.vhd"),)
    chain = describe_chain(leaf)
    assert chain.problem == info.parent.problem
    assert [layer.owned_bytes for layer in chain.layers] == [None]


def test_layers_are_listed_leaf_first_with_what_each_owns(tmp_path: Path) -> None:
    """What the layers own, and what no layer owns, adds up to the disk."""
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.avhd"
    vhdkit.create_image(base, 10 * MIB)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, b"x" * 3 * MIB)
    vhdkit.create_child(leaf, base)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(MIB, b"y" * 4096)
    chain = describe_chain(leaf)
    assert [Path(layer.image.path).name for layer in chain.layers] == ["leaf.avhd", "base.vhd"]
    assert [layer.owned_bytes for layer in chain.layers] == [4096, 4 * MIB - 4096]
    assert chain.unowned_bytes == 6 * MIB and chain.problem is None


def test_a_loop_is_described_as_a_problem(tmp_path: Path) -> None:
    """Images that are each other's parents give a description with a problem, and the loop ends."""
    for name, other in (("a.vhd", "b.vhd"), ("b.vhd", "a.vhd")):
        child(other, unique_id=PARENT_ID, parent_id=PARENT_ID).build().write(tmp_path / name)
    chain = describe_chain(tmp_path / "a.vhd")
    assert chain.problem is not None and "circular" in chain.problem


def test_other_formats_are_refused_by_their_names(tmp_path: Path) -> None:
    """The error for a VMDK or QCOW2 names its format."""
    for magic, name in ((b"KDMV", "VMDK"), (b"QFI\xfb", "QCOW2")):
        (tmp_path / "x").write_bytes(magic.ljust(4096, b"\0"))
        with pytest.raises(errors.UnsupportedFormat, match=name):
            describe_image(tmp_path / "x")
