# SPDX-License-Identifier: Apache-2.0
"""`mount`, `umount`, `mounts`: exclusive options, /etc/fstab's options, what is printed, and --foreground."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

import vhdkit
from tests.mounting import cleaned, is_mounted, kill, require_fuse, require_root
from tests.mounting import vhdkit as command
from tests.support import ROOT, SYSTEM_PYTHON, require_tool
from tests.vhdkit.cli.running import failure, finish, good, start
from vhdkit.cli import mount as module
from vhdkit.cli.common import Common
from vhdkit.cli.failure import Interrupted
from vhdkit.serve.mount.host import Child
from vhdkit.serve.mount.mounting import Mounted

MIB = 1 << 20
NOBODY_UID = 65534


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--rw", "--overlay"), "--rw and --overlay cannot be combined"),
        (("--keep-overlay", "x"), "--keep-overlay requires --overlay"),
        (("--file", "--fs"), "--file and --fs cannot be combined"),
        (("--partition", "1"), "--partition requires --fs or --file"),
        (("-o", "bogus"), "'bogus' is not an option of mount"),
        (("-o", "partition=x"), "'partition=x' is not an option"),
        (("--partition", "0", "--fs"), "--partition"),
    ],
)
def test_exclusive_options(words: tuple[str, ...], text: str) -> None:
    """Exit code 2 and a line that names the options."""
    assert text in failure("mount", "disk.vhd", "mnt", *words, code=2)


def test_fstab_options() -> None:
    """Our options are applied, mount(8)'s are ignored, and the last of ro and rw counts."""
    plain = module._Words("i", "m", False, False, None, False, None, False, False, False)
    common = Common(vhdkit.OpenOptions(), False, False, False)
    words, common = module._with_fstab(
        plain, common, "rw,nosuid,nodev,x-systemd.automount,_netdev,fs,partition=2,allow_other,allow_parent_dir=/a"
    )
    assert words.rw and words.file_system and words.partition == 2 and words.allow_other
    assert common.options.parent_dirs == ("/a",)
    words, common = module._with_fstab(words, common, "ro,allow_raw_parent")
    assert not words.rw and common.options.allow_raw_parent
    words, _ = module._with_fstab(plain, common, "rw,overlay,keep_overlay=/x")
    assert words.overlay and not words.rw and words.keep_overlay == "/x"


def test_documents(folder: Path) -> None:
    """mount, mounts and umount print one line each, or a document with --json."""
    require_fuse()
    good("create", "disk.vhd", "--size", "4M")
    (folder / "mnt").mkdir()
    with cleaned(folder / "mnt"):
        document = json.loads(command("mount", "disk.vhd", "mnt", "--json").stdout)
        assert document["mountpoint"] == document["base"] == str(folder / "mnt")
        assert document["image"] == str(folder / "disk.vhd") and document["size_bytes"] == 4 * MIB
        assert (document["writable"], document["driver"], document["file_system"]) == (False, None, None)
        (one,) = [
            row
            for row in json.loads(command("mounts", "--json").stdout)["mounts"]
            if row["mountpoint"] == document["mountpoint"]
        ]
        assert one["pid"] == document["pid"] and one["loop"] is None
        assert str(folder / "mnt") in command("mounts", "--quiet").stdout.splitlines()
        assert str(folder / "mnt") in command("mounts").stdout
        assert json.loads(command("umount", "mnt", "--json").stdout) == {"mountpoint": "mnt"}
        line = command("mount", "disk.vhd", "mnt", "--rw").stdout
        assert line == "disk.vhd is at mnt: 4.0 MiB, writable\n"
        error = json.loads(command("mount", "disk.vhd", "mnt", "--json", code=1).stderr)["error"]
        assert error["kind"] == "AlreadyExists"
        assert command("umount", "mnt").stdout == ""


