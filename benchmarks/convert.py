# SPDX-License-Identifier: Apache-2.0
"""Converting mixed data: raw to dynamic and VHDX and back, a chain to a fixed disk.

The data is one third random bytes, one third written zeros, one third holes, in runs of 64 KiB to 8 MiB. Every round
each contestant writes a new file on the same file system; all leave the last bytes to the page cache, as `qemu-img
convert` and `cp` do (`--no-sync` for vhdkit). In the durable rows vhdkit syncs by itself; for the others `sync` runs
on the new file. Peers: `qemu-img convert` where it can (it reads no differencing VHD), and `cp --sparse=auto` on the
raw file, which only has to copy the same bytes. vhdkit is measured twice: as a library, in a running process, and as
a command, where starting Python and loading numpy is a good part of a conversion that takes a quarter of a second.
The command finds compiled modules, as an installed one does. Every result is compared with the source before anything
is timed, and what a contestant reads is brought into the page cache before each run.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import vhdkit
from benchmarks.common import Row, arguments, has, interleaved, report, timed, workplace

LIBRARY = "vhdkit, library"
COMMAND = "vhdkit convert"
QEMU = "qemu-img convert"
# Goals for the command: (a part of the row's name, peer) -> how many times as fast as the peer.
GOALS = {("to", QEMU): 1.0, ("chain of 3 to fixed, durable", "cp --sparse=auto"): 0.8}
VHDX_GOAL = 0.97  # of the speed of the same row for a VHD


@dataclass(frozen=True, slots=True)
class Made:
    """The sources of all conversions, in one folder."""

    folder: Path
    raw: Path
    dynamic: Path
    vhdx: Path
    leaf: Path


def mixed_raw(path: Path, disk_bytes: int) -> None:
    """The raw file: random runs, runs of zeros that were written, and holes."""
    rng = random.Random(7)
    with path.open("wb") as file:
        file.truncate(disk_bytes)
        position = 0
        while position < disk_bytes:
            size = min(rng.choice((64 << 10, 512 << 10, 2 << 20, 8 << 20)), disk_bytes - position)
            kind = rng.randrange(3)
            if kind < 2:
                file.seek(position)
                file.write(rng.randbytes(size) if kind else bytes(size))
            position += size


def make(folder: Path, disk_bytes: int) -> Made:
    """Every source."""
    raw, dynamic, vhdx = (folder / f"source.{ending}" for ending in ("raw", "vhd", "vhdx"))
    mixed_raw(raw, disk_bytes)
    vhdkit.convert(raw, dynamic, vhdkit.DiskFormat.DYNAMIC)
    vhdkit.convert(raw, vhdx, vhdkit.DiskFormat.VHDX)
    return Made(folder, raw, dynamic, vhdx, build_chain(folder, raw))


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
                disk.write(rng.randrange((disk.size_bytes - size) >> 12) << 12, rng.randbytes(size))
        path = child
    return path


def prepare(fresh: Path, sources: Sequence[Path]) -> None:
    """Remove what the last run made, wait until the disk is idle, and have the sources in the page cache."""
    for old in ("out", "copy.raw"):
        (fresh.parent / old).unlink(missing_ok=True)
    subprocess.run(["sync"], check=True)
    for source in sources:
        with source.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def command(*words: str | Path, fresh: Path, sources: Sequence[Path], durable: bool = False) -> Callable[[], float]:
    """A contestant: a command that writes the file `fresh`, which is removed (and the disk quiet) before."""

    def run() -> float:
        prepare(fresh, sources)
        line = [str(word) for word in words]

        def work() -> None:
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
            if durable:
                subprocess.run(["sync", str(fresh)], check=True)

        return timed(work)

    return run


def files_of(source: Path) -> list[Path]:
    """What is read when this source is converted: itself, or all layers of the chain."""
    return sorted(source.parent.glob("chain*.vhd")) if source.name.startswith("chain") else [source]


def library(source: Path, to: str, out: Path, durable: bool) -> Callable[[], float]:
    """A contestant: the library, in this process."""

    def run() -> float:
        prepare(out, files_of(source))
        return timed(lambda: vhdkit.convert(source, out, vhdkit.DiskFormat(to), sync=durable))

    return run


def jobs(made: Made, durable: bool) -> dict[str, dict[str, Callable[[], float]]]:
    """For each kind of conversion its contestants: name -> run."""
    ours = [sys.executable, "-m", "vhdkit", "convert", "--quiet", "--no-progress"]
    ours += [] if durable else ["--no-sync"]
    out, copy = made.folder / "out", made.folder / "copy.raw"
    qemu = has("qemu-img")

    def cp() -> dict[str, Callable[[], float]]:
        return {
            "cp --sparse=auto": command(
                "cp", "--sparse=auto", made.raw, copy, fresh=copy, sources=[made.raw], durable=durable
            )
        }

    def mine(source: Path, to: str) -> dict[str, Callable[[], float]]:
        return {
            LIBRARY: library(source, to, out, durable),
            COMMAND: command(*ours, source, out, "--to", to, fresh=out, sources=files_of(source)),
        }

    def theirs(source_format: str, target_format: str, source: Path) -> dict[str, Callable[[], float]]:
        words = ("qemu-img", "convert", "-f", source_format, "-O", target_format, source, out)
        return {QEMU: command(*words, fresh=out, sources=[source], durable=durable)} if qemu else {}

    return {
        "raw to dynamic": {**mine(made.raw, "dynamic"), **theirs("raw", "vpc", made.raw), **cp()},
        "raw to VHDX": {**mine(made.raw, "vhdx"), **theirs("raw", "vhdx", made.raw)},
        "dynamic to raw": {**mine(made.dynamic, "raw"), **theirs("vpc", "raw", made.dynamic), **cp()},
        "VHDX to raw": {**mine(made.vhdx, "raw"), **theirs("vhdx", "raw", made.vhdx)},
        "chain of 3 to fixed": {**mine(made.leaf, "fixed"), **cp()},
    }


def prove(made: Made) -> None:
    """Check that every conversion gives the content of its source."""
    cases = (
        (made.raw, "dynamic"),
        (made.raw, "vhdx"),
        (made.dynamic, "raw"),
        (made.vhdx, "raw"),
        (made.leaf, "fixed"),
    )
    for number, (source, kind) in enumerate(cases):
        out = made.folder / f"proof{number}"
        vhdkit.convert(source, out, vhdkit.DiskFormat(kind), sync=False)
        assert vhdkit.compare(source, out).same_content, (source, kind)
        if has("qemu-img") and kind != "fixed":
            theirs = {"dynamic": "vpc"}.get(kind, kind)
            words = ["qemu-img", "compare", "-f", "raw", "-F", theirs, str(made.raw), str(out)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        out.unlink()


def ratio(ours: Row, theirs: Row) -> float:
    """How many times as fast as theirs ours is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(ours.values, theirs.values, strict=True))


