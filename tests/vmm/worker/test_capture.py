# SPDX-License-Identifier: Apache-2.0
"""Snapshots of running machines, with a guest that counts in memory and writes its counter to its disk."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vhdkit
from tests.support import daily_or_nightly, not_available, require_kvm
from tests.vmm.guests.boot_sector import COUNT_LBA, SECTOR, BootOptions
from tests.vmm.small_guests import (
    MIB,
    SECONDS,
    both_kinds_nightly,
    console,
    make_disk,
    press,
    processes,
    wait_state,
    wait_whole,
)
from tests.vmm.snapshots.machines import Machines
from tests.waiting import becomes, wait_until
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.store import FileStore
from vmm.api.machine_snapshots import MachineSnapshots
from vmm.api.manager import DiskRequest, Manager
from vmm.kvm import memory_file
from vmm.model.errors import InUse, NoSpace, Unsupported, VmmError, WrongState
from vmm.model.paths import set_default_folder
from vmm.processes.worker_connection import MachineRef
from vmm.store import registry
from vmm.store.snapshots.memory import SnapshotFolder
from vmm.store.snapshots.store import load_tree, read_merging
from vmm.store.state import MachineState

pytestmark = pytest.mark.kvm


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of the disks; a merge that still runs afterwards is ended."""
    yield tmp_path
    for machine in registry.load_all()[0]:
        if (merging := read_merging(machine.paths)) is not None:
            merging.ref.kill()


def guest(
    manager: Manager, folder: Path, *, disks: int = 1, start: bool = True, kind: str = "vhd", **settings: object
) -> MachineSnapshots:
    """A running machine that writes its counter to its first disk at every second tick."""
    wishes = [DiskRequest(str(make_disk(folder, "small", BootOptions(print_every=2, write_every=2), kind=kind)))]
    wishes += [
        DiskRequest(str(make_disk(folder, f"more-{number}", kind=kind)), controller="scsi")
        for number in range(1, disks)
    ]
    chosen: dict[str, object] = {
        "memory_bytes": 16 * MIB,
        "accelerator": "tcg",
        "background_capture": True,
        **settings,
    }
    manager.create("small", disks=wishes, **chosen)  # type: ignore[arg-type]
    if start:
        manager.start("small")
        wait_until(lambda: count(manager) > 4, "it counts")
    return manager.snapshots("small")


def count(manager: Manager) -> int:
    """The guest's present counter, which is only in its memory."""
    before = len(console(manager))

    def answers() -> list[str]:
        return re.findall(r"count (\d+)\r?\n", console(manager)[before:])

    def answers_to_a_key() -> list[str]:
        press(manager, "c")  # again: a guest that is still booting ignores keys
        return answers() if becomes(answers, 1) else []

    said = wait_until(answers_to_a_key, lambda: f"it answers: {console(manager)[-200:]!r}", SECONDS)
    return int(said[-1])


def disk_count(machines: Machines, path: str) -> int:
    """The counter on an image."""
    with vhdkit.open_disk(path, options=vhdkit.OpenOptions(lock=False)) as disk:
        return int.from_bytes(disk.read(COUNT_LBA * SECTOR, 4), "little")


@pytest.fixture
def machines(folder: Path) -> Machines:
    """The machine of the test, for hashes of disks."""
    return Machines(folder)


@pytest.mark.parametrize("mode", ["switchover", "background", "stop"][: daily_or_nightly(1, 3)])
def test_memory_and_disks_of_one_moment_are_restored(
    manager: Manager, folder: Path, machines: Machines, mode: str
) -> None:
    """After applying and starting, the guest continues counting from the snapshot's moment, on the disk of that
    moment."""
    small = guest(manager, folder, disks=2)
    before = count(manager)
    snapshot = small.create("moment", mode=mode)
    after = count(manager)
    assert snapshot.mode == mode and snapshot.memory_bytes and snapshot.pause_seconds is not None
    states = machines.of_snapshot("small", "moment")
    wait_until(lambda: count(manager) > after + 12, "the guest continues counting")
    assert machines.of_snapshot("small", "moment") == states, "a frozen image was written to"
    on_disk = disk_count(machines, snapshot.disks["disk-0"])
    assert before - 3 <= on_disk <= after
    late = count(manager)
    applied = small.apply("moment", discard_current=True)
    assert applied.state == "saved" and manager.state("small") is MachineState.SAVED
    assert len(applied.tidied.removed) == 2
    manager.start("small")
    again = count(manager)
    assert before <= again < late, "it did not continue from the snapshot"
    wait_until(lambda: count(manager) > again, "the guest continues counting")
    assert machines.of_snapshot("small", "moment") == states


