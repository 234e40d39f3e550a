# SPDX-License-Identifier: Apache-2.0
"""Real mounts for tests: their requirements, and that none is left behind, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support import ROOT, in_ci, not_available, require_module, require_tool, run
from tests.waiting import wait_until
from tests.warm_commands import warm

COMMAND = (sys.executable, "-m", "vhdkit")
SECONDS = 250.0  # flushing may take long on a busy disk; the test runner gives up at 300


def require_fuse() -> None:
    """Skip the test unless FUSE mounts are possible."""
    require_module("mfusepy")
    require_tool("fusermount3")
    try:
        is_device = stat.S_ISCHR(os.stat("/dev/fuse").st_mode)
    except OSError:
        is_device = False
    if not is_device or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        not_available("needs /dev/fuse, open to us")


def require_root() -> None:
    """Skip the test unless it runs as root, even in CI, where an ordinary user may be intended."""
    if os.geteuid() != 0:
        not_available("needs root")


def require_loop() -> None:
    """Skip the test without loop devices, which require root."""
    require_root()
    require_tool("losetup")
    if not os.path.exists("/dev/loop-control"):
        not_available("needs loop devices")


SHARING = ("xfs", "btrfs")  # the file systems that share space between files


@contextlib.contextmanager
def file_system(folder: Path, kind: str, image: Path | None = None) -> Iterator[Path]:
    """A file system of that kind, a new one or that of an image, mounted inside `folder` until the block ends.

    Needs root. A new one lies in `folder`, in KIND.img; the image is removed at the end.
    """
    require_loop()
    mountpoint = folder / kind
    mountpoint.mkdir(exist_ok=True)
    if image is None:
        image = folder / f"{kind}.img"
        with image.open("wb") as file:
            file.truncate(512 << 20)
        run([require_tool(f"mkfs.{kind}"), "-q", image])
    # XFS refuses a second file system with one UUID, and the first stays mounted as long as any process has a
    # mount namespace made while it was: another test's, for instance. Btrfs copes with that itself.
    options = "loop,nouuid" if kind == "xfs" else "loop"
    done = subprocess.run(["mount", "-o", options, image, mountpoint], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        not_available(f"cannot mount a file system of the kind {kind}: {done.stderr.strip()}")
    try:
        yield mountpoint
    finally:
        run(["umount", mountpoint])
        image.unlink()


def copy_as_after_power_cut(image: Path, target: Path) -> None:
    """Copy the image of a mounted file system as a power cut at one moment would leave it.

    The kernel writes back in the background while the file is copied; a copy that mixes two moments is one that no
    power cut leaves. So it is made again until the image is still the same after it.
    """

    def is_of_one_moment() -> bool:
        run(["cp", "--sparse=always", image, target])
        return subprocess.run(["cmp", "-s", image, target], check=False).returncode == 0

    wait_until(is_of_one_moment, f"{image} stays the same while it is copied", SECONDS)


def vhdkit(*words: str | Path, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command as a separate process, which must end with this code."""
    changed = options.pop("env", {})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **changed}
    started = (
        COMMAND if "PYTHONPATH" in changed else warm("vhdkit")
    )  # a module that changes the command is loaded at its start
    done = subprocess.run(
        [*started, *map(str, words)], capture_output=True, text=True, timeout=SECONDS, check=False, env=environment,
        **options,
    )  # fmt: skip
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done


@contextlib.contextmanager
def mounted(image: Path, mountpoint: Path, *words: str | Path) -> Iterator[Path]:
    """`vhdkit mount`, and at the end `vhdkit umount`, which must succeed."""
    if not mountpoint.exists():
        mountpoint.mkdir()
    with cleaned(mountpoint):
        vhdkit("mount", image, mountpoint, *words)
        yield mountpoint
        vhdkit("umount", mountpoint)
        assert not is_mounted(mountpoint)


@contextlib.contextmanager
def cleaned(mountpoint: Path) -> Iterator[None]:
    """Whatever is left at the mount point at the end is removed by force."""
    try:
        yield
    finally:
        deadline = time.monotonic() + SECONDS
        while is_mounted(mountpoint) and time.monotonic() < deadline:
            subprocess.run(
                [*COMMAND, "umount", "--force" if os.geteuid() == 0 else "--lazy", str(mountpoint)], check=False,
                capture_output=True, timeout=SECONDS, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip


def is_mounted(path: Path) -> bool:
    """True if it is mounted; does not access the mount itself, whose server may be dead."""
    wanted = str(path).replace(" ", "\\040")
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.split(" ")[4] == wanted for line in lines)


def kill(pid: int) -> None:
    """kill -9, and wait until the process is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_until(is_gone, f"process {pid} ends", SECONDS)


def can_mount_kernel(kind: str) -> bool:
    """True if the kernel has this file system; in CI it must."""
    found = f"\t{kind}\n" in Path("/proc/filesystems").read_text()
    if not found and in_ci():
        not_available(f"needs a kernel with {kind}")
    return found
