# SPDX-License-Identifier: Apache-2.0
"""`vhdkit create`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.cli.running import MIB, document, failure, good, make_chain, run


@pytest.mark.parametrize(
    ("more", "kind", "size_bytes"),
    [
        ([], "dynamic", 10 * MIB),
        (["--block-size", "512K"], "dynamic", 10 * MIB),
        (["--format", "fixed"], "fixed", 10 * MIB),
        (["--format", "fixed", "--preallocate"], "fixed", 10 * MIB),
        (["--format", "raw"], "raw", 10 * MIB),
        (["--azure"], "fixed", 10 * MIB),
    ],
)
def test_every_kind(more: list[str], kind: str, size_bytes: int) -> None:
    """Each image has the kind and size that info reports, and reads as zeros."""
    text = good("create", "x.img", "--size", "10M", *more)
    assert text.startswith(f"created x.img: {kind} ") and text.count("\n") == 1
    info = document("info", "x.img")
    assert (info["kind"], info["virtual_size_bytes"]) == (kind, size_bytes)
    if more == ["--block-size", "512K"]:
        assert info["block_size_bytes"] == 512 << 10
    if "--preallocate" in more:
        assert info["allocated_bytes"] >= 10 * MIB
    with vhdkit.open_disk("x.img") as disk:
        assert not any(disk.read(0, disk.size_bytes))


def test_json() -> None:
    """The document has exactly the documented keys."""
    made = document("create", "x.vhd", "--size", "1M")
    assert made == {
        "path": "x.vhd", "format": "dynamic", "virtual_size_bytes": MIB, "parent": None, "open_with": [],
    }  # fmt: skip
    child = document("create", "c.avhd", "--parent", "x.vhd", "--size", "2M")
    assert child["parent"] == "x.vhd" and child["virtual_size_bytes"] == 2 * MIB


def test_azure_reports_its_rounding() -> None:
    """A size that is not a whole number of MiB is rounded up, and a note says so."""
    result = run("create", "x.vhd", "--size", "1000000", "--azure")
    assert result.exit_code == 0 and "rounded 1000000 bytes up to 1048576 bytes" in result.stderr
    assert run("create", "y.vhd", "--size", "1M", "--azure").stderr == ""
    assert "Azure accepts only fixed" in failure(
        "create", "z.vhd", "--size", "1M", "--azure", "--format", "raw", code=2
    )


def test_a_child_elsewhere_names_the_options_to_open_it() -> None:
    """If the chain is outside the child's folder, the options needed to open it are printed, and they work."""
    Path("far").mkdir()
    good("create", "base.vhd", "--size", "1M")
    assert run("create", "near.avhd", "--parent", "base.vhd").stderr == ""
    result = run("create", "far/leaf.avhd", "--parent", "near.avhd")
    assert f"opening it requires --allow-parent-dir {os.getcwd()}" in result.stderr
    options = document("create", "far/other.avhd", "--parent", "near.avhd")["open_with"]
    failure("map", "far/other.avhd", code=6)
    good("map", "far/other.avhd", *options)


def test_a_child_of_a_raw_disk_names_the_option_to_open_it() -> None:
    """A raw parent has no id, so the user must allow it when opening the child."""
    good("create", "base.raw", "--size", "1M", "--format", "raw")
    assert document("create", "c.avhd", "--parent", "base.raw")["open_with"] == ["--allow-raw-parent"]


@pytest.mark.parametrize(
    "more",
    [["--size", "ten"], ["--size", "0"], ["--size", "2041G"], ["--size", "1M", "--block-size", "3M"],
     ["--size", "1M", "--preallocate"], ["--size", "1M", "--format", "fixed", "--block-size", "1M"],
     ["--parent", "base.vhd", "--azure"], ["--parent", "base.vhd", "--format", "raw"],
     ["--parent", "base.vhd", "--size", "512K"]],
)  # fmt: skip
def test_invalid_requests(more: list[str], folder: Path) -> None:
    """Invalid requests end with code 2, and no file is left."""
    good("create", "base.vhd", "--size", "1M")
    failure("create", "x.vhd", *more, code=2)
    assert [path.name for path in folder.iterdir()] == ["base.vhd"]


