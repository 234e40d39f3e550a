# SPDX-License-Identifier: Apache-2.0
"""`vhdkit rebase`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.cli.running import document, failure, good, make_chain, run
from vhdkit.units import MIB


def move_middle() -> None:
    """Move the middle layer to another folder under another name."""
    Path("moved").mkdir()
    Path("middle.avhd").rename("moved/mid.avhd")
    good("rebase", "moved/mid.avhd", "--parent", "base.vhd", "--allow-parent-dir", ".")


def test_the_suggested_command_repairs_the_chain() -> None:
    """If a parent was moved, the error suggests `vhdkit rebase`, which makes the chain complete again."""
    content = make_chain()
    move_middle()
    assert "vhdkit rebase leaf.avhd --parent PARENT" in failure("map", "leaf.avhd", code=6)
    output = good("rebase", "leaf.avhd", "--parent", "moved/mid.avhd", "--allow-parent-dir", ".")
    assert "leaf.avhd is now a child of moved/mid.avhd" in output
    assert run("check", "leaf.avhd").exit_code == 0
    Path("flat.raw").write_bytes(content)
    assert "equal" in good("compare", "leaf.avhd", "flat.raw")


def test_json() -> None:
    """The document names both files."""
    make_chain()
    expected = {"path": "leaf.avhd", "parent": "middle.avhd", "dry_run": False}
    assert document("rebase", "leaf.avhd", "--parent", "middle.avhd") == expected
    assert document("rebase", "leaf.avhd", "--parent", "middle.avhd", "--dry-run") == expected | {"dry_run": True}


def test_refusals() -> None:
    """Another disk, no parent at all, a missing file, no option: each has its exit code, and nothing changes."""
    make_chain()
    before = Path("leaf.avhd").read_bytes()
    good("create", "other.vhd", "--size", "8M")
    assert "is not its parent" in failure("rebase", "leaf.avhd", "--parent", "other.vhd", code=6)
    assert "has no parent" in failure("rebase", "base.vhd", "--parent", "other.vhd", code=2)
    failure("rebase", "leaf.avhd", "--parent", "gone.vhd", code=1)
    assert run("rebase", "leaf.avhd").exit_code == 2
    assert Path("leaf.avhd").read_bytes() == before


def test_a_converted_parent() -> None:
    """A parent converted to another kind has a new id: it is refused with a hint, and accepted after a comparison."""
    content = make_chain()
    good("convert", "middle.avhd", "whole.vhd", "--to", "fixed")
    assert "--unsafe-new-id" in failure("rebase", "leaf.avhd", "--parent", "whole.vhd", code=6)
    output = run("rebase", "leaf.avhd", "--parent", "whole.vhd", "--unsafe-new-id", "--progress")
    assert output.exit_code == 0 and "leaf.avhd is now a child of whole.vhd" in output.stdout
    Path("middle.avhd").unlink()
    Path("base.vhd").unlink()
    Path("flat.raw").write_bytes(content)
    assert "equal" in good("compare", "leaf.avhd", "flat.raw")


def test_a_lost_parent_can_be_replaced() -> None:
    """The hints lead first to the comparison, and then to the id that accepts another image without one."""
    content = make_chain()
    good("convert", "middle.avhd", "whole.vhd", "--to", "fixed")
    found = vhdkit.image_id("whole.vhd")
    output = failure("rebase", "leaf.avhd", "--parent", "whole.vhd", "--accept-parent-id", str(found), code=2)
    assert "which exists" in output and "--unsafe-new-id instead of --accept-parent-id" in output
    Path("middle.avhd").unlink()
    assert "--unsafe-new-id" in failure("rebase", "leaf.avhd", "--parent", "whole.vhd", code=6)
    output = failure("rebase", "leaf.avhd", "--parent", "whole.vhd", "--unsafe-new-id", code=6)
    assert output.endswith(f" --accept-parent-id {found}")
    before = Path("leaf.avhd").read_bytes()
    other = "00010203-0405-0607-0809-0a0b0c0d0e0f"
    output = failure("rebase", "leaf.avhd", "--parent", "whole.vhd", "--accept-parent-id", other, code=6)
    assert f"expected id {other}, found id {found}" in output
    assert "is not an id" in failure("rebase", "leaf.avhd", "--parent", "whole.vhd", "--accept-parent-id", "x", code=2)
    assert Path("leaf.avhd").read_bytes() == before
    words = ("rebase", "leaf.avhd", "--parent", "whole.vhd", "--accept-parent-id", str(found))
    assert "would become" in good(*words, "--dry-run") and Path("leaf.avhd").read_bytes() == before
    assert f"is now a child of whole.vhd (id {found}, nothing was compared)" in good(*words)
    Path("flat.raw").write_bytes(content)
    assert "equal" in good("compare", "leaf.avhd", "flat.raw")


def test_a_parent_of_another_size_must_be_confirmed() -> None:
    """The id alone is refused, with the size that was found; only that size is then accepted."""
    make_chain()
    with vhdkit.open_disk("leaf.avhd") as disk:
        size = disk.size_bytes
    vhdkit.create_image("larger.vhd", size + MIB)
    found = str(vhdkit.image_id("larger.vhd"))
    Path("middle.avhd").unlink()
    before = Path("leaf.avhd").read_bytes()
    words = ("rebase", "leaf.avhd", "--parent", "larger.vhd", "--accept-parent-id", found)
    output = failure(*words, code=6)
    assert f"{size + MIB} bytes" in output and f"add --accept-parent-size {size + MIB}" in output
    assert "has another size" in failure(*words, "--accept-parent-size", str(size + 512), code=6)
    assert Path("leaf.avhd").read_bytes() == before
    without = ("rebase", "leaf.avhd", "--parent", "larger.vhd", "--accept-parent-size", "512")
    assert "requires --accept-parent-id" in failure(*without, code=2)
    good(*words, "--accept-parent-size", str(size + MIB))
    assert [Path(one).name for one in vhdkit.chain_paths("leaf.avhd")] == ["leaf.avhd", "larger.vhd"]


@pytest.mark.parametrize(("suffix", "other"), [("vhdx", "raw"), ("vhdx", "vhd"), ("vhd", "vhdx")])
def test_a_parent_of_another_format_is_refused_with_the_way_out(suffix: str, other: str) -> None:
    """A VHDX has a VHDX as its parent, and a VHD a VHD: the commands that the message names make the chain whole."""
    good("create", f"base.{suffix}", "--size", "8M")
    good("create", f"leaf.a{suffix}", "--parent", f"base.{suffix}")
    with vhdkit.open_disk(f"leaf.a{suffix}", writable=True) as disk:
        disk.write(MIB, b"data")
    good("convert", f"base.{suffix}", f"other.{other}")
    before = Path(f"leaf.a{suffix}").read_bytes()
    for words in ([], ["--unsafe-new-id"], ["--allow-raw-parent"]):
        line = failure("rebase", f"leaf.a{suffix}", "--parent", f"other.{other}", *words, code=6)
        assert f"and the parent of a {suffix.upper()} is a {suffix.upper()}" in line
    assert Path(f"leaf.a{suffix}").read_bytes() == before
    for command in line.split("; ", 1)[1].split(", and record the result"):
        good(*shlex.split(command.split("vhdkit ", 1)[1].split(" (")[0]))
    with vhdkit.open_disk(f"leaf.a{suffix}") as disk:
        assert disk.read(MIB, 4) == b"data" and disk.chain.layers[1].store.name.endswith(f"other.{suffix}")


def test_a_parent_that_became_another_format() -> None:
    """When the file under the parent's name is now of another format, opening the child says so."""
    good("create", "base.vhdx", "--size", "8M")
    good("create", "leaf.avhdx", "--parent", "base.vhdx")
    good("convert", "base.vhdx", "other.vhd")
    Path("other.vhd").replace("base.vhdx")
    line = failure("map", "leaf.avhdx", code=6)
    assert "base.vhdx is a VHD, and the parent of a VHDX is a VHDX" in line and "vhdkit convert" in line
    convert, record = line.split("convert it: vhdkit ", 1)[1].split(", and record the result: vhdkit ")
    good(*shlex.split(convert))
    good("compare", "base.vhdx", "base-converted.vhdx")
    line = failure(*shlex.split(record.split(" (")[0]), code=6)  # the parent that the child recorded is gone
    assert "there is nothing to compare with" in line
    good(*shlex.split(line.rsplit("vhdkit ", 1)[1]))
    good("check", "leaf.avhdx")


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_a_parent_whose_id_was_changed(suffix: str) -> None:
    """Opening the child shows the command that accepts the parent's new id; as it is printed, it works."""
    good("create", f"base.{suffix}", "--size", "8M")
    good("create", f"leaf.a{suffix}", "--parent", f"base.{suffix}")
    good("create", "other folder.tmp", "--size", "8M", "--format", "dynamic" if suffix == "vhd" else "vhdx")
    Path("other folder.tmp").replace(f"base.{suffix}")
    line = failure("map", f"leaf.a{suffix}", code=6)
    assert "another program changed its id" in line and "--allow-parent-dir FOLDER" in line
    good(*shlex.split(line.rsplit("vhdkit ", 1)[1]))
    good("check", f"leaf.a{suffix}")


