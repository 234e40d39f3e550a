# SPDX-License-Identifier: Apache-2.0
"""A server with `--remember` is killed while it takes snapshots and merges, for `soak`: every answered write is there.

    serve BASE --follow-leaf --remember NOTES, always the same; a writer, and beside it a thread that prepares leaves,
    takes snapshots and merges them away -> SIGKILL -> the same command line again -> check

The writer keeps a log, a line before each write and one after it was answered, which survives SIGKILL: each sector
must read as the last answered write to it, or as the one that was in flight when the process died. Flushes do not
affect that, so there are few. The log is the model; no data of the server is trusted.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from unittest import mock

import vhdkit
from tests.soak_live import pattern
from vhdkit import errors
from vhdkit.chain.verbs import live_merge
from vhdkit.chain.verbs.merge_steps import take_over_disk
from vhdkit.image import Layer
from vhdkit.serve.control.operations import Operations
from vhdkit.serve.nbd.server import NbdServer
from vhdkit.serve.opening import ExportRequest, ImageExport, OpenMode, open_exports
from vhdkit.units import KIB, MIB, SECTOR_SIZE

DISK = 8 * MIB
BASE, BASE_VHDX = "base.vhd", "base.vhdx"
_SECTORS = DISK // SECTOR_SIZE
_LOG, _NOTES = "log", "notes"


def _open_mode() -> OpenMode:
    return OpenMode(vhdkit.OpenOptions(notes_folder=_NOTES), follow_leaf=True)


def _base() -> str:
    """The base that `prepare` made."""
    return os.path.abspath(BASE if os.path.exists(BASE) else BASE_VHDX)


def prepare() -> None:
    """A base, a folder for notes, an empty log."""
    vhdkit.create_image(BASE, DISK, block_size_bytes=512 * KIB)
    os.mkdir(_NOTES)
    Path(_LOG).touch()


def prepare_vhdx() -> None:
    """The same with a VHDX."""
    vhdkit.create_image(BASE_VHDX, DISK, disk_format="vhdx", block_size_bytes=MIB)
    os.mkdir(_NOTES)
    Path(_LOG).touch()


def serve_and_change() -> None:
    """Serve the newest leaf of the base, write, and change the chain while writing."""
    exports = open_exports([ExportRequest(_base(), "disk")], _open_mode())
    rng = random.Random(os.getpid())
    server = NbdServer(exports)
    loop = threading.Thread(target=server.run)
    loop.start()
    stop = threading.Event()
    writer = threading.Thread(target=_write_on, args=(server, exports[0], rng, stop))
    writer.start()
    operations = Operations(server, exports)
    try:
        for _ in range(6):
            _change(operations, rng)
    finally:
        stop.set()
        writer.join()
        operations.close()
        server.stop()
        loop.join()
        server.close()
        for export in exports:
            export.disk.close()


def prepare_and_die() -> None:
    """A new leaf is made for a snapshot, then a write is answered, then the server is killed: deterministic."""
    exports = open_exports([ExportRequest(_base(), "disk")], _open_mode())
    operations = Operations(NbdServer(exports), exports)  # its end would remove the prepared leaf
    operations.methods()["prepare"].work({"exports": {"disk": None}})
    Path(_LOG).write_text("write 1 8 8\n")
    exports[0].disk.write(8 * SECTOR_SIZE, pattern(1, 8, 8))
    Path(_LOG).write_text("write 1 8 8\nanswered 1\n")
    os.kill(os.getpid(), signal.SIGKILL)


def merge_and_die() -> None:
    """A leaf is merged into its parent, and the server is killed before the copy is flushed: deterministic."""
    exports = open_exports([ExportRequest(_base(), "disk")], _open_mode())
    server = NbdServer(exports)
    threading.Thread(target=server.run, daemon=True).start()
    operations = Operations(server, exports)
    lines: list[str] = []
    for number, first in ((1, 8), (2, 5000)):
        lines += [f"write {number} {first} 8\n", f"answered {number}\n"]
        exports[0].disk.write(first * SECTOR_SIZE, pattern(number, first, 8))
        Path(_LOG).write_text("".join(lines))
        if number == 1:
            operations.methods()["snapshot"].work({"exports": {"disk": None}})

    def die(target: Layer, leaf: Layer, *, dry_run: bool = False) -> None:
        if not dry_run:
            os.kill(os.getpid(), signal.SIGKILL)
        take_over_disk(target, leaf, dry_run=dry_run)

    mock.patch.object(live_merge, "take_over_disk", die).start()  # the process does not outlive it
    operations.methods()["merge"].work({"export": "disk"})


def _change(operations: Operations, rng: random.Random) -> None:
    """One verb of the control socket."""
    methods = operations.methods()
    verb = rng.choice(("prepare", "snapshot", "prepare and snapshot", "merge", "merge"))
    try:
        for one in verb.split(" and "):
            if one == "merge":
                methods["merge"].work({"export": "disk"})
            else:
                methods[one].work({"exports": {"disk": None}})
    except errors.InvalidArgument as error:
        assert "there is nothing to merge" in str(error), error


def _write_on(server: NbdServer, export: ImageExport, rng: random.Random, stop: threading.Event) -> None:
    log = os.open(_LOG, os.O_WRONLY | os.O_APPEND)
    number = sum(line.startswith("write") for line in Path(_LOG).read_text().splitlines())
    while not stop.is_set():
        with server.hold([export]):  # as a request would: never while the chain is exchanged
            for _ in range(4):
                number += 1
                count = rng.choice((1, 8, 100, 1500))
                first = rng.randrange(_SECTORS - count)
                os.write(log, f"write {number} {first} {count}\n".encode())
                export.disk.write(first * SECTOR_SIZE, pattern(number, first, count))
                os.write(log, f"answered {number}\n".encode())
            if rng.random() < 0.1:
                export.disk.flush()


def look(done: bool) -> None:
    """The same command line serves the disk again, and every sector is explained by the log."""
    [export] = open_exports([ExportRequest(_base(), "disk")], _open_mode())
    try:
        raw = export.disk.read(0, DISK)
    finally:
        export.disk.close()
    for sector, allowed in enumerate(_allowed()):
        found = raw[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE]
        word = int.from_bytes(found[:8], "little")
        if not any(found):
            assert 0 in allowed, f"sector {sector} is lost: it reads as zeros, not as one of {sorted(allowed)}"
            continue
        assert word & 0xFFFFFFFF == sector and found == found[:8] * (SECTOR_SIZE // 8), f"sector {sector} is torn"
        assert word >> 32 in allowed, f"sector {sector} is of write {word >> 32}, not of one of {sorted(allowed)}"
    left = [name for name in os.listdir(_NOTES) if not name.endswith(".part")]
    assert not left, f"notes are left: {left}"
    problems = [one for one in vhdkit.check(_base()) if one.severity is vhdkit.Severity.ERROR]
    assert not problems, problems


def _allowed() -> list[set[int]]:
    """Which writes each sector may show: the last answered one, and any later one that was begun."""
    allowed: list[set[int]] = [{0} for _ in range(_SECTORS)]
    begun: dict[int, range] = {}
    for line in Path(_LOG).read_text().splitlines():
        what, *numbers = line.split()
        number = int(numbers[0])
        if what == "write":
            begun[number] = range(int(numbers[1]), int(numbers[1]) + int(numbers[2]))
            for sector in begun[number]:
                allowed[sector].add(number)
        else:
            for sector in begun[number]:
                allowed[sector] = {number}
    return allowed
