# SPDX-License-Identifier: Apache-2.0
"""Nights that are interrupted: by a full disk, Ctrl-C, a kill or a power cut. They exist whole or not at all."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

import vhdkit
from tests.harness.folder_power import Cut, FolderPower, files_of, fill, repeatable
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.vhdkit.backup.sources import RAW, Source, check_nights, content_of, facts, numbers_in, saving
from tests.vhdkit.backup.test_night import how
from vhdkit import errors
from vhdkit.backup.manifest import How, Manifest
from vhdkit.backup.repository import MachineFolder
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB

_WHOLE = pytest.mark.nightly


@pytest.fixture
def vhd(tmp_path: Path) -> Source:
    """A disk in a VHD."""
    return Source(tmp_path / "source")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Where the repository will be."""
    return tmp_path / "repository"


def images_of(repository: Path) -> dict[str, bytes]:
    """Every file of the nights; not the records of the machine itself."""
    return {path: raw for path, raw in files_of(repository).items() if path.count(os.sep) > 2}


def full_disk_at(count: int, monkeypatch: pytest.MonkeyPatch, place: Path) -> list[int]:
    """Let the repository's file system be full from the `count`-th write on; returns how many writes came."""
    calls = [0]
    pwrite = FileStore.pwrite

    def filling(store: FileStore, offset: int, data: bytes) -> None:
        if str(place) in store.name:
            calls[0] += 1
            if calls[0] >= count:
                raise errors.NoSpace("the disk is full", path=store.name)
        pwrite(store, offset, data)

    monkeypatch.setattr(FileStore, "pwrite", filling)
    return calls


def test_a_full_disk_drops_the_night_whole(vhd: Source, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NIGHT-WHOLE: wherever the file system becomes full, the earlier nights are there and nothing else is; the
    next night succeeds, with everything since the last one."""
    how(vhd, repository)
    number, calls = 0, [0]
    while calls[0] >= number:
        vhd.write((number * 700 * KIB) % (3 * MIB))
        frozen, before, number = vhd.freeze(), images_of(repository), number + daily_or_nightly(3, 1)
        with monkeypatch.context() as context:
            calls = full_disk_at(number, context, repository)
            try:
                vhd.save(repository, frozen=frozen)
            except errors.NoSpace:
                assert images_of(repository) == before
    assert number > 3 and len(check_nights(vhd, repository)) == 2


def interrupt_at(when: str, doing: str) -> None:
    """Interrupt this piece of work as it begins."""
    if when == doing:
        raise KeyboardInterrupt


def test_ctrl_c_drops_the_night_whole(vhd: Source, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NIGHT-WHOLE: the same for Ctrl-C, also right after the manifest got its name."""
    how(vhd, repository)
    before = images_of(repository)
    for doing in ("saving disk-0", "sums of disk-0"):
        vhd.write(MIB)
        with pytest.raises(KeyboardInterrupt), saving([(vhd, vhd.freeze())], repository) as (night, disks):
            night.save(disks, facts(), {"nvram": b"x"}, stage=partial(interrupt_at, doing))
        assert images_of(repository) == before
    write_manifest = MachineFolder.write_manifest

    def written(machine: MachineFolder, made: Manifest) -> None:
        write_manifest(machine, made)
        raise KeyboardInterrupt

    monkeypatch.setattr(MachineFolder, "write_manifest", written)
    with pytest.raises(KeyboardInterrupt), saving([(vhd, vhd.freeze())], repository) as (night, disks):
        night.save(disks, facts(), {"nvram": b"x"})
    monkeypatch.undo()
    assert images_of(repository) == before and numbers_in(repository) == [1]
    assert how(vhd, repository) == (How.LAYERS, 1)
    check_nights(vhd, repository)


def _folders(place: Path) -> tuple[str, ...]:
    """Every folder below, each after the one it is in."""
    return tuple(sorted(os.path.relpath(one, place) for one in place.rglob("*") if one.is_dir()))


@pytest.mark.parametrize("kind", ["vhd", pytest.param("vhdx", marks=_WHOLE), pytest.param("raw", marks=_WHOLE)])
@pytest.mark.parametrize("wished", ["layers", "full", pytest.param("compared", marks=_WHOLE)])
def test_every_cut_leaves_whole_nights(kind: str, wished: str, tmp_path: Path) -> None:
    """INV-NIGHT-WHOLE, INV-MARK-TRUE: wherever the power is cut while a night is written, each night that exists reads
    as the disk did; and the next night, which begins with what the cut left, does so, too."""
    work, found = tmp_path / "work", tmp_path / "found"
    work.mkdir()
    with repeatable("made"):
        source = Source(work / "source", kind)
        if wished != "full":
            source.save(work / "repository")
        source.write(MIB)
        frozen = source.freeze()
        source.write(3 * MIB)
        if wished == "full":  # folders that are made in a night exist before: their names are not cut
            (work / "repository").mkdir()
    expected = {1: source.nights.get((str(work / "repository"), 1), source.content), 2: b""}
    with vhdkit.open_disk(frozen, options=RAW) as disk:
        expected[2 if wished != "full" else 1] = disk.read(0, disk.size_bytes)
    judged = [0]

    def judge(cut: Cut) -> None:
        judged[0] += 1
        fill(found, cut.files, _folders(work))
        again = object.__new__(Source)
        again.__dict__.update(source.__dict__)
        again.leaf, again.nights = found / "source" / source.leaf.name, {}
        check_nights(again, found / "repository", expected)
        if judged[0] % daily_or_nightly(5, 2) == 0:
            number = again.save(found / "repository", compare=judged[0] % 4 == 0).night
            assert content_of(found / "repository", number) == source.content
            check_nights(again, found / "repository", {**expected, number: source.content})

    with repeatable("night"):
        power = FolderPower(work, "night", judge=judge, every=daily_or_nightly(3, 1))
        power.run(lambda: source.save(work / "repository", frozen=frozen, compare=wished == "compared"))
    assert judged[0] > daily_or_nightly(8, 15)


@pytest.mark.parametrize("kind", ["vhd", pytest.param("vhdx", marks=_WHOLE)])
def test_every_kill_leaves_whole_nights(kind: str, tmp_path: Path) -> None:
    """INV-NIGHT-WHOLE: the same for a process that is killed: what it left is removed by the next night."""
    source, repository = Source(tmp_path / "source", kind), tmp_path / "repository"
    source.save(repository)
    source.write(MIB)
    frozen = source.freeze()
    start, folders, count = files_of(tmp_path), _folders(tmp_path), 0
    for number in killings(lambda: source.save(repository, frozen=frozen), step=daily_or_nightly(9, 1)):
        count += 1
        source.nights[(str(repository), 2)] = source.content
        nights = check_nights(source, repository)
        assert nights == ([1, 2] if number < 0 else nights[:2]) and nights[0] == 1
        made = source.save(repository, frozen=frozen)
        assert (made.disks[0].how is How.SAME) is (nights == [1, 2])
        check_nights(source, repository)
        assert not list(repository.rglob(".vhdkit-*.part"))
        fill(tmp_path, start, folders)
    assert count > 3
