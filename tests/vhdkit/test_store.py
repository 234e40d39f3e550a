# SPDX-License-Identifier: Apache-2.0
"""Files as stores: bytes at offsets, holes, refusals, and the locks that exclude others."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from vhdkit import errors
from vhdkit.descriptor import close_all
from vhdkit.store import FileStore, translate
from vhdkit.units import MIB

PATIENCE = 20  # seconds, for calls that must not hang


def _new(path: Path, raw: bytes = b"") -> FileStore:
    path.write_bytes(raw)
    return FileStore.open(path, writable=True)


def _within_time(call: Callable[[], object]) -> None:
    """Run `call` in a thread: a test that hangs would report nothing."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "the call hangs"


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """As a user to whom permissions apply: root drops to uid 65534 for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_reading_and_writing_at_offsets(tmp_path: Path) -> None:
    """Bytes are read where they were written; a write past the end grows the file with zeros between."""
    with _new(tmp_path / "a", b"0123456789") as store:
        store.pwrite(3, b"abc")
        store.pwrite(20, bytearray(b"xy"))
        store.pwrite(22, memoryview(b"z"))
        assert store.pread(0, 100) == b"012abc6789" + bytes(10) + b"xyz"
        assert (store.size(), store.name, store.writable) == (23, str(tmp_path / "a"), True)
        assert store.is_device is False


def test_reads_past_the_end(tmp_path: Path) -> None:
    """`pread` returns what exists; `pread_into` fills the rest of the buffer with zeros, also over old bytes."""
    with _new(tmp_path / "a", b"0123456789") as store:
        assert store.pread(8, 10) == b"89"
        assert store.pread(10, 10) == store.pread(1 << 40, 10) == b""
        for offset, expected in ((0, b"0123456789" + bytes(6)), (8, b"89" + bytes(14)), (10, bytes(16))):
            buffer = bytearray(b"?" * 16)
            store.pread_into(offset, memoryview(buffer))
            assert buffer == expected
        store.pread_into(0, memoryview(bytearray()))


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may move fewer bytes than requested at a time, which callers never notice."""
    preadv, pwrite, pread = os.preadv, os.pwrite, os.pread
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [memoryview(buffers[0])[:3]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[:3], at))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 3), at))
    with _new(tmp_path / "a") as store:
        store.pwrite(1, b"0123456789")
        assert store.pread(0, 20) == b"\x000123456789"
        buffer = bytearray(b"?" * 14)
        store.pread_into(1, memoryview(buffer))
        assert buffer == b"0123456789" + bytes(4)


