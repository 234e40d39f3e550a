# SPDX-License-Identifier: Apache-2.0
"""The plugin for nbdkit: the same disks behind nbdkit's protocol, filters and TLS.

    nbdkit python .../vhdkit/serve/nbdkit/plugin.py image=leaf.avhd [KEY=VALUE...]

    image=PATH                  what is served; repeatable, the first is the default export
    name=NAME                   the name of the export of the next image= (without it: the empty name)
    description=TEXT            what clients are told about the next image=, instead of its kind, size and file name
    access=read|write           open for this at the start; `read` never writes. Without it, a disk is opened for
                                reading at the start, and for writing while there is a client that may write (not with
                                nbdkit's -r, nor behind its cow filter); if another program has it open, that
                                client may only read
    parent-dir=DIR, allow-raw-parent=BOOL, dynamic-bitmap=spec|ignore, format=raw|vhd    as on the command line

Decides how nbdkit's callbacks become calls of a `Disk`. nbdkit runs this file in its embedded Python: the names below
are those that it looks for, and `open` is one of them. Must not know sockets or NBD's wire format.

All connections to an export share one `Disk`, so a flush on one covers the writes of all.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import nbdkit

from vhdkit import errors
from vhdkit.chain.names.resolve import OpenOptions
from vhdkit.disk import Disk, open_disk
from vhdkit.formats.probe import FormatName
from vhdkit.serve.nbd.export import ALLOCATION, MAX_CACHE_BYTES, PIECE_BYTES, Export, check_text
from vhdkit.serve.nbd.wire import wire_errno
from vhdkit.serve.opening import described
from vhdkit.units import MIB, PAGE_SIZE

API_VERSION = 2
MAX_REQUEST_BYTES = 64 * MIB  # what nbdkit itself takes at most
_FULL_TRACEBACK = 1000  # entries: what Python has when nobody says otherwise
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

P = ParamSpec("P")
T = TypeVar("T")


class _Settings:
    """What the command line of nbdkit said."""

    def __init__(self) -> None:
        self.images: dict[str, str] = {}  # by the name of the export; in order
        self.descriptions: dict[str, str] = {}  # of those that were given one
        self.next_name: str | None = None
        self.next_description: str | None = None
        self.access: str | None = None
        self.parent_dirs: list[str] = []
        self.allow_raw_parent = False
        self.ignore_bitmaps = False
        self.format_name: FormatName | None = None

    def open(self, path: str, *, writable: bool) -> Disk:
        """Open one of the images."""
        options = OpenOptions(
            parent_dirs=tuple(self.parent_dirs),
            allow_raw_parent=self.allow_raw_parent,
            ignore_bitmaps=self.ignore_bitmaps,
            format_name=self.format_name,
        )
        return open_disk(path, writable=writable, options=options)


_settings = _Settings()
_exports: dict[str, Export] = {}
_clients: dict[str, int] = {}  # how many there are of each export
_opening = threading.Lock()


def _told(callback: Callable[P, T]) -> Callable[P, T]:
    """A callback whose errors reach the client under the right number, and people in one line."""

    @functools.wraps(callback)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return callback(*args, **kwargs)
        except errors.VhdkitError as error:
            nbdkit.set_error(int(wire_errno(error.errno)))
            sys.tracebacklimit = 0  # nbdkit prints what Python says of an exception
            raise error from None
        except Exception:
            sys.tracebacklimit = _FULL_TRACEBACK  # not foreseen: show where it came from
            raise

    return called


# -- the command line -------------------------------------------------------------------------------------------


@_told
def config(key: str, value: str) -> None:
    """One KEY=VALUE. Raises InvalidArgument for one that is not known."""
    # Paths are made absolute now: nbdkit changes its folder when it goes to the background.
    if key == "image":
        _add_image(value)
    elif key == "name":
        _check_order("name", _settings.next_name)
        check_text("name", value)
        _settings.next_name = value
    elif key == "description":
        _check_order("description", _settings.next_description)
        check_text("description", value)
        _settings.next_description = value
    elif key == "access":
        _settings.access = _one_of(key, value, "read", "write")
    elif key == "parent-dir":
        _settings.parent_dirs.append(os.path.abspath(value))
    elif key == "allow-raw-parent":
        _settings.allow_raw_parent = _one_of(key, value.lower(), *_YES, *_NO) in _YES
    elif key == "dynamic-bitmap":
        _settings.ignore_bitmaps = _one_of(key, value, "spec", "ignore") == "ignore"
    elif key == "format":
        _settings.format_name = FormatName(_one_of(key, value, *(one.value for one in FormatName)))
    else:
        known = "image, name, description, access, parent-dir, allow-raw-parent, dynamic-bitmap and format"
        raise errors.InvalidArgument(f"{key}= is not known; there are {known}")


def _add_image(path: str) -> None:
    if not path:
        raise errors.InvalidArgument("the name of an image is empty")
    name, _settings.next_name = _settings.next_name or "", None
    description, _settings.next_description = _settings.next_description, None
    if name in _settings.images:
        raise errors.InvalidArgument(f"two exports are called {name!r}", hint="put name=NAME before an image=PATH")
    _settings.images[name] = os.path.abspath(path)
    if description is not None:
        _settings.descriptions[name] = description


def _check_order(key: str, waiting: str | None) -> None:
    """What stands before an image=PATH is about that image. Raises InvalidArgument for a second one before it."""
    if waiting is not None:
        raise errors.InvalidArgument(f"{key}={errors.printable(waiting)} has no image=PATH after it")


def _one_of(key: str, value: str, *known: str) -> str:
    if value not in known:
        raise errors.InvalidArgument(f"{key}={value} is not one of {', '.join(known)}")
    return value


@_told
def config_complete() -> None:
    """There must be something to serve, and an image for each name and description."""
    _check_order("name", _settings.next_name)
    _check_order("description", _settings.next_description)
    if not _settings.images:
        raise errors.InvalidArgument("there is no image to serve: say image=PATH")


def thread_model() -> int:
    """Reads need no lock and the disk has its own for writers: a slow request holds up no other one."""
    model: int = nbdkit.THREAD_MODEL_PARALLEL
    return model


@_told
def get_ready() -> None:
    """Look whether everything can be opened, while errors still reach the terminal."""
    for path in _settings.images.values():
        _settings.open(path, writable=_settings.access == "write").close()


@_told
def after_fork() -> None:
    """Open everything. Not before: the lock on a file would also be held by the process that nbdkit forked from."""
    for name, path in _settings.images.items():
        disk = _settings.open(path, writable=_settings.access == "write")
        _exports[name] = Export(name, disk, description=_settings.descriptions.get(name, described(disk)))
        _clients[name] = 0


@_told
def cleanup() -> None:
    """nbdkit ends: flush and close all disks. Raises the first error of that."""
    failures = []
    for export in _exports.values():
        try:
            export.disk.close()
        except errors.VhdkitError as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


# -- exports ----------------------------------------------------------------------------------------------------


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    """(name, description) of each."""
    return [(export.name, export.description) for export in _exports.values()]


def default_export(readonly: bool, is_tls: bool) -> str:
    """The name that the empty name stands for."""
    return next(iter(_exports))


@_told
def open(readonly: bool) -> Export:
    """A client has come; the handle is the export it asked for. Raises NotFound for a name that is none."""
    name = nbdkit.export_name() or default_export(readonly, False)
    export = _exports.get(name)
    if export is None:
        raise errors.NotFound(f"there is no export {errors.printable(name)!r}")
    with _opening:
        wants_to_write = not readonly and _settings.access is None and not export.disk.writable
        if wants_to_write and not _clients[name]:  # beside a client that only reads, another one only reads too
            _reopen_writable(export)
        _clients[name] += 1
    return export


def _reopen_writable(export: Export) -> None:
    """Open it for writing; for reading where another program has it open: most clients only want to read."""
    path = _settings.images[export.name]
    export.disk.close()
    try:
        export.disk = _settings.open(path, writable=True)
    except errors.VhdkitError as error:
        export.disk = _settings.open(path, writable=False)  # who only reads is still served
        if not isinstance(error, errors.ImageInUse) or isinstance(error, errors.HasChildren):
            raise
        nbdkit.debug(f"the export is read-only for now: {error}")


@_told
def close(export: Export) -> None:
    """A client has gone. The disk stays open for the next one, but what nobody here writes others may open."""
    with _opening:
        _clients[export.name] -= 1
        if not _clients[export.name] and _settings.access is None and export.disk.writable:
            export.disk.flush()  # a failure is told, and told again at the end: then the disk stays as it is
            export.disk.close()
            export.disk = _settings.open(_settings.images[export.name], writable=False)


def export_description(export: Export) -> str:
    """What a client may show of the export."""
    return export.description


def get_size(export: Export) -> int:
    """In bytes."""
    return export.disk.size_bytes


def block_size(export: Export) -> tuple[int, int, int]:
    """The smallest request, the best and the largest, in bytes."""
    return 1, PAGE_SIZE, MAX_REQUEST_BYTES


def can_write(export: Export) -> bool:
    """False for a disk that was opened for reading."""
    return export.disk.writable


def can_multi_conn(export: Export) -> bool:
    """One disk for all connections."""
    return True


def is_rotational(export: Export) -> bool:
    """Order by place gains nothing."""
    return False


def can_flush(export: Export) -> bool:
    """Always."""
    return True


def can_fua(export: Export) -> int:
    """`Disk` does it."""
    native: int = nbdkit.FUA_NATIVE
    return native


def can_trim(export: Export) -> bool:
    """Where writes are possible."""
    return export.disk.writable


def can_zero(export: Export) -> bool:
    """Where writes are possible."""
    return export.disk.writable


def can_fast_zero(export: Export) -> bool:
    """It is said at once when zeros are not fast."""
    return export.disk.writable


def can_cache(export: Export) -> int:
    """By reading."""
    native: int = nbdkit.CACHE_NATIVE
    return native


def can_extents(export: Export) -> bool:
    """Always."""
    return True


# -- requests, several at once ----------------------------------------------------------------------------------


@_told
def pread(export: Export, buf: memoryview, offset: int, flags: int) -> None:
    """From the file straight into nbdkit's buffer."""
    export.disk.read_into(offset, buf)


