# SPDX-License-Identifier: Apache-2.0
"""`vhdkit pull`."""

from __future__ import annotations

from pathlib import Path

import vhdkit
from tests.vhdkit.cli.running import document, failure, good, make_chain, run


def content(path: str) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


def test_a_clone_becomes_independent() -> None:
    """The command says what it copies, then that nothing more is needed; repeating it changes nothing."""
    expected = make_chain()
    planned = good("pull", "leaf.avhd", "--independent", "--dry-run")
    assert "would copy" in planned and "would become independent" in planned
    assert len(vhdkit.chain_paths("leaf.avhd")) == 3
    done = good("pull", "leaf.avhd", "--independent")
    assert "from 2 layers into" in done and "is now independent of them" in done
    for name in ("middle.avhd", "base.vhd"):
        Path(name).unlink()
    assert content("leaf.avhd") == expected and "dynamic" in good("info", "leaf.avhd")
    assert "is independent already" in good("pull", "leaf.avhd", "--independent")
    assert good("pull", "leaf.avhd", "--independent", "--quiet") == ""


def test_layers_are_left_out() -> None:
    """With --to and --relink the image becomes a child of the layer below."""
    expected = make_chain()
    done = good("pull", "leaf.avhd", "--to", "middle.avhd", "--relink")
    assert "from 1 layer into" in done and "is now a child of" in done and "base.vhd" in done
    Path("middle.avhd").unlink()
    assert content("leaf.avhd") == expected


def test_json() -> None:
    """The document has the layers, the parent afterwards and the amounts."""
    make_chain()
    leaf, middle, base = vhdkit.chain_paths("leaf.avhd")
    planned = document("pull", "leaf.avhd", "--dry-run")
    assert (planned["path"], planned["pulled"], planned["parent"]) == (leaf, [middle, base], middle)
    done = document("pull", "leaf.avhd")
    assert "has everything that it shows of 2 layers already" in good("pull", "leaf.avhd")
    assert done["data_bytes"] == planned["data_bytes"] > 0 and not done["dry_run"]
    assert document("pull", "leaf.avhd", "--independent")["parent"] is None


def test_refusals() -> None:
    """An image without a parent, options that contradict each other."""
    make_chain()
    assert "has no parent" in failure("pull", "base.vhd", code=2)
    assert "not an ancestor" in failure("pull", "middle.avhd", "--to", "leaf.avhd", code=2)
    for words in (("--relink",), ("--independent", "--to", "base.vhd"), ("--independent", "--relink")):
        assert run("pull", "leaf.avhd", *words).exit_code == 2
    assert len(vhdkit.chain_paths("leaf.avhd")) == 3


def test_progress() -> None:
    """Progress is shown on request."""
    make_chain()
    assert run("pull", "leaf.avhd", "--progress").exit_code == 0
