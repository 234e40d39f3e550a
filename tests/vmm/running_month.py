# SPDX-License-Identifier: Apache-2.0
"""A month of a machine that runs: a guest counts on the first disk all the time, a client writes to the second one.

Each day some of these happen, as a seed draws them: writes, snapshots, applied and deleted ones, merges, a larger
disk, a pause, a machine that is switched off and on. Then comes a night, and sometimes a prune, a restore or a copy of
the repository. Whatever works on a repository runs in a process of its own. At a drawn call of it that changes a file,
that process dies, or it kills processes of the machine and goes on, or both: everything dies at once.

What a night must read is recorded when its disks have been frozen: of the first disk what the frozen image shows, of
the second one what was written. Must not know how nights are made.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC
from hashlib import sha256
from pathlib import Path

import vhdkit
from tests.harness.killing import KILLED, killed_at
from tests.nbd_client import FLUSH, WRITE, Client
from tests.vmm import nights
from tests.vmm.guests.boot_sector import BootOptions
from tests.vmm.small_guests import MIB, console, kill_together, make_disk, make_machine, processes, wait_whole
from tests.waiting import wait_until
from vhdkit import backups
from vhdkit.backup.journal import read_journal
from vmm.api.backups import BackupWishes
from vmm.api.manager import DiskRequest, Manager
from vmm.host.proc import ProcessRef
from vmm.model.errors import VmmError
from vmm.processes.worker_connection import MachineRef
from vmm.store.state import MachineState

NAME, SECOND = "small", "disk-1"
_PIECE = 4096
_MOST_CALLS = 150  # a night makes about so many changes of files
_NEVER = 1 << 30
_MOST_BYTES = 14 * MIB

Disks = dict[str, str]  # disk id -> the hash of its content


@dataclass
class RunningMonth:
    """The machine, its repository and a copy of it, and what every disk of every night must read."""

    manager: Manager
    folder: Path
    seed: int
    kind: str = "vhd"
    nights: dict[int, Disks] = field(default_factory=dict)
    snapshots: dict[str, bytes] = field(default_factory=dict, repr=False)  # what the second disk read
    content: bytearray = field(default_factory=bytearray, repr=False)  # of the second disk
    said: list[str] = field(default_factory=list)  # what happened, for the message of a failure
    strikes: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.repository, self.copy = self.folder / "repository", self.folder / "copy"
        options = BootOptions(print_every=4, write_every=4)
        self.leaf = make_machine(self.manager, self.folder, kind=self.kind, options=options)
        second = make_disk(self.folder, "second", kind=self.kind)
        with vhdkit.open_disk(second) as disk:
            self.content = bytearray(disk.read(0, disk.size_bytes))
        self.manager.add_disk(NAME, DiskRequest(str(second), controller="virtio"))
        self.manager.start(NAME)
        wait_talking(self.manager)

    def run(self, days: int) -> None:
        """So many days and nights."""
        try:
            for day in range(days):
                for step in self.rng.sample(list(_STEPS), self.rng.randrange(3)):
                    self.said.append(f"{day} {step}")
                    getattr(self, step)()
                    self.check()
                self.write()
                self.said.append(f"{day} night")
                self.night()
                for step, chance in (("prune", 0.25), ("copy_nights", 0.2), ("restore", 0.2), ("strike", 0.1)):
                    if self.rng.random() < chance:
                        self.said.append(f"{day} {step}")
                        getattr(self, step)()
                self.check()
                if day % 10 == 9:
                    self.check_nights()
        except BaseException as error:
            error.add_note(f"seed {self.seed}, after {', '.join(self.said)}")
            raise

    # -- the guest -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """A client of the second disk."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(MachineRef.of(NAME).runtime.nbd)
            with Client(sock) as client:
                client.greet()
                yield client.go(SECOND)

    def write(self) -> None:
        """The guest writes to its second disk, and goes on counting on the first one."""
        with self.client() as client:
            for _ in range(self.rng.randrange(1, 5)):
                offset = self.rng.randrange(len(self.content) // _PIECE - 16) * _PIECE
                data = self.rng.randbytes(_PIECE * self.rng.choice([1, 1, 16]))
                assert not client.call(WRITE, offset, len(data), payload=data).error
                self.content[offset : offset + len(data)] = data
            assert not client.call(FLUSH).error
        wait_talking(self.manager)

    # -- the administrator -----------------------------------------------------------------------------------------

    def snapshot(self) -> None:
        """A snapshot is taken while it runs."""
        name = f"s{len(self.said)}"
        self.manager.snapshots(NAME).create(name)
        self.snapshots[name] = bytes(self.content)

    def apply(self) -> None:
        """A snapshot is applied: the machine is taken back in time."""
        if self.snapshots:
            name = self.rng.choice(list(self.snapshots))
            self.manager.stop(NAME)
            self.manager.snapshots(NAME).apply(name, discard_current=True)
            self.content = bytearray(self.snapshots[name])
            self.start()

    def delete(self) -> None:
        """A snapshot is deleted."""
        if self.snapshots:
            name = self.rng.choice(list(self.snapshots))
            self.manager.snapshots(NAME).delete(name)
            del self.snapshots[name]

    def merge(self) -> None:
        """Due merges are made while it runs."""
        self.manager.snapshots(NAME).merge_live()

    def grow(self) -> None:
        """The second disk grows."""
        if len(self.content) < _MOST_BYTES and not self.snapshots:
            size = self.manager.resize_disk(NAME, SECOND, len(self.content) + 2 * MIB)
            self.content += bytes(size - len(self.content))

    def forget(self) -> None:
        """Nothing is kept for the next night."""
        self.manager.forget_nights(NAME)

    def pause(self) -> None:
        """It is paused for a night."""
        self.manager.pause(NAME)
        self.night()
        if self.manager.state(NAME) is MachineState.PAUSED:
            self.manager.resume(NAME)

    def off(self) -> None:
        """It is off for a night."""
        self.manager.stop(NAME)
        self.night(is_off=True)
        self.start()

    def start(self) -> None:
        """It runs again."""
        self.manager.start(NAME)
        wait_talking(self.manager)

    # -- work on a repository ------------------------------------------------------------------------------------

    def night(self, *, is_off: bool = False) -> None:
        """A night."""
        wishes = BackupWishes(compare=self.rng.random() < 0.1, full_every=self.rng.choice([None, None, 5]))
        place, before, going = self.folder / "recorded.json", set(self.numbers()), self.going()
        place.unlink(missing_ok=True)

        def save() -> None:
            with nights.recorded(lambda: place.write_text(json.dumps(found[-1]))) as found:
                self.manager.save_night(NAME, str(self.repository), wishes)

        self.perhaps_struck(save, is_off=is_off)
        new = set(self.numbers()) - before
        assert before - going <= set(self.numbers()) and len(new) <= 1
        if new:
            recorded = json.loads(place.read_text())
            assert recorded[SECOND] == sha256(self.content).hexdigest(), "the frozen image is not what was written"
            self.nights[new.pop()] = recorded

    def prune(self) -> None:
        """Nights go."""
        rules = backups.KeepRules(last=self.rng.randrange(1, 5), weekly=1)

        def prune() -> None:
            with (
                backups.open_repository(self.repository) as repository,
                repository.machine(repository.find_machine(NAME)) as machine,
            ):
                backups.prune(machine, rules, UTC)

        newest = max(self.numbers(), default=0)
        self.perhaps_struck(prune)
        assert newest in [0, *self.numbers()], "the newest night is gone"

    def copy_nights(self) -> None:
        """The nights are copied."""

        def copy() -> None:
            backups.copy_repository(self.repository, self.copy)

        if self.numbers():
            self.perhaps_struck(copy)
            if self.rng.random() < 0.5:
                copy()
                assert self.numbers(self.copy) == self.numbers()
                self.check_nights(self.copy)

    def restore(self) -> None:
        """A night is restored to a folder."""
        if numbers := self.numbers():
            number = self.rng.choice(numbers)

            def restore() -> None:
                assert nights.restored(self.repository, f"{NAME}@{number}") == self.nights[number]

            self.perhaps_struck(restore)

    def strike(self) -> None:
        """Processes of the machine die while nothing works on a repository."""
        victims = {part: ref for part, ref in processes().items() if self.rng.random() < 0.6}
        kill_together(victims.values())
        self.settle(victims)

    def perhaps_struck(self, work: Callable[[], object], *, is_off: bool = False) -> None:
        """Do the work in a process of its own; something may die at a drawn call of it that changes a file."""

        def quietly() -> None:
            with contextlib.suppress(VmmError, vhdkit.VhdkitError):
                work()

        if self.rng.random() < 0.5:
            assert not killed_at(_NEVER, work)
            return
        living = {} if is_off else processes()
        everything, dies = self.rng.random() < 0.3, self.rng.random() < 0.5
        victims = {part: ref for part, ref in living.items() if everything or self.rng.random() < 0.4}
        self.said[-1] += f" ({' '.join([*victims, *(['command'] if dies or everything or not victims else [])])}"

        struck = self.folder / "struck"
        struck.unlink(missing_ok=True)

        def strike() -> None:
            struck.touch()
            kill_together(victims.values())
            if dies or everything or not victims:
                os._exit(KILLED)

        number = round(_MOST_CALLS ** self.rng.random())
        killed_at(number, quietly, strike=strike)
        self.said[-1] += f" at {number})" if struck.exists() else " never)"
        if struck.exists():
            self.strikes += 1
            self.settle(victims)

    def settle(self, struck: dict[str, ProcessRef]) -> None:
        """The machine runs again after these were killed."""
        wait_until(lambda: not any(ref.is_alive() for ref in struck.values()), "they are dead")
        if "qemu" in struck:
            wait_until(lambda: self.manager.state(NAME) is MachineState.OFF, "it is off")
            self.start()
        elif struck:
            self.manager.state(NAME)  # if those that watch each other died together, the next command starts them
            wait_whole(but=struck)

    # -- what must be true -----------------------------------------------------------------------------------------

    def numbers(self, repository: Path | None = None) -> list[int]:
        """The nights that a repository has."""
        with contextlib.suppress(vhdkit.NotFound, backups.DamagedRepository):
            return [one.night for one in self.manifests(repository or self.repository)[1]]
        return []

    def going(self) -> set[int]:
        """The nights that the next one drops, because a prune of them was interrupted."""
        with (
            contextlib.suppress(vhdkit.NotFound),
            backups.open_repository(self.repository) as opened,
            opened.machine(opened.find_machine(NAME)) as machine,
        ):
            journal = read_journal(machine)
            return set() if journal is None else set(journal.nights)
        return set()

    def manifests(self, repository: Path) -> tuple[str, list[backups.Manifest]]:
        """The machine's folder in a repository, and its nights."""
        with (
            backups.open_repository(repository) as opened,
            opened.machine(opened.find_machine(NAME)) as machine,
        ):
            found = [one.manifest for one in machine.nights()]
            return machine.path, [one for one in found if one is not None and not one.dropped]

    def check(self) -> None:
        """The guest goes on, and its second disk reads as it was written."""
        with self.client() as client:
            assert client.size == len(self.content) and client.read(0, client.size) == self.content
        wait_talking(self.manager)

    def check_nights(self, repository: Path | None = None) -> None:
        """Every night and every snapshot reads as it was recorded."""
        for number in self.numbers(repository):
            assert nights.restored(repository or self.repository, f"{NAME}@{number}") == self.nights[number], number
        for name, content in self.snapshots.items():
            path = self.manager.snapshots(NAME).find(name).disks[SECOND]
            assert nights.content_of(path) == sha256(content).hexdigest(), f"the snapshot {name} reads otherwise"

    def end(self) -> list[tuple[Path, str]]:
        """Finish what was interrupted, look at everything, and switch it off; the image of each disk of every night,
        and the hash of what it must read.
        """
        with (
            backups.open_repository(self.repository) as opened,
            opened.machine(opened.find_machine(NAME)) as machine,
        ):
            backups.finish_interrupted(machine)
            assert backups.verify(machine, again=True).is_good
        backups.copy_repository(self.repository, self.copy)
        self.check_nights()
        self.check_nights(self.copy)
        place, manifests = self.manifests(self.repository)
        return [
            (Path(place, disk.image.text), self.nights[one.night][disk.disk_id])
            for one in manifests
            for disk in one.disks
        ]


_STEPS = ("snapshot", "apply", "delete", "delete", "merge", "grow", "forget", "pause", "off")


def wait_talking(manager: Manager) -> None:
    """Wait until the guest says something: it runs. Its counter begins again with each start."""
    before = console(manager, NAME)
    wait_until(lambda: console(manager, NAME) != before, "the guest goes on")
