# SPDX-License-Identifier: Apache-2.0
"""Nights of a backup: 1 % of a disk changed since the last one, in pages of 4 KiB, at random or in clusters.

    script/bench backup                               all of it with 16 GiB
    script/bench backup -- --peers                    also borg and restic, about eight minutes
    script/bench backup -- --gib 4 --only nights      a part of it, with a smaller disk

- full: the first night, against `cp --sparse=always` of a raw file with the same content, and a flush.
- nights: vhdkit saves the layer that was frozen (`--keep-reference`). Beside it a plain loop copies the same ranges
  from the raw file, with `pread` and `pwrite` and one `fdatasync` at the end: nothing can know where the changes are
  and do less. Then the space of a night, in bytes for each byte that changed.
- verify: against reading the data of the same files through SHA-256 on all cores.
- prune: four nights of seven are dropped; then the same nights of a disk of a quarter of the size.
- live: the slowest write of a guest while its disk is served, saved and merged, and the memory of the backup.
- peers: seven nights by borg and restic of the raw file, all of which they have to read, and by vhdkit.

The sources are in the page cache for all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import vhdkit
from benchmarks.backup_live import PAGE, pauses, served
from benchmarks.common import Row, arguments, has, interleaved, report, timed, workplace
from vhdkit.backup.keep import KeepRules
from vhdkit.backup.manifest import Consistency, Manifest
from vhdkit.backup.night import Circumstances, FrozenDisk, Wishes, writing
from vhdkit.backup.pruning import prune
from vhdkit.backup.repository import create_repository, open_repository
from vhdkit.backup.verify import verify
from vhdkit.chain.engine.chain import Chain
from vhdkit.units import GIB, MIB, SECTOR_SIZE

MACHINE = "benchmark"
GOAL_TIME, GOAL_FULL, GOAL_VERIFY, GOAL_PRUNE, GOAL_PAUSE_MS = 1.3, 1 / 0.9, 1 / 0.8, 1.3, 100
GOAL_SPACE = {"random": 1.25, "clustered": 1.05}
PRUNED_NIGHTS, KEPT_NIGHTS, PEER_NIGHTS = 7, 3, 7


@dataclass
class Disk:
    """A disk as a chain, and the same content as a raw file."""

    folder: Path
    size_bytes: int
    base_bytes: int
    leaf: Path
    raw: Path

    @classmethod
    def made(cls, folder: Path, size_bytes: int) -> Disk:
        """A disk with a sixteenth of it used, at most 1 GiB."""
        used = min(size_bytes // 16, GIB)
        disk = cls(folder, size_bytes, used, folder / "disk.vhd", folder / "disk.raw")
        vhdkit.create_image(disk.leaf, size_bytes)
        with vhdkit.open_disk(disk.leaf, writable=True) as image, disk.raw.open("wb") as raw:
            raw.truncate(size_bytes)
            rng = random.Random(1)
            for offset in range(0, used, MIB):
                data = rng.randbytes(MIB)
                image.write(offset, data)
                os.pwrite(raw.fileno(), data, offset)
        return disk

    def places(self, kind: str, seed: int) -> list[int]:
        """Where 1 % of the pages lie that change: anywhere, or in runs of 64."""
        rng, count = random.Random(seed), self.size_bytes // PAGE // 100
        if kind == "random":
            return sorted(rng.sample(range(self.size_bytes // PAGE), count))
        runs = rng.sample(range(self.size_bytes // PAGE // 64), count // 64)
        return sorted(run * 64 + page for run in runs for page in range(64))

    def change(self, places: Sequence[int], seed: int) -> None:
        """Write these pages to the chain's leaf and to the raw file."""
        rng = random.Random(seed)
        with vhdkit.open_disk(self.leaf, writable=True) as image, self.raw.open("r+b") as raw:
            for page in places:
                data = rng.randbytes(PAGE)
                image.write(page * PAGE, data)
                os.pwrite(raw.fileno(), data, page * PAGE)

    def freeze(self) -> Path:
        """Go on in a new child; the frozen layer."""
        frozen, self.leaf = self.leaf, Path(vhdkit.snapshot(self.leaf))
        return frozen


