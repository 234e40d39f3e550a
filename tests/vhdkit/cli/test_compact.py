# SPDX-License-Identifier: Apache-2.0
"""`vhdkit compact`."""

from __future__ import annotations

from pathlib import Path

import vhdkit
from tests.vhdkit.cli.running import MIB, document, failure, good, make_chain, run


def make_slack() -> bytes:
    """The chain of `make_chain`, its base with blocks of zeros in front; returns the leaf's content."""
    content = make_chain()
    with vhdkit.open_disk("leaf.avhd", writable=True) as disk:
        disk.write(2 * MIB, b"last" * 1000)
        for offset in (2 * MIB, 6 * MIB):
            disk.write(offset, bytes(MIB))
    return content


def test_compact_says_what_it_will_do_and_did(folder: Path) -> None:
    """The plan and the deed name the same numbers; afterwards there is nothing to gain, and the disk is the same."""
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


def test_compact_as_json() -> None:
    """The document has the sizes before and after."""
    make_slack()
    told = document("compact", "leaf.avhd")
    assert told["path"] == "leaf.avhd" and told["dropped_block_count"] == 1
    assert told["file_size_after_bytes"] == Path("leaf.avhd").stat().st_size < told["file_size_before_bytes"]


def test_compact_of_a_raw_file() -> None:
    """Zeros of a raw file become holes."""
    Path("disk.raw").write_bytes(bytes(2 * MIB) + b"x")
    assert "made holes of 2.0 MiB of zeros" in good("compact", "disk.raw")


def test_what_cannot_be_compacted(folder: Path) -> None:
    """A missing file, an empty one, a folder, an image in use: each its exit code and one line."""
    make_chain()
    Path("empty.vhd").touch()
    failure("compact", "gone.vhd", code=1)
    failure("compact", "empty.vhd", code=2)
    failure("compact", str(folder), code=2)
    with vhdkit.open_disk("leaf.avhd"):
        failure("compact", "base.vhd", code=5)
