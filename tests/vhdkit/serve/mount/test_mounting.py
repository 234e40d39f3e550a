# SPDX-License-Identifier: Apache-2.0
"""Real mounts: what is refused in advance, how stacks are mounted and unmounted, and what is left after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.mounting import (
    can_mount_kernel,
    cleaned,
    is_mounted,
    kill,
    mounted,
    require_fuse,
    require_loop,
)
from tests.mounting import vhdkit as command
from tests.support import require_tool, run
from tests.vhdkit.formats.test_partitions import mbr
from tests.waiting import wait_until
from vhdkit import OpenOptions
from vhdkit.formats.filesystems import FileSystem
from vhdkit.serve.mount import drivers, mounting
from vhdkit.serve.opening import ExportRequest, OpenMode, open_exports

MIB = 1 << 20


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own folder for FUSE mounts under a file system; at the end it must be empty."""
    require_fuse()
    folder = tmp_path / "runtime"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """16 MiB with an ext4 without a partition table, and a file in it."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "hello.txt").write_text("hello\n")
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.vhd"
    with raw.open("wb") as file:
        file.truncate(16 * MIB)
    run([require_tool("mke2fs"), "-q", "-F", "-t", "ext4", "-d", str(tmp_path / "tree"), str(raw)])
    vhdkit.convert(raw, path, disk_format=vhdkit.DiskFormat.DYNAMIC)
    raw.unlink()
    return path


def listed(mountpoint: Path) -> dict[str, Any]:
    """What `vhdkit mounts` reports about it."""
    found = json.loads(command("mounts", "--json").stdout)["mounts"]
    (one,) = [entry for entry in found if entry["mountpoint"] == str(mountpoint)]
    return dict(one)


def failure(code: int, *words: str | Path) -> str:
    """The one line with which the command fails."""
    lines = command(*words, code=code).stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_invalid_mount_points(image: Path, tmp_path: Path) -> None:
    """Missing, a file, a folder for --file, a folder that is not empty, a device: each error says what to do."""
    full, file, empty = tmp_path / "tree", tmp_path / "file", tmp_path / "empty"
    file.touch()
    empty.mkdir()
    for point, words, code, text in (
        (tmp_path / "no", (), 1, "run: mkdir"),
        (tmp_path / "no", ("--file",), 1, "run: touch"),
        (file, (), 2, "add --file"),
        (empty, ("--file",), 2, "is not a file"),
        (full, (), 2, "choose an empty folder"),
        ("/dev/null", ("--file",), 2, "is not a file"),
    ):
        assert text in failure(code, "mount", image, point, *words)
    assert "no file system that vhdkit recognises" in failure(1, "mount", _empty(tmp_path), empty, "--fs")
    assert "has no partition 3; it is not partitioned" in failure(2, "mount", image, empty, "--fs", "--partition=3")
    assert not is_mounted(empty)


def test_a_disk_with_several_partitions(image: Path, tmp_path: Path) -> None:
    """--fs without a partition, or with one that holds no file system, lists what the partitions hold."""
    with vhdkit.open_disk(image) as disk:
        content = disk.read(0, disk.size_bytes)
    raw, empty = tmp_path / "parts.raw", tmp_path / "empty"
    raw.write_bytes(mbr((0x83, 64, 64), (0x83, 2048, 16 * MIB // 512)).ljust(MIB, b"\0") + content)
    empty.mkdir()
    kinds = "1 (no known file system), 2 (ext4)"
    assert failure(2, "mount", raw, empty, "--fs").endswith(f"choose one with --partition N: {kinds}")
    assert failure(1, "mount", raw, empty, "--fs", "--partition=1").endswith(f"; the partitions are {kinds}")


def _empty(folder: Path) -> Path:
    vhdkit.create_image(folder / "empty.vhd", MIB)
    return folder / "empty.vhd"


def test_two_mounts_and_a_second_writer(image: Path, tmp_path: Path) -> None:
    """Two readers are accepted; a writer beside another user is refused by name; a place is mounted on only once."""
    second = tmp_path / "second"
    second.mkdir()
    with mounted(image, tmp_path / "first") as first:
        assert "already mounted there" in failure(1, "mount", image, first)
        with mounted(image, second):
            assert (first / "disk.raw").read_bytes() == (second / "disk.raw").read_bytes()
        assert str(image) in failure(5, "mount", image, second, "--rw")
    with mounted(image, tmp_path / "first", "--rw"):
        assert str(image) in failure(5, "mount", image, second, "--rw")
        assert str(image) in failure(5, "mount", image, second)
    with vhdkit.open_disk(image, writable=True):  # and it is free again
        pass


def test_busy_mounts(image: Path, tmp_path: Path) -> None:
    """The processes that use it are named; --lazy detaches it anyway, and the server ends with the last user."""
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    with cleaned(mnt):
        command("mount", image, mnt, "--rw")
        pid = listed(mnt)["pid"]
        fd = os.open(mnt / "disk.raw", os.O_RDWR)
        assert f"(process {os.getpid()})" in failure(5, "umount", mnt)
        os.pwrite(fd, b"written late", MIB)
        command("umount", "--lazy", mnt)
        assert not is_mounted(mnt) and Path(f"/proc/{pid}").exists()
        os.close(fd)
    wait_until_free(image)
    with vhdkit.open_disk(image) as disk:
        assert disk.read(MIB, 12) == b"written late"


def wait_until_free(image: Path) -> None:
    """Wait until the image is no longer open for writing."""

    def is_free() -> bool:
        try:
            vhdkit.open_disk(image, writable=True).close()
        except vhdkit.ImageInUse:
            return False
        return True

    wait_until(is_free, f"{image} is free")


def test_a_killed_server(image: Path, tmp_path: Path) -> None:
    """The mount is reported as dead, umount removes it, and flushed data is in the image."""
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    with cleaned(mnt):
        command("mount", image, mnt, "--rw")
        fd = os.open(mnt / "disk.raw", os.O_RDWR)
        os.pwrite(fd, b"flushed", 5 * MIB)
        os.fsync(fd)
        os.pwrite(fd, b"perhaps", 6 * MIB)
        kill(listed(mnt)["pid"])
        with contextlib.suppress(OSError):
            os.close(fd)
        assert listed(mnt)["pid"] is None
        assert "vhdkit umount" in failure(1, "mount", image, mnt)
        command("umount", mnt)
        assert not is_mounted(mnt) and list(mnt.iterdir()) == []
    with vhdkit.open_disk(image) as disk:
        assert disk.read(5 * MIB, 7) == b"flushed"
    command("check", image)


def test_foreign_mounts_are_left_alone(tmp_path: Path) -> None:
    """Nothing, a plain folder, another file system: each error says what it is."""
    assert "nothing is mounted there" in failure(1, "umount", tmp_path)
    assert "nothing is mounted there" in failure(1, "umount", tmp_path / "no")
    assert "is a mount of proc, not of vhdkit" in failure(2, "umount", "/proc")


def test_a_removed_image(image: Path, tmp_path: Path) -> None:
    """A file that was removed while mounted can be used until it is unmounted."""
    with mounted(image, tmp_path / "mnt", "--rw") as mnt:
        image.unlink()
        fd = os.open(mnt / "disk.raw", os.O_RDWR)
        os.pwrite(fd, b"into the void", 0)
        os.fsync(fd)
        os.close(fd)
        assert (mnt / "disk.raw").read_bytes().startswith(b"into the void")


def test_over_one_file(image: Path, tmp_path: Path) -> None:
    """--file shows the disk over any regular file, even over the image itself, which reappears afterwards."""
    size = image.stat().st_size
    with mounted(image, image, "--file"):
        assert image.stat().st_size == 16 * MIB
    assert image.stat().st_size == size
    over = tmp_path / "name with, comma.raw"
    over.touch()
    with mounted(image, over, "--file", "--rw"):
        fd = os.open(over, os.O_RDWR)
        os.pwrite(fd, b"x", 0)
        os.close(fd)
        assert listed(over)["writable"]
    assert over.stat().st_size == 0


def test_overlays(image: Path, tmp_path: Path) -> None:
    """Writes are discarded, or kept as a child; the image is unchanged."""
    before = image.read_bytes()
    for words in (("--overlay",), ("--overlay", "--keep-overlay", tmp_path / "kept.avhd")):
        with mounted(image, tmp_path / "mnt", *words) as mnt:
            fd = os.open(mnt / "disk.raw", os.O_RDWR)
            os.pwrite(fd, b"new", 0)
            os.close(fd)
            assert (mnt / "disk.raw").read_bytes()[:3] == b"new"
        assert image.read_bytes() == before
    with vhdkit.open_disk(tmp_path / "kept.avhd") as disk:
        assert disk.read(0, 3) == b"new"
    kept = tmp_path / "other.avhd"
    failure(1, "mount", image, tmp_path / "no", "--overlay", "--keep-overlay", kept)
    assert not kept.exists()


def test_a_file_system_by_the_kernel(image: Path, tmp_path: Path, runtime: Path) -> None:
    """As root through a loop device; umount removes all three mounts, also after a plain umount of the upper one."""
    require_loop()
    if not can_mount_kernel("ext4"):
        pytest.skip("needs a kernel with ext4")
    with mounted(image, tmp_path / "mnt", "--fs") as mnt:
        assert (mnt / "hello.txt").read_text() == "hello\n"
        one = listed(mnt)
        assert one["driver"] == "ext4" and one["loop"].startswith("/dev/loop") and not one["writable"]
    # By its backing file: its number may be reused by another program by now.
    assert os.listdir(runtime) == [] and str(runtime) not in subprocess.getoutput("losetup -n -O BACK-FILE")
    with cleaned(mnt):
        command("mount", image, mnt, "--fs", "--overlay")
        (mnt / "hello.txt").write_text("changed\n")
        run([require_tool("umount"), str(mnt)])
        assert len(os.listdir(runtime)) == 1
        command("umount", mnt)
    assert os.listdir(runtime) == []


def test_a_server_killed_under_a_file_system(image: Path, tmp_path: Path, runtime: Path) -> None:
    """umount removes the whole stack; data synced in the file system is there after its journal is replayed."""
    require_loop()
    if not can_mount_kernel("ext4"):
        pytest.skip("needs a kernel with ext4")
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    with cleaned(mnt):
        command("mount", image, mnt, "--fs", "--rw")
        (mnt / "kept.txt").write_text("kept\n")
        fd = os.open(mnt / "kept.txt", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        kill(listed(mnt)["pid"])
        command("umount", mnt)
        assert not is_mounted(mnt) and os.listdir(runtime) == []
        mounted = command("mount", image, mnt, "--fs")
        assert "without the changes in its journal" in mounted.stderr
        command("umount", mnt)
        command("mount", image, mnt, "--fs", "--overlay")
        assert (mnt / "kept.txt").read_text() == "kept\n"
        command("umount", mnt)


def test_a_file_system_by_a_fuse_driver(image: Path, tmp_path: Path, runtime: Path) -> None:
    """If the kernel's driver is not available; written data is there after umount, which waits for it."""
    require_tool("fuse2fs")
    limited = "import vhdkit.serve.mount.host as h; h.is_root = lambda: False"
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(limited)
    environment = {"PYTHONPATH": os.pathsep.join([str(site), os.getcwd()])}
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    with cleaned(mnt):
        command("mount", image, mnt, "--fs", "--rw", env=environment)
        assert listed(mnt)["driver"] == "fuse2fs"
        (mnt / "new.bin").write_bytes(bytes(range(256)) * 4096)
        command("umount", mnt)
        assert os.listdir(runtime) == []
        command("mount", image, mnt, "--fs", env=environment)
        assert (mnt / "new.bin").read_bytes() == bytes(range(256)) * 4096
        command("umount", mnt)


