# SPDX-License-Identifier: Apache-2.0
"""`vhdkit map`."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path

import pytest

import vhdkit
from tests.support import require_module, require_tool
from tests.vhdkit.cli.running import MIB, document, failure, good, make_chain, run


def test_json_is_exact() -> None:
    """The entries cover the disk in order, and their offsets point to the disk's bytes in the layers' files."""
    content = make_chain()
    entries = document("map", "leaf.avhd")
    position = 0
    for entry in entries:
        assert entry["start"] == position and entry["length"] % 512 == 0
        piece = content[position : position + entry["length"]]
        position += entry["length"]
        assert entry["data"] is not entry["zero"]
        if entry["data"]:
            with Path(entry["layer"]).open("rb") as file:
                file.seek(entry["offset"])
                assert file.read(entry["length"]) == piece
        else:
            assert not any(piece) and "offset" not in entry
        assert entry["present"] is ("layer" in entry)
    assert position == len(content)
    leaf = [(one["start"], one["length"]) for one in entries if one["depth"] == 0]
    assert leaf == [(MIB + 8192, 512), (6 * MIB, MIB)]


@pytest.mark.interop
def test_json_agrees_with_qemu(folder: Path) -> None:
    """On a raw disk with holes start, length, data and zero are as in qemu-img map."""
    qemu_img = require_tool("qemu-img")
    with Path("x.raw").open("wb") as file:
        file.truncate(16 * MIB)
        for offset in (0, 5 * MIB, 5 * MIB + 65536):
            file.seek(offset)
            file.write(b"x" * 65536)
    theirs = subprocess.run(
        [qemu_img, "map", "-f", "raw", "--output=json", "x.raw"], capture_output=True, check=True
    ).stdout
    keys = ("start", "length", "data", "zero")
    wanted = [tuple(one[key] for key in keys) for one in json.loads(theirs)]
    assert [tuple(one[key] for key in keys) for one in document("map", "x.raw")] == wanted


def test_a_picture_in_a_pipe() -> None:
    """Without a terminal the picture has no colours; digits show the owners, and lanes name the layers leaf first."""
    make_chain()
    text = good("map", "leaf.avhd")
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("leaf.avhd: 8.0 MiB disk")
    grid = "".join(line[12:] for line in lines[1:9])
    assert len(grid) == 512 and set(grid) == {"0", "1", "·"}
    assert grid[5 * 64 :] == "1" * 64 + "0" * 64 + "·" * 64
    names = [line.split()[1] for line in lines if line.split()[0] in "012" and "data" in line]
    assert names == ["leaf.avhd", "middle.avhd", "base.vhd"]


def test_extents() -> None:
    """--extents lists every run with its place."""
    make_chain()
    lines = good("map", "leaf.avhd", "--extents").splitlines()
    assert lines[0].split()[:3] == ["start", "length", "what"]
    assert len(lines) - 1 == len(document("map", "leaf.avhd"))
    assert "0 leaf.avhd" in "\n".join(lines)
    assert run("map", "leaf.avhd", "--extents", "--json").exit_code == 2


def test_pictures_in_files(folder: Path) -> None:
    """--svg and --png write complete files, and replace another only with --force."""
    require_module("PIL")
    make_chain()
    assert good("map", "leaf.avhd", "--svg", "m.svg", "--png", "m.png") == "wrote m.svg\nwrote m.png\n"
    assert Path("m.svg").read_bytes().startswith(b"<svg") and Path("m.png").read_bytes().startswith(b"\x89PNG")
    before = Path("m.svg").read_bytes()
    assert "already exists" in failure("map", "leaf.avhd", "--svg", "m.svg", code=1)
    good("map", "base.vhd", "--svg", "m.svg", "--force")
    assert Path("m.svg").read_bytes() != before
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]


def test_force_spares_the_chain() -> None:
    """A picture never replaces a layer of the disk, nor an image that others build on."""
    make_chain()
    before = Path("base.vhd").read_bytes()
    failure("map", "leaf.avhd", "--svg", "base.vhd", "--force", code=2)
    failure("map", "leaf.avhd", "--svg", "leaf.avhd", "--force", code=2)
    good("create", "other.vhd", "--size", "1M")
    failure("map", "other.vhd", "--svg", "base.vhd", "--force", code=5)
    assert Path("base.vhd").read_bytes() == before


def test_without_pillow(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """--png without Pillow says what to install, and leaves no file."""
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    make_chain()
    assert "vhdkit[picture]" in failure("map", "leaf.avhd", "--png", "m.png", code=1)
    assert not Path("m.png").exists()


@pytest.mark.parametrize("size", ["512", "1K", "33K", "5M", "2040G"])
def test_disks_of_every_size(size: str) -> None:
    """Every form works from one sector to the largest VHD."""
    good("create", "x.vhd", "--size", size)
    with vhdkit.open_disk("x.vhd", writable=True) as disk:
        disk.write(disk.size_bytes - 512, b"x" * 512)
    assert "0" in good("map", "x.vhd")
    assert document("map", "x.vhd")[-1]["data"]
    good("map", "x.vhd", "--svg", "m.svg")


def test_a_deep_chain() -> None:
    """Layers beyond the tenth are shown as letters."""
    good("create", "0.vhd", "--size", "1M")
    for depth in range(1, 13):
        good("create", f"{depth}.avhd", "--parent", f"{depth - 1}.vhd" if depth == 1 else f"{depth - 1}.avhd")
        with vhdkit.open_disk(f"{depth}.avhd", writable=True) as disk:
            disk.write(depth << 16, b"x" * 65536)
    text = good("map", "12.avhd")
    assert "bbbb" in text and "0000" in text
    assert "12.avhd" in good("chain", "12.avhd")


def test_memory_is_bounded() -> None:
    """A disk with very many runs is printed without collecting them in memory."""
    good("create", "x.vhd", "--size", "64M")
    with vhdkit.open_disk("x.vhd", writable=True) as disk:
        for offset in range(0, 64 * MIB, 2 * MIB):
            disk.write(offset, b"x" * 512)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run("map", "x.vhd", "--json")
    assert len(json.loads(result.stdout)) >= 32
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_file_that_claims_exabytes_is_mapped_at_once() -> None:
    """The number of slices to look at is bounded whatever the size of a sparse raw file."""
    with Path("huge.raw").open("wb") as file:
        file.truncate(1 << 43)
    assert "8.0 TiB" in good("map", "huge.raw")
