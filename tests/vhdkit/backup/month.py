# SPDX-License-Identifier: Apache-2.0
"""A month of a machine with two disks: one is served and written to by a client, one is a file that no program holds.

Each night some of these happen, as a seed draws them: writes, snapshots, merges, a larger disk, a disk that is taken
back in time, the death of the server. Then both disks are frozen and saved, and sometimes nights are pruned, restored
or copied to a second repository. Whatever works on a repository runs in a process of its own, which may be killed at a
drawn call that changes a file. The content of each night is recorded when it is frozen.

A machine of vmm is another way to change and to freeze disks: give `Month` other `Machine`s.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any, Protocol

import vhdkit
from tests.harness.folder_power import cut_in_process
from tests.harness.killing import killed_at
from tests.nbd_client import FLUSH, WRITE, Client
from tests.servers import Server, read_ready, start_server
from tests.vhdkit.backup.sources import MACHINE, content_of, facts, numbers_in
from vhdkit import errors
from vhdkit.backup.copying import copy_repository
from vhdkit.backup.journal import read_journal
from vhdkit.backup.keep import KeepRules
from vhdkit.backup.night import FrozenDisk, Wishes, writing
from vhdkit.backup.pruning import prune
from vhdkit.backup.repository import PRUNE_FILE, create_repository, open_repository
from vhdkit.backup.restore import restore
from vhdkit.backup.verify import verify
from vhdkit.chain.engine.chain import Chain
from vhdkit.serve.control.client import ControlClient
from vhdkit.units import KIB, MIB, SECTOR_SIZE

SIZE = 2 * MIB
_MOST_CALLS = 120  # of a night or a prune: a kill that is drawn later does not happen


class Machine(Protocol):
    """A disk as a guest and its administrator use it. `content` is what it reads."""

    disk_id: str
    content: bytearray

    def write(self, offset: int, data: bytes) -> None:
        """Write as the guest does."""
        ...

    def freeze(self) -> str:
        """Let writes go on in a new child; the path of the frozen image."""
        ...

    def disturb(self, rng: random.Random) -> str:
        """Do something that an administrator does, and say what."""
        ...

    def read(self) -> bytes:
        """What the guest reads."""
        ...

    def lose_power(self) -> None:
        """End what runs, and start it again with the files that are there now."""
        ...

    def close(self) -> None:
        """End what runs."""
        ...


@dataclass
class FileDisk:
    """A disk that no program holds."""

    folder: Path
    disk_id: str
    content: bytearray = field(default_factory=lambda: bytearray(SIZE))
    frozen: dict[str, bytes] = field(default_factory=dict)  # what the layers below the leaf read, by path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.leaf = str(self.folder / "disk.vhd")
        vhdkit.create_image(self.leaf, SIZE, block_size_bytes=512 * KIB)

    def layers(self) -> list[str]:
        """The paths of the chain, leaf first."""
        with vhdkit.open_disk(self.leaf) as disk:
            return [layer.store.name for layer in disk.chain.layers]

    def write(self, offset: int, data: bytes) -> None:
        """See `Machine.write`."""
        with vhdkit.open_disk(self.leaf, writable=True) as disk:
            disk.write(offset, data)
        self.content[offset : offset + len(data)] = data

    def freeze(self) -> str:
        """See `Machine.freeze`."""
        frozen, self.leaf = self.leaf, vhdkit.snapshot(self.leaf)
        self.frozen[frozen] = bytes(self.content)
        return frozen

    def disturb(self, rng: random.Random) -> str:
        """See `Machine.disturb`."""
        layers = self.layers()
        what = rng.choice(["snapshot", "merge", "merge", "grow", "apply"])
        if what == "snapshot":
            self.freeze()
        elif what == "merge" and len(layers) > 2:
            at = rng.randrange(1, len(layers) - 1)
            vhdkit.merge(layers[at], into=layers[at + 1], relink_children=True)
            self.frozen[layers[at + 1]] = self.frozen.pop(layers[at])
        elif what == "grow":
            self.content += bytes(MIB)
            vhdkit.resize(self.leaf, len(self.content))
        elif what == "apply" and len(layers) > 1:  # what came after it is given up
            at = rng.randrange(1, len(layers))
            for path in layers[:at]:
                os.unlink(path)
                self.frozen.pop(path, None)
            self.content = bytearray(self.frozen[layers[at]])
            self.leaf = vhdkit.snapshot(layers[at])
        return what

    def read(self) -> bytes:
        """See `Machine.read`."""
        with vhdkit.open_disk(self.leaf) as disk:
            return disk.read(0, disk.size_bytes)

    def lose_power(self) -> None:
        """See `Machine.lose_power`: nothing runs."""

    def close(self) -> None:
        """See `Machine.close`."""


@dataclass
class ServedDisk:
    """A disk that is served, with one client."""

    folder: Path
    disk_id: str
    content: bytearray = field(default_factory=lambda: bytearray(SIZE))
    held: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.leaf = str(self.folder / "disk.vhd")
        vhdkit.create_image(self.leaf, SIZE, block_size_bytes=512 * KIB)
        self._start()

    def _start(self) -> None:
        place = self.folder / "disk.sock"
        words = (self.leaf, "--control", self.folder / "disk.ctl", "--socket", place, "--follow-leaf")
        process = start_server(*words, cwd=self.folder, env={})
        self.server = Server(process, read_ready(process))
        self._connect(place)

    def _connect(self, place: Path) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(place))
        self.client = self.held.enter_context(Client(sock))
        self.client.greet()
        self.client.go()

    def _call(self, method: str, **params: Any) -> Any:
        with ControlClient(self.folder / "disk.ctl", timeout_seconds=60) as control:
            return control.call(method, **params)

    def _export(self) -> dict[str, Any]:
        [export] = self._call("status")["exports"]
        return dict(export)

    def layers(self) -> list[str]:
        """The paths of the chain, leaf first."""
        return [os.path.join(self.folder, one["path"]) for one in self._export()["layers"]]

    def write(self, offset: int, data: bytes) -> None:
        """See `Machine.write`."""
        assert not self.client.call(WRITE, offset, len(data), payload=data).error
        self.content[offset : offset + len(data)] = data

    def freeze(self) -> str:
        """See `Machine.freeze`."""
        [row] = self._call("snapshot")["snapshots"]
        self.leaf = os.path.join(self.folder, row["leaf"])
        return os.path.join(self.folder, row["frozen"])

    def disturb(self, rng: random.Random) -> str:
        """See `Machine.disturb`."""
        layers, what = self.layers(), rng.choice(["snapshot", "merge", "merge", "grow", "die"])
        if what == "snapshot":
            self.freeze()
        elif what == "merge" and len(layers) > 2:
            at, name = rng.randrange(len(layers) - 1), self._export()["name"]
            layer = layers[at] if at else None
            try:
                self._call("merge", export=name, layer=layer, into=layers[at + 1], max_rate_bytes=None)
            except errors.InvalidArgument as error:
                assert "another size" in error.problem  # such layers are merged when the disk is not served
        elif what == "grow":
            self.content += bytes(MIB)
            name = self._export()["name"]
            self._call("resize", export=name, size_bytes=len(self.content), shrink=False, under_clients=True)
            self.held.close()
            self._connect(self.folder / "disk.sock")
        elif what == "die":
            assert not self.client.call(FLUSH).error
            self.close()
            self.leaf = layers[0]
            self._start()
        return what

    def read(self) -> bytes:
        """See `Machine.read`."""
        return self.client.read(0, len(self.content))

    def lose_power(self) -> None:
        """See `Machine.lose_power`."""
        self.close()
        self._start()

    def close(self) -> None:
        """See `Machine.close`."""
        self.held.close()
        self.server.process.kill()
        self.server.process.communicate(timeout=60)


@dataclass
class Month:
    """The machine, its repository, and what every disk of every night must read."""

    folder: Path
    seed: int
    power_fails: bool = False
    machines: list[Machine] = field(default_factory=list)
    nights: dict[int, dict[str, bytes]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)  # what happened, for the message of a failure
    kills: int = 0
    cuts: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.place = self.folder / "month"  # all that a power cut reaches
        self.place.mkdir()
        self.repository, self.copy = self.place / "repository", self.place / "copy"
        self.machines = [ServedDisk(self.place / "served", "a"), FileDisk(self.place / "file", "b")]

    def run(self, count: int) -> None:
        """So many nights."""
        for day in range(count):
            for machine in self.machines:
                for _ in range(self.rng.randrange(4)):
                    offset = self.rng.randrange(len(machine.content) // SECTOR_SIZE - 256) * SECTOR_SIZE
                    machine.write(offset, self.rng.randbytes(self.rng.choice([1, 8, 200]) * SECTOR_SIZE))
                if self.rng.random() < 0.4:
                    self.told.append(f"{day} {machine.disk_id} {machine.disturb(self.rng)}")
            self._night(day)
            if self.rng.random() < 0.3:
                rules = KeepRules(last=self.rng.randrange(1, 5), weekly=1)
                self._perhaps_killed(f"{day} prune", lambda rules=rules: self._prune(rules))  # type: ignore[misc]
            if self.rng.random() < 0.2:
                self._copy(day)
            if self.rng.random() < 0.2:
                self._restore(day)
            self._check(self.repository)
            for machine in self.machines:
                assert machine.read() == machine.content, (machine.disk_id, self.seed, self.told)

    def end(self) -> list[int]:
        """Finish what was interrupted, and check everything; the nights that are left."""
        self._prune(KeepRules(last=20))
        copy_repository(self.repository, self.copy)
        for place in (self.repository, self.copy):
            self._check(place)
            with open_repository(place) as opened, opened.machine(MACHINE) as machine:
                assert verify(machine, again=True).is_good
        return self._live(self.repository)

    def close(self) -> None:
        """End what runs."""
        for machine in self.machines:
            machine.close()

    # -- work -----------------------------------------------------------------------------------------------------

    def _perhaps_killed(self, what: str, work: Callable[[], object]) -> None:
        """Work on a repository, or a part of it; no night of one that existed is missing afterwards."""
        is_ended, number = self.rng.random() < 0.4, self.rng.randrange(1, _MOST_CALLS)
        number = -(-number // 2) if self.power_fails else number  # about half of the calls are boundaries
        before = {place: set(self._live(place)) - self._going(place) for place in (self.repository, self.copy)}
        if is_ended and self.power_fails:
            if ended := cut_in_process(self.place, work, number=number, seed=f"{self.seed} {what}"):
                for machine in self.machines:
                    machine.lose_power()
            self.cuts += ended
        else:
            ended = killed_at(number if is_ended else 1 << 30, work)
            self.kills += ended
        self.told.append(f"{what}{f' ended at {number}' if ended else ''}")
        for place, nights in before.items():
            missing = nights - set(self._live(place))
            assert not missing or "prune" in what or "copy" in what, (place, missing, self.seed, self.told)

    def _night(self, day: int) -> None:
        frozen = [(machine.disk_id, machine.freeze()) for machine in self.machines]
        content = {machine.disk_id: bytes(machine.content) for machine in self.machines}
        before = set(numbers_in(self.repository))
        wishes = Wishes(compare=self.rng.random() < 0.1, full_every=self.rng.choice([None, None, 5]))

        def save() -> None:
            with ExitStack() as held:
                opened = held.enter_context(create_repository(self.repository))
                night = held.enter_context(writing(opened, MACHINE, "web", wishes))
                disks = []
                for disk_id, path in frozen:
                    chain = held.enter_context(Chain.open(path))
                    disks.append(FrozenDisk(disk_id, chain, keeps_layer=True))
                night.save(disks, facts(day))

        self._perhaps_killed(f"{day} night", save)
        for number in set(numbers_in(self.repository)) - before:
            self.nights[number] = content

    def _copy(self, day: int) -> None:
        def copy() -> None:
            copy_repository(self.repository, self.copy)

        self._perhaps_killed(f"{day} copy", copy)
        if self.rng.random() < 0.5:
            copy()
            assert self._live(self.copy) == self._live(self.repository), (self.seed, self.told)
            self._check(self.copy)

    def _prune(self, rules: KeepRules) -> None:
        with open_repository(self.repository) as opened, opened.machine(MACHINE) as machine:
            prune(machine, rules, UTC)

    def _restore(self, day: int) -> None:
        if not (live := self._live(self.repository)):
            return
        number = self.rng.choice(live)
        place = self.place / f"restored-{day}"
        place.mkdir()
        self._perhaps_killed(f"{day} restore", lambda: restore(self.repository, f"web@{number}", place))
        for path in place.iterdir():
            if path.suffix == ".vhd":
                with vhdkit.open_disk(path) as disk:
                    content, about = disk.read(0, disk.size_bytes), (path, self.seed, self.told)
                assert content in self.nights[number].values(), about
        shutil.rmtree(place)

    def images(self) -> Iterator[tuple[Path, bytes]]:
        """The image of each disk of every night that is left, and what it must read."""
        with open_repository(self.repository) as opened, opened.machine(MACHINE) as machine:
            for night in machine.nights():
                for disk in night.manifest.disks if night.manifest is not None and not night.manifest.dropped else ():
                    yield Path(machine.path, disk.image.text), self.nights[night.number][disk.disk_id]

    # -- checking -------------------------------------------------------------------------------------------------

    def _live(self, repository: Path) -> list[int]:
        if not numbers_in(repository):
            return []
        with open_repository(repository) as opened, opened.machine(MACHINE) as machine:
            return [one.number for one in machine.nights() if one.manifest is not None and not one.manifest.dropped]

    def _going(self, repository: Path) -> set[int]:
        """The nights that are dropped next, because a prune of them was interrupted."""
        if not numbers_in(repository):
            return set()
        with open_repository(repository) as opened, opened.machine(MACHINE) as machine:
            journal = read_journal(machine)
            return set() if journal is None else set(journal.nights)

    def _check(self, repository: Path) -> None:
        """Every night reads as it was recorded, by the names in its images and, unless a prune was interrupted, by the
        manifests.
        """
        for number in self._live(repository):
            with open_repository(repository) as opened, opened.machine(MACHINE) as machine:
                manifest = machine.require_night(number)
                path, is_whole = machine.path, not machine.folder.exists(PRUNE_FILE)
            for disk in manifest.disks:
                content, about = self.nights[number][disk.disk_id], (number, disk.disk_id, self.seed, self.told)
                with vhdkit.open_disk(os.path.join(path, disk.image.text)) as image:
                    assert image.read(0, image.size_bytes) == content, about
                assert not is_whole or content_of(repository, number, disk.disk_id) == content, about
