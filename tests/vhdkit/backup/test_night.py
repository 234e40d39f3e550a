# SPDX-License-Identifier: Apache-2.0
"""Nights: what is saved against what, and that a night exists whole or not at all."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

import vhdkit
from tests.harness.folder_power import files_of
from tests.support import require_tool, run
from tests.vhdkit.backup.sources import (
    MACHINE,
    RAW,
    SIZE,
    Source,
    check_nights,
    content_of,
    facts,
    saving,
)
from vhdkit import errors
from vhdkit.backup import basis
from vhdkit.backup.manifest import How
from vhdkit.backup.repository import open_repository
from vhdkit.backup.verify import verify
from vhdkit.units import KIB, MIB, SECTOR_SIZE

_WHOLE = pytest.mark.nightly


@pytest.fixture(params=["vhd", "vhdx", "raw"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """A disk in each format."""
    return Source(tmp_path / "source", request.param)


@pytest.fixture(params=["vhd", pytest.param("vhdx", marks=_WHOLE), pytest.param("raw", marks=_WHOLE)])
def often(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """The same; every day only a VHD."""
    return Source(tmp_path / "source", request.param)


@pytest.fixture
def vhd(tmp_path: Path) -> Source:
    """A disk in a VHD."""
    return Source(tmp_path / "source")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Where the repository will be."""
    return tmp_path / "repository"


def how(source: Source, repository: Path, **wishes: object) -> tuple[How, int | None]:
    """Save a night; how the disk was saved, and against which night."""
    record = source.save(repository, **wishes).disk(source.disk_id)  # type: ignore[arg-type]
    assert record is not None
    return record.how, record.reference_night


def test_each_night_saves_what_lies_above_the_last(source: Source, repository: Path) -> None:
    """The first night is full, each later one has the layers since then; merging between them changes nothing."""
    assert how(source, repository) == (How.FULL, None)
    for number in range(1, 4):
        source.write(number * 3 * KIB * 100)
        source.write_zeroes(2 * MIB + number * 9000, 5000)
        frozen = source.leaf
        assert how(source, repository) == (How.LAYERS, number)
        if number != 2:
            source.merge(frozen)
    assert check_nights(source, repository) == [1, 2, 3, 4]


def test_several_snapshots_are_one_increment(often: Source, repository: Path) -> None:
    """Layers that were frozen since the last night, by whomever, are saved together."""
    how(often, repository)
    for number in range(3):
        often.write(number * MIB)
        often.freeze()
    assert how(often, repository) == (How.LAYERS, 1)
    assert check_nights(often, repository) == [1, 2]


def test_an_unchanged_disk_makes_no_image(often: Source, repository: Path) -> None:
    """A night of a disk without changes names the image of the night before, also when everything is compared."""
    how(often, repository)
    before = files_of(repository)
    assert how(often, repository) == (How.SAME, 1)
    assert how(often, repository, compare=True) == (How.SAME, 2)
    new = set(files_of(repository)) - set(before)
    assert {os.path.basename(path) for path in new} == {"00002.json", "00003.json"}
    assert check_nights(often, repository) == [1, 2, 3]


def test_without_marks_the_content_is_compared(source: Source, repository: Path) -> None:
    """A disk without a mark is compared with its newest night, and only what differs is saved, zeros included."""
    how(source, repository)
    source.write(3 * MIB)
    source.write_zeroes(2 * MIB, 30_000)
    for path in source.folder.glob(".*.vhdkit-nights"):
        path.unlink()
    assert how(source, repository) == (How.COMPARED, 1)
    assert check_nights(source, repository) == [1, 2]
    image = next(repository.rglob("00002.*vhd*"))
    assert image.stat().st_blocks * SECTOR_SIZE < MIB + (SIZE if image.suffix == ".avhdx" else 0)


