# SPDX-License-Identifier: Apache-2.0
"""Random 4 KiB reads on chains of depth 1, 8, 32 and 128 with the same content: does depth cost anything?

One 4 GiB disk with 2 MiB blocks. Every block holds data, and runs of 4 to 64 KiB all over it are rewritten; in the
deep chains those rewrites are in the children, so nearly every block has several owners. The same offsets are read
in every chain, a hash over what was read proves that all chains show one disk. Cold: first pass after opening.
Peer: libvhdi (through its Python bindings, if installed) on the chains that it reads correctly: those of depth 1.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import vhdkit
from benchmarks.common import arguments, interleaved, report, workplace

DISK_BYTES = 4 << 30
BLOCK_BYTES = 2 << 20
HOT_BYTES = 256 << 10  # of each block, so that all of it stays in the page cache
REWRITES = 6000
READS = 60_000
DEPTHS = (1, 8, 32, 128)
_LIBVHDI = """
import random, sys, time, pyvhdi
path, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
image = pyvhdi.file(); image.open(path)
rng = random.Random(seed)
offsets = [rng.randrange(2048) * 2097152 + rng.randrange(64) * 4096 for _ in range(count)]
for offset in offsets: image.read_buffer_at_offset(4096, offset)
start = time.perf_counter()
for offset in offsets: image.read_buffer_at_offset(4096, offset)
print(count / (time.perf_counter() - start))
"""


def rewrites() -> list[tuple[int, int]]:
    """The (offset, size) of every rewrite, in order."""
    rng = random.Random(1)
    result = []
    for _ in range(REWRITES):
        size = rng.choice((4, 8, 16, 64)) << 10
        start = rng.randrange(0, HOT_BYTES - size + 1, 4096)  # file systems write pages
        result.append((rng.randrange(DISK_BYTES // BLOCK_BYTES) * BLOCK_BYTES + start, size))
    return result


def build(folder: Path, depth: int) -> Path:
    """A chain of `depth` layers: all data in the base, the rewrites distributed over the children."""
    rng = random.Random(2)
    path = folder / f"depth{depth}-0.vhd"
    vhdkit.create_image(path, DISK_BYTES)
    runs = rewrites()
    with vhdkit.open_disk(path, writable=True) as disk:
        for block in range(DISK_BYTES // BLOCK_BYTES):
            disk.write(block * BLOCK_BYTES, rng.randbytes(HOT_BYTES))
        if depth == 1:
            rewrite(disk, runs, 0)
    share = -(-len(runs) // max(depth - 1, 1))
    for number in range(1, depth):
        child = folder / f"depth{depth}-{number}.vhd"
        vhdkit.create_child(child, path)
        path = child
        first = (number - 1) * share
        with vhdkit.open_disk(path, writable=True) as disk:
            rewrite(disk, runs[first : first + share], first)
    return path


def rewrite(disk: vhdkit.Disk, runs: list[tuple[int, int]], first: int) -> None:
    """Write each run with bytes that depend on its number only."""
    for number, (offset, size) in enumerate(runs, first):
        disk.write(offset, random.Random(number).randbytes(size))


def offsets(seed: int) -> list[int]:
    """Where the reads go."""
    rng = random.Random(seed)
    return [rng.randrange(2048) * BLOCK_BYTES + rng.randrange(HOT_BYTES >> 12) * 4096 for _ in range(READS)]


def read_rate(disk: vhdkit.Disk, places: list[int]) -> float:
    """Reads a second over all places."""
    buffer = memoryview(bytearray(4096))
    read_into = disk.read_into
    start = time.perf_counter()
    for place in places:
        read_into(place, buffer)
    return len(places) / (time.perf_counter() - start)


def content_hash(disk: vhdkit.Disk) -> str:
    """Hash over the part of every block that holds data."""
    digest = hashlib.sha256()
    for block in range(0, DISK_BYTES // BLOCK_BYTES, 8):
        digest.update(disk.read(block * BLOCK_BYTES, HOT_BYTES))
    return digest.hexdigest()


def libvhdi_rate(path: Path) -> float:
    """Reads a second through pyvhdi after one warm pass, in the system's Python; 0 if it is not installed."""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", _LIBVHDI, str(path), "3", str(READS // 10)],
        check=False,
        capture_output=True,
        text=True,
    )
    return float(done.stdout) if done.returncode == 0 else 0.0


def main() -> None:
    """Build, check, measure, print."""
    options = arguments(__doc__ or "").parse_args()
    places = offsets(3)
    with workplace(options.dir) as folder:
        leaves = {depth: build(folder, depth) for depth in DEPTHS}
        disks = {depth: vhdkit.open_disk(leaf) for depth, leaf in leaves.items()}
        cold = {depth: read_rate(disk, places) for depth, disk in disks.items()}
        hashes = {content_hash(disk) for disk in disks.values()}
        assert len(hashes) == 1, "the chains do not show the same disk"
        contestants: dict[str, Callable[[], float]] = {
            str(depth): partial(read_rate, disk, places) for depth, disk in disks.items()
        }
        if libvhdi_rate(leaves[1]):
            contestants["libvhdi, depth 1"] = partial(libvhdi_rate, leaves[1])
        rows = interleaved(contestants, options.rounds)
        for disk in disks.values():
            disk.close()
    one = rows["1"]
    table, data = [], {}
    for name, row in rows.items():
        ratio = sorted(a / b for a, b in zip(row.values, one.values, strict=True))[len(row.values) // 2]
        first = f"{cold[int(name)]:,.0f}" if name.isdigit() else "-"
        table.append(
            [
                f"vhdkit, depth {name}" if name.isdigit() else name,
                f"{row.median:,.0f}",
                first,
                f"{ratio:.2f}",
            ]
        )
        data[name] = {
            "reads_per_second": row.median,
            "ratio_to_depth_1": ratio,
            "cold": cold.get(int(name)) if name.isdigit() else None,
        }
    columns = ["4 KiB random reads", "warm reads/s", "cold reads/s", "of depth 1"]
    report("depth: reads do not slow down with depth", columns, table, {"results": data}, options.json)


if __name__ == "__main__":
    main()
