# SPDX-License-Identifier: Apache-2.0
"""A machine's processes are killed in a live snapshot, live merge or backup, and another verb follows at once, for
`soak`.

    an operation in a separate process -> kill the worker, QEMU, both, or everything -> any verb, at once
    -> unfinished operations are ended -> every disk is read by a second reader (`plain_reader`) -> the next round

The guest counts on its disk, so an image that lost a write has an older number than the console showed. Three scenes:
`cut-create`, `cut-merge`, `cut-backup`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.harness.plain_reader import read_chain
from tests.vmm.guests.boot_sector import COUNT_LBA, SECTOR, BootOptions
from tests.vmm.small_guests import MIB, console, make_disk, processes
from tests.vmm.stage import machine_stage
from tests.waiting import wait_until
from vhdkit import backups
from vmm.api.export_import import exporting as transfer
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import VmmError
from vmm.processes.worker_connection import MachineRef
from vmm.snapshots.recovery import settle
from vmm.store import registry
from vmm.store.backup_note import has_note
from vmm.store.snapshots.store import holding, load_tree
from vmm.store.state import MachineState

NAME = "small"
_BOOTS = re.compile(r"\[vmm: started|BOOT-OK")
SCENES = ("cut-create", "cut-merge", "cut-backup")
_VICTIMS = (("worker",), ("qemu",), ("worker", "qemu"), ("server",), ("keeper", "worker", "qemu", "server"))
_STATIC = (MIB, 3 * MIB)  # what the guest does not write to
_BEHIND = 3  # ticks that the console may be ahead of the disk
_PATIENCE_SECONDS = 120.0
_MANY = 5  # snapshots, above which one is deleted


def run(scene: str, seconds: float, seed: int = 1, *, kills: int = 0) -> Counter[str]:
    """Kill for that long, and at least that often; returns what was killed, and what came next. Raises
    AssertionError."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhdkit-soak-", dir=_fast())))
        manager = stack.enter_context(machine_stage(folder, stack.enter_context(pytest.MonkeyPatch.context())))
        cut = _Cut(manager, folder, random.Random(f"{scene} {seed}"), scene)
        try:
            return cut.run(seconds, kills)
        except AssertionError as error:
            kept = tempfile.mkdtemp(prefix="vhdkit-soak-kept-")
            shutil.copytree(folder, kept, dirs_exist_ok=True, symlinks=True)
            events = [f"{one.name} {one.details.get('problem', '')}" for one in manager.events(NAME)[-25:]]
            error.add_note(f"{scene}, seed {seed}: {cut.summary}; kept in {kept}; events {events}")
            raise