def test_a_new_chain_begins_when_wished(vhd: Source, repository: Path) -> None:
    """After so many images the next night is full."""
    found = []
    for number in range(4):
        vhd.write(number * MIB)
        found.append(how(vhd, repository, full_every=2)[0])
    assert found == [How.FULL, How.LAYERS, How.FULL, How.LAYERS]
    check_nights(vhd, repository)


def test_a_chain_that_is_too_long_begins_anew(vhd: Source, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of a chain's depth, and not before, the next night is full."""
    monkeypatch.setattr("vhdkit.backup.night.MAX_DEPTH", 3)
    found = []
    for number in range(4):
        vhd.write(number * MIB)
        found.append(how(vhd, repository)[0])
    assert found == [How.FULL, How.LAYERS, How.LAYERS, How.FULL]
    assert basis.MAX_DEPTH == 128


def test_back_in_time_makes_a_branch(often: Source, repository: Path) -> None:
    """A disk that was taken back goes on from the night of that layer; taken forward again, from the later one."""
    how(often, repository)
    first = often.leaf
    before = often.content
    vhdkit.create_child(often.folder / f"later{often.leaf.suffix}", _frozen(often), options=RAW)
    often.write(MIB)
    how(often, repository)
    second, later = often.leaf, often.content
    often.leaf, often.content = often.folder / f"later{first.suffix}", before
    often.write(3 * MIB + 17 * SECTOR_SIZE)
    assert how(often, repository) == (How.LAYERS, 1)
    often.leaf, often.content = second, later
    often.write(9000)
    assert how(often, repository) == (How.LAYERS, 2)
    assert check_nights(often, repository) == [1, 2, 3, 4]


def _frozen(source: Source) -> str:
    return vhdkit.chain_paths(source.leaf, options=RAW)[1]


def test_two_repositories_in_turn(often: Source, tmp_path: Path) -> None:
    """Each repository has its own marks, and saves what changed since its own last night."""
    places = [tmp_path / "one", tmp_path / "two"]
    found = []
    for number in range(6):
        often.write(number * 600 * KIB)
        found.append(how(often, places[number % 2]))
    assert found[2:] == [(How.LAYERS, 1), (How.LAYERS, 1), (How.LAYERS, 2), (How.LAYERS, 2)]
    for place in places:
        check_nights(often, place)


def test_a_copied_repository_goes_its_own_way(vhd: Source, tmp_path: Path) -> None:
    """Two copies of a repository use a number for different nights; a mark of one means nothing in the other."""
    one, two = tmp_path / "one", tmp_path / "two"
    how(vhd, one)
    shutil.copytree(one, two)
    vhd.nights[(str(two), 1)] = vhd.nights[(str(one), 1)]
    vhd.write(MIB)
    assert how(vhd, one) == (How.LAYERS, 1)
    vhd.write(3 * MIB)
    assert how(vhd, two) == (How.LAYERS, 1)
    vhd.write(2 * MIB)
    assert how(vhd, one) == (How.LAYERS, 2)
    check_nights(vhd, one)
    check_nights(vhd, two)


def test_a_resized_disk(often: Source, repository: Path) -> None:
    """Nights have the size that the disk had; what a larger disk got, and what a smaller one lost, is right."""
    how(often, repository)
    vhdkit.resize(often.leaf, SIZE + 2 * MIB, options=RAW)
    often.content += bytes(2 * MIB)
    often.write(SIZE + 5000)
    assert how(often, repository) == (How.LAYERS, 1)
    often.write_zeroes(SIZE, 2 * MIB)
    base = Path(vhdkit.chain_paths(often.leaf, options=RAW)[-1])
    vhdkit.merge(often.leaf, into=base, options=RAW)
    vhdkit.resize(base, SIZE + MIB, shrink=True)
    often.leaf, often.content = base, often.content[: SIZE + MIB]
    often.write(100)
    record = often.save(repository).disk(often.disk_id)
    assert record is not None and (record.how, record.virtual_size_bytes) == (How.FULL, SIZE + MIB)
    assert check_nights(often, repository) == [1, 2, 3]


def test_disks_come_go_and_are_swapped(tmp_path: Path, repository: Path) -> None:
    """A disk that is new is saved whole, the others stay incremental; one that goes is in later nights no more."""
    one, two = Source(tmp_path / "one"), Source(tmp_path / "two", disk_id="disk-1")

    def night(*sources: Source) -> dict[str, tuple[How, int | None]]:
        frozen = []
        for each in sources:
            each.write(random.Random(len(each.nights)).randrange(3 * MIB))
            frozen.append((each, each.freeze()))
        with saving(frozen, repository) as (writing, disks):
            made = writing.save(disks, facts())
        return {record.disk_id: (record.how, record.reference_night) for record in made.disks}

    assert night(one) == {"disk-0": (How.FULL, None)}
    assert night(one, two) == {"disk-0": (How.LAYERS, 1), "disk-1": (How.FULL, None)}
    assert night(two) == {"disk-1": (How.LAYERS, 2)}
    assert night(one, two) == {"disk-0": (How.LAYERS, 2), "disk-1": (How.LAYERS, 3)}
    swapped = Source(tmp_path / "three", name="other")  # in the place of the first, under the same id
    assert night(swapped, two) == {"disk-0": (How.COMPARED, 4), "disk-1": (How.LAYERS, 4)}
    assert content_of(repository, 5) == swapped.content and content_of(repository, 4) == one.content
    assert content_of(repository, 3, "disk-1") == two.nights[(str(repository), 3)]


def test_a_new_machine_under_an_old_name(tmp_path: Path, repository: Path) -> None:
    """Another machine has another folder: it continues nothing, whatever it is called."""
    old, new = Source(tmp_path / "old"), Source(tmp_path / "new")
    how(old, repository)
    with saving([(new, new.freeze())], repository, "ffff2222333344445555666677778888") as (night, disks):
        made = night.save(disks, facts())
    assert made.night == 1 and made.disks[0].how is How.FULL
    assert content_of(repository, 1) == old.content


def test_a_merge_by_hand_into_the_reference(often: Source, repository: Path) -> None:
    """The mark is gone with the merge, even if the file's time is lost in a power cut; the disk is compared."""
    how(often, repository)
    reference = Path(_frozen(often))
    status = reference.stat()
    often.write(MIB)
    frozen = often.freeze()
    often.merge(frozen)
    os.utime(reference, ns=(status.st_atime_ns, status.st_mtime_ns))
    often.write(3 * MIB)
    assert how(often, repository) == (How.COMPARED, 1)
    check_nights(often, repository)


def test_an_old_copy_put_back_with_its_time(vhd: Source, repository: Path) -> None:
    """Marks of later nights do not fit an older copy of the image, and its own mark still tells the truth."""
    how(vhd, repository)
    kept = vhd.folder.parent / "kept"
    shutil.copytree(vhd.folder, kept, copy_function=shutil.copy2)
    old = vhd.content
    vhd.write(MIB)
    frozen = vhd.leaf
    how(vhd, repository)
    vhd.merge(frozen)
    leaf = vhd.leaf
    for path in kept.glob("*.*vhd"):  # the images alone, without the records beside them
        shutil.copy2(path, vhd.folder / path.name)
    vhd.leaf, vhd.content = vhd.folder / frozen.name, old
    leaf.unlink()
    vhd.write(2 * MIB)
    assert how(vhd, repository) == (How.COMPARED, 2)
    check_nights(vhd, repository)


def test_a_wrong_mark_is_found(vhd: Source, repository: Path) -> None:
    """A program that writes to a frozen layer and hides it is found by the comparison of some places."""
    how(vhd, repository)
    reference = Path(_frozen(vhd))
    status = reference.stat()
    raw = reference.read_bytes()
    reference.write_bytes(raw.replace(raw[MIB // 2 + 4096 : MIB // 2 + 8192], b"\xa5" * 4096))
    place = vhd.content[:9000]
    changed = bytearray(raw)
    at = raw.index(place)
    changed[at : at + 8192] = b"\xa5" * 8192
    at = raw.index(vhd.content[2 * MIB + 4096 : 2 * MIB + 60_000])
    changed[at : at + 50_000] = b"\x5a" * 50_000
    reference.write_bytes(changed)
    os.utime(reference, ns=(status.st_atime_ns, status.st_mtime_ns))
    with vhdkit.open_disk(vhd.leaf) as disk:
        vhd.content = disk.read(0, disk.size_bytes)
    made = vhd.save(repository)
    assert made.disks[0].how is How.COMPARED and "does not read as in night 1" in made.warnings[0]
    check_nights(vhd, repository)


def test_a_damaged_night_is_not_built_upon(vhd: Source, repository: Path) -> None:
    """If the image of the reference cannot be opened, all is saved, and the manifest says why."""
    how(vhd, repository)
    next(repository.rglob("00001.vhd")).write_bytes(b"damaged" * 1000)
    vhd.write(MIB)
    made = vhd.save(repository)
    assert made.disks[0].how is How.FULL and "cannot be read" in made.warnings[0]
    assert content_of(repository, 2) == vhd.content


def test_a_disk_that_changes_meanwhile_is_no_night(vhd: Source, repository: Path) -> None:
    """If another program writes to the frozen layer while it is saved, there is no night."""
    how(vhd, repository)
    vhd.write(MIB)
    frozen = vhd.freeze()
    before = set(files_of(repository))
    with pytest.raises(errors.Replaced), saving([(vhd, frozen)], repository) as (night, disks):
        night.save(disks, facts(), stage=lambda doing: os.utime(frozen, ns=(1, 1)))
    assert set(files_of(repository)) == before
    assert check_nights(vhd, repository) == [1] and how(vhd, repository) == (How.LAYERS, 1)


def test_the_repository_has_no_other_names(vhd: Source, repository: Path, tmp_path: Path) -> None:
    """Images name their parents by relative paths alone: a moved repository opens, and nothing else is looked at."""
    how(vhd, repository)
    vhd.write(MIB)
    how(vhd, repository)
    moved = tmp_path / "elsewhere" / "deep"
    moved.parent.mkdir()
    os.rename(repository, moved)
    image = next(moved.rglob("00002.avhd"))
    assert str(repository).encode("utf-16-le") not in image.read_bytes()
    with vhdkit.open_disk(image) as disk:
        assert disk.read(0, SIZE) == vhd.content


def test_verify_finds_nothing_wrong(often: Source, repository: Path) -> None:
    """Every sum, id, size and name is as the manifests say."""
    for number in range(4):
        often.write(number * MIB)
        how(often, repository, compare=number == 2, full_every=3)
    with open_repository(repository) as opened, opened.machine(MACHINE) as machine:
        found = verify(machine)
    assert found.is_good and len(found.nights) == 4, found


def test_files_of_the_night(vhd: Source, repository: Path) -> None:
    """Other files are in the night's folder, with their sums in the manifest."""
    with saving([(vhd, vhd.freeze())], repository) as (night, disks):
        made = night.save(disks, facts(), {"definition.json": b"{}", "nvram": b"vars" * 100})
    assert [(one.name, one.size_bytes) for one in made.files] == [("definition.json", 2), ("nvram", 400)]
    assert next(repository.rglob("00001/nvram")).read_bytes() == b"vars" * 100


def test_7zip_reads_every_night(source: Source, repository: Path, tmp_path: Path) -> None:
    """Another program reads each night's image through its chain."""
    program = require_tool("7zz")
    for number in range(3):
        source.write(number * MIB + 700)
        how(source, repository)
    for image in repository.rglob("*vhd*"):
        if image.suffix in (".vhd", ".avhd", ".vhdx", ".avhdx"):
            place = tmp_path / f"out-{image.name}"
            run([program, "x", f"-o{place}", image])
            [found] = place.iterdir()
            assert found.read_bytes() == source.nights[(str(repository), int(image.stem))], image
