# SPDX-License-Identifier: Apache-2.0
"""`vhdkit info`, `chain` and `dump`."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

import vhdkit
from tests.servers import serving
from tests.vhdkit.cli.running import MIB, document, failure, good, make_chain, run
from vhdkit.chain.verbs.describe import ImageInfo
from vhdkit.formats.vhd import layout


def spoil(path: str, offset: int, data: bytes = b"\xff\xff") -> None:
    """Overwrite a few bytes of a file."""
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_info_of_a_chain() -> None:
    """Kind, sizes, creator, geometry, space and parent are shown."""
    make_chain()
    text = good("info", "leaf.avhd")
    for fact in (
        "leaf.avhd: differencing VHD", "8.0 MiB (8388608 bytes)", "2 of 8 allocated, 1.0 MiB each",
        "unique id", "created", "cylinders", "middle.avhd",
    ):  # fmt: skip
        assert fact in text, text
    assert "locator W2ru" in good("info", "leaf.avhd", "--verbose")


def test_info_as_json() -> None:
    """The document has the documented keys, in bytes and plain values."""
    make_chain()
    info = document("info", "leaf.avhd")
    assert set(info) == {field.name for field in fields(ImageInfo)} - {"title"}  # words for human readers
    assert (info["kind"], info["virtual_size_bytes"], info["allocated_block_count"]) == ("differencing", 8 * MIB, 2)
    assert info["parent"]["path"].endswith("/middle.avhd") and info["parent"]["problem"] is None
    assert info["findings"] == [] and info["in_use"] is False


def test_help_of_info_lists_every_key() -> None:
    """No key of the document is missing from the help."""
    text = good("info", "--help")
    assert all(field.name in text for field in fields(ImageInfo) if field.name != "title")


def test_info_of_an_orphan() -> None:
    """A missing parent is shown as a problem; the command succeeds."""
    make_chain()
    Path("middle.avhd").unlink()
    text = good("info", "leaf.avhd")
    assert "NOT USABLE" in text and "was not found" in text
    assert "was not found" in document("info", "leaf.avhd")["parent"]["problem"]


def test_info_lists_findings() -> None:
    """Oddities of an image that still opens are listed on separate lines, but not with --quiet."""
    make_chain()
    size = Path("base.vhd").stat().st_size
    spoil("base.vhd", size - 500)
    assert "warning:" in good("info", "base.vhd")
    assert "warning:" not in good("info", "base.vhd", "--quiet")
    assert document("info", "base.vhd")["findings"][0]["severity"] == "warning"


def test_info_of_a_damaged_image() -> None:
    """A header that cannot be read is an error with its place: code 3."""
    make_chain()
    spoil("base.vhd", 512 + 100)
    assert "dynamic header at byte 0x200" in failure("info", "base.vhd", code=3)


def test_chain_tree() -> None:
    """All layers are listed leaf first, with what each owns; the sum is the disk."""
    make_chain()
    lines = good("chain", "leaf.avhd").splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert "leaf.avhd" in lines[1] and "middle.avhd" in lines[2] and "base.vhd" in lines[3]
    assert "id" in good("chain", "leaf.avhd", "--verbose")
    facts = document("chain", "leaf.avhd")
    owned = [layer["owned_bytes"] for layer in facts["layers"]]
    assert owned == [MIB + 512, MIB + 8192 - 512, 0]
    assert sum(owned) + facts["unowned_bytes"] == 8 * MIB
    assert facts["problem"] is None


def test_a_broken_chain_is_shown_as_far_as_it_goes() -> None:
    """If a parent is missing, the layers above it are shown: code 6."""
    make_chain()
    Path("base.vhd").unlink()
    result = run("chain", "leaf.avhd")
    assert result.exit_code == 6
    assert "middle.avhd" in result.stdout and "not usable" in result.stdout
    assert result.stderr.startswith("vhdkit: ") and "was not found" in result.stderr
    facts = document("chain", "leaf.avhd", code=6)
    assert [layer["owned_bytes"] for layer in facts["layers"]] == [None, None] and facts["unowned_bytes"] is None
    assert "was not found" in facts["problem"] and facts["damaged"] is False


def test_a_damaged_parent_is_shown_as_far_as_it_goes() -> None:
    """If a parent's header is damaged, the layers above it are shown: code 3."""
    make_chain()
    spoil("base.vhd", 512 + 100)
    result = run("chain", "leaf.avhd")
    assert result.exit_code == 3 and "middle.avhd" in result.stdout and "base.vhd: dynamic header" in result.stderr


def test_a_bad_block_table_breaks_the_chain() -> None:
    """The layers are shown without what they own, which is unknown: code 3."""
    make_chain()
    spoil("base.vhd", 4096, b"\0\0\0\1")
    result = run("chain", "leaf.avhd")
    assert result.exit_code == 3 and "BAT entry 0" in result.stderr and "base.vhd" in result.stdout