def test_a_parent_with_other_sectors() -> None:
    """A child of 512-byte sectors does not open on a parent of 4096, and rebase accepts no such parent."""
    good("create", "base.vhdx", "--size", "8M")
    good("create", "other.vhdx", "--size", "8M", "--sector-size", "4096")
    good("create", "leaf.avhdx", "--parent", "base.vhdx")
    before = Path("leaf.avhdx").read_bytes()
    found = str(vhdkit.image_id("other.vhdx"))
    for words in (["--unsafe-new-id"], ["--accept-parent-id", found]):
        line = failure("rebase", "leaf.avhdx", "--parent", "other.vhdx", *words, code=6)
        assert "another sector size" in line and "expected sectors of 512 bytes, found sectors of 4096 bytes" in line
    assert Path("leaf.avhdx").read_bytes() == before


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
@pytest.mark.parametrize(("content", "code"), [(b"", 2), (bytes(MIB), 3), (b"QFI\xfb\0\0\0\3".ljust(MIB, b"\0"), 1)])
def test_a_parent_that_is_damaged_is_not_called_a_raw_disk(suffix: str, content: bytes, code: int) -> None:
    """To convert it would make a disk of what is left: the child says what to examine, and rebase refuses it too."""
    good("create", f"base.{suffix}", "--size", "8M")
    good("create", f"leaf.a{suffix}", "--parent", f"base.{suffix}")
    Path(f"base.{suffix}").write_bytes(content)
    line = failure("map", f"leaf.a{suffix}", code=6)
    assert "cannot be read" in line and f"vhdkit check {Path(f'base.{suffix}').resolve()}" in line
    assert "raw disk" not in line and "convert" not in line
    assert "NOT USABLE" in good("info", f"leaf.a{suffix}")
    line = failure("rebase", f"leaf.a{suffix}", "--parent", f"base.{suffix}", code=code)
    assert "convert it: vhdkit" not in line and "--allow-raw-parent" not in line


def test_an_empty_file_has_no_parent_to_change() -> None:
    """An empty or damaged image is called that by rebase, too."""
    good("create", "base.vhdx", "--size", "8M")
    Path("leaf.avhdx").touch()
    assert "is empty: not a disk image" in failure("rebase", "leaf.avhdx", "--parent", "base.vhdx", code=2)