@pytest.mark.parametrize("supported", [True, False])
def test_punching_makes_zeros_and_keeps_the_length(
    supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A punched range reads as zeros, also if the file system cannot punch, and past the end."""
    if not supported:
        monkeypatch.setattr("vhdkit.space._fallocate", _refusing(errno.EOPNOTSUPP))
    with _new(tmp_path / "a", b"x" * 3 * MIB) as store:
        store.punch(MIB + 5, MIB)
        store.punch(3 * MIB - 2, 100)
        store.punch(10 * MIB, 100)
        store.punch(0, 0)
        assert store.size() == 3 * MIB
        assert store.pread(0, 3 * MIB) == b"x" * (MIB + 5) + bytes(MIB) + b"x" * (MIB - 7) + bytes(2)
        if supported:
            assert store.allocated_bytes() < 3 * MIB


@pytest.mark.parametrize("supported", [True, False])
def test_reserving_grows_the_file_with_zeros(supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reserved range reads as zeros and has its space, even if it must be written for that."""
    if not supported:
        monkeypatch.setattr("vhdkit.space._fallocate", _refusing(errno.EOPNOTSUPP))
    with _new(tmp_path / "a", b"x") as store:
        store.reserve(1, 2 * MIB)
        store.reserve(9, 0)
        assert store.size() == 2 * MIB + 1
        assert store.pread(0, 3 * MIB) == b"x" + bytes(2 * MIB)
        assert store.allocated_bytes() >= 2 * MIB


def _refusing(code: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, errors.NoSpace), (errno.EDQUOT, errors.NoSpace), (errno.EFBIG, errors.NoSpace),
     (errno.EIO, errors.IoFailed)],
)  # fmt: skip
def test_a_failing_device_gives_typed_errors(
    code: int, kind: type[errors.VhdkitError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever call fails, the error has the path, and the offset if there is one."""
    with _new(tmp_path / "a", b"x" * 4096) as store:
        monkeypatch.setattr("vhdkit.space._fallocate", _refusing(code))
        for name in ("pread", "pwrite", "preadv", "ftruncate"):
            monkeypatch.setattr(os, name, _refusing(code))
        calls: list[Callable[[], Any]] = [
            lambda: store.punch(512, 512),
            lambda: store.reserve(512, 512),
            lambda: store.pread(512, 512),
            lambda: store.pread_into(512, memoryview(bytearray(512))),
            lambda: store.pwrite(512, b"x"),
            lambda: store.truncate(512),
        ]
        for call in calls:
            with pytest.raises(kind) as caught:
                call()
            assert type(caught.value) is kind and caught.value.path == store.name
        assert caught.value.offset_bytes is None
        with pytest.raises(kind) as caught:
            store.pwrite(512, b"x")
        assert caught.value.offset_bytes == 512


def test_a_failing_sync_has_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SyncFailed, whatever the system's code, says that data may be lost."""
    with _new(tmp_path / "a") as store:
        store.sync()
        monkeypatch.setattr(os, "fdatasync", _refusing(errno.ENOSPC))
        with pytest.raises(errors.SyncFailed, match="lost"):
            store.sync()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOENT, errors.NotFound),
        (errno.ENOTDIR, errors.NotFound),
        (errno.EACCES, errors.AccessDenied),
        (errno.EPERM, errors.AccessDenied),
        (errno.EROFS, errors.ReadOnly),
        (errno.EEXIST, errors.AlreadyExists),
        (errno.ELOOP, errors.InvalidArgument),
        (errno.ENAMETOOLONG, errors.InvalidArgument),
        (errno.ENXIO, errors.IoFailed),
    ],
)
def test_errors_of_the_system_are_translated(code: int, kind: type[errors.VhdkitError]) -> None:
    """There is one class for each cause a caller can handle; the message keeps the system's words."""
    error = translate(OSError(code, os.strerror(code)), "x", "open")
    assert type(error) is kind and os.strerror(code) in str(error) and error.path == "x"


def test_data_runs_cover_the_range(tmp_path: Path) -> None:
    """Data and holes alternate without gaps over any range, also past the end; False runs are zeros."""
    with _new(tmp_path / "a") as store:
        store.truncate(4 * MIB)
        store.pwrite(MIB, b"x" * MIB)
        store.pwrite(3 * MIB, b"y")
        runs = list(store.data_runs(0, 8 * MIB))
        assert runs[:2] == [(0, MIB, False), (MIB, MIB, True)]
        assert runs[-1][0] + runs[-1][1] == 8 * MIB and runs[-1][2] is False
        for offset, size in ((0, 8 * MIB), (MIB + 512, 1024), (5 * MIB, 512), (0, 0), (MIB - 512, 1024)):
            position = offset
            for start, length, is_data in store.data_runs(offset, size):
                assert start == position and length > 0
                if not is_data:
                    assert not store.pread(start, min(length, 4 * MIB)).strip(b"\0")
                position += length
            assert position == offset + size


