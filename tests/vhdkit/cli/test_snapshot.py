# SPDX-License-Identifier: Apache-2.0
"""`vhdkit snapshot` and `vhdkit clone`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.cli.running import document, failure, good, make_chain, names, run


def test_snapshot_reports_what_it_made(folder: Path) -> None:
    """One leaf, with a given name or the next free one; the output says that the old leaf is read-only."""
    content = make_chain()
    assert "created leaf-1.avhd on leaf.avhd, which is read-only" in good("snapshot", "leaf.avhd")
    assert "would create mine.avhd" in good("snapshot", "leaf-1.avhd", "mine.avhd", "--dry-run")
    good("snapshot", "leaf-1.avhd", "mine.avhd")
    Path("flat.raw").write_bytes(content)
    assert "equal" in good("compare", "mine.avhd", "flat.raw")
    assert names(folder) == ["base.vhd", "flat.raw", "leaf-1.avhd", "leaf.avhd", "middle.avhd", "mine.avhd"]


def test_snapshot_of_a_set_as_json() -> None:
    """The document lists leaves and children in the order of the command line."""
    make_chain()
    good("create", "data=1.vhd", "--size", "1M")
    result = document("snapshot", "--many", "leaf.avhd=a b.avhd", "data=1.vhd=x=y.avhd")
    assert result == {
        "snapshots": [
            {"leaf": "leaf.avhd", "new": "a b.avhd", "open_with": []},
            {"leaf": "data=1.vhd", "new": "x=y.avhd", "open_with": []},
        ],
        "dry_run": False,
    }
    result = document("snapshot", "--many", "--dry-run", "a b.avhd", "x=y.avhd")
    assert [one["new"] for one in result["snapshots"]] == ["a b-1.avhd", "x=y-1.avhd"]


@pytest.mark.parametrize("word", ["=new.avhd", "leaf.avhd="])
def test_incomplete_pairs(word: str) -> None:
    """Half a pair is a usage error."""
    make_chain()
    assert "is not LEAF=NEW" in failure("snapshot", "--many", word, code=2)


def test_refusals(folder: Path) -> None:
    """Wrong file, folder, empty file, busy leaf, inner image, taken name: each has its exit code; no file is left."""
    make_chain()
    Path("empty.vhd").touch()
    Path("dir").mkdir()
    before = names(folder)
    failure("snapshot", "gone.vhd", code=1)
    failure("snapshot", "dir", code=2)
    failure("snapshot", "empty.vhd", code=2)
    assert "vhdkit clone middle.avhd NEW" in failure("snapshot", "middle.avhd", code=5)
    failure("snapshot", "leaf.avhd", "base.vhd", code=1)
    failure("snapshot", "leaf.avhd", "no/where.avhd", code=1)
    assert run("snapshot", "a", "b", "c").exit_code == 2
    with vhdkit.open_disk("leaf.avhd", writable=True):
        failure("snapshot", "leaf.avhd", code=5)
    shutil.move("base.vhd", "dir/base.vhd")
    failure("snapshot", "leaf.avhd", code=6)
    shutil.move("dir/base.vhd", "base.vhd")
    assert names(folder) == before


def test_a_child_of_a_raw_leaf_needs_an_option() -> None:
    """A snapshot of a raw disk names the option with which the child is opened."""
    Path("disk.raw").write_bytes(b"r" * 4096)
    result = document("snapshot", "disk.raw")
    assert result["snapshots"][0]["open_with"] == ["--allow-raw-parent"]
    assert (
        "note: opening disk-1.avhd requires --allow-raw-parent"
        in run("snapshot", "disk.avhd", "--allow-raw-parent").stderr
    )


def test_clones() -> None:
    """Several children of one base, which may be the leaf of other chains already."""
    make_chain()
    result = document("clone", "middle.avhd", "one.avhd", "two.avhd")
    assert [one["new"] for one in result["clones"]] == ["one.avhd", "two.avhd"]
    assert "would create three.avhd" in good("clone", "middle.avhd", "three.avhd", "--dry-run")
    assert "equal" in good("compare", "one.avhd", "two.avhd")
    failure("clone", "middle.avhd", "four.avhd", "two.avhd", code=1)
    failure("clone", "middle.avhd", "four.avhd", "four.avhd", code=2)
    assert not Path("four.avhd").exists()