def test_no_other_driver_writes_what_the_kernel_refuses(
    image: Path, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's message is shown; read-only, or over an overlay, the next driver is tried, with a note."""
    tried: list[str] = []
    said = ""

    def attempt(one: drivers.Attempt, file: str, mountpoint: str, writable: bool) -> mounting._Failure | None:
        tried.append(one.name)
        if one.needs_loop:
            return mounting._Failure(said, is_verdict=drivers.is_verdict(said))
        return None

    monkeypatch.setattr(mounting, "_try", attempt)
    found = FileSystem("ext4")
    for words, verdict in (("Structure needs cleaning", True), ("unknown filesystem type 'ext4'", False)):
        said = words
        for open_mode, writable in (
            (OpenMode(OpenOptions()), True),
            (OpenMode(OpenOptions(), read_only=True), False),
            (OpenMode(OpenOptions(), overlay=True), True),
        ):
            tried.clear()
            plan = list(drivers.attempts(found, writable=writable, is_root=True))
            (export,) = open_exports([ExportRequest(str(image))], open_mode)
            with export.disk:
                if verdict and writable and not open_mode.overlay:
                    with pytest.raises(
                        vhdkit.UnsupportedFormat, match=r"refused by the kernel's ext4: Structure needs"
                    ):
                        mounting._mount_inside(plan, found, "disk.raw", "mnt", export)
                    assert tried == ["the kernel's ext4"]
                    continue
                name, notes = mounting._mount_inside(plan, found, "disk.raw", "mnt", export)
            assert name == "fuse2fs" and tried[-1] == "fuse2fs"
            assert (notes == ()) != verdict and all("Structure needs cleaning" in one for one in notes)


def test_a_truncated_file_system_is_refused_by_the_kernel(image: Path, tmp_path: Path, runtime: Path) -> None:
    """The same with a real ext4 that is truncated: it is not mounted for writing, and nothing is left."""
    require_loop()
    if not can_mount_kernel("ext4"):
        pytest.skip("needs a kernel with ext4")
    raw, mnt = tmp_path / "short.raw", tmp_path / "mnt"
    vhdkit.convert(image, raw, disk_format=vhdkit.DiskFormat.RAW)
    os.truncate(raw, 12 * MIB)
    mnt.mkdir()
    assert "its ext4 was refused by the kernel's ext4" in failure(1, "mount", raw, mnt, "--fs", "--rw")
    assert os.listdir(runtime) == [] and not is_mounted(mnt)


def test_a_file_system_that_no_driver_mounts(tmp_path: Path, runtime: Path) -> None:
    """The last driver's message, what helps, and nothing left behind."""
    raw, mnt = tmp_path / "luks.raw", tmp_path / "mnt"
    raw.write_bytes(b"LUKS\xba\xbe".ljust(MIB, b"\0"))
    mnt.mkdir()
    assert "cryptsetup" in failure(1, "mount", raw, mnt, "--fs", "--format", "raw")
    raw.write_bytes((bytes(3) + b"NTFS    ").ljust(MIB, b"\0"))
    text = failure(1, "mount", raw, mnt, "--fs", "--format", "raw")
    assert "its ntfs cannot be mounted" in text or "no driver for its ntfs" in text
    assert os.listdir(runtime) == [] and not is_mounted(mnt)
