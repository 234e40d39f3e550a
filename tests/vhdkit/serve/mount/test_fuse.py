# SPDX-License-Identifier: Apache-2.0
"""System calls on a real mount, through libfuse and the kernel."""

from __future__ import annotations

import builtins
import ctypes
import errno
import mmap
import os
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.mounting import mounted, require_fuse
from vhdkit.errors import NotFound
from vhdkit.serve.mount import fuse as fuse_mount
from vhdkit.serve.mount.tree import MountTree
from vhdkit.serve.mount.view import LiveSource, View

MIB = 1 << 20
SIZE = 16 * MIB
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, bytearray]:
    """A leaf over a base, both with random runs; and the content."""
    require_fuse()
    rng = random.Random(1)
    content = bytearray(SIZE)
    vhdkit.create_image(tmp_path / "base.vhd", SIZE)
    for name in ("base.vhd", "leaf.avhd"):
        if name == "leaf.avhd":
            vhdkit.create_child(tmp_path / "leaf.avhd", tmp_path / "base.vhd")
            (tmp_path / "old.raw").write_bytes(content)
        with vhdkit.open_disk(tmp_path / name, writable=True) as disk:
            for _ in range(6):
                offset, data = rng.randrange(SIZE - MIB), rng.randbytes(rng.randrange(1, MIB))
                disk.write(offset, data)
                content[offset : offset + len(data)] = data
    return tmp_path / "leaf.avhd", content


def fallocate(fd: int, mode: int, offset: int, size: int) -> int:
    """0, or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(size))
    return 0 if done == 0 else ctypes.get_errno()


def refused(code: int, call: Callable[..., object], *arguments: Any) -> None:
    """The call fails with this errno."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == code, caught.value


