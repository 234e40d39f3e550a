# SPDX-License-Identifier: Apache-2.0
"""Errors: their messages, their exit codes, and how they are sent over a socket."""

from __future__ import annotations

import ast
import errno
import json
import re
from collections.abc import Iterator

import click
import pytest

from tests.support import ROOT
from vmm.cli.main import main as vmm_command
from vmm.model import errors
from vmm.model.errors import InUse, NoSpace, NotFound, VmmError, WrongState, from_document, of_os_error, to_document

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VmmError)]


def test_one_line_with_machine_path_and_hint() -> None:
    """The message names machine, path and what to do; control characters cannot break the line."""
    error = WrongState("is\nrunning", machine="web", path="/x", hint="stop it: vmm stop web")
    assert str(error) == r"web: /x: is\nrunning (stop it: vmm stop web)"


@pytest.mark.parametrize("kind", ALL)
def test_errors_cross_a_socket(kind: type[VmmError]) -> None:
    """Every class is restored, with its message and its code."""
    sent = kind("problem", machine="web", hint="do it")
    back = from_document(json.loads(json.dumps(to_document(sent))))
    assert type(back) is kind
    assert (str(back), back.exit_code) == (str(sent), sent.exit_code)


@pytest.mark.parametrize("document", [{}, {"kind": "VmmNothing"}, {"kind": "of_os_error"}, {"kind": 5, "problem": ""}])
def test_unknown_kinds_are_plain_errors(document: dict[str, object]) -> None:
    """An error from a newer or broken peer is of the base class, not a crash."""
    assert type(from_document(document)) is VmmError


def test_system_errors_keep_their_meaning() -> None:
    """ENOENT, EBUSY and ENOSPC become the classes that a caller can distinguish; the message names the file."""
    assert isinstance(of_os_error(FileNotFoundError(errno.ENOENT, "no", "/x"), "read"), NotFound)
    assert isinstance(of_os_error(OSError(errno.EBUSY, "busy"), "open", path="/x"), InUse)
    assert isinstance(of_os_error(OSError(errno.ENOSPC, "full"), "write"), NoSpace)
    assert str(of_os_error(FileNotFoundError(errno.ENOENT, "gone", "/x"), "read")) == "/x: could not read: gone"


def test_hints_name_only_options_of_vmm() -> None:
    """An option of vhdkit next to a whole command of vhdkit is replaced by vmm's words; the command stays."""
    said = (
        "name the folder that the parent is in with --allow-parent-dir FOLDER, or repoint it:"
        " vhdkit rebase a.avhd --parent PARENT"
    )
    hint = errors.hint_of_vhdkit(said)
    assert (
        hint is not None and "--allow-parent-dir" not in hint and "parent-dir=FOLDER" in hint and "trust" not in hint
    )
    assert hint.endswith("repoint it: vhdkit rebase a.avhd --parent PARENT")
    assert errors.hint_of_vhdkit("finish it: vhdkit merge a, or wait") == "finish it: vhdkit merge a, or wait"


def _texts(node: ast.AST) -> Iterator[str]:
    """The text constants in an expression; X stands for the values of an f-string."""
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            yield "".join(str(one.value) if isinstance(one, ast.Constant) else "X" for one in part.values)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def _hints() -> set[str]:
    """Every hint that the library may give, collected from its source."""
    found: set[str] = set()
    for path in sorted((ROOT / "vhdkit").rglob("*.py")):
        if "cli" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.keyword) and node.arg == "hint") or (
                isinstance(node, ast.Assign) and any("hint" in ast.unparse(one).lower() for one in node.targets)
            ):
                found.update(_texts(node.value))
    return found


def _options(command: click.Command) -> set[str]:
    """All options of a command and those below it."""
    own = {word for one in command.params for word in (*one.opts, *one.secondary_opts)}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            own |= _options(below)
    return own


def test_all_hints_of_the_library_fit_vmm() -> None:
    """Whatever vhdkit advises, vmm's version names only vmm's options and verbs, and whole commands of vhdkit."""
    hints = _hints()
    assert len(hints) > 80 and any("--allow-parent-dir" in hint for hint in hints)
    known, checked = _options(vmm_command), 0
    for hint in hints:
        ours = errors.hint_of_vhdkit(hint)
        if ours is None:
            continue
        checked += 1
        alone = re.sub(r"`?vhdkit (?!for )[a-z]+[^`;]*`?", "", ours)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", alone)) <= known, (hint, ours)
        assert not re.search(r"`(?!vmm |vhdkit |chmod )[a-z-]+`", ours), (hint, ours)
    assert checked > 40
