# SPDX-License-Identifier: Apache-2.0
"""The cold setting of `benchmarks/nbd.py`: nothing of the images is in the page cache when a measurement begins.

Decides what a cold measurement is: every contestant's file is dropped from the cache and looked at (`resident_part`)
before each one, and each run of fio reads every block at most once, so that a faster server does not meet more of the
pages that it has read itself. The peers are qemu-nbd with io_uring, through the page cache and past it, and nbdkit's
plugin for files on a raw copy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import vhdkit
from benchmarks import nbd
from benchmarks import nbd_peers as peers
from benchmarks.common import Row, has
from benchmarks.nbd import GIB, MIB, Plan, Result, middle_ratio, rotated
from benchmarks.nbd_peers import Load, Server

RESIDENT_LIMIT = 0.005  # of a file, when a measurement begins: its metadata


@dataclass(frozen=True, slots=True)
class ColdLoad:
    """A load, and how much of the disk it reads."""

    load: Load
    bytes_read: int
    goal_nbdkit: float
    goal_qemu: float


LOADS = {
    "4K random read, depth 16": ColdLoad(Load("randread", 4096, 16), 256 * MIB, 1.2, 1.0),
    "4K random read, depth 1": ColdLoad(Load("randread", 4096, 1), 48 * MIB, 1.1, 1.1),
    "1M sequential read, depth 4": ColdLoad(Load("read", MIB, 4), GIB, 1.3, 1.3),
    "1M sequential read, depth 1": ColdLoad(Load("read", MIB, 1), GIB, 1.3, 1.3),
}
GOAL_VHDX, GOAL_CHAIN, GOAL_OTHERS = 0.97, 0.6, 0.8
SETTING = "cold"


def resident_part(path: Path) -> float:
    """The part of a file that is in the page cache, from 0 to 1. Reads nothing."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        anchor = ctypes.c_char.from_buffer(mapped)
        pages = -(-size // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        address = ctypes.c_void_p(ctypes.addressof(anchor))
        code = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), seen)
        del anchor, address
    if code:
        raise peers.Failed(f"mincore: {os.strerror(ctypes.get_errno())}")
    return sum(one & 1 for one in bytes(seen)) / pages


def make_cold(*paths: Path) -> None:
    """Take files out of the page cache, and make sure that they are."""
    for path in paths:
        nbd.drop_cache(path)
        part = resident_part(path)
        if part > RESIDENT_LIMIT:
            raise peers.Failed(f"{part:.1%} of {path} stays in the page cache")


