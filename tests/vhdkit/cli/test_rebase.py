# SPDX-License-Identifier: Apache-2.0
"""`vhdkit rebase`."""

from __future__ import annotations

from pathlib import Path

from tests.vhdkit.cli.running import document, failure, good, make_chain, run


def move_middle() -> None:
    """Take the middle of the chain to another folder under another name."""
    Path("moved").mkdir()
    Path("middle.avhd").rename("moved/mid.avhd")
    good("rebase", "moved/mid.avhd", "--parent", "base.vhd", "--allow-parent-dir", ".")


def test_the_command_that_the_error_names_mends_it() -> None:
    """A moved parent: the error names `vhdkit rebase`, which makes the chain whole again."""
    content = make_chain()
    move_middle()
    assert "vhdkit rebase leaf.avhd --parent PARENT" in failure("map", "leaf.avhd", code=6)
    told = good("rebase", "leaf.avhd", "--parent", "moved/mid.avhd", "--allow-parent-dir", ".")
    assert "leaf.avhd now stands on moved/mid.avhd" in told
    assert run("check", "leaf.avhd").exit_code == 0
    Path("flat.raw").write_bytes(content)
    assert "equal" in good("compare", "leaf.avhd", "flat.raw")


def test_as_json() -> None:
    """The document names both files."""
    make_chain()
    assert document("rebase", "leaf.avhd", "--parent", "middle.avhd") == {"path": "leaf.avhd", "parent": "middle.avhd"}


def test_what_cannot_be_rebased() -> None:
    """Another disk, no parent at all, a missing file, no option: each its exit code, and nothing changes."""
    make_chain()
    before = Path("leaf.avhd").read_bytes()
    good("create", "other.vhd", "--size", "8M")
    assert "is not its parent" in failure("rebase", "leaf.avhd", "--parent", "other.vhd", code=6)
    assert "has no parent" in failure("rebase", "base.vhd", "--parent", "other.vhd", code=2)
    failure("rebase", "leaf.avhd", "--parent", "gone.vhd", code=1)
    assert run("rebase", "leaf.avhd").exit_code == 2
    assert Path("leaf.avhd").read_bytes() == before
