# SPDX-License-Identifier: Apache-2.0
"""QEMU as a process: its privileges, how it is started, and what it printed when it ended.

Decides which signals QEMU ignores, and its privileges. It is untrusted: if we are root, it gets a user of its own, no
capabilities, no way to gain any (no-new-privs), its own system call filter and one of ours (`confined`). If only root
may use the host's /dev/kvm, QEMU gets a node of its own in a mount namespace of its own, and the host's node is left
as it is. Must not know what the command line means.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.host import confined
from vmm.host.proc import ProcessRef, spawn_detached
from vmm.host.users import user_of
from vmm.model.errors import AccessDenied, QemuFailed, Unsupported, of_os_error

if TYPE_CHECKING:
    from vmm.kvm.userfault import Way

KVM_DEVICE = "/dev/kvm"
_TAIL_BYTES = 16 << 10
UNHEARD_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# The machine's own device nodes. Arguments: a folder, the user, path, major and minor of each, --, the command.
_OWN_NODES_SCRIPT = (
    'set -e; folder="$1"; user="$2"; shift 2; mount -t tmpfs -o mode=0755,size=4k,nr_inodes=8 vmm "$folder"; '
    'while [ "$1" != -- ]; do node="$folder/${1##*/}"; mknod -m 600 "$node" c "$2" "$3"; chown "$user:$user" "$node"; '
    'mount --bind "$node" "$1"; shift 3; done; shift; exec "$@"'
)


@dataclass(frozen=True, slots=True)
class Identity:
    """The user and group that QEMU runs as, used by one machine only."""

    user_id: int

    @property
    def owner(self) -> tuple[int, int]:
        """(user, group), for `chown`."""
        return self.user_id, self.user_id


def identity_of(machine_id: str) -> Identity | None:
    """The user of a machine, derived from its id; None if QEMU runs as we do (not root). Raises Unsupported."""
    number = user_of(machine_id)
    return None if number is None else Identity(number)


def check_reachable(folder: str, identity: Identity | None) -> None:
    """Raise AccessDenied if QEMU's user cannot enter a parent of the runtime folder, whose own mode is right."""
    if identity is None:
        return
    parent = os.path.dirname(folder)
    while True:
        facts = os.stat(parent)
        if not facts.st_mode & stat.S_IXOTH:
            raise AccessDenied(
                "cannot be entered by the user that QEMU runs as",
                path=parent,
                hint=f"chmod o+x {parent}, or set VMM_RUNTIME to another folder",
            )
        if parent == os.path.dirname(parent):
            return
        parent = os.path.dirname(parent)


def kvm_access(identity: Identity | None) -> tuple[bool, int | None]:
    """(whether QEMU needs its own /dev/kvm node, the group that permits access); usually (False, None)."""
    if identity is None:
        return False, None
    facts = os.stat(KVM_DEVICE)
    if facts.st_mode & 0o006 == 0o006:
        return False, None
    if facts.st_mode & 0o060 == 0o060 and facts.st_gid != 0:
        return False, facts.st_gid
    return True, None


def privileged_command(
    command: Sequence[str],
    *,
    identity: Identity | None,
    uses_kvm: bool,
    scratch_folder: str,
    capture: Way | None = None,
) -> list[str]:
    """The command that starts `command` with the fewest possible privileges. Raises Unsupported.

    `capture`: how QEMU gets the right to write-protect memory, if we are root: DEVICE gives it its own node,
    CAPABILITY leaves it CAP_SYS_PTRACE and nothing else. `scratch_folder` is where a file system with device nodes may
    be mounted, visible to no other process.
    """
    if shutil.which("setpriv") is None:
        raise Unsupported("setpriv, which drops QEMU's rights, is not installed", hint="sudo apt install util-linux")
    drop = ["setpriv", "--no-new-privs"]
    if identity is None:
        return _confined([*drop, "--", *command])
    from vmm.kvm.userfault import DEVICE, Way  # not needed by the command line, which starts nothing

    own_kvm, group = kvm_access(identity) if uses_kvm else (False, None)
    nodes = [*([KVM_DEVICE] if own_kvm else []), *([DEVICE] if capture is Way.DEVICE else [])]
    keeps_ptrace = capture is Way.CAPABILITY
    kept = ",+sys_ptrace" if keeps_ptrace else ""
    drop += [f"--reuid={identity.user_id}", f"--regid={identity.user_id}"]
    drop += ["--clear-groups"] if group is None else [f"--groups={group}"]
    drop += [f"--inh-caps=-all{kept}", f"--ambient-caps=-all{kept}", f"--bounding-set=-all{kept}"]
    return _confined([*_own_nodes(nodes, identity, scratch_folder), *drop, "--", *command], required=keeps_ptrace)


