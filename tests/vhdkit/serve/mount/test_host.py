# SPDX-License-Identifier: Apache-2.0
"""Questions to the system, answered by real programs and the kernel's files where possible."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from vhdkit.errors import AccessDenied, IoFailed, NotFound
from vhdkit.serve.mount import host
from vhdkit.serve.mount.table import Mount, server_address

UNLIMITED = 9223372036854771712


def test_kinds_of_mount_points(tmp_path: Path) -> None:
    """A folder, a file, another kind, or nothing."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    kinds = [host.kind_of_place(str(tmp_path / name)) for name in (".", "file", "pipe", "nothing", "file/below")]
    assert kinds == ["folder", "file", "other", "missing", "missing"]
    assert not host.is_empty(str(tmp_path))


def test_programs_run_without_a_shell(tmp_path: Path) -> None:
    """Arguments are passed unchanged; the exit code and the first lines of the output are returned."""
    result = host.run(["sh", "-c", 'printf "%s\\n" "$1" second third; exit 3', "x", "$HOME; echo"])
    assert result == host.Finished(3, "$HOME; echo; second")
    with pytest.raises(NotFound, match="no-such-program"):
        host.run(["no-such-program"])


def test_programs_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that hangs is ended, which is its own kind of error."""
    monkeypatch.setattr(host, "PROGRAM_SECONDS", 0.05)
    with pytest.raises(IoFailed, match="timed out"):
        host.run(["sleep", "30"])


def test_a_missing_or_inaccessible_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to do about it."""
    monkeypatch.setattr(host, "FUSE_DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(NotFound, match="modprobe fuse"):
        host.check_fuse()
    (tmp_path / "fuse").touch()
    with pytest.raises(NotFound, match="is not a device"):
        host.check_fuse()
    monkeypatch.setattr(stat, "S_ISCHR", lambda mode: True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(AccessDenied, match="chmod 666"):
        host.check_fuse()


@pytest.mark.parametrize(
    ("groups", "limit", "flusher", "safe"),
    [
        ("0::/user.slice\n", 0, False, True),
        ("4:memory:/box\n0::/\n", UNLIMITED, False, True),
        ("4:memory:/box\n0::/\n", 1 << 30, False, False),
        ("4:cpu,memory:/box\n0::/\n", 1 << 30, True, True),
        ("4:memory:/gone\n", None, False, False),
    ],
)
def test_where_loop_devices_are_safe(
    groups: str, limit: int | None, flusher: bool, safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a limited memory group of version 1, unless the kernel treats the process as a flusher for others."""
    files = {"/proc/self/cgroup": groups}
    if limit is not None:
        files["/sys/fs/cgroup/memory/box/memory.stat"] = f"cache 1\nhierarchical_memory_limit {limit}\n"
    group = Mount("0:1", "/sys/fs/cgroup/memory", "cgroup", "cgroup", frozenset({"rw", "memory"}))
    monkeypatch.setattr(host, "read_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(host, "mounts", lambda: [group])
    monkeypatch.setattr(host, "_may_be_flusher", lambda: flusher)
    assert host.loop_writes_are_safe() is safe


def test_a_server_is_found_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device of its mount; the waiting process learns what went wrong. Another user's socket is ignored."""
    mount = Mount(f"0:{os.getpid()}-test", "/mnt", "fuse.vhdkit", "/x", frozenset({f"user_id={os.getuid()}"}))
    assert host.find_server(mount) is None
    monkeypatch.setattr(host, "mounts", lambda: [mount])
    presence = host.Presence()
    presence.show("/mnt")
    other = Mount(mount.device, "/mnt", "fuse.vhdkit", "/x", frozenset({"user_id=54321"}))
    assert host.find_server(other) is None
    server = host.find_server(mount)
    assert server is not None and server.pid == os.getpid()
    result: list[str | None] = []
    waiting = threading.Thread(target=lambda: result.append(server.wait()))
    waiting.start()
    presence.leave()
    assert host.find_server(mount) is None
    following = host.Presence()
    following.show("/mnt")  # the device number is reused before the old server has ended
    found = host.find_server(mount)
    assert found is not None
    found.close()
    presence.report("the disk is full")
    waiting.join(30)
    assert result == ["the disk is full"]
    presence.close()
    following.close()
    assert host.find_server(mount) is None


def test_a_server_is_found_after_many_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookups do not fill the listen queue, which the kernel bounds, and all waiting processes get the result."""
    mount = Mount(f"0:{os.getpid()}-often", "/mnt", "fuse.vhdkit", "/x", frozenset())
    monkeypatch.setattr(host, "mounts", lambda: [mount])
    monkeypatch.setattr(host, "_LEAVING_SECONDS", 120.0)
    presence = host.Presence()
    presence.show("/mnt")
    stays = [host.find_server(mount) for _ in range(2)]
    for _ in range(400):
        server = host.find_server(mount)
        assert server is not None
        server.close()
    presence.leave()
    presence.report("no")
    presence.close()
    assert [one and one.wait() for one in stays] == ["no", "no"]


def test_a_server_that_dies_ends_the_waiting() -> None:
    """A server that dies without a result ends the wait."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mount = Mount(f"0:{os.getpid()}-dies", "/mnt", "fuse.vhdkit", "/x", frozenset())
    listener.bind(server_address(mount.device))
    listener.listen()
    server = host.find_server(mount)
    assert server is not None
    listener.close()
    assert server.wait() is None


def test_users_of_a_busy_folder(tmp_path: Path) -> None:
    """They are found by open files and working folders."""
    with (tmp_path / "file").open("w"):
        assert any(f"(process {os.getpid()})" in user for user in host.users_of(str(tmp_path)))
    assert host.users_of(str(tmp_path / "nothing")) == []


def test_invalid_documents() -> None:
    """A file that cannot be read, or has other content, is an empty document."""
    assert host.read_json("/nowhere") == {} and host.read_json("/proc/self/mountinfo") == {}


def test_files_of_the_kernel_are_read_as_they_are(tmp_path: Path) -> None:
    """A name, and so the kernel's tables, may contain a carriage return."""
    (tmp_path / "table").write_bytes(b"a\rb\r\n\xff\n")
    assert host.read_text(str(tmp_path / "table")) == "a\rb\r\n\udcff\n"
