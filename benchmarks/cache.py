# SPDX-License-Identifier: Apache-2.0
"""What `vhdkit serve --cache none` keeps in the page cache, and what it costs, against `--cache writeback`.

A guest is played by fio over a unix socket; both modes follow one another in each round, on the same image in a folder
on a disk, and ratios are taken round by round. The last rows: 4 GiB written and read through the server, and how much
of the image is in the page cache then. qemu-nbd with O_DIRECT (`--cache=none`) runs beside them.

    script/bench cache -- --rounds 3 --seconds 2 --size 1024
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import nbd_peers as peers
from benchmarks.common import Row, arguments, has, report, workplace
from benchmarks.nbd import drop_cache, fill, middle_ratio
from benchmarks.nbd_peers import Load, Server

MIB = 1 << 20
PAGE_BYTES = 4096
GOAL_MIB = 64
THROUGH_BYTES = 4 << 30
SYNCS_EVERY = 32  # writes, in the load with flushes


@dataclass(frozen=True, slots=True)
class Work:
    """What the guest does. `is_warm`: the same data was read once before, in each mode."""

    name: str
    load: Load
    is_warm: bool = False
    extra: tuple[str, ...] = ()


WORKS = (
    Work("4K random read, depth 16, again", Load("randread", 4096, 16), is_warm=True),
    Work("4K random read, depth 16, cold", Load("randread", 4096, 16)),
    Work("1M sequential read, again", Load("read", MIB, 4), is_warm=True),
    Work("1M sequential read, cold", Load("read", MIB, 4)),
    Work("4K random write, depth 16", Load("randwrite", 4096, 16)),
    Work("1M sequential write", Load("write", MIB, 4)),
    Work(f"4K random write, flush every {SYNCS_EVERY}", Load("randwrite", 4096, 1), extra=(f"--fsync={SYNCS_EVERY}",)),
)


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        found = ctypes.create_string_buffer(-(-len(view) // PAGE_BYTES))
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        if libc.mincore(start, len(view), found):
            raise peers.Failed("mincore failed")
    return sum(byte & 1 for byte in found.raw) * PAGE_BYTES


def contestants() -> list[Server]:
    """The two modes, and O_DIRECT in QEMU."""
    servers = [peers.ours("--cache", mode, name=f"vhdkit, {mode}") for mode in ("none", "writeback")]
    if has("qemu-nbd"):
        servers.append(peers.qemu(("--aio=native", "--cache=none")))
    return servers


def rate(server: Server, image: Path, work: Work, seconds: float, size: int) -> float:
    """Requests a second of one run; the device has nothing left to write when it begins."""
    drop_cache(image)
    with peers.running(server, image) as target:
        if work.is_warm:
            through(target, "read", size)
        return peers.measured(target, work.load, seconds, size=size, extra=work.extra).per_second


def through(target: peers.Running, mode: str, size: int) -> None:
    """Read or write this much, once."""
    command = [
        "fio", "--name=through", "--ioengine=nbd", f"--uri={target.uri}", f"--rw={mode}", f"--bs={MIB}",
        "--iodepth=4", f"--size={size}", "--output-format=json",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600, cwd=target.socket_path.parent)


def rates(image: Path, rounds: int, seconds: float, size: int) -> Iterator[list[str]]:
    """A row for each work and server."""
    servers = contestants()
    for work in WORKS:
        rows = {server.name: Row(server.name) for server in servers}
        for number in range(rounds):
            for server in servers[number % len(servers) :] + servers[: number % len(servers)]:
                rows[server.name].values.append(rate(server, image, work, seconds, size))
        ours = rows[servers[0].name]
        for row in rows.values():
            ratio = "" if row is ours else f"{middle_ratio(ours, row):.2f}"
            yield [work.name, row.name, f"{row.median:,.0f} /s", ratio]


def kept(folder: Path, through_bytes: int) -> Iterator[list[str]]:
    """A row for each mode and direction: what is in the cache once this much has passed."""
    for mode in ("none", "writeback"):
        image = folder / f"{mode}.vhd"
        fill(image, through_bytes)
        drop_cache(image)
        with peers.running(peers.ours("--cache", mode), image) as target:
            for direction in ("write", "read"):
                through(target, direction, through_bytes)
                left = cached_bytes(image) / MIB
                goal = "" if mode != "none" else f"goal {GOAL_MIB}: {'met' if left < GOAL_MIB else 'SHORT'}"
                what = f"cached after {direction} of {through_bytes // MIB} MiB"
                yield [what, f"vhdkit, {mode}", f"{left:,.0f} MiB", goal]
        image.unlink()


def main() -> None:
    """Run it."""
    parser = arguments("The page cache beside a guest's own", rounds=3)
    parser.add_argument("--seconds", type=float, default=2, help="of each run")
    parser.add_argument("--size", type=int, default=1024, help="of the disk, in MiB")
    parser.add_argument("--through", type=int, default=THROUGH_BYTES // MIB, help="MiB that pass for the last rows")
    options = parser.parse_args()
    with workplace(options.dir) as folder:
        image = folder / "disk.vhd"
        fill(image, options.size * MIB)
        rows = list(rates(image, options.rounds, options.seconds, options.size * MIB)) if options.rounds else []
        image.unlink()
        rows += kept(folder, options.through * MIB)
    columns = ["what", "server", "value", "none against it"]
    report("cache: a guest's data is not cached twice", columns, rows, {"rows": rows}, options.json)


if __name__ == "__main__":
    main()
