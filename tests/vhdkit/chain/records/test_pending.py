# SPDX-License-Identifier: Apache-2.0
"""Undo logs beside images: what every kind of open does with them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import vhdkit
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.describe import describe_chain, describe_image
from vhdkit.formats.undo import UndoLog, apply_change, encode, plan_change
from vhdkit.formats.vhd.footers import image_id
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.resize import fixed_writes
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE

SIZE = MIB
MARK = b"\xaa" * SECTOR_SIZE


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A fixed image full of data."""
    path = tmp_path / "base.vhd"
    vhdkit.create_image(path, SIZE, disk_format=vhdkit.DiskFormat.FIXED)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, random.Random(1).randbytes(SIZE))
    return path


def interrupt(path: Path, *, begun: bool = True) -> UndoLog:
    """Leave a log, and with `begun` the change, as a power cut between the log and the end of the change would."""
    with FileStore.open(path, writable=True) as store:
        writes = [(4 * KIB, MARK * 2), (SIZE, bytes(SECTOR_SIZE)), (2 * SIZE, MARK)]
        log = plan_change(store, image_id(store), writes)
        pending.write_log(pending.undo_path(str(path)), log, like=store)
        if begun:
            apply_change(store, log)
    return log


def log_of(path: Path) -> Path:
    """The path of an image's log."""
    return Path(pending.undo_path(str(path)))


def codes(path: Path) -> set[str]:
    """The codes of `check`'s findings."""
    return {finding.code for finding in vhdkit.check(path)}


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_open_reads_as_before(base: Path, begun: bool) -> None:
    """INV-UNDO-LOG: opened read-only the disk is as before the change, and no byte of any file changes."""
    before = base.read_bytes()
    interrupt(base, begun=begun)
    changed, log = base.read_bytes(), log_of(base).read_bytes()
    with vhdkit.open_disk(base) as disk:
        assert disk.size_bytes == SIZE and disk.read(0, SIZE) == before[:SIZE]
    info = describe_image(base)
    assert (info.kind, info.virtual_size_bytes, info.file_size_bytes) == ("fixed", SIZE, SIZE + SECTOR_SIZE)
    assert [finding.code for finding in info.findings] == ["change-unfinished"]
    assert codes(base) == {"change-unfinished"}
    assert base.read_bytes() == changed and log_of(base).read_bytes() == log


@pytest.mark.parametrize("begun", [False, True])
def test_a_writable_open_undoes_the_change(base: Path, begun: bool) -> None:
    """Opened for writing the file holds what it held before the change, and the log is gone."""
    before = base.read_bytes()
    interrupt(base, begun=begun)
    with vhdkit.open_disk(base, writable=True) as disk:
        assert disk.read(0, SIZE) == before[:SIZE]
    assert base.read_bytes() == before
    assert not log_of(base).exists() and codes(base) == set()


def test_a_parent_with_a_log_reads_as_before(base: Path, tmp_path: Path) -> None:
    """A child is found, described, opened and written over a parent with an unfinished change, which stays."""
    child = tmp_path / "child.avhd"
    vhdkit.create_child(child, base)
    before = base.read_bytes()
    interrupt(base)
    changed = base.read_bytes()
    with vhdkit.open_disk(child, writable=True) as disk:
        assert disk.read(0, SIZE) == before[:SIZE]
        disk.write(0, MARK)
    assert describe_chain(child).problem is None
    assert codes(child) == {"change-unfinished"}
    with pytest.raises(vhdkit.HasChildren):
        vhdkit.open_disk(base, writable=True)
    assert base.read_bytes() == changed and log_of(base).exists()
    vhdkit.rebase(child, base)
    vhdkit.convert(child, tmp_path / "out.raw", vhdkit.DiskFormat.RAW)
    assert (tmp_path / "out.raw").read_bytes() == MARK + before[SECTOR_SIZE:SIZE]


