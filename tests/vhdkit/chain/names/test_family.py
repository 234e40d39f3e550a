# SPDX-License-Identifier: Apache-2.0
"""Paths of chains, and the children of an image."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit


def test_chain_and_children(tmp_path: Path) -> None:
    """Chains are listed leaf first; children are found beside an image and in given folders; damage is skipped."""
    base, elsewhere = tmp_path / "base.vhd", tmp_path / "elsewhere"
    first, second = tmp_path / "a.avhd", tmp_path / "b.avhd"
    elsewhere.mkdir()
    vhdkit.create_image(base, 1 << 20)
    vhdkit.create_child(first, base)
    vhdkit.create_child(second, first)
    options = vhdkit.OpenOptions(parent_dirs=(str(tmp_path),))
    vhdkit.create_child(elsewhere / "c.avhd", base, options=options)
    (tmp_path / "damaged.vhd").write_bytes(b"conectix" * 200)
    assert vhdkit.chain_paths(second) == [str(second), str(first), str(base)]
    with vhdkit.open_disk(second, writable=True):  # in use
        assert list(vhdkit.find_children([base, first, second]).values()) == [[str(first)], [str(second)], []]
        found = vhdkit.find_children([base], folders=[elsewhere])
        assert sorted(found[str(base)]) == [str(first), str(elsewhere / "c.avhd")]
    with pytest.raises(vhdkit.NotFound):
        vhdkit.find_children([tmp_path / "nowhere.vhd"])


def test_children_of_raw_images(tmp_path: Path) -> None:
    """A raw parent has no id; its children are known by its path."""
    raw = tmp_path / "base.raw"
    raw.write_bytes(bytes(1 << 20))
    options = vhdkit.OpenOptions(allow_raw_parent=True)
    vhdkit.create_child(tmp_path / "a.avhd", raw, options=options)
    assert vhdkit.find_children([raw]) == {str(raw): [str(tmp_path / "a.avhd")]}