def test_pictures_beside_snapshots(manager: Manager, folder: Path) -> None:
    """INV-DESCRIPTOR-NAMED: while pictures of the screen are taken all the time, each snapshot has its complete
    memory."""
    small = guest(manager, folder, screen=True)
    ended = threading.Event()
    pictures: list[bytes] = []

    def watch() -> None:
        while not ended.is_set():
            pictures.append(manager.guest("small").screen())

    with ThreadPoolExecutor(3) as pool:
        watching = [pool.submit(watch) for _ in range(3)]
        try:
            snapshots = [small.create(f"number {number}") for number in range(daily_or_nightly(2, 4))]
        finally:
            ended.set()
        for one in watching:
            one.result()
    assert len(pictures) > 3
    for snapshot in snapshots:
        with open(SnapshotFolder(snapshot.folder).memory, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            assert size == snapshot.memory_bytes and size > MIB // 2
            assert memory_file.problem_of(file.fileno(), size) is None
    late = count(manager)
    small.apply("number 0", discard_current=True)
    manager.start("small")
    assert count(manager) < late


def test_memory_of_a_kvm_guest_is_restored(manager: Manager, folder: Path, machines: Machines) -> None:
    """Under KVM, too, counter and disk are those of the snapshot's moment."""
    require_kvm()
    small = guest(manager, folder, accelerator="kvm")
    assert Manager().show("small").accelerator == "kvm"
    before = count(manager)
    snapshot = small.create("moment")
    after = count(manager)
    assert snapshot.mode == "background" and snapshot.memory_bytes and snapshot.pause_seconds is not None
    states = machines.of_snapshot("small", "moment")
    on_disk = disk_count(machines, snapshot.disks["disk-0"])
    assert before - 3 <= on_disk <= after
    wait_until(lambda: count(manager) > after + 12, "the guest continues counting")
    late = count(manager)
    small.apply("moment", discard_current=True)
    assert disk_count(machines, str(registry.load("small").spec.disks[0].path)) == on_disk
    manager.start("small")
    again = count(manager)
    assert before <= again < late, "it did not continue from the snapshot"
    wait_until(lambda: count(manager) > again, "the guest continues counting")
    assert machines.of_snapshot("small", "moment") == states


def test_snapshots_of_paused_and_saved_machines(manager: Manager, folder: Path, machines: Machines) -> None:
    """A paused machine stays paused, twice; a saved one stays saved; each is restored as it was."""
    small = guest(manager, folder)
    manager.pause("small")
    first, second = small.create("first"), small.create("second")
    assert (first.taken_in, second.taken_in) == ("paused", "paused") and manager.state("small") is MachineState.PAUSED
    manager.save("small")
    third = small.create("third")
    assert third.taken_in == "saved" and manager.state("small") is MachineState.SAVED and third.memory_bytes
    manager.start("small")
    assert manager.state("small") is MachineState.PAUSED
    manager.resume("small")
    late = count(manager)
    for name in ("third", "first"):
        small.apply(name, discard_current=True)
        manager.start("small")
        assert manager.state("small") is MachineState.PAUSED
        manager.resume("small")
        assert count(manager) <= late + 30
    small.delete("second")
    states = machines.states("small")
    manager.stop("small")
    small.merge()
    assert {one: states[one] for one in states if one} == {
        one: disks for one, disks in machines.states("small").items() if one
    }


def test_ten_in_a_row_with_branches_and_deletes(manager: Manager, folder: Path, machines: Machines) -> None:
    """Ten snapshots, while it runs and across resets; deleted in every position, running and off: all others stay as
    they were."""
    small = guest(manager, folder)
    for number in range(6):
        small.create(str(number))
        if number == 3:
            manager.reset("small")
            wait_until(lambda: console(manager).rstrip().endswith("READY") or count(manager) >= 0, "it is up again")
    small.apply("2", discard_current=True)
    manager.start("small")
    for number in range(6, 10):
        small.create(str(number))
    states = {one: disks for one, disks in machines.states("small").items() if one}
    for name in ("9", "0", "3", "7"):  # the one before now, the first, one in a branch, one in the middle
        del states[small.delete(name).snapshots[0].id]
        assert {one: machines.of_snapshot("small", one) for one in states} == states
    count(manager)
    manager.stop("small")
    now = machines.now("small")
    wait_until(lambda: small.merging() is not None or small.merges_due() == 0, "the merge begins by itself")
    small.merge()
    assert machines.states("small") == states | {None: now} and small.merges_due() == 0
    assert len(small.tree().snapshots) == 6
    del states[small.delete("2", subtree=True).snapshots[0].id]
    small.merge()
    manager.start("small")
    assert count(manager) >= 0


def test_a_long_chain(manager: Manager, folder: Path, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest on many images, 64 in the nightly run, reads and writes correctly, is captured and restored; a page
    costs one read of one file."""
    small, pages = guest(manager, folder, start=False), daily_or_nightly(14, 62)
    small.set_limit(pages + 2)
    for number in range(pages):
        with vhdkit.open_disk(leaf_of_small(), writable=True) as disk:
            disk.write(MIB + number * 4096, f"page {number:4}".encode() * 10)
        small.create(str(number))
    assert len(vhdkit.chain_paths(leaf_of_small())) == pages + 2
    manager.start("small")
    wait_until(lambda: count(manager) > 4, "it boots from all of them")
    small.create("running", mode="stop")
    states = {one: machines.of_snapshot("small", one) for one in ("0", str(pages // 2), str(pages - 1), "running")}
    late = count(manager)
    wait_until(lambda: count(manager) > late + 4, "it writes")
    manager.stop("small")
    assert disk_count(machines, leaf_of_small()) >= late
    check_cost_of_depth(leaf_of_small(), monkeypatch)
    with vhdkit.open_disk(leaf_of_small()) as disk:
        assert [disk.read(MIB + number * 4096, 9) for number in range(pages)] == [
            f"page {number:4}".encode() for number in range(pages)
        ]
    small.apply("running", discard_current=True)
    manager.start("small")
    assert count(manager) <= late
    manager.stop("small")
    going = range(3, pages // 2)
    for number in going:  # one merge of many layers
        small.delete(str(number))
    small.merge()
    assert len(vhdkit.chain_paths(leaf_of_small())) == pages + 3 - len(going)
    assert {one: machines.of_snapshot("small", one) for one in states} == states


def leaf_of_small() -> str:
    """The image that the machine writes to."""
    return str(registry.load("small").spec.disks[0].path)


def check_cost_of_depth(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the map knows a disk, a page costs at most one read of one file, however many layers are below; no bitmap
    is read."""
    calls: list[str] = []

    def counted(kind: type, name: str) -> None:
        plain = getattr(kind, name)

        def call(*words: object) -> object:
            calls.append(name)
            return plain(*words)

        monkeypatch.setattr(kind, name, call)

    counted(FileStore, "pread")
    counted(FileStore, "pread_into")
    counted(DynamicImage, "owned_sectors")
    with vhdkit.open_disk(path) as disk:
        offsets = range(0, disk.size_bytes, 4096)
        first = [disk.read(offset, 4096) for offset in offsets]
        assert "owned_sectors" in calls
        calls.clear()
        assert [disk.read(offset, 4096) for offset in offsets] == first
        assert set(calls) == {"pread_into"} and len(calls) <= len(offsets)


def test_start_during_a_merge(manager: Manager, folder: Path, machines: Machines) -> None:
    """A start stops the merge in the background, which continues when the machine is off again."""
    small = guest(manager, folder)
    small.create("a")
    small.create("b")
    wait_until(lambda: count(manager) > 8, "it writes")
    small.delete("a")
    small.delete("b")
    assert small.merges_due() == 1
    for _ in range(2):
        manager.stop("small")
        time.sleep(0.3)  # by then the merge begins, or has not begun yet
        manager.start("small")  # whatever the merge is doing
        assert count(manager) >= 0
    manager.stop("small")
    now = machines.now("small")
    small.merge()
    assert machines.now("small") == now and small.merges_due() == 0
    spec = registry.load("small").spec
    assert spec.disks[0].path == str(folder / "small.avhd")


def test_live_merge(manager: Manager, folder: Path, machines: Machines) -> None:
    """Middle layers and the one written to are merged while the guest runs; snapshots and guest are not affected."""
    small = guest(manager, folder)
    for name in ("a", "b", "c"):
        small.create(name)
        after = count(manager)
        wait_until(lambda after=after: count(manager) > after + 2, "it writes")  # type: ignore[misc]
    kept = machines.of_snapshot("small", "a")
    small.delete("b")  # c's image goes into b's, below the one that is written to
    done = small.merge_live()
    assert [one.problem for one in done] == [None], done
    assert small.merges_due() == 0 and machines.of_snapshot("small", "a") == kept
    count(manager)
    small.delete("c")  # now the one that is written to is merged into it
    [row] = small.merge_live(max_rate_bytes=50 << 20)
    assert row.held_seconds is not None and row.held_seconds < 30
    spec = registry.load("small").spec
    assert spec.disks[0].path in small.tree().images and Path(str(spec.disks[0].path)).exists()
    counted = count(manager)
    manager.reset("small")
    assert machines.of_snapshot("small", "a") == kept
    manager.stop("small")
    assert small.merges_due() == 0
    assert disk_count(machines, str(spec.disks[0].path)) <= counted + 40
    manager.start("small")
    assert count(manager) >= 0
    small.delete("a")
    small.merge_live()
    assert registry.load("small").spec.disks[0].path == str(folder / "small.avhd")
    assert not small.tree().images
    manager.stop("small")
    manager.start("small")
    count(manager)


def test_no_space_for_the_memory(manager: Manager, folder: Path) -> None:
    """If the memory does not fit, nothing is touched, and the guest continues."""
    if os.geteuid() != 0:
        not_available("needs root, to mount a small file system")
    place = folder / "small-fs"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "vmm-test", place], check=True)
    try:
        set_default_folder("snapshots", str(place))
        small = guest(manager, folder)
        before = registry.load("small").spec
        with pytest.raises(NoSpace, match="not enough space for the machine's memory"):
            small.create("a")
        assert registry.load("small").spec == before and not small.tree().snapshots and small.tree().journal is None
        assert len(list(folder.glob("*.avhd"))) == 1 and not list(place.rglob("*.part"))
        assert count(manager) > 0
        manager.stop("small")
        small.create("off needs no room")
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_capture_without_userfaultfd(manager: Manager, folder: Path) -> None:
    """Without userfaultfd another mode is used, and requesting background capture says what is missing."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        pytest.skip("this host lets every program use userfaultfd")
    small = guest(manager, folder, background_capture=False)
    with pytest.raises(Unsupported, match="background"):
        small.create("a", mode="background")
    assert small.tree().journal is None
    assert small.create("b").mode == "switchover"
    manager.save("small")  # as before
    manager.start("small")
    assert count(manager) > 0


def test_snapshots_that_are_refused_while_the_machine_runs(manager: Manager, folder: Path) -> None:
    """Each refusal matches the state, and leaves nothing behind."""
    small = guest(manager, folder)
    with pytest.raises(VmmError, match="agent"):
        small.create("a", consistent=True)  # this guest has no agent
    assert small.tree().journal is None and count(manager) > 0
    manager.pause("small")
    with pytest.raises(WrongState, match="paused"):
        small.create("a", consistent=True)
    with pytest.raises(WrongState):
        small.merge()
    manager.resume("small")
    small.create("a")
    assert small.merge_live() == () and not small.cancel_merge()


@both_kinds_nightly
@pytest.mark.parametrize(
    "part", ["worker", *(pytest.param(one, marks=pytest.mark.nightly) for one in ("server", "qemu"))]
)
def test_kills_while_a_snapshot_is_taken(
    manager: Manager, folder: Path, machines: Machines, part: str, kind: str
) -> None:
    """If the worker, the disk server or QEMU is killed, the snapshot is either complete or absent, and the others keep
    running."""
    small = guest(manager, folder, kind=kind, memory_bytes=64 * MIB)
    for number in range(daily_or_nightly(2, 4)):
        states = {one: disks for one, disks in machines.states("small").items() if one}

        def take(name: str = f"{part} {number}") -> None:
            with contextlib.suppress(VmmError):
                small.create(name)

        taking = threading.Thread(target=take)
        taking.start()
        time.sleep((0.03, 0.1, 0.06, 0.15)[number])  # the moment of the kill
        processes()[part].send(signal.SIGKILL)
        taking.join(60)
        if part == "qemu":
            wait_until(lambda: manager.state("small") is MachineState.OFF, "it is off")
            wait_until(
                lambda: not Path(MachineRef.of("small").runtime.folder).exists(), "the machine is off and cleaned up"
            )
            manager.start("small")
        else:
            wait_whole()
            wait_state(manager, MachineState.RUNNING)
        wait_until(lambda: settled(small), "it is settled")
        before = count(manager)
        wait_until(lambda before=before: count(manager) > before, "the guest continues counting")  # type: ignore[misc]
        tree = small.tree()
        assert {one: machines.of_snapshot("small", one) for one in states} == states
        for one in tree.snapshots.values():
            assert one.memory_bytes is not None and Path(one.folder).is_dir()
        folders = (
            {path.name for path in Path(next(iter(tree.snapshots.values())).folder).parent.iterdir()}
            if (tree.snapshots)
            else set()
        )
        assert folders == set(tree.snapshots), "files of a snapshot that was not taken are left"
    newest = small.create("at last")
    small.apply(newest.id, discard_current=True)
    manager.start("small")
    assert count(manager) > 0


def settled(small: MachineSnapshots) -> bool:
    """True when no journal is left, and no process works on the snapshots."""
    try:
        small.set_limit(50)
    except InUse:
        return False
    return load_tree(registry.load("small").paths).journal is None