def _confined(command: Sequence[str], *, required: bool = False) -> list[str]:
    """The command that starts `command` behind our system call filter."""
    return [sys.executable, "-I", "-S", confined.__file__, *(["--required"] if required else []), "--", *command]


def _own_nodes(nodes: Sequence[str], identity: Identity, scratch_folder: str) -> list[str]:
    """The beginning of a command that makes these devices available to QEMU's user, and to no other process."""
    if not nodes:
        return []
    words = ["unshare", "--mount", "--propagation", "slave", "--", "/bin/sh", "-c", _OWN_NODES_SCRIPT, "vmm"]
    words += [scratch_folder, str(identity.user_id)]
    for node in nodes:
        number = os.stat(node).st_rdev
        words += [node, str(os.major(number)), str(os.minor(number))]
    return [*words, "--"]


@dataclass(slots=True)
class QemuProcess:
    """A QEMU that was started here, or was found running."""

    ref: ProcessRef
    log_path: str
    log_offset: int = 0

    def last_words(self) -> str | None:
        """The last error message since it was started; None if it printed only warnings."""
        with contextlib.suppress(OSError), open(self.log_path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self.log_offset, size - _TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
            telling = [line for line in lines if ": warning: " not in line and ": info: " not in line]
            if telling:
                return _without_description(telling[-1].removeprefix("qemu-system-x86_64: "))
        return None


def _without_description(words: str) -> str:
    """An error message about `-blockdev {...}: ` or similar, reduced to the name of the object."""
    option = re.match(r"-[a-z]+ (?=\{)", words)
    if option is None:
        return words
    try:
        document, end = json.JSONDecoder().raw_decode(words, option.end())
    except ValueError:
        return words
    name = document.get("node-name") or document.get("id")
    return f"{name}{words[end:]}" if name and words[end:].startswith(": ") else words


def start_qemu(command: Sequence[str], *, log_path: str, descriptors: Mapping[int, int]) -> QemuProcess:
    """Start QEMU. Raises QemuFailed, AccessDenied, NotFound."""
    offset = 0
    with contextlib.suppress(FileNotFoundError):
        offset = os.stat(log_path).st_size
    try:
        # QEMU would power the guest off on these signals, and stopping the host sends them to all processes.
        pid = spawn_detached(command, log_path=log_path, descriptors=descriptors, blocked_signals=UNHEARD_SIGNALS)
    except OSError as error:
        raise of_os_error(error, f"start {command[0]}") from error
    ref = ProcessRef.of(pid)
    process = QemuProcess(ref or ProcessRef(pid, 0), log_path, offset)
    if ref is None:
        raise QemuFailed("QEMU ended at once", hint=f"its output is in {log_path}")
    return process


def reap(ref: ProcessRef) -> int | None:
    """The exit status of a process that has ended; None if it is not our child or still runs."""
    try:
        pid, status = os.waitpid(ref.pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if pid else None


def private_copy(path: str, target: str, identity: Identity | None) -> str:
    """A file that QEMU may read: the file itself if QEMU runs as we do, else a copy that belongs to QEMU's user.

    Raises NotFound, AccessDenied, NoSpace.
    """
    try:
        if identity is None:
            with open(path, "rb"):
                return path
        with open(path, "rb") as source, open(target, "xb", opener=_private) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
            os.fchown(copy.fileno(), *identity.owner)
            os.fchmod(copy.fileno(), 0o400)
    except OSError as error:
        raise of_os_error(error, "read the file", path=path) from error
    return target


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
