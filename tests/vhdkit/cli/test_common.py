# SPDX-License-Identifier: Apache-2.0
"""Options that every verb has."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

import vhdkit
from tests.vhdkit.cli.running import document, failure, good
from vhdkit.cli.common import epilog, size


@pytest.mark.parametrize(("text", "size_bytes"), [("512", 512), ("64K", 65536), ("1.5G", 3 << 29), ("2 TiB", 2 << 40)])
def test_sizes(text: str, size_bytes: int) -> None:
    """Sizes are powers of 1024, with or without the i and the B."""
    assert size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "x", "1Q", "-1", "1e9"])
def test_invalid_sizes(text: str) -> None:
    """An invalid size is a usage error that quotes the text."""
    with pytest.raises(click.BadParameter, match="is not a size"):
        size(text)


def test_allow_parent_dir_may_be_repeated() -> None:
    """Each --allow-parent-dir adds a folder; without them a parent elsewhere is refused with code 6."""
    for folder in ("a", "b", "c"):
        Path(folder).mkdir()
    good("create", "a/base.vhd", "--size", "1M")
    good("create", "b/middle.avhd", "--parent", "a/base.vhd")
    good("create", "c/leaf.avhd", "--parent", "b/middle.avhd", "--allow-parent-dir", "a")
    assert "--allow-parent-dir" in failure("map", "c/leaf.avhd", code=6)
    good("map", "c/leaf.avhd", "--allow-parent-dir", "a", "--allow-parent-dir", "b")


def test_allow_raw_parent() -> None:
    """A raw parent is accepted only if the user allows it."""
    Path("base.raw").write_bytes(b"x" * 65536)
    good("create", "leaf.avhd", "--parent", "base.raw")
    assert "--allow-raw-parent" in failure("convert", "leaf.avhd", "y.raw", "--to", "raw", code=6)
    good("convert", "leaf.avhd", "y.raw", "--to", "raw", "--allow-raw-parent")
    assert Path("y.raw").read_bytes() == b"x" * 65536


def test_dynamic_bitmap() -> None:
    """A sector whose bit is clear reads as zeros, or with `ignore` as the stored bytes."""
    good("create", "x.vhd", "--size", "2M")
    with vhdkit.open_disk("x.vhd", writable=True) as disk:
        disk.write(0, b"y" * 512)
        layer = disk.chain.layers[0]
        bitmap_offset = layer.block_offset(0) - 512
    raw = bytearray(Path("x.vhd").read_bytes())
    raw[bitmap_offset] &= 0x7F
    Path("x.vhd").write_bytes(raw)
    good("convert", "x.vhd", "spec.raw", "--to", "raw")
    good("convert", "x.vhd", "ignore.raw", "--to", "raw", "--dynamic-bitmap", "ignore")
    assert Path("spec.raw").read_bytes()[:512] == bytes(512)
    assert Path("ignore.raw").read_bytes()[:512] == b"y" * 512


def test_format() -> None:
    """--format raw treats a VHD as plain bytes."""
    good("create", "x.vhd", "--size", "1M", "--format", "fixed")
    assert document("info", "x.vhd")["kind"] == "fixed"
    raw = document("info", "x.vhd", "--format", "raw")
    assert (raw["kind"], raw["virtual_size_bytes"]) == ("raw", (1 << 20) + 512)


def test_examples_are_kept_as_typed() -> None:
    """The examples at the end of a help text stay on separate lines."""
    assert epilog("a b", "c d") == "\b\nExamples:\n  a b\n  c d"
