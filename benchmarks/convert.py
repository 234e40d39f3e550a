# SPDX-License-Identifier: Apache-2.0
"""Converting 2 GiB of mixed data: raw to dynamic, dynamic to raw, a chain to a fixed disk.

The data is one third random bytes, one third written zeros, one third holes, in runs of 64 KiB to 8 MiB. Every round
each contestant writes a new file on the same file system; all leave the last bytes to the page cache, as `qemu-img
convert` and `cp` do (`--no-sync` for vhdkit); the durable rows add a flush for all. Peers: `qemu-img convert` where
it can (it reads no differencing VHD), and `cp --sparse=auto` on the raw file, which only has to copy the same
bytes. vhdkit is measured twice: as a library, in a running process, and as a command, where starting Python and
loading numpy is a good part of a conversion that takes a quarter of a second. Every result is compared with the source
before anything is timed, and every source is read into the page cache before each run.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import vhdkit
from benchmarks.common import Row, arguments, has, interleaved, report, timed, workplace

DISK_BYTES = 2 << 30
LIBRARY = "vhdkit, library"
COMMAND = "vhdkit convert"


def mixed_raw(path: Path) -> None:
    """The raw file: random runs, runs of zeros that were written, and holes."""
    rng = random.Random(7)
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
        position = 0
        while position < DISK_BYTES:
            size = min(rng.choice((64 << 10, 512 << 10, 2 << 20, 8 << 20)), DISK_BYTES - position)
            kind = rng.randrange(3)
            if kind < 2:
                file.seek(position)
                file.write(rng.randbytes(size) if kind else bytes(size))
            position += size


def build_chain(folder: Path, raw: Path) -> Path:
    """A dynamic base with the raw content and two children with a thousand rewritten runs each."""
    path = folder / "chain0.vhd"
    vhdkit.convert(raw, path, vhdkit.DiskFormat.DYNAMIC, sync=False)
    rng = random.Random(8)
    for number in (1, 2):
        child = folder / f"chain{number}.vhd"
        vhdkit.create_child(child, path)
        with vhdkit.open_disk(child, writable=True) as disk:
            for _ in range(1000):
                size = rng.choice((4, 16, 64)) << 10
                disk.write(rng.randrange((DISK_BYTES - size) >> 12) << 12, rng.randbytes(size))
        path = child
    return path


def prepare(fresh: Path) -> None:
    """Remove what the last run made, wait until the disk is idle, and have every source in the page cache."""
    fresh.unlink(missing_ok=True)
    subprocess.run(["sync"], check=True)
    for source in (*fresh.parent.glob("source.*"), *fresh.parent.glob("chain*.vhd")):
        with source.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def command(*words: str | Path, fresh: Path, durable: bool = False) -> Callable[[], float]:
    """A contestant: a command that writes the file `fresh`, which is removed (and the disk quiet) before."""

    def run() -> float:
        prepare(fresh)
        line = [str(word) for word in words]

        def work() -> None:
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
            if durable:
                subprocess.run(["sync", str(fresh)], check=True)

        return timed(work)

    return run


def library(source: Path, to: str, out: Path, durable: bool) -> Callable[[], float]:
    """A contestant: the library, in this process."""

    def run() -> float:
        prepare(out)
        return timed(lambda: vhdkit.convert(source, out, vhdkit.DiskFormat(to), sync=durable))

    return run


def jobs(
    folder: Path, raw: Path, dynamic: Path, leaf: Path, durable: bool
) -> dict[str, dict[str, Callable[[], float]]]:
    """For each kind of conversion its contestants: name -> run."""
    ours = [sys.executable, "-m", "vhdkit", "convert", "--quiet", "--no-progress", "--no-sync"]
    out, copy = folder / "out", folder / "copy.raw"
    qemu = has("qemu-img")

    def cp() -> Callable[[], float]:
        return command("cp", "--sparse=auto", raw, copy, fresh=copy, durable=durable)

    def mine(source: Path, to: str) -> dict[str, Callable[[], float]]:
        return {
            LIBRARY: library(source, to, out, durable),
            COMMAND: command(*ours, source, out, "--to", to, fresh=out, durable=durable),
        }

    def theirs(source_format: str, target_format: str, source: Path) -> dict[str, Callable[[], float]]:
        words = ("qemu-img", "convert", "-f", source_format, "-O", target_format, source, out)
        return {"qemu-img convert": command(*words, fresh=out, durable=durable)} if qemu else {}

    return {
        "raw to dynamic": {
            **mine(raw, "dynamic"),
            **theirs("raw", "vpc", raw),
            "cp --sparse=auto": cp(),
        },
        "dynamic to raw": {
            **mine(dynamic, "raw"),
            **theirs("vpc", "raw", dynamic),
            "cp --sparse=auto": cp(),
        },
        "chain of 3 to fixed": {**mine(leaf, "fixed"), "cp --sparse=auto": cp()},
    }


def prove(folder: Path, raw: Path, dynamic: Path, leaf: Path) -> None:
    """Check that every conversion gives the content of its source."""
    for number, (source, kind) in enumerate(((raw, "dynamic"), (dynamic, "raw"), (leaf, "fixed"))):
        out = folder / f"proof{number}"
        vhdkit.convert(source, out, vhdkit.DiskFormat(kind), sync=False)
        assert vhdkit.compare(source, out).same_content, (source, kind)
        if has("qemu-img") and kind != "fixed":
            theirs = "vpc" if kind == "dynamic" else "raw"
            subprocess.run(
                ["qemu-img", "compare", "-f", "raw", "-F", theirs, str(raw), str(out)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        out.unlink()


def ratio(ours: Row, theirs: Row) -> float:
    """How many times as fast as theirs ours is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(ours.values, theirs.values, strict=True))


def main() -> None:
    """Build, prove, measure, print."""
    options = arguments(__doc__ or "").parse_args()
    table, data = [], {}
    with workplace(options.dir) as folder:
        raw, dynamic = folder / "source.raw", folder / "source.vhd"
        mixed_raw(raw)
        vhdkit.convert(raw, dynamic, vhdkit.DiskFormat.DYNAMIC)
        leaf = build_chain(folder, raw)
        prove(folder, raw, dynamic, leaf)
        for durable in (False, True):
            for job, contestants in jobs(folder, raw, dynamic, leaf, durable).items():
                rows = interleaved(contestants, options.rounds)
                label = job + (", durable" if durable else "")
                for name, row in rows.items():
                    against = [ratio(rows[one], row) for one in (LIBRARY, COMMAND)]
                    rate = DISK_BYTES / row.median / (1 << 20)
                    cells = ["" if name in (LIBRARY, COMMAND) else f"{value:.2f}" for value in against]
                    table.append([label, name, f"{row.median:.2f}", f"{rate:,.0f}", *cells])
                    data[f"{label}: {name}"] = {
                        "seconds": row.median,
                        "library_speed_against_it": against[0],
                        "command_speed_against_it": against[1],
                    }
    columns = ["conversion of 2 GiB", "by", "seconds", "MiB of disk/s", "library against it", "command against it"]
    report("convert", columns, table, {"results": data}, options.json)


if __name__ == "__main__":
    main()
