# SPDX-License-Identifier: Apache-2.0
"""Errors: their words, their exit codes, and their way across a socket."""

from __future__ import annotations

import errno
import json

import pytest

from vmm import errors
from vmm.errors import InUse, NoSpace, NotFound, VmmError, WrongState, from_document, of_os_error, to_document

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VmmError)]


def test_one_line_with_machine_path_and_hint() -> None:
    """The sentence names machine, path and what to do; control characters cannot break the line."""
    error = WrongState("is\nrunning", machine="web", path="/x", hint="stop it: vmm stop web")
    assert str(error) == r"web: /x: is\nrunning (stop it: vmm stop web)"


@pytest.mark.parametrize("kind", ALL)
def test_crosses_a_socket(kind: type[VmmError]) -> None:
    """Every class comes back as itself, with its words and its code."""
    sent = kind("problem", machine="web", hint="do it")
    back = from_document(json.loads(json.dumps(to_document(sent))))
    assert type(back) is kind
    assert (str(back), back.exit_code) == (str(sent), sent.exit_code)


@pytest.mark.parametrize("document", [{}, {"kind": "VmmNothing"}, {"kind": "of_os_error"}, {"kind": 5, "problem": ""}])
def test_unknown_kinds_are_plain_errors(document: dict[str, object]) -> None:
    """What a newer or broken peer sends is an error of the base class, not a crash."""
    assert type(from_document(document)) is VmmError


def test_system_errors_keep_their_meaning() -> None:
    """ENOENT, EBUSY, ENOSPC become the classes a caller can tell apart; the file is named."""
    assert isinstance(of_os_error(FileNotFoundError(errno.ENOENT, "no", "/x"), "read"), NotFound)
    assert isinstance(of_os_error(OSError(errno.EBUSY, "busy"), "open", path="/x"), InUse)
    assert isinstance(of_os_error(OSError(errno.ENOSPC, "full"), "write"), NoSpace)
    assert str(of_os_error(FileNotFoundError(errno.ENOENT, "gone", "/x"), "read")) == "/x: could not read: gone"


def test_hints_name_no_option_that_vmm_does_not_have() -> None:
    """An option of vhdkit's beside a whole command of vhdkit's is said in vmm's words; the command stays."""
    said = (
        "name the folder it is in with --allow-parent-dir FOLDER, or repoint it: vhdkit rebase a.avhd --parent PARENT"
    )
    hint = errors.hint_of_vhdkit(said)
    assert hint is not None and "--allow-parent-dir" not in hint and "parent-dir=FOLDER" in hint
    assert hint.endswith("repoint it: vhdkit rebase a.avhd --parent PARENT")
    assert errors.hint_of_vhdkit("finish it: vhdkit merge a, or wait") == "finish it: vhdkit merge a, or wait"