def test_a_read_only_mount(chain: tuple[Path, bytearray], tmp_path: Path) -> None:
    """Reads of all sizes and from several threads are correct; every change is refused."""
    image, content = chain
    with mounted(image, tmp_path / "mnt") as mnt:
        disk = mnt / "disk.raw"
        assert disk.read_bytes() == content
        assert (mnt / "layers" / "0-leaf.raw").read_bytes() == content
        assert (mnt / "layers" / "1-base.raw").read_bytes() == (tmp_path / "old.raw").read_bytes()
        fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, MIB)
        assert os.preadv(fd, [buffer], 3 * MIB) == MIB and buffer[:] == content[3 * MIB : 4 * MIB]
        os.close(fd)
        wrong: list[int] = []

        def look(seed: int) -> None:
            rng = random.Random(seed)
            with disk.open("rb", buffering=0) as file:
                for _ in range(100):
                    offset, size = rng.randrange(SIZE), rng.randrange(1, 70000)
                    if os.pread(file.fileno(), size, offset) != content[offset : offset + size]:
                        wrong.append(offset)

        threads = [threading.Thread(target=look, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        refused(errno.EROFS, os.open, disk, os.O_RDWR)
        refused(errno.EROFS, os.truncate, disk, 0)
        refused(errno.EROFS, os.unlink, disk)
        refused(errno.EROFS, os.mkdir, mnt / "new")
        refused(errno.ENOENT, os.stat, mnt / "nothing")
        refused(errno.EISDIR, os.open, mnt / "layers", os.O_WRONLY)
        status = os.statvfs(mnt)
        assert status.f_blocks * status.f_frsize == SIZE and status.f_bavail == 0 and status.f_flag & os.ST_RDONLY
        assert os.stat(disk).st_blocks * 512 < SIZE


def test_a_writable_mount(chain: tuple[Path, bytearray], tmp_path: Path) -> None:
    """Writes, holes, zeros and seeks work as on a sparse file of fixed size; afterwards the image has all data."""
    image, content = chain
    with mounted(image, tmp_path / "mnt", "--rw") as mnt:
        disk = mnt / "disk.raw"
        fd = os.open(disk, os.O_RDWR)
        rng = random.Random(2)
        for _ in range(50):
            offset, data = rng.randrange(SIZE - 200000), rng.randbytes(rng.randrange(1, 200000))
            assert os.pwrite(fd, data, offset) == len(data)
            content[offset : offset + len(data)] = data
        assert fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 2 * MIB, MIB) == 0
        assert fallocate(fd, ZERO_RANGE, 5 * MIB + 7, 1000) == 0
        content[2 * MIB : 3 * MIB] = bytes(MIB)
        content[5 * MIB + 7 : 5 * MIB + 1007] = bytes(1000)
        assert fallocate(fd, 0, 0, MIB) == errno.EOPNOTSUPP
        assert fallocate(fd, ZERO_RANGE, SIZE - 10, 20) == errno.ENOSPC
        assert os.pread(fd, SIZE, 0) == content
        assert disk.read_bytes() == content
        start = os.lseek(fd, 2 * MIB, os.SEEK_DATA)
        assert start >= 3 * MIB and not any(content[2 * MIB : start])
        assert os.lseek(fd, 2 * MIB, os.SEEK_HOLE) == 2 * MIB and os.lseek(fd, start, os.SEEK_HOLE) > start
        refused(errno.ENXIO, os.lseek, fd, SIZE, os.SEEK_DATA)
        refused(errno.ENOSPC, os.pwrite, fd, b"x", SIZE)
        assert os.pwrite(fd, b"end!", SIZE - 2) == 2
        content[-2:] = b"en"
        refused(errno.EPERM, os.ftruncate, fd, SIZE // 2)
        refused(errno.EPERM, os.ftruncate, fd, SIZE + 1)
        os.ftruncate(fd, SIZE)
        refused(errno.EPERM, os.open, disk, os.O_WRONLY | os.O_TRUNC)
        os.fsync(fd)
        os.close(fd)
        for call, arguments in (
            (os.unlink, (disk,)), (os.mkdir, (mnt / "new",)), (os.rename, (disk, mnt / "other.raw")),
            (os.symlink, ("x", mnt / "link")), (os.link, (disk, mnt / "link")), (os.chmod, (disk, 0o777)),
            (os.rmdir, (mnt / "layers",)), (os.open, (mnt / "new", os.O_CREAT | os.O_WRONLY)), (os.utime, (disk,)),
        ):  # fmt: skip
            assert callable(call)
            refused(errno.EPERM, call, *arguments)
    with vhdkit.open_disk(image) as read:
        assert read.read(0, SIZE) == content


def test_names_of_one_disk_agree(tmp_path: Path) -> None:
    """A write through a partition is visible in the disk to later readers, and vice versa."""
    require_fuse()
    image = tmp_path / "disk.vhd"
    vhdkit.create_image(image, SIZE)
    table = bytearray(512)
    table[446 + 4], table[510:512] = 0x83, b"\x55\xaa"
    table[446 + 8 : 446 + 16] = (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    with vhdkit.open_disk(image, writable=True) as disk:
        disk.write(0, bytes(table))
    with mounted(image, tmp_path / "mnt", "--rw") as mnt:
        whole, part = mnt / "disk.raw", mnt / "partitions" / "1.raw"
        whole.read_bytes(), part.read_bytes()  # the kernel may have cached all of it
        fd = os.open(part, os.O_WRONLY)
        os.pwrite(fd, b"by the partition", 0)
        os.close(fd)
        with whole.open("rb") as file:
            assert os.pread(file.fileno(), 16, MIB) == b"by the partition"
        fd = os.open(whole, os.O_WRONLY)
        os.pwrite(fd, b"by the disk", MIB + 4096)
        os.close(fd)
        with part.open("rb") as file:
            assert os.pread(file.fileno(), 11, 4096) == b"by the disk"


class Opened:
    """A file of a writable disk as libfuse sees it, without a mount."""

    def __init__(self, disk: vhdkit.Disk, flags: int) -> None:
        fuse = fuse_mount.load()
        tree = MountTree(View(LiveSource(disk, 1), SIZE, writable=True), 1, disk)
        self.calls = fuse_mount.Callbacks(fuse, tree, lambda: None)
        self.info = fuse.fuse_file_info()
        self.info.flags = flags
        self.at = ctypes.addressof(self.info)
        path = ctypes.create_string_buffer(b"/")
        self.calls.open(ctypes.addressof(path), self.at)


def test_writes_with_o_sync_are_on_the_device(chain: tuple[Path, bytearray], monkeypatch: pytest.MonkeyPatch) -> None:
    """With O_SYNC and O_DSYNC the kernel flags each write, and sends no separate fsync."""
    flushes: list[int] = []
    data = ctypes.create_string_buffer(b"x" * 512)
    with vhdkit.open_disk(chain[0], writable=True) as disk, monkeypatch.context() as patch:
        patch.setattr(disk, "flush", lambda: flushes.append(1))
        for flags, expected in ((0, 0), (os.O_DSYNC, 1), (os.O_SYNC, 2)):
            file = Opened(disk, os.O_RDWR | flags)
            assert file.calls.write(0, ctypes.addressof(data), 512, 0, file.at) == 512
            assert len(flushes) == expected


@pytest.mark.parametrize("offered", [True, False])
def test_shared_mappings_are_requested_where_supported(chain: tuple[Path, bytearray], offered: bool) -> None:
    """A kernel that can map files opened for direct I/O is asked to; another one is not."""
    fuse = fuse_mount.load()
    with vhdkit.open_disk(chain[0], writable=True) as disk:
        connection, config = fuse.fuse_conn_info(), fuse.fuse_config()
        connection.capable = (1 << 28 if offered else 0) | 1 << 3 | 1
        connection.want = 1 << 3 | 1
        Opened(disk, os.O_RDWR).calls.init(ctypes.addressof(connection), ctypes.addressof(config))
    assert connection.want == (1 << 28 if offered else 0) | 1


def test_a_shared_writable_mapping(chain: tuple[Path, bytearray], tmp_path: Path) -> None:
    """With libfuse 3.17 and Linux 6.6 writes through a mapping are in the image after msync and the last close;
    otherwise mapping is refused as unsupported. Private mappings always work."""
    image, content = chain
    fuse = fuse_mount.load()
    version = fuse.fuse_version_major, fuse.fuse_version_minor
    kernel = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    with mounted(image, tmp_path / "mnt", "--rw") as mnt:
        fd = os.open(mnt / "disk.raw", os.O_RDWR)
        private = mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE)
        assert private[:] == content
        private.close()
        if version < (3, 17) or kernel < (6, 6):
            refused(errno.ENODEV, mmap.mmap, fd, SIZE)
            os.close(fd)
            return
        mapped = mmap.mmap(fd, SIZE)
        mapped[5 * MIB : 5 * MIB + 6] = content[5 * MIB : 5 * MIB + 6] = b"synced"
        mapped.flush()
        assert os.pread(fd, 6, 5 * MIB) == b"synced"
        mapped[7 * MIB : 7 * MIB + 6] = content[7 * MIB : 7 * MIB + 6] = b"closed"
        mapped.close()
        os.close(fd)
        assert (mnt / "disk.raw").read_bytes() == content
    with vhdkit.open_disk(image) as disk:
        assert disk.read(0, SIZE) == content


def test_any_size_of_request_costs_no_memory(chain: tuple[Path, bytearray]) -> None:
    """A file opened for writing is read in pieces of any size: the memory kept for each size must be bounded."""
    place = ctypes.create_string_buffer(64 * 1024)
    with vhdkit.open_disk(chain[0], writable=True) as disk:
        file = Opened(disk, os.O_RDWR)
        before = len(ctypes.Array.__subclasses__())
        for size in range(1, 3000):
            assert file.calls.read(0, ctypes.addressof(place), size, 4096, file.at) == size
            assert place.raw[:size] == chain[1][4096 : 4096 + size]
        assert len(ctypes.Array.__subclasses__()) - before < 10  # types from ctypes


def test_missing_libfuse_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install, instead of a bare ImportError."""
    monkeypatch.delenv("FUSE_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(fuse_mount, "_LIBRARIES", ("libfuse3.so.nowhere",))
    with pytest.raises(NotFound, match="libfuse 3 is not installed; install"):
        fuse_mount.load()


def test_missing_mfusepy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the package's extra that provides it."""
    require_fuse()
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "mfusepy":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NotFound, match=r"pip install 'vhdkit\[fuse\]'"):
        fuse_mount.load()
