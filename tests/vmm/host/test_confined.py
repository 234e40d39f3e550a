# SPDX-License-Identifier: Apache-2.0
"""What a program behind our system call filter cannot do, with a stand-in for QEMU; and the right by which memory is
captured."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.host import confined
from vmm.kvm import userfault
from vmm.kvm.process import Identity, privileged_command
from vmm.kvm.userfault import Way

NUMBERS = confined._ARCHITECTURES.get(os.uname().machine, (0, None, {}))[2]
# Calls that every process may make on itself, so that only the filter can refuse them.
STAND_IN = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *words):
    ctypes.set_errno(0)
    done = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, words))
    return 0 if done >= 0 else ctypes.get_errno()
me, numbers = os.getpid(), json.loads(sys.argv[1])
buffer, target = ctypes.create_string_buffer(b"secret"), ctypes.create_string_buffer(6)
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
local, remote = Vector(ctypes.addressof(target), 6), Vector(ctypes.addressof(buffer), 6)
ours, theirs = ctypes.addressof(local), ctypes.addressof(remote)
found = {
    "process_vm_readv": call(numbers["process_vm_readv"], me, ours, 1, theirs, 1, 0),
    "process_vm_writev": call(numbers["process_vm_writev"], me, ours, 1, theirs, 1, 0),
    "kcmp": call(numbers["kcmp"], me, me, 0, 0, 0),
    "pidfd_getfd": call(numbers["pidfd_getfd"], os.pidfd_open(me), 0, 0),
    "get_robust_list": call(numbers["get_robust_list"], 0, ours, theirs),
    "ptrace": call(numbers["ptrace"], 0, 0, 0, 0),
    "other table": call(0x40000000 + 39),
    "getppid": call({"x86_64": 110, "aarch64": 173}[os.uname().machine]),
    "read": target.raw.decode("latin-1"),
}
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
print(json.dumps(found | {"caps": status["CapEff"].strip(), "new": status["NoNewPrivs"].strip(), "uid": os.getuid()}))
"""


