# SPDX-License-Identifier: Apache-2.0
"""The worker, or worker and QEMU, are killed in a live snapshot, with another command at once: no write of the guest
is lost."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.vmm.small_guests import MIB, kill_together, processes
from tests.vmm.snapshots.machines import Machines
from tests.vmm.worker.test_capture import count, disk_count, guest
from tests.waiting import wait_until
from vmm.api.machine_snapshots import MachineSnapshots
from vmm.api.manager import Manager
from vmm.processes.worker_connection import MachineRef
from vmm.store import registry
from vmm.store.snapshots.journal import CreateLive
from vmm.store.snapshots.store import load_tree

pytestmark = pytest.mark.kvm


def cut_after_the_pivot(small: MachineSnapshots, victims: tuple[str, ...]) -> str:
    """Kill these, and the command, once the guest writes to its new leaf; return that leaf."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            small.create("cut")
        os._exit(0)
    paths, living = registry.load("small").paths, processes()

    def is_pivoted() -> bool:
        journal = load_tree(paths).journal
        return isinstance(journal, CreateLive) and journal.pivoted

    wait_until(is_pivoted, "the guest writes to its new leaf")
    kill_together(living[part] for part in victims)
    for part in victims:
        living[part].wait(20)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    journal = load_tree(paths).journal
    assert isinstance(journal, CreateLive), "the snapshot was interrupted"
    return journal.pivots[0].child


@pytest.mark.parametrize(
    ("victims", "recovery"),
    [
        pytest.param(("worker",), "none", id="worker-none"),
        pytest.param(("worker",), "restart", id="worker-restart", marks=pytest.mark.nightly),
        pytest.param(("worker", "qemu"), "none", id="worker+qemu-none", marks=pytest.mark.nightly),
        pytest.param(("worker", "qemu"), "restart", id="worker+qemu-restart", marks=pytest.mark.nightly),
    ],
)
def test_delete_right_after_an_interrupted_snapshot(
    manager: Manager, tmp_path: Path, victims: tuple[str, ...], recovery: str
) -> None:
    """INV-ONE-JOURNAL: `snapshot delete` has the interrupted snapshot finished or undone first; the newest leaf stays
    the disk."""
    automatic = {"recovery": recovery} if recovery != "none" else {}
    small = guest(manager, tmp_path, memory_bytes=256 * MIB, automatic=automatic)
    small.create("a")
    counted = count(manager)
    newest = cut_after_the_pivot(small, victims)
    small.delete("a")
    tree, machine = small.tree(), registry.load("small")
    assert tree.journal is None and newest in tree.images and "a" not in {one.name for one in tree.snapshots.values()}
    assert machine.spec.disks[0].path == newest and os.path.exists(newest)
    folders = Path(manager_snapshots(machine.spec.id))
    assert {one.name for one in folders.iterdir()} == set(tree.snapshots) if folders.exists() else not tree.snapshots
    if "qemu" not in victims:
        later = count(manager)
        wait_until(lambda: count(manager) > later, "the guest continues counting")
        counted = count(manager)
    runtime = MachineRef.of("small").runtime.folder
    with contextlib.suppress(Exception):
        manager.stop("small")
    wait_until(lambda: not os.path.exists(runtime), "it is off")
    if recovery == "none":
        leaf = str(registry.load("small").spec.disks[0].path)
        assert disk_count(Machines(tmp_path), leaf) >= counted - 3


def manager_snapshots(machine_id: str) -> str:
    """The folder of a machine's snapshots."""
    return os.path.join(os.environ["VMM_HOME"], "snapshots", machine_id)
