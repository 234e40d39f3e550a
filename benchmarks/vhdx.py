# SPDX-License-Identifier: Apache-2.0
"""VHDX beside our own VHD and other programs, with goals: served, written, converted, merged, opened.

Contestants follow one another in each round, and ratios are taken round by round. Files are in memory (tmpfs), where
the device does not matter, but for writes that are flushed: how much they cost is up to the device, so they are on the
disk (`--dir`). Every part starts from fresh files. It takes about seven minutes.

    script/bench vhdx                                      all of it
    script/bench vhdx -- --only flush,open --rounds 3      some of it: nbd, allocate, flush, convert, merge, open
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import vhdkit
from benchmarks import merge as merging
from benchmarks import nbd_peers as peers
from benchmarks.common import Row, arguments, has, report, timed
from benchmarks.nbd import MEMORY_FOLDER, middle_ratio, rotated
from benchmarks.nbd_peers import Load, Server
from benchmarks.vhdx_images import allocate_all, mixed_raw
from benchmarks.vhdx_images import fill as filled

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
PARTS = ("nbd", "allocate", "flush", "convert", "merge", "open")
BLOCK_BYTES = 2 * MIB
FRESH_BYTES = 8 * GIB  # of the disks that are written to for the first time
FLUSHES = 40  # in a round
VHD, VHDX, QEMU = "vhdkit, VHD", "vhdkit, VHDX", "qemu, VHDX"
LOADS = {
    "4K random read, depth 16": Load("randread", 4096, 16),
    "4K random read, depth 1": Load("randread", 4096, 1),
    "4K random write, depth 16": Load("randwrite", 4096, 16),
    "4K random write, depth 1": Load("randwrite", 4096, 1),
}
# How many times as fast as that contestant ours on VHDX must be.
GOALS = {
    **{(what, VHD): 0.97 for what in LOADS},
    ("4K random read, depth 16", QEMU): 1.8,
    ("4K random write, depth 16", QEMU): 2.2,
    ("4K writes into new blocks, dynamic", VHD): 0.9,
    ("write and flush in a new block, dynamic", VHD): 1.0,
    ("write and flush in a new block, child", VHD): 0.9,
    ("convert raw to vhdx", QEMU): 1.2,
    ("convert vhdx to raw", QEMU): 1.2,
    ("merge of 8 layers", VHD): 0.9,
}
MAX_OPEN_SECONDS = 0.5
MEMORY_GOALS = {"2 TiB, 8 full layers": 150, "64 TiB, empty": 150, "64 TiB, full, blocks of 32 MiB": 300}
_OPEN = """
import json, re, sys, time
from pathlib import Path
import vhdkit
start = time.perf_counter()
with vhdkit.open_disk(sys.argv[1]) as disk:
    opened = time.perf_counter() - start
    disk.read(disk.size_bytes // 2, 512)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"seconds": opened, "peak": peak}))
"""


@dataclass(slots=True)
class Line:
    """One line of the report: a contestant's value, and how ours on VHDX compares with it."""

    what: str
    name: str
    value: float
    unit: str
    ratio: float | None = None
    goal: float | None = None
    met: bool | None = None

    def cells(self) -> list[str]:
        """For the table."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        goal = "" if self.goal is None else f"{self.goal:g}"
        mark = "" if self.met is None else ("met" if self.met else "SHORT")
        return [self.what, self.name, f"{self.value:,.2f} {self.unit}", ratio, goal, mark]


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of the command line, and where files go."""

    rounds: int
    seconds: float
    memory: Path
    disk: Path


def compared(
    what: str, unit: str, contestants: Mapping[str, Callable[[], float]], plan: Plan, *, more_is_better: bool
) -> Iterator[Line]:
    """Run all of them in each round; one round before does not count."""
    rows = {name: Row(name) for name in contestants}
    names = list(contestants)
    for number in range(plan.rounds + 1):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            value = contestants[name]()
            if number:
                rows[name].values.append(value)
    yield from lines(what, unit, rows, more_is_better=more_is_better)


def lines(what: str, unit: str, rows: dict[str, Row], *, more_is_better: bool) -> Iterator[Line]:
    """A line for each contestant; the ratio says how many times as fast ours on VHDX is."""
    ours = rows[VHDX]
    for row in rows.values():
        if row is ours:
            yield Line(what, row.name, row.median, unit)
            continue
        ratio = middle_ratio(ours, row) if more_is_better else middle_ratio(row, ours)
        goal = GOALS.get((what, row.name))
        yield Line(what, row.name, row.median, unit, ratio, goal, None if goal is None else ratio >= goal)


# -- the parts --------------------------------------------------------------------------------------------------------


def qemu_server(image: Path) -> Server | None:
    """qemu-nbd's driver for VHDX with the first flags that work here, if it is installed."""
    if not has("qemu-nbd"):
        return None
    for flags in peers.QEMU_FLAGS:
        command = ("qemu-nbd", "--persistent", "--shared=16", "--format=vhdx", "--socket={socket}", *flags, "{image}")
        try:
            with peers.running(Server(QEMU, command), image):
                return Server(QEMU, command)
        except peers.Failed:  # no io_uring in a container
            continue
    return None


def served(plan: Plan) -> Iterator[Line]:
    """Reads and writes of blocks that exist."""
    size = 512 * MIB
    images = {VHD: filled(plan.memory / "full.vhd", size), VHDX: filled(plan.memory / "full.vhdx", size)}
    servers = [Server(VHD, peers.ours().command), Server(VHDX, peers.ours().command)]
    theirs = qemu_server(images[VHDX])
    if theirs is not None:
        servers.append(theirs)
        images[QEMU] = images[VHDX]
    for what, load in LOADS.items():
        rows = {server.name: Row(server.name) for server in servers}
        for number in range(plan.rounds):
            for server in rotated(servers, number):
                with peers.running(server, images[server.name]) as target:
                    rate = peers.rate(target, load, plan.seconds, size=size)
                rows[server.name].values.append(rate)
        yield from lines(what, "/s", rows, more_is_better=True)


def fresh(folder: Path, suffix: str, *, child: bool) -> Path:
    """An empty dynamic image, or the empty child of one that has a page in every block."""
    base = folder / f"base.{suffix}"
    for path in folder.glob("base.*"):
        path.unlink()
    (folder / f"child.a{suffix}").unlink(missing_ok=True)
    vhdkit.create_image(base, FRESH_BYTES, disk_format="vhdx" if suffix == "vhdx" else "dynamic")
    if not child:
        return base
    with vhdkit.open_disk(base, writable=True) as disk:
        for offset in range(0, FRESH_BYTES, BLOCK_BYTES):
            disk.write(offset, b"p" * 4096)
    leaf = folder / f"child.a{suffix}"
    vhdkit.create_child(leaf, base)
    return leaf


def allocating(plan: Plan) -> Iterator[Line]:
    """The first write to each block, in random order, in this process."""
    order = random.Random(3).sample(range(FRESH_BYTES // BLOCK_BYTES), 3000)

    def work(suffix: str, child: bool) -> float:
        data = b"d" * 4096
        with vhdkit.open_disk(fresh(plan.memory, suffix, child=child), writable=True) as disk:
            write = disk.write

            def run() -> None:
                for block in order:
                    write(block * BLOCK_BYTES + 8192, data)

            return timed(run) / len(order) * 1e6

    for kind in ("dynamic", "child"):
        contestants = {VHD: partial(work, "vhd", kind == "child"), VHDX: partial(work, "vhdx", kind == "child")}
        yield from compared(f"4K writes into new blocks, {kind}", "us", contestants, plan, more_is_better=False)


def flushing(plan: Plan) -> Iterator[Line]:
    """A first write to a block, and a flush, on the disk."""

    def work(suffix: str, child: bool) -> float:
        with vhdkit.open_disk(fresh(plan.disk, suffix, child=child), writable=True) as disk:
            disk.write(0, b"d" * 4096)
            disk.flush()  # a session begins with the first

            def run() -> None:
                for block in range(1, FLUSHES + 1):
                    disk.write(block * BLOCK_BYTES + 8192, b"d" * 4096)
                    disk.flush()

            return timed(run) / FLUSHES * 1e3

    for kind in ("dynamic", "child"):
        contestants = {VHD: partial(work, "vhd", kind == "child"), VHDX: partial(work, "vhdx", kind == "child")}
        yield from compared(f"write and flush in a new block, {kind}", "ms", contestants, plan, more_is_better=False)


def converting(plan: Plan) -> Iterator[Line]:
    """1 GiB of random runs, runs of zeros and holes; VHD is shown without a goal."""
    raw, out = plan.memory / "source.raw", plan.memory / "out"
    mixed_raw(raw, GIB)
    sources = {"vhd": plan.memory / "source.vhd", "vhdx": plan.memory / "source.vhdx"}
    for suffix, path in sources.items():
        vhdkit.convert(raw, path, "vhdx" if suffix == "vhdx" else "dynamic", sync=False)

    def library(source: Path, to: str) -> float:
        out.unlink(missing_ok=True)
        return timed(lambda: vhdkit.convert(source, out, to, sync=False))

    def program(source: Path, from_format: str, to: str) -> float:
        out.unlink(missing_ok=True)
        words = ["qemu-img", "convert", "-f", from_format, "-O", to, str(source), str(out)]
        return timed(lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL))

    there = {VHD: partial(library, raw, "dynamic"), VHDX: partial(library, raw, "vhdx")}
    back = {VHD: partial(library, sources["vhd"], "raw"), VHDX: partial(library, sources["vhdx"], "raw")}
    if has("qemu-img"):
        there[QEMU] = partial(program, raw, "raw", "vhdx")
        back[QEMU] = partial(program, sources["vhdx"], "vhdx", "raw")
    for what, contestants in (("convert raw to vhdx", there), ("convert vhdx to raw", back)):
        yield from compared(what, "s", contestants, plan, more_is_better=False)
    for path in (raw, out, *sources.values()):
        path.unlink(missing_ok=True)


def merged(plan: Plan) -> Iterator[Line]:
    """Seven children into their base, in one pass."""
    grounds = {}
    for name, suffix in ((VHD, "vhd"), (VHDX, "vhdx")):
        folder = plan.memory / f"merge-{suffix}"
        folder.mkdir()
        grounds[name] = merging.Ground(folder, merging.build(folder, 384 * MIB, suffix=suffix))
    contestants = {name: merging.contestant(ground, merging.one_pass) for name, ground in grounds.items()}
    yield from compared("merge of 8 layers", "s", contestants, plan, more_is_better=False)


def opened(plan: Plan) -> Iterator[Line]:
    """Opening in a process of its own: seconds, and the peak of its memory."""
    folder = plan.memory / "open"
    folder.mkdir()
    leaf = folder / "layer0.vhdx"
    vhdkit.create_image(leaf, 2 * TIB, disk_format="vhdx")
    for number in range(1, 8):
        child = folder / f"layer{number}.avhdx"
        vhdkit.create_child(child, leaf)
        leaf = child
    for path in folder.iterdir():
        allocate_all(path)
    empty, full = folder / "empty.vhdx", folder / "full.vhdx"
    vhdkit.create_image(empty, 64 * TIB, disk_format="vhdx", block_size_bytes=BLOCK_BYTES)
    vhdkit.create_image(full, 64 * TIB, disk_format="vhdx-fixed", block_size_bytes=32 * MIB)
    for (what, most), image in zip(MEMORY_GOALS.items(), (leaf, empty, full), strict=True):
        seconds, peaks = Row("seconds"), Row("peaks")
        for _ in range(plan.rounds):
            command = [sys.executable, "-c", _OPEN, str(image)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            seconds.values.append(found["seconds"])
            peaks.values.append(found["peak"])
        met = seconds.median < MAX_OPEN_SECONDS
        yield Line(f"open {what}", VHDX, seconds.median, "s", None, MAX_OPEN_SECONDS, met)
        yield Line(f"open {what}, memory", VHDX, max(peaks.values), "MiB", None, most, max(peaks.values) < most)


RUNNERS: dict[str, Callable[[Plan], Iterator[Line]]] = {
    "nbd": served,
    "allocate": allocating,
    "flush": flushing,
    "convert": converting,
    "merge": merged,
    "open": opened,
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = arguments((__doc__ or "").splitlines()[0], rounds=4)
    options.add_argument("--seconds", type=float, default=1.0, help="each run of fio")
    options.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas: {', '.join(PARTS)}")
    return options


def main() -> None:
    """Build, measure, print."""
    options = parser().parse_args()
    found: list[Line] = []
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"unknown parts: {', '.join(sorted(unknown))}")
    for part in parts:
        with (
            TemporaryDirectory(prefix="vhdkit-vhdx-", dir=MEMORY_FOLDER) as memory,
            TemporaryDirectory(prefix="vhdkit-vhdx-", dir=options.dir) as disk,
        ):
            plan = Plan(max(options.rounds, 3), options.seconds, Path(memory), Path(disk))
            for line in RUNNERS[part](plan):
                print("  ".join(cell for cell in line.cells() if cell), flush=True)
                found.append(line)
    short = [f"{line.what} ({line.name})" for line in found if line.met is False]
    columns = ["what", "contestant", "value", "VHDX is faster by", "goal", ""]
    data: dict[str, object] = {"lines": [{name: getattr(line, name) for name in Line.__slots__} for line in found]}
    report("VHDX", columns, [line.cells() for line in found], data, options.json)
    met = sum(bool(line.met) for line in found)
    print(f"{met} goals met" + (f", {len(short)} not: {'; '.join(short)}" if short else ""))


if __name__ == "__main__":
    main()
