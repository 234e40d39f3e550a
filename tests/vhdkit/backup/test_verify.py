# SPDX-License-Identifier: Apache-2.0
"""Verification finds every damage, names the nights that it reaches and the whole ones, and can be interrupted."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import vhdkit
from tests.doc_commands import blocks
from tests.support import daily_or_nightly
from tests.vhdkit.backup.repositories import MACHINE, Nights
from tests.vhdkit.backup.test_bases import OTHER, add_base, add_night
from vhdkit import errors
from vhdkit.backup import verify as module
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import ImageRecord
from vhdkit.backup.names import ImagePlace
from vhdkit.backup.pruning import delete
from vhdkit.backup.verified import read_verified
from vhdkit.backup.verify import Verification, known_results, verify
from vhdkit.units import KIB, MIB


def make(folder: Path, extension: str = "vhd") -> Nights:
    """Six nights of two disks: 1 ← 2 ← 3 ← 5 and the branch 2 ← 4; night 6 changes nothing on the first disk."""
    rng = random.Random(5)
    nights = Nights(folder, extension)
    nights.add(
        {"a": {0: rng.randbytes(300 * KIB)}, "b": {MIB: rng.randbytes(70 * KIB)}}, files={"definition.json": b"{}"}
    )
    nights.add({"a": {4096: rng.randbytes(9000)}, "b": {}})
    nights.add({"a": {3 * MIB: rng.randbytes(9000)}, "b": {0: b"b3"}})
    nights.add({"a": {5 * MIB: b"branch"}, "b": {}}, on=2)
    nights.add({"a": {6 * MIB: rng.randbytes(5000)}, "b": {}}, on=3, files={"nvram": rng.randbytes(5000)})
    nights.add({"a": {}, "b": {2 * MIB: b"b6"}})
    return nights


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """A repository that no test changes."""
    return make(tmp_path_factory.mktemp("original") / "repo")


@pytest.fixture
def nights(original: Nights, tmp_path: Path) -> Nights:
    """A copy of it."""
    shutil.copytree(original.path, tmp_path / "repo")
    copy = Nights(tmp_path / "repo")
    copy.content = original.content
    return copy


def verified(nights: Nights, **options: object) -> Verification:
    """The result for the machine."""
    with nights.machine() as machine:
        return verify(machine, **options)  # type: ignore[arg-type]


def bad(result: Verification) -> list[int]:
    """The nights that are not whole."""
    return [one.number for one in result.nights if not one.is_whole]


def needing(nights: Nights, path: Path) -> list[int]:
    """The nights that need this file, found without the records: by the chains of the images themselves."""
    found = []
    for number in range(1, 7):
        with nights.machine() as machine:
            night = machine.night(number)
            assert night is not None and night.manifest is not None
            images = [os.path.join(machine.path, one.image.text) for one in night.manifest.disks]
            files = [one for image in images for one in vhdkit.chain_paths(image)]
            files += [os.path.join(machine.path, "meta", f"{number:05d}", one.name) for one in night.manifest.files]
        if any(os.path.samefile(one, path) for one in files):
            found.append(number)
    return found


@pytest.mark.parametrize("extension", ["vhd", "vhdx"])
def test_a_good_repository_is_good(tmp_path: Path, extension: str) -> None:
    """Nothing is wrong with nights that were just made, in either format, and verifying changes no file of theirs."""
    nights = make(tmp_path / "repo", extension)
    before = {path: path.read_bytes() for path in nights.path.rglob("*") if path.is_file() and path.name != "lock"}
    result = verified(nights)
    assert result.is_good and not result.damaged and [one.number for one in result.nights] == [1, 2, 3, 4, 5, 6]
    assert result.read_bytes > 0 and not result.went_on and not result.unfinished_prune
    assert all(path.read_bytes() == raw for path, raw in before.items())
    nights.check(1, 2, 3, 4, 5, 6)


def test_flipped_ranges_name_the_right_nights(nights: Nights) -> None:
    """A flipped bit anywhere in an image's file, in data, metadata or a hole, makes exactly the nights bad that need
    the file, and is no longer reported once the file is restored."""
    rng = random.Random(7)
    with nights.machine() as machine:
        images = sorted(one for one in Path(machine.path, "images").rglob("*vhd"))
    assert len(images) == 8
    for path in images:
        raw, reached = path.read_bytes(), needing(nights, path)
        for _ in range(daily_or_nightly(2, 40)):
            at = rng.choice([rng.randrange(len(raw)), rng.randrange(min(2048, len(raw))), len(raw) - 1])
            size = rng.choice([1, 1, 5000, 100_000])
            changed = bytearray(raw)
            for place in range(at, min(at + size, len(raw)), 997):
                changed[place] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            result = verified(nights, again=True)
            assert bad(result) == reached, path
            assert any(os.path.samefile(one, path) and f"byte {at // 65536 * 65536} " in words
                       for one, words in result.damaged)  # fmt: skip
            with nights.machine() as machine:
                assert [one.number for one in known_results(machine, machine.nights()) if one.problems] == reached
        path.write_bytes(raw)
    assert verified(nights, again=True).is_good


def describing(nights: Nights) -> dict[str, set[int]]:
    """Which manifests describe an image, by its place; read without the program."""
    found: dict[str, set[int]] = {}
    with nights.machine() as machine:
        for path in Path(machine.path, "nights").glob("*.json"):
            for disk in json.loads(path.read_text())["disks"]:
                found.setdefault(disk["image"], set()).add(int(path.stem))
    return found


def test_flipped_manifests_name_the_right_nights(nights: Nights) -> None:
    """A flipped bit anywhere in a manifest makes its night bad, and those that need an image which only it describes;
    a flipped bit in a record of the machine or of the repository is an error that names the file."""
    rng = random.Random(8)
    with nights.machine() as machine:
        root = Path(machine.path)
    by_image = {place: (needing(nights, root / place), by) for place, by in describing(nights).items()}
    paths = sorted((root / "nights").glob("*.json"))
    for path in [*paths, root / "machine.json", nights.path / "repository.json"]:
        raw, number = path.read_bytes(), int(path.stem) if path in paths else 0
        reached = {number, *(one for needed, by in by_image.values() if by == {number} for one in needed)}
        for _ in range(daily_or_nightly(1, 60)):
            at = rng.randrange(len(raw))
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
            if raw[at : at + 1].isspace() and json.loads(raw) == _loaded(path):
                continue
            if number:
                assert bad(verified(nights, again=True)) == sorted(reached), (path, at)
            else:
                with pytest.raises((DamagedRepository, errors.UnsupportedFormat)) as caught:
                    verified(nights, again=True)
                assert caught.value.path is not None and os.path.samefile(caught.value.path, path)
        path.write_bytes(raw)
    assert verified(nights, again=True).is_good


def _loaded(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_flipped_bases_name_the_right_nights(tmp_path: Path) -> None:
    """A flipped bit in a shared base, or in its table, makes the nights bad that stand on it, of each machine."""
    nights, rng = Nights(tmp_path / "repo"), random.Random(9)
    nights.add({"b": {MIB: b"alone"}})
    base = add_base(nights)
    add_night(nights, base, MACHINE)
    add_night(nights, base, OTHER)
    image = nights.path / "bases" / base.image.name
    for path in (image, image.with_name(f"{image.name}.sums")):
        raw = path.read_bytes()
        for _ in range(daily_or_nightly(2, 60)):
            at = rng.randrange(len(raw))
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
            for machine_id, reached in ((MACHINE, [2]), (OTHER, [1])):
                with nights.machine(machine_id) as machine:
                    result = verify(machine, again=True)
                assert bad(result) == reached and any(os.path.basename(one) == image.name for one, _ in result.damaged)
        path.write_bytes(raw)


def test_flipped_tables_and_files_name_the_right_nights(nights: Nights) -> None:
    """Damage of a table of sums, and of any other file of a night, is found as well."""
    with nights.machine() as machine:
        root = Path(machine.path)
    cases = [(path, needing(nights, path.with_suffix(""))) for path in root.rglob("*.sums")]
    cases += [(root / "meta/00001/definition.json", [1]), (root / "meta/00005/nvram", [5])]
    for path, reached in cases:
        raw = path.read_bytes()
        changed = bytearray(raw)
        changed[len(raw) // 2] ^= 4
        path.write_bytes(changed)
        assert bad(verified(nights, again=True)) == reached, path
        path.unlink()
        assert bad(verified(nights, again=True)) == reached, path
        path.write_bytes(raw + b"x")
        assert bad(verified(nights, again=True)) == reached, path
        path.write_bytes(raw)
    assert verified(nights, again=True).is_good


@pytest.mark.parametrize("how", ["missing", "cut short", "longer", "swapped", "link", "pipe", "folder", "empty"])
def test_a_file_that_is_not_the_image(nights: Nights, how: str, tmp_path: Path) -> None:
    """An image that is missing, cut short, or swapped with another night's, or a link or pipe in its place, is damage
    of the nights that need it; nothing waits and nothing outside is read."""
    path, other = nights.image(3, "a"), nights.image(4, "a")
    reached, of_other = needing(nights, path), needing(nights, other)
    raw = path.read_bytes()
    path.rename(tmp_path / "aside")
    if how == "cut short":
        path.write_bytes(raw[:-512])
    elif how == "longer":
        path.write_bytes(raw + bytes(512))
    elif how == "swapped":
        reached = sorted({*reached, *of_other})
        path.write_bytes(other.read_bytes())
        other.write_bytes(raw)
    elif how == "link":
        path.symlink_to(tmp_path / "aside")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "empty":
        path.touch()
    assert bad(verified(nights)) == reached == ([3, 4, 5, 6] if how == "swapped" else [3, 5, 6])
    with nights.machine() as machine:
        assert [one.number for one in known_results(machine, machine.nights()) if one.problems] == reached


def test_an_image_on_another_parent(nights: Nights) -> None:
    """An image whose sums are right, but that stands on another image than its record says, or has another id, is
    damage: sums alone do not prove a chain."""
    with nights.machine() as machine, machine.held("a test"):
        night = machine.night(4)
        assert night is not None and night.manifest is not None
        disk = night.manifest.disks[0]
        for change in (
            {"parent_image": ImagePlace("a", "00003.avhd")},
            {"parent_image": None},
            {"image_id": "12" * 16},
        ):
            wrong = replace(disk, **change)
            machine.write_manifest(night.manifest.with_disks([wrong, *night.manifest.disks[1:]]), replace=True)
            assert bad(verify(machine, again=True)) == [4], change
        machine.write_manifest(night.manifest, replace=True)
        assert verify(machine, again=True).is_good


def test_a_damaged_manifest(nights: Nights) -> None:
    """A manifest that cannot be read makes its night bad, and those that need an image which only it describes."""
    with nights.machine() as machine:
        path = Path(machine.path, "nights/00002.json")
    path.write_bytes(path.read_bytes()[:-3])
    assert bad(verified(nights)) == [2, 3, 4, 5, 6]


def test_an_interrupted_run_goes_on(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed goes on with the images that it had not read; a finished one begins anew; an image that a
    prune has rewritten since is read again."""
    monkeypatch.setattr(module, "_RECORD_EVERY_SECONDS", 0.0)
    read: list[str] = []
    limit = [4]
    real = module._Run._problem_of

    def counted(run: module._Run, record: ImageRecord) -> str | None:
        if len(read) == limit[0]:
            raise KeyboardInterrupt
        read.append(record.place.text)
        return real(run, record)

    monkeypatch.setattr(module._Run, "_problem_of", counted)
    with pytest.raises(KeyboardInterrupt):
        verified(nights)
    first = [*read]
    with nights.machine() as machine, machine.held("a test"):  # as a prune does
        night = machine.night(1)
        assert night is not None and night.manifest is not None
        path = nights.image(1, "a")
        with vhdkit.open_disk(path, options=vhdkit.OpenOptions(), writable=False) as disk:
            assert disk.size_bytes == 8 * MIB
        path.write_bytes(path.read_bytes() + bytes(512))
        footer = path.read_bytes()[-1024:-512]
        path.write_bytes(path.read_bytes()[:-512] + footer)
        records = [nights.recorded(machine, night.manifest.disks[0]), *night.manifest.disks[1:]]
        machine.write_manifest(night.manifest.with_disks(records), replace=True)
    read[:] = []
    monkeypatch.setattr(module, "_RECORD_EVERY_SECONDS", 1000.0)
    limit[0] = 100
    result = verified(nights)
    assert result.went_on and result.is_good
    assert set(first) & set(read) == {"images/a/00001.vhd"} and len(read) == 8 - 4 + 1
    read[:] = []
    assert not verified(nights).went_on and len(read) == 8


