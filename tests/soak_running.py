# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a running machine, with one of its processes killed in the middle of each, for `soak`.

    a verb (create, apply, delete, live merge) in a separate process -> kill the worker, the disk server, QEMU or
    the command -> dead processes are replaced, or the machine is started again -> check -> the next verb

The machine is not restored in between: the damage of one kill shows in one of the next rounds. Every snapshot must
read as it did when it was taken, the disk as its guest left it, and nothing may be left over.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests.vmm.guests.boot_sector import BootOptions
from tests.vmm.small_guests import MIB, PARTS, console, make_disk, processes
from tests.vmm.snapshots.machines import Machines
from tests.vmm.stage import machine_stage
from tests.vmm.worker.test_capture import settled
from tests.waiting import wait_until
from vmm.api.machine_snapshots import MachineSnapshots
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import VmmError
from vmm.processes.worker_connection import MachineRef
from vmm.store import registry
from vmm.store.state import MachineState

NAME = "small"
_VERBS = ("create", "apply", "delete", "merge")
_VICTIMS = ("worker", "server", "qemu", "command")
_MANY = 6  # snapshots, above which one is deleted
_STATIC = (MIB, 6 * MIB)  # the part of the disk that the guest does not write to
_PATIENCE_SECONDS = 90.0
_GUEST_SECONDS = 40.0  # its BIOS waits for a disk for 32 s


def run(seconds: float, seed: int = 1, *, kills: int = 0) -> Counter[str]:
    """Kill for that long, and at least that often; returns how often each was killed in each verb. Raises
    AssertionError."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhdkit-soak-")))
        manager = stack.enter_context(machine_stage(folder, stack.enter_context(pytest.MonkeyPatch.context())))
        try:
            return _Soak(manager, folder, random.Random(seed)).run(seconds, kills)
        except AssertionError as error:
            error.add_note(f"running, seed {seed}")
            raise


class _Soak:
    """One machine, and the expected state of it."""

    def __init__(self, manager: Manager, folder: Path, rng: random.Random) -> None:
        self._manager, self._rng = manager, rng
        self._machines = Machines(folder)
        leaf = make_disk(folder, NAME, BootOptions(print_every=1, write_every=1))
        manager.create(
            NAME, disks=[DiskRequest(str(leaf))], memory_bytes=16 * MIB, accelerator="tcg", background_capture=True
        )
        self._small = manager.snapshots(NAME)
        for number in range(3):  # the same data in every layer: merges take a while, and all states have it
            same = random.Random("static")
            with vhdkit.open_disk(_leaf(), writable=True) as disk:
                for _ in range(20):
                    disk.write(same.randrange(*_STATIC, 4096), same.randbytes(65536))
            self._small.create(f"at first {number}")
        self._static = _static(_leaf())
        self._states = self._read_states()
        self._number = 0

    def run(self, seconds: float, kills: int) -> Counter[str]:
        """See `run`."""
        tally: Counter[str] = Counter()
        end = time.monotonic() + seconds
        self._come_back()
        while time.monotonic() < end or tally.total() < kills:
            verb = self._choose()
            victim = self._rng.choice(_VICTIMS)
            tally[f"{victim} in {verb}"] += self._killed(self._work(verb), victim)
            try:
                self._come_back()
                self._look()
            except (AssertionError, VmmError) as error:
                raise AssertionError(
                    f"after {victim} was killed in {verb} ({dict(tally)}): {error} {getattr(error, '__notes__', '')}"
                ) from error
        self._manager.stop(NAME)
        self._small.merge()
        self._look()
        assert self._small.merges_due() == 0
        return tally

    def _choose(self) -> str:
        there = len(self._states)
        return "create" if there == 0 else "delete" if there >= _MANY else self._rng.choice(_VERBS)

    def _work(self, verb: str) -> Callable[[MachineSnapshots], object]:
        self._number += 1
        name = f"number {self._number}"
        one = self._rng.choice(list(self._states) or [""])
        if verb == "create":
            return lambda small: small.create(name)
        if verb == "apply":
            return lambda small: small.apply(one, discard_current=True)
        if verb == "delete":
            return lambda small: small.delete(one)
        return lambda small: small.merge_live(max_rate_bytes=2 * MIB)

    def _killed(self, work: Callable[[MachineSnapshots], object], victim: str) -> bool:
        """True if there was a process to kill."""
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                work(Manager().snapshots(NAME))
            os._exit(0)
        time.sleep(self._rng.uniform(0, 0.5))  # the moment of the kill
        killed = True
        if victim == "command":
            os.kill(child, signal.SIGKILL)
        elif (ref := processes(NAME).get(victim)) is not None:
            ref.send(signal.SIGKILL)
            ref.wait(_PATIENCE_SECONDS)
        else:
            killed = False
        _, status = os.waitpid(child, 0)
        return killed and (victim != "command" or os.WIFSIGNALED(status))

    def _come_back(self) -> None:
        """All four processes live, the guest runs, and no process works on the snapshots."""
        runtime = MachineRef.of(NAME).runtime.folder

        def is_back() -> bool:
            state = self._manager.state(NAME)
            if state in (MachineState.OFF, MachineState.SAVED) and not os.path.exists(runtime):
                self._manager.start(NAME)
            return state is MachineState.RUNNING and set(processes(NAME)) == set(PARTS) and settled(self._small)

        wait_until(is_back, "it runs, and no operation is unfinished", _PATIENCE_SECONDS)
        before = console(self._manager).count("tick")
        try:
            wait_until(
                lambda: is_back() and console(self._manager).count("tick") > before,
                "the guest goes on",
                _GUEST_SECONDS,
            )
        except AssertionError as error:
            events = [one.name for one in self._manager.events(NAME)[-20:]]
            error.add_note(f"its console: {console(self._manager)[-200:]!r}; its events: {events}")
            raise

    def _look(self) -> None:
        tree = self._small.tree()
        states = self._read_states()
        for one, disks in states.items():
            assert self._states.get(one, disks) == disks, f"{tree.snapshots[one].name} reads otherwise"
        self._states = states
        assert _static(_leaf()) == self._static, "the disk reads otherwise"
        for snapshot in tree.snapshots.values():
            if snapshot.memory_bytes is not None:
                assert os.stat(os.path.join(snapshot.folder, f"{snapshot.id}.bin")).st_size == snapshot.memory_bytes
        parents = {os.path.dirname(one.folder) for one in tree.snapshots.values()}
        folders = {name for parent in parents for name in os.listdir(parent)}
        assert folders == set(tree.snapshots), "a folder without a snapshot is left"
        known = {os.path.basename(path) for path in (*tree.images, *tree.frozen(), _leaf())}
        strange = self._machines.images() - known - {f"{NAME}.vhd", f"{NAME}.avhd"}
        assert not strange, f"unknown files: {strange}"

    def _read_states(self) -> dict[str, dict[str, str]]:
        return {one: self._machines.of_snapshot(NAME, one) for one in self._small.tree().snapshots}


def _leaf() -> str:
    return str(registry.load(NAME).spec.disks[0].path)


def _static(path: str) -> bytes:
    with vhdkit.open_disk(path, options=vhdkit.OpenOptions(lock=False)) as disk:
        return disk.read(_STATIC[0], _STATIC[1] - _STATIC[0] + 65536)
