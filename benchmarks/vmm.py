# SPDX-License-Identifier: Apache-2.0
"""The machine manager: how soon a machine responds, how small its worker is, how fast a guest reads from a chain.

    script/bench vmm                         all of it, about three minutes
    script/bench vmm -- --only start         some of it: start, read
    script/bench vmm -- --rounds 3 --reads 1000

- start: from the call of `vmm start` on the command line to the guest's first byte on its serial port, as recorded in
  the console's log. The guest is a boot sector under TCG, so nearly all the time is vmm's. Then the worker's memory.
- read: 4 KiB random reads, past the guest's cache, of a Linux guest under TCG on virtio, by one process and by
  several. In one guest there are two disks of the same content: a chain of several layers served by vhdkit, and the
  same content as one dynamic VHD behind qemu-nbd with QEMU's own `vpc` driver (which reads no chain). They alternate.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import vhdkit
from benchmarks.common import Row, arguments, has, report, start_beside, workplace
from tests.servers import serving
from tests.vmm.guests import boot_sector, launch, linux
from tests.vmm.guests.shell import GuestShell
from tests.vmm.guests.tools import GuestUnavailable

MIB = 1 << 20
PAGE = 4096
PARTS = ("start", "read")
GOAL_START_SECONDS = 0.9
GOAL_WORKER_MIB = 60
GOAL_READ = 1.0
DISK_MIB = 256
LAYERS = 4
REWRITES_PER_LAYER = 2000
PROCESSES = (1, 4)
START_SECONDS = 60.0
QEMU = "qemu-system-x86_64"
VMM = str(Path(sys.executable).with_name("vmm"))


# -- start ------------------------------------------------------------------------------------------------------------


def vmm(*words: str, environment: dict[str, str]) -> str:
    """Run the command line, which must succeed; returns its output."""
    done = subprocess.run([VMM, *words], env=environment, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"vmm {words[0]} failed")  # it has printed the reason
    return done.stdout


def one_start(environment: dict[str, str], log: Path) -> tuple[float, float]:
    """Start the machine `bench`, and power it off: seconds to its first byte, MiB of its worker."""
    before = log.stat().st_size if log.exists() else 0
    start = time.perf_counter()
    process = subprocess.Popen([VMM, "start", "bench"], env=environment, stdout=subprocess.DEVNULL)
    deadline = start + START_SECONDS
    while not (log.exists() and b"B" in log.read_bytes()[before:]):
        if time.perf_counter() > deadline or process.poll() not in (None, 0):
            raise SystemExit("the machine did not speak")
        time.sleep(0.001)
    seconds = time.perf_counter() - start
    if process.wait() != 0:
        raise SystemExit("vmm start failed")
    status = json.loads(vmm("show", "bench", "--json", environment=environment))
    memory = resident_mib(int(status["pids"]["worker"]))
    vmm("stop", "bench", environment=environment)
    return seconds, memory


def resident_mib(pid: int) -> float:
    """The resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} is gone")


