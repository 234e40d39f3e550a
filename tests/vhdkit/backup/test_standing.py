# SPDX-License-Identifier: Apache-2.0
"""Images outside a repository that read as a night before anything is copied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.backup.sources import Source
from vhdkit import backups, errors
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH
from vhdkit.units import KIB, MIB


@pytest.fixture(params=["vhd", "vhdx"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """A disk with three nights."""
    made = Source(tmp_path / "source", request.param)
    for at in (0, MIB, 3 * MIB):
        made.write(at)
        made.save(tmp_path / "repository")
    return made


def standing(repository: Path, number: int, path: Path, **more: int) -> backups.StandingImage:
    """An image on a night."""
    with backups.open_repository(repository) as opened, opened.machine(opened.find_machine("web")) as machine:
        return backups.stand_on_night(machine, machine.require_night(number), "disk-0", path, **more)


def content(made: backups.StandingImage) -> bytes:
    """What it reads."""
    with vhdkit.open_disk(made.path, options=vhdkit.OpenOptions(parent_dirs=made.folders)) as disk:
        return disk.read(0, disk.size_bytes)


def test_it_reads_as_the_night_and_is_filled_from_it(source: Source, tmp_path: Path) -> None:
    """Each night is read without a copy; filled and cut off, the image needs the repository no more; the repository is
    not changed, not even in its attributes."""
    repository = tmp_path / "repository"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in repository.rglob("*")}
    for number in (1, 2, 3):
        made = standing(repository, number, tmp_path / f"new{number}.{source.kind}")
        expected = source.nights[(str(repository), number)]
        assert content(made) == expected and os.path.dirname(made.parent) == made.folders[0]
        assert os.stat(made.path).st_mode & 0o777 == 0o600
        # As written by the guest of a running machine, on a layer of its own.
        leaf = tmp_path / f"leaf{number}.a{source.kind}"
        options = vhdkit.OpenOptions(parent_dirs=made.folders)
        vhdkit.create_child(leaf, made.path, options=options)
        with vhdkit.open_disk(leaf, writable=True, options=options) as disk:
            disk.write(64 * KIB, b"guest")
        vhdkit.pull(made.path, independent=True, options=options)
        with vhdkit.open_disk(made.path) as disk:
            assert disk.read(0, disk.size_bytes) == expected
        with vhdkit.open_disk(leaf) as disk:
            assert disk.read(64 * KIB, 5) == b"guest" and disk.read(MIB, MIB) == expected[MIB : 2 * MIB]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in before} == before
    assert {*repository.rglob("*")} == {*before}


def test_a_filled_image_is_marked_as_the_night(source: Source, tmp_path: Path) -> None:
    """With the mark the next night has only what lies above; a write to the image ends it."""
    repository = tmp_path / "repository"
    made = standing(repository, 3, tmp_path / f"new.{source.kind}")
    vhdkit.pull(made.path, independent=True, options=vhdkit.OpenOptions(parent_dirs=made.folders))
    with backups.open_repository(repository) as opened, opened.machine(opened.find_machine("web")) as machine:
        night = machine.require_night(3)
        backups.mark_as_night(made.path, opened.id, machine.id, "disk-0", night.night, night.id)
    assert [one.night.night_id for one in backups.marks_at(made.path)] == [night.id]
    source.leaf = Path(vhdkit.snapshot(made.path))
    source.write(2 * MIB)
    saved = source.save(repository)
    assert (saved.disks[0].how, saved.disks[0].reference_night) == (backups.How.LAYERS, 3)


def test_what_cannot_be_stood_on(source: Source, tmp_path: Path) -> None:
    """A disk that the night lacks, a name that is taken, a chain that would be too long and a wrong image are
    refused, and nothing is left."""
    repository = tmp_path / "repository"
    path = tmp_path / "new.img"
    with backups.open_repository(repository) as opened, opened.machine(opened.find_machine("web")) as machine:
        night = machine.require_night(3)
        with pytest.raises(errors.NotFound, match="no disk 'disk-7'"):
            backups.stand_on_night(machine, night, "disk-7", path)
        with pytest.raises(errors.AlreadyExists):
            backups.stand_on_night(machine, night, "disk-0", source.leaf)
        with pytest.raises(errors.InvalidArgument, match="254"):
            backups.stand_on_night(machine, night, "disk-0", path, layers_above=MAX_CHAIN_DEPTH - 3)
        backups.stand_on_night(machine, night, "disk-0", path, layers_above=MAX_CHAIN_DEPTH - 4)
        path.unlink()
        [first] = (repository / "machines").rglob(f"00001.{source.kind}")
        vhdkit.convert(first, tmp_path / "other.img", "vhdx" if source.kind == "vhdx" else "dynamic")
        os.replace(tmp_path / "other.img", first)
        with pytest.raises(backups.DamagedRepository, match="not the parent"):
            backups.stand_on_night(machine, night, "disk-0", path)
    assert not path.exists()
