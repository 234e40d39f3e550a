# SPDX-License-Identifier: Apache-2.0
"""The mount compared with vhdimount and nbdfuse: fio with plain reads and writes on the mounted file, with goals.

Every measurement is a fresh mount and one run of fio; all contestants follow one another in each round, and ratios are
taken round by round, so that a machine whose speed drifts treats all alike. The image is in memory (its pages are
warm), and the kernel has not yet cached the mounted file. Two ways to read: as programs do, through the kernel's page
cache and with its read-ahead, and with O_DIRECT, where each request reaches the server.

    script/bench fuse -- --rounds 5 --seconds 3
    script/bench fuse -- --rounds 1 --seconds 0.5 --size 128     a quick run
    script/bench fuse -- --cold                                  from a disk, with nothing in the page cache

With --cold the images lie on a disk, are dropped from the page cache before each run, and no block is read twice; a
VHDX of the same disk is compared with the VHD.

nbdfuse serves what nbdkit's plugin for plain files, in C, has of the same disk as a raw file, and what qemu-nbd makes
of the VHD. vhdimount only reads. Each server has a session of its own, as ours and vhdimount's have anyway: the kernel
shares out processor time by sessions (autogroup), so that on a busy machine nbdfuse in fio's session was twice as fast
as outside of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import vhdkit
from benchmarks.common import Row, arguments, has, report, start_beside, workplace
from benchmarks.nbd import copy_raw, fill, middle_ratio
from benchmarks.nbd_cold import make_cold

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
WAIT_SECONDS = 20.0
RAMP = 0.1  # at the start of a run, not counted


class Failed(Exception):
    """A mount or a client that did not do what it should."""


@dataclass(frozen=True, slots=True)
class Load:
    """What fio does."""

    mode: str
    block_bytes: int
    direct: bool
    cold_bytes: int = 0  # read once each from a cold file; 0: for a time, from a warm one

    @property
    def is_read(self) -> bool:
        """Whether it reads."""
        return self.mode.endswith("read")


LOADS = {
    "1M sequential read": Load("read", MIB, False),
    "1M sequential read, O_DIRECT": Load("read", MIB, True),
    "4K random read": Load("randread", 4096, False),
    "4K random read, O_DIRECT": Load("randread", 4096, True),
    "1M sequential write": Load("write", MIB, False),
    "1M sequential write, O_DIRECT": Load("write", MIB, True),
}
COLD_LOADS = {
    "cold 1M sequential read": Load("read", MIB, False, cold_bytes=1024 * MIB),
    "cold 1M sequential read, O_DIRECT": Load("read", MIB, True, cold_bytes=1024 * MIB),
    "cold 4K random read": Load("randread", 4096, False, cold_bytes=24 * MIB),
    "cold 4K random read, O_DIRECT": Load("randread", 4096, True, cold_bytes=24 * MIB),
}
VHDX = "vhdkit, VHDX"
NBDFUSE, VHDIMOUNT = "nbdfuse, nbdkit file (raw)", "vhdimount"
GOALS = {
    ("1M sequential read", VHDIMOUNT): 10,
    ("1M sequential read", NBDFUSE): 0.9,
    ("1M sequential read, O_DIRECT", VHDIMOUNT): 10,
    ("1M sequential read, O_DIRECT", NBDFUSE): 0.9,
    ("4K random read", VHDIMOUNT): 4,
    ("4K random read", NBDFUSE): 0.7,
    ("4K random read, O_DIRECT", VHDIMOUNT): 4,
    ("4K random read, O_DIRECT", NBDFUSE): 0.7,
    **{(what, NBDFUSE): 0.9 for what in COLD_LOADS},
    **{(what, VHDX): 1.03 for what in COLD_LOADS},  # the VHD, at most so much faster
    ("1M sequential write", NBDFUSE): 0.9,
    ("1M sequential write, O_DIRECT", NBDFUSE): 0.9,
}


@dataclass(frozen=True, slots=True)
class Contestant:
    """`mounted` gives the path of a file with the disk in it, for as long as the block runs."""

    name: str
    mounted: Callable[[Path, bool], Iterator[Path]]
    writes: bool = True


# -- mounts -----------------------------------------------------------------------------------------------------


@contextmanager
def unmounted(mountpoint: Path) -> Iterator[None]:
    """Unmount at the end, and wait until that has happened."""
    try:
        yield
    finally:
        deadline = time.monotonic() + WAIT_SECONDS
        while os.path.ismount(mountpoint) and time.monotonic() < deadline:
            subprocess.run(["fusermount3", "-u", str(mountpoint)], check=False, capture_output=True)
            time.sleep(0.05)


def wait_for(path: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until the file exists."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise Failed(f"{path} does not appear")
        time.sleep(0.02)


def ours(folder: Path, writes: bool, name: str = "disk.vhd") -> Iterator[Path]:
    """`vhdkit mount`."""
    mountpoint = folder / "mnt"
    command = [sys.executable, "-m", "vhdkit"]
    subprocess.run(
        [*command, "mount", "--quiet", str(folder / name), str(mountpoint), *(["--rw"] if writes else [])],
        check=True, cwd=ROOT,
    )  # fmt: skip
    try:
        yield mountpoint / "disk.raw"
    finally:
        subprocess.run([*command, "umount", str(mountpoint)], check=True, cwd=ROOT)


def vhdimount(folder: Path, writes: bool) -> Iterator[Path]:
    """libvhdi's."""
    mountpoint = folder / "mnt"
    with unmounted(mountpoint):
        subprocess.run(["vhdimount", str(folder / "disk.vhd"), str(mountpoint)], check=True, stdout=subprocess.DEVNULL)
        wait_for(mountpoint / "vhdi1")
        yield mountpoint / "vhdi1"


