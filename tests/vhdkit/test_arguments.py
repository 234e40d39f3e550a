# SPDX-License-Identifier: Apache-2.0
"""INV-OPTIONS-CHECKED: what a caller may give to the public functions and options."""

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
    if inspect.isfunction(value)
}
WRONG: dict[str, list[object]] = {
    "bool": ["no", 0, 1, None, []],
    "int": ["5", 1.5, True, None],
    "int | None": ["5", 1.5, True],
    "DiskFormat": ["vhdx", "RAW", 5, None],
    "OpenOptions | None": [{}, {"lock": False}, "raw", (), False],
}


def _annotated() -> list[tuple[str, str, str]]:
    return [
        (name, parameter.name, str(parameter.annotation))
        for name, function in FUNCTIONS.items()
        for parameter in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_looks_at_its_arguments(name: str) -> None:
    """INV-OPTIONS-CHECKED: a new public function is `checked`, or fails here."""
    assert hasattr(FUNCTIONS[name], "__wrapped__")


@pytest.mark.parametrize(("function", "parameter", "annotation"), _annotated())
def test_wrong_values_are_refused_before_anything_happens(
    function: str, parameter: str, annotation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-OPTIONS-CHECKED: flags, numbers, choices, options and lists of every public function, whatever else is
    given; nothing is made."""
    monkeypatch.chdir(tmp_path)
    wrong = WRONG.get(annotation, ["abc", b"abc", Path("abc"), 7] if annotation.startswith("Sequence[") else [])
    others: dict[str, Any] = {
        one.name: 4 * MIB if str(one.annotation) == "int" else ["y.vhd"] if "Sequence" in str(one.annotation) else "x"
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
    """INV-OPTIONS-CHECKED: a single text would be its letters, "/" among them, and an empty one the working folder."""
    with pytest.raises(vhdkit.InvalidArgument, match=name):
        vhdkit.OpenOptions(**{name: wrong})  # type: ignore[arg-type]


def test_a_single_folder_is_told_how_to_be_written() -> None:
    """The hint is what works."""
    with pytest.raises(vhdkit.InvalidArgument) as failure:
        vhdkit.OpenOptions(parent_dirs="/srv/x")  # type: ignore[arg-type]
    assert failure.value.hint == "write parent_dirs=('/srv/x',)"
    assert vhdkit.OpenOptions(parent_dirs=[Path("/srv/x"), b"/y"]).parent_dirs == ("/srv/x", "/y")  # type: ignore[arg-type]


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
    """`format_name="raw"` is what `FormatName.RAW` is: a guest's raw disk with the header of a VHD stays raw."""
    options = vhdkit.OpenOptions(format_name="raw")  # type: ignore[arg-type]
    assert options.format_name is vhdkit.FormatName.RAW
    for wrong in ("vhdx", "RAW", 1, "", b"raw"):
        with pytest.raises(vhdkit.InvalidArgument, match="format_name"):
            vhdkit.OpenOptions(format_name=wrong)  # type: ignore[arg-type]
    image = tmp_path / "guest"
    vhdkit.create_image(image, 4 * MIB)
    raw = image.read_bytes()
    with vhdkit.open_disk(image, options=options) as disk:
        assert disk.size_bytes == len(raw) and disk.read(0, 512) == raw[:512]


def test_a_plain_text_names_a_disk_format_and_numbers_are_numbers(tmp_path: Path) -> None:
    """`"raw"` makes a raw disk, and numpy's whole numbers are whole numbers."""
    path = tmp_path / "d"
    vhdkit.create_image(path, np.int64(MIB), disk_format="raw")  # type: ignore[arg-type]
    assert path.stat().st_size == MIB and path.read_bytes().count(0) == MIB


def test_paths_may_be_bytes(tmp_path: Path) -> None:
    """A path as bytes works like any other, and errors show it."""
    path = bytes(tmp_path / "d.vhd")
    vhdkit.create_image(path, 4 * MIB)  # type: ignore[arg-type]
    with vhdkit.open_disk(path, writable=True) as disk:  # type: ignore[arg-type]
        disk.write(0, b"x")
    assert vhdkit.snapshot(path) == str(tmp_path / "d.avhd")  # type: ignore[arg-type]
    with pytest.raises(vhdkit.NotFound, match=r"none\.vhd"):
        vhdkit.open_disk(bytes(tmp_path / "none.vhd"))  # type: ignore[arg-type]


def test_a_set_of_snapshots_is_pairs() -> None:
    """A text of two letters is no pair of a leaf and its child."""
    for wrong in (["ab"], [("a",)], ["a.vhd"], [("a", "b", "c")], [b"ab"]):
        with pytest.raises(vhdkit.InvalidArgument, match="pairs"):
            vhdkit.snapshot_many(wrong)  # type: ignore[arg-type]
