# SPDX-License-Identifier: Apache-2.0
"""What a helper process that guests talk to can still see and do, with a shell in its place."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import not_available, require_root, require_tool
from vmm.net import enclosed, enclosing
from vmm.net.enclosing import Enclosure

USER = 61500


def helper(place: Enclosure, script: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """A shell, enclosed like a helper process."""
    place.make()
    words = [require_tool("busybox"), "sh", "-c", script]
    command = place.command(words, **settings)  # type: ignore[arg-type]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


@pytest.fixture
def rooted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enclosure:
    """A place with its own root, on a host with a name server."""
    require_root()
    (tmp_path / "resolver").write_text("nameserver 192.0.2.1\n")
    monkeypatch.setattr(enclosing, "RESOLVER", str(tmp_path / "resolver"))
    return Enclosure(str(tmp_path / "own"), USER, str(tmp_path / "root"))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_helper_has_its_own_root(rooted: Enclosure, tmp_path: Path, umask: int) -> None:
    """`INV-ENCLOSED`: it sees programs, its folder and what it was given, and can change only its own files.

    The umask of its starter does not matter; that of a machine's worker gives other users no access.
    """
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "leases").write_text("a lease\n")
    (tmp_path / "leases").chmod(0o600)
    os.chown(tmp_path / "leases", USER, USER)
    (tmp_path / "config").write_text("a setting\n")
    (tmp_path / "config").chmod(0o644)
    script = (
        f"ls -A / /etc; id -u; cat /leases {tmp_path}/config; echo more >/leases; echo mine >/own/mine; echo;"
        f"for one in {tmp_path}/config /usr/new /new /etc/new; do (echo x >$one) 2>/dev/null && echo WROTE $one; done;"
        f"cat {tmp_path}/secret /etc/shadow /proc/1/cmdline 2>/dev/null && echo READ; cat /etc/resolv.conf >/own/copy"
    )
    files, read = [f"{tmp_path}/leases=leases"], [f"{tmp_path}/config"]
    before = os.umask(umask)
    try:
        done = helper(rooted, script + " && head -c 1 /dev/urandom >/dev/null", files=files, read=read)
    finally:
        os.umask(before)
    assert done.stderr == ""
    seen = set(done.stdout.split())
    assert {"own", "leases", "usr", "passwd", str(USER), "lease", "setting"} <= seen
    assert not {"home", "root", "proc", "sys", "var", "run", "shadow", "WROTE", "READ"} & seen
    assert (tmp_path / "leases").read_text() == "more\n"
    assert (tmp_path / "own" / "mine").stat().st_uid == USER
    assert (tmp_path / "own" / "copy").read_text() == "nameserver 192.0.2.1\n"
    assert list((tmp_path / "root").iterdir()) == []  # on the host these are empty


def test_capabilities_and_rights(rooted: Enclosure) -> None:
    """`INV-ENCLOSED`: it has only the capabilities that were named and can gain none."""
    for keep, mask in ((), 0), ((10, 13), 1 << 10 | 1 << 13):
        rooted.make()
        with subprocess.Popen(
            rooted.command([require_tool("busybox"), "cat"], keep=keep),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"x" * 5000)
            process.stdin.flush()
            assert os.read(process.stdout.fileno(), 1) == b"x"  # by now the helper itself runs
            facts = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            process.stdin.close()
        assert facts["Uid"].split() == facts["Gid"].split() == [str(USER)] * 4
        assert facts["Groups"].split() == []
        assert {int(facts[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {mask}
        assert (facts["NoNewPrivs"].strip(), facts["Seccomp"].strip()) == ("1", "2")


def test_other_files_are_denied_without_root(tmp_path: Path) -> None:
    """`INV-ENCLOSED`: with Landlock it can read programs and its own folder, and no other file of its user."""
    if enclosed._libc.syscall(444, None, 0, 1) < 1:
        not_available("needs Landlock in the kernel")
    (tmp_path / "secret").write_text("secret")
    place = Enclosure(str(tmp_path / "own"), None)
    script = f"cat {tmp_path}/secret; (echo x >{tmp_path}/new) || echo denied; echo mine >{tmp_path}/own/mine; ls /usr"
    done = helper(place, script)
    assert "secret" not in done.stdout.split()
    assert {"denied", "bin"} <= set(done.stdout.split())
    assert (tmp_path / "own" / "mine").read_text() == "mine\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("user", [None, USER])
def test_it_ends_with_its_starter(tmp_path: Path, user: int | None) -> None:
    """It ends when its starter ends, even if that happened before the helper was ready."""
    if user is not None:
        require_root()
    place = Enclosure(str(tmp_path / "own"), user, str(tmp_path / "root"))
    place.make()
    command = place.command([require_tool("busybox"), "sleep", "60"], parent=os.getpid())
    starter = f"import os, subprocess; words = {command!r}; words[words.index('--parent') + 1] = str(os.getpid());"
    starter += "one = subprocess.Popen(words); print(one.pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        descriptor = os.pidfd_open(pid)
        process.kill()
    os.set_blocking(descriptor, False)
    try:
        assert select.select([descriptor], [], [], 20)[0]
    finally:
        os.close(descriptor)
    stranger = place.command([require_tool("busybox"), "true"], parent=1)
    assert subprocess.run(stranger, check=False, capture_output=True, timeout=30).returncode == 1


def test_a_failed_enclosure_is_reported(rooted: Enclosure) -> None:
    """Nothing is started, and the output says why."""
    rooted.make()
    done = subprocess.run(rooted.command(["/usr/bin/no-such-program"]), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no-such-program cannot be enclosed: No such file" in done.stderr
    assert enclosing.hint_for(done.stderr.strip()) is None


def test_without_the_right_to_mount_the_error_says_what_helps(rooted: Enclosure) -> None:
    """As in a container; the helper is not started without its enclosure."""
    rooted.make()
    words = ["setpriv", "--bounding-set", "-sys_admin", *rooted.command([require_tool("busybox"), "echo", "started"])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "CAP_SYS_ADMIN" in str(enclosing.hint_for(done.stderr.strip()))


def test_a_blocked_copy_of_the_name_servers_is_replaced(rooted: Enclosure, tmp_path: Path) -> None:
    """A helper that puts another file in the place of its copy does not affect others."""
    rooted.make()
    copy = tmp_path / "own" / "resolv.conf"
    assert copy.read_text() == "nameserver 192.0.2.1\n"
    wanted = b"nameserver 192.0.2.2\n"
    (tmp_path / "resolver").write_bytes(wanted)
    (tmp_path / "victim").write_text("victim")
    copy.unlink()
    copy.symlink_to(tmp_path / "victim")
    rooted.refresh()
    assert (copy.is_symlink(), copy.read_bytes()) == (False, wanted)
    assert (tmp_path / "victim").read_text() == "victim"
    copy.unlink()
    os.mkfifo(copy)
    rooted.refresh()
    assert copy.read_bytes() == wanted