def nbdfuse(folder: Path, server: list[str]) -> Iterator[Path]:
    """nbdfuse over an NBD server on a unix socket."""
    mountpoint, socket_path = folder / "mnt", folder / "nbd.sock"
    socket_path.unlink(missing_ok=True)
    with ExitStack() as stack:
        command = [word.format(socket=socket_path) for word in server]
        process = stack.enter_context(ended(start_beside(command, start_new_session=True)))
        wait_for(socket_path, process)
        stack.enter_context(unmounted(mountpoint))
        command = ["nbdfuse", str(mountpoint), f"nbd+unix:///?socket={socket_path}"]
        client = start_beside(command, start_new_session=True)
        stack.callback(client.wait, WAIT_SECONDS)
        stack.enter_context(unmounted(mountpoint))
        wait_for(mountpoint / "nbd", client)
        yield mountpoint / "nbd"


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A server that ends with the block."""
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(WAIT_SECONDS)


def nbdfuse_nbdkit(folder: Path, writes: bool) -> Iterator[Path]:
    """On nbdkit's plugin for files."""
    yield from nbdfuse(folder, ["nbdkit", "-f", "-U", "{socket}", "file", str(folder / "disk.raw")])


def nbdfuse_qemu(folder: Path, writes: bool) -> Iterator[Path]:
    """On qemu-nbd, which reads the VHD itself."""
    flags = ["--aio=threads", "--cache=writeback"]
    server = ["qemu-nbd", "--persistent", "--shared=16", "--format=vpc", *flags, "--socket={socket}"]
    yield from nbdfuse(folder, [*server, str(folder / "disk.vhd")])


def contestants(*, cold: bool) -> list[Contestant]:
    """All that are installed."""
    found = [Contestant("vhdkit", ours)]
    if cold:
        found.append(Contestant(VHDX, lambda folder, writes: ours(folder, writes, "disk.vhdx")))
    if has("vhdimount") and not cold:
        found.append(Contestant(VHDIMOUNT, vhdimount, writes=False))
    if has("nbdfuse") and has("nbdkit"):
        found.append(Contestant(NBDFUSE, nbdfuse_nbdkit))
    if has("nbdfuse") and has("qemu-nbd"):
        found.append(Contestant("nbdfuse, qemu-nbd", nbdfuse_qemu))
    return found


# -- measuring --------------------------------------------------------------------------------------------------


