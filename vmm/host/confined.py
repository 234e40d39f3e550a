# SPDX-License-Identifier: Apache-2.0
"""Starts a program that cannot access other processes: installs a small system call filter, then calls exec.

Decides which system calls QEMU never needs but an escaped guest would use: those that read or write another process's
memory, take its descriptors or trace it (permitted by CAP_SYS_PTRACE, or, without root, by the shared user id).
QEMU's own filter does not include them. The filter is installed before exec, so it is in force from QEMU's first
instruction, and for the programs in between (`unshare`, `setpriv`). Imports nothing of ours: it runs as an isolated
script.

    python -I -S confined.py [--required] -- COMMAND...

If the kernel does not support filters, QEMU's log gets a warning, or, with `--required`, an error. Access through
files is not filtered: /proc/PID/mem of root's processes belongs to root, and QEMU's user may not open it.

Sources: seccomp(2), Linux's Documentation/userspace-api/seccomp_filter.rst, audit.h, filter.h and seccomp.h of
include/uapi/linux, and the tables of system calls in arch/*/.

INV-CONFINED: no machine's QEMU can use these system calls, whatever its other privileges.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from typing import NoReturn

# Architecture -> (AUDIT_ARCH_*, first number of a second table that is refused as a whole, the numbers).
_ARCHITECTURES: dict[str, tuple[int, int | None, dict[str, int]]] = {
    "x86_64": (0xC000003E, 0x40000000, {
        "ptrace": 101, "migrate_pages": 256, "get_robust_list": 274, "move_pages": 279, "perf_event_open": 298,
        "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "bpf": 321, "pidfd_getfd": 438,
        "process_madvise": 440, "process_mrelease": 448,
    }),
    "aarch64": (0xC00000B7, None, {
        "get_robust_list": 100, "ptrace": 117, "migrate_pages": 238, "move_pages": 239, "perf_event_open": 241,
        "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "bpf": 280, "pidfd_getfd": 438,
        "process_madvise": 440, "process_mrelease": 448,
    }),
}  # fmt: skip
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, JGE, BPF_RET|K
_AT_NUMBER, _AT_ARCHITECTURE = 0, 4  # in struct seccomp_data
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_for(machine: str) -> bytes | None:
    """The filter in the kernel's format: refuses with EPERM. None for an architecture whose numbers we do not know."""
    if machine not in _ARCHITECTURES:
        return None
    architecture, foreign_from, numbers = _ARCHITECTURES[machine]
    refused = [(_JUMP_EQUAL, number) for number in sorted(numbers.values())]
    if foreign_from is not None:
        refused.insert(0, (_JUMP_AT_LEAST, foreign_from))
    words = [(_LOAD, 0, 0, _AT_ARCHITECTURE), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _REFUSE),
             (_LOAD, 0, 0, _AT_NUMBER)]  # fmt: skip
    # A match jumps past the remaining tests and past the allow instruction.
    words += [(code, len(refused) - index, 0, value) for index, (code, value) in enumerate(refused)]
    words += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *word) for word in words)


def confine(machine: str) -> str | None:
    """Install the filter for this process and its descendants. None on success, otherwise the reason."""
    instructions = filter_for(machine)
    if instructions is None:
        return f"vmm has no system call filter for {machine}"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    program = _Program(len(instructions) // 8, instructions)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, None, 0, 0) != 0:
        return f"no-new-privs cannot be set: {os.strerror(ctypes.get_errno())}"
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        return f"the kernel does not accept a system call filter: {os.strerror(ctypes.get_errno())}"
    return None


def main() -> None:
    """Entry point: becomes the command."""
    words = sys.argv[1:]
    end = words.index("--")
    problem = confine(os.uname().machine)
    if problem is not None:
        if "--required" in words[:end]:
            _end(f"vmm: QEMU may not keep CAP_SYS_PTRACE: {problem}")
        os.write(2, f"vmm: warning: {problem}\n".encode())
    command = words[end + 1 :]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        _end(f"vmm: cannot start {command[0]}: {error.strerror}")


def _end(words: str) -> NoReturn:  # net/enclosed has the same: neither script imports anything of ours
    """Exit without starting anything. Our standard error is QEMU's log, whose last line is reported."""
    os.write(2, f"{words}\n".encode())
    os.execvp("false", ["false"])


if __name__ == "__main__":
    main()