def stand_in(prefix: list[str]) -> dict[str, object]:
    """The result of the stand-in when it is started like this."""
    done = subprocess.run(
        [*prefix, sys.executable, "-I", "-S", "-c", STAND_IN, json.dumps(NUMBERS)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_confined_program_cannot_access_processes() -> None:
    """INV-CONFINED: reading, writing, tracing and comparing processes are refused, and everything else is allowed."""
    free = stand_in([])
    if free["process_vm_readv"] != 0:
        pytest.skip("needs a kernel, or container, that lets a process read its own memory")
    found = stand_in([sys.executable, "-I", "-S", confined.__file__, "--required", "--"])
    for name in ("process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "get_robust_list", "ptrace"):
        assert found[name] == errno.EPERM, name
    if os.uname().machine == "x86_64":
        assert found["other table"] == errno.EPERM
    assert found["getppid"] == 0 and found["new"] == "1"
    assert (free["read"], found["read"]) == ("secret", "\0" * 6)


def test_the_filter_applies_with_the_capability_too(tmp_path: Path) -> None:
    """INV-CONFINED: a QEMU that keeps CAP_SYS_PTRACE is refused these calls, too, and has no other capability."""
    if os.geteuid() != 0 or not os.access(sys.executable, os.X_OK) or not _all_may_run_python():
        pytest.skip("needs root, and a Python that every user may run")
    prefix = privileged_command(
        [], identity=Identity(61184), uses_kvm=False, capture=Way.CAPABILITY, scratch_folder=str(tmp_path)
    )
    assert "--required" in prefix
    found = stand_in(prefix)
    assert found["uid"] == 61184 and int(str(found["caps"]), 16) == 1 << 19
    assert found["process_vm_readv"] == found["ptrace"] == errno.EPERM
    without = privileged_command([], identity=Identity(61184), uses_kvm=False, scratch_folder=str(tmp_path))
    assert int(str(stand_in(without)["caps"]), 16) == 0


def test_a_kernel_without_filters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """INV-CONFINED: without a filter, a QEMU that would keep CAP_SYS_PTRACE is not started at all."""
    assert confined.filter_for("mips64") is None
    text = Path(confined.__file__).read_text().replace('"x86_64": (', '"no": (').replace('"aarch64": (', '"none": (')
    (tmp_path / "stripped.py").write_text(text)
    start = [sys.executable, "-I", "-S", str(tmp_path / "stripped.py")]
    done = subprocess.run(
        [*start, "--required", "--", "/bin/echo", "ran"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "CAP_SYS_PTRACE" in done.stderr and done.stdout == ""
    done = subprocess.run([*start, "--", "/bin/echo", "ran"], capture_output=True, text=True, check=True)
    assert done.stdout == "ran\n" and ": warning: " in done.stderr


@pytest.mark.parametrize("machine", sorted(confined._ARCHITECTURES))
def test_the_filter_refuses_exactly_its_table(machine: str) -> None:
    """INV-CONFINED: interpreted by hand, the program refuses exactly the numbers of its table, and foreign
    architectures."""
    program = [struct.unpack_from("=HBBI", confined.filter_for(machine) or b"", at) for at in range(0, 1000, 8)
               if at < len(confined.filter_for(machine) or b"")]  # fmt: skip
    architecture, foreign_from, numbers = confined._ARCHITECTURES[machine]

    def run(number: int, arch: int) -> int:
        value, at = 0, 0
        while True:
            code, if_true, if_false, word = program[at]
            if code == 0x20:
                value, jump = {0: number, 4: arch}[word], 0
            elif code == 0x06:
                return int(word)
            else:
                jump = if_true if (value == word if code == 0x15 else value >= word) else if_false
            at += 1 + jump

    refused = {number for number in range(600) if run(number, architecture) != 0x7FFF0000}
    assert refused == set(numbers.values())
    assert run(1, architecture ^ 1) == 0x00050000 | errno.EPERM
    if foreign_from is not None:
        assert run(foreign_from, architecture) == run(foreign_from + 310, architecture) == 0x00050000 | errno.EPERM


# -- by what right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("everybody", "has_device", "version", "way"),
    [
        ("1", True, "7.2.22", Way.EVERYBODY),
        ("0", True, "8.0.0", Way.DEVICE),
        ("0", True, "10.1.2", Way.DEVICE),
        ("0", True, "7.2.22", Way.CAPABILITY),
        ("0", False, "8.2.0", Way.CAPABILITY),
        (None, False, "8.2.0", Way.CAPABILITY),
    ],
)
def test_the_smallest_right_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everybody: str | None, has_device: bool, version: str, way: Way
) -> None:
    """None if every program may, the device if QEMU supports it, else the capability."""
    setting = tmp_path / "unprivileged"
    if everybody is not None:
        setting.write_text(everybody + "\n")
    monkeypatch.setattr(userfault, "works", lambda device: has_device)
    assert userfault.best_way(version, device="/dev/x", unprivileged=str(setting)) is way


def _all_may_run_python() -> bool:
    """True if a user without rights can start our interpreter."""
    done = subprocess.run(
        ["setpriv", "--reuid=61184", "--regid=61184", "--clear-groups", "--", sys.executable, "-I", "-S", "-c", ""],
        capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode == 0


def test_a_stand_in_for_a_newer_qemu_opens_the_device(tmp_path: Path) -> None:
    """A program that opens /dev/userfaultfd, as QEMU 8 does, gets a node without capabilities; the host's node is
    unchanged."""
    if os.geteuid() != 0 or not userfault.works():
        pytest.skip("needs root and /dev/userfaultfd (Linux 6.1)")
    before = os.stat(userfault.DEVICE)
    perl = (
        'open(my $f, "+<", "/dev/userfaultfd") or die "open: $!"; my $n = ioctl($f, 0xAA00, 0) or die "ioctl: $!"; '
        'open(my $s, "<", "/proc/self/status"); print grep { /CapEff|^Uid/ } <$s>;'
    )
    scratch = tmp_path / "dev"
    scratch.mkdir()
    command = privileged_command(
        ["perl", "-e", perl], identity=Identity(61184), uses_kvm=False, capture=Way.DEVICE, scratch_folder=str(scratch)
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CapEff:\t0000000000000000" in done.stdout and "61184" in done.stdout
    after = os.stat(userfault.DEVICE)
    assert (before.st_ino, before.st_mode, before.st_uid) == (after.st_ino, after.st_mode, after.st_uid)
    command = privileged_command(
        ["perl", "-e", perl], identity=Identity(61184), uses_kvm=False, scratch_folder=str(scratch)
    )
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0  # unless it was requested


@pytest.mark.parametrize(("text", "answer"), [("1\n", True), ("0\n", False), ("", False)])
def test_whether_every_program_may_use_userfaultfd(text: str, answer: bool, tmp_path: Path) -> None:
    """The kernel's switch is read; without it the answer is no."""
    switch = tmp_path / "switch"
    assert not userfault.is_for_everybody(str(switch))
    switch.write_text(text)
    assert userfault.is_for_everybody(str(switch)) is answer
