# SPDX-License-Identifier: Apache-2.0
"""INV-OPTIONS-CHECKED: what callers may pass to the public functions and options."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vhdkit
from vhdkit.units import MIB

FUNCTIONS = {
    name: value
    for name, value in ((name, getattr(vhdkit, name)) for name in vhdkit.__all__)
    # parse_disk_size only looks at its text, and says ValueError; words for makers are what a file's name holds; a
    # document is any value, and json_text says TypeError.
    if inspect.isfunction(value) and name not in ("parse_disk_size", "maker_word", "is_maker_dead", "json_text")
}
WRONG: dict[str, list[object]] = {
    "bool": ["no", 0, 1, None, []],
    "Size": ["5X", "", "ten", b"5", 1.5, np.float64(5), True, None],
    "Size | None": ["5X", "", "ten", b"5", 1.5, np.float64(5), True],
    "NewSize": ["5X", "", "ten", b"5", 1.5, np.float64(5), True, None],
    "NewSize | None": ["5X", "", "ten", b"5", 1.5, np.float64(5), True],
    "DiskFormat": ["vmdk", "RAW", 5, None],
    "DiskFormat | str": ["vmdk", "RAW", "", b"raw", 5, None],
    "str | None": [5, b"x", True, Path("x")],
    "AnyPath": [None, 5, "", b"", "a\0b", ["a.vhd"], True],
    "AnyPath | None": [5, "", b"", "a\0b", ["a.vhd"], True],
    "Several[AnyPath]": ["abc", b"abc", Path("abc"), 7, [None], [5], [""], ["a", "b\0"]],
    "OpenOptions | None": [{}, {"lock": False}, "raw", (), False],
}


def _annotated() -> list[tuple[str, str, str]]:
    return [
        (name, parameter.name, str(parameter.annotation))
        for name, function in FUNCTIONS.items()
        for parameter in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_checks_its_arguments(name: str) -> None:
    """INV-OPTIONS-CHECKED: a new public function is `checked`, or this test fails."""
    assert hasattr(FUNCTIONS[name], "__wrapped__")


@pytest.mark.parametrize(("function", "parameter", "annotation"), _annotated())
def test_wrong_values_are_refused_before_anything_happens(
    function: str, parameter: str, annotation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-OPTIONS-CHECKED: flags, numbers, choices, options and lists of every public function, whatever else is
    given; nothing is made."""
    monkeypatch.chdir(tmp_path)
    wrong = WRONG.get(annotation, ["abc", b"abc", Path("abc"), 7] if annotation.startswith("Several[") else [])
    others: dict[str, Any] = {
        one.name: 4 * MIB
        if str(one.annotation) == "NewSize"
        else ["y.vhd"]
        if "Several" in str(one.annotation)
        else "x"
        for one in inspect.signature(FUNCTIONS[function]).parameters.values()
        if one.default is one.empty
    }
    if "disk_format" in others:
        others["disk_format"] = "raw"
    for value in wrong:
        with pytest.raises(vhdkit.InvalidArgument, match=parameter):
            FUNCTIONS[function](**{**others, parameter: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["/srv/x", b"/srv/x", Path("/srv/x"), ("",), ["a\0b"], (5,), 5, None])
@pytest.mark.parametrize("name", ["parent_dirs", "known_images"])
def test_folders_are_several_paths(name: str, wrong: object) -> None:
    """INV-OPTIONS-CHECKED: a text would be its letters, "/" among them, an empty one the working folder."""
    with pytest.raises(vhdkit.InvalidArgument, match=name):
        vhdkit.OpenOptions(**{name: wrong})  # type: ignore[arg-type]


def test_the_hint_for_a_single_folder() -> None:
    """The hint shows a form that works."""
    with pytest.raises(vhdkit.InvalidArgument) as failure:
        vhdkit.OpenOptions(parent_dirs="/srv/x")  # type: ignore[arg-type]
    assert failure.value.hint == "write parent_dirs=('/srv/x',)"
    assert vhdkit.OpenOptions(parent_dirs=[Path("/srv/x"), b"/y"]).parent_dirs == ("/srv/x", "/y")


def test_the_folder_of_notes_is_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-OPTIONS-CHECKED: it stays the same if the process changes its working folder, and several are refused."""
    monkeypatch.chdir(tmp_path)
    assert vhdkit.OpenOptions(notes_folder=Path("notes")).notes_folder == str(tmp_path / "notes")
    wrong: tuple[Any, ...] = ("", "a\0b", 5, ["notes"])
    for value in wrong:
        with pytest.raises(vhdkit.InvalidArgument, match="notes_folder"):
            vhdkit.OpenOptions(notes_folder=value)


@pytest.mark.parametrize("name", ["allow_raw_parent", "ignore_bitmaps", "lock"])
def test_flags_are_true_or_false(name: str) -> None:
    """INV-OPTIONS-CHECKED: "no" is not taken for yes."""
    for wrong in WRONG["bool"]:
        with pytest.raises(vhdkit.InvalidArgument, match=name):
            vhdkit.OpenOptions(**{name: wrong})  # type: ignore[arg-type]


def test_unknown_options_are_refused() -> None:
    """A misspelt option is an error, as everywhere in Python."""
    with pytest.raises(TypeError, match="parent_dir"):
        vhdkit.OpenOptions(parent_dir=("x",))  # type: ignore[call-arg]


def test_a_plain_text_names_a_format(tmp_path: Path) -> None:
    """`format_name="raw"` equals `FormatName.RAW`: a guest's raw disk with the header of a VHD stays raw."""
    options = vhdkit.OpenOptions(format_name="raw")
    assert options.format_name is vhdkit.FormatName.RAW
    for wrong in ("vmdk", "RAW", 1, "", b"raw"):
        with pytest.raises(vhdkit.InvalidArgument, match="format_name"):
            vhdkit.OpenOptions(format_name=wrong)  # type: ignore[arg-type]
    image = tmp_path / "guest"
    vhdkit.create_image(image, 4 * MIB)
    raw = image.read_bytes()
    with vhdkit.open_disk(image, options=options) as disk:
        assert disk.size_bytes == len(raw) and disk.read(0, 512) == raw[:512]


def test_a_plain_text_names_a_disk_format_and_numbers_are_numbers(tmp_path: Path) -> None:
    """`"raw"` makes a raw disk, and numpy's integers count as integers."""
    path = tmp_path / "d"
    vhdkit.create_image(path, np.int64(MIB), disk_format="raw")
    assert path.stat().st_size == MIB and path.read_bytes().count(0) == MIB


def test_paths_may_be_bytes(tmp_path: Path) -> None:
    """A path given as bytes works like any other, and errors show it."""
    path = bytes(tmp_path / "d.vhd")
    vhdkit.create_image(path, 4 * MIB)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, b"x")
    assert vhdkit.snapshot(path) == str(tmp_path / "d.avhd")
    with pytest.raises(vhdkit.NotFound, match=r"none\.vhd"):
        vhdkit.open_disk(bytes(tmp_path / "none.vhd"))


