# SPDX-License-Identifier: Apache-2.0
"""`vhdkit compact`."""

from __future__ import annotations

from pathlib import Path

import vhdkit
from tests.vhdkit.cli.running import MIB, document, failure, good, make_chain, run


def make_slack() -> bytes:
    """Make the chain of `make_chain` with blocks of zeros at the start of its base; return the leaf's content."""
    content = make_chain()
    with vhdkit.open_disk("leaf.avhd", writable=True) as disk:
        disk.write(2 * MIB, b"last" * 1000)
        for offset in (2 * MIB, 6 * MIB):
            disk.write(offset, bytes(MIB))
    return content


def test_compact_reports_its_plan_and_its_result(folder: Path) -> None:
    """Plan and result name the same numbers; afterwards nothing is left to gain, and the disk is the same."""
    content = make_slack()
    del folder
    size = Path("leaf.avhd").stat().st_size
    assert "would drop 1 block" in good("compact", "leaf.avhd", "--dry-run")
    assert Path("leaf.avhd").stat().st_size == size
    assert "dropped 1 block" in good("compact", "leaf.avhd")
    assert Path("leaf.avhd").stat().st_size < size
    assert "nothing to gain" in good("compact", "leaf.avhd")
    Path("flat.raw").write_bytes(content)
    assert "equal" in good("compare", "leaf.avhd", "flat.raw")
    assert run("check", "leaf.avhd").exit_code == 0


def test_json() -> None:
    """The document contains the sizes before and after."""
    make_slack()
    result = document("compact", "leaf.avhd")
    assert result["path"] == "leaf.avhd" and result["dropped_block_count"] == 1
    assert result["file_size_after_bytes"] == Path("leaf.avhd").stat().st_size < result["file_size_before_bytes"]


def test_a_raw_file() -> None:
    """Zeros in a raw file become holes."""
    Path("disk.raw").write_bytes(bytes(2 * MIB) + b"x")
    assert "made holes of 2.0 MiB of zeros" in good("compact", "disk.raw")


def test_refusals(folder: Path) -> None:
    """A missing file, an empty one, a folder, an image in use: each has its exit code and one line."""
    make_chain()
    Path("empty.vhd").touch()
    failure("compact", "gone.vhd", code=1)
    failure("compact", "empty.vhd", code=2)
    failure("compact", str(folder), code=2)
    with vhdkit.open_disk("leaf.avhd"):
        failure("compact", "base.vhd", code=5)
