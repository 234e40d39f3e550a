# SPDX-License-Identifier: Apache-2.0
"""A disk is written to while its layers are merged, for `soak` to kill: everything flushed, or something newer, is
there.

The writer keeps a log, a line for each write and each flush, which survives SIGKILL. After a kill every sector must
read as the last write to it before the last complete flush, or as a later one.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from pathlib import Path

import vhdkit
from vhdkit import errors
from vhdkit.serve.control.merging import MergeRequest, ServedMerge, plan_served_merge
from vhdkit.serve.nbd.server import NbdServer
from vhdkit.serve.opening import ImageExport, OpenMode
from vhdkit.units import KIB, MIB, SECTOR_SIZE

DISK = 8 * MIB
BLOCK = 512 * KIB
_LOG = "log"
_SECTORS = DISK // SECTOR_SIZE


def pattern(number: int, first: int, count: int) -> bytes:
    """The data of write `number`: each sector says which write and which sector it is."""
    words = (number << 32 | index for index in range(first, first + count))
    return b"".join(word.to_bytes(8, "little") * (SECTOR_SIZE // 8) for word in words)


def layers_of(suffix: str) -> list[str]:
    """The names of the images, leaf first; `suffix` is that of the base."""
    return [*(f"{name}.a{suffix[1:]}" for name in ("leaf", "upper", "lower")), f"base{suffix}"]


def base() -> str:
    """The base of the chain in this folder."""
    return next(name for name in ("base.vhd", "base.vhdx") if os.path.exists(name))


def make_chain(suffix: str = ".vhd") -> None:
    """Four layers; the log begins with their content, flushed."""
    layers, is_vhdx = layers_of(suffix), suffix == ".vhdx"
    block, kind = (MIB, vhdkit.DiskFormat.VHDX) if is_vhdx else (BLOCK, vhdkit.DiskFormat.DYNAMIC)
    with Path(_LOG).open("w") as log:
        number, rng = 0, random.Random("live")
        for layer in reversed(range(len(layers))):
            if layer == len(layers) - 1:
                vhdkit.create_image(layers[layer], DISK, disk_format=kind, block_size_bytes=block)
            else:
                vhdkit.create_child(layers[layer], layers[layer + 1])
            with vhdkit.open_disk(layers[layer], writable=True) as disk:
                for _ in range(25):
                    number += 1
                    _write(disk, number, rng, log.fileno())
        os.write(log.fileno(), b"flush\n")


def _write(disk: vhdkit.Disk, number: int, rng: random.Random, log: int) -> None:
    count = min(rng.choice((1, 8, 100, 1024, 1500)), _SECTORS)
    first = rng.randrange(_SECTORS - count)
    os.write(log, f"write {number} {first} {count}\n".encode())
    disk.write(first * SECTOR_SIZE, pattern(number, first, count))


def newest() -> str:
    """The image that is the disk now: the upper end of the chain whose base exists."""
    path = base()
    suffix = f".a{path.rpartition('.')[2]}"
    while True:
        children = [name for name in sorted(os.listdir()) if name.endswith(suffix) and _stands_on(name, path)]
        if not children:
            return path
        (path,) = children


def _stands_on(child: str, parent: str) -> bool:
    with vhdkit.open_disk(child, options=vhdkit.OpenOptions(lock=False)) as disk:
        recorded = disk.chain.leaf.facts.parent
    with vhdkit.open_disk(parent, options=vhdkit.OpenOptions(lock=False)) as disk:
        return recorded is not None and disk.chain.leaf.unique_id in recorded.linkage_ids


def merge_while_writing() -> None:
    """Serve the disk without a client, write from one thread, merge from another: first the middle, then
    everything."""
    leaf = newest()
    rng = random.Random(os.getpid())
    log = os.open(_LOG, os.O_WRONLY | os.O_APPEND)
    os.write(log, b"start\n")
    number = sum(line.startswith("write") for line in Path(_LOG).read_text().splitlines())
    export = ImageExport("disk", vhdkit.open_disk(leaf, writable=True), OpenMode(vhdkit.OpenOptions()))
    server = NbdServer([export])
    loop = threading.Thread(target=server.run)
    loop.start()
    stop = threading.Event()

    def write() -> None:
        nonlocal number
        while not stop.is_set():
            with server.hold([export]):  # as a request would: never while the chain is exchanged
                for _ in range(3):
                    number += 1
                    _write(export.disk, number, rng, log)
                if rng.random() < 0.5:
                    export.disk.flush()
                    os.write(log, b"flush\n")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        paths = [layer.store.name for layer in export.disk.chain.layers]
        if len(paths) > 2:
            ServedMerge(server, plan_served_merge(export, MergeRequest(layer=paths[1], into=paths[2]))).run()
        if len(paths) > 1:
            ServedMerge(server, plan_served_merge(export, MergeRequest(into=paths[-1]))).run()
    finally:
        stop.set()
        writer.join()
        export.disk.flush()
        os.write(log, b"flush\n")
        server.stop()
        loop.join()


def look(done: bool) -> None:
    """Every sector is explained by the log; at the end only the base is left."""
    _settle()
    written = _written()
    with vhdkit.open_disk(newest(), options=vhdkit.OpenOptions(lock=False)) as disk:
        raw = disk.read(0, DISK)
    for sector in range(_SECTORS):
        found = raw[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE]
        word = int.from_bytes(found[:8], "little")
        allowed = written.get(sector, {0})
        if word == 0 and 0 in allowed and not any(found):
            continue
        assert word & 0xFFFFFFFF == sector and found == found[:8] * (SECTOR_SIZE // 8), f"sector {sector} is torn"
        assert word >> 32 in allowed, f"sector {sector} is of write {word >> 32}, not of one of {sorted(allowed)}"
    if done:
        images = [name for name in os.listdir() if name.endswith(("vhd", "vhdx"))]
        assert images == [base()], images


def _written() -> dict[int, set[int]]:
    """Which writes each sector may show: the last one before the last flush, and all later ones.

    Unflushed writes of a killed process may be there or not, and a later flush of another process does not decide
    that.
    """
    flushed: dict[int, set[int]] = {}
    since: dict[int, list[int]] = {}
    for line in Path(_LOG).read_text().splitlines():
        what, *numbers = line.split()
        if what == "flush":
            flushed.update({sector: {later[-1]} for sector, later in since.items()})
            since.clear()
        elif what == "start":
            for sector, later in since.items():
                flushed[sector] = flushed.get(sector, {0}).union(later)
            since.clear()
        else:
            number, first, count = map(int, numbers)
            for sector in range(first, first + count):
                since.setdefault(sector, []).append(number)
    for sector, later in since.items():
        flushed[sector] = flushed.get(sector, {0}).union(later)
    return flushed


def _settle() -> None:
    """A merge whose data is complete is finished by the next writable open, as when the server is started again."""
    for target in layers_of(base().removeprefix("base"))[:0:-1]:
        if os.path.exists(target) and vhdkit.merge_under_way(target) is not None:
            with contextlib.suppress(errors.HasChildren):
                vhdkit.resume_merge(target)
