# SPDX-License-Identifier: Apache-2.0
"""How a medium is identified, and which medium a guest that continues may find in its drive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vmm.discs import make_iso
from vmm.model.errors import NotFound, Refused
from vmm.model.spec import MachineSpec, make_spec
from vmm.store.media import changed_drives, look_at_files, look_at_medium, media_of, refuse_other_media

MIB = 1 << 20


def with_medium(path: Path | None, **settings: object) -> MachineSpec:
    """A machine with one drive."""
    drive = {"id": "cd", "kind": "iso", "path": None if path is None else str(path)}
    return make_spec(name="web", disks=[drive], **settings)


def test_a_medium_is_identified_by_its_content(tmp_path: Path) -> None:
    """An image that was moved or copied is the same medium; other content under the same name is not."""
    image = make_iso(tmp_path / "one.iso", "first")
    known = look_at_medium(str(image))
    image.rename(tmp_path / "moved.iso")
    assert look_at_medium(str(tmp_path / "moved.iso")) == known
    assert look_at_medium(str(make_iso(image, "second"))) != known
    assert look_at_medium(str(make_iso(image, "first"))) == known


@pytest.mark.parametrize("where", [0, MIB - 1, 3 * MIB, 64 * MIB - 1])
def test_large_media_are_identified_by_samples(tmp_path: Path, where: int) -> None:
    """Of a large image, the beginning, the end and samples between them count, and its size."""
    image = tmp_path / "large.iso"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    known = look_at_medium(str(image))
    with image.open("r+b") as file:
        for at in range(where, min(where + MIB, 64 * MIB), 4096) or [where]:
            file.seek(at)
            file.write(b"x")
    assert look_at_medium(str(image)) != known
    with image.open("wb") as file:
        file.truncate(64 * MIB + 2048)
    assert look_at_medium(str(image)) != known


def test_which_medium_a_saved_guest_may_find(tmp_path: Path) -> None:
    """The one that it had, wherever it lies now; another one or none only if the user put it there."""
    image = make_iso(tmp_path / "one.iso", "first")
    then = media_of(with_medium(image))
    image.rename(tmp_path / "moved.iso")
    moved = with_medium(tmp_path / "moved.iso")
    refuse_other_media(moved, then, {})
    assert changed_drives(moved, then, {}, media_of(moved)) == []

    make_iso(tmp_path / "moved.iso", "second")
    with pytest.raises(Refused, match="the guest had another medium in cd") as refused:
        refuse_other_media(moved, then, {})
    assert "vmm disk change web cd FILE" in str(refused.value) and "--discard-saved" not in str(refused.value)
    refuse_other_media(moved, then, media_of(moved))
    assert changed_drives(moved, then, media_of(moved), media_of(moved)) == ["cd"]

    empty = with_medium(None)
    with pytest.raises(Refused):
        refuse_other_media(empty, then, {})
    refuse_other_media(empty, then, {"cd": None})
    assert changed_drives(empty, then, {"cd": None}, {"cd": None}) == ["cd"]


def test_unrecorded_media_are_not_compared(tmp_path: Path) -> None:
    """Memory saved by 0.1.0 has no record of media: the present one is accepted, and a change by the user is
    reported."""
    spec = with_medium(make_iso(tmp_path / "one.iso", "first"))
    refuse_other_media(spec, None, {})
    assert changed_drives(spec, None, {}, media_of(spec)) == []
    assert changed_drives(spec, None, media_of(spec), media_of(spec)) == ["cd"]


@pytest.mark.parametrize(
    ("missing", "way"),
    [("one.iso", "vmm disk change web cd FILE"), ("kernel", "--kernel ''"), ("initrd", "--initrd ''")],
)
def test_errors_for_missing_media_say_what_to_do(tmp_path: Path, missing: str, way: str) -> None:
    """For a lost medium, kernel or initrd the error has the command that replaces it or goes without; the memory
    stays."""
    for name in ("one.iso", "kernel", "initrd"):
        make_iso(tmp_path / name, name)
    spec = with_medium(tmp_path / "one.iso", kernel=str(tmp_path / "kernel"), initrd=str(tmp_path / "initrd"))
    look_at_files(spec)
    os.unlink(tmp_path / missing)
    with pytest.raises(NotFound, match=missing) as caught:
        look_at_files(spec)
    assert way in str(caught.value)
    with pytest.raises(Refused, match="the saved memory is kept") as refused:
        refuse_other_media(spec, None, {})
    assert way in str(refused.value) and "--discard-saved" not in str(refused.value)