def goal_of(label: str, peer: str) -> float | None:
    """What the command should reach against this peer, or None."""
    return next((goal for (part, name), goal in GOALS.items() if name == peer and part in label), None)


def with_bytecode(folder: Path) -> None:
    """Let the commands find compiled modules, as an installed vhdkit does, whatever the environment says."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")


def main() -> None:
    """Build, prove, measure, print."""
    parser = arguments(__doc__ or "", rounds=9)
    parser.add_argument("--gib", type=int, default=2, help="size of the disk (the goals are for 2 and 8)")
    parser.add_argument("--only", default="", help="only the conversions with this in their name")
    options = parser.parse_args()
    disk_bytes, table, data, commands = options.gib << 30, [], {}, {}
    with workplace(options.dir) as folder:
        with_bytecode(folder)
        made = make(folder, disk_bytes)
        prove(made)
        for durable in (False, True):
            for job, contestants in jobs(made, durable).items():
                label = job + (", durable" if durable else "")
                if options.only not in label:
                    continue
                rows = interleaved(contestants, options.rounds)
                commands[label] = rows[COMMAND].median
                for name, row in rows.items():
                    against = [ratio(rows[one], row) for one in (LIBRARY, COMMAND)]
                    goal = goal_of(label, name)
                    rate = disk_bytes / row.median / (1 << 20)
                    cells = ["" if name in (LIBRARY, COMMAND) else f"{value:.2f}" for value in against]
                    goals = "" if goal is None else f"{goal:.2f}"
                    table.append([label, name, f"{row.median:.2f}", f"{rate:,.0f}", *cells, goals])
                    print("  ".join(cell for cell in table[-1] if cell), flush=True)  # a large disk takes long
                    data[f"{label}: {name}"] = {
                        "seconds": row.median,
                        "library_speed_against_it": against[0],
                        "command_speed_against_it": against[1],
                        "goal": goal,
                    }
    for label, seconds in commands.items():
        if "VHDX" in label and (vhd := commands.get(label.replace("VHDX", "dynamic"))) is not None:
            table.append([label, "the same with a VHD", f"{vhd:.2f}", "", "", f"{vhd / seconds:.2f}", f"{VHDX_GOAL}"])
            data[f"{label}: VHD"] = {"seconds": vhd, "command_speed_against_it": vhd / seconds, "goal": VHDX_GOAL}
    title = f"conversion of {options.gib} GiB"
    columns = [title, "by", "seconds", "MiB of disk/s", "library against it", "command against it", "goal"]
    report("convert", columns, table, {"results": data}, options.json)


if __name__ == "__main__":
    main()
