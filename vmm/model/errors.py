# SPDX-License-Identifier: Apache-2.0
"""Every error of the machine manager, with the exit code of the command line.

Decides how a failure is named and worded: one line with the machine, the file, what happened and what to do next.
Knows nothing about machines. A caller catches `VmmError`, or the subclass that it can handle. `to_document` and
`from_document` carry an error, with its class, across the worker's control socket.

Exit codes: 1 failed, 2 an impossible request, 5 in use or in the wrong state, 6 refused for safety, 7 no space,
8 the host lacks something, 9 it took too long.
"""

from __future__ import annotations

import errno
import re
from typing import Any

import vhdkit

EXIT_FAILED = 1


class VmmError(Exception):
    """Base of all errors of vmm.

    `problem` states what happened; `machine` and `path` name the machine, file or device; `hint` says what to do next.
    """

    exit_code: int = EXIT_FAILED

    def __init__(
        self,
        problem: str,
        *,
        machine: str | None = None,
        path: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.machine = machine
        self.path = path
        self.hint = hint
        super().__init__(problem)

    def __str__(self) -> str:
        place = [printable(part) for part in (self.machine, self.path) if part is not None]
        text = printable(": ".join([*place, self.problem]))
        if not self.hint:
            return text
        hint = printable(self.hint)
        return f"{text}; {hint}" if "(" in hint else f"{text} ({hint})"  # no nested brackets


def printable(text: str) -> str:
    """`text` on one line, control characters and undecodable bytes escaped: names and messages come from outside."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


class InvalidSpec(VmmError):
    """An impossible machine or change to a machine: a bad name, an exceeded limit, mutually exclusive options."""

    exit_code = 2


class NotFound(VmmError):
    """The machine, disk, adapter, file or device does not exist."""


class AlreadyExists(VmmError):
    """The name is taken, or the file to create is already there."""


class WrongState(VmmError):
    """The operation is not possible in the machine's current state."""

    exit_code = 5


class InUse(VmmError):
    """Another machine, program or command is using it."""

    exit_code = 5


class AccessDenied(VmmError):
    """The operating system denied access."""


class Refused(VmmError):
    """The operation is possible but would endanger data."""

    exit_code = 6


class Unsupported(VmmError):
    """The host lacks a feature; the hint is the command that installs or enables it."""

    exit_code = 8


class BadConfiguration(VmmError):
    """The file that describes a machine of Hyper-V is damaged, or of a kind that is not read."""


class QemuFailed(VmmError):
    """QEMU refused a command, exited unexpectedly, or gave an unexpected answer."""


class AgentUnavailable(VmmError):
    """The guest agent is disabled, not yet connected, or does not answer."""


class TimedOut(VmmError):
    """The operation did not finish within its time limit."""

    exit_code = 9


class NoSpace(VmmError):
    """The file system or the quota is full."""

    exit_code = 7


class StoreFailed(VmmError):
    """A disk image or its server failed; `problem` is vhdkit's message."""


_OWN_WORDS = {  # options of vhdkit's command line, and how vmm's command line expresses them
    "--allow-parent-dir": "add the disk as IMAGE,parent-dir=FOLDER (first: vmm disk remove, if the machine already"
    " has it)",
    "--allow-raw-parent": "add the disk as IMAGE,allow-raw-parent (first: vmm disk remove, if the machine already"
    " has it)",
}
_TRUST = "if you trust it, "
_COMMAND = re.compile(r"\bvhdkit (?!for\b)[a-z]+")  # "vhdkit check FILE --repair"; not "install vhdkit for ..."
_BARE_VERB = re.compile(r"`(?!vmm )[a-z-]+(?: --[a-z-]+)*`")  # "`status` says how far it is"
_ON_THE_CHILD = "work on the child instead"  # hint for an image that is the parent of another
_RECORDED_SECTORS = "'sector_bytes'"  # in the hint for an image whose sector size is not the recorded one
_SHARED_OPTIONS = ("--shrink",)  # options that vmm has as well


def store_error(error: vhdkit.VhdkitError) -> VmmError:
    """A vhdkit error as a vmm error with the same problem and exit code, and a hint that fits vmm."""
    kinds: tuple[tuple[type[vhdkit.VhdkitError], type[VmmError]], ...] = (
        (vhdkit.NoSpace, NoSpace),
        (vhdkit.ImageInUse, InUse),
    )
    kind = next((ours for theirs, ours in kinds if isinstance(error, theirs)), StoreFailed)
    ours = kind(error.problem, path=error.path, hint=hint_of_vhdkit(error.hint))
    ours.exit_code = error.exit_code
    return ours


def hint_of_vhdkit(hint: str | None) -> str | None:
    """vhdkit's hint in terms of vmm's commands; None if it is useful only on vhdkit's own command line."""
    if hint is None:
        return None
    first, otherwise, last = hint.rpartition("; if ")  # the general advice, and a special case
    if otherwise:
        return "; ".join(part for part in (hint_of_vhdkit(first), hint_of_vhdkit(f"if {last}")) if part) or None
    first, _, rest = hint.partition(", or ")
    if rest and _COMMAND.search(rest) and not _COMMAND.search(first):  # the first part is about an option
        return ", or ".join(part for part in (hint_of_vhdkit(first), rest) if part)
    if _COMMAND.search(hint):  # a whole command
        return hint
    if _BARE_VERB.search(hint):  # a verb of the program that the user ran, which is vmm
        return None
    if _RECORDED_SECTORS in hint:
        return "if this is the right image, take the disk from the machine (vmm disk remove) and add it (vmm disk add)"
    if hint.startswith(_ON_THE_CHILD):
        return "vmm repair MACHINE checks whether that is the newest image of the disk, and then uses it"
    options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", hint)
    for option, words in _OWN_WORDS.items():
        if option in options:
            folder = hint.partition(f"{option} ")[2]
            words = words.replace("FOLDER", folder) if folder else words
            return _TRUST + words if hint.startswith(_TRUST) else words
    return hint if all(option in _SHARED_OPTIONS for option in options) else None


def to_document(error: VmmError) -> dict[str, Any]:
    """The error as JSON: for the control socket and for --json."""
    return {
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
        "message": str(error),
        "problem": error.problem,
        "machine": error.machine,
        "path": error.path,
        "hint": error.hint,
    }


def from_document(document: dict[str, Any]) -> VmmError:
    """The error that `to_document` described; a plain VmmError if its class is unknown here."""
    kind = globals().get(str(document.get("kind")))
    if not (isinstance(kind, type) and issubclass(kind, VmmError)):
        kind = VmmError
    words = {name: document.get(name) for name in ("machine", "path", "hint")}
    error: VmmError = kind(
        str(document.get("problem") or document.get("message") or "failed"),
        **{name: str(value) for name, value in words.items() if value is not None},
    )
    code = document.get("exit_code")
    if isinstance(code, int) and not isinstance(code, bool):
        error.exit_code = code
    return error


def of_os_error(error: OSError, doing: str, *, machine: str | None = None, path: str | None = None) -> VmmError:
    """The VmmError for an error of the operating system; `doing` completes "could not ..."."""

    kinds: dict[int | None, type[VmmError]] = {
        errno.ENOENT: NotFound,
        errno.ENOTDIR: NotFound,
        errno.EEXIST: AlreadyExists,
        errno.EACCES: AccessDenied,
        errno.EPERM: AccessDenied,
        errno.EROFS: AccessDenied,
        errno.ENOSPC: NoSpace,
        errno.EDQUOT: NoSpace,
        errno.EBUSY: InUse,
        errno.ETXTBSY: InUse,
    }
    if path is None and error.filename is not None:
        path = str(error.filename)
    reason = error.strerror or str(error) or type(error).__name__
    return kinds.get(error.errno, VmmError)(f"could not {doing}: {reason}", machine=machine, path=path)
