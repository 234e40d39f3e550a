# SPDX-License-Identifier: Apache-2.0
"""A month of a machine: nights in two repositories, snapshots, disks that come, go and grow, and kills in between."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
import vmm
from tests.harness.killing import killed_at
from tests.support import daily_or_nightly
from tests.vmm import nights
from tests.vmm.snapshots.machines import DISK_BYTES, Machines
from vhdkit import backups
from vmm.model.errors import VmmError
from vmm.snapshots.recovery import settle
from vmm.store import registry
from vmm.store.snapshots.store import holding, load_tree

Disks = dict[str, str]  # disk id -> the hash of its content
_MOST_CALLS = 120  # a night makes about so many changes of files
_PIECE = 4096


class Month:
    """A machine, and what it and each of its nights and snapshots must hold."""

    def __init__(self, machines: Machines, seed: int) -> None:
        self.machines = machines
        self.rng = random.Random(seed)
        self.manager = vmm.Manager()
        self.web = machines.create(disks=2)
        self.nights: dict[str, dict[int, Disks]] = {"a": {}, "b": {}}
        self.snapshots: dict[str, Disks] = {}
        self.let_go: dict[str, str] = {}  # images of removed disks, and their content
        self.number = 0
        self.now = self.read()

    def read(self) -> Disks:
        """What the machine's disks hold."""
        return {one.id: nights.content_of(str(one.path)) for one in registry.load("web").spec.disks}

    def killed(self, work: Callable[[], object]) -> bool:
        """Do it, or kill it at some change of a file; True if it was killed."""
        if self.rng.random() < 0.5:
            with contextlib.suppress(VmmError):
                work()
            return False

        def quietly() -> None:
            with contextlib.suppress(VmmError, vhdkit.VhdkitError):
                work()

        died = killed_at(self.rng.randrange(1, _MOST_CALLS), quietly)
        with holding(registry.load("web").paths, "web") as held:
            settle(held)
        return died

    # -- steps -------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """The guest writes, to all disks or to one."""
        spec = registry.load("web").spec
        for disk in self.rng.sample(spec.disks, self.rng.randrange(1, len(spec.disks) + 1)):
            with vhdkit.open_disk(str(disk.path), writable=True) as opened:
                for _ in range(self.rng.randrange(1, 6)):
                    offset = self.rng.randrange(opened.size_bytes // _PIECE) * _PIECE
                    opened.write(offset, self.rng.randbytes(_PIECE) if self.rng.random() < 0.8 else bytes(_PIECE))
        self.now = self.read()

    def night(self) -> None:
        """A night in one of the repositories."""
        name = self.rng.choice("ab")
        repo, known = self.machines.folder / name, self.nights[name]
        wishes = vmm.BackupWishes(compare=self.rng.random() < 0.1, full_every=self.rng.choice([None, None, 3]))
        died = self.killed(lambda: self.manager.save_night("web", str(repo), wishes))
        new = [one for one in self.numbers(name) if one not in known]
        assert len(new) == 1 or (died and not new), "a night is missing, or there is one too many"
        known.update({one: dict(self.now) for one in new})

    def drop(self) -> None:
        """A night that is not the newest is deleted."""
        name = self.rng.choice("ab")
        numbers = self.numbers(name)
        if len(numbers) < 2:
            return
        number = self.rng.choice(numbers[:-1])

        def delete() -> None:
            with (
                backups.open_repository(self.machines.folder / name) as repository,
                repository.machine(registry.load("web").spec.id) as machine,
            ):
                backups.delete(machine, number)

        self.killed(delete)
        if number not in self.numbers(name):
            del self.nights[name][number]

    def snapshot(self) -> None:
        """A snapshot is taken."""
        self.number += 1
        self.killed(lambda: self.web.create(f"s{self.number}"))
        for one in load_tree(registry.load("web").paths).snapshots.values():
            self.snapshots.setdefault(one.name, dict(self.now))

    def apply(self) -> None:
        """A snapshot is applied; disks that it does not have stay as they are."""
        if not self.snapshots:
            return
        name = self.rng.choice(list(self.snapshots))
        before = {one.id: str(one.path) for one in registry.load("web").spec.disks}
        self.killed(lambda: self.web.apply(name, discard_current=True))
        after = self.read()
        assert after in (self.now, self.snapshots[name])
        if after != self.now:
            gone = set(before) - set(after)
            self.let_go.update({before[one]: self.now[one] for one in gone if self.is_in_no_snapshot(one)})
        self.now = dict(after)

    def is_in_no_snapshot(self, disk: str) -> bool:
        """Whether no snapshot has a state of this disk."""
        return all(disk not in one for one in self.snapshots.values())

    def delete(self) -> None:
        """A snapshot is deleted."""
        if self.snapshots:
            name = self.rng.choice(list(self.snapshots))
            self.killed(lambda: self.web.delete(name))
            left = {one.name for one in load_tree(registry.load("web").paths).snapshots.values()}
            self.snapshots = {one: disks for one, disks in self.snapshots.items() if one in left}

    def merge(self) -> None:
        """Due merges are made."""
        self.killed(lambda: self.machines.merge("web"))

    def forget(self) -> None:
        """Nothing is kept for one of the repositories, or for both."""
        word = self.rng.choice([None, *(str(self.machines.folder / one) for one in "ab")])
        self.killed(lambda: self.manager.forget_nights("web", word))

    def grow(self) -> None:
        """A disk grows."""
        disk = self.rng.choice(registry.load("web").spec.disks)
        with vhdkit.open_disk(str(disk.path)) as opened:
            size = opened.size_bytes
        if size < 4 * DISK_BYTES and not self.snapshots:
            self.killed(lambda: self.manager.resize_disk("web", disk.id, size + DISK_BYTES // 2))
            self.now = self.read()

    def plug(self) -> None:
        """A disk is added."""
        if len(registry.load("web").spec.disks) < 4:
            self.number += 1
            path = self.machines.disk(f"added-{self.number}.{self.machines.kind}")
            self.manager.add_disk("web", vmm.DiskRequest(str(path)))
            self.now = self.read()

    def unplug(self) -> None:
        """A disk is removed; its image stays as it is."""
        disks = registry.load("web").spec.disks
        if len(disks) > 1:
            disk = self.rng.choice(disks[1:])
            died = self.killed(lambda: self.manager.remove_disk("web", disk.id))
            there = {one.id for one in registry.load("web").spec.disks}
            assert disk.id not in there or died
            if disk.id not in there:
                self.let_go[str(disk.path)] = self.now.pop(disk.id)

    # -- what must be true -------------------------------------------------------------------------------------------

    def numbers(self, name: str) -> list[int]:
        """The nights that a repository has."""
        with (
            contextlib.suppress(vhdkit.NotFound, backups.DamagedRepository),
            backups.open_repository(self.machines.folder / name) as repository,
            repository.machine(registry.load("web").spec.id) as machine,
        ):
            return [one.number for one in machine.nights() if one.manifest is None or not one.manifest.dropped]
        return []

    def check(self) -> None:
        """The machine, its snapshots and the images of removed disks read as they should."""
        assert self.read() == self.now
        for name, disks in self.snapshots.items():
            assert self.machines.of_snapshot("web", name).keys() == disks.keys()
            found = {disk: nights.content_of(path) for disk, path in self.web.find(name).disks.items()}
            assert found == disks, f"the snapshot {name} reads otherwise"
        for path, content in self.let_go.items():
            assert os.path.exists(path) and nights.content_of(path) == content, f"{path} was changed or removed"

    def check_nights(self) -> None:
        """Every night reads as the machine did."""
        for name, known in self.nights.items():
            assert self.numbers(name) == sorted(known)
            for number, disks in known.items():
                with backups.open_repository(self.machines.folder / name) as repository:
                    word = f"{registry.load('web').spec.id}@{number}"
                    assert repository.id and nights.restored(self.machines.folder / name, word) == disks


STEPS = {
    "write": 6, "night": 8, "drop": 2, "snapshot": 3, "apply": 2, "delete": 3, "merge": 3, "forget": 1, "grow": 1,
    "plug": 1, "unplug": 1,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 12)))
def test_a_month(machines: Machines, seed: int) -> None:
    """INV-NIGHT-WHOLE, INV-MARK-TRUE: whatever happens between nights, and wherever anything is killed, every night,
    every snapshot, the machine itself and the images of removed disks hold what they should."""
    month = Month(machines, seed)
    done = list[str]()
    try:
        for number in range(daily_or_nightly(25, 120)):
            step = month.rng.choices(list(STEPS), list(STEPS.values()))[0]
            done.append(step)
            getattr(month, step)()
            month.check()
            if number % 10 == 9:
                month.check_nights()
        month.check_nights()
    except BaseException as error:
        error.add_note(f"seed {seed}, after {' '.join(done)}")
        raise
    assert Path(machines.folder).exists()
