# SPDX-License-Identifier: Apache-2.0
"""`vhdkit gc`."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.vhdkit.cli.running import document, failure, good, make_chain, names, run


def test_gc_lists_first_and_removes_with_delete(folder: Path) -> None:
    """Without --delete it prints the list and how to go on; with it the files are removed and the leaf opens."""
    content = make_chain()
    good("clone", "base.vhd", "one.avhd", "two.avhd")
    output = good("gc", ".", "--keep", "leaf.avhd", "two.avhd")
    assert "one.avhd" in output and "two.avhd" not in output and "would be removed with --delete" in output
    output = good("gc", ".", "--keep", "leaf.avhd", "--keep", "two.avhd", "--delete")
    assert "removed 1 file" in output
    assert names(folder) == ["base.vhd", "leaf.avhd", "middle.avhd", "two.avhd"]
    assert "nothing to remove" in good("gc", ".", "--keep", "leaf.avhd", "two.avhd")
    Path("flat.raw").write_bytes(content)
    assert "equal" in good("compare", "leaf.avhd", "flat.raw")


def test_gc_as_json() -> None:
    """Every file is listed with its size and the reason why it is kept."""
    make_chain()
    output = document("gc", ".", "--keep", "base.vhd")
    assert [Path(one["path"]).name for one in output["items"]] == ["leaf.avhd", "middle.avhd"]
    assert all(one["kept"] is None and not one["removed"] and one["size_bytes"] > 0 for one in output["items"])


def test_gc_refuses_to_guess(folder: Path) -> None:
    """Without a leaf, with a leaf whose chain is broken, or without a folder, nothing is removed."""
    make_chain()
    assert run("gc", ".").exit_code == 2
    shutil.move("base.vhd", folder.parent / "base.bin")
    failure("gc", ".", "--keep", "leaf.avhd", "--delete", code=6)
    failure("gc", "nowhere", "--keep", "leaf.avhd", code=1)
    shutil.move(folder.parent / "base.bin", "base.vhd")
    assert names(folder) == ["base.vhd", "leaf.avhd", "middle.avhd"]
