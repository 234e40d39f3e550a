# SPDX-License-Identifier: Apache-2.0
"""Images are opened and written to while others merge, remove, replace and rename them, for `soak` to kill.

Everything happens in threads of one process, which SIGKILL ends together: locks belong to an opening of a file, so
threads exclude each other as processes do. What must be true: while an image is held for writing, its name leads to
it, and every write whose flush has returned is read through the newest image, or something newer.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import vhdkit
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE

_DISK = 2 * MIB
_WRITERS = 2
_SECONDS = 0.5
_LOG = "log"
_AWAY = "away.vhd"


def prepare() -> None:
    """A base, and an image that is replaced again and again."""
    for path in ("base.vhd", "other.vhd"):
        vhdkit.create_image(path, _DISK, block_size_bytes=512 * KIB)
    Path(_LOG).touch()


def work() -> None:
    """Everything concurrently, for a moment."""
    sys.setswitchinterval(1e-5)
    end, failures = time.monotonic() + _SECONDS, list[BaseException]()
    jobs: list[Callable[[random.Random], None]] = [_write] * _WRITERS
    jobs += [_merge, _clear_away, _replace, _write_other, _rename]

    def run(number: int, job: Callable[[random.Random], None]) -> None:
        rng = random.Random(f"{time.time_ns()} {number}")
        try:
            while time.monotonic() < end:
                with contextlib.suppress(vhdkit.VhdkitError):  # in use, replaced, missing: as intended
                    job(rng)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=one) for one in enumerate(jobs)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if failures:
        raise failures[0]


def _newest() -> str:
    return "leaf.avhd" if os.path.exists("leaf.avhd") else "base.vhd"


def _assert_named(disk: vhdkit.Disk) -> None:
    file = disk.chain.leaf.store
    assert isinstance(file, FileStore)
    if not os.path.exists(_AWAY):  # renamed by hand: the name comes back
        assert file.still_named() or os.path.exists(_AWAY), f"{disk.path} is written to and has lost its name"


def _write(rng: random.Random) -> None:
    """Count up in a sector; the log has the flushed numbers."""
    sector = rng.randrange(_DISK // SECTOR_SIZE)
    with vhdkit.open_disk(_newest(), writable=True) as disk:
        number = int.from_bytes(disk.read(sector * SECTOR_SIZE, 8), "big") + 1
        disk.write(sector * SECTOR_SIZE, number.to_bytes(8, "big"))
        disk.flush()
        _assert_named(disk)
        with open(_LOG, "a") as log:
            log.write(f"{sector} {number}\n")


def _write_other(rng: random.Random) -> None:
    with vhdkit.open_disk("other.vhd", writable=True) as disk:
        disk.write(rng.randrange(_DISK - 8), b"whatever")
        disk.flush()
        _assert_named(disk)


def _merge(rng: random.Random) -> None:
    if os.path.exists("leaf.avhd"):
        if vhdkit.merge_under_way("base.vhd") is not None:
            vhdkit.resume_merge("base.vhd")
        else:
            vhdkit.merge("leaf.avhd")
    else:
        vhdkit.snapshot("base.vhd", "leaf.avhd")


def _clear_away(rng: random.Random) -> None:
    vhdkit.collect_garbage(".", [_newest(), "other.vhd"], delete=True)


def _replace(rng: random.Random) -> None:
    if rng.random() < 0.5:
        vhdkit.create_image("other.vhd", _DISK, block_size_bytes=512 * KIB, replace=True)
    else:
        kind = rng.choice((vhdkit.DiskFormat.FIXED, vhdkit.DiskFormat.DYNAMIC))
        vhdkit.convert(_newest(), "other.vhd", kind, replace=True, sync=False)


def _rename(rng: random.Random) -> None:
    """By hand, without any lock: the base is missing for a moment."""
    time.sleep(rng.uniform(0, 0.05))  # the others run in the meantime
    os.rename("base.vhd", _AWAY)
    time.sleep(rng.uniform(0, 0.002))  # the others go without it for that long
    os.rename(_AWAY, "base.vhd")


def look(done: bool) -> None:
    """Flushed data is there, or newer data; after recovery the images are sound."""
    if os.path.exists(_AWAY):
        os.rename(_AWAY, "base.vhd")
    flushed: dict[int, int] = {}
    for line in Path(_LOG).read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            sector, number = map(int, line.split())
            flushed[sector] = max(number, flushed.get(sector, 0))
    with vhdkit.open_disk(_newest()) as disk:
        for sector, number in flushed.items():
            found = int.from_bytes(disk.read(sector * SECTOR_SIZE, 8), "big")
            assert found >= number, f"sector {sector} of {disk.path} holds {found}, flushed was {number}"
    if done:
        for path in ("base.vhd", "other.vhd", _newest()):
            bad = [one for one in vhdkit.check(path) if one.severity is vhdkit.Severity.ERROR]
            assert not bad, bad


def finish() -> None:
    """Finish everything that was interrupted."""
    if vhdkit.merge_under_way("base.vhd") is not None:
        vhdkit.resume_merge("base.vhd")
    vhdkit.collect_garbage(".", [_newest(), "other.vhd"], delete=True)
