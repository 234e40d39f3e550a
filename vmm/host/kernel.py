# SPDX-License-Identifier: Apache-2.0
"""The features that this host's kernel permits, probed where a probe leaves no trace.

Decides how a feature is probed: in a network namespace that ends with the process that made it, with a system call on
a descriptor that is closed again, or by opening a device. The conclusions are drawn in `doctor`. Each probe returns
None if the feature works, otherwise the reason as text.

Sources: userfaultfd(2), ioctl_userfaultfd(2), unshare(1), ip-link(8), nft(8).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import re
import shutil
import struct
import subprocess

_SECONDS = 10.0
_USERFAULTFD_NUMBERS = {"x86_64": 323, "aarch64": 282}  # system call numbers
_UFFDIO_API, _UFFD_API, _UFFD_FEATURE_PAGEFAULT_FLAG_WP = 0xC018AA3F, 0xAA, 1


def device(path: str) -> str | None:
    """Try to open a device for reading and writing."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return f"{path}: {error.strerror}"
    os.close(fd)
    return None


def write_protecting_userfaultfd() -> str | None:
    """Try to get a userfaultfd that catches writes to protected memory, also those by the kernel (such as KVM)."""
    number = _USERFAULTFD_NUMBERS.get(platform.machine())
    if number is None:
        return f"not known on {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return f"userfaultfd: {os.strerror(ctypes.get_errno())}"
    try:
        fcntl.ioctl(fd, _UFFDIO_API, bytearray(struct.pack("=3Q", _UFFD_API, _UFFD_FEATURE_PAGEFAULT_FLAG_WP, 0)))
    except OSError as error:
        return f"userfaultfd cannot protect memory from writes: {error.strerror}"
    finally:
        os.close(fd)
    return None


def bridge() -> str | None:
    """Try to make a bridge."""
    return _in_namespace("ip", "link", "add", "name", "probe", "type", "bridge")


def bridge_vlan_filtering() -> str | None:
    """Try to make a bridge with VLAN filtering."""
    return _in_namespace("ip", "link", "add", "name", "probe", "type", "bridge", "vlan_filtering", "1")


def bridge_guards() -> str | None:
    """Try to make an nftables table for bridged packets."""
    return _in_namespace("nft", "add", "table", "bridge", "probe")


def _in_namespace(program: str, *words: str) -> str | None:
    """Run a command in its own network namespace, which disappears when the command ends."""
    path = shutil.which(program, path=program_path())
    if path is None:
        return f"this host has no command {program}"
    unshare = shutil.which("unshare", path=program_path())
    if unshare is None:
        return "this host has no command unshare"
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    try:
        done = subprocess.run(
            [unshare, *user, "--net", "--", path, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{program} did not end within {_SECONDS:.0f} s"
    except OSError as error:
        return f"unshare: {error.strerror}"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"{program} ended with {done.returncode}"]
    return re.sub(r"^RTNETLINK answers: |^Error: ", "", lines[0]).strip()


def program_path() -> str:
    """The search path for programs: includes the administrators' folders, which users often do not have in PATH."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
