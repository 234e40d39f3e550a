# SPDX-License-Identifier: Apache-2.0
"""Snapshots of running machines: how long the guest is paused, and what a merge costs it.

    script/bench snapshot                        all of it, about four minutes
    script/bench snapshot -- --only pause        some of it: pause, live, offline
    script/bench snapshot -- --rounds 3

- pause: how long a boot-sector guest under TCG is paused for a snapshot with memory, captured in the background:
  with 256 MiB and four disks of 1 GiB, of 64 GiB, and with 1 GiB of memory. The worker's own measure, from before the
  stop until QEMU runs again.
- live: 4 KiB random reads and writes of a Linux guest on its disk, alone and while layers below are merged; then how
  long its writes are held while the layer it writes to is merged.
- offline: the merge of a machine that is off, through `vmm snapshot merge`, beside `vhdkit merge` of the same files.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vhdkit
import vmm
from benchmarks.common import Row, arguments, has, report, workplace
from benchmarks.vmm import QEMU, reads_per_second
from tests.vmm.guests import boot_sector, linux
from tests.vmm.guests.shell import GuestShell
from tests.vmm.guests.tools import GuestUnavailable
from vmm.api.machine_snapshots import MachineSnapshots
from vmm.api.manager import DiskRequest, Manager
from vmm.api.stopped_machine import StoppedMachine
from vmm.processes.worker_connection import MachineRef

MIB = 1 << 20
GIB = 1 << 30
PARTS = ("pause", "live", "offline")
GOAL_PAUSE_SECONDS, GOAL_MORE_SECONDS = 0.200, 0.040
GOAL_LIVE, GOAL_HELD_SECONDS, GOAL_OFFLINE = 0.6, 0.100, 0.9
DISKS = 4
MERGE_MIB = 256  # written into a layer that is merged
READS, WRITE_MIB = 4000, 32  # by the guest in one run


@contextmanager
def home(folder: Path) -> Iterator[Manager]:
    """A private manager of machines; what runs is stopped at the end."""
    runtime = tempfile.mkdtemp(prefix="vmmb-", dir="/tmp")
    os.chmod(runtime, 0o711)
    os.environ.update(VMM_HOME=str(folder / "home"), VMM_RUNTIME=runtime)
    manager = Manager()
    try:
        yield manager
    finally:
        for name in manager.names():
            with contextlib.suppress(vmm.WrongState):
                manager.stop(name)
            while manager.snapshots(name).merging() is not None:
                manager.snapshots(name).cancel_merge()
        shutil.rmtree(runtime, ignore_errors=True)


# -- how long the guest stands still ----------------------------------------------------------------------------------


def pauses(manager: Manager, folder: Path, name: str, memory: int, disk_bytes: int, rounds: int) -> Row:
    """Snapshots, one after the other, each deleted again."""
    place = folder / name
    place.mkdir()
    images = [place / f"{number}.vhd" for number in range(DISKS)]
    for image in images:
        vhdkit.create_image(image, disk_bytes)
        with vhdkit.open_disk(image, writable=True) as disk:
            boot_sector.install(disk, boot_sector.BootOptions(write_every=1))
    controllers = ("ide", "ide", "scsi", "scsi")
    manager.create(
        name, disks=[DiskRequest(str(one), controller=bus) for one, bus in zip(images, controllers, strict=True)],  # type: ignore[arg-type]
        memory_bytes=memory, accelerator="tcg", background_capture=True,
    )  # fmt: skip
    manager.start(name)
    time.sleep(1)
    snapshots = manager.snapshots(name)
    row = Row(f"{memory // MIB} MiB, {DISKS} disks of {disk_bytes // GIB} GiB: the guest stands still, s")
    for number in range(rounds + 1):
        snapshot = snapshots.create()
        assert snapshot.mode == "background", f"this host captures by {snapshot.mode} only: see vmm host doctor"
        if number:
            row.values.append(snapshot.pause_seconds or 0.0)
        snapshots.delete(snapshot.id)
        snapshots.merge_live()  # the next one begins with as few layers
    manager.stop(name)
    return row


def measure_pause(folder: Path, rounds: int) -> dict[str, Row]:
    """The three machines."""
    with home(folder) as manager:
        return {
            "small": pauses(manager, folder, "small", 256 * MIB, GIB, max(rounds, 5)),
            "large disks": pauses(manager, folder, "large-disks", 256 * MIB, 64 * GIB, max(rounds, 5)),
            "large memory": pauses(manager, folder, "large-memory", GIB, GIB, max(rounds, 5)),
        }


# -- what a live merge costs the guest --------------------------------------------------------------------------------


def fill(image: Path, seed: int) -> None:
    """Write into an image about as much as a day's work would."""
    shuffle = random.Random(seed)
    with vhdkit.open_disk(image, writable=True) as disk:
        for _ in range(MERGE_MIB):
            disk.write(shuffle.randrange(disk.size_bytes // MIB) * MIB, shuffle.randbytes(MIB))


def grown(manager: Manager, folder: Path, name: str, **settings: object) -> MachineSnapshots:
    """A machine, off, whose disk has two snapshots with a full layer after each."""
    image = folder / f"{name}.vhd"
    vhdkit.create_image(image, GIB)
    manager.create(name, disks=[DiskRequest(str(image), controller="virtio")], accelerator="tcg", **settings)  # type: ignore[arg-type]
    snapshots = manager.snapshots(name)
    for number in range(3):
        spec = manager.show(name).spec
        assert spec is not None and spec.disks[0].path is not None
        fill(Path(spec.disks[0].path), number)
        if number < 2:
            snapshots.create(str(number))
    return snapshots


def load(shell: GuestShell, seed: int) -> tuple[float, float]:
    """(random 4 KiB reads a second, MiB written a second) of the guest, one after the other, past its cache."""
    reads = reads_per_second(shell, "/dev/vda", 4, READS, seed)
    start = time.perf_counter()
    shell.check(
        f"dd if=/dev/zero of=/dev/vda bs=64k seek={seed * 512} count={WRITE_MIB * 16} oflag=direct 2>/dev/null"
    )
    return reads, WRITE_MIB / (time.perf_counter() - start)


def measure_live(folder: Path, rounds: int) -> dict[str, Row]:
    """A guest alone, and while its layers are merged."""
    guest = linux.linux_guest()
    rows = {
        "reads": Row("guest's 4 KiB random reads/s"),
        "reads merging": Row("the same during a live merge"),
        "writes": Row("guest's writes, MiB/s"),
        "writes merging": Row("the same during a live merge"),
        "held": Row("live merge of the layer written to: writes held, s"),
    }
    for number in range(rounds):
        place = folder / f"live{number}"
        place.mkdir()
        with home(place) as manager:
            snapshots = grown(
                manager, place, "guest", memory_bytes=int(linux.MEMORY) * MIB, kernel=str(guest.kernel),
                initrd=str(guest.initrd), append=guest.append,
            )  # fmt: skip
            manager.start("guest")
            shell = guest_shell("guest")
            shell.wait_ready(120)
            load(shell, 0)  # does not count
            for key, value in zip(("reads", "writes"), load(shell, 1), strict=True):
                rows[key].values.append(value)
            snapshots.delete("1")  # its result is below the layer that is written to
            worker = threading.Thread(target=merging_until, args=(snapshots, ended := threading.Event()))
            worker.start()
            for key, value in zip(("reads merging", "writes merging"), load(shell, 2), strict=True):
                rows[key].values.append(value)
            ended.set()
            worker.join()
            snapshots.merge_live()
            snapshots.delete("0")
            [done] = snapshots.merge_live()
            rows["held"].values.append(float(done.held_seconds or 0.0))
            manager.stop("guest")
    return rows


def merging_until(snapshots: MachineSnapshots, ended: threading.Event) -> None:
    """Merge at full speed; when done, a snapshot and its deletion provide the next merge."""
    while not ended.is_set():
        snapshots.merge_live()
        if not ended.is_set():
            snapshots.delete(snapshots.create(mode="stop").id)


def guest_shell(name: str) -> GuestShell:
    """The guest's shell, over the machine's console."""
    link = socket.socket(socket.AF_UNIX)
    link.connect(MachineRef.of(name).runtime.console)
    link.sendall(json.dumps({"type": "take", "scrollback": 0}).encode() + b"\n")
    while link.recv(1) != b"\n":
        pass
    return GuestShell(link)


# -- merges of a machine that is off ----------------------------------------------------------------------------------


def measure_offline(folder: Path, rounds: int) -> dict[str, Row]:
    """The same files, merged by vhdkit alone and by the machine manager."""
    plain, managed = Row("vhdkit merge, MiB/s"), Row("vmm snapshot merge, MiB/s")
    for number in range(rounds):
        place = folder / f"off{number}"
        place.mkdir()
        with home(place) as manager:
            snapshots = grown(manager, place, "off", memory_bytes=16 * MIB)
            leaf = manager.show("off").spec
            assert leaf is not None and leaf.disks[0].path is not None
            twin = place / "twin"
            twin.mkdir()
            chain = vhdkit.chain_paths(leaf.disks[0].path)
            for path in chain:
                shutil.copyfile(path, twin / Path(path).name)
            os.sync()
            start = time.perf_counter()
            vhdkit.merge(twin / Path(chain[0]).name, into=twin / Path(chain[-1]).name)
            plain.values.append(2 * MERGE_MIB / (time.perf_counter() - start))
            StoppedMachine.merge_in_background = lambda self: None  # type: ignore[method-assign]
            for one in ("0", "1"):
                snapshots.delete(one)
            os.sync()
            start = time.perf_counter()
            snapshots.merge()
            managed.values.append(2 * MERGE_MIB / (time.perf_counter() - start))
            shutil.rmtree(place)
    return {"plain": plain, "managed": managed}


# -- the program ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, and say which goals are met."""
    parser = arguments(str(__doc__).splitlines()[0], rounds=5)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them: " + ", ".join(PARTS))
    options = parser.parse_args()
    if not has(QEMU):
        raise SystemExit(f"needs {QEMU}: run script/setup, or install Debian's package qemu-system-x86")
    measures = {"pause": measure_pause, "live": measure_live, "offline": measure_offline}
    table: list[list[str]] = []
    data: dict[str, Any] = {}
    with workplace(options.dir) as folder:
        for part in options.only.split(","):
            try:
                rows = measures[part](folder, options.rounds)
            except GuestUnavailable as error:
                raise SystemExit(str(error)) from error
            table += [[row.name, f"{row.median:.3g}", "", ""] for row in rows.values()]
            table += goals(part, {key: row.median for key, row in rows.items()})
            data |= {f"{part} {key}": row.values for key, row in rows.items()}
    report("snapshots of machines under TCG", ["what", "median", "goal", ""], table, data, options.json)


def goals(part: str, medians: dict[str, float]) -> Iterator[list[str]]:
    """The goals of each part, and whether they are met."""
    if part == "pause":
        yield _goal("pause, 256 MiB and four disks, s", medians["small"], "<=", GOAL_PAUSE_SECONDS)
        more = medians["large memory"] - medians["small"]
        yield _goal("more for 1 GiB of memory, s", more, "<=", GOAL_MORE_SECONDS)
        more = medians["large disks"] - medians["small"]
        yield _goal("more for disks 64 times as large, s", more, "<=", GOAL_MORE_SECONDS)
    elif part == "live":
        for kind in ("reads", "writes"):
            yield _goal(f"{kind} during a merge: ratio", medians[f"{kind} merging"] / medians[kind], ">=", GOAL_LIVE)
        yield _goal("writes held, s", medians["held"], "<=", GOAL_HELD_SECONDS)
    else:
        yield _goal("vmm's merge: ratio", medians["managed"] / medians["plain"], ">=", GOAL_OFFLINE)


def _goal(name: str, value: float, sign: str, goal: float) -> list[str]:
    is_met = value <= goal if sign == "<=" else value >= goal
    return [name, f"{value:.3f}", f"{sign} {goal:g}", "met" if is_met else "MISSED"]


if __name__ == "__main__":
    main()
