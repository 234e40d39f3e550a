# SPDX-License-Identifier: Apache-2.0
"""What tests share: their requirements on the machine, where the samples are, which files belong to the project.

A test requests its tools here. If one is missing, the test is skipped with the reason on a developer's machine and
fails with it in CI (`CI=true`), so that a green run in CI has run everything. Only the samples are optional in both:
they are not part of the project.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from tests.vmm.guests.linux import LinuxGuest

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("vhdkit", "vmm", "tests", "benchmarks", "examples", "fuzz")
SYSTEM_PYTHON = "/usr/bin/python3"

_TOOL_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_DEBIAN_PACKAGE = {
    "7zz": "7zip",
    "as": "binutils",
    "busybox": "busybox-static",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "fio": "fio",
    "dpkg-deb": "dpkg",
    "losetup": "mount",
    "fsck.fat": "dosfstools",
    "fuse2fs": "fuse2fs",
    "dnsmasq": "dnsmasq-base",
    "fusermount3": "fuse3",
    "ip": "iproute2",
    "nft": "nftables",
    "tshark": "tshark",
    "ld": "binutils",
    "mcopy": "mtools",
    "mdel": "mtools",
    "mke2fs": "e2fsprogs",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkntfs": "ntfs-3g",
    "mount.fuse3": "fuse3",
    "ntfs-3g": "ntfs-3g",
    "ntfsfix": "ntfs-3g",
    "rsync": "rsync",
    "xfs_repair": "xfsprogs",
    "mkfs.fat": "dosfstools",
    "nbd": "python3-libnbd",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdkit": "nbdkit",
    "nbdsh": "python3-libnbd",
    "pyvhdi": "python3-libvhdi",
    "qemu-ga": "qemu-guest-agent",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "swapon": "mount",
    "tgtadm": "tgt",
    "tgtd": "tgt",
    "vhdiinfo": "libvhdi-utils",
    "wipefs": "util-linux",
    "xz": "xz-utils",
}


def in_ci() -> bool:
    """True if a missing tool must make a test fail."""
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def daily_or_nightly(daily: int, nightly: int) -> int:
    """How much of a matrix to run: a sample every day, the whole of it with `--nightly` (`tests/conftest.py`)."""
    return nightly if os.environ.get("VHDKIT_NIGHTLY") == "1" else daily


def not_available(reason: str) -> NoReturn:
    """End the test: skip it with the reason on a developer's machine, fail it in CI."""
    if in_ci():
        pytest.fail(f"{reason} (a test may not be skipped in CI)", pytrace=False)
    pytest.skip(reason)


def require_tool(name: str) -> str:
    """The full path of a command; ends the test if it is missing."""
    path = shutil.which(name, path=_TOOL_PATH)
    if path is None:
        not_available(f"needs the command {name}: {_how_to_get(name)}")
    return path


def require_root() -> None:
    """End the test unless it runs as root."""
    if os.geteuid() != 0:
        not_available("needs root")


def require_root_and_namespaces() -> None:
    """End the test unless it can make network namespaces: root, `ip`, and a kernel that allows it."""
    if os.geteuid() != 0:
        not_available("needs root, for network namespaces of its own")
    name = f"vmmt-probe-{os.getpid()}"
    if subprocess.run([require_tool("ip"), "netns", "add", name], check=False, capture_output=True).returncode:
        not_available("needs network namespaces, which this kernel or container does not let us make")
    subprocess.run(["ip", "netns", "del", name], check=False)


def require_module(name: str) -> None:
    """End the test unless this Python has the module."""
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that should contain it is missing
        found = False
    if not found:
        not_available(f"needs the Python module {name}: run script/setup")


def require_pyvhdi() -> str:
    """A Python interpreter that can `import pyvhdi`; ends the test if there is none.

    libvhdi's binding is a package of the system, so the system's interpreter has it and ours does not: run a small
    program with it (`run([require_pyvhdi(), "-c", program, path])`).
    """
    if not _imports(SYSTEM_PYTHON, "pyvhdi"):
        not_available(f"needs the module pyvhdi in {SYSTEM_PYTHON}: {_how_to_get('pyvhdi')}")
    return SYSTEM_PYTHON


