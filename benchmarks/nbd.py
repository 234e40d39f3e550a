# SPDX-License-Identifier: Apache-2.0
"""The NBD server compared with qemu-nbd and nbdkit: fio over a unix socket, with goals.

Every measurement is a fresh server and one run of fio; all contestants follow one another in each round, and ratios
are taken round by round, so that a machine whose speed drifts treats all alike. Three settings: files in memory
(tmpfs, without the device; the goals are for this one), on the disk with a warm cache, and on the disk with a cold one
(`nbd_cold`, with goals of its own; `--dir` says on which disk).

    script/bench nbd -- --rounds 5 --seconds 3            all of it
    script/bench nbd -- --only peers,chain --seconds 1    some of it: peers, chain, many, deaf, scan, memory
    script/bench nbd -- --setting cold --only peers       cold: peers, chain, scan

nbdkit's own plugin for files serves the same content as a raw file, as it reads no VHD.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import vhdkit
from benchmarks import nbd_peers as peers
from benchmarks.common import Row, arguments, has, report
from benchmarks.nbd_peers import Load, Server
from benchmarks.open import allocate_all

T = TypeVar("T")
MIB = 1 << 20
GIB = 1 << 30
BLOCK_BYTES = 2 * MIB
MEMORY_FOLDER = Path("/dev/shm")
PARTS = ("peers", "chain", "many", "deaf", "scan", "memory")
CHAIN_DEPTH = 32
REWRITES_PER_LAYER = 200
HUGE_BYTES = 2040 * GIB  # the most a VHD holds
MEMORY_LIMIT_MIB = 200
CLIENTS = 8

LOADS = {
    "4K random read, depth 16": Load("randread", 4096, 16),
    "4K random write, depth 16": Load("randwrite", 4096, 16),
    "4K random read, depth 1": Load("randread", 4096, 1),
    "4K random write, depth 1": Load("randwrite", 4096, 1),
    "1M sequential read": Load("read", MIB, 4),
    "1M sequential write": Load("write", MIB, 4),
}
BUSY_NAME = "4K random read, depth 16"
BUSY = LOADS[BUSY_NAME]
# How many times as fast as that server vhdkit should be.
GOALS = {
    ("4K random read, depth 16", "qemu-nbd"): 2.5,
    ("4K random read, depth 16", "nbdkit file (raw)"): 1.5,
    ("4K random write, depth 16", "qemu-nbd"): 10,
    ("4K random write, depth 16", "nbdkit file (raw)"): 1.1,
    ("4K random read, depth 1", "qemu-nbd"): 1.2,
    ("4K random read, depth 1", "nbdkit file (raw)"): 0.8,
    ("4K random write, depth 1", "qemu-nbd"): 2,
    ("4K random write, depth 1", "nbdkit file (raw)"): 0.8,
    ("1M sequential read", "qemu-nbd"): 3,
    ("1M sequential read", "nbdkit file (raw)"): 1.3,
    ("1M sequential write", "qemu-nbd"): 2,
    ("1M sequential write", "nbdkit file (raw)"): 0.9,
}
GOAL_CHAIN, GOAL_MANY, GOAL_OTHERS = 0.8, 0.9, 0.8


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of the command line."""

    rounds: int
    seconds: float
    size: int  # of the disk, in bytes
    scan_size: int