def test_rebase_first_undoes_an_interrupted_change(base: Path, tmp_path: Path) -> None:
    """An open that does not go through the whole chain undoes the change, too."""
    child = tmp_path / "child.avhd"
    vhdkit.create_child(child, base)
    before = child.read_bytes()
    with FileStore.open(child, writable=True) as store:
        log = plan_change(store, image_id(store), [(0, bytes(SECTOR_SIZE)), (8 * KIB, MARK)])
        pending.write_log(pending.undo_path(str(child)), log, like=store)
        apply_change(store, log)
    assert pending.undo_path(str(child)) != pending.undo_path(str(base))
    assert vhdkit.check(child) != []
    vhdkit.rebase(child, base)
    assert not log_of(child).exists()
    assert child.read_bytes()[:512] == before[:512]


def test_nothing_is_undone_while_another_holds_the_image(base: Path) -> None:
    """The lock comes first: if it is held elsewhere, a writable open is refused and changes nothing."""
    interrupt(base)
    changed = base.read_bytes()
    with FileStore.open(base, writable=True) as holder:
        holder.lock(writer=True)
        with pytest.raises(vhdkit.ImageInUse):
            vhdkit.open_disk(base, writable=True)
        assert {one.code for one in describe_image(base).findings} == {"change-under-way"}
    assert base.read_bytes() == changed and log_of(base).exists()


def strange(kind: str, path: Path, outside: Path, log: bytes) -> None:
    """Put an untrustworthy file in the place of an image's log."""
    if kind == "torn":
        path.write_bytes(log[: len(log) // 2])
    elif kind == "link":
        outside.write_bytes(log)
        path.symlink_to(outside)
    elif kind == "link to nothing":
        path.symlink_to(outside / "nothing")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_bytes(log)


@pytest.mark.parametrize(
    "kind", ["torn", "link", "link to nothing", "pipe", "folder", "device", "huge", "of another image"]
)
def test_files_that_are_not_the_images_log_are_ignored(kind: str, base: Path, tmp_path: Path) -> None:
    """Torn, foreign, linked, not a regular file: reported as a finding, never followed, and no byte changes."""
    outside = tmp_path / "outside"
    other = tmp_path / "other.vhd"
    vhdkit.create_image(other, SIZE, disk_format=vhdkit.DiskFormat.FIXED)
    log = interrupt(other if kind == "of another image" else base, begun=False)
    log_of(base).unlink(missing_ok=True)
    strange(kind, log_of(base), outside, encode(log))
    before = base.read_bytes()
    assert codes(base) == {"undo-log-ignored"}
    with vhdkit.open_disk(base, writable=True) as disk:
        assert disk.read(0, SIZE) == before[:SIZE]
    assert base.read_bytes() == before and os.path.lexists(log_of(base))


def test_a_change_is_made_and_leaves_no_log(base: Path) -> None:
    """The change is in the file and the log is gone; while it existed it was as private as the image."""
    base.chmod(0o600)
    modes = []
    with FileStore.open(base, writable=True) as store:
        original = store.pwrite

        def pwrite(offset_bytes: int, data: bytes) -> None:
            modes.append(log_of(base).stat().st_mode & 0o777)
            original(offset_bytes, data)

        store.pwrite = pwrite  # type: ignore[method-assign, assignment]
        pending.change(store, [(0, MARK)], 2 * SIZE)
    assert base.read_bytes()[:SECTOR_SIZE] == MARK and base.stat().st_size == 2 * SIZE
    assert modes == [0o600] and not log_of(base).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), vhdkit.NoSpace("full")])
def test_a_failing_change_is_undone(base: Path, error: BaseException) -> None:
    """After Ctrl-C or a full disk during a change the file has its old content, and no log is left."""
    before = base.read_bytes()
    with FileStore.open(base, writable=True) as store:
        original, calls = store.pwrite, 0

        def pwrite(offset_bytes: int, data: bytes) -> None:
            nonlocal calls
            calls += 1
            original(offset_bytes, data)
            if calls == 2:
                raise error

        store.pwrite = pwrite  # type: ignore[method-assign, assignment]
        with pytest.raises(type(error)):
            pending.change(store, [(0, MARK), (SIZE, bytes(SECTOR_SIZE)), (2 * SIZE, MARK)])
    assert base.read_bytes() == before and not log_of(base).exists()


