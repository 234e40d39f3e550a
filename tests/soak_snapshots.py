# SPDX-License-Identifier: Apache-2.0
"""A machine under random commands, each of which may be killed or interrupted anywhere, and the next one drawn at
random.

    a command, in a separate process:     to its end, or
                                          killed, or stopped by Ctrl-C, before its n-th change of a file, or
                                          just before or after it wrote its n-th journal, whatever that says
    the next command, whichever it is     finishes or undoes what the previous one left
    every disk of every state is read by `plain_reader` and compared with what it must be

`Driver` knows the expected content of each snapshot, and every possible content of the present state: a command that
was cut short happened or did not. `python -m tests.soak_snapshots --steps 1000 --seed 7` runs it; the same seed draws
the same commands. With `--running` the machine is sometimes started: commands run against a running guest, while its
worker, its disk server, QEMU, the command, or all of them are killed, at any moment or as soon as a journal exists.
The guest writes only what it wrote when it was first started, so every state is known to the byte.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vhdkit
import vmm
from tests.harness.injecting import KILLED, Injection, Journal, injected
from tests.harness.plain_reader import Unreadable, digest_of
from tests.vmm.guests import boot_sector
from tests.vmm.guests.boot_sector import BootOptions
from tests.vmm.small_guests import console, processes
from tests.vmm.stage import kill_all, machine_stage
from tests.waiting import becomes, wait_until
from vhdkit import backups
from vmm.api.machine_snapshots import MachineSnapshots
from vmm.api.stopped_machine import StoppedMachine
from vmm.model.errors import VmmError
from vmm.store.snapshots import store
from vmm.store.state import MachineState

NAME = "soak"
_DISK = 1 << 20
_IMAGES = ("one.vhd", "two.vhd")
_MANY = 7  # snapshots, above which some are deleted
_FIRST = 64 << 10  # below it is the guest's own
_SESSIONS = 0.08  # share of starts among the commands, with what follows while the guest runs
_VICTIMS = ("nothing", "nothing", "command", "worker", "server", "qemu", "all")
_JOURNAL = Journal(store, "write_whole", "snapshots.json")
_ENDS = ("done", "refused", "interrupted", "failed")
_JOURNAL_SECONDS = 1.0  # for a journal to appear

State = tuple[str, ...]  # the hash of each disk
Work = Callable[[vmm.Manager, MachineSnapshots], object]


@dataclass(frozen=True, slots=True)
class Step:
    """One command: what it does, what the machine may be afterwards, and what it returns when it is done."""

    name: str
    work: Work
    target: str | None = None  # the snapshot it is about
    after: State | None = None  # what the present state may be afterwards
    takes: bool = False  # a snapshot of the present state
    check: Callable[[], None] | None = None  # after it was done


class Driver:
    """One machine with two disks, and the expected state of it."""

    def __init__(self, manager: vmm.Manager, folder: Path, seed: int, *, running: bool = False) -> None:
        self.rng, self.running = random.Random(seed), running
        self.folder, self.manager = folder, manager
        self.images = folder / "images"
        self.images.mkdir()
        for number, name in enumerate(_IMAGES):
            vhdkit.create_image(self.images / name, _DISK, block_size_bytes=512 << 10)
            with vhdkit.open_disk(self.images / name, writable=True) as disk:
                disk.write(_FIRST, bytes([number + 1]) * 512)
                if running and number == 0:
                    boot_sector.install(disk, BootOptions(print_every=1))
        manager.create(
            NAME, disks=[vmm.DiskRequest(str(self.images / name)) for name in _IMAGES],
            memory_bytes=16 << 20, accelerator="tcg", background_capture=True,
        )  # fmt: skip
        if running:  # what it writes when it starts is there from now on
            manager.start(NAME)
            wait_until(lambda: "tick" in console(manager, NAME), "the guest counts")
            self._end_session()
        self.now: set[State] = {self._present()}
        self.snapshots: dict[str, State] = {}
        self.tally: Counter[str] = Counter()
        self.history: list[str] = []
        self._lengths: dict[str, int] = {}  # for each command: how many changing calls it makes
        self._number = 0

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, steps: int, seconds: float = 0.0) -> None:
        """Run at least that many commands for at least that long, half of them cut short. Raises AssertionError."""
        end = time.monotonic() + seconds
        try:
            while len(self.history) < steps or time.monotonic() < end:
                self._step()
            self._one(self._merge(), Injection(""))
            assert self._journal() is None, "a journal is left at the end"
        except AssertionError as error:
            error.add_note("the last commands: " + "; ".join(self.history[-8:]))
            raise

    def _step(self) -> None:
        self._number += 1
        if self.running and self.rng.random() < _SESSIONS:
            self._session()
            return
        step = self.rng.choice(self._possible())()
        injection = self._injection(step.name) if self.rng.random() < 0.5 else Injection("")
        self._one(step, injection)

    def _one(self, step: Step, injection: Injection) -> None:
        journal = self._journal()
        end, problem = self._in_a_process(step, injection)
        self.history.append(f"{step.name} ({injection}): {end} {problem}".strip())
        self.tally[f"{step.name}: {end}"] += 1
        if journal is not None:
            self.tally[f"journal {journal}, then {step.name}"] += 1
        assert end != "failed", problem
        before = set(self.now)
        self._expect(step, end)
        self._judge(before | self.now)
        if end == "done" and step.check is not None:
            step.check()

    def _in_a_process(self, step: Step, injection: Injection) -> tuple[str, str]:
        """("done", "refused", "interrupted", "killed" or "failed", its message)."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            end: dict[str, Any] = {"end": "failed", "problem": ""}
            try:
                os.close(reading)
                with injected(injection, _JOURNAL) as count:
                    end |= _outcome(lambda: step.work(vmm.Manager(), _snapshots()))
                end["calls"] = count[0]
                os.write(writing, json.dumps(end).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as outcome:
            raw = outcome.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == KILLED:
            return "killed", ""
        assert status == 0 and raw, f"{step.name} ended with {status}"
        said = json.loads(raw)
        if said["end"] == "done" and not injection.how:
            self._lengths[step.name] = max(int(said["calls"]), self._lengths.get(step.name, 0))
        return str(said["end"]), str(said["problem"])

    def _injection(self, name: str) -> Injection:
        how = self.rng.choice(("kill", "interrupt"))
        where = self.rng.choice(("call", "call", "before journal", "after journal"))
        most = self._lengths.get(name, 12) + 1 if where == "call" else 4
        return Injection(how, where, self.rng.randint(1, most))

    # -- the commands -------------------------------------------------------------------------------------------

    def _possible(self) -> list[Callable[[], Step]]:
        anything: list[Callable[[], Step]] = [
            self._write,
            self._write,
            self._backup,
            self._set,
            self._look_at,
            self._merge,
        ]
        if len(self.snapshots) < _MANY:
            anything += [self._create] * 3
        if self.snapshots:
            anything += [self._apply, self._apply_and_keep, self._delete, self._delete_subtree, self._rename]
        if len(self.snapshots) >= _MANY:
            anything += [self._delete] * 3
        return anything

    def _any(self) -> str:
        return self.rng.choice(sorted(self.snapshots))

    def _create(self) -> Step:
        name = f"number {self._number}"
        return Step("create", lambda manager, snapshots: snapshots.create(name), takes=True)

    def _apply(self) -> Step:
        one = self._any()
        return Step(
            "apply", lambda manager, snapshots: snapshots.apply(one, discard_current=True), one, self.snapshots[one]
        )

    def _apply_and_keep(self) -> Step:
        one = self._any()
        return Step(
            "apply --snapshot-current",
            lambda manager, snapshots: snapshots.apply(one, snapshot_current=True),
            one, self.snapshots[one], takes=True,
        )  # fmt: skip

    def _delete(self) -> Step:
        one = self._any()
        return Step("delete", lambda manager, snapshots: snapshots.delete(one), one)

    def _delete_subtree(self) -> Step:
        one = self._any()
        return Step("delete --subtree", lambda manager, snapshots: snapshots.delete(one, subtree=True), one)

    def _rename(self) -> Step:
        one, name = self._any(), f"renamed {self._number}"
        return Step("rename", lambda manager, snapshots: snapshots.rename(one, name), one)

    def _merge(self) -> Step:
        return Step("merge", lambda manager, snapshots: snapshots.merge())

    def _set(self) -> Step:
        return Step("set", lambda manager, snapshots: manager.set(NAME, notes=f"notes {self._number}"))

    def _look_at(self) -> Step:
        """`vmm show` and `vmm disk list` name the newest images."""
        found = self.folder / "shown"

        def look(manager: vmm.Manager, snapshots: MachineSnapshots) -> None:
            shown = manager.show(NAME).spec
            assert shown is not None
            listed = [str(one.disk.path) for one in manager.disks(NAME)]
            assert listed == [str(disk.path) for disk in shown.disks], f"{listed} is not what is shown"
            found.write_text(json.dumps(listed))

        def check() -> None:
            read = tuple(digest_of(Path(path)) for path in json.loads(found.read_text()))
            assert read in self.now, "show names images that are not the machine's present disks"

        return Step("show", look, check=check)

    def _backup(self) -> Step:
        repository = self.folder / "repo"

        def check() -> None:
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                found = backups.restore(repository, NAME, folder)
                copies = tuple(digest_of(Path(path)) for _, path in sorted(found.disks.items()))
            assert copies in self.now, "the backup is not what the machine is"

        return Step("backup", lambda manager, snapshots: manager.save_night(NAME, str(repository)), check=check)

    def _write(self) -> Step:
        """Write to both disks as a guest would; never cut short here: that has its own tests."""
        offset, data = self.rng.randrange(_FIRST, _DISK, 4096), self.rng.randbytes(4096)

        def write(manager: vmm.Manager, snapshots: MachineSnapshots) -> None:
            if manager.state(NAME) is MachineState.SAVED:
                manager.discard_saved(NAME)
            for disk in (one.disk for one in manager.disks(NAME)):
                with vhdkit.open_disk(str(disk.path), writable=True) as opened:
                    opened.write(offset, data)

        return Step("write", write, after=())

    # -- a guest that runs -----------------------------------------------------------------------------------------

    def _session(self) -> None:
        """Start the machine, run some commands against it while something of it is killed, and end it in some way."""
        self._one(Step("start", lambda manager, snapshots: manager.start(NAME)), Injection(""))
        for _ in range(self.rng.randint(1, 3)):
            makers = [self._create, self._merge_live, self._backup]
            makers += [self._delete, self._rename] if self.snapshots else []
            step = self.rng.choice(makers)()
            victim = self.rng.choice(_VICTIMS)
            before = set(self.now)
            end = self._meet(step, victim, self.rng.choice((None, self.rng.uniform(0, 0.6))))
            self.history.append(f"running: {step.name} (kill {victim}): {end}")
            self.tally[f"running: {step.name}, {victim} killed"] += 1
            self._expect(step, end)
            if victim == "all":
                break
        else:
            before = set(self.now)
            if self.rng.random() < 0.5:
                self._end_session()
            else:
                self._kill_all()
        if self._journal() is not None:
            return  # the next command, whichever it is, repairs it
        self._judge(before | self.now)

    def _merge_live(self) -> Step:
        return Step("merge --live", lambda manager, snapshots: snapshots.merge_live())

    def _meet(self, step: Step, victim: str, seconds: float | None) -> str:
        """Run the command against the running machine and kill the victim after that time, or when a journal
        appears."""
        child = os.fork()
        if child == 0:
            try:
                end = _outcome(lambda: step.work(vmm.Manager(), _snapshots()))["end"]
                os._exit(_ENDS.index(end))
            finally:
                os._exit(_ENDS.index("failed"))
        self._wait_for(seconds)
        if victim == "all":
            self._kill_all()
        elif victim == "command":
            os.kill(child, signal.SIGKILL)
        elif (ref := processes(NAME).get(victim)) is not None:
            ref.send(signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        end = "killed" if status < 0 else _ENDS[status]
        assert end != "failed", f"{step.name} failed while {victim} was killed"
        return end

    def _wait_for(self, seconds: float | None) -> None:
        if seconds is None:
            becomes(lambda: self._journal() is not None, _JOURNAL_SECONDS, pause=0.002)
        else:
            time.sleep(seconds)  # the moment of the kill

    def _end_session(self) -> None:
        """Power it off, whatever state it is in."""
        with contextlib.suppress(VmmError):
            self.manager.stop(NAME)
        self._kill_all()

    def _kill_all(self) -> None:
        kill_all(Path(os.environ["VMM_RUNTIME"]))

    # -- what must be -------------------------------------------------------------------------------------------

    def _expect(self, step: Step, end: str) -> None:
        """Record what the command did, or may have done."""
        if step.name == "write":  # if it was cut short, only some of the disks have it
            self.now = {self._present()}
        elif step.after is not None:
            self.now = {step.after} if end == "done" else self.now | {step.after}

    def _judge(self, taken: set[State]) -> None:
        """Read every existing state; a new snapshot must be one of those `taken`.

        The present state is judged when no operation is unfinished.
        """
        tree = self._tree()
        settled = self._journal() is None
        there = {one["id"]: tuple(one["disks"][disk] for disk in sorted(one["disks"])) for one in tree["snapshots"]}
        for one, images in there.items():
            try:
                found = tuple(digest_of(Path(path)) for path in images)
            except Unreadable as error:
                assert not settled, f"the snapshot {one} cannot be read: {error}"
                continue
            if one in self.snapshots:
                assert found == self.snapshots[one], f"the snapshot {one} reads otherwise"
            else:
                assert found in taken, f"the new snapshot {one} is not what the machine was"
                self.snapshots[one] = found
        if not settled:
            return
        for gone in set(self.snapshots) - set(there):
            del self.snapshots[gone]
        present = self._present()
        assert present in self.now, "the machine's disks are not what they were"
        self.now = {present}
        self._look_for_strays(tree)

    def _look_for_strays(self, tree: dict[str, Any]) -> None:
        known = {os.path.basename(path) for path in tree["images"]} | set(_IMAGES)
        known |= {os.path.basename(path) for path in self._paths()}
        strange = {path.name for path in self.images.iterdir() if path.suffix in (".vhd", ".avhd")} - known
        assert not strange, f"no definition names {sorted(strange)}"
        folders = {os.path.dirname(one["folder"]) for one in tree["snapshots"]}
        left = {name for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)}
        assert left <= {one["id"] for one in tree["snapshots"]}, "a folder without a snapshot is left"

    def _home(self) -> Path:
        return Path(os.environ["VMM_HOME"]) / "machines" / NAME

    def _paths(self) -> list[str]:
        disks = json.loads((self._home() / "machine.json").read_text())["disks"]
        return [disk["path"] for disk in sorted(disks, key=lambda one: str(one["id"]))]

    def _present(self) -> State:
        return tuple(digest_of(Path(path)) for path in self._paths())

    def _tree(self) -> dict[str, Any]:
        try:
            tree: dict[str, Any] = json.loads((self._home() / "snapshots.json").read_text())
        except FileNotFoundError:
            return {"snapshots": [], "images": {}, "journal": None}
        return tree

    def _journal(self) -> str | None:
        """The operation and phase that is unfinished."""
        journal = self._tree().get("journal")
        return None if journal is None else " ".join(str(journal[key]) for key in ("op", "phase") if key in journal)


def _snapshots() -> MachineSnapshots:
    snapshots = vmm.Manager().snapshots(NAME)
    # Merging is a separate command here.
    StoppedMachine.merge_in_background = lambda self: None  # type: ignore[method-assign]
    return snapshots


def _outcome(work: Callable[[], object]) -> dict[str, str]:
    try:
        work()
    except KeyboardInterrupt:
        return {"end": "interrupted"}
    except (VmmError, vhdkit.VhdkitError) as error:
        return {"end": "refused", "problem": str(error)}
    except BaseException:
        return {"end": "failed", "problem": traceback.format_exc()}
    return {"end": "done"}


def run(steps: int, seed: int = 1, *, seconds: float = 0.0, running: bool = False) -> Counter[str]:
    """Run that many commands on a new machine; returns how each ended, and which followed which journal."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhdkit-soak-")))
        manager = stack.enter_context(machine_stage(folder, stack.enter_context(pytest.MonkeyPatch.context())))
        driver = Driver(manager, folder, seed, running=running)
        try:
            driver.run(steps, seconds)
        except AssertionError as error:
            kept = tempfile.mkdtemp(prefix="vhdkit-soak-")
            shutil.copytree(folder, kept, dirs_exist_ok=True, symlinks=True)
            error.add_note(f"seed {seed}, command {len(driver.history)}; a copy of the folder is {kept}")
            raise
        return driver.tally


def main() -> None:
    """Run it, and report the result."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak_snapshots", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--running", action="store_true", help="start the machine now and then")
    options = parser.parse_args()
    tally = run(options.steps, options.seed, running=options.running)
    for what, count in sorted(tally.items()):
        print(f"{count:6} x  {what}")


if __name__ == "__main__":
    main()
