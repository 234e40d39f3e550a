# SPDX-License-Identifier: Apache-2.0
"""Nights become new images and files: whole, checked, and none of them if one fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vhdkit
from tests.support import require_tool, run
from tests.vhdkit.backup.sources import SIZE, Source, facts, saving
from vhdkit import errors
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.leases import leases
from vhdkit.backup.repository import open_repository
from vhdkit.backup.restore import read_file, restore
from vhdkit.held_folder import HeldFolder
from vhdkit.units import MIB, SECTOR_SIZE


@pytest.fixture(params=["vhd", "vhdx"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """A disk with two nights."""
    made = Source(tmp_path / "source", request.param)
    made.save(tmp_path / "repository")
    made.write(MIB)
    made.save(tmp_path / "repository")
    return made


def content(path: Path) -> bytes:
    """What an image reads."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


@pytest.mark.parametrize("kind", [None, "raw", "vhdx", "fixed"])
def test_each_night_in_each_format(source: Source, tmp_path: Path, kind: str | None) -> None:
    """A night becomes an image of the disk's own format or of any other, sparse, which other programs read."""
    for number in (1, 2):
        made = restore(tmp_path / "repository", f"web@{number}", tmp_path / f"new{number}.img", kind=kind)
        path = Path(made.disks["disk-0"])
        expected = source.nights[(str(tmp_path / "repository"), number)]
        format_name = "raw" if kind == "raw" else None
        with vhdkit.open_disk(path, options=vhdkit.OpenOptions(format_name=format_name)) as disk:
            assert disk.read(0, disk.size_bytes) == expected
        assert path.stat().st_blocks * SECTOR_SIZE < 3 * MIB + (SIZE if kind == "vhdx" else 0)
        assert path.stat().st_mode & 0o777 == 0o600


def test_another_program_reads_what_was_restored(source: Source, tmp_path: Path) -> None:
    """7-Zip finds the same bytes, with the repository gone."""
    program = require_tool("7zz")
    restore(tmp_path / "repository", "web", tmp_path / "new.vhd", kind="dynamic")
    os.rename(tmp_path / "repository", tmp_path / "gone")
    run([program, "x", f"-o{tmp_path / 'out'}", tmp_path / "new.vhd"])
    [found] = (tmp_path / "out").iterdir()
    assert found.read_bytes() == source.content


def test_a_machine_with_several_disks_and_files(tmp_path: Path) -> None:
    """Every disk and every other file of the night appears in the folder, or those that were named."""
    one, two = Source(tmp_path / "one"), Source(tmp_path / "two", "vhdx", disk_id="disk-1")
    files = {"definition.json": b"{}", "nvram": bytes(1000) + b"vars", "tpm": b""}
    with saving([(one, one.freeze()), (two, two.freeze())], tmp_path / "repository") as (night, disks):
        night.save(disks, facts(), files)
    place, second = tmp_path / "new", tmp_path / "second"
    place.mkdir()
    second.mkdir()
    plan = restore(tmp_path / "repository", "web", place, dry_run=True)
    assert not list(place.iterdir())
    assert plan == restore(tmp_path / "repository", "web", place)
    assert {path.name for path in place.iterdir()} == {"web-disk-0.vhd", "web-disk-1.vhdx", *files}
    assert {name: (place / name).read_bytes() for name in files} == files
    assert content(place / "web-disk-0.vhd") == one.content and content(place / "web-disk-1.vhdx") == two.content
    restore(tmp_path / "repository", "web", second, disks=["disk-1"])
    assert [path.name for path in second.iterdir()] == ["web-disk-1.vhdx"]
    with pytest.raises(errors.InvalidArgument, match="no folder"):
        restore(tmp_path / "repository", "web", tmp_path / "new.vhd")
    with pytest.raises(errors.NotFound, match="disk-0, disk-1"):
        restore(tmp_path / "repository", "web", tmp_path / "new.vhd", disks=["disk-7"])


def test_nothing_is_left_if_one_fails(tmp_path: Path) -> None:
    """If the second disk cannot be restored, the first one is not left behind, and existing files stay."""
    one, two = Source(tmp_path / "one"), Source(tmp_path / "two", disk_id="disk-1")
    with saving([(one, one.freeze()), (two, two.freeze())], tmp_path / "repository") as (night, disks):
        night.save(disks, facts())
    place = tmp_path / "new"
    place.mkdir()
    (place / "web-disk-0.vhd").write_bytes(b"precious")
    with pytest.raises(errors.AlreadyExists):
        restore(tmp_path / "repository", "web", place)
    assert (place / "web-disk-0.vhd").read_bytes() == b"precious"
    (place / "web-disk-0.vhd").unlink()
    image = next((tmp_path / "repository").rglob("disk-1/00001.vhd"))
    raw = bytearray(image.read_bytes())
    raw[-5000] ^= 1
    image.write_bytes(raw)
    with pytest.raises(DamagedRepository, match="sums differ"):
        restore(tmp_path / "repository", "web", place)
    assert not list(place.iterdir())
    restore(tmp_path / "repository", "web", place, check=False)
    assert len(list(place.iterdir())) == 2


def test_the_night_is_leased_meanwhile(source: Source, tmp_path: Path) -> None:
    """While a night is read it has a lease, and afterwards none, also after a failure."""
    seen: list[int] = []

    def look(doing: str) -> None:
        with open_repository(tmp_path / "repository") as repository:
            seen.extend(one.night for one in leases(repository.root))

    restore(tmp_path / "repository", "web@1", tmp_path / "new.vhd", stage=look)
    assert set(seen) == {1}
    with pytest.raises(errors.AlreadyExists):
        restore(tmp_path / "repository", "web@2", tmp_path / "new.vhd")
    with open_repository(tmp_path / "repository") as repository:
        assert not leases(repository.root)


def test_a_repository_that_cannot_be_written_to(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a repository on a read-only medium, or of another user, a night is restored without a lease."""

    def refused(*_: object, **__: object) -> None:
        raise errors.ReadOnly("is read-only")

    for name in ("new_file", "made_folder", "held_lock"):
        monkeypatch.setattr(HeldFolder, name, refused)
    restore(tmp_path / "repository", "web@1", tmp_path / "new.vhd")
    assert content(tmp_path / "new.vhd") == source.nights[(str(tmp_path / "repository"), 1)]


def test_another_file_is_read_and_checked(source: Source, tmp_path: Path) -> None:
    """A file of a night is read whole if it is short enough and as it was written; otherwise the error names it."""
    with saving([(source, source.freeze())], tmp_path / "repository") as (writing, disks):
        writing.save(disks, facts(), {"definition.json": b"{}"})
    with open_repository(tmp_path / "repository") as opened, opened.machine(opened.find_machine("web")) as machine:
        night = machine.require_night(3)
        assert read_file(machine, night, "definition.json", 2) == b"{}"
        with pytest.raises(errors.NotFound, match="no file 'other'"):
            read_file(machine, night, "other", 2)
        with pytest.raises(errors.InvalidArgument, match="more than 1 bytes"):
            read_file(machine, night, "definition.json", 1)
        with machine.meta(3) as folder:
            folder.write("definition.json", b"[]", replace=True)
        with pytest.raises(DamagedRepository, match="changed or damaged") as caught:
            read_file(machine, night, "definition.json", 2)
        assert str(caught.value.path).endswith("meta/00003/definition.json")
