# SPDX-License-Identifier: Apache-2.0
"""Prunes and deletions on real repositories: kept nights keep their content, whatever happens in between."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from datetime import UTC
from pathlib import Path

import pytest

import vhdkit
from tests.harness.folder_power import Cut, FolderPower, files_of, fill, repeatable
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.vhdkit.backup.pruned import check, copy, left, make
from tests.vhdkit.backup.repositories import MACHINE, Nights
from vhdkit import errors
from vhdkit.backup import pruning as module
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.journal import PruneJournal, write_journal
from vhdkit.backup.keep import KeepRules
from vhdkit.backup.leases import add_lease, leased, release
from vhdkit.backup.night import Wishes, writing
from vhdkit.backup.pruning import Pruned, delete, finish, prune
from vhdkit.backup.renewal import Renewal
from vhdkit.backup.repository import MachineFolder, open_repository
from vhdkit.backup.verify import verify


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Nights]:
    """Repositories that no test changes."""
    folder = tmp_path_factory.mktemp("originals")
    return {extension: make(folder / extension, extension) for extension in ("vhd", "vhdx")}


@pytest.fixture
def nights(originals: dict[str, Nights], tmp_path: Path) -> Nights:
    """A repository of VHDs."""
    return copy(originals["vhd"], tmp_path / "repo")


def dropped(nights: Nights, *numbers: int) -> None:
    """Drop these nights at once, as a prune does."""
    with nights.machine() as machine:
        module._changed(machine, "prune", lambda _nights, _leased: (set(numbers), {}), dry_run=False, progress=None)


EVERY_DAY = [("vhd", (1, 2)), ("vhd", (3,)), ("vhd", (1, 3, 5, 7)), ("vhdx", (2, 4, 6))]
DROPS = [(1,), (1, 2), (3,), (7,), (1, 2, 3, 4), (2, 4, 6), (5,), (6, 7), (1, 3, 5, 7), (1, 2, 3, 4, 5, 6)]


@pytest.mark.parametrize(
    ("extension", "drop"),
    [
        pytest.param(extension, drop, marks=() if (extension, drop) in EVERY_DAY else pytest.mark.nightly)
        for extension in ("vhd", "vhdx")
        for drop in DROPS
    ],
    ids=str,
)
def test_kept_nights_keep_their_content(
    originals: dict[str, Nights], tmp_path: Path, extension: str, drop: tuple[int, ...]
) -> None:
    """Whichever nights go, the others read as before, their sums and chains are right, and nothing is left over."""
    nights = copy(originals[extension], tmp_path / "repo")
    dropped(nights, *drop)
    check(nights, *(number for number in range(1, 8) if number not in drop))


def test_one_night_after_the_other(originals: dict[str, Nights], tmp_path: Path) -> None:
    """Deleting nights one by one, in any order, down to one, leaves the rest in order after each."""
    rng = random.Random(3)
    for extension, runs in (("vhd", daily_or_nightly(1, 20)), ("vhdx", daily_or_nightly(0, 20))):
        for run in range(runs):
            nights = copy(originals[extension], tmp_path / f"{extension}-{run}")
            numbers = list(range(1, 8))
            while len(numbers) > 1:
                numbers.remove(rng.choice(numbers))
                with nights.machine() as machine:
                    delete(machine, *(set(left(nights)) - set(numbers)), newest=True)
                check(nights, *numbers)


def test_new_nights_after_a_prune(nights: Nights) -> None:
    """After a prune new nights stand on what is left, and a later prune takes both."""
    dropped(nights, 1, 2, 4)
    nights.add({"a": {4096: b"new"}, "b": {0: b"new"}}, files={"nvram": b"n"})
    check(nights, 3, 5, 6, 7, 8)
    dropped(nights, 3, 7)
    check(nights, 5, 6, 8)


def rules(nights: Nights, *, dry_run: bool = False, **of: int) -> Pruned:
    """A prune by rules."""
    with nights.machine() as machine:
        return prune(machine, KeepRules(**of), UTC, dry_run=dry_run)


def test_a_dry_run_says_what_a_prune_does(nights: Nights) -> None:
    """A dry run changes no file, needs no lock, and has the same plan as the prune after it."""
    files = {path: path.read_bytes() for path in nights.path.rglob("*") if path.is_file()}
    with nights.machine() as machine, machine.held("another"):
        planned = rules(nights, dry_run=True, last=2)
    assert {path: path.read_bytes() for path in nights.path.rglob("*") if path.is_file() and path.name != "lock"} == {
        path: raw for path, raw in files.items() if path.name != "lock"
    }
    done = rules(nights, last=2)
    assert planned.plan == done.plan and done.plan.dropped == (1, 2, 3, 4, 5) and set(done.plan.kept) == {6, 7}
    check(nights, 6, 7)
    assert rules(nights, last=2).plan.is_empty


def test_protected_and_leased_nights_stay(nights: Nights) -> None:
    """A night that is protected or read is kept by every prune and refused by a deletion; a lease that is released
    protects no longer."""
    with nights.machine() as machine, machine.held("protect"):
        night = machine.night(2)
        assert night is not None and night.manifest is not None
        machine.write_manifest(replace(night.manifest, protected=True), replace=True)
        lease = add_lease(machine.repository.root, machine.id, 4, "restore of web", lasting=True)
    assert set(rules(nights, last=1).plan.kept) == {2, 4, 7}
    check(nights, 2, 4, 7)
    with nights.machine() as machine:
        with pytest.raises(errors.InvalidArgument, match="night 2 is protected"):
            delete(machine, 2)
        with pytest.raises(errors.ImageInUse, match=f"read by restore of web.*--release {lease.id}"):
            delete(machine, 4)
        with pytest.raises(errors.InvalidArgument, match="newest whole night of web"):
            delete(machine, 7)
        with pytest.raises(errors.NotFound):
            delete(machine, 3)
        release(machine.repository.root, lease.id)
        delete(machine, 4)
    check(nights, 2, 7)


def test_a_lease_protects_everything_below(nights: Nights) -> None:
    """Nothing that a leased night stands on is merged; a later prune does that."""
    before = {path: path.read_bytes() for path in nights.path.rglob("*vhd")}
    with nights.machine() as machine, leased(machine.repository.root, machine.id, 7, "restore"):
        plan = rules(nights, last=2).plan
        assert plan.deferred and not plan.mergings and plan.dropped == (1, 2, 3, 4, 5)
    after = {path: path.read_bytes() for path in nights.path.rglob("*vhd")}
    assert after.items() <= before.items() and left(nights) == [6, 7]
    nights.check(6, 7)
    assert rules(nights, last=2).finished == (1, 2, 5)
    check(nights, 6, 7)


def test_a_lease_that_is_made_meanwhile(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that comes between the plan and the first change stops the prune before anything has changed."""
    real = write_journal

    def journalled(machine: MachineFolder, journal: PruneJournal) -> None:
        real(machine, journal)
        add_lease(machine.repository.root, machine.id, 6, "restore", lasting=True)

    monkeypatch.setattr(module, "write_journal", journalled)
    with pytest.raises(errors.ImageInUse, match="night 6 is read by restore"):
        rules(nights, last=2)
    assert left(nights) == [1, 2, 3, 4, 5, 6, 7]
    with nights.machine() as machine, machine.reading(6, "another restore") as found:
        assert found.night == 6