@_told
def pwrite(export: Export, buf: memoryview, offset: int, flags: int) -> None:
    """From nbdkit's buffer straight into the file."""
    export.disk.write(offset, buf, fua=bool(flags & nbdkit.FLAG_FUA))


@_told
def flush(export: Export, flags: int) -> None:
    """Covers what any connection was told to be written."""
    export.disk.flush()


@_told
def trim(export: Export, count: int, offset: int, flags: int) -> None:
    """The range is no longer needed."""
    export.disk.trim(offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


@_told
def zero(export: Export, count: int, offset: int, flags: int) -> None:
    """The range reads as zeros. Zeros that must take their space are data: nbdkit then writes them itself."""
    if not flags & nbdkit.FLAG_MAY_TRIM or (flags & nbdkit.FLAG_FAST_ZERO and not export.disk.zeroes_are_fast()):
        nbdkit.set_error(errno.EOPNOTSUPP)
        raise OSError(errno.EOPNOTSUPP, "zeros here are not faster than data")
    export.disk.write_zeroes(offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


@_told
def cache(export: Export, count: int, offset: int, flags: int) -> None:
    """Read a range, so that it is in the page cache."""
    scratch = memoryview(bytearray(min(count, PIECE_BYTES)))
    end = offset + min(count, MAX_CACHE_BYTES)
    while offset < end:
        size = min(end - offset, len(scratch))
        export.disk.read_into(offset, scratch[:size])
        offset += size


@_told
def extents(export: Export, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """(offset, size, kind) of the range: the kinds are NBD's flags of base:allocation, as nbdkit's are."""
    limit = 1 if flags & nbdkit.FLAG_REQ_ONE else None
    result = []
    for size, kind in export.status_runs(ALLOCATION, offset, count, extended=True, limit=limit):
        result.append((offset, size, kind))
        offset += size
    return result
