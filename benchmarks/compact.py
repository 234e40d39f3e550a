# SPDX-License-Identifier: Apache-2.0
"""Compacting and growing: how fast blocks move, compared with `cp` of as many bytes, and memory at 2 TiB.

Compact: a dynamic image of 2 MiB blocks whose first half is zeros and whose second half is data, so that every block
of data moves (`vhdkit compact` as a library call, everything durable when it returns). Resize: an image whose BAT
grows over the first blocks, so that those move. `cp` copies a raw file of exactly the bytes that move to a new one,
followed by `sync`. Every result is checked before anything is timed.

Memory: a 2040 GiB image, every block allocated in a sparse file (only bitmaps are stored), planned and compacted in a
separate process; the peak is the kernel's figure.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import vhdkit
from benchmarks.common import Row, arguments, interleaved, report, timed, workplace

MIB, GIB = 1 << 20, 1 << 30
BLOCK = 2 * MIB
LARGE_BLOCK = 256 * MIB
DATA_BYTES = GIB // 2  # the bytes that move
BIG = 2040 * GIB

_MEMORY = """
import json, resource, sys, time
import vhdkit
begin = time.perf_counter()
done = vhdkit.{call}
print(json.dumps({{"seconds": time.perf_counter() - begin,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "moved": done.moved_block_count, "dropped": done.dropped_block_count}}))
"""


def half_empty(path: Path) -> None:
    """A dynamic image: blocks of zeros, then as many of data."""
    rng = random.Random(3)
    vhdkit.create_image(path, 2 * DATA_BYTES)
    with vhdkit.open_disk(path, writable=True) as disk:
        for offset in range(0, DATA_BYTES, BLOCK):
            disk.write_zeroes(offset, BLOCK)
            disk.write(offset, bytes(BLOCK))
        for offset in range(DATA_BYTES, 2 * DATA_BYTES, BLOCK):
            disk.write(offset, rng.randbytes(BLOCK))


def crowded(path: Path) -> int:
    """An image of 256 MiB blocks, the first of them in the way of a longer BAT; returns the size to grow to."""
    rng = random.Random(4)
    vhdkit.create_image(path, 2 * LARGE_BLOCK, block_size_bytes=LARGE_BLOCK)
    with vhdkit.open_disk(path, writable=True) as disk:
        for offset in range(0, 2 * LARGE_BLOCK, MIB):
            disk.write(offset, rng.randbytes(MIB))
    return BIG


def full_of_holes(path: Path, *, first_data: bool) -> None:
    """A 2040 GiB image, its blocks allocated: zeros, but for one sector of every 64th block with `first_data`."""
    vhdkit.create_image(path, BIG)
    count = BIG // BLOCK
    table = 4096
    first = table + (count * 4 + 4095) // 4096 * 4096 + 4096 - 512
    starts = first // 512 + np.arange(count, dtype=np.int64) * (BLOCK + 4096) // 512
    fits = starts < 0xFFFFFFFF - BLOCK // 512
    entries = np.where(fits, starts, 0xFFFFFFFF).astype(">u4")
    with path.open("r+b") as file:
        footer = file.read(512)
        file.seek(table)
        file.write(entries.tobytes())
        end = int(starts[fits].max()) * 512 + 512 + BLOCK
        file.truncate(end)
        file.seek(end)
        file.write(footer)
        if first_data:
            for start in starts[fits][1::64].tolist():
                file.seek(start * 512)
                file.write(b"\xff" * 512 + struct.pack(">Q", start))


def prepared(source: Path, copy: Path) -> None:
    """A fresh copy of the source, in the page cache and at rest."""
    copy.unlink(missing_ok=True)
    shutil.copyfile(source, copy)
    subprocess.run(["sync", str(copy)], check=True)


def ours(source: Path, copy: Path, work: Callable[[Path], object]) -> Callable[[], float]:
    """A contestant: a library call on a fresh copy."""

    def run() -> float:
        prepared(source, copy)
        return timed(lambda: work(copy))

    return run


def cp(raw: Path, out: Path) -> Callable[[], float]:
    """A contestant: cp and sync of a raw file."""

    def run() -> float:
        out.unlink(missing_ok=True)
        subprocess.run(["sync", str(raw)], check=True)

        def work() -> None:
            subprocess.run(["cp", str(raw), str(out)], check=True)
            subprocess.run(["sync", str(out)], check=True)

        return timed(work)

    return run


def raw_of(path: Path, size: int) -> Path:
    """A file of random bytes."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    return path


def memory(path: Path, call: str) -> dict[str, float]:
    """Run one call in a separate process, and return what it took."""
    program = _MEMORY.format(call=call.format(path=str(path)))
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    """Build, prove, measure, print."""
    options = arguments(__doc__ or "").parse_args()
    table: list[list[str]] = []
    data: dict[str, object] = {}
    with workplace(options.dir) as folder:
        half, crowd, copy = folder / "half.vhd", folder / "crowd.vhd", folder / "copy.vhd"
        half_empty(half)
        size = crowded(crowd)
        prepared(half, copy)
        moved = vhdkit.compact(copy).moved_block_count * BLOCK
        assert vhdkit.compare(half, copy).same_content and moved == DATA_BYTES
        plan = vhdkit.resize(crowd, size, dry_run=True)
        grown = plan.moved_block_count * LARGE_BLOCK
        jobs: dict[str, tuple[int, Path, Callable[[Path], object]]] = {
            "compact": (moved, half, vhdkit.compact),
            "resize, blocks in the way": (grown, crowd, lambda path: vhdkit.resize(path, size)),
        }
        for name, (count, source, work) in jobs.items():
            raw = raw_of(folder / "bytes.raw", count)
            contestants = {"vhdkit": ours(source, copy, work), "cp and sync": cp(raw, folder / "out.raw")}
            rows: dict[str, Row] = interleaved(contestants, options.rounds)
            for label, row in rows.items():
                against = row.median and rows["cp and sync"].median / row.median
                rate = count / row.median / MIB
                table.append(
                    [name, label, f"{count >> 20}", f"{row.median:.2f}", f"{rate:,.0f}", f"{against:.2f}", ""]
                )
                data[f"{name}: {label}"] = {"seconds": row.median, "bytes": count, "speed_against_cp": against}
        copy.unlink()
        big = folder / "big.vhd"
        for name, first_data, call in (
            ("2040 GiB, compact, 16 thousand blocks kept", True, "compact({path!r})"),
            ("2040 GiB, compact, all zeros", False, "compact({path!r})"),
        ):
            big.unlink(missing_ok=True)
            full_of_holes(big, first_data=first_data)
            used = memory(big, call)
            table.append([name, "vhdkit", "", f"{used['seconds']:.1f}", "", "", f"{used['peak_mib']:.0f}"])
            data[name] = used
    columns = ["work", "by", "MiB moved", "seconds", "MiB/s", "of cp's speed", "peak MiB"]
    report("compact", columns, table, {"results": data}, options.json)


if __name__ == "__main__":
    main()
