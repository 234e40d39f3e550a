# SPDX-License-Identifier: Apache-2.0
"""`vhdkit merge`."""

from __future__ import annotations

import os
from pathlib import Path

import vhdkit
from tests.vhdkit.cli.running import document, failure, good, interrupt, make_chain, names, run, start
from tests.waiting import wait_until
from vhdkit.chain.records.intent import KIND
from vhdkit.folder import sidecar_path

HERE = Path()


def same(image: str, content: bytes) -> bool:
    """Whether the image's disk has this content."""
    Path("expected.raw").write_bytes(content)
    output = good("compare", image, "expected.raw")
    Path("expected.raw").unlink()
    return output.startswith("equal")


def test_a_leaf_into_its_parent() -> None:
    """The target is named, the leaf is removed, and the parent holds the disk."""
    content = make_chain()
    output = good("merge", "leaf.avhd")
    assert output.startswith(f"merged 1 layer into {os.path.realpath('middle.avhd')}: 8.0 MiB (8388608 bytes), ")
    assert names(HERE) == ["base.vhd", "middle.avhd"] and same("middle.avhd", content)
    assert run("check", "middle.avhd").exit_code == 0


def test_into_an_ancestor_as_json() -> None:
    """One document reports what was merged into what."""
    content = make_chain()
    output = document("merge", "leaf.avhd", "--into", "base.vhd")
    paths = [os.path.realpath(name) for name in ("leaf.avhd", "middle.avhd")]
    assert output["target"] == os.path.realpath("base.vhd") and output["merged"] == output["removed"] == paths
    assert output["relinked"] == [] and output["virtual_size_bytes"] == len(content) and output["dry_run"] is False
    assert output["data_bytes"] > 0 and output["block_count"] > 0 and output["bytes_per_second"] > 0
    assert names(HERE) == ["base.vhd"] and same("base.vhd", content)


def test_to_a_new_file_with_odd_names() -> None:
    """Spaces and letters of other alphabets work, and the chain stays."""
    content = make_chain()
    Path("mappe mit ä").mkdir()
    good("merge", "leaf.avhd", "--into", "base.vhd", "--to", "mappe mit ä/новый диск.vhd")
    assert same("mappe mit ä/новый диск.vhd", content) and same("leaf.avhd", content)
    failure("merge", "leaf.avhd", "--to", "mappe mit ä/новый диск.vhd", code=1)


def test_a_dry_run() -> None:
    """It reports what would be merged, and changes nothing."""
    make_chain()
    output = good("merge", "leaf.avhd", "--into", "base.vhd", "--dry-run").splitlines()
    assert output[0].startswith("would merge 2 layers into ")
    assert output[1:] == [f"would remove {os.path.realpath(name)}" for name in ("leaf.avhd", "middle.avhd")]
    assert names(HERE) == ["base.vhd", "leaf.avhd", "middle.avhd"]


def test_children_are_repointed_with_relink() -> None:
    """Without --relink the refusal names the child and the option; with it the child still reads the same."""
    content = make_chain()
    good("create", "child.avhd", "--parent", "leaf.avhd")
    output = failure("merge", "leaf.avhd", code=5)
    assert "child.avhd" in output and "--relink" in output
    assert "child.avhd is now a child of it" in good("merge", "leaf.avhd", "--relink")
    assert same("child.avhd", content) and "leaf.avhd" not in names(HERE)


def test_refusals() -> None:
    """Wrong files and options: each has its exit code and one line."""
    make_chain()
    good("create", "other.vhd", "--size", "8M")
    Path("empty.vhd").touch()
    assert "has no parent" in failure("merge", "base.vhd", code=2)
    assert "not an ancestor" in failure("merge", "leaf.avhd", "--into", "other.vhd", code=2)
    assert "empty" in failure("merge", "empty.vhd", code=2)
    assert "folder" in failure("merge", ".", code=2)
    failure("merge", "gone.avhd", code=1)
    failure("merge", "leaf.avhd", "--into", "gone.vhd", code=1)
    assert "no interrupted merge" in failure("merge", "leaf.avhd", "--resume", code=2)
    assert "leave out the other options" in failure("merge", "leaf.avhd", "--resume", "--dry-run", code=2)
    Path("base.vhd").rename("away.vhd")
    failure("merge", "leaf.avhd", code=6)


def test_ctrl_c_and_resume() -> None:
    """After Ctrl-C the leaf is unchanged, the message says how to continue, and `--resume` completes the merge."""
    good("create", "base.vhd", "--size", "1G")
    good("create", "leaf.avhd", "--parent", "base.vhd")
    with open("leaf.raw", "wb") as raw:
        raw.truncate(1 << 30)
    piece = os.urandom(1 << 20)
    with vhdkit.open_disk("leaf.avhd", writable=True) as disk, open("leaf.raw", "r+b") as raw:
        for offset in range(0, 300 << 20, 1 << 20):
            disk.write(offset, piece)
            raw.seek(offset)
            raw.write(piece)
    process = start("merge", "leaf.avhd")
    record = sidecar_path("base.vhd", KIND)
    wait_until(lambda: os.path.exists(record) or process.poll() is not None, "the merge begins", pause=0.001)
    code, _, output = interrupt(process)
    if code == 0:
        return  # it had finished before the signal
    assert code == 130 and "vhdkit merge leaf.avhd --resume" in output and output.endswith("vhdkit: interrupted\n")
    assert "equal" in good("compare", "leaf.avhd", "leaf.raw")
    good("merge", "leaf.avhd", "--resume")
    assert "equal" in good("compare", "base.vhd", "leaf.raw")
    assert names(HERE) == ["base.vhd", "leaf.raw"]