def _fast() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class _Cut:
    """One machine, and the expected state of it."""

    def __init__(self, manager: Manager, folder: Path, rng: random.Random, scene: str) -> None:
        self._manager, self._folder, self._rng = manager, folder, rng
        self._operation = scene.removeprefix("cut-")
        self._number = 0
        self.summary = ""
        leaf = make_disk(folder, NAME, BootOptions(print_every=1, write_every=1))
        with vhdkit.open_disk(leaf, writable=True) as disk:
            disk.write(_STATIC[0], rng.randbytes(_STATIC[1] - _STATIC[0]))
        manager.create(
            NAME, disks=[DiskRequest(str(leaf))], memory_bytes=16 * MIB, accelerator="tcg", background_capture=True
        )
        self._static = read_chain(_leaf(), *_STATIC)
        self._states: dict[str, str] = {}

    def run(self, seconds: float, kills: int) -> Counter[str]:
        """See `run`."""
        tally: Counter[str] = Counter()
        end = time.monotonic() + seconds
        while time.monotonic() < end or tally.total() < kills:
            victims, verb = self._rng.choice(_VICTIMS), self._rng.choice(list(self._verbs()))
            self.summary = f"{'+'.join(victims)} in {self._operation}, then {verb}"
            self._round(victims, verb)
            tally[self.summary] += 1
        return tally

    def _round(self, victims: tuple[str, ...], verb: str) -> None:
        self._prepare()
        command = self._begin()
        time.sleep(self._rng.uniform(0, 0.6))  # the moment of the kills
        booted = len(_BOOTS.findall(console(self._manager)))
        living = processes(NAME)
        for part in victims:
            if part in living:
                living[part].send(signal.SIGKILL)
        for part in victims:
            if part in living:
                living[part].wait(_PATIENCE_SECONDS)
        ticks = self._ticks()
        if self._rng.random() < 0.7:
            os.kill(command, signal.SIGKILL)  # otherwise it continues alongside what comes next
        with contextlib.suppress(VmmError):
            self._verbs()[verb]()
        os.waitpid(command, 0)
        self._put_away()
        with self._settled():
            is_same = booted == len(_BOOTS.findall(console(self._manager)))
            # What a guest has not flushed does not outlive QEMU and the server, as after a power cut.
            if verb != "apply" and is_same and not {"qemu", "server"} <= set(victims):
                self._check_count(ticks)
            self._look()

    # -- what is done ------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Start it, wait until its guest counts, and make something to merge."""
        small = self._manager.snapshots(NAME)
        names = [one.name for one in small.tree().snapshots.values()]
        for name in names[: max(0, len(names) - _MANY)]:
            small.delete(name)
        if self._operation == "merge":
            for _ in range(2):
                self._number += 1
                small.create(f"m{self._number}")
                with vhdkit.open_disk(_leaf(), writable=True) as disk:  # the same again: so that a merge has work
                    disk.write(_STATIC[0], self._static)
            small.delete(f"m{self._number}")
        with self._settled():
            self._look()
        self._manager.start(NAME)
        wait_until(lambda: self._ticks() > 3, "the guest counts", _PATIENCE_SECONDS)

    def _begin(self) -> int:
        self._number += 1
        number = self._number
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            with contextlib.suppress(BaseException):
                manager = Manager()
                if self._operation == "create":
                    manager.snapshots(NAME).create(f"n{number}")
                elif self._operation == "merge":
                    manager.snapshots(NAME).merge_live(max_rate_bytes=4 * MIB)
                else:
                    manager.save_night(NAME, str(self._folder / "repo"))
            os._exit(0)
        return child

    def _verbs(self) -> dict[str, Callable[[], object]]:
        manager, small = self._manager, self._manager.snapshots(NAME)
        tree = load_tree(registry.load(NAME).paths)
        one = self._rng.choice([one.name for one in tree.snapshots.values()] or ["none"])
        target = str(self._folder / f"target-{self._number}")
        return {
            "delete": lambda: small.delete(one),
            "delete subtree": lambda: small.delete(one, subtree=True),
            "create": lambda: small.create(f"v{self._number}"),
            "apply": lambda: small.apply(one, discard_current=True),
            "merge": small.merge,
            "merge live": small.merge_live,
            "limit": lambda: small.set_limit(40),
            "backup": self._checked_night,
            "export": lambda: transfer.export(NAME, target, flat=True),
            "disks": lambda: manager.disks(NAME),
            "show": lambda: manager.show(NAME),
            "set": lambda: manager.set(NAME, notes=str(self._number)),
            "start": lambda: manager.start(NAME),
            "stop": lambda: manager.stop(NAME),
        }

    def _checked_night(self) -> None:
        """A backup, whose static part is the machine's."""
        night = self._manager.save_night(NAME, str(self._folder / "repo")).night
        copy = self._folder / f"restored-{self._number}.vhd"
        backups.restore(self._folder / "repo", f"{NAME}@{night}", copy, disks=["disk-0"])
        found = read_chain(str(copy), *_STATIC)
        copy.unlink()
        assert found == self._static, "the backup reads otherwise"

    # -- what must be true -------------------------------------------------------------------------------------------

    def _ticks(self) -> int:
        """The guest's last number since it booted, as far as it has printed it."""
        said = _BOOTS.split(console(self._manager))[-1]
        return max((int(one) for one in re.findall(r"tick (\d+)\r?\n", said)), default=0)

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """No operation is unfinished, and no merge in the background changes anything during the check."""
        self._manager.disks(NAME)
        paths = registry.load(NAME).paths
        with holding(paths, NAME) as held:
            settle(held)
            assert load_tree(paths).journal is None and not has_note(paths), "an operation is unfinished"
            yield

    def _put_away(self) -> None:
        """It is off, and no process of it is left."""
        runtime = MachineRef.of(NAME).runtime.folder

        def is_off() -> bool:
            with contextlib.suppress(VmmError):
                if self._manager.state(NAME) not in (MachineState.OFF, MachineState.SAVED):
                    self._manager.stop(NAME)
                return not os.path.exists(runtime)
            return False

        wait_until(is_off, "it is off", _PATIENCE_SECONDS)
        if self._manager.state(NAME) is MachineState.SAVED:
            self._manager.discard_saved(NAME)

    def _check_count(self, ticks: int) -> None:
        """The disk has the guest's last writes: its counter is not behind the console's."""
        at = COUNT_LBA * SECTOR
        found = int.from_bytes(read_chain(_leaf(), at, at + SECTOR)[:4], "little")
        printed = max(ticks, self._ticks())
        assert found >= printed - _BEHIND, f"the disk counts to {found}, the guest printed {printed}"

    def _look(self) -> None:
        """Every state reads as before with the second reader, and no unknown files are left."""
        tree = load_tree(registry.load(NAME).paths)
        assert read_chain(_leaf(), *_STATIC) == self._static, "the disk reads otherwise"
        states = {}
        for one in tree.snapshots.values():
            states[one.id] = hashlib.sha256(read_chain(one.disks["disk-0"])).hexdigest()
            assert self._states.get(one.id, states[one.id]) == states[one.id], f"{one.name} reads otherwise"
            if one.memory_bytes is not None:
                assert os.stat(f"{one.folder}/{one.id}.bin").st_size == one.memory_bytes
        self._states = states
        known = {os.path.basename(one) for one in (*tree.images, *tree.frozen(), _leaf())}
        there = {one.name for one in self._folder.iterdir() if one.suffix in (".vhd", ".avhd")}
        assert there <= known | {f"{NAME}.vhd", f"{NAME}.avhd"}, f"unknown files: {there - known}"
        for parent in {os.path.dirname(one.folder) for one in tree.snapshots.values()}:
            assert set(os.listdir(parent)) == set(tree.snapshots), "a folder without a snapshot is left"


def _leaf() -> str:
    return str(registry.load(NAME).spec.disks[0].path)
