# SPDX-License-Identifier: Apache-2.0
"""Prunes that were interrupted: what is done before they are finished is neither lost nor called damaged."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from datetime import UTC
from pathlib import Path

import pytest

from tests.support import daily_or_nightly
from tests.vhdkit.backup.pruned import check, copy, make
from tests.vhdkit.backup.repositories import MACHINE, Nights
from vhdkit import errors
from vhdkit.backup import pruning as module
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.journal import read_journal
from vhdkit.backup.keep import KeepRules
from vhdkit.backup.night import Wishes, writing
from vhdkit.backup.pruning import delete, finish, prune
from vhdkit.backup.renewal import Renewal
from vhdkit.backup.repository import PRUNE_FILE, MachineFolder, create_repository
from vhdkit.backup.restore import restore
from vhdkit.backup.verify import known_results, verify


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """A repository that no test changes."""
    return make(tmp_path_factory.mktemp("original") / "repo")


@pytest.fixture
def nights(original: Nights, tmp_path: Path) -> Nights:
    """A copy of it."""
    return copy(original, tmp_path / "repo")


def interrupted(nights: Nights, monkeypatch: pytest.MonkeyPatch, place: object, name: str, number: int) -> None:
    """Delete a night, and end that where this function would be called."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, nights.machine() as machine:
        patch.setattr(place, name, stop)
        with pytest.raises(KeyboardInterrupt):
            delete(machine, number, newest=True)


def finished(nights: Nights) -> tuple[int, ...]:
    """Finish what was interrupted."""
    with nights.machine() as machine, machine.held("prune"):
        return finish(machine)


