# SPDX-License-Identifier: Apache-2.0
"""`vhdkit compare`."""

from __future__ import annotations

from pathlib import Path

from tests.vhdkit.cli.running import MIB, document, failure, good, make_chain, run


def test_equal() -> None:
    """Images of different kinds with equal content: code 0."""
    Path("flat.raw").write_bytes(make_chain())
    assert "equal" in good("compare", "leaf.avhd", "flat.raw")
    assert document("compare", "leaf.avhd", "flat.raw") == {
        "same": True, "first_size_bytes": 8 * MIB, "second_size_bytes": 8 * MIB,
        "first_difference_bytes": None, "different_sector_count": 0,
    }  # fmt: skip


def test_different() -> None:
    """Code 1, with the first byte that differs and the number of sectors that do."""
    content = bytearray(make_chain())
    content[3 * MIB + 7] ^= 1
    content[7 * MIB] ^= 1
    Path("flat.raw").write_bytes(content)
    result = run("compare", "leaf.avhd", "flat.raw")
    assert result.exit_code == 1 and "2 sectors" in result.stdout and f"{3 * MIB + 7:#x}" in result.stdout
    found = document("compare", "leaf.avhd", "flat.raw", code=1)
    assert (found["same"], found["first_difference_bytes"], found["different_sector_count"]) == (False, 3 * MIB + 7, 2)


def test_sizes_may_differ() -> None:
    """A longer disk is equal if the rest is zeros, and a note says so; otherwise the difference is in the rest."""
    content = make_chain()
    Path("long.raw").write_bytes(content + bytes(MIB))
    assert "the rest of long.raw is zeros" in good("compare", "leaf.avhd", "long.raw")
    Path("longer.raw").write_bytes(content + b"x" * 512)
    result = run("compare", "longer.raw", "leaf.avhd")
    assert result.exit_code == 1 and f"{8 * MIB:#x}" in result.stdout and "compared with zeros" in result.stdout


def test_refusals() -> None:
    """A missing image fails with one line; --quiet does not change the exit code."""
    make_chain()
    assert "gone.vhd" in failure("compare", "leaf.avhd", "gone.vhd", code=1)
    Path("x.raw").write_bytes(b"x" * 512)
    result = run("compare", "leaf.avhd", "x.raw", "--quiet")
    assert (result.exit_code, result.output) == (1, "")