def measure_start(folder: Path, rounds: int) -> dict[str, Row]:
    """Starts, one after the other, after one that does not count."""
    image = folder / "boot.vhd"
    vhdkit.create_image(image, 16 * MIB)
    with vhdkit.open_disk(image, writable=True) as disk:
        boot_sector.install(disk)
    child = folder / "leaf.avhd"
    vhdkit.create_child(child, image)
    # Sockets have short names: the runtime folder must have one, too.
    with tempfile.TemporaryDirectory(prefix="vmmb-") as runtime:
        environment = {**os.environ, "VMM_HOME": str(folder / "home"), "VMM_RUNTIME": runtime}
        vmm("create", "bench", "--memory", "16M", "--accel", "tcg", "--disk", str(child), environment=environment)
        log = folder / "home" / "machines" / "bench" / "console.log"
        seconds, memory = Row("vmm start to the first serial byte, s"), Row("the worker, MiB")
        try:
            for number in range(max(rounds, 3) + 1):
                values = one_start(environment, log)
                if number:
                    seconds.values.append(values[0])
                    memory.values.append(values[1])
        finally:
            subprocess.run(
                [VMM, "stop", "bench"],
                env=environment, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
    return {"start": seconds, "worker": memory}


# -- read -------------------------------------------------------------------------------------------------------------


def make_disks(folder: Path) -> tuple[Path, Path]:
    """(the leaf of a chain, one dynamic VHD of the same content)."""
    shuffle = random.Random(5)
    leaf = folder / "base.vhd"
    vhdkit.create_image(leaf, DISK_MIB * MIB)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        for offset in range(0, disk.size_bytes, MIB):
            disk.write(offset, shuffle.randbytes(MIB))
    for number in range(1, LAYERS):
        child = folder / f"{number}.avhd"
        vhdkit.create_child(child, leaf)
        leaf = child
        with vhdkit.open_disk(leaf, writable=True) as disk:
            for _ in range(REWRITES_PER_LAYER):
                disk.write(shuffle.randrange(DISK_MIB * MIB // PAGE) * PAGE, shuffle.randbytes(PAGE))
    flat = folder / "flat.vhd"
    vhdkit.convert(leaf, flat, vhdkit.DiskFormat.DYNAMIC)
    return leaf, flat


@contextmanager
def served_by_qemu(image: Path, socket: Path) -> Iterator[None]:
    """qemu-nbd with QEMU's own driver for VHD, and the cache that vhdkit has (the host's)."""
    process = start_beside(
        ["qemu-nbd", "--format=vpc", "--read-only", "--persistent", "--shared=4", "--cache=writeback",
         "--export-name=disk", f"--socket={socket}", str(image)]
    )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("qemu-nbd did not start")
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


def nbd_disk(name: str, socket: Path, export: str) -> list[str]:
    """QEMU's arguments for a virtio disk on an NBD server."""
    node = f"driver=nbd,node-name={name},server.type=unix,server.path={socket},export={export},read-only=on"
    return ["-blockdev", node, *launch.attach(name, "virtio")]


def reads_per_second(shell: GuestShell, device: str, processes: int, reads: int, seed: int) -> float:
    """Random reads by that many processes at once in the guest."""
    pages = DISK_MIB * MIB // PAGE
    each = reads // processes
    jobs = " ".join(
        f"random-read {device} {each} {pages} {seed * 1000 + job} >/run/t{job} &" for job in range(processes)
    )
    texts = shell.check(f"{jobs} wait; cat /run/t?; rm /run/t?", seconds=300).split()
    assert len(texts) == processes, texts
    return each * processes / (max(int(text) for text in texts) / 1e9)


def measure_read(folder: Path, rounds: int, reads: int) -> dict[int, dict[str, Row]]:
    """Reads per second, by the number of processes and by server; both disks are measured in every round."""
    guest = linux.linux_guest()
    leaf, flat = make_disks(folder)
    devices = {"vhdkit, a chain": "/dev/vda", "qemu-nbd, vpc": "/dev/vdb"}
    with tempfile.TemporaryDirectory(prefix="vmmb-") as short, ExitStack() as stack:
        sockets = Path(short)
        stack.enter_context(serving(leaf, "--socket", sockets / "ours", "--read-only"))
        stack.enter_context(served_by_qemu(flat, sockets / "theirs"))
        words = [
            "-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", guest.append,
            *nbd_disk("ours", sockets / "ours", ""), *nbd_disk("theirs", sockets / "theirs", "disk"),
        ]  # fmt: skip
        machine = stack.enter_context(launch.running(QEMU, sockets, *words, memory=linux.MEMORY))
        shell = stack.enter_context(GuestShell(machine.serial))
        shell.wait_ready()
        hashes = {shell.check(f"sha256sum <{device}", seconds=300) for device in devices.values()}
        assert len(hashes) == 1, "the two disks differ"
        rows = {count: {name: Row(name) for name in devices} for count in PROCESSES}
        for number in range(max(rounds, 3) + 1):
            for count in PROCESSES:
                # The order alternates, so that neither always follows the other.
                for name, device in list(devices.items())[:: 1 if number % 2 else -1]:
                    value = reads_per_second(shell, device, count, reads, number)
                    if number:
                        rows[count][name].values.append(value)
    return rows


# -- the program ------------------------------------------------------------------------------------------------------


def verdict(is_met: bool) -> str:
    """The verdict for the table."""
    return "met" if is_met else "MISSED"


def main() -> None:
    """Measure, and say which goals are met."""
    parser = arguments(str(__doc__).splitlines()[0], rounds=7)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them: " + ", ".join(PARTS))
    parser.add_argument("--reads", type=int, default=8000, help="reads by the guest in one go")
    options = parser.parse_args()
    if not has(QEMU):
        raise SystemExit(f"needs {QEMU}: run script/setup, or install Debian's package qemu-system-x86")
    parts = options.only.split(",")
    table: list[list[str]] = []
    data: dict[str, Any] = {}
    with workplace(options.dir) as folder:
        if "start" in parts:
            rows = measure_start(folder, options.rounds)
            for part, most in ("start", GOAL_START_SECONDS), ("worker", float(GOAL_WORKER_MIB)):
                row = rows[part]
                table.append([row.name, f"{row.median:.2f}", f"<= {most:g}", verdict(row.median <= most)])
                data[part] = row.values
        if "read" in parts:
            try:
                by_count = measure_read(folder, options.rounds, options.reads)
            except GuestUnavailable as error:
                raise SystemExit(str(error)) from error
            for count, contestants in by_count.items():
                ours, theirs = contestants.values()
                ratio = statistics.median(a / b for a, b in zip(ours.values, theirs.values, strict=True))
                for row in ours, theirs:
                    table.append([f"guest reads/s, {count} at once: {row.name}", f"{row.median:.0f}", "", ""])
                    data[f"read-{count}-{row.name}"] = row.values
                goal = f">= {GOAL_READ:.1f}"
                table.append(
                    [f"guest reads, {count} at once: ratio", f"{ratio:.2f}", goal, verdict(ratio >= GOAL_READ)]
                )
                data[f"read-{count}-ratio"] = ratio
    report("vmm: machines under TCG", ["what", "median", "goal", ""], table, data, options.json)


if __name__ == "__main__":
    main()