def save(disk: Disk, repository: Path) -> Manifest:
    """Freeze the disk and write a night."""
    frozen = disk.freeze()
    facts = Circumstances(datetime.now(UTC), "UTC", timedelta(0), "benchmark", Consistency.CRASH)
    with (
        create_repository(repository) as opened,
        writing(opened, MACHINE, MACHINE, Wishes()) as night,
        Chain.open(frozen) as chain,
    ):
        return night.save([FrozenDisk("disk", chain, keeps_layer=True)], facts)


def plain_loop(disk: Disk, places: Sequence[int], target: Path) -> None:
    """Copy these pages of the raw file, run by run, to a sparse file; one flush."""
    runs: list[list[int]] = []
    for page in places:
        if runs and runs[-1][1] == page:
            runs[-1][1] = page + 1
        else:
            runs.append([page, page + 1])
    with disk.raw.open("rb") as source, target.open("wb") as new:
        for first, stop in runs:
            data = os.pread(source.fileno(), (stop - first) * PAGE, first * PAGE)
            os.pwrite(new.fileno(), data, first * PAGE)
        os.fdatasync(new.fileno())
    target.unlink()


def nights(disk: Disk, repository: Path, kind: str, rounds: int) -> tuple[dict[str, Row], Row]:
    """A night a round, and the loop over the same pages; also the space of each night, for each byte that changed."""
    space = Row("vhdkit, space")
    places: list[int] = []
    number = 0

    def night() -> float:
        nonlocal places, number
        number += 1
        places = disk.places(kind, number)
        disk.change(places, number)
        os.sync()  # what the change wrote is not the night's to wait for
        made: list[Manifest] = []
        seconds = timed(lambda: made.append(save(disk, repository)))
        space.values.append(made[0].disks[0].data_bytes / (len(places) * PAGE))
        assert made[0].disks[0].how == "layers"
        return seconds

    loop = disk.folder / "loop.raw"
    rows = interleaved({"vhdkit": night, "loop": lambda: timed(lambda: plain_loop(disk, places, loop))}, rounds)
    return rows, space


def full(disk: Disk, rounds: int) -> dict[str, Row]:
    """The first night, and `cp` of the raw file with a flush."""
    copy, repository = disk.folder / "copy.raw", disk.folder / "first"

    def night() -> float:
        seconds = timed(lambda: save(disk, repository))
        shutil.rmtree(repository)
        return seconds

    def copied() -> float:
        def run() -> None:
            subprocess.run(["cp", "--sparse=always", disk.raw, copy], check=True)
            with copy.open("rb") as file:
                os.fdatasync(file.fileno())

        seconds = timed(run)
        copy.unlink()
        return seconds

    return interleaved({"vhdkit": night, "cp": copied}, rounds)


def verified(repository: Path, rounds: int) -> dict[str, Row]:
    """`verify`, and reading the data of the same images through SHA-256 on all cores."""
    images = [one for one in repository.rglob("images/*/*") if one.suffix != ".sums"]

    def whole() -> float:
        with open_repository(repository) as opened, opened.machine(MACHINE) as machine:
            seconds = timed(lambda: verify(machine, again=True))
        return seconds

    def hashed() -> float:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pieces = [piece for image in images for piece in data_of(image)]
            return timed(lambda: list(pool.map(hash_of, pieces)))

    return interleaved({"vhdkit": whole, "hash": hashed}, rounds)


def data_of(path: Path) -> list[tuple[Path, int, int]]:
    """(file, offset, size) of the parts of a file that are not holes, at most 4 MiB each."""
    found = []
    with path.open("rb") as file:
        end, position = os.fstat(file.fileno()).st_size, 0
        while position < end:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found += [(path, at, min(4 * MIB, position - at)) for at in range(start, position, 4 * MIB)]
    return found


def hash_of(piece: tuple[Path, int, int]) -> bytes:
    """The SHA-256 of a part of a file."""
    path, offset, size = piece
    with path.open("rb") as file:
        return hashlib.sha256(os.pread(file.fileno(), size, offset)).digest()