def test_change_tracking_beside_an_image(folder: Path) -> None:
    """Mounting an image for writing beside Hyper-V's files warns once, on standard error; read-only it does not."""
    require_fuse()
    good("create", "disk.vhdx", "--size", "4M")
    Path("disk.vhdx.rct").touch()
    (folder / "mnt").mkdir()
    with cleaned(folder / "mnt"):
        for words, lines in (([], 0), (["--rw"], 1)):
            said = command("mount", "disk.vhdx", "mnt", *words).stderr
            assert said.count("vhdkit: warning: ") == said.count("disk.vhdx.rct") == len(said.splitlines()) == lines
            command("umount", "mnt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_foreground_ends_with_a_signal(folder: Path, number: int) -> None:
    """A signal unmounts in order, with all writes in the image, and counts as success."""
    require_fuse()
    good("create", "disk.vhd", "--size", "4M")
    (folder / "mnt").mkdir()
    with cleaned(folder / "mnt"):
        process = start("mount", "disk.vhd", "mnt", "--rw", "--foreground")
        assert process.stdout is not None and b"is at mnt" in process.stdout.readline()
        fd = os.open("mnt/disk.raw", os.O_RDWR)
        os.pwrite(fd, b"hello", 0)
        os.close(fd)
        process.send_signal(number)
        code, _, errors = finish(process)
        assert (code, errors) == (0, "") and not is_mounted(folder / "mnt")
    with vhdkit.open_disk("disk.vhd") as disk:
        assert disk.read(0, 5) == b"hello"


def test_a_signal_while_the_mount_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It unmounts, too: a program that reads the announcement may send one before the command waits."""

    class Server:
        def wait(self) -> int:
            return 0

    def announce() -> None:
        raise Interrupted(signal.SIGINT)

    unmounted = list[str]()
    monkeypatch.setattr(module, "umount", unmounted.append)
    mounted = Mounted("/mnt", "/mnt", "disk.vhd", MIB, True, cast("Child", Server()))
    module._stay(mounted, Common(vhdkit.OpenOptions(), False, False, False), announce)
    assert unmounted == ["/mnt"]


def test_foreground_ends_with_the_mount(folder: Path) -> None:
    """It ends when the mount is unmounted elsewhere, and fails if the server is killed."""
    require_fuse()
    good("create", "disk.vhd", "--size", "4M")
    (folder / "mnt").mkdir()
    with cleaned(folder / "mnt"):
        for dies in (False, True):
            process = start("mount", "disk.vhd", "mnt", "--foreground")
            assert process.stdout is not None and process.stdout.readline()
            if dies:
                kill(json.loads(command("mounts", "--json").stdout)["mounts"][-1]["pid"])
            else:
                command("umount", "mnt")
            code, _, errors = finish(process)
            assert (code, "killed by signal 9" in errors) == (1 if dies else 0, dies)
            assert not is_mounted(folder / "mnt")


def test_an_fstab_line(folder: Path) -> None:
    """mount(8) runs mount.fuse3, which calls `vhdkit-mount`, here by its full path."""
    require_fuse()
    require_root()
    mount = require_tool("mount")
    require_tool("mount.fuse3")
    (folder / "bin").mkdir()
    program = folder / "bin" / "vhdkit-mount"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from vhdkit.cli.main import mount_program; mount_program()"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    program.chmod(0o755)
    good("create", "disk.vhd", "--size", "4M")
    (folder / "mnt").mkdir()
    (folder / "fstab").write_text(f"{program}#{folder}/disk.vhd {folder}/mnt fuse3 ro,nofail,x-test 0 0\n")
    with cleaned(folder / "mnt"):
        subprocess.run([mount, "--fstab", f"{folder}/fstab", f"{folder}/mnt"], check=True, timeout=60)
        assert (folder / "mnt" / "disk.raw").stat().st_size == 4 * MIB
        command("umount", "mnt")


SCRIPT = """
set -e
mount -t tmpfs none /mnt
mknod -m 666 /mnt/fuse c 10 229
mount --bind /mnt/fuse /dev/fuse
exec setpriv --reuid {user} --regid {user} --clear-groups --inh-caps=-all sh -ec '{script}'
"""
AS_USER = """
mkdir mnt
vhdkit="{python} -m vhdkit"
$vhdkit create disk.vhd --size 4M --quiet
$vhdkit mount disk.vhd mnt --rw
echo hello | dd of=mnt/disk.raw conv=notrunc status=none
$vhdkit mounts
$vhdkit umount mnt
$vhdkit mount disk.vhd mnt --quiet
head -c 5 mnt/disk.raw
$vhdkit umount mnt
if $vhdkit mount disk.vhd mnt --allow-other; then exit 9; fi
if $vhdkit mount disk.vhd /srv; then exit 9; fi
"""


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """A folder outside of pytest's own, which every start of pytest closes to other users again."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        yield Path(name)


def test_an_ordinary_user(own_folder: Path) -> None:
    """Mounts, writes, reads and unmounts; may neither admit other users nor mount on a folder of another user."""
    require_fuse()
    require_root()
    unshare = require_tool("unshare")
    require_tool("setpriv")
    site = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{site}", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(own_folder),
        "XDG_RUNTIME_DIR": "", "TMPDIR": "/tmp",
    }  # fmt: skip
    python = _python_for_all(environment)
    if "user_allow_other" in _uncommented(Path("/etc/fuse.conf")):
        pytest.skip("/etc/fuse.conf has user_allow_other here")
    with Reachable(own_folder):
        script = SCRIPT.format(user=NOBODY_UID, script=AS_USER.format(python=python))
        done = subprocess.run(
            [unshare, "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=120, check=False,
            env=environment, cwd=own_folder,
        )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "disk.vhd is at mnt: 4.0 MiB, writable" in done.stdout and done.stdout.endswith("hello")
    others, place = done.stderr.splitlines()
    assert "user_allow_other" in others and "/srv" in place and "folders that the user owns" in place


def _uncommented(path: Path) -> str:
    lines = path.read_text().splitlines() if path.exists() else []
    return "\n".join(line for line in lines if not line.startswith("#"))


def _python_for_all(environment: dict[str, str]) -> str:
    """A Python that an ordinary user can run with our packages; without one the test is skipped."""
    for python in (sys.executable, SYSTEM_PYTHON):
        # Through a shell, or the program would still start with root's rights.
        words = shlex.join([python, "-c", "import numpy, mfusepy, vhdkit"])
        check = ["setpriv", f"--reuid={NOBODY_UID}", f"--regid={NOBODY_UID}", "--clear-groups", "sh", "-c", words]
        try:
            if subprocess.run(check, env=environment, capture_output=True, check=False, cwd="/").returncode == 0:
                return str(python)
        except OSError:
            continue
    pytest.skip("no Python here can be used by an ordinary user with our packages")


class Reachable:
    """Makes a folder reachable and writable for every user for a while."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before: list[tuple[Path, int]] = []

    def __enter__(self) -> None:
        for path in (self.folder, *self.folder.parents):
            mode = stat.S_IMODE(path.stat().st_mode)
            wanted = mode | (0o777 if path == self.folder else 0o005)
            if path != Path("/tmp") and str(path).startswith("/tmp/") and mode != wanted:
                self.before.append((path, mode))
                path.chmod(wanted)

    def __exit__(self, *exc_info: object) -> None:
        for path, mode in self.before:
            path.chmod(mode)


def test_without_a_fuse_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the device the message says how to get it, before an image is opened."""
    monkeypatch.setattr("vhdkit.serve.mount.host.FUSE_DEVICE", str(folder / "fuse"))
    assert "modprobe fuse" in failure("mount", "no.vhd", "mnt", code=1)
