# SPDX-License-Identifier: Apache-2.0
"""The lock of a machine's snapshots while a merge in the background works on them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.vmm.snapshots.machines import Machines
from vmm.api.stopped_machine import StoppedMachine
from vmm.host.proc import ProcessRef, machine_lock
from vmm.model.errors import InUse
from vmm.model.paths import MachinePaths
from vmm.store import registry
from vmm.store.snapshots import store
from vmm.store.snapshots.store import Merging, holding, machine_turn, read_merging, write_merging


def test_a_verb_waits_for_a_step_of_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command waits while a merge has the machine's lock, however long that takes; without a merge it is refused."""
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.0)
    machine = MachinePaths(str(tmp_path))
    looked, done = threading.Event(), threading.Event()

    def look(paths: MachinePaths) -> Merging | None:
        found = read_merging(paths)
        if looks:
            looked.set()  # the lock was refused once
        looks.append(found)
        return found

    looks: list[Merging | None] = []
    monkeypatch.setattr(store, "read_merging", look)

    def command() -> None:
        with machine_turn(str(tmp_path), "web"):
            done.set()

    with machine_lock(str(tmp_path), "web"):
        with pytest.raises(InUse, match="another vmm command"), machine_turn(str(tmp_path), "web"):
            pass
        looks.clear()
        with holding(machine, "web"):  # as a merge does
            write_merging(machine, Merging(ProcessRef.of_self(), None, 0, 0))
            waiting = threading.Thread(target=command)
            waiting.start()
            assert looked.wait(60) and not done.is_set()
    waiting.join(60)
    assert done.is_set()


def test_small_changes_during_a_merge(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small change of the tree stops the merge in the background, which continues afterwards."""
    web = machines.create()
    web.create("one")
    paths = registry.load("web").paths
    restarted: list[str] = []
    monkeypatch.setattr(StoppedMachine, "merge_in_background", lambda self: restarted.append(self.name))
    web.annotate("one", "before")
    assert restarted == []
    stop = threading.Event()

    def send(ref: ProcessRef, number: int) -> bool:
        stop.set()
        return True

    monkeypatch.setattr(ProcessRef, "send", send)
    merges = threading.Event()

    def merge() -> None:
        with holding(paths, "web"):
            write_merging(paths, Merging(ProcessRef.of_self(), None, 0, 0))
            merges.set()
            assert stop.wait(60)
        Path(store.merging_path(paths)).unlink()

    thread = threading.Thread(target=merge)
    thread.start()
    assert merges.wait(60)
    web.annotate("one", "after")
    thread.join(60)
    assert restarted == ["web"] and web.tree().find("one").notes == "after"