def test_a_reader_waits_for_a_prune(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that comes while nights are merged is refused, and one after an interrupted prune is not."""
    tried = []
    real = module._merge

    def merging(machine: MachineFolder, *more: object) -> None:
        with pytest.raises(errors.ImageInUse, match="held by prune"), machine.reading(7, "restore"):
            raise AssertionError
        tried.append(True)
        if len(tried) == 2:
            raise KeyboardInterrupt
        real(machine, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_merge", merging)
    with pytest.raises(KeyboardInterrupt):
        rules(nights, last=2)
    with nights.machine() as machine:
        with machine.reading(7, "restore"):
            nights.check(6, 7)
        with machine.held("prune"):
            monkeypatch.setattr(module, "_merge", real)
            assert finish(machine) == (1, 2, 3, 4, 5)
    check(nights, 6, 7)


def test_damage_is_not_merged(nights: Nights) -> None:
    """Nothing whose sums are wrong is merged, nor gets new sums: the prune stops, and kept nights read as before."""
    path = nights.image(4, "a")
    raw = bytearray(path.read_bytes())
    raw[-700_000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedRepository, match="it is not merged"):
        dropped(nights, 3)
    with nights.machine() as machine:
        assert [one.number for one in verify(machine, again=True).nights if not one.is_whole] == [4]
    assert rules(nights, last=5).plan.deferred  # now that it is known, it does not stop a prune of others
    raw[-700_000] ^= 1
    path.write_bytes(raw)
    with nights.machine() as machine:
        assert verify(machine, again=True).is_good
    with nights.machine() as machine, machine.held("prune"):
        finish(machine)
    check(nights, 1, 2, 4, 5, 6, 7)


def test_damage_elsewhere_in_the_target_is_still_found(nights: Nights) -> None:
    """Damage in a block that a merge does not touch stays known as damage: it gets no new sum that calls it right."""
    path = nights.image(1, "a")
    at = path.read_bytes().find(nights.content[1]["a"][4096:4200])
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    try:
        dropped(nights, 1)
    except DamagedRepository:
        return  # the merge touches that block
    with nights.machine() as machine:
        assert [one.number for one in verify(machine, again=True).nights if one.is_whole] == []


def test_a_damaged_manifest_stops_a_prune(nights: Nights) -> None:
    """While a manifest cannot be read, it is unknown which images it needs: nothing is dropped."""
    path = nights.path / "machines" / MACHINE / "nights/00003.json"
    raw = path.read_bytes()
    path.write_bytes(raw[:-5])
    with pytest.raises(DamagedRepository, match="night 3 cannot be read"):
        rules(nights, last=1)
    path.write_bytes(raw)
    check(nights, 1, 2, 3, 4, 5, 6, 7)


def test_failed_and_damaged_nights_count_for_nothing(nights: Nights) -> None:
    """A damaged newest night does not push out the newest whole one, and is kept itself."""
    path = nights.image(7, "a")
    path.write_bytes(path.read_bytes()[:-512])
    assert set(rules(nights, last=1).plan.kept) == {6, 7}
    assert left(nights) == [6, 7]
    nights.check(6)


def after_interruption(nights: Nights, kept: tuple[int, ...]) -> None:
    """Kept nights read as they must right after an interruption, and all is in order once the prune is finished."""
    found = left(nights)
    assert set(kept) <= set(found)
    for number in kept:
        with nights.machine() as machine:
            night = machine.night(number)
            assert night is not None and night.manifest is not None
            for disk in night.manifest.disks:
                with vhdkit.open_disk(os.path.join(machine.path, disk.image.text)) as image:
                    assert image.read(0, image.size_bytes) == nights.content[number][disk.disk_id], (number, disk)
    with nights.machine() as machine, machine.held("prune"):
        finish(machine)
    check(nights, *left(nights))
    assert set(kept) <= set(left(nights))


@pytest.mark.parametrize("extension", ["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "drop",
    [(1, 2, 3, 4), *(pytest.param(one, marks=pytest.mark.nightly) for one in ((1, 2), (3,), (5, 7)))],
    ids=str,
)
def test_a_killed_prune_goes_on(
    originals: dict[str, Nights], tmp_path: Path, extension: str, drop: tuple[int, ...]
) -> None:
    """Killed before any change of a file, and killed again while it is finished, a prune leaves every kept night
    readable, and is finished by the next run."""
    kept = tuple(number for number in range(1, 8) if number not in drop)
    work = copy(originals[extension], tmp_path / "repo")
    rng = random.Random(str(drop))

    def again() -> None:
        with work.machine() as machine, machine.held("prune"):
            finish(machine)

    for number in killings(lambda: dropped(work, *drop), step=daily_or_nightly(61, 5)):
        if number > 0 and rng.random() < 0.5:
            for _ in killings(again, step=daily_or_nightly(97, 29)):
                break
        after_interruption(work, kept)
        copy(originals[extension], tmp_path / "repo")


@pytest.mark.parametrize("extension", ["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("drop", [(1, 2), pytest.param((3, 7), marks=pytest.mark.nightly)], ids=str)
def test_a_power_cut_in_a_prune(tmp_path: Path, extension: str, drop: tuple[int, ...]) -> None:
    """Wherever the power is cut in a prune, every kept night can be read, and the next run finishes it."""
    with repeatable("made"):
        nights = make(tmp_path / "repo", extension, 4 if 7 not in drop else 7)
    count = len(nights.content)
    kept = tuple(number for number in range(1, count + 1) if number not in drop)
    found = Nights(tmp_path / "found", extension, nights.content)

    def judge(cut: Cut) -> None:
        fill(found.path, cut.files)
        after_interruption(found, kept)

    every = daily_or_nightly(61, 7)
    with repeatable("run"):
        FolderPower(nights.path, "run", judge=judge, every=every).run(lambda: dropped(nights, *drop))
    check(nights, *kept)


def test_another_program_finishes_the_merge(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge of an interrupted prune that another program finishes leaves the manifests behind; the next run sees
    that and writes them."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Renewal, "after", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dropped(nights, 3)
    assert vhdkit.resume_merge(next(nights.path.rglob("a/00003.avhd"))).removed
    with nights.machine() as machine, machine.held("prune"):
        finish(machine)
    check(nights, 1, 2, 4, 5, 6, 7)


def test_a_full_target(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full file system nights can be listed, verified and deleted as long as nothing must be merged: that frees
    space. A prune that must merge stops before anything has changed."""

    def full(*_: object, **__: object) -> None:
        raise errors.NoSpace("cannot write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vhdkit.held_folder.HeldFolder.new_file", full)
        with nights.machine() as machine:
            assert verify(machine).is_good
            delete(machine, 7, newest=True)
            assert left(nights) == [1, 2, 3, 4, 5, 6]
            with pytest.raises(errors.NoSpace):
                delete(machine, 1)
    check(nights, 1, 2, 3, 4, 5, 6)


def test_a_hidden_branch_goes_with_what_stood_on_it(tmp_path: Path) -> None:
    """An image that stayed for a branch is removed with it, and not looked for when its parent is merged."""
    nights = Nights(tmp_path / "repo")
    nights.add({"a": {0: b"1"}})
    for number, on in ((2, 1), (3, 2), (4, 2), (5, 1)):
        nights.add({"a": {number * 4096: b"x"}}, on=on)
    for number in nights.content:  # as `check` wants it
        nights.path.joinpath("machines", MACHINE, "meta", f"{number:05d}").mkdir(exist_ok=True)
    dropped(nights, 1, 2)
    dropped(nights, 3, 4)
    check(nights, 5)


def test_a_prune_beside_other_work(nights: Nights) -> None:
    """Case 24: while a night is written no prune begins; what a prune that was killed has left is finished by the next
    night, but not while a restore reads it."""
    with open_repository(nights.path) as repository:
        with writing(repository, MACHINE, "web", Wishes()), pytest.raises(errors.ImageInUse, match="a backup"):
            dropped(nights, 1)
        check(nights, 1, 2, 3, 4, 5, 6, 7)
        for number in killings(lambda: dropped(nights, 3), step=3):
            assert number > 0
            if nights.path.joinpath("machines", MACHINE, "prune.json").exists():
                break
        with nights.machine() as machine, leased(repository.root, MACHINE, 4, "a restore"):
            before = files_of(nights.path)
            with writing(repository, MACHINE, "web", Wishes()):
                assert 4 in left(nights)
            nights.check(4)
            assert machine.night(4) is not None
            assert {path for path in before if "images" in path} == {
                path for path in files_of(nights.path) if "images" in path
            }
        with writing(repository, MACHINE, "web", Wishes()):
            pass
    check(nights, *left(nights))


def test_a_file_with_a_second_name_is_not_merged(nights: Nights, tmp_path: Path) -> None:
    """A merge would change what else has that name: it is refused before anything is dropped, and nothing changes."""
    os.link(nights.image(1, "a"), tmp_path / "mine.vhd")
    before = files_of(nights.path)
    with pytest.raises(errors.InvalidArgument, match="has a second name"):
        dropped(nights, 1, 2)
    assert set(files_of(nights.path)) == set(before) and left(nights) == [1, 2, 3, 4, 5, 6, 7]
    (tmp_path / "mine.vhd").unlink()
    dropped(nights, 1, 2)
    check(nights, 3, 4, 5, 6, 7)
