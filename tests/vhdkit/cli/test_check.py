# SPDX-License-Identifier: Apache-2.0
"""`vhdkit check`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.cli.running import MIB, document, good, make_chain, run


def cut_footer(path: str) -> None:
    """Remove the trailing footer, and keep its copy."""
    raw = Path(path).read_bytes()
    Path(path).write_bytes(raw[:-512])


def test_clean() -> None:
    """A sound chain: code 0 and one line, or an empty list."""
    make_chain()
    assert good("check", "leaf.avhd") == "leaf.avhd: clean\n"
    assert document("check", "leaf.avhd") == {"path": "leaf.avhd", "status": "clean", "findings": []}


def test_notes_are_clean() -> None:
    """A note is not a fault: code 0."""
    Path("x.raw").write_bytes(b"a" * 1000)
    assert "x.raw: clean (1 note)" in good("check", "x.raw")


def test_warnings() -> None:
    """Warnings only: code 4."""
    make_chain()
    cut_footer("base.vhd")
    result = run("check", "leaf.avhd")
    assert result.exit_code == 4 and "warnings (2 warnings)" in result.stdout
    assert "written after this image was made" in result.stdout, "the write by another program was not reported"
    found = document("check", "leaf.avhd", code=4)
    assert found["status"] == "warnings"
    assert set(found["findings"][0]) == {"severity", "code", "message", "path", "structure", "offset_bytes"}


def test_errors_come_first() -> None:
    """Errors: code 3; they are listed before warnings, each with its place."""
    make_chain()
    cut_footer("leaf.avhd")
    with Path("base.vhd").open("r+b") as file:
        file.seek(4096)
        file.write(b"\0\0\0\1")
    result = run("check", "leaf.avhd")
    assert result.exit_code == 3
    kinds = [line.split(":")[0] for line in result.stdout.splitlines()[:-1]]
    assert kinds == sorted(kinds) and kinds[0] == "error" and "warning" in kinds
    assert "BAT entry 0 at byte 0x1000" in result.stdout


def test_a_missing_parent_is_an_error() -> None:
    """An orphan: code 3, and the message lists what was searched."""
    make_chain()
    Path("base.vhd").unlink()
    result = run("check", "leaf.avhd")
    assert result.exit_code == 3 and "was not found" in result.stdout


def test_quiet_keeps_the_exit_code() -> None:
    """--quiet prints nothing; only the exit code reports the result."""
    make_chain()
    cut_footer("base.vhd")
    result = run("check", "leaf.avhd", "--quiet")
    assert (result.exit_code, result.output) == (4, "")


def test_lost_bytes_of_a_truncated_file_are_counted_correctly() -> None:
    """If a file was truncated inside its blocks, each block reports at most its own size as lost."""
    good("create", "a.vhd", "--size", "8M")
    with vhdkit.open_disk("a.vhd", writable=True) as disk:
        for block in range(3):
            disk.write(block * 2 * MIB, b"x" * MIB)
    size = Path("a.vhd").stat().st_size
    os.truncate("a.vhd", size - MIB - 512)
    assert f"a block lacks its last {MIB} bytes, which read as zeros" in run("check", "a.vhd").output
    os.truncate("a.vhd", size - 5 * MIB - 512)
    said = run("check", "a.vhd").output
    lost = [line for line in said.splitlines() if " lack" in line]
    assert len(lost) == 1 and "3 blocks lack " in lost[0]
    assert 5 * MIB - 3 * 4096 <= int(lost[0].split(" lack ")[1].split()[0]) <= 5 * MIB


@pytest.mark.parametrize("size", [0, 300_000, 1_500_000, 3_500_000, 4_500_000])
def test_an_incomplete_copy_is_called_that(size: int) -> None:
    """Whatever the file ends before, the message says that the copy may be incomplete, in `check` and elsewhere."""
    good("create", "whole.vhdx", "--size", "8M")
    with vhdkit.open_disk("whole.vhdx", writable=True) as disk:
        disk.write(0, b"data")
    Path("copy.vhdx").write_bytes(Path("whole.vhdx").read_bytes()[:size])
    for words in (["check"], ["map"]):
        result = run(*words, "copy.vhdx")
        assert result.exit_code == (3 if size else 2)
        assert "if the file is a copy, it may be incomplete: copy it again" in result.output
