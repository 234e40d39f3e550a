# SPDX-License-Identifier: Apache-2.0
"""The installed QEMU: its path, its version, and the features of this build.

Decides where QEMU is searched and what is queried before any machine starts. Must not know machines. Every fact comes
from the program itself, with a time limit, and is valid for the file that reported it (`identity`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from vmm.model.errors import QemuFailed, TimedOut, Unsupported

SYSTEM_PROGRAM = "qemu-system-x86_64"
INSTALL_HINT = "install QEMU: sudo apt install qemu-system-x86"
_ANSWER_SECONDS = 20.0  # enough for a cold start from a slow disk
_VERSION = re.compile(r"version (\d+(?:\.\d+)+)")


@dataclass(frozen=True, slots=True)
class Program:
    """A QEMU: its path, its version ("7.2.22"), and the accelerators it was built with."""

    path: str
    version: str
    accelerators: tuple[str, ...]


def find(name: str = SYSTEM_PROGRAM) -> str:
    """The path of one of QEMU's programs. Raises Unsupported if there is none."""
    path = shutil.which(name)
    if path is None:
        raise Unsupported(f"{name} is not in PATH", hint=INSTALL_HINT)
    return path


def identity(path: str) -> str:
    """A string that changes when the file is replaced: device, inode, size, time."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise Unsupported(f"cannot be used: {error.strerror}", path=path, hint=INSTALL_HINT) from error
    return f"{path} {facts.st_dev} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns}"


def inspect(path: str) -> Program:
    """Query a QEMU's version and accelerators: about 80 ms. Raises QemuFailed, TimedOut or Unsupported."""
    found = _VERSION.search(answer([path, "--version"]))
    if found is None:
        raise QemuFailed("does not report its version", path=path)
    # The first line is a heading, then one name per line.
    names = answer([path, "-accel", "help"]).split("\n")[1:]
    return Program(path, found[1], tuple(name.strip() for name in names if name.strip()))


def answer(command: list[str], *, keep: tuple[int, ...] = ()) -> str:
    """The output of a successful program; `keep` are descriptors that it inherits.

    Raises QemuFailed with its last line, TimedOut, or Unsupported if it cannot be started.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_ANSWER_SECONDS,
            check=False,
            pass_fds=keep,
        )
    except subprocess.TimeoutExpired as error:
        raise TimedOut(f"did not answer within {_ANSWER_SECONDS:.0f} s", path=command[0]) from error
    except OSError as error:
        raise Unsupported(f"cannot be started: {error.strerror}", path=command[0], hint=INSTALL_HINT) from error
    if done.returncode != 0:
        said = done.stderr.strip().split("\n")[-1]
        raise QemuFailed(f"ended with code {done.returncode}{': ' + said if said else ''}", path=command[0])
    return done.stdout
