# SPDX-License-Identifier: Apache-2.0
"""An honest client beside hostile ones: what it keeps of its rate, and what they cost the server in memory.

    script/bench hostile -- --rounds 3 --seconds 1 --only hoard,status

Each round measures the honest client alone and beside the attack, on the same server. The image is in memory (tmpfs).
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import vhdkit
from benchmarks import nbd_peers as peers
from benchmarks.common import arguments, report
from benchmarks.nbd import BUSY, LOADS, MEMORY_FOLDER, MIB, fill
from benchmarks.nbd_peers import Load, Running

WRITER = LOADS["4K random write, depth 16"]
STREAM = LOADS["1M sequential write"]
# name: (attack of `hostile_clients`, connections, the honest client)
ROWS = {
    "status": ("status", 8, BUSY),
    "unaligned": ("unaligned", 8, BUSY),
    "unaligned-write": ("unaligned-write", 8, WRITER),
    "zeroes": ("zeroes", 1, WRITER),
    "zeroes-8": ("zeroes", 8, WRITER),
    "zeroes-1000": ("zeroes", 1000, WRITER),
    "written-zeroes": ("written-zeroes", 1, WRITER),
    "hoard": ("hoard", 1000, BUSY),
    "hoard-large": ("hoard-large", 1000, BUSY),
    "hoard-status": ("hoard-status", 1000, BUSY),
    "hoard-write": ("hoard", 1000, STREAM),
    "idle": ("idle", 1000, BUSY),
}
GOAL_RATIO, GOAL_MIB = 0.8, 200
SIZE = 256 * MIB
_PIECE, _STRIDE = 4096, 32768  # of the pages that are rewritten in the child, so that listings are long
_SETTLE_SECONDS = 2.0  # until the clients that collect nothing have filled their sockets
_GONE_SECONDS = 1.5  # until what they cost is given back


def fragmented(folder: Path) -> Path:
    """A child with a page of its own in every 32 KiB."""
    fill(folder / "base.vhd", SIZE)
    vhdkit.create_child(folder / "disk.vhd", folder / "base.vhd")
    with vhdkit.open_disk(folder / "disk.vhd", writable=True) as disk:
        for offset in range(0, SIZE, _STRIDE):
            disk.write(offset, b"x" * _PIECE)
    return folder / "disk.vhd"


@contextmanager
def attacked(target: Running, kind: str, clients: int) -> Iterator[None]:
    """While the block runs, the server is attacked."""
    program = "from benchmarks.hostile_clients import main; main()"
    command = [sys.executable, "-c", program, str(target.socket_path), kind, str(clients)]
    process = subprocess.Popen(command, cwd=peers.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise peers.Failed(f"the attack {kind} did not begin")
        yield
    finally:
        process.kill()
        process.communicate()


def resident_mib(target: Running) -> float:
    """The server's memory now."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{target.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measured(image: Path, kind: str, clients: int, load: Load, seconds: float) -> tuple[float, float, float]:
    """(rate beside the attack / rate alone, most MiB, MiB when the attackers have gone)."""
    with peers.running(peers.ours(), image) as target:
        peers.rate(target, LOADS["1M sequential read"], seconds / 2, size=SIZE)
        alone = peers.rate(target, load, seconds, size=SIZE)
        with attacked(target, kind, clients):
            time.sleep(_SETTLE_SECONDS)  # the attack gets as far as it can
            beside = peers.rate(target, load, seconds, size=SIZE)
        time.sleep(_GONE_SECONDS)  # the server notices that they have gone
        again = peers.rate(target, load, seconds, size=SIZE)
        return beside / statistics.mean((alone, again)), target.peak_bytes() / MIB, resident_mib(target)


def main() -> None:
    """Measure every row, print the table."""
    parser = arguments((__doc__ or "").splitlines()[0], rounds=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="each run of fio")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, with commas")
    options = parser.parse_args()
    rows, data = [], dict[str, object]()
    with TemporaryDirectory(prefix="vhdkit-hostile-", dir=options.dir or MEMORY_FOLDER) as folder:
        image = fragmented(Path(folder))
        for name in options.only.split(","):
            kind, clients, load = ROWS[name]
            values = [measured(image, kind, clients, load, options.seconds) for _ in range(max(options.rounds, 1))]
            ratio, peak, after = (statistics.median(column) for column in zip(*values, strict=True))
            is_met = ratio >= GOAL_RATIO and peak <= GOAL_MIB
            cells = [name, str(clients), load.mode, f"{ratio:.2f}", f"{peak:.0f}", f"{after:.0f}"]
            rows.append([*cells, "met" if is_met else "SHORT"])
            data[name] = {"ratio": ratio, "peak_mib": peak, "after_mib": after}
            print("  ".join(rows[-1]), flush=True)
    columns = ["attack", "connections", "honest client", "keeps", "peak MiB", "MiB after", ""]
    report(f"hostile: goals {GOAL_RATIO} of the rate, {GOAL_MIB} MiB", columns, rows, data, options.json)


if __name__ == "__main__":
    main()