def pruned(folder: Path, gib: int, rounds: int) -> dict[str, Row]:
    """Seconds of dropping the same nights of a disk of this size and of one of a quarter of it."""
    sizes = {f"{gib} GiB": gib * GIB, f"{gib / 4:g} GiB": gib * GIB // 4}
    repositories = {}
    for name, size in sizes.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        disk = Disk.made(place, size)
        repositories[name] = place / "repository"
        for number in range(PRUNED_NIGHTS):
            if number:
                changed = Disk(place, min(sizes.values()), 0, disk.leaf, disk.raw)
                disk.change(changed.places("random", number), number)
            save(disk, repositories[name])

    def prune_copy(repository: Path) -> float:
        copy = repository.with_name("copy")
        subprocess.run(["cp", "-a", "--sparse=always", repository, copy], check=True)
        os.sync()
        with open_repository(copy) as opened, opened.machine(MACHINE) as machine:
            seconds = timed(lambda: prune(machine, KeepRules(last=KEPT_NIGHTS), UTC))
            assert len(machine.nights()) == KEPT_NIGHTS
        shutil.rmtree(copy)
        return seconds

    def of(repository: Path) -> Callable[[], float]:
        return lambda: prune_copy(repository)

    return interleaved({name: of(repository) for name, repository in repositories.items()}, rounds)


def peers(disk: Disk, kind: str) -> dict[str, tuple[Row, Row]]:
    """Seconds and space of a night, for each peer that is installed and for vhdkit: seven nights in turn."""
    environment = {
        **os.environ, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes", "BORG_BASE_DIR": str(disk.folder / "home"),
        "RESTIC_PASSWORD": "benchmark", "RESTIC_CACHE_DIR": str(disk.folder / "home"),
    }  # fmt: skip

    def run(*words: str | Path) -> None:
        subprocess.run([*map(str, words)], check=True, env=environment, capture_output=True, cwd=disk.folder)

    def borg(place: Path, number: int) -> None:
        run("borg", "create", f"{place}::{number}", disk.raw.name)

    def restic(place: Path, number: int) -> None:
        run("restic", "backup", "-q", "-r", place, disk.raw.name)

    def ours(place: Path, number: int) -> None:
        save(disk, place)

    nights = {"vhdkit": ours, "borg": borg, "restic": restic}
    begin = {"borg": ("borg", "init", "-e", "none"), "restic": ("restic", "init", "-r")}
    nights = {name: night for name, night in nights.items() if name not in begin or has(name)}
    for name in nights.keys() & begin.keys():
        run(*begin[name], disk.folder / f"{kind}-{name}")
    rows = {name: (Row(name), Row(name)) for name in nights}
    for number in range(PEER_NIGHTS + 1):
        places = disk.places(kind, 100 + number)
        disk.change(places, 100 + number)
        os.sync()
        for name, night in nights.items():
            place = disk.folder / f"{kind}-{name}"
            before = used(place)
            seconds = timed(partial(night, place, number))
            if number:  # the first one is full
                rows[name][0].values.append(seconds)
                rows[name][1].values.append((used(place) - before) / (len(places) * PAGE))
    for name in nights:
        shutil.rmtree(disk.folder / f"{kind}-{name}")
    return rows


def used(folder: Path) -> int:
    """How much space the files of a folder take."""
    return sum(one.stat().st_blocks * SECTOR_SIZE for one in folder.rglob("*") if one.is_file())


# -- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """A line of the table: a value and what it is compared with. `goal` is the highest good ratio, or value."""

    name: str
    row: Row
    beside: Row | None = None
    goal: float | None = None

    @property
    def judged(self) -> float:
        """What the goal is about."""
        return self.row.median if self.beside is None else self.row.median / self.beside.median

    def words(self) -> list[str]:
        """The line."""
        beside = "" if self.beside is None else f"{self.beside.median:.3f} ({self.beside.name})"
        ratio = "" if self.beside is None else f"{self.judged:.2f}"
        return [self.name, f"{self.row.median:.3f}", beside, ratio, "" if self.goal is None else f"<= {self.goal:.2f}"]


def part_full(folder: Path, options: argparse.Namespace) -> Iterator[Measured]:
    """The first night."""
    rows = full(Disk.made(folder, options.gib * GIB), options.rounds)
    yield Measured("full night, s", rows["vhdkit"], rows["cp"], GOAL_FULL)


def part_nights(folder: Path, options: argparse.Namespace) -> Iterator[Measured]:
    """Nights after it, and verifying all of them."""
    disk, repository = Disk.made(folder, options.gib * GIB), folder / "repository"
    save(disk, repository)
    for kind in options.kinds:
        rows, space = nights(disk, repository, kind, options.rounds)
        yield Measured(f"{kind} night, s", rows["vhdkit"], rows["loop"], GOAL_TIME)
        yield Measured(f"{kind} night, bytes per changed byte", space, None, GOAL_SPACE[kind])
    rows = verified(repository, options.rounds)
    yield Measured("verify, s", rows["vhdkit"], rows["hash"], GOAL_VERIFY)


def part_prune(folder: Path, options: argparse.Namespace) -> Iterator[Measured]:
    """Dropping nights."""
    large, small = pruned(folder, options.gib, options.rounds).values()
    dropped = PRUNED_NIGHTS - KEPT_NIGHTS
    yield Measured(f"prune of {dropped} nights, {large.name}, s", large, small, GOAL_PRUNE)


def part_live(folder: Path, options: argparse.Namespace) -> Iterator[Measured]:
    """A disk that is written to meanwhile."""
    for kind in options.kinds:
        size = options.gib * GIB
        places = partial(Disk(folder, size, 0, folder, folder).places, kind)
        with served(folder / kind, size) as disk:
            beside, alone, memory = pauses(disk, places, options.rounds)
        yield Measured(f"{kind} night, slowest write of a guest, ms", beside, None, GOAL_PAUSE_MS)
        yield Measured(f"{kind} night, the same without a backup, ms", alone)
        yield Measured(f"{kind} night, peak memory, MiB", memory)


def part_peers(folder: Path, options: argparse.Namespace) -> Iterator[Measured]:
    """Other programs."""
    disk = Disk.made(folder, options.peer_gib * GIB)
    for kind in options.kinds:
        rows = peers(disk, kind)
        for name, (seconds, space) in rows.items():
            beside = None if name == "vhdkit" else rows["vhdkit"]
            on = f"{name}, {options.peer_gib} GiB, {kind} night"
            yield Measured(f"{on}, s", seconds, None if beside is None else beside[0])
            yield Measured(f"{on}, bytes per changed byte", space, None if beside is None else beside[1])


PARTS = {"full": part_full, "nights": part_nights, "prune": part_prune, "live": part_live, "peers": part_peers}


def main() -> None:
    """Run it."""
    parser = arguments(__doc__ or "", rounds=3)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gib", type=int, default=16, help="size of the disk, a multiple of 4")
    parser.add_argument("--peer-gib", type=int, default=1, help="size of the disk that peers save, too")
    parser.add_argument("--kind", choices=("random", "clustered", "both"), default="both", help="where changes lie")
    parser.add_argument("--only", choices=PARTS, help="only this part")
    parser.add_argument("--peers", action="store_true", help="also borg and restic")
    options = parser.parse_args()
    options.kinds = ("random", "clustered") if options.kind == "both" else (options.kind,)
    wanted = [options.only] if options.only else [name for name in PARTS if name != "peers" or options.peers]
    lines: list[Measured] = []
    for name in wanted:
        with workplace(options.dir) as folder:
            begin = time.monotonic()
            lines += PARTS[name](folder, options)
            print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    data = {one.name: {"value": one.row.median, "ratio": one.judged, "rounds": one.row.values} for one in lines}
    columns = ["", "vhdkit or peer", "beside", "ratio", "goal"]
    title = f"backup: 1 % of {options.gib} GiB changed"
    report(title, columns, [one.words() for one in lines], {"rows": data}, options.json)


if __name__ == "__main__":
    main()