def test_a_log_that_is_still_needed_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    """A whole log of another image in the log's place prevents a change; a torn one is replaced."""
    other = tmp_path / "other.vhd"
    vhdkit.create_image(other, SIZE, disk_format=vhdkit.DiskFormat.FIXED)
    log = encode(interrupt(other, begun=False))
    log_of(base).write_bytes(log)
    with FileStore.open(base, writable=True) as store:
        with pytest.raises(vhdkit.InvalidArgument, match="earlier change"):
            pending.change(store, [(0, MARK)])
        assert log_of(base).read_bytes() == log
        log_of(base).write_bytes(log[:-1])
        pending.change(store, [(0, MARK)])
    assert not log_of(base).exists() and base.read_bytes()[:SECTOR_SIZE] == MARK


def test_a_removed_log_comes_back_empty_or_not_at_all(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a folder cannot be flushed, a cut may bring back the name, without the log; then it is removed again."""
    with monkeypatch.context() as patch:
        patch.setattr(pending, "remove_file", lambda path: None)
        with FileStore.open(base, writable=True) as store:
            pending.change(store, [(0, MARK)])
    assert log_of(base).read_bytes() == b"" and codes(base) == set()
    with vhdkit.open_disk(base, writable=True) as disk:
        assert disk.read(0, SECTOR_SIZE) == MARK
    assert not log_of(base).exists()


def test_a_killed_change_is_undone(base: Path) -> None:
    """After kill -9 during a change the next writable open restores the image."""
    before = base.read_bytes()
    program = f"""
import os, signal
from vhdkit.chain.records import pending
from vhdkit.store import FileStore
store = FileStore.open({str(base)!r}, writable=True)
store.lock(writer=True)
real, calls = store.pwrite, []
def pwrite(offset, data):
    real(offset, data)
    calls.append(offset)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
store.pwrite = pwrite
pending.change(store, [(0, b"x" * 512), ({SIZE}, bytes(512)), ({2 * SIZE}, b"y" * 512)])
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == -9 and base.read_bytes() != before and log_of(base).exists()
    with vhdkit.open_disk(base) as disk:
        assert disk.read(0, SIZE) == before[:SIZE]
    vhdkit.open_disk(base, writable=True).close()
    assert base.read_bytes() == before and not log_of(base).exists()


def test_the_empty_rest_of_a_removed_log_is_cleared_away(base: Path) -> None:
    """If the machine stopped while a log was removed, nothing is reported, and a writable open removes the rest."""
    log_of(base).write_bytes(b"")
    assert "undo-log-ignored" not in codes(base)
    with vhdkit.open_disk(base):
        assert log_of(base).exists()
    with vhdkit.open_disk(base, writable=True):
        assert not log_of(base).exists()


def test_data_written_under_another_name_is_kept(tmp_path: Path) -> None:
    """INV-UNDO-LOG: data written to a renamed image is kept: the log no longer applies to it."""
    path, other = tmp_path / "d.vhd", tmp_path / "e.vhd"
    vhdkit.create_image(path, SIZE, disk_format=vhdkit.DiskFormat.FIXED)
    with FileStore.open(path, writable=True) as store:
        metadata = read_metadata(store)
        writes, size = fixed_writes(metadata, 4 * SIZE)
        log = plan_change(store, image_id(store), writes, size)
        pending.write_log(pending.undo_path(str(path)), log, like=store)
        apply_change(store, log)
    path.rename(other)
    with vhdkit.open_disk(other, writable=True) as disk:
        disk.write(2 * SIZE, MARK)
    other.rename(path)
    with vhdkit.open_disk(path, writable=True) as disk:
        assert disk.size_bytes == 4 * SIZE and disk.read(2 * SIZE, len(MARK)) == MARK
    assert codes(path) == {"undo-log-ignored"}
