# SPDX-License-Identifier: Apache-2.0
"""A file system in FUSE that shows a folder, and does not answer while its process is stopped, as a hung file server.

    python -m tests.vmm.hanging_folder FOLDER MOUNTPOINT

As with a file server, a process that waits for it can be killed: the kernel gives a request up that was not read yet.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.waiting import wait_until

_FACTS = ("st_gid", "st_mode", "st_nlink", "st_size", "st_uid", "st_ino", "st_blocks")
_TIMES = ("st_atime", "st_ctime", "st_mtime")


class Hanging:
    """The calls of the file system: those of the folder behind it."""

    use_ns = True

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def _at(self, path: str) -> str:
        return self._folder + path

    def getattr(self, path: str, handle: int | None = None) -> dict[str, Any]:
        facts = os.lstat(self._at(path))
        times = {name: getattr(facts, f"{name}_ns") for name in _TIMES}
        return {name: getattr(facts, name) for name in _FACTS} | times

    def readdir(self, path: str, handle: int) -> list[str]:
        return [".", "..", *os.listdir(self._at(path))]

    def open(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags & ~(os.O_APPEND | os.O_NOFOLLOW))

    def create(self, path: str, mode: int, info: object = None) -> int:
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path: str, size: int, offset: int, handle: int) -> bytes:
        return os.pread(handle, size, offset)

    def write(self, path: str, data: bytes, offset: int, handle: int) -> int:
        return os.pwrite(handle, data, offset)

    def truncate(self, path: str, length: int, handle: int | None = None) -> None:
        os.truncate(self._at(path), length)

    def release(self, path: str, handle: int) -> None:
        os.close(handle)

    def flush(self, path: str, handle: int) -> None: ...

    def fsync(self, path: str, only_data: bool, handle: int) -> None:
        os.fsync(handle)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._at(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        os.rename(self._at(old), self._at(new))

    def link(self, new: str, old: str) -> None:
        os.link(self._at(old), self._at(new))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def utimens(self, path: str, times: tuple[int, int]) -> None:
        os.utime(self._at(path), ns=times)

    def statfs(self, path: str) -> dict[str, int]:
        facts = os.statvfs(self._at(path))
        return {name: getattr(facts, name) for name in ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize")}


@contextlib.contextmanager
def hanging_folder(folder: Path) -> Iterator[tuple[Path, int]]:
    """Such a mount inside `folder`, and its process, while the block runs."""
    behind, mount = folder / "behind", folder / "mount"
    behind.mkdir()
    mount.mkdir()
    process = subprocess.Popen([sys.executable, "-m", "tests.vmm.hanging_folder", str(behind), str(mount)], cwd=ROOT)
    try:
        wait_until(lambda: os.path.ismount(mount), "it is mounted")
        yield mount, process.pid
    finally:
        process.send_signal(signal.SIGCONT)
        subprocess.run(["fusermount3", "-u", "-z", mount], check=False)
        process.wait(20)


if __name__ == "__main__":
    fuse = importlib.import_module("mfusepy")
    calls = type("Calls", (Hanging, fuse.Operations), {})(sys.argv[1])
    fuse.FUSE(calls, sys.argv[2], foreground=True, nothreads=True)
