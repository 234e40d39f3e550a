# SPDX-License-Identifier: Apache-2.0
"""A snapshot of a running machine is interrupted, and any other command follows at once, for `soak`.

    `create` in a separate process -> Ctrl-C or SIGKILL to it at a random moment, while the worker continues
    -> at once another command, of any kind -> check -> the next round

The guest counts, and writes its counter to its disk. Each time its disk must be the image that the definition names,
and each snapshot must read as before; sometimes the machine is powered off, and what the guest had written must be on
the disk. The machine is not restored in between.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.vmm.guests.boot_sector import COUNT_LBA, BootOptions
from tests.vmm.small_guests import MIB, PARTS, console, make_disk, processes
from tests.vmm.snapshots.machines import Machines
from tests.vmm.stage import machine_stage
from tests.waiting import wait_until
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import InUse, VmmError
from vmm.model.spec import DiskSpec
from vmm.processes import worker_connection as contact
from vmm.processes.worker_connection import MachineRef
from vmm.store import registry
from vmm.store.snapshots.store import holding
from vmm.store.state import MachineState

NAME = "small"
MANY = 8  # snapshots, above which one is deleted in each round
MEMORY_BYTES = 32 * MIB
_LONGEST_SECONDS = 0.9  # of a snapshot of that much memory, here
_PATIENCE_SECONDS = 90.0
_POWER_OFF_CHANCE = 0.15
_LAG_TICKS = 4  # of the console's number relative to the disk's, in either direction
Verb = Callable[[], object]


def run(seconds: float, seed: int = 1, *, rounds: int = 0) -> Counter[str]:
    """Run for so many seconds, and at least so many rounds; returns how often what came after what. Raises
    AssertionError."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhdkit-soak-")))
        manager = stack.enter_context(machine_stage(folder, stack.enter_context(pytest.MonkeyPatch.context())))
        soak = _Soak(manager, folder, random.Random(seed))
        try:
            return soak.run(seconds, rounds)
        except (AssertionError, VmmError) as error:
            events = [one.name for one in manager.events(NAME)[-12:]]
            raise AssertionError(f"interrupted, seed {seed}, {soak.story[-6:]}: {error}; events: {events}") from error