@dataclass(slots=True)
class Result:
    """One line of the report: what was measured, a value and, if there is one, its goal."""

    setting: str
    what: str
    server: str
    value: float
    unit: str
    ratio: float | None = None  # of the server named vhdkit to this one, or of a hindered rate to a free one
    goal: float | None = None
    met: bool | None = None
    cpu_us: float | None = None  # processor time of the server for each request

    def cells(self) -> list[str]:
        """For the table."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        goal = "" if self.goal is None else f"{self.goal:g}"
        mark = "" if self.met is None else ("met" if self.met else "SHORT")
        cpu = "" if self.cpu_us is None else f"{self.cpu_us:,.1f}"
        return [self.setting, self.what, self.server, f"{self.value:,.0f} {self.unit}", cpu, ratio, goal, mark]

    def facts(self) -> dict[str, object]:
        """For the JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def middle_ratio(ours: Row, other: Row) -> float:
    """The median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(ours.values, other.values, strict=True))


# -- images -----------------------------------------------------------------------------------------------------


def fill(path: Path, size: int) -> None:
    """A dynamic VHD with data in all of its blocks."""
    vhdkit.create_image(path, size, block_size_bytes=BLOCK_BYTES)
    rng = random.Random(1)
    noise = [rng.randbytes(BLOCK_BYTES) for _ in range(4)]
    with vhdkit.open_disk(path, writable=True) as disk:
        for offset in range(0, size, BLOCK_BYTES):
            data = noise[offset // BLOCK_BYTES % len(noise)]
            disk.write(offset, data[: min(BLOCK_BYTES, size - offset)])


def grow(folder: Path, size: int) -> Path:
    """32 layers: data everywhere in the base, and pages all over it rewritten in the children: partial bitmaps."""
    leaf = folder / "layer0.vhd"
    fill(leaf, size)
    rng = random.Random(2)
    for number in range(1, CHAIN_DEPTH):
        child = folder / f"layer{number}.avhd"
        vhdkit.create_child(child, leaf, block_size_bytes=BLOCK_BYTES)
        with vhdkit.open_disk(child, writable=True) as disk:
            for _ in range(REWRITES_PER_LAYER):
                run = rng.choice((4, 8, 16, 64)) << 10
                disk.write(rng.randrange(0, size - run, 4096), rng.randbytes(run))
        leaf = child
    return leaf


def copy_raw(image: Path, raw: Path) -> Path:
    """The same disk as a raw file."""
    vhdkit.convert(image, raw, disk_format=vhdkit.DiskFormat.RAW)
    return raw


# -- the parts --------------------------------------------------------------------------------------------------


def contestants(image: Path, plan: Plan) -> list[Server]:
    """All that are installed; qemu-nbd with its best flags here."""
    servers = [peers.ours()]
    if has("qemu-nbd"):
        servers.append(peers.qemu(best_flags(image, plan)))
    if has("nbdkit"):
        servers += [peers.nbdkit_file(), peers.nbdkit_ours()]
    return servers


def best_flags(image: Path, plan: Plan) -> tuple[str, ...]:
    """Those with which qemu-nbd is fastest over all loads (the geometric mean), in one short run each."""
    rated = []
    for flags in peers.QEMU_FLAGS:
        try:
            with peers.running(peers.qemu(flags), image) as target:
                rates = [peers.rate(target, load, min(plan.seconds, 1), size=plan.size) for load in LOADS.values()]
        except peers.Failed:  # no O_DIRECT on tmpfs, no io_uring in a container
            continue
        rated.append((statistics.geometric_mean(rates), flags))
    if not rated:
        raise peers.Failed("qemu-nbd works with none of its flags")
    return max(rated)[1]


def against_peers(setting: str, folder: Path, plan: Plan) -> Iterator[Result]:
    """Every load on every server."""
    image = folder / "disk.vhd"
    fill(image, plan.size)
    raw = copy_raw(image, folder / "disk.raw")
    servers = contestants(image, plan)
    flags = [server.command for server in servers if server.name == "qemu-nbd"]
    if flags:
        print(f"{setting}: {' '.join(flags[0])}", flush=True)
    for what, load in LOADS.items():
        rows = {server.name: Row(server.name) for server in servers}
        costs: dict[str, list[float]] = {server.name: [] for server in servers}
        for number in range(plan.rounds):
            for server in rotated(servers, number):
                with peers.running(server, raw if server.wants_raw else image) as target:
                    rate = peers.measured(target, load, plan.seconds, size=plan.size)
                rows[server.name].values.append(rate.per_second)
                costs[server.name].append(rate.cpu_us)
        ours = rows["vhdkit"]
        for row in rows.values():
            ratio, goal = None if row is ours else middle_ratio(ours, row), GOALS.get((what, row.name))
            met = None if ratio is None or goal is None else ratio >= goal
            cpu_us = statistics.median(costs[row.name])
            yield Result(setting, what, row.name, row.median, "/s", ratio, goal, met, cpu_us)


def rotated(servers: list[T], number: int) -> list[T]:
    """Each round begins with another one, so that no contestant always follows the same other."""
    number %= len(servers)
    return servers[number:] + servers[:number]


def compared(
    setting: str, what: str, names: tuple[str, str], plan: Plan, goal: float,
    free: Callable[[], float], hindered: Callable[[], float],
) -> Iterator[Result]:  # fmt: skip
    """Two rates of ours in alternation; the second must keep a part of the first."""
    first, second = Row(names[0]), Row(names[1])
    for number in range(plan.rounds):
        both = ((first, free), (second, hindered))
        for row, run in both if number % 2 == 0 else both[::-1]:
            row.values.append(run())
    yield Result(setting, what, first.name, first.median, "/s")
    ratio = middle_ratio(second, first)
    yield Result(setting, what, second.name, second.median, "/s", ratio, goal, ratio >= goal)


def deep_chain(setting: str, folder: Path, plan: Plan) -> Iterator[Result]:
    """The reads on 32 layers against those on one file."""
    single = folder / "disk.vhd"
    if not single.exists():
        fill(single, plan.size)
    leaf = grow(folder, plan.size)

    def measure(image: Path, load: Load) -> float:
        with peers.running(peers.ours(), image) as target:
            # Ownership is determined once for each block.
            peers.rate(target, LOADS["1M sequential read"], plan.seconds / 2, size=plan.size)
            return peers.rate(target, load, plan.seconds, size=plan.size)

    names = ("vhdkit, single file", f"vhdkit, {CHAIN_DEPTH} layers")
    for what, load in LOADS.items():
        if load.is_read:
            free, hindered = partial(measure, single, load), partial(measure, leaf, load)
            yield from compared(setting, what, names, plan, GOAL_CHAIN, free, hindered)


def many_clients(setting: str, folder: Path, plan: Plan) -> Iterator[Result]:
    """Eight connections together against one."""
    image = folder / "disk.vhd"
    if not image.exists():
        fill(image, plan.size)

    def measure(clients: int) -> float:
        load = Load(BUSY.mode, BUSY.block_bytes, BUSY.depth, clients)
        with peers.running(peers.ours(), image) as target:
            return peers.rate(target, load, plan.seconds, size=plan.size)

    names = ("vhdkit, 1 connection", f"vhdkit, {CLIENTS} connections")
    what = "4K random read, depth 16"
    yield from compared(setting, what, names, plan, GOAL_MANY, lambda: measure(1), lambda: measure(CLIENTS))


def deaf_neighbour(setting: str, folder: Path, plan: Plan) -> Iterator[Result]:
    """A client that requests 64 MiB and reads nothing, and another that works."""
    image = folder / "disk.vhd"
    if not image.exists():
        fill(image, plan.size)

    def measure(deaf: bool) -> float:
        with peers.running(peers.ours(), image) as target, ExitStack() as stack:
            if deaf:
                stack.enter_context(peers.deaf_client(target, 64, MIB))
            return peers.rate(target, BUSY, plan.seconds, size=plan.size)

    names = ("vhdkit, alone", "vhdkit, beside one that stopped reading")
    what = "4K random read, depth 16"
    yield from compared(setting, what, names, plan, GOAL_OTHERS, lambda: measure(False), lambda: measure(True))


def cold_scan(setting: str, folder: Path, plan: Plan) -> Iterator[Result]:
    """A client that reads uncached data, one request after the other, and another that works on cached data."""
    hot = min(plan.size, plan.scan_size // 4)
    image = folder / "scan.vhd"
    fill(image, plan.scan_size)
    drop_cache(image)
    scan = Load("read", 256 << 10, 1)  # the requests of nbdcopy
    speeds = []

    def measure(scanned: bool) -> float:
        drop_cache(image)
        with peers.running(peers.ours(), image) as target:
            peers.rate(target, LOADS["1M sequential read"], plan.seconds, size=hot)  # warm it
            if not scanned:
                return peers.rate(target, BUSY, plan.seconds, size=hot)
            seconds = plan.seconds * 2 + 30  # longer than the others; it is stopped
            with peers.beside(target, scan, seconds, size=plan.scan_size - hot, offset=hot) as speed:
                value = peers.rate(target, BUSY, plan.seconds, size=hot)
            speeds.extend(speed)
            return value

    names = ("vhdkit, alone", "vhdkit, beside a cold scan")
    what = "4K random read, depth 16"
    yield from compared(setting, what, names, plan, GOAL_OTHERS, lambda: measure(False), lambda: measure(True))
    mib = statistics.median(speeds) * scan.block_bytes / MIB
    yield Result(setting, "the scan itself, 256K, depth 1", "vhdkit", mib, "MiB/s")


def drop_cache(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def memory_of_huge(setting: str, folder: Path, plan: Plan) -> Iterator[Result]:
    """The peak of memory while eight clients read and write all over 2 TiB, in small and large requests."""
    image = folder / "huge.vhd"
    vhdkit.create_image(image, HUGE_BYTES, block_size_bytes=BLOCK_BYTES)
    allocate_all(image)
    small, large = 4096, 64 * MIB  # the largest request there is
    with peers.running(peers.ours(), image) as target:
        peers.rate(target, Load("randread", small, 16, CLIENTS), plan.seconds, size=HUGE_BYTES)
        peers.rate(target, Load("randwrite", small, 16, CLIENTS), plan.seconds, size=64 * MIB)
        peers.rate(target, Load("randread", large, 2, CLIENTS), plan.seconds, size=HUGE_BYTES)
        peers.rate(target, Load("write", large, 2, CLIENTS), plan.seconds, size=256 * MIB)
        peak = target.peak_bytes() / MIB
    what = f"peak memory, 2040 GiB, {CLIENTS} connections"
    yield Result(setting, what, "vhdkit", peak, "MiB", None, MEMORY_LIMIT_MIB, peak < MEMORY_LIMIT_MIB)


PART_RUNNERS: dict[str, Callable[[str, Path, Plan], Iterator[Result]]] = {
    "peers": against_peers,
    "chain": deep_chain,
    "many": many_clients,
    "deaf": deaf_neighbour,
    "scan": cold_scan,
    "memory": memory_of_huge,
}
ONLY_ON_DISK = ("scan",)
ONLY_IN_MEMORY = ("memory",)  # it needs no space in either, and the kind of file system does not matter


# -- the whole --------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = arguments((__doc__ or "").splitlines()[0], rounds=3)
    options.add_argument("--seconds", type=float, default=2.0, help="each run of fio")
    options.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the disk")
    options.add_argument("--scan-size", type=int, default=10240, metavar="MIB", help="of the disk that is scanned")
    options.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas: {', '.join(PARTS)}")
    options.add_argument("--setting", choices=["both", "tmpfs", "disk", "cold"], default="both")
    return options


@contextmanager
def places(directory: Path | None, wanted: str) -> Iterator[dict[str, Path]]:
    """A fresh folder for each setting."""
    with ExitStack() as stack:
        found = {}
        for setting, base in (("tmpfs", MEMORY_FOLDER), ("disk", directory)):
            if wanted in ("both", setting):
                folder = stack.enter_context(TemporaryDirectory(prefix="vhdkit-nbd-", dir=base))
                found[setting] = Path(folder)
        yield found


def has_room(setting: str, part: str, folder: Path, plan: Plan) -> bool:
    """Whether the files of a part fit, with as much space left over as they take."""
    needed = {"memory": 64 * MIB, "scan": plan.scan_size, "peers": 2 * plan.size}.get(part, plan.size)
    if shutil.disk_usage(folder).free > needed + GIB:
        return True
    print(f"{setting}: no room for {part}, which needs {needed // MIB} MiB: left out", flush=True)
    return False


def shown(results: Iterator[Result]) -> list[Result]:
    """The results, each printed as soon as it is there."""
    kept = []
    for result in results:
        print("  ".join(cell for cell in result.cells() if cell), flush=True)
        kept.append(result)
    return kept


def measure_all(found: dict[str, Path], parts: list[str], plan: Plan) -> list[Result]:
    """Part by part, each in the settings where it is meaningful."""
    results: list[Result] = []
    for setting, folder in found.items():
        for part in parts:
            other = ONLY_ON_DISK if setting == "tmpfs" else ONLY_IN_MEMORY
            if (part in other and len(found) > 1) or not has_room(setting, part, folder, plan):
                continue
            try:
                results += shown(PART_RUNNERS[part](setting, folder, plan))
            except peers.Failed as error:
                print(f"{setting}: {part} failed: {error}", flush=True)
                results.append(Result(setting, f"{part}: failed", "", 0, "", met=False))
            for path in folder.glob("layer*"):
                path.unlink()
            for name in ("scan.vhd", "huge.vhd"):
                (folder / name).unlink(missing_ok=True)
    return results


def main() -> None:
    """Build, measure, print."""
    options = parser().parse_args()
    parts = [part for part in options.only.split(",") if part]
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}")
    if not has("fio"):
        raise SystemExit("fio is not installed; run script/setup")
    if missing := peers.missing():
        print(f"not compared, as not installed: {', '.join(missing)}", flush=True)
    plan = Plan(max(options.rounds, 1), options.seconds, options.size * MIB, options.scan_size * MIB)
    if options.setting == "cold":
        from benchmarks import nbd_cold  # it uses what is defined here

        with TemporaryDirectory(prefix="vhdkit-nbd-", dir=options.dir) as folder:
            results = shown(nbd_cold.measure_all(Path(folder), parts, plan))
    else:
        with places(options.dir, options.setting) as found:
            results = measure_all(found, parts, plan)
    short = sum(result.met is False for result in results)
    columns = ["files", "what", "server", "rate", "CPU us", "ratio", "goal", ""]
    title = (
        f"nbd: {plan.size // MIB} MiB, {plan.rounds} rounds of {plan.seconds:g} s; {short} of the goals not reached"
    )
    data: dict[str, object] = {"results": [result.facts() for result in results]}
    report(title, columns, [result.cells() for result in results], data, options.json)


if __name__ == "__main__":
    main()