def rate(file: Path, load: Load, seconds: float, size: int, folder: Path) -> float:
    """Requests a second, of one run of fio."""
    for_a_time = ["--time_based", f"--runtime={seconds}", f"--ramp_time={seconds * RAMP:.2f}", "--norandommap"]
    once = [f"--io_size={min(load.cold_bytes, size)}"]
    command = [
        "fio", "--name=load", f"--filename={file}", "--ioengine=psync", f"--rw={load.mode}",
        f"--bs={load.block_bytes}", f"--direct={int(load.direct)}", f"--size={size}", "--randrepeat=0",
        "--output-format=json", *(once if load.cold_bytes else for_a_time),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds + 120, cwd=folder)
    start = done.stdout.find("{")
    if done.returncode != 0 or start < 0:
        raise Failed(f"fio: {done.stderr.strip()[-300:] or done.stdout[:300]}")
    job = json.loads(done.stdout[start : done.stdout.rindex("}") + 1])["jobs"][0]
    found: float = job["read" if load.is_read else "write"]["iops"]
    return found


def measured(one: Contestant, load: Load, seconds: float, size: int, folder: Path) -> float:
    """On a fresh mount."""
    with contextmanager(one.mounted)(folder, not load.is_read) as file:
        if load.cold_bytes:
            make_cold(*folder.glob("disk.*"))
        return rate(file, load, seconds, size, folder)


def measure(folder: Path, rounds: int, seconds: float, size: int, *, cold: bool) -> Iterator[list[str]]:
    """Every load on every contestant: lines of the report."""
    for what, load in (COLD_LOADS if cold else LOADS).items():
        playing = [one for one in contestants(cold=cold) if load.is_read or one.writes]
        rows = {one.name: Row(one.name) for one in playing}
        for number in range(rounds):
            for one in playing[number % len(playing) :] + playing[: number % len(playing)]:
                rows[one.name].values.append(measured(one, load, seconds, size, folder))
        own = rows["vhdkit"]
        for row in rows.values():
            speed = f"{row.median * load.block_bytes / MIB:,.0f} MiB/s"
            ratio = None if row is own else middle_ratio(own, row)
            goal = GOALS.get((what, row.name))
            is_met = ratio is not None and goal is not None and (ratio <= goal if row.name == VHDX else ratio >= goal)
            met = "" if ratio is None or goal is None else "met" if is_met else "SHORT"
            spread = f"{min(row.values):,.0f} to {max(row.values):,.0f}"
            yield [
                what, row.name, f"{row.median:,.0f}/s", spread, speed, "" if ratio is None else f"{ratio:.2f}",
                "" if goal is None else f"{goal:g}", met,
            ]  # fmt: skip


def main() -> None:
    """Build, measure, print."""
    options = arguments((__doc__ or "").splitlines()[0], rounds=3)
    options.add_argument("--seconds", type=float, default=2.0, help="each run of fio")
    options.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the disk")
    options.add_argument("--cold", action="store_true", help="from a disk, with nothing in the page cache")
    wanted = options.parse_args()
    if not has("fio"):
        raise SystemExit("fio is not installed; run script/setup")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise SystemExit("/dev/fuse is not there, or not for us")
    if missing := [tool for tool in ("vhdimount", "nbdfuse", "nbdkit", "qemu-nbd") if not has(tool)]:
        print(f"not compared, as not installed: {', '.join(missing)}", flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    memory = Path("/dev/shm")
    lines = []
    place = Path("/var/tmp") if wanted.cold else memory if memory.is_dir() else None
    with workplace(wanted.dir or place) as folder:
        (folder / "mnt").mkdir()
        fill(folder / "disk.vhd", wanted.size * MIB)
        copy_raw(folder / "disk.vhd", folder / "disk.raw")
        if wanted.cold:
            vhdkit.convert(folder / "disk.vhd", folder / "disk.vhdx", "vhdx")
        for line in measure(folder, max(wanted.rounds, 1), wanted.seconds, wanted.size * MIB, cold=wanted.cold):
            print("  ".join(cell for cell in line if cell), flush=True)
            lines.append(line)
    short = sum(line[-1] == "SHORT" for line in lines)
    columns = ["what", "mount", "rate", "rounds", "speed", "ratio", "goal", ""]
    title = (
        f"fuse: {wanted.size} MiB, {wanted.rounds} rounds of {wanted.seconds:g} s; {short} of the goals not reached"
    )
    report(title, columns, lines, {"results": [dict(zip(columns, line, strict=True)) for line in lines]}, wanted.json)


if __name__ == "__main__":
    main()
