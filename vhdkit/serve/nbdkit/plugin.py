# SPDX-License-Identifier: Apache-2.0
"""The plugin for nbdkit: the same disks behind nbdkit's protocol, filters and TLS.

    nbdkit python .../vhdkit/serve/nbdkit/plugin.py image=leaf.avhd [KEY=VALUE...]

    image=PATH                  what is served; repeatable, the first is the default export
    name=NAME                   the name of the export of the next image= (without it: the empty name)
    description=TEXT            what clients receive for the next image=, instead of its kind, size and file name
    access=read|write           open for this at the start; `read` never writes. Without it, a disk is opened for
                                reading at the start, and for writing while there is a client that may write (not with
                                nbdkit's -r, nor behind its cow filter); if another program has it open, that
                                client may only read
    parent-dir=DIR, allow-raw-parent=BOOL, dynamic-bitmap=spec|ignore, format=raw|vhd,
    cache=writeback|none    as on the command line

Decides how nbdkit's callbacks become calls of a `Disk`. nbdkit runs this file in its embedded Python and looks for the
functions below by name; `open` is one of them. Must not know sockets or NBD's wire format.

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
from vhdkit.chain.names.options import OpenOptions
from vhdkit.disk import Disk, open_disk
from vhdkit.formats.probe import FormatName
from vhdkit.serve.nbd.export import MAX_CACHE_BYTES, PIECE_BYTES, Export, check_text
from vhdkit.serve.nbd.slices import ALLOCATION
from vhdkit.serve.nbd.wire import wire_errno
from vhdkit.serve.opening import described
from vhdkit.uncached import CacheMode
from vhdkit.units import MIB, PAGE_SIZE

API_VERSION = 2
MAX_REQUEST_BYTES = 64 * MIB  # the largest request that nbdkit accepts
_FULL_TRACEBACK = 1000  # entries: Python's default
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

P = ParamSpec("P")
T = TypeVar("T")


class _Settings:
    """The settings from nbdkit's command line."""

    def __init__(self) -> None:
        self.images: dict[str, str] = {}  # by export name, in order
        self.descriptions: dict[str, str] = {}  # of the exports that have one
        self.next_name: str | None = None
        self.next_description: str | None = None
        self.access: str | None = None
        self.parent_dirs: list[str] = []
        self.allow_raw_parent = False
        self.ignore_bitmaps = False
        self.format_name: FormatName | None = None
        self.cache = CacheMode.WRITEBACK

    def open(self, path: str, *, writable: bool) -> Disk:
        """Open one of the images."""
        options = OpenOptions(
            parent_dirs=tuple(self.parent_dirs),
            allow_raw_parent=self.allow_raw_parent,
            ignore_bitmaps=self.ignore_bitmaps,
            format_name=self.format_name,
            cache=self.cache,
        )
        return open_disk(path, writable=writable, options=options)


_settings = _Settings()
_exports: dict[str, Export] = {}
_clients: dict[str, int] = {}  # number of clients of each export
_opening = threading.Lock()


def _reported(callback: Callable[P, T]) -> Callable[P, T]:
    """Wrap a callback so that its errors reach the client with the right number, and the log as one line."""

    @functools.wraps(callback)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return callback(*args, **kwargs)
        except errors.VhdkitError as error:
            nbdkit.set_error(int(wire_errno(error.errno)))
            sys.tracebacklimit = 0  # nbdkit prints exceptions the way Python does
            raise error from None
        except Exception:
            sys.tracebacklimit = _FULL_TRACEBACK  # unexpected: show where it came from
            raise

    return called


# -- the command line -------------------------------------------------------------------------------------------


@_reported
def config(key: str, value: str) -> None:
    """Handle one KEY=VALUE. Raises InvalidArgument for an unknown key."""
    # Paths are made absolute now: nbdkit changes its working folder when it goes to the background.
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
    elif key == "cache":
        _settings.cache = CacheMode(_one_of(key, value, *(one.value for one in CacheMode)))
    else:
        known = "image, name, description, access, parent-dir, allow-raw-parent, dynamic-bitmap, format and cache"
        raise errors.InvalidArgument(f"{key}= is not a known parameter; there are {known}")


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
    """Raise InvalidArgument if an earlier value for `key` still waits for its image=PATH."""
    if waiting is not None:
        raise errors.InvalidArgument(f"{key}={errors.printable(waiting)} has no image=PATH after it")


def _one_of(key: str, value: str, *known: str) -> str:
    if value not in known:
        raise errors.InvalidArgument(f"{key}={value} is not one of {', '.join(known)}")
    return value


@_reported
def config_complete() -> None:
    """Check that there is an image to serve, and one for each name and description."""
    _check_order("name", _settings.next_name)
    _check_order("description", _settings.next_description)
    if not _settings.images:
        raise errors.InvalidArgument("nothing to serve: add image=PATH")


def thread_model() -> int:
    """Fully parallel: reads need no lock, and the disk locks among writers, so slow requests do not block others."""
    model: int = nbdkit.THREAD_MODEL_PARALLEL
    return model


@_reported
def get_ready() -> None:
    """Check that everything can be opened, while errors still reach the terminal."""
    for path in _settings.images.values():
        _settings.open(path, writable=_settings.access == "write").close()


@_reported
def after_fork() -> None:
    """Open everything. Not earlier: the process from which nbdkit forked would then also hold the locks."""
    for name, path in _settings.images.items():
        disk = _settings.open(path, writable=_settings.access == "write")
        _exports[name] = Export(name, disk, description=_settings.descriptions.get(name, described(disk)))
        _clients[name] = 0


