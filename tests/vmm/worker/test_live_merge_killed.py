# SPDX-License-Identifier: Apache-2.0
"""The disk server, QEMU, or everything is killed while images are merged under a guest that writes to them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.support import require_boot_sector_guest
from tests.vmm.guests.boot_sector import COUNT_LBA, SECTOR, WRITE_LBA, BootOptions
from tests.vmm.small_guests import (
    MIB,
    PARTS,
    both_kinds_nightly,
    kill_together,
    make_disk,
    processes,
    wait_state,
    wait_whole,
)
from tests.vmm.snapshots.machines import Machines
from tests.vmm.worker.test_capture import count, disk_count, settled
from tests.waiting import wait_until
from vmm.api.machine_snapshots import MachineSnapshots
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import InUse, VmmError
from vmm.model.paths import RuntimePaths
from vmm.processes.worker_connection import MachineRef
from vmm.store import registry
from vmm.store.snapshots.journal import MergeLive
from vmm.store.snapshots.store import load_tree, read_merging
from vmm.store.state import MachineState

pytestmark = pytest.mark.kvm

_GUEST_SECTORS = (WRITE_LBA, COUNT_LBA)
_RATE = 400_000  # bytes a second: a merge takes some seconds, so the kill hits it in progress


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of the disks; a merge that still runs afterwards is ended."""
    yield tmp_path
    for machine in registry.load_all()[0]:
        if (merging := read_merging(machine.paths)) is not None:
            merging.ref.kill()


def grown(manager: Manager, folder: Path, kind: str) -> tuple[MachineSnapshots, bytes]:
    """A running machine that counts on its disk, with snapshots a, b, c, d and data in each layer; and what it must
    read.

    The sectors that the guest itself writes to are left out.
    """
    require_boot_sector_guest()
    leaf = make_disk(folder, "small", BootOptions(print_every=2, write_every=1), kind=kind)
    manager.create("small", disks=[DiskRequest(str(leaf))], memory_bytes=16 * MIB, accelerator="tcg")
    small, shuffle = manager.snapshots("small"), random.Random("layers")
    for name in (*"abcd", None):
        path = str(registry.load("small").spec.disks[0].path)
        with vhdkit.open_disk(path, writable=True) as disk:
            for _ in range(40):
                disk.write(shuffle.randrange(MIB, disk.size_bytes - 65536, 4096), shuffle.randbytes(65536))
        if name is not None:
            small.create(name)
    expected = content(now_path())
    manager.start("small")
    wait_until(lambda: count(manager) > 4, "it counts")
    return small, expected


def now_path() -> str:
    """The image that is the machine's disk, as its definition says."""
    return str(registry.load("small").spec.disks[0].path)


def content(path: str) -> bytes:
    """The content of a disk, without the sectors that the guest writes to."""
    with vhdkit.open_disk(path, options=vhdkit.OpenOptions(lock=False)) as disk:
        data = bytearray(disk.read(0, disk.size_bytes))
    for sector in _GUEST_SECTORS:
        data[sector * SECTOR : (sector + 1) * SECTOR] = bytes(SECTOR)
    return bytes(data)


def merging_live(small: MachineSnapshots) -> threading.Thread:
    """A live merge that has begun to copy, in a thread."""
    copied = threading.Event()

    def merge() -> None:
        with contextlib.suppress(VmmError):
            small.merge_live(
                max_rate_bytes=_RATE, progress=lambda progress: copied.set() if progress.get("done") else None
            )

    merging = threading.Thread(target=merge)
    merging.start()
    wait_until(copied.is_set, "it copies")
    journal = load_tree(registry.load("small").paths).journal
    assert isinstance(journal, MergeLive)
    return merging


