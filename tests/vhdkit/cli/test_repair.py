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
    """A dynamic image that needs a repair; its bytes."""
    values: dict[str, object] = {
        "size": 4 * MIB,
        "block_size": BLOCK,
        "blocks": {1: Block(pattern(BLOCK))},
        "tail": b"",
    }
    Vhd(**(values | fields)).build().write(Path(name))  # type: ignore[arg-type]
    return Path(name).read_bytes()


def test_repair_and_restore() -> None:
    """A repair says what it did, how it is taken back, and what is left; the typed line takes it back."""
    before = damaged("a b.vhd")
    assert "would do: the trailing footer was absent" in run("check", "a b.vhd", "--repair", "--dry-run").stdout
    assert Path("a b.vhd").read_bytes() == before
    told = good("check", "a b.vhd", "--repair", "--undo", "undo file")
    assert "repaired: the trailing footer was absent" in told
    assert "vhdkit check 'a b.vhd' --restore 'undo file'" in told and "a b.vhd: clean" in told
    assert "nothing to repair" in good("check", "a b.vhd", "--repair")
    result = run("check", "a b.vhd", "--restore", "undo file")
    assert result.exit_code == 4 and "restored" in result.stdout
    assert Path("a b.vhd").read_bytes() == before


def test_consent_is_asked_for(folder: Path) -> None:
    """Without consent the exit code stays 3, the option is named and nothing changes; with it a report lies there."""
    damaged("a.vhd", entries={3: 0x7FFFFFFF})
    result = run("check", "a.vhd", "--repair")
    assert result.exit_code == 3
    assert "not done: 1 blocks have impossible places" in result.stdout and "needs --accept-data-loss" in result.stdout
    told = document("check", "a.vhd", "--repair", "--accept-data-loss", "--report", "lost.json")
    lost = [{"offset_bytes": 3 * BLOCK, "size_bytes": BLOCK}]
    assert [one["lost"] for one in told["repair"]["fixes"] if one["code"] == "bat"] == [lost]
    assert told["status"] == "clean" and told["repair"]["report"] == "lost.json"
    assert names(folder) == ["a.vhd", "lost.json"]


@pytest.mark.parametrize("words", [["--undo", "x"], ["--accept-data-loss"], ["--writer-is-dead"], ["--dry-run"]])
def test_options_of_a_repair_alone(words: list[str]) -> None:
    """They mean nothing without --repair."""
    damaged("a.vhd")
    assert "goes with --repair" in failure("check", "a.vhd", *words, code=2)


def test_what_cannot_be_repaired() -> None:
    """Missing, in use, raw, taken backup, no backup: each its exit code."""
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