def test_nothing_is_overwritten_without_force() -> None:
    """An existing file stays; with --force it is replaced."""
    Path("x.vhd").write_text("precious")
    assert "already exists" in failure("create", "x.vhd", "--size", "1M", code=1)
    assert Path("x.vhd").read_text() == "precious"
    good("create", "x.vhd", "--size", "1M", "--force")
    assert document("info", "x.vhd")["kind"] == "dynamic"


def test_force_does_not_destroy_a_chain() -> None:
    """Even with --force, a parent, an image in use and the new child's own chain are not replaced."""
    make_chain()
    before = Path("base.vhd").read_bytes()
    failure("create", "base.vhd", "--size", "1M", "--force", code=5)
    failure("create", "base.vhd", "--parent", "leaf.avhd", "--force", code=2)
    with vhdkit.open_disk("leaf.avhd"):
        failure("create", "leaf.avhd", "--size", "1M", "--force", code=5)
    assert Path("base.vhd").read_bytes() == before


def test_invalid_destinations() -> None:
    """A folder, a device, and a file in a folder that does not exist are refused."""
    assert "is a folder" in failure("create", ".", "--size", "1M", code=2)
    assert "is not a regular file" in failure("create", "/dev/null", "--size", "1M", "--force", code=2)
    assert "folder" in failure("create", "gone/x.vhd", "--size", "1M", code=1)
    assert "No such file" in failure("create", "x.vhd", "--parent", "gone.vhd", code=1)