def test_sizes_are_numbers_or_text(tmp_path: Path) -> None:
    """ "10M", numpy's numbers and plain ones are the same size to every function that takes one."""
    ways: list[tuple[str | np.int64 | int, ...]] = [(10 * MIB, 512 << 10, 12 * MIB), ("10M", "512K", "12 MiB")]
    ways += [(np.int64(10 * MIB), np.int64(512 << 10), np.int64(12 * MIB))]
    for number, (size, block, larger) in enumerate(ways):
        path, child = tmp_path / f"{number}.vhd", tmp_path / f"{number}.avhd"
        assert vhdkit.create_image(path, size, block_size_bytes=block) == 10 * MIB
        assert vhdkit.create_child(child, path, size_bytes=larger, block_size_bytes=block) == 12 * MIB
        assert vhdkit.convert(path, tmp_path / f"{number}.fixed", "dynamic", block_size_bytes=block) == 10 * MIB
        child.unlink()
        assert vhdkit.resize(path, larger).virtual_size_after_bytes == 12 * MIB
    assert vhdkit.create_image(tmp_path / "odd.vhd", "0.1G") == 107374592  # whole sectors, as on the command line
    assert len({(tmp_path / f"{number}.vhd").stat().st_size for number in range(3)}) == 1


def test_a_disk_accepts_sizes_in_every_form(tmp_path: Path) -> None:
    """INV-OPTIONS-CHECKED: the methods of a disk accept offsets and sizes in every form, and refuse wrong ones."""
    vhdkit.create_image(tmp_path / "d.vhd", "4M")
    with vhdkit.open_disk(tmp_path / "d.vhd", writable=True) as disk:
        ways: list[tuple[str | np.int64 | int, ...]] = [(MIB, 1024), ("1M", "1K"), (np.int64(MIB), np.int64(1024))]
        for offset, size in ways:
            disk.write(offset, b"x" * 2048, fua=True)
            assert disk.read(offset, size) == b"x" * 1024
            buffer = bytearray(1024)
            disk.read_into(offset, buffer)
            assert buffer == b"x" * 1024
            disk.write_zeroes(offset, size)
            disk.trim(offset, size)
            assert disk.read(offset, "2K") == bytes(1024) + b"x" * 1024
            (first, *_) = disk.extents(offset, size)
            assert type(first.sector_index) is int and type(first.sector_count) is int
        disk.read(np.uint8(250), 10)  # whose own sum would be 4
        with pytest.raises(vhdkit.OutOfRange):
            disk.read(np.int32(2**31 - 512), np.int32(1024))  # whose own sum would be negative
        for wrong in WRONG["Size"]:
            for method in (disk.read, disk.write_zeroes, disk.trim, disk.extents):
                with pytest.raises(vhdkit.InvalidArgument, match="offset_bytes"):
                    method(wrong, 512)  # type: ignore[arg-type]
                if wrong is not None:
                    with pytest.raises(vhdkit.InvalidArgument, match="size_bytes"):
                        method(0, wrong)  # type: ignore[arg-type]
            with pytest.raises(vhdkit.InvalidArgument, match="offset_bytes"):
                disk.write(wrong, b"x")  # type: ignore[arg-type]
            with pytest.raises(vhdkit.InvalidArgument, match="offset_bytes"):
                disk.read_into(wrong, bytearray(1))  # type: ignore[arg-type]
        for not_a_flag in ("no", 1, None):
            with pytest.raises(vhdkit.InvalidArgument, match="fua"):
                disk.write(0, b"x", fua=not_a_flag)  # type: ignore[arg-type]
        assert disk.read(0, 512) == bytes(512)


def test_a_set_of_snapshots_is_pairs() -> None:
    """A text of two letters is not a pair of a leaf and its child."""
    for wrong in (["ab"], [("a",)], ["a.vhd"], [("a", "b", "c")], [b"ab"]):
        with pytest.raises(vhdkit.InvalidArgument, match="each pair"):
            vhdkit.snapshot_many(wrong)  # type: ignore[arg-type]