def test_a_busy_image_is_reported(nights: Nights) -> None:
    """An image that another process changes is not called damaged: the run says that it could not be verified."""
    path = nights.image(4, "a")
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.flush()
        result = verified(nights)
        assert [os.path.samefile(one, path) for one in result.busy] == [True] and bad(result) == []
        assert not result.is_good
    assert verified(nights).went_on


def test_a_sample_reads_a_part(original: Nights) -> None:
    """A sample checks every table and chain, and the sums of a part; it finds damage sooner or later."""
    result = verified(original, sample_percent=10)
    assert result.is_good
    with pytest.raises(errors.InvalidArgument):
        verified(original, sample_percent=0)
    assert verified(original).is_good


def test_a_sample_finds_damage_in_the_end(nights: Nights) -> None:
    """Samples of half of an image find a large damage after a few runs."""
    path = nights.image(1, "a")
    raw = bytearray(path.read_bytes())
    raw[8192:200_000] = bytes(len(raw[8192:200_000]))
    path.write_bytes(raw)
    assert any(bad(verified(nights, sample_percent=50)) for _ in range(40))


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 1000, b'{"format": 9}'])
def test_a_damaged_record_is_ignored(nights: Nights, content: bytes) -> None:
    """The record of a run is a convenience: without it, or with a damaged one, verifying begins anew."""
    with nights.machine() as machine:
        Path(machine.path, "verify.json").write_bytes(content)
        assert read_verified(machine.folder) is None
    assert verified(nights).is_good


