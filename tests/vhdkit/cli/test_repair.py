# SPDX-License-Identifier: Apache-2.0
"""`vhdkit check --repair` and `--restore`."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from tests.harness.vhd_builder import KIB, MIB, Block, Vhd, pattern
from tests.vhdkit.cli.running import document, failure, good, names, run

BLOCK = 512 * KIB


def damaged(name: str, **fields: object) -> bytes:
    """Make a dynamic image that needs a repair; return its bytes."""
    values: dict[str, object] = {
        "size": 4 * MIB,
        "block_size": BLOCK,
        "blocks": {1: Block(pattern(BLOCK))},
        "tail": b"",
    }
    Vhd(**(values | fields)).build().write(Path(name))  # type: ignore[arg-type]
    return Path(name).read_bytes()


def test_repair_and_restore() -> None:
    """A repair reports what it did, how to undo it, and what is left; the printed command undoes it."""
    before = damaged("a b.vhd")
    assert "would do: the trailing footer was absent" in run("check", "a b.vhd", "--repair", "--dry-run").stdout
    assert Path("a b.vhd").read_bytes() == before
    output = good("check", "a b.vhd", "--repair", "--undo", "undo file")
    assert "repaired: the trailing footer was absent" in output
    assert "vhdkit check 'a b.vhd' --restore 'undo file'" in output and "a b.vhd: clean" in output
    assert "nothing to repair" in good("check", "a b.vhd", "--repair")
    result = run("check", "a b.vhd", "--restore", "undo file")
    assert result.exit_code == 4 and "restored" in result.stdout
    assert Path("a b.vhd").read_bytes() == before


def test_consent_is_required(folder: Path) -> None:
    """Without consent the code stays 3, the option is named and nothing changes; with it a report is written."""
    damaged("a.vhd", entries={3: 0x7FFFFFFF})
    result = run("check", "a.vhd", "--repair")
    assert result.exit_code == 3
    assert (
        "not done: 1 blocks have impossible places" in result.stdout and "requires --accept-data-loss" in result.stdout
    )
    repaired = document("check", "a.vhd", "--repair", "--accept-data-loss", "--report", "lost.json")
    lost = [{"offset_bytes": 3 * BLOCK, "size_bytes": BLOCK}]
    assert [one["lost"] for one in repaired["repair"]["fixes"] if one["code"] == "bat"] == [lost]
    assert repaired["status"] == "clean" and repaired["repair"]["report"] == "lost.json"
    assert names(folder) == ["a.vhd", "lost.json"]


@pytest.mark.parametrize("words", [["--undo", "x"], ["--accept-data-loss"], ["--writer-is-dead"], ["--dry-run"]])
def test_repair_options_need_repair(words: list[str]) -> None:
    """They are refused without --repair."""
    damaged("a.vhd")
    assert "requires --repair" in failure("check", "a.vhd", *words, code=2)


def test_refusals() -> None:
    """A missing image, one in use, a raw one, an existing backup file, no backup: each has its exit code."""
    damaged("a.vhd")
    Path("disk.raw").write_bytes(b"r" * 4096)
    Path("taken").touch()
    failure("check", "gone.vhd", "--repair", code=1)
    failure("check", "disk.raw", "--repair", code=2)
    failure("check", "a.vhd", "--repair", "--undo", "taken", code=1)
    failure("check", "a.vhd", "--restore", "taken", code=2)
    failure("check", "a.vhd", "--repair", "--restore", "taken", code=2)
    with vhdkit.open_disk("a.vhd"):
        failure("check", "a.vhd", "--repair", code=5)