@_reported
def cleanup() -> None:
    """nbdkit is ending: flush and close all disks. Raises the first error."""
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
    """(name, description) of each export."""
    return [(export.name, export.description) for export in _exports.values()]


def default_export(readonly: bool, is_tls: bool) -> str:
    """The export that the empty name stands for."""
    return next(iter(_exports))


@_reported
def open(readonly: bool) -> Export:
    """A client connected; returns the requested export as its handle. Raises NotFound for an unknown name."""
    name = nbdkit.export_name() or default_export(readonly, False)
    export = _exports.get(name)
    if export is None:
        raise errors.NotFound(f"no export is named {errors.printable(name)!r}")
    with _opening:
        wants_to_write = not readonly and _settings.access is None and not export.disk.writable
        if wants_to_write and not _clients[name]:  # while another client has it read-only, this one is read-only too
            _reopen_writable(export)
        _clients[name] += 1
    return export


def _reopen_writable(export: Export) -> None:
    """Open it for writing, or for reading if another program has it open: most clients only read."""
    path = _settings.images[export.name]
    export.disk.close()
    try:
        export.disk = _settings.open(path, writable=True)
    except errors.VhdkitError as error:
        export.disk = _settings.open(path, writable=False)  # clients that only read can still be served
        if not isinstance(error, errors.ImageInUse) or isinstance(error, errors.HasChildren):
            raise
        nbdkit.debug(f"the export is read-only for now: {error}")


@_reported
def close(export: Export) -> None:
    """A client disconnected. The disk stays open, but without a client it allows other programs to write."""
    with _opening:
        _clients[export.name] -= 1
        if not _clients[export.name] and _settings.access is None and export.disk.writable:
            export.disk.flush()  # if it fails, the error is reported now and at the end, and the disk stays as it is
            export.disk.close()
            export.disk = _settings.open(_settings.images[export.name], writable=False)


def export_description(export: Export) -> str:
    """A text for display."""
    return export.description


def get_size(export: Export) -> int:
    """The size in bytes."""
    return export.disk.size_bytes


def block_size(export: Export) -> tuple[int, int, int]:
    """The minimum, preferred and maximum request size in bytes."""
    return export.least_request_bytes, PAGE_SIZE, MAX_REQUEST_BYTES  # advice: any byte range is served


def can_write(export: Export) -> bool:
    """False if the disk was opened for reading."""
    return export.disk.writable


def can_multi_conn(export: Export) -> bool:
    """True: all connections share one disk."""
    return True


def is_rotational(export: Export) -> bool:
    """False: ordering requests by offset gains nothing."""
    return False


def can_flush(export: Export) -> bool:
    """True."""
    return True


def can_fua(export: Export) -> int:
    """Native: `Disk` implements it."""
    native: int = nbdkit.FUA_NATIVE
    return native


def can_trim(export: Export) -> bool:
    """True if the disk is writable."""
    return export.disk.writable


def can_zero(export: Export) -> bool:
    """True if the disk is writable."""
    return export.disk.writable


def can_fast_zero(export: Export) -> bool:
    """True if the disk is writable: a request fails at once if zeros are not fast."""
    return export.disk.writable


def can_cache(export: Export) -> int:
    """Native: `cache` reads the range."""
    native: int = nbdkit.CACHE_NATIVE
    return native


def can_extents(export: Export) -> bool:
    """True."""
    return True


# -- requests, several at once ----------------------------------------------------------------------------------


@_reported
def pread(export: Export, buf: memoryview, offset: int, flags: int) -> None:
    """Read from the file directly into nbdkit's buffer."""
    export.disk.read_into(offset, buf)


@_reported
def pwrite(export: Export, buf: memoryview, offset: int, flags: int) -> None:
    """Write from nbdkit's buffer directly to the file."""
    export.disk.write(offset, buf, fua=bool(flags & nbdkit.FLAG_FUA))


@_reported
def flush(export: Export, flags: int) -> None:
    """Make durable the completed writes of all connections."""
    export.disk.flush()


@_reported
def trim(export: Export, count: int, offset: int, flags: int) -> None:
    """Discard a range."""
    export.disk.trim(offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


@_reported
def zero(export: Export, count: int, offset: int, flags: int) -> None:
    """Make the range read as zeros. Zeros that must take space are data: nbdkit then writes them itself."""
    if not flags & nbdkit.FLAG_MAY_TRIM or (flags & nbdkit.FLAG_FAST_ZERO and not export.disk.zeroes_are_fast()):
        nbdkit.set_error(errno.EOPNOTSUPP)
        raise OSError(errno.EOPNOTSUPP, "writing zeros here would not be faster than data")
    export.disk.write_zeroes(offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


@_reported
def cache(export: Export, count: int, offset: int, flags: int) -> None:
    """Read a range into the page cache."""
    scratch = memoryview(bytearray(min(count, PIECE_BYTES)))
    end = offset + min(count, MAX_CACHE_BYTES)
    while offset < end:
        size = min(end - offset, len(scratch))
        export.disk.read_into(offset, scratch[:size])
        offset += size


@_reported
def extents(export: Export, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """(offset, size, kind) of the range: the kinds are NBD's flags of base:allocation, which nbdkit shares."""
    limit = 1 if flags & nbdkit.FLAG_REQ_ONE else None
    result = []
    for size, kind in export.status_runs(ALLOCATION, offset, count, extended=True, limit=limit):
        result.append((offset, size, kind))
        offset += size
    return result