def test_data_runs_without_support_call_everything_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without this information has one run of data."""
    with _new(tmp_path / "a", bytes(8192)) as store:
        monkeypatch.setattr(os, "lseek", _refusing(errno.EINVAL))
        assert list(store.data_runs(512, 4096)) == [(512, 4096, True)]


def test_truncating_cuts_and_extends(tmp_path: Path) -> None:
    """Bytes that were cut off are gone, new ones are zeros."""
    with _new(tmp_path / "a", b"0123") as store:
        store.truncate(2)
        store.truncate(4)
        assert store.pread(0, 9) == b"01\0\0"


def test_closing_twice_is_allowed(tmp_path: Path) -> None:
    """A descriptor that was reused meanwhile is not closed by mistake."""
    store = _new(tmp_path / "a")
    store.close()
    other = os.open(tmp_path / "a", os.O_RDONLY)
    store.close()
    assert stat.S_ISREG(os.fstat(other).st_mode)
    os.close(other)


@pytest.mark.parametrize("writable", [False, True])
def test_files_that_are_not_images_are_refused(writable: bool, tmp_path: Path) -> None:
    """A missing file, a folder, a character device, a zero byte in the name, a file used as a folder."""
    (tmp_path / "file").write_bytes(b"x")
    cases: list[tuple[str, type[errors.VhdkitError], str]] = [
        (str(tmp_path / "none"), errors.NotFound, "No such file"),
        (str(tmp_path / "file" / "x"), errors.NotFound, "Not a directory"),
        (str(tmp_path), errors.InvalidArgument, "is a folder"),
        ("/dev/null", errors.InvalidArgument, "character device"),
        ("a\0b", errors.InvalidArgument, "NUL byte"),
        (str(tmp_path / ("x" * 300)), errors.InvalidArgument, "too long"),
    ]
    for path, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            FileStore.open(path, writable=writable)
        assert caught.value.path == path and str(caught.value).isprintable()


@pytest.mark.parametrize("writable", [False, True])
def test_a_pipe_is_refused_without_waiting(writable: bool, tmp_path: Path) -> None:
    """INV-BOUNDED: opening a named pipe without a writer does not block."""
    path = tmp_path / "pipe.vhd"
    os.mkfifo(path)
    caught: list[errors.VhdkitError] = []

    def call() -> None:
        try:
            FileStore.open(path, writable=writable)
        except errors.VhdkitError as error:
            caught.append(error)

    _within_time(call)
    assert [type(one) for one in caught] == [errors.InvalidArgument]


def test_links_are_followed_unless_forbidden(tmp_path: Path) -> None:
    """A name from the user may be a link, one from an image may not."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with FileStore.open(tmp_path / "link") as store, FileStore.open(tmp_path / "file") as other:
        assert store.identity == other.identity
    with pytest.raises(errors.InvalidArgument):
        FileStore.open(tmp_path / "link", follow_links=False)


def test_missing_permission_is_reported(open_folder: Path) -> None:
    """A file that the user cannot read, or cannot write to, is refused with that reason."""
    for name, mode in (("secret", 0o000), ("read-only", 0o444)):
        (open_folder / name).write_bytes(b"x")
        (open_folder / name).chmod(mode)
    with as_ordinary_user():
        FileStore.open(open_folder / "read-only").close()
        with pytest.raises(errors.AccessDenied):
            FileStore.open(open_folder / "read-only", writable=True)
        with pytest.raises(errors.AccessDenied):
            FileStore.open(open_folder / "secret")


def test_a_writer_excludes_all_others(tmp_path: Path) -> None:
    """Two descriptors in one process count as two programs: one writer, or any number of readers."""
    path = tmp_path / "a"
    with _new(path, b"x") as writer, FileStore.open(path) as reader, FileStore.open(path, writable=True) as other:
        writer.lock(writer=True)
        assert reader.in_use() and not writer.in_use()
        for store, role in ((reader, False), (other, True)):
            with pytest.raises(errors.ImageInUse, match="another program is writing to"):
                store.lock(writer=role)
        writer.unlock()
        assert not reader.in_use()
        reader.lock(writer=False)
        other.lock(writer=False)
        with pytest.raises(errors.ImageInUse, match="another program is using"):
            writer.lock(writer=True)


def test_a_refused_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    """A refused program holds no byte and so excludes no other."""
    path = tmp_path / "a"
    with _new(path, b"x") as reader, FileStore.open(path, writable=True) as writer:
        reader.lock(writer=False)
        with pytest.raises(errors.ImageInUse):
            writer.lock(writer=True)
        reader.unlock()
        with FileStore.open(path, writable=True) as third:
            third.lock(writer=True)


def test_a_lock_changes_its_role_both_ways(tmp_path: Path) -> None:
    """A writer that becomes a reader admits readers; a single reader may become a writer."""
    path = tmp_path / "a"
    with _new(path, b"x") as first, FileStore.open(path) as second:
        first.lock(writer=True)
        first.lock(writer=False)
        second.lock(writer=False)
        second.close()
        first.lock(writer=True)
        with FileStore.open(path) as third, pytest.raises(errors.ImageInUse):
            third.lock(writer=False)