class _Soak:
    """One machine, and the expected state of it."""

    def __init__(self, manager: Manager, folder: Path, rng: random.Random) -> None:
        self._manager, self._rng, self._folder = manager, rng, folder
        self._machines = Machines(folder)
        self.story: list[str] = []
        leaf = make_disk(folder, NAME, BootOptions(print_every=1, write_every=1))
        more = make_disk(folder, "more")
        vhdkit.create_image(folder / "plugged.vhd", MIB)
        manager.create(
            NAME, disks=[DiskRequest(str(leaf)), DiskRequest(str(more), controller="scsi")], memory_bytes=MEMORY_BYTES,
            accelerator="tcg", background_capture=True,
        )  # fmt: skip
        self._small = manager.snapshots(NAME)
        self._states: dict[str, dict[str, str]] = {}
        self._number = 0

    def run(self, seconds: float, rounds: int) -> Counter[str]:
        """See `run`."""
        tally: Counter[str] = Counter()
        end = time.monotonic() + seconds
        self._start()
        for number in range(2):
            self._small.create(f"at first {number}")
        self._look()
        while time.monotonic() < end or len(self.story) < rounds:
            signal_number = self._rng.choice((signal.SIGINT, signal.SIGKILL))
            how = self._interrupted(signal_number)
            name, verb = self._next()
            self.story.append(f"create {how}, then {name}")
            tally[self.story[-1] + self._done(verb)] += 1
            self._look()
            if self._rng.random() < _POWER_OFF_CHANCE:
                self._power_off()
                self._look()
        self._power_off()
        self._small.merge()
        self._look()
        return tally

    # -- what is done ------------------------------------------------------------------------------------------------

    def _interrupted(self, number: signal.Signals) -> str:
        """Begin a snapshot and interrupt the command; returns what happened to it."""
        self._number += 1
        name = f"number {self._number}"
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # not before the point at which an interrupt ends it
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                self._small.create(name)
                os._exit(0)
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        time.sleep(self._rng.uniform(0, _LONGEST_SECONDS) ** 2)  # the moment of the interruption
        os.kill(child, number)
        _, status = os.waitpid(child, 0)
        return "was done" if status == 0 else number.name

    def _next(self) -> tuple[str, Verb]:
        """The command that follows at once, and its name."""
        manager, small, rng = self._manager, self._small, self._rng
        known = list(self._states)
        one = rng.choice(known) if known else ""
        verbs: dict[str, Verb] = {
            "delete": lambda: small.delete(one),
            "create": lambda: small.create(f"then {self._number}"),
            "rename": lambda: small.rename(one, f"renamed {self._number}"),
            "set": lambda: manager.set(NAME, notes=f"notes {self._number}"),
            "merge": small.merge_live,
            "apply": lambda: small.apply(one, discard_current=True),
            "plug": self._plug,
            "backup": lambda: manager.save_night(NAME, str(self._folder / "backups")),
            "stop": lambda: manager.stop(NAME),
            "pause": self._pause,
            "nic": lambda: manager.add_adapter(NAME),
        }
        name = "delete" if len(known) >= MANY else rng.choice([*verbs, "delete", "delete", "merge"])
        if len(registry.load(NAME).spec.adapters) > 3 and name == "nic":
            name = "delete"
        return name, verbs[name]

    def _pause(self) -> None:
        self._manager.pause(NAME)
        self._manager.resume(NAME)

    def _plug(self) -> None:
        """Add or remove a disk."""
        disk = next((one for one in registry.load(NAME).spec.disks if "plugged" in str(one.path)), None)
        if disk is None:
            self._manager.add_disk(NAME, DiskRequest(str(self._folder / "plugged.vhd"), controller="scsi"))
        else:
            self._manager.remove_disk(NAME, disk.id)

    def _done(self, verb: Verb) -> str:
        """True if it was done; a refusal is allowed, as long as everything is consistent."""
        try:
            verb()
        except InUse:
            return ": in use"
        except VmmError as error:
            return f": {type(error).__name__}"
        return ""

    def _start(self) -> None:
        self._manager.start(NAME)
        self._wait_counting("the guest counts")

    def _wait_counting(self, what: str) -> None:
        """Wait for another number of the guest; a lower one if it has restarted or was restored."""
        before = console(self._manager).count("tick")
        wait_until(lambda: console(self._manager).count("tick") > before, what, _PATIENCE_SECONDS)

    def _last_said(self) -> int:
        """The guest's last number."""
        return int((re.findall(r"tick (\d+)\n", console(self._manager)) or ["0"])[-1])

    def _power_off(self) -> None:
        """What the guest had written is on the disk that the definition names."""
        if self._manager.state(NAME) is not MachineState.OFF:
            before = self._last_said()
            self._manager.stop(NAME)
            on_disk = self._count_on_disk()
            assert on_disk >= before - _LAG_TICKS, f"the guest counted to {before}, and its disk says {on_disk}"
        self._look_at_files()

    # -- what is looked at -------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """It runs and nothing is unfinished; its disks are those of its definition; every snapshot reads as before."""
        runtime = MachineRef.of(NAME).runtime.folder

        def is_back() -> bool:
            state = self._manager.state(NAME)
            if state in (MachineState.OFF, MachineState.SAVED) and not os.path.exists(runtime):
                self._look_at_files()
                with contextlib.suppress(InUse):  # the merge in the background has the lock for moments
                    self._manager.start(NAME)
            return state is MachineState.RUNNING and set(processes(NAME)) == set(PARTS) and self._is_settled()

        wait_until(is_back, "it runs, and no operation is unfinished", _PATIENCE_SECONDS)
        self._wait_counting("the guest goes on")
        self._look_at_files()

    def _is_settled(self) -> bool:
        try:
            self._small.set_limit(50)
        except InUse:
            return False
        return self._small.tree().journal is None

    def _look_at_files(self) -> None:
        """Check the files while nothing changes them; for a machine that is off, unfinished operations are ended
        first, as always."""
        with _patiently(), holding(registry.load(NAME).paths, NAME) as held:
            for disk in registry.load_for_change(held).spec.disks:
                assert os.path.exists(str(disk.path)), f"{disk.id} is gone: {disk.path}"
                assert vhdkit.find_children([str(disk.path)]) == {str(disk.path): []}, f"{disk.path} has a child"
            states = {one: self._machines.of_snapshot(NAME, one) for one in held.tree.snapshots}
        for one, disks in states.items():
            assert self._states.get(one, disks) == disks, f"the snapshot {one} reads otherwise"
        self._states = states

    def _count_on_disk(self) -> int:
        disk = registry.load(NAME).spec.disks[0]
        return int.from_bytes(_read(disk, COUNT_LBA * 512, 4), "little")


@contextlib.contextmanager
def _patiently() -> Iterator[None]:
    """Take the machine's lock as soon as the merging process, which holds it for moments, has released it."""
    with contextlib.ExitStack() as stack:

        def is_ours() -> bool:
            with contextlib.suppress(InUse):
                stack.enter_context(contact.changing(NAME))
                return True
            return False

        wait_until(is_ours, "the machine's lock is released", _PATIENCE_SECONDS)
        yield


def _read(disk: DiskSpec, offset_bytes: int, count: int) -> bytes:
    with vhdkit.open_disk(str(disk.path), options=vhdkit.OpenOptions(lock=False)) as opened:
        return opened.read(offset_bytes, count)