def test_a_loop_ends() -> None:
    """Each layer of a chain that is circular is shown once: code 3."""
    make_chain()
    base_id = layout.parse_footer(Path("base.vhd").read_bytes()[:512]).unique_id
    raw = bytearray(Path("leaf.avhd").read_bytes())
    footer = layout.build_footer(replace(layout.parse_footer(bytes(raw[:512])), unique_id=base_id))
    raw[:512] = raw[-512:] = footer
    Path("base.vhd").write_bytes(raw)
    result = run("chain", "middle.avhd")
    assert result.exit_code == 3 and "is circular" in result.stderr
    assert len(result.stdout.splitlines()) == 4


def test_dump() -> None:
    """Both footers, the header and the locators are printed field by field, at their offsets."""
    make_chain()
    text = good("dump", "leaf.avhd")
    for words in ("footer copy at byte 0x0: good", "dynamic header at byte 0x200: good", "0x200    8  cookie", "W2ru"):
        assert words in text, text
    structures = document("dump", "leaf.avhd")
    assert [one["structure"] for one in structures][:3] == ["footer", "footer copy", "dynamic header"]
    assert set(structures[0]) == {"structure", "offset_bytes", "state", "fields"}
    assert set(structures[0]["fields"][0]) == {"name", "offset_bytes", "size_bytes", "value"}
    assert structures[2]["fields"][0]["offset_bytes"] == 512


def test_dump_of_a_damaged_file() -> None:
    """A file that can no longer be opened is printed all the same, with what is wrong."""
    make_chain()
    spoil("base.vhd", 512 + 100)
    assert "dynamic header at byte 0x200: checksum wrong" in good("dump", "base.vhd")
    spoil("base.vhd", 512, b"xx")
    assert "cookie wrong" in good("dump", "base.vhd")
    for size in (511, 512, 700, 5000):
        Path("cut.vhd").write_bytes(Path("leaf.avhd").read_bytes()[:size])
        assert "footer" in good("dump", "cut.vhd")
        json.loads(good("dump", "cut.vhd", "--json"))
    Path("text.vhd").write_bytes(b"a" * 100)
    assert "absent" in good("dump", "text.vhd")


def test_dump_of_a_raw_disk() -> None:
    """There is no structure to print, and the message says so; --format vhd looks anyway."""
    Path("x.raw").write_bytes(b"a" * 4096)
    assert "no structures" in failure("dump", "x.raw", code=1)
    assert "absent" in good("dump", "x.raw", "--format", "vhd")


def test_info_names_the_folder_that_allowed_a_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own folder, an option or the environment, in text and JSON; an ignored entry is a warning."""
    for name in ("bases", "leaves"):
        Path(name).mkdir()
    good("create", "bases/base.vhd", "--size", "1M")
    good("create", "leaves/leaf.avhd", "--parent", "bases/base.vhd")
    assert document("info", "leaves/leaf.avhd")["parent"]["allowed_by"] is None
    output = good("info", "leaves/leaf.avhd", "--allow-parent-dir", "bases")
    assert f"{folder}/bases (--allow-parent-dir)" in output
    monkeypatch.setenv("VHDKIT_PARENT_DIRS", f"{folder}/bases:elsewhere")
    parent = document("info", "leaves/leaf.avhd")["parent"]
    assert (parent["allowed_folder"], parent["allowed_by"]) == (f"{folder}/bases", "VHDKIT_PARENT_DIRS")
    warned = run("check", "leaves/leaf.avhd")
    assert warned.exit_code == 0
    named = "VHDKIT_PARENT_DIRS names 'elsewhere', which is not an absolute path"
    assert warned.stderr == f"vhdkit: warning: {named}: ignored\n"
    good("create", "bases/near.avhd", "--parent", "bases/base.vhd")
    assert document("info", "bases/near.avhd")["parent"]["allowed_by"] == "the image's own folder"
    Path("list").write_text(json.dumps([{"name": "leaf", "path": "leaves/leaf.avhd"}]))
    with serving("--exports", "list") as server:
        assert server.ready["exports"][0]["path"] == "leaves/leaf.avhd"


def test_info_of_a_vhdx() -> None:
    """Sector sizes, the id of the disk, and the state of the log are shown, also where an unflushed log was left."""
    good("create", "base.vhdx", "--size", "8M", "--sector-size", "4096")
    good("create", "leaf.avhdx", "--parent", "base.vhdx")
    info, base = document("info", "leaf.avhdx"), document("info", "base.vhdx")
    assert (info["logical_sector_bytes"], info["physical_sector_bytes"], info["log_entries"]) == (4096, 4096, 0)
    assert info["virtual_disk_id"] == base["virtual_disk_id"] is not None and info["unique_id"] != base["unique_id"]
    text = good("info", "leaf.avhdx")
    for fact in ("differencing VHDX", "4096 bytes, physically 4096", info["virtual_disk_id"], "log           empty"):
        assert fact in text, text
    with vhdkit.open_disk("leaf.avhdx", writable=True) as disk:
        disk.write(0, b"x")
        disk.flush()
        Path("copied.avhdx").write_bytes(Path("leaf.avhdx").read_bytes())
    assert "entries not replayed" in good("info", "copied.avhdx")
    assert document("info", "copied.avhdx")["log_entries"] > 0
    make_chain()
    assert document("info", "leaf.avhd")["virtual_disk_id"] is None and "disk id" not in good("info", "leaf.avhd")