def test_closing_releases_the_lock(tmp_path: Path) -> None:
    """Afterwards another program may write."""
    path = tmp_path / "a"
    first = _new(path, b"x")
    first.lock(writer=True)
    first.close()
    with FileStore.open(path, writable=True) as second:
        second.lock(writer=True)


def test_an_exclusive_lock_of_another_program_is_an_image_in_use(tmp_path: Path) -> None:
    """A program that locks our bytes exclusively is reported as such."""
    path = tmp_path / "a"
    with _new(path, b"x") as store, FileStore.open(path, writable=True) as other:
        fcntl.fcntl(other.fileno(), 37, _flock(fcntl.F_WRLCK))
        with pytest.raises(errors.ImageInUse, match="exclusively"):
            store.lock(writer=False)


def _flock(kind: int) -> bytes:
    return struct.pack("hhqqi4x", kind, 0, 0, 0, 0)


_HOLDER = """
import sys
from vhdkit.store import FileStore
with FileStore.open(sys.argv[1], writable=True) as store:
    store.lock(writer=sys.argv[2] == "writer")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(("holder", "as_reader", "as_writer"), [("writer", False, False), ("reader", True, False)])
def test_locks_hold_between_processes(holder: str, as_reader: bool, as_writer: bool, tmp_path: Path) -> None:
    """Another process that holds the file is noticed, and no longer after it has ended."""
    path = tmp_path / "a"
    path.write_bytes(b"x")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _HOLDER, str(path), holder]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        for role, allowed in ((False, as_reader), (True, as_writer)):
            with FileStore.open(path, writable=True) as store:
                assert store.in_use() == (holder == "writer")
                if allowed:
                    store.lock(writer=role)
                    continue
                with pytest.raises(errors.ImageInUse):
                    store.lock(writer=role)
        process.communicate("")
    with FileStore.open(path, writable=True) as store:
        store.lock(writer=True)


def test_copy_from_copies_between_and_within_files(tmp_path: Path) -> None:
    """The bytes arrive at their destination, and the source is unchanged."""
    content = os.urandom(3 * MIB + 700)
    with _new(tmp_path / "a", content) as source, _new(tmp_path / "b", b"x" * 10) as store:
        store.copy_from(source, 300, 5, 2 * MIB + 77)
        assert store.pread(0, 4 * MIB) == b"x" * 5 + content[300 : 300 + 2 * MIB + 77]
        source.copy_from(source, 100, 4 * MIB, 5000)
        assert source.pread(0, 8 * MIB) == content.ljust(4 * MIB, b"\0") + content[100:5100]


def test_copy_from_past_the_end_of_the_source_fails(tmp_path: Path) -> None:
    """A source shorter than requested is an error, and is not padded with zeros."""
    with (
        _new(tmp_path / "a", b"abc") as source,
        _new(tmp_path / "b") as store,
        pytest.raises(errors.IoFailed, match="became shorter"),
    ):
        store.copy_from(source, 0, 0, 4)


def test_closing_several_closes_all_and_reports_failures(tmp_path: Path) -> None:
    """Every store is closed, even if one of them fails, which is reported."""

    class Broken(FileStore):
        def close(self) -> None:
            raise errors.IoFailed("no", path=self.name)

    stores = [_new(tmp_path / str(number), b"x") for number in range(12)]
    descriptors = [store.fileno() for store in stores]
    broken = Broken([os.dup(descriptors[0])], "broken", writable=False)
    with pytest.raises(errors.IoFailed, match="broken"):
        close_all([broken, *stores])
    FileStore.close(broken)
    assert all(store.fileno() == -1 for store in stores)


def test_closing_several_where_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calling thread closes them: a merge that is done does not fail at its end."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    stores = [_new(tmp_path / str(number), b"x") for number in range(3)]
    monkeypatch.setattr(threading.Thread, "start", refuse)
    close_all(stores)
    assert all(store.fileno() == -1 for store in stores)
