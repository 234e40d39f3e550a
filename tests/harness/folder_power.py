# SPDX-License-Identifier: Apache-2.0
"""Power cuts of whole folders: which files and names a cut inside a verb could leave, on real files.

`CrashStore` cuts the power inside one image. Here a whole verb runs on real files, and at every call that makes
something durable or changes a name (fsync, fdatasync, link, unlink, rename) the folders that a cut right there could
leave are recorded:

    killed   every byte and every name so far: what kill -9 leaves
    strict   of each file what was last synced, and of each folder the names that were last synced
    names    the names so far, and of each file what was last synced
    data     every byte so far, the names that were last synced
    torn     of each page of each file one of the two, and of the names as well, chosen by the seed

`cut_in_process` lets one of them happen: the folder then is what the cut left, so that life can go on from there.

What is assumed of a file system is POSIX and no more: a file's bytes are sure once it was synced, a name once its
folder was. A rename replaces a name at once. Identifiers and times come from the seed: a run can be repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import stat
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from vhdkit.units import PAGE_SIZE

KINDS = ("killed", "strict", "names", "data", "torn")
_NAME_CALLS = ("link", "unlink", "rename", "replace", "remove", "symlink")
_START_TIME = 1_700_000_000
_CUT, _FAILED = 42, 43  # exit codes

Files = Mapping[str, bytes]  # by the path inside the folder


@dataclass(frozen=True, slots=True)
class Cut:
    """A folder that a power cut may leave: at which boundary of the verb, and of which kind."""

    boundary: int
    kind: str
    files: Files

    @property
    def key(self) -> str:
        """Equal for folders with the same content."""
        return key_of(self.files)


_PACKED_BYTES = 1 << 20  # larger contents are kept packed: hundreds of folders with whole disks are kept


class Packed(Mapping[str, bytes]):
    """Files of which the large ones are kept packed; images are mostly zeros."""

    def __init__(self, files: Files) -> None:
        self._files = {
            path: content if len(content) <= _PACKED_BYTES else zlib.compress(content, 1)
            for path, content in files.items()
        }
        self._packed = {path for path, content in files.items() if len(content) > _PACKED_BYTES}

    def __getitem__(self, path: str) -> bytes:
        """The content of a file."""
        content = self._files[path]
        return zlib.decompress(content) if path in self._packed else content

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


_KEPT_BYTES = 64 << 20  # of contents whose hash is cached: with more, each fork of the process takes long
_hashes: dict[int, tuple[bytes, str]] = {}


def _hash(content: bytes) -> str:
    known = _hashes.get(id(content))
    if known is None or known[0] is not content:
        if sum(len(kept) for kept, _ in _hashes.values()) + len(content) > _KEPT_BYTES:
            _hashes.clear()
        known = _hashes[id(content)] = content, hashlib.blake2b(content, digest_size=16).hexdigest()
    return known[1]


def key_of(files: Files) -> str:
    """A key for the content of a folder."""
    lines = "\n".join(f"{path} {_hash(content)}" for path, content in sorted(files.items()))
    return hashlib.blake2b(lines.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def fill(folder: Path, files: Files, folders: tuple[str, ...] = ()) -> None:
    """Make `folder` hold exactly these files, and these folders even if they are empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in folders:
        (folder / name).mkdir(exist_ok=True)
    for path, content in files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.pwrite(descriptor, content, 0)
        finally:
            os.close(descriptor)


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of a folder."""
    return {path: place.read_bytes() for path, place in _regular_files(folder)}


def _regular_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for here, _, names in os.walk(folder):
        for name in names:
            place = Path(here, name)
            if stat.S_ISREG(place.lstat().st_mode):
                yield os.path.relpath(place, folder), place


@contextlib.contextmanager
def repeatable(seed: object) -> Iterator[None]:
    """During the block identifiers, names of parts and times come from the seed."""
    rng = random.Random(str(seed))
    start = _START_TIME + rng.randrange(1 << 20)
    with (
        mock.patch.object(os, "urandom", rng.randbytes),
        mock.patch.object(random, "_urandom", rng.randbytes),
        mock.patch.object(time, "time", lambda: float(start)),
    ):
        yield


@dataclass
class FolderPower:
    """Runs verbs in `folder` and records the folders that a power cut inside one could leave.

    With `judge` each cut is given to it at once, and none is kept: for files that are too large for that. It works on
    another folder. With `every` n only each n-th boundary is examined.
    """

    folder: Path
    seed: str
    judge: Callable[[Cut], None] | None = None
    every: int = 1
    cuts: list[Cut] = field(default_factory=list)
    boundaries: int = 0
    _held: dict[int, int] = field(default_factory=dict)  # inode -> descriptor: no number is used twice in a run
    _bytes: dict[int, bytes] = field(default_factory=dict)  # by inode, as last synced
    _names: dict[str, dict[str, int]] = field(default_factory=dict)  # by folder, as last synced
    _seen: set[str] = field(default_factory=set)
    _before: dict[str, Callable[..., Any]] = field(default_factory=dict)  # what `os` has outside a run

    def run(self, work: Callable[[], object]) -> None:
        """Run `work`; its exception is raised, and the cuts before that are recorded all the same."""
        names, content = self._look()
        self._names, self._bytes = names, dict(content)
        self._seen.add(key_of(_joined(names, content)))  # nothing has happened yet
        self._before = {name: getattr(os, name) for name in (*_NAME_CALLS, "fsync", "fdatasync")}
        try:
            self._watch()
            work()
        finally:
            self._unwatch()
            self._boundary()
            for descriptor in self._held.values():
                os.close(descriptor)
            self._held.clear()

    def _watch(self) -> None:
        for name in _NAME_CALLS:
            setattr(os, name, self._changing(self._before[name]))
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._syncing)

    def _unwatch(self) -> None:
        for name, call in self._before.items():
            setattr(os, name, call)

    def _found(self, cut: Cut) -> None:
        """Keep the cut, or have it judged."""
        if self.judge is None:
            self.cuts.append(Cut(cut.boundary, cut.kind, Packed(cut.files)))
            return
        is_watching = os.fsync != self._before["fsync"]
        self._unwatch()
        try:
            self.judge(cut)
        finally:
            if is_watching:
                self._watch()

    def _changing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def changing(*args: Any, **options: Any) -> Any:
            self._boundary()
            return call(*args, **options)

        return changing

    def _syncing(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self._boundary()
        facts = os.fstat(number)
        if stat.S_ISDIR(facts.st_mode):
            place = os.path.relpath(os.readlink(f"/proc/self/fd/{number}"), self.folder)
            names, _ = self._look()
            self._names[place] = names.get(place, {})
        elif facts.st_nlink:
            self._bytes[facts.st_ino] = _content(number, facts.st_size)
            self._hold(f"/proc/self/fd/{number}", facts.st_ino)

    def _hold(self, path: str, inode: int) -> int:
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._held[inode]

    def _look(self) -> tuple[dict[str, dict[str, int]], dict[int, bytes]]:
        """The current names by folder and bytes by inode."""
        names: dict[str, dict[str, int]] = {".": {}}
        content: dict[int, bytes] = {}
        for here, folders, files in os.walk(self.folder):
            place = os.path.relpath(here, self.folder)
            names.setdefault(place, {})
            folders.sort()
            for name in sorted(files):
                path = os.path.join(here, name)
                facts = os.lstat(path)
                if stat.S_ISREG(facts.st_mode):
                    names[place][name] = facts.st_ino
                    if facts.st_ino not in content:
                        content[facts.st_ino] = _content(self._hold(path, facts.st_ino), facts.st_size)
        return names, content

    def _boundary(self) -> None:
        """Record what a cut here could leave, unless it was recorded before."""
        self.boundaries += 1
        if self.boundaries % self.every:
            return
        names, content = self._look()
        synced = {inode: self._bytes.get(inode, b"") for places in (names, self._names) for inode in _inodes(places)}
        now = {**synced, **content}  # a file without a name keeps what was synced
        rng = random.Random(f"{self.seed} {self.boundaries}")
        torn_names = {
            place: rng.choice((names.get(place, {}), self._names.get(place, {}))) for place in {*names, *self._names}
        }
        torn = {inode: _torn(synced.get(inode, b""), raw, rng) for inode, raw in sorted(now.items())}
        for kind, files in zip(
            KINDS,
            (
                _joined(names, now),
                _joined(self._names, synced),
                _joined(names, synced),
                _joined(self._names, now),
                _joined(torn_names, torn),
            ),
            strict=True,
        ):
            key = key_of(files)
            if key not in self._seen:
                self._seen.add(key)
                self._found(Cut(self.boundaries, kind, files))


def cut_in_process(folder: Path, work: Callable[[], object], *, number: int, seed: str) -> bool:
    """Run `work` in a process of its own, and cut the power at its `number`-th boundary or, if nothing is open there,
    at the next multiple of it. The folder is then as the cut left it. False if `work` came to its end before.

    The kind of cut comes from the seed. A file's time is the one that it had before or at the cut: a file system may
    keep data of which it lost the time. Nothing else may use the folder meanwhile.
    """
    rng, found = random.Random(f"{seed} {number}"), folder.with_name(f"{folder.name}-found")
    kind, before = rng.choice(KINDS), _times(folder)

    def judge(cut: Cut) -> None:
        if cut.kind != kind:
            return
        folders = sorted(os.path.relpath(one, folder) for one in folder.rglob("*") if one.is_dir())
        now = _times(folder)
        fill(found, cut.files, tuple(folders))
        for path in sorted(cut.files):
            if times := [one[path] for one in (before, now) if path in one]:
                os.utime(found / path, ns=(time.time_ns(), rng.choice(times)))
        os._exit(_CUT)

    pid = os.fork()
    if pid == 0:  # no code of the test may continue in the child
        try:
            FolderPower(folder, seed, judge=judge, every=number).run(work)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(_FAILED)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, _CUT), f"the work failed in its process: exit code {status}"
    if status == _CUT:
        shutil.rmtree(folder)
        found.rename(folder)
    return status == _CUT


def _times(folder: Path) -> dict[str, int]:
    return {path: place.stat().st_mtime_ns for path, place in _regular_files(folder)}


def _inodes(names: Mapping[str, Mapping[str, int]]) -> Iterator[int]:
    for place in names.values():
        yield from place.values()


def _joined(names: Mapping[str, Mapping[str, int]], content: Mapping[int, bytes]) -> dict[str, bytes]:
    return {
        os.path.normpath(os.path.join(place, name)): content.get(inode, b"")
        for place, here in names.items()
        for name, inode in here.items()
    }


def _content(descriptor: int, size: int) -> bytes:
    pieces, position = [], 0
    while position < size:
        piece = os.pread(descriptor, size - position, position)
        if not piece:
            break
        pieces.append(piece)
        position += len(piece)
    return b"".join(pieces)


def _torn(old: bytes, new: bytes, rng: random.Random) -> bytes:
    """Pages of one and of the other; as long as one of them."""
    if old == new:
        return old
    size = len(rng.choice((old, new)))
    chance = rng.random()
    pieces = []
    for offset in range(0, size, PAGE_SIZE):
        one, other = old[offset : offset + PAGE_SIZE], new[offset : offset + PAGE_SIZE]
        wanted = min(PAGE_SIZE, size - offset)
        pieces.append((other if one == other or rng.random() < chance else one)[:wanted].ljust(wanted, b"\0"))
    return b"".join(pieces)