def merging_live_elsewhere(small: MachineSnapshots) -> int:
    """The same in another process, which can be killed, too; its number."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:

        def tell(progress: dict[str, Any]) -> None:
            if progress.get("done"):
                os.write(writing, b"x")

        with contextlib.suppress(BaseException):
            small.merge_live(max_rate_bytes=_RATE, progress=tell)
        os._exit(0)
    os.close(writing)
    try:
        assert os.read(reading, 1), "it is copying"
    finally:
        os.close(reading)
    assert isinstance(load_tree(registry.load("small").paths).journal, MergeLive)
    return child


def check_whole(small: MachineSnapshots, machines: Machines, kept: dict[str, dict[str, str]], expected: bytes) -> None:
    """With the machine off: all due merges are done, every state reads as before, and no files are left over."""
    assert content(now_path()) == expected
    assert {one: machines.of_snapshot("small", one) for one in kept} == kept
    wait_until(lambda: is_merged(small), "both merges are done, the one begun by the stop and ours")
    assert content(now_path()) == expected and small.merges_due() == 0
    assert {one: machines.of_snapshot("small", one) for one in kept} == kept
    tree = small.tree()
    known = {os.path.basename(one) for one in (*tree.images, *tree.frozen(), now_path())} | {
        f"small.{machines.kind}", f"small.a{machines.kind}"
    }  # fmt: skip
    assert machines.images() <= known, "an unknown image is left"
    records = [one for one in os.listdir(machines.folder) if "vhdkit-merge" in one]
    assert not records, records
    for path in (*tree.images, now_path()):
        assert not [one for one in vhdkit.check(path) if one.severity is vhdkit.Severity.ERROR]


def is_merged(small: MachineSnapshots) -> bool:
    """Merge what is due; False while another process works on it."""
    try:
        small.merge()
    except InUse:
        return False
    return True


def put_away(manager: Manager) -> None:
    """Wait until the machine is off, and nothing of it is left in the runtime folder."""
    runtime = MachineRef.of("small").runtime.folder
    wait_until(lambda: manager.state("small") is MachineState.OFF and not os.path.exists(runtime), "it is off")


@both_kinds_nightly
@pytest.mark.parametrize(
    ("part", "doomed"),
    [
        pytest.param("server", "bc", id="server-middle"),
        pytest.param("server", "cd", id="server-leaf", marks=pytest.mark.nightly),
        pytest.param("qemu", "bc", id="qemu-middle", marks=pytest.mark.nightly),
        pytest.param("qemu", "cd", id="qemu-leaf", marks=pytest.mark.nightly),
    ],
)
def test_one_process_is_killed_in_a_live_merge(
    manager: Manager, folder: Path, part: str, doomed: str, kind: str
) -> None:
    """The guest continues, or can be started; no state has changed; the next merge finishes; nothing is left over."""
    small, expected = grown(manager, folder, kind)
    machines = Machines(folder, kind)
    for name in doomed:
        small.delete(name)
    kept = {one: machines.of_snapshot("small", one) for one in "abcd" if one not in doomed}
    merging = merging_live(small)
    before, counted = processes(), count(manager)
    before[part].send(signal.SIGKILL)
    merging.join(60)
    assert not merging.is_alive()
    if part == "qemu":
        put_away(manager)
        assert {one: machines.of_snapshot("small", one) for one in kept} == kept
        manager.start("small")
        counted = 0
    else:
        wait_whole(but={part: before[part]})
        wait_state(manager, MachineState.RUNNING)
    wait_until(lambda: settled(small), "the merge's journal is gone")
    wait_until(lambda: count(manager) > counted, "the guest continues counting")
    assert {one: machines.of_snapshot("small", one) for one in kept} == kept
    assert [one.problem for one in small.merge_live()] in ([], [None])
    assert small.merges_due() == 0
    late = count(manager)
    wait_until(lambda: count(manager) > late + 2, "the guest continues counting")
    manager.stop("small")
    put_away(manager)
    assert disk_count(machines, now_path()) >= late, "what it wrote after the merge is lost"
    check_whole(small, machines, kept, expected)


@both_kinds_nightly
@pytest.mark.parametrize(
    "doomed", [pytest.param("bc", id="middle", marks=pytest.mark.nightly), pytest.param("cd", id="leaf")]
)
def test_all_processes_are_killed_in_a_live_merge(manager: Manager, folder: Path, doomed: str, kind: str) -> None:
    """As after a power cut, the next command finds the disk's newest image, with what the guest wrote during the
    merge."""
    small, expected = grown(manager, folder, kind)
    machines = Machines(folder, kind)
    for name in doomed:
        small.delete(name)
    kept = {one: machines.of_snapshot("small", one) for one in "abcd" if one not in doomed}
    before_merge, at_start = now_path(), count(manager)
    command = merging_live_elsewhere(small)
    runtime = RuntimePaths(MachineRef.of("small").runtime.folder)
    refs = processes()
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    kill_together(refs[part] for part in PARTS)
    for part in PARTS:
        refs[part].wait(20)
    assert os.path.exists(runtime.folder)
    tree = load_tree(registry.load("small").paths)
    assert isinstance(tree.journal, MergeLive)
    if doomed == "cd":
        assert vhdkit.find_children([before_merge])[before_merge], "the merge had put a new leaf on the disk's image"
    small.delete("d" if doomed == "bc" else "b")  # any command finishes it
    kept.pop("d" if doomed == "bc" else "b")
    tree = small.tree()
    assert tree.journal is None and not vhdkit.find_children([now_path()])[now_path()]
    if doomed == "cd":
        assert now_path() != before_merge and tree.images[now_path()].parent == before_merge
        assert disk_count(machines, now_path()) > at_start - 2, "what was written before the new leaf was made durable"
    check_whole(small, machines, kept, expected)
    manager.start("small")
    assert count(manager) >= 0
