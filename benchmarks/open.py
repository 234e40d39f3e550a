# SPDX-License-Identifier: Apache-2.0
"""Opening a chain of eight VHDs of 2040 GiB, the largest size of a VHD, with every block of every layer allocated.

The files are sparse: headers, full BATs and footers are there, the data is holes, so a million blocks a layer cost no
space. Each round is a separate process that opens the chain, reads one sector and reports its time and peak memory.
Peer: `qemu-img info` on the base alone, which reads one layer's BAT.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import vhdkit
from benchmarks.common import arguments, has, interleaved, report, timed_command, workplace

DISK_BYTES = 2040 << 30
DEPTH = 8
BLOCK_BYTES = 2 << 20
_OPEN = """
import json, resource, sys, time
import vhdkit
start = time.perf_counter()
with vhdkit.open_disk(sys.argv[1]) as disk:
    opened = time.perf_counter() - start
    disk.read(disk.size_bytes // 2, 512)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": opened, "peak": peak}))
"""


def allocate_all(path: Path) -> None:
    """Point every BAT entry at a separate block, in a file that is one big hole behind its headers."""
    block_count = DISK_BYTES // BLOCK_BYTES
    with path.open("r+b") as file:
        file.seek(-512, 2)
        footer = file.read()
        first = -(-file.tell() // 4096) * 8 + 7  # sector of the first bitmap, its data on a page boundary
        step = BLOCK_BYTES // 512 + 8
        entries = (first + np.arange(block_count, dtype=np.int64) * step).astype(">u4")
        file.seek(4096)
        file.write(entries.tobytes())
        file.seek((first + block_count * step) * 512)
        file.write(footer)


def main() -> None:
    """Build, measure, print."""
    options = arguments(__doc__ or "").parse_args()
    peaks: list[float] = []
    with workplace(options.dir) as folder:
        leaf = folder / "layer0.vhd"
        vhdkit.create_image(leaf, DISK_BYTES)
        base = leaf
        for number in range(1, DEPTH):
            child = folder / f"layer{number}.vhd"
            vhdkit.create_child(child, leaf)
            leaf = child
        for path in folder.glob("layer*.vhd"):
            allocate_all(path)

        def ours() -> float:
            done = subprocess.run([sys.executable, "-c", _OPEN, str(leaf)], check=True, capture_output=True, text=True)
            result = json.loads(done.stdout)
            peaks.append(result["peak"])
            return float(result["seconds"])

        contestants = {"vhdkit, 8 layers": ours}
        if has("qemu-img"):
            contestants["qemu-img info, 1 layer (whole process)"] = lambda: timed_command(
                "qemu-img", "info", str(base)
            )
        rows = interleaved(contestants, options.rounds)
    peak = max(peaks)
    table = [
        [name, f"{row.median:.3f}", f"{peak / (1 << 20):.0f}" if name.startswith("vhdkit") else "-"]
        for name, row in rows.items()
    ]
    data = {name: {"seconds": row.median} for name, row in rows.items()}
    columns = ["opening 2040 GiB, all blocks allocated", "seconds", "peak MiB"]
    report("open", columns, table, {"results": data, "peak_bytes": peak}, options.json)


if __name__ == "__main__":
    main()