def require_nbdkit() -> str:
    """nbdkit, with a python plugin that can load our modules; ends the test if there is none."""
    program = require_tool("nbdkit")
    dump = subprocess.run([program, "python", "--dump-plugin"], capture_output=True, text=True, check=False).stdout
    if not dump:
        not_available("needs nbdkit's python plugin: run script/setup, or install Debian's nbdkit-plugin-python")
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if f"\npython_version={ours}." not in dump:
        pytest.skip(f"nbdkit's Python is not {ours}, as ours is: nothing can load compiled modules of both")
    return program


def require_libnbd() -> str:
    """A Python interpreter that can `import nbd`; ends the test if there is none. libnbd's binding is the system's,
    too."""
    if not _imports(SYSTEM_PYTHON, "nbd"):
        not_available(f"needs the module nbd in {SYSTEM_PYTHON}: {_how_to_get('nbd')}")
    return SYSTEM_PYTHON


def require_qemu() -> str:
    """The machine emulator; ends the test if it is missing."""
    return require_tool("qemu-system-x86_64")


def require_boot_sector_guest() -> str:
    """QEMU and the tools that make the boot-sector guest (tests.vmm.guests.boot_sector); ends the test if one is
    missing."""
    require_tool("as")
    require_tool("ld")
    return require_qemu()


def require_linux_guest() -> LinuxGuest:
    """The Linux guest (tests.vmm.guests.linux), made if necessary, and QEMU; ends the test if one is missing."""
    from tests.vmm.guests import linux, tools

    require_qemu()
    try:
        return linux.linux_guest()
    except tools.GuestUnavailable as error:
        not_available(str(error))


def require_kvm() -> str:
    """QEMU, on a machine whose KVM this user may open; ends the test otherwise."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        not_available("needs /dev/kvm, readable and writable for this user")
    return require_qemu()


@cache
def _imports(interpreter: str, module: str) -> bool:
    if not os.access(interpreter, os.X_OK):
        return False
    return subprocess.run([interpreter, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def _how_to_get(name: str) -> str:
    package = _DEBIAN_PACKAGE.get(name)
    return "run script/setup" if package is None else f"run script/setup, or install Debian's package {package}"


def run(command: Sequence[str | os.PathLike[str]], *, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a program that must succeed; if it does not, the test fails with its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        words = " ".join(os.fspath(word) for word in command)
        pytest.fail(f"exit code {done.returncode} from: {words}\n{done.stdout}{done.stderr}", pytrace=False)
    return done


def _samples_folder() -> Path:
    configured = os.environ.get("VHDKIT_SAMPLES")
    return Path(configured) if configured else ROOT.parent / "shared" / "samples"


def samples_dir() -> Path:
    """The folder of real images: $VHDKIT_SAMPLES, else `../shared/samples` beside the project.

    If it is absent the test is skipped, even in CI: the samples are not part of the project.
    """
    folder = _samples_folder()
    if not folder.is_dir():
        pytest.skip(f"no samples: {folder} is not there (set VHDKIT_SAMPLES to the folder of sample images)")
    return folder


def sample(name: str) -> Path:
    """One file of the samples, by its path inside the folder."""
    path = samples_dir() / name
    if not path.exists():
        pytest.skip(f"no such sample: {path}")
    return path


def expected_samples(name: str = "expected.json") -> dict[str, dict[str, Any]]:
    """The expected content of the samples, from one of their `expected.json` files.

    Empty if the samples are absent, so that a `parametrize` over it can be collected everywhere (pytest then shows one
    skipped case).
    """
    try:
        text = (_samples_folder() / name).read_text(encoding="utf-8")
    except OSError:
        return {}
    content: dict[str, dict[str, Any]] = json.loads(text)
    return content


def python_files(*folders: str) -> Iterator[tuple[str, str]]:
    """(path from the root, text) of every Python file in these folders of the project, sorted."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def project_text_files() -> Iterator[tuple[str, str]]:
    """(path from the root, text) of every file written by hand: code, scripts, documents, settings."""
    yield from python_files(*CODE_FOLDERS)
    others = [path for folder in ("docs", "script", ".ci") for path in (ROOT / folder).rglob("*")]
    others += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / ".gitignore"]
    for path in sorted(others):
        if path.is_file() and path.suffix not in (".svg", ".png", ".json"):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