def run_once(target: peers.Running, load: Load, bytes_read: int, *, size: int, offset: int = 0) -> peers.Rate:
    """fio reads this many bytes, and no block twice."""
    command = peers.fio_command(target, load, 1, size=size, offset=offset)
    command = [
        word for word in command if not word.startswith(("--time_based", "--runtime", "--ramp", "--norandommap"))
    ]
    before = target.cpu_seconds()
    done = subprocess.run(
        [*command, f"--io_size={bytes_read}"], check=False, capture_output=True, text=True, timeout=120,
        cwd=target.socket_path.parent,
    )  # fmt: skip
    used = target.cpu_seconds() - before
    return peers.Rate(
        peers.rate_in(done.returncode, done.stdout, done.stderr, load), 1e6 * used / (bytes_read // load.block_bytes)
    )


def contestants() -> list[tuple[Server, str]]:
    """Each with the suffix of the image that it serves."""
    found = [(peers.ours(), ".vhd"), (Server("vhdkit, VHDX", peers.ours().command), ".vhdx")]
    if has("qemu-nbd"):
        for cache in ("writeback", "none"):
            command = peers.qemu(("--aio=io_uring", f"--cache={cache}")).command
            found.append((Server(f"qemu-nbd {'direct' if cache == 'none' else cache}", command), ".vhd"))
    if has("nbdkit"):
        found.append((peers.nbdkit_file(), ".raw"))
    return found


def measure(server: Server, files: list[Path], one: ColdLoad, size: int) -> peers.Rate:
    """One run on cold files, of which the first is served.

    They are read once and become cold when the server runs already. The memory that is free then has just been used:
    in a virtual machine, what has been free for a second may have been given back to the host, and is several times as
    slow at its first use. Servers that take a while to start, or that read into large folios, met more of it.
    """
    with peers.running(server, files[0]) as target:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.read(MIB):
                    pass
        make_cold(*files)
        return run_once(target, one.load, min(one.bytes_read, size), size=size)


def against_peers(folder: Path, plan: Plan) -> Iterator[Result]:
    """Every cold load on every server."""
    image = folder / "disk.vhd"
    servers = contestants()
    for what, one in LOADS.items():
        rows = {server.name: Row(server.name) for server, _ in servers}
        costs: dict[str, list[float]] = {server.name: [] for server, _ in servers}
        for number in range(plan.rounds):
            for server, suffix in rotated(servers, number):
                rate = measure(server, [image.with_suffix(suffix)], one, plan.size)
                rows[server.name].values.append(rate.per_second)
                costs[server.name].append(rate.cpu_us)
        ours = rows["vhdkit"]
        for row in rows.values():
            cpu_us = sum(costs[row.name]) / len(costs[row.name])
            if row is ours:
                yield Result(SETTING, what, row.name, row.median, "/s", cpu_us=cpu_us)
                continue
            if row.name == "vhdkit, VHDX":
                ratio, goal = middle_ratio(row, ours), GOAL_VHDX
            else:
                ratio = middle_ratio(ours, row)
                goal = one.goal_nbdkit if row.name.startswith("nbdkit") else one.goal_qemu
            yield Result(SETTING, what, row.name, row.median, "/s", ratio, goal, ratio >= goal, cpu_us)


def deep_chain(folder: Path, plan: Plan) -> Iterator[Result]:
    """The first pass over 32 layers against that over one file."""
    single, leaf = folder / "disk.vhd", nbd.grow(folder, plan.size)
    layers = [leaf, *(path for path in folder.glob("layer*") if path != leaf)]
    for what, one in LOADS.items():
        rows = Row("vhdkit, single file"), Row(f"vhdkit, {nbd.CHAIN_DEPTH} layers")
        for _ in range(plan.rounds):
            rows[0].values.append(measure(peers.ours(), [single], one, plan.size).per_second)
            rows[1].values.append(measure(peers.ours(), layers, one, plan.size).per_second)
        ratio = middle_ratio(rows[1], rows[0])
        yield Result(SETTING, f"{what}, first pass", rows[0].name, rows[0].median, "/s")
        yield Result(
            SETTING, f"{what}, first pass", rows[1].name, rows[1].median, "/s", ratio, GOAL_CHAIN, ratio >= GOAL_CHAIN
        )


def beside_a_scan(folder: Path, plan: Plan) -> Iterator[Result]:
    """A client on cached data alone, and beside one that reads cold data with the requests of nbdcopy."""
    hot = plan.scan_size // 8
    image = folder / "scan.vhd"
    nbd.fill(image, plan.scan_size)
    scan = Load("read", 256 << 10, 1)
    servers = [(peers.ours(), image)]
    if has("nbdkit"):
        servers.append((peers.nbdkit_file(), nbd.copy_raw(image, folder / "scan.raw")))
    for server, path in servers:
        free, hindered, speeds = Row(f"{server.name}, alone"), Row(f"{server.name}, beside a cold scan"), []
        for _ in range(plan.rounds):
            for row in (free, hindered):
                make_cold(path)
                with peers.running(server, path) as target:
                    peers.rate(target, Load("read", MIB, 4), plan.seconds, size=hot)
                    if row is free:
                        row.values.append(peers.rate(target, nbd.BUSY, plan.seconds, size=hot))
                        continue
                    with peers.beside(target, scan, 60, size=plan.scan_size - hot, offset=hot) as speed:
                        row.values.append(peers.rate(target, nbd.BUSY, plan.seconds, size=hot))
                    speeds += speed
        ratio, mib = middle_ratio(hindered, free), sum(speeds) / len(speeds) / 4
        goal = GOAL_OTHERS if server.name == "vhdkit" else None
        met = None if goal is None else ratio >= goal
        yield Result(SETTING, nbd.BUSY_NAME, free.name, free.median, "/s")
        yield Result(SETTING, nbd.BUSY_NAME, hindered.name, hindered.median, "/s", ratio, goal, met)
        yield Result(SETTING, "the scan itself, 256K, depth 1", server.name, mib, "MiB/s")


PARTS = {"peers": against_peers, "chain": deep_chain, "scan": beside_a_scan}


def measure_all(folder: Path, parts: list[str], plan: Plan) -> Iterator[Result]:
    """The chosen parts, on one disk of which every contestant has a copy in its format."""
    image = folder / "disk.vhd"
    nbd.fill(image, plan.size)
    nbd.copy_raw(image, folder / "disk.raw")
    vhdkit.convert(image, folder / "disk.vhdx", disk_format=vhdkit.DiskFormat.VHDX)
    for part in parts:
        if part in PARTS:
            yield from PARTS[part](folder, plan)