def test_quiet() -> None:
    """--quiet prints nothing."""
    result = run("create", "x.vhd", "--size", "1000000", "--azure", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_a_raw_disk_named_like_a_vhd() -> None:
    """It is made, and a note names the option that opening it needs."""
    assert "--format raw" in run("create", "x.vhd", "--size", "1M", "--format", "raw").stderr
    good("map", "x.vhd", "--format", "raw")


@pytest.mark.parametrize(("text", "size_bytes"), [("0.1G", 107374592), ("1000", 1024), ("1.8T", 1979120930304)])
def test_a_size_is_rounded_up_to_whole_sectors(text: str, size_bytes: int) -> None:
    """Any size works; the rounding is reported, also for a child, but not with --quiet."""
    result = run("create", "x.vhd", "--size", text)
    assert (
        result.exit_code == 0
        and f"{text} is not a whole number of 512-byte sectors: rounded up to {size_bytes}" in (result.stderr)
    )
    assert document("info", "x.vhd")["virtual_size_bytes"] == size_bytes
    assert "rounded up" in run("create", "y.avhd", "--parent", "x.vhd", "--size", "1.9T").stderr
    assert run("create", "z.vhd", "--size", text, "--quiet").output == ""
    assert run("create", "whole.vhd", "--size", "1.5G").stderr == ""


@pytest.mark.parametrize("name", ["x.vdi", "x.raw", "X.QCOW2", "x.vmdk", "x.vhd.gz"])
def test_a_vhd_named_like_another_format_needs_format(name: str, folder: Path) -> None:
    """Without --format no file is made and the message says what to do; with it a note names what the file is."""
    said = failure("create", name, "--size", "1M", code=2)
    assert "--format dynamic" in said and not list(folder.iterdir())
    assert ("--format raw" in said) == (name == "x.raw")
    result = run("create", name, "--size", "1M", "--format", "dynamic")
    assert result.exit_code == 0 and f"{name} is a VHD under the name of a" in result.stderr
    assert document("info", name)["kind"] == "dynamic"
    assert "under the name of a VMDK" in run("convert", name, "z.vmdk", "--to", "fixed").stderr
    assert "under the name of a QCOW2" in run("clone", name, "c.qcow2").stderr


def test_a_raw_disk_named_like_another_format_needs_no_option() -> None:
    """A raw disk under such a name is made, with a note."""
    assert run("create", "x.raw", "--size", "1M", "--format", "raw").stderr == ""
    assert "raw disk under the name of a QCOW2 image" in (
        run("create", "x.qcow2", "--size", "1M", "--format", "raw").stderr
    )


CHILDREN = [
    ("base.raw", "raw", "leaf.avhdx"),
    ("base.vhd", "dynamic", "leaf.avhdx"),
    ("base.vhdx", "vhdx", "leaf.avhd"),
]


@pytest.mark.parametrize(("base", "disk_format", "leaf"), CHILDREN)
def test_a_child_has_its_parents_format(base: str, disk_format: str, leaf: str, folder: Path) -> None:
    """A name of the other format is refused before a file is made; the printed command makes a parent that fits."""
    good("create", base, "--size", "8M", "--format", disk_format)
    for words in (["create", leaf, "--parent", base], ["clone", base, "ok", leaf], ["snapshot", base, leaf]):
        said = failure(*words, "--allow-raw-parent", code=2)
        assert said.startswith(f"{leaf}: has the name of a VHD") and f"its parent {base} is a " in said
    assert [one.name for one in folder.iterdir()] == [base]
    command = said.split("vhdkit ", 1)[1].split(", and make")[0]
    good(*shlex.split(command))
    good("create", leaf, "--parent", shlex.split(command)[-1])
    assert document("info", leaf)["kind"] == "differencing"


def test_a_chain_under_wrong_names_can_go_on() -> None:
    """Where the parent has the name of another format, its child may have such a name too; a note says what it is."""
    vhdkit.create_image("base.vhd", 8 << 20, disk_format="vhdx")
    result = run("create", "leaf.avhd", "--parent", "base.vhd")
    assert result.exit_code == 0 and "is a VHDX under the name of a VHD image" in result.stderr
    Path("base").touch()
    assert failure("create", "x.avhdx", "--parent", "base", code=2).startswith("base: is empty")


def test_help_warns_about_other_block_sizes() -> None:
    """The help of --block-size names the program that reads such an image wrongly."""
    for verb in ("create", "convert"):
        assert "vhd-util misreads VHDs of any size other than 2M" in " ".join(good(verb, "--help").split())


def test_force_is_suggested_only_where_it_helps() -> None:
    """ "already exists" suggests --force only for a file that --force replaces, and only in verbs that have it."""
    make_chain()
    good("create", "free.vhd", "--size", "1M")
    assert "or --force" in failure("create", "free.vhd", "--size", "1M", code=1)
    assert "or --force" in failure("convert", "leaf.avhd", "free.vhd", "--to", "dynamic", code=1)
    for words in (("create", "base.vhd", "--size", "1M"), ("convert", "free.vhd", "base.vhd", "--to", "fixed"),
                  ("create", "middle.avhd", "--parent", "base.vhd")):  # fmt: skip
        message = failure(*words, code=1)
        assert "--force" not in message and "cannot be replaced: it is the parent of" in message
    assert "part of the source chain" in failure("convert", "leaf.avhd", "leaf.avhd", "--to", "fixed", code=1)
    with vhdkit.open_disk("free.vhd", writable=True):
        message = failure("create", "free.vhd", "--size", "1M", code=1)
        assert "--force" not in message and "another program is" in message
    for taken in (("snapshot", "leaf.avhd", "free.vhd"), ("clone", "base.vhd", "free.vhd"),
                  ("merge", "leaf.avhd", "--to", "free.vhd")):  # fmt: skip
        assert "--force" not in run(*taken).stderr and "already exists" in run(*taken).stderr, taken


@pytest.mark.parametrize(("base", "named"), [("base.vhd", "Hyper-V"), ("base.vhdx", "7-Zip, libvhdi and dissect")])
def test_a_child_that_is_larger_than_its_parent(base: str, named: str) -> None:
    """It is made, with a note that says which programs cannot use it."""
    good("create", base, "--size", "4M")
    child = base.replace("base.", "child.a")
    assert run("create", child, "--parent", base).stderr == ""
    result = run("create", "larger", "--parent", base, "--size", "5M")
    assert result.exit_code == 0 and result.stderr.startswith("vhdkit: note: ") and named in result.stderr
    assert result.stderr.count("\n") == 1
    assert document("info", "larger")["virtual_size_bytes"] == 5 * MIB


def test_a_disk_that_is_too_large_for_a_vhd() -> None:
    """The message names the format that holds it, before a file is made."""
    assert failure("create", "x.vhd", "--size", "3T", code=2).endswith("; a VHDX holds up to 64 TiB")
    good("create", "x.vhdx", "--size", "3T")
    assert failure("convert", "x.vhdx", "x.vhd", code=2).endswith("; a VHDX holds up to 64 TiB")
    assert not Path("x.vhd").exists()