def test_a_read_only_repository(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be written, verifying works, without a record."""

    def refused(*_: object, **__: object) -> None:
        raise errors.ReadOnly("is read-only")

    with nights.machine() as machine:
        Path(machine.path, "verify.json").unlink(missing_ok=True)
        monkeypatch.setattr(type(machine.folder), "write", refused)
        assert verify(machine).is_good
        assert not Path(machine.path, "verify.json").exists()


def test_progress(original: Nights) -> None:
    """Progress never goes back and ends at the total."""
    seen: list[tuple[int, int]] = []
    verified(original, again=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_the_program_in_the_docs_agrees(nights: Nights, tmp_path: Path) -> None:
    """The program in docs/backup.md, which uses nothing of vhdkit, calls the same nights whole and damaged."""
    (block,) = [one for one in blocks("docs/backup.md") if one.language == "python"]
    program = tmp_path / "check.py"
    program.write_text(block.text)
    image, table = nights.image(3, "a"), nights.image(4, "a").with_name("00004.avhd.sums")
    for path, at in (
        (None, 0),
        (image, 2000),
        (nights.path / "machines" / MACHINE / "meta/00005/nvram", 7),
        (table, 9),
    ):
        raw = b"" if path is None else path.read_bytes()
        if path is not None:
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        done = subprocess.run(
            [sys.executable, "-I", program, nights.path], capture_output=True, text=True, check=False
        )
        said = {int(Path(line.split()[0]).stem): line.endswith("whole") for line in done.stdout.splitlines()}
        expected = [] if path is None or path == table else needing(nights, path)  # it needs no tables
        assert sorted(said) == [1, 2, 3, 4, 5, 6] and [one for one in said if not said[one]] == expected, done.stderr
        assert done.returncode == bool(expected)
        if path is not None and path != table:
            assert bad(verified(nights, again=True)) == expected
        if path is not None:
            path.write_bytes(raw)


def test_a_prune_meanwhile_is_no_damage(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prune changes, merges or removes while a verification runs is not called damaged, but in use."""
    real = module._Run.check_files

    def prune_first(*args: object) -> None:
        monkeypatch.setattr(module._Run, "check_files", real)
        with nights.machine() as machine:
            delete(machine, 1)

    monkeypatch.setattr(module._Run, "check_files", prune_first)
    result = verified(nights, again=True)
    assert bad(result) == [] and result.busy
    assert verified(nights, again=True).is_good


def test_a_sample_takes_no_damage_back(nights: Nights) -> None:
    """Damage that is known stays known, though a sample reads elsewhere; it is forgotten when it is gone."""
    path = nights.image(1, "a")
    before = path.read_bytes()
    path.write_bytes(before[:70_000] + bytes([before[70_000] ^ 1]) + before[70_001:])
    found = bad(verified(nights))
    assert found and all(bad(verified(nights, sample_percent=1)) == found for _ in range(8))
    path.write_bytes(before)
    assert bad(verified(nights, sample_percent=1)) == []
