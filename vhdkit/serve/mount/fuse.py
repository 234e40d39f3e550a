# SPDX-License-Identifier: Apache-2.0
"""From libfuse's callbacks to a `MountTree`: the only file that knows mfusepy and libfuse.

Decides what the kernel may cache and how many threads serve. Must not know disks, or what a mount contains.

mfusepy provides libfuse's structures in all their versions. Its own callbacks copy every byte once more and wrap each
call, so ours replace them: they read from the image directly into libfuse's buffer and write directly from the
request. The throughput is then limited by the kernel, not by Python.

    kernel -> libfuse thread -> callback(addresses) -> Handle.read_into(memoryview of libfuse's buffer) -> kernel

What cannot change while mounted is cached permanently. A file opened for writing bypasses the kernel's cache: two
files may show the same bytes (disk.raw and a partition), so a write through one must be visible in the other; and
no dirty pages may exist that only this process could write back, except those of a program that maps such a file
shared and writable, where library and kernel allow it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable
from typing import Any

from vhdkit.errors import NotFound, VhdkitError
from vhdkit.serve.mount.tree import MountTree
from vhdkit.serve.mount.view import Handle
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE, covering_sectors, round_up

log = logging.getLogger(__name__)

THREADS = 4  # a read that waits for a device does not block the others; more threads only contend
FOREVER_SECONDS = 86400.0  # names and attributes that cannot change
_LIBRARIES = ("libfuse3.so.3", "libfuse3.so.4")
_MAX_THREADS_SINCE = 12  # libfuse 3.12 has the option
_SPLICE_BITS = sum(1 << bit for bit in (7, 8, 9))  # through a pipe: measured slower than one read into the reply
_DIRECT_MMAP_BIT = 1 << 28  # shared mappings of files that bypass the page cache: libfuse 3.17, Linux 6.6
_TRUNCATE_BIT = 1 << 3  # lets `open` handle O_TRUNC; we switch it off, so that the kernel sends a truncate
_WRITING = os.O_WRONLY | os.O_RDWR
_Address, _Size, _Offset, _Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
_FILLER = ctypes.CFUNCTYPE(_Int, _Address, ctypes.c_char_p, _Address, _Offset, _Int)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "getattr": (_Int, _Address, _Address, _Address),
    "readlink": (_Int, _Address, _Address, _Size),
    "open": (_Int, _Address, _Address),
    "read": (_Int, _Address, _Address, _Size, _Offset, _Address),
    "write": (_Int, _Address, _Address, _Size, _Offset, _Address),
    "flush": (_Int, _Address, _Address),
    "fsync": (_Int, _Address, _Int, _Address),
    "release": (_Int, _Address, _Address),
    "opendir": (_Int, _Address, _Address),
    "releasedir": (_Int, _Address, _Address),
    "readdir": (_Int, _Address, _Address, _FILLER, _Offset, _Address, _Int),
    "statfs": (_Int, _Address, _Address),
    "truncate": (_Int, _Address, _Offset, _Address),
    "fallocate": (_Int, _Address, _Int, _Offset, _Offset, _Address),
    "lseek": (_Offset, _Address, _Offset, _Int, _Address),
    "init": (_Address, _Address, _Address),
}
# Names do not change: requests that would change one fail with EPERM, not ENOSYS.
_REFUSED = ("mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "chmod", "chown", "utimens", "create")


def load() -> Any:
    """mfusepy, using libfuse 3. Raises NotFound, with a hint what to install."""
    if "FUSE_LIBRARY_PATH" not in os.environ:  # by default it prefers libfuse 2 if installed, with its 4 KiB writes
        for name in _LIBRARIES:
            try:
                ctypes.CDLL(name)
            except OSError:
                continue
            os.environ["FUSE_LIBRARY_PATH"] = name
            break
        else:
            raise NotFound("libfuse 3 is not installed", hint="install Debian's packages fuse3 and libfuse3-3")
    try:
        import mfusepy
    except ImportError as error:
        raise NotFound("the Python package mfusepy is not installed", hint="pip install 'vhdkit[fuse]'") from error
    except OSError as error:
        raise NotFound(f"libfuse cannot be used: {error}", path=os.environ["FUSE_LIBRARY_PATH"]) from error
    if mfusepy.fuse_version_major != 3:  # pragma: no cover  (FUSE_LIBRARY_PATH is set)
        raise NotFound("is not libfuse 3", path=os.environ["FUSE_LIBRARY_PATH"], hint="unset FUSE_LIBRARY_PATH")
    return mfusepy


def serve(tree: MountTree, mountpoint: str, options: str, ready: Callable[[], None]) -> int:
    """Mount `tree` and serve it until it is unmounted or a signal ends the process; returns libfuse's exit code.

    `ready` is called when the kernel has answered and the mount can be used. `options`: the argument of -o.
    """
    fuse = load()
    callbacks = Callbacks(fuse, tree, ready)
    if (fuse.fuse_version_major, fuse.fuse_version_minor) >= (3, _MAX_THREADS_SINCE):
        options += f",max_threads={THREADS}"
    words = [os.fsencode(word) for word in ("vhdkit", "-f", "-o", options, mountpoint)]
    argv = (ctypes.c_char_p * len(words))(*words)
    table = callbacks.table
    code: int = fuse.fuse_main_real(len(words), argv, ctypes.pointer(table), ctypes.sizeof(table), None)
    return code


class Callbacks:
    """The callbacks for libfuse, whose arguments are addresses; each returns its result or a negative errno."""

    def __init__(self, fuse: Any, tree: MountTree, ready: Callable[[], None]) -> None:
        self._fuse, self._tree, self._ready = fuse, tree, ready
        self._handles: dict[int, Any] = {}
        self._last_handle = 0
        self._lock = threading.Lock()
        self._handle_place = fuse.fuse_file_info.fh.offset
        self._flags_place = fuse.fuse_file_info.flags.offset
        self._arrays: dict[int, Any] = {}
        self._owner = os.geteuid(), os.getegid()
        self._known_threads: set[int] = set()
        self.table = fuse.fuse_operations()
        self._kept = []  # keeps the callbacks alive while C uses them
        kinds = {field[0]: field[1] for field in fuse.fuse_operations._fields_}
        for name, arguments in _ARGUMENTS.items():
            function = ctypes.CFUNCTYPE(*arguments)(self._guarded(getattr(self, name)))
            self._kept.append(function)
            setattr(self.table, name, ctypes.cast(function, kinds[name]))
        for name in _REFUSED:
            refused = kinds[name](lambda *arguments: -errno.EPERM)
            self._kept.append(refused)
            setattr(self.table, name, refused)

    def _guarded(self, method: Callable[..., int | None]) -> Callable[..., int]:
        """Wrap a callback so that no exception reaches C: each becomes its errno."""

        def called(*arguments: Any) -> int:
            try:
                return method(*arguments) or 0
            except VhdkitError as error:
                log.error("%s", error)
                return -error.errno
            except OSError as error:
                return -(error.errno or errno.EIO)
            except BaseException:
                log.exception("%s failed", method.__name__)
                return -errno.EIO

        return called

    def _keep_thread(self) -> None:
        """Keep this libfuse thread registered with Python, which would otherwise register it again for every call."""
        ident = threading.get_ident()
        if ident not in self._known_threads:
            ctypes.pythonapi.PyGILState_Ensure()
            self._known_threads.add(ident)

    def _keep(self, info: int, handle: object) -> None:
        """Store an open object under a number that libfuse passes back with every call."""
        with self._lock:
            self._last_handle += 1
            self._handles[self._last_handle] = handle
        ctypes.c_uint64.from_address(info + self._handle_place).value = self._last_handle

    def _handle(self, info: int) -> Any:
        return self._handles[ctypes.c_uint64.from_address(info + self._handle_place).value]

    def _memory(self, address: int, size: int) -> memoryview:
        """C's buffer, valid only during the call."""
        kind = self._arrays.get(size)
        if kind is None:
            if size % PAGE_SIZE:  # any size may occur, and each type is kept: 3 KiB each
                return self._memory(address, round_up(size, PAGE_SIZE))[:size]
            kind = self._arrays[size] = ctypes.c_ubyte * size
        return memoryview(kind.from_address(address)).cast("B")

    # -- names and attributes -----------------------------------------------------------------------------------

    def init(self, connection: int, config: int) -> None:
        """Set the connection's options."""
        wanted = self._fuse.fuse_conn_info.from_address(connection)
        wanted.want = wanted.want & ~(_SPLICE_BITS | _TRUNCATE_BIT) | wanted.capable & _DIRECT_MMAP_BIT
        wanted.max_readahead = MIB
        ours = self._fuse.fuse_config.from_address(config)
        ours.nullpath_ok = 1
        ours.entry_timeout = ours.negative_timeout = FOREVER_SECONDS
        ours.attr_timeout = 1.0 if self._tree.is_writable else FOREVER_SECONDS
        self._ready()

    def getattr(self, path: int, buffer: int, info: int) -> None:
        """stat(2)."""
        found = self._tree.attributes(self._tree.find(_text(path)) if path else self._handle(info).node)
        kind = self._fuse.c_stat
        ctypes.memset(buffer, 0, ctypes.sizeof(kind))
        status = kind.from_address(buffer)
        status.st_mode, status.st_nlink, status.st_size = found.mode, found.link_count, found.size_bytes
        status.st_uid, status.st_gid = self._owner
        status.st_blocks, status.st_blksize = covering_sectors(found.allocated_bytes), MIB
        for moment in (status.st_atimespec, status.st_mtimespec, status.st_ctimespec):
            moment.tv_sec, moment.tv_nsec = divmod(found.modified_ns, 10**9)

    def readlink(self, path: int, buffer: int, size: int) -> None:
        """readlink(2)."""
        target = os.fsencode(self._tree.target(_text(path)))[: size - 1] + b"\0"
        ctypes.memmove(buffer, target, len(target))

    def opendir(self, path: int, info: int) -> None:
        """opendir(3)."""
        self._keep(info, self._tree.folder(_text(path)))

    def readdir(self, path: int, buffer: int, fill: Any, offset: int, info: int, flags: int) -> None:
        """readdir(3)."""
        status = self._fuse.c_stat()
        for name, kind in ((".", stat.S_IFDIR), ("..", stat.S_IFDIR), *self._tree.names(self._handle(info))):
            status.st_mode = kind
            fill(buffer, os.fsencode(name), ctypes.addressof(status), 0, 0)

    def statfs(self, path: int, buffer: int) -> None:
        """statfs(2): a full file system of the disk's size."""
        status = self._fuse.c_statvfs.from_address(buffer)
        size = self._tree.size_bytes
        status.f_bsize = status.f_frsize = SECTOR_SIZE if size % PAGE_SIZE else PAGE_SIZE
        status.f_blocks = size // status.f_frsize
        status.f_files, status.f_namemax = self._tree.count(), 255

    def truncate(self, path: int, size: int, info: int) -> None:
        """Refused unless the size stays the same."""
        if info and not path:
            self._handle(info).truncate(size)
        else:
            self._tree.truncate(_text(path), size)

    # -- open files ---------------------------------------------------------------------------------------------

    def open(self, path: int, info: int) -> None:
        """open(2); also decides what the kernel may cache of the file."""
        fields = self._fuse.fuse_file_info.from_address(info)
        writing = bool(fields.flags & _WRITING)
        handle = self._tree.open(_text(path), write=writing)
        self._keep(info, handle)
        fields.direct_io = writing
        fields.keep_cache = handle.settled

    def read(self, path: int, buffer: int, size: int, offset: int, info: int) -> int:
        """Read directly into libfuse's buffer."""
        self._keep_thread()
        done: int = self._handle(info).read_into(offset, self._memory(buffer, size))
        return done

    def write(self, path: int, buffer: int, size: int, offset: int, info: int) -> int:
        """Write directly from the request; with O_DSYNC also to the device, which the kernel leaves to us."""
        self._keep_thread()
        handle = self._handle(info)
        done: int = handle.write(offset, self._memory(buffer, size))
        if _Int.from_address(info + self._flags_place).value & os.O_DSYNC:  # a bit that O_SYNC includes
            handle.flush()
        return done

    def fallocate(self, path: int, mode: int, offset: int, size: int, info: int) -> None:
        """Punch a hole or write zeros."""
        self._handle(info).zero(mode, offset, size)

    def lseek(self, path: int, offset: int, whence: int, info: int) -> int:
        """Find the next data or hole."""
        found: int = self._handle(info).seek(offset, whence)
        return found

    def fsync(self, path: int, data_only: int, info: int) -> None:
        """Return when everything written is on the device."""
        handle = self._handle(info)
        if isinstance(handle, Handle):
            handle.flush()

    def flush(self, path: int, info: int) -> None:
        """One descriptor of the file is closed; the result of `close` reports a failed flush."""
        handle = self._handle(info)
        if isinstance(handle, Handle):
            handle.closing()

    def release(self, path: int, info: int) -> None:
        """The last descriptor is closed."""
        with self._lock:
            del self._handles[ctypes.c_uint64.from_address(info + self._handle_place).value]

    releasedir = release


def _text(address: int) -> str:
    return os.fsdecode(ctypes.string_at(address))
