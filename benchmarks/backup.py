# SPDX-License-Identifier: Apache-2.0
"""Nights of a backup: 1 % of a disk changed since the last one, in pages of 4 KiB, at random or in clusters.

    script/bench backup                                     with 16 GiB, about ten minutes
    script/bench backup -- --peers                          also borg and restic, about half an hour more
    script/bench backup -- --gib 1 --only full,random       pieces of it, with a smaller disk
    script/bench backup -- --dir /srv/bench --json n.json --seconds 200    what there is time for; again: the rest

- full: the first night, against `cp --sparse=always` of a raw file with the same content, and a flush.
- random, clustered: vhdkit saves the layer that was frozen (`--keep-reference`). Beside it a plain loop copies the
  same ranges from the raw file, with `pread` and `pwrite` and one `fdatasync` at the end: nothing can know where the
  changes are and do less. Then the space of a night, in bytes for each byte that changed.
- verify: against reading the data of the same files through SHA-256 on all cores.
- prune: four nights of seven are dropped; then the same nights of a disk of a quarter of the size.
- live-random, live-clustered: the slowest write of a guest while its disk is served, saved and merged, and the memory
  of the backup.
- restore: from `vmm restore --now` to the first byte of the guest, for a disk of this size and for one four times as
  large.
- peers-random, peers-clustered: seven nights by borg and restic of the raw file, all of which they have to read, and
  by vhdkit.

The sources are in the page cache for all of them.

With --json the numbers of each piece are kept in that file, and a piece that it has is not measured again. With --dir,
too, the nights of the peers go on where the last run stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from functools import partial
from pathlib import Path

from benchmarks.backup_disk import MACHINE, Disk, save, used_bytes
from benchmarks.backup_live import PAGE, pauses, served
from benchmarks.backup_peers import NIGHTS, OURS, Peers
from benchmarks.backup_restore import instant
from benchmarks.common import Row, arguments, has, interleaved, timed, workplace
from benchmarks.pieces import Measured, Pieces, need_space
from vhdkit.backup.keep import KeepRules
from vhdkit.backup.manifest import Manifest
from vhdkit.backup.pruning import prune
from vhdkit.backup.repository import open_repository
from vhdkit.backup.verify import verify
from vhdkit.units import GIB, MIB

GOAL_TIME, GOAL_FULL, GOAL_VERIFY, GOAL_PRUNE, GOAL_PAUSE_MS, GOAL_RESTORE = 1.3, 1 / 0.9, 1 / 0.8, 1.3, 100, 2.0
GOAL_SPACE = {"random": 1.25, "clustered": 1.05}
PRUNED_NIGHTS, KEPT_NIGHTS = 7, 3
RESTORE_FACTOR = 4
SPARE_BYTES = GIB


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


def nights(folder: Path, size_bytes: int, kind: str, rounds: int) -> tuple[dict[str, Row], Row]:
    """A night a round, and the loop over the same pages; also the space of each night, for each byte that changed."""
    disk, repository = Disk.made(folder, size_bytes), folder / "repository"
    save(disk, repository)
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

    loop = folder / "loop.raw"
    rows = interleaved({"vhdkit": night, "loop": lambda: timed(lambda: plain_loop(disk, places, loop))}, rounds)
    return rows, space


def full(folder: Path, size_bytes: int, rounds: int) -> dict[str, Row]:
    """The first night, and `cp` of the raw file with a flush."""
    disk = Disk.made(folder, size_bytes)
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


def verified(folder: Path, size_bytes: int, rounds: int) -> dict[str, Row]:
    """`verify` of five nights, and reading the data of the same images through SHA-256 on all cores."""
    disk, repository = Disk.made(folder, size_bytes), folder / "repository"
    save(disk, repository)
    for number, kind in enumerate(("random", "clustered") * 2):
        disk.change(disk.places(kind, 300 + number), number)
        save(disk, repository)
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
        disk = Disk.made(place, size, used_bytes(size) // 4)  # what it does not change is copied in every round
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


# -- pieces ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """How large and how often."""

    gib: int
    rounds: int

    @property
    def size_bytes(self) -> int:
        """The size of the disk."""
        return self.gib * GIB

    @property
    def changed_bytes(self) -> int:
        """What changes between two nights."""
        return self.size_bytes // 100

    @property
    def used_bytes(self) -> int:
        """What is on the disk before."""
        return used_bytes(self.size_bytes)


def piece_full(folder: Path, wanted: Wanted) -> Iterator[Measured]:
    """The first night."""
    rows = full(folder, wanted.size_bytes, wanted.rounds)
    yield Measured.of("full night, s", rows["vhdkit"], rows["cp"], GOAL_FULL)


def piece_night(kind: str, folder: Path, wanted: Wanted) -> Iterator[Measured]:
    """Nights after it."""
    rows, space = nights(folder, wanted.size_bytes, kind, wanted.rounds)
    yield Measured.of(f"{kind} night, s", rows["vhdkit"], rows["loop"], GOAL_TIME)
    yield Measured.of(f"{kind} night, bytes per changed byte", space, None, GOAL_SPACE[kind])


def piece_verify(folder: Path, wanted: Wanted) -> Iterator[Measured]:
    """Verifying them."""
    rows = verified(folder, wanted.size_bytes, wanted.rounds)
    yield Measured.of("verify, s", rows["vhdkit"], rows["hash"], GOAL_VERIFY)


def piece_prune(folder: Path, wanted: Wanted) -> Iterator[Measured]:
    """Dropping nights."""
    large, small = pruned(folder, wanted.gib, wanted.rounds).values()
    dropped = PRUNED_NIGHTS - KEPT_NIGHTS
    yield Measured.of(f"prune of {dropped} nights, {large.name}, s", large, small, GOAL_PRUNE)


def piece_live(kind: str, folder: Path, wanted: Wanted) -> Iterator[Measured]:
    """A disk that is written to meanwhile."""
    places = partial(Disk(folder, wanted.size_bytes, 0, folder, folder).places, kind)
    with served(folder / kind, wanted.size_bytes) as disk:
        beside, alone, memory = pauses(disk, places, wanted.rounds)
    yield Measured.of(f"{kind} night, slowest write of a guest, ms", beside, None, GOAL_PAUSE_MS)
    yield Measured.of(f"{kind} night, the same without a backup, ms", alone)
    yield Measured.of(f"{kind} night, peak memory, MiB", memory)


def piece_restore(folder: Path, wanted: Wanted) -> Iterator[Measured]:
    """A machine that runs while it is restored."""
    small, large = instant(folder, [wanted.gib, wanted.gib * RESTORE_FACTOR], wanted.rounds)
    yield Measured.of(f"restore --now to a guest that runs, {small.name}, s", small, None, GOAL_RESTORE)
    yield Measured.of(f"restore --now to a guest that runs, {large.name}, s", large, None, GOAL_RESTORE)


@dataclass(frozen=True, slots=True)
class Piece:
    """What is measured in a fresh folder, and how much space that needs."""

    measure: Callable[[Path, Wanted], Iterator[Measured]]
    space_bytes: Callable[[Wanted], int]


def _space_of_nights(wanted: Wanted) -> int:
    return 3 * wanted.used_bytes + (max(wanted.rounds, 3) + 2) * 4 * wanted.changed_bytes


PIECES = {
    "full": Piece(piece_full, lambda wanted: 4 * wanted.used_bytes),
    "random": Piece(partial(piece_night, "random"), _space_of_nights),
    "clustered": Piece(partial(piece_night, "clustered"), _space_of_nights),
    "verify": Piece(piece_verify, lambda wanted: 3 * wanted.used_bytes + 20 * wanted.changed_bytes),
    "prune": Piece(piece_prune, lambda wanted: 2 * wanted.used_bytes + PRUNED_NIGHTS * 4 * wanted.changed_bytes),
    "live-random": Piece(partial(piece_live, "random"), _space_of_nights),
    "live-clustered": Piece(partial(piece_live, "clustered"), _space_of_nights),
    "restore": Piece(piece_restore, lambda wanted: 4 * 2 * RESTORE_FACTOR * wanted.used_bytes),
}
PEERS = {"peers-random": "random", "peers-clustered": "clustered"}
PEER_PROGRAMS = (OURS, "borg", "restic")


def space_of_peers(wanted: Wanted) -> int:
    """What the nights of the peers need at most: random ones may store all that is used once more."""
    return 3 * wanted.used_bytes + (NIGHTS + 1) * (2 * wanted.used_bytes + 6 * wanted.changed_bytes)


@contextmanager
def place_of_peers(options: argparse.Namespace, name: str) -> Iterator[Path]:
    """Where the nights of the peers are: kept until they are complete, if the user named a folder and a file."""
    if options.dir is None or options.json is None:
        with workplace(options.dir) as folder:
            yield folder / name
    else:
        yield options.dir / f"vhdkit-bench-{name}"


def run(name: str, pieces: Pieces, wanted: Wanted, options: argparse.Namespace, deadline: float) -> bool:
    """Measure a piece. Returns False if the deadline leaves no time for the rest."""
    begin = time.monotonic()
    if name in PEERS:
        with place_of_peers(options, name) as folder:
            if not folder.exists():
                need_space(options.dir or Path(tempfile.gettempdir()), space_of_peers(wanted) + SPARE_BYTES)
            peers = Peers(folder, PEERS[name], wanted.size_bytes, PEER_PROGRAMS)
            lines = peers.go_on(lambda seconds: time.monotonic() + seconds < deadline)
            if lines is None:
                return False
            pieces.add(name, lines, time.monotonic() - begin)
            shutil.rmtree(folder)
    else:
        with workplace(options.dir) as folder:
            need_space(folder, PIECES[name].space_bytes(wanted) + SPARE_BYTES)
            lines = list(PIECES[name].measure(folder, wanted))
        pieces.add(name, lines, time.monotonic() - begin)
    print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return True


def chosen(options: argparse.Namespace) -> list[str]:
    """The pieces that were asked for."""
    known = [*PIECES, *PEERS]
    names = options.only.split(",") if options.only else [name for name in known if options.peers or name in PIECES]
    if unknown := set(names) - set(known):
        raise SystemExit(f"--only: unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    missing = [name for name in PEER_PROGRAMS if name != OURS and not has(name)]
    if missing and set(names) & set(PEERS):
        print(f"not installed, so not measured: {', '.join(missing)}", file=sys.stderr)
    return names


def main() -> None:
    """Run it."""
    parser = arguments(__doc__ or "", rounds=3)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gib", type=int, default=16, help="size of the disk, in GiB")
    parser.add_argument("--peers", action="store_true", help="also borg and restic")
    parser.add_argument("--only", metavar="PIECES", help=f"with commas between them: {', '.join([*PIECES, *PEERS])}")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="N",
                        help="begin nothing after so many seconds (for peers: nothing that would probably end later)"
                        )  # fmt: skip
    options = parser.parse_args()
    wanted = Wanted(options.gib, max(options.rounds, 3))
    settings = {"gib": wanted.gib, "rounds": wanted.rounds}
    pieces = Pieces.of(options.json, f"backup: 1 % of {wanted.gib} GiB changed", settings)
    deadline = time.monotonic() + options.seconds
    left: list[str] = []
    for name in chosen(options):
        if name in pieces.lines:
            continue
        if time.monotonic() >= deadline or not run(name, pieces, wanted, options, deadline):
            left.append(name)
    pieces.show()
    if left:
        print(f"not measured yet: {', '.join(left)}; run the same line again", file=sys.stderr)


if __name__ == "__main__":
    main()