def test_a_night_that_is_younger_than_the_journal(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A night that was added on one which an interrupted deletion was about to remove keeps what it stands on."""
    interrupted(nights, monkeypatch, module, "_mark", 7)
    nights.add({"a": {4096: b"new"}, "b": {0: b"new"}}, files={"nvram": b"n"})
    assert finished(nights) == (7,)
    check(nights, 1, 2, 3, 4, 5, 6, 8)


def test_a_night_that_is_protected_meanwhile(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A night that an interrupted deletion has not dropped yet can still be protected, and stays then."""
    interrupted(nights, monkeypatch, module, "_mark", 4)
    with nights.machine() as machine, machine.held("protect"):
        night = machine.night(4)
        assert night is not None and night.manifest is not None
        machine.write_manifest(replace(night.manifest, protected=True), replace=True)
    assert finished(nights) == ()
    check(nights, 1, 2, 3, 4, 5, 6, 7)


def test_a_manifest_that_is_damaged_meanwhile(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a manifest cannot be read, an interrupted prune is not finished either: its night may need anything."""
    interrupted(nights, monkeypatch, module, "_remove_images", 6)
    path = nights.path / "machines" / MACHINE / "nights/00007.json"
    raw = path.read_bytes()
    path.write_bytes(raw[:-5])
    with pytest.raises(DamagedRepository, match="night 7 cannot be read"):
        finished(nights)
    path.write_bytes(raw)
    finished(nights)
    check(nights, 1, 2, 3, 4, 5, 7)


@pytest.mark.parametrize("place", [(module, "_mark"), (Renewal, "after"), (Renewal, "_write_manifests")], ids=str)
def test_after_an_interruption(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, place: tuple[object, str], tmp_path: Path
) -> None:
    """After an interrupted deletion no kept night counts as damaged, and a restore finishes it and restores."""
    interrupted(nights, monkeypatch, *place, 3)
    with nights.machine() as machine:
        result = verify(machine, again=True)
        assert all(one.is_whole for one in [*result.nights, *known_results(machine, machine.nights())])
        assert bool(result.busy) is (place[0] is Renewal)
    restore(nights.path, "web@4", tmp_path, disks=["a"], kind="raw")
    assert (tmp_path / "web-a.raw").read_bytes() == nights.content[4]["a"]
    check(nights, 1, 2, 4, 5, 6, 7)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_nights_that_have_not_gone_yet(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, count: int, tmp_path: Path
) -> None:
    """If a prune is interrupted between two nights that go, those that are still there are whole, and restored."""
    real, calls = MachineFolder.remove_manifest, [0]

    def some(machine: MachineFolder, number: int) -> None:
        calls[0] += 1
        if calls[0] > count:
            raise KeyboardInterrupt
        real(machine, number)

    with nights.machine() as machine:
        for number in (3, 4, 5, 6):
            delete(machine, number)
        nights.add({"a": {0: b"alone"}, "b": {0: b"alone"}}, on=0)
        monkeypatch.setattr(MachineFolder, "remove_manifest", some)
        with pytest.raises(KeyboardInterrupt):
            prune(machine, KeepRules(last=1), UTC)
        monkeypatch.undo()
        there = [one.number for one in machine.nights()]
        assert len(there) == 4 - count and all(one.is_whole for one in verify(machine, again=True).nights)
    for number in there:
        restore(nights.path, f"web@{number}", tmp_path, disks=["a"], kind="raw")
        assert (tmp_path / "web-a.raw").read_bytes() == nights.content[number]["a"]
        (tmp_path / "web-a.raw").unlink()


PLACES: list[tuple[object, str]] = [
    (module, "_mark"), (module, "_remove_images"), (Renewal, "before"), (Renewal, "after"),
    (Renewal, "_write_manifests"), (module, "_remove_tables"),
]  # fmt: skip


@pytest.mark.parametrize(
    "place",
    [pytest.param(one, marks=[] if one[1] == "after" else [pytest.mark.nightly], id=one[1]) for one in PLACES],
)
def test_a_damaged_journal(nights: Nights, monkeypatch: pytest.MonkeyPatch, place: tuple[object, str]) -> None:
    """Flipped bits in the journal of an interrupted deletion are found by a verification, and no night is blamed for
    them; the deletion is finished by what the files themselves say, and every kept night reads as it must."""
    interrupted(nights, monkeypatch, *place, 3)
    path = nights.path / "machines" / MACHINE / PRUNE_FILE
    raw, rng, kept = path.read_bytes(), random.Random(3), [1, 2, 4, 5, 6, 7]
    saved = nights.path.with_name("saved")
    shutil.copytree(nights.path, saved)
    for _ in range(daily_or_nightly(1, 40)):
        at = rng.randrange(len(raw))
        path.write_bytes(rng.choice([raw[:at], raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(7)]) + raw[at + 1 :]]))
        try:
            read(nights)
        except errors.UnsupportedFormat:  # the number of its format was hit
            continue
        except DamagedRepository:
            with nights.machine() as machine:
                result = verify(machine, again=True)
            assert all(one.is_whole for one in result.nights) and not result.is_good
            assert [one for one, _ in result.damaged] == [os.fspath(path)]
        else:
            continue  # white space
        finished(nights)
        check(nights, *(kept if place[1] != "_mark" else sorted([*kept, 3])))
        copy(Nights(saved, nights.extension, nights.content), nights.path)


def read(nights: Nights) -> None:
    """Read the journal."""
    with nights.machine() as machine:
        read_journal(machine)


def test_a_night_finishes_an_interrupted_prune(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a night is written, what an interrupted prune has left is finished; what cannot be is no obstacle."""
    interrupted(nights, monkeypatch, Renewal, "after", 3)
    with create_repository(nights.path) as repository, writing(repository, MACHINE, "web", Wishes()) as night:
        assert [one.number for one in night.nights] == [1, 2, 4, 5, 6, 7]
    check(nights, 1, 2, 4, 5, 6, 7)
    interrupted(nights, monkeypatch, Renewal, "after", 1)

    def refused(*_: object, **__: object) -> None:
        raise errors.NoSpace("cannot write: No space left on device")

    with monkeypatch.context() as patch, create_repository(nights.path) as repository:
        patch.setattr(module, "finish_merge", refused)
        with writing(repository, MACHINE, "web", Wishes()) as night:
            assert night.number == 8
    finished(nights)
    check(nights, 2, 4, 5, 6, 7)


def test_a_night_that_was_about_to_go(nights: Nights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A night that an interrupted deletion has not dropped yet is restored, not dropped."""
    interrupted(nights, monkeypatch, module, "_mark", 3)
    restore(nights.path, "web@3", tmp_path, disks=["a"], kind="raw")
    assert (tmp_path / "web-a.raw").read_bytes() == nights.content[3]["a"]
    assert finished(nights) == (3,)
