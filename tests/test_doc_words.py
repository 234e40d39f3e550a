# SPDX-License-Identifier: Apache-2.0
"""Commands that a page, a help text or a docstring mentions exist: the verb, and each of its options."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from tests.doc_commands import pages
from tests.support import ROOT, python_files
from vhdkit.cli.main import main as vhdkit_main
from vmm.cli.main import main as vmm_main

ROOTS: dict[str, click.Command] = {"vhdkit": vhdkit_main, "vmm": vmm_main}
WITHOUT_JSON = ("vmm console",)  # its output is the guest's
_MENTIONED = re.compile(r"`((?:vhdkit|vmm) [a-z][^`]*)`")
_IN_CODE = re.compile(r"`((?:vhdkit|vmm) [a-z][^`{}]*)`")


def options_of(command: click.Command) -> set[str]:
    """Every spelling of every option."""
    found = {"--help", "-h"}
    for one in command.params:
        if isinstance(one, click.Option):
            found |= {*one.opts, *one.secondary_opts}
    return found


def complaint(text: str) -> str | None:
    """What is wrong with a mentioned command; None if its verb and options exist."""
    words = re.sub(r"\s+", " ", text.split(" -- ")[0]).split(" ")
    command = ROOTS[words[0]]
    rest = words[1:]
    while isinstance(command, click.Group) and rest and re.fullmatch(r"[a-z][a-z-]*[,|]?", rest[0]):
        below = command.get_command(click.Context(command), rest[0].rstrip(",|"))
        if below is None:
            return f"{text!r}: there is no {rest[0]!r}"
        command, rest = below, rest[1:]
    known = options_of(command)
    if isinstance(command, click.Group):  # such as `vmm snapshot apply|delete`: one of them has it
        for name in command.list_commands(click.Context(command)):
            below = command.get_command(click.Context(command), name)
            known |= options_of(below) if below is not None else set()
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text.split(" -- ")[0]):
        if option not in known:
            return f"{text!r}: there is no {option}"
    return None


def mentioned() -> Iterator[tuple[str, str]]:
    """(place, command) of every command of ours in backquotes, in pages and in code."""
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
        for found in _MENTIONED.finditer(text):
            yield f"{page}:{text.count(chr(10), 0, found.start()) + 1}", found[1]
    for path, text in python_files("vhdkit", "vmm"):
        for found in _IN_CODE.finditer(text):
            yield f"{path}:{text.count(chr(10), 0, found.start()) + 1}", found[1].replace("\\", "")


def test_mentioned_commands_exist() -> None:
    """Each command in backquotes has an existing verb, and only options that the verb has."""
    wrong = [f"{place}: {fault}" for place, text in mentioned() if (fault := complaint(text)) is not None]
    assert not wrong, "\n" + "\n".join(wrong)


def verbs(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all commands below it, with their full names."""
    yield name, command
    if isinstance(command, click.Group):
        for word in command.list_commands(click.Context(command)):
            below = command.get_command(click.Context(command), word)
            assert below is not None
            yield from verbs(below, f"{name} {word}")


ALL = [one for name, command in ROOTS.items() for one in verbs(command, name)]


@pytest.mark.parametrize(("name", "command"), ALL, ids=[name for name, _ in ALL])
def test_help(name: str, command: click.Command) -> None:
    """Help fits 80 columns, has only whole sentences, has an example of existing commands, and `--json` where
    possible."""
    context = click.Context(command, info_name=name, terminal_width=80, max_content_width=80)
    lines = command.get_help(context).splitlines()
    assert not [line for line in lines if len(line) > 80]
    assert not [line for line in lines if re.match(r"  [a-z-]+  +\w.*\.\.\.$", line)]
    examples = [line.strip() for line in lines if re.match(r"    .*\b(vhdkit|vmm) [a-z]", line)]
    wrong = [complaint(part) for line in examples for part in re.findall(r"(?:vhdkit|vmm) [a-z][^|<\]]*", line)]
    assert not [one for one in wrong if one is not None]
    if not isinstance(command, click.Group):
        assert examples
        assert ("--json" in options_of(command)) != (name in WITHOUT_JSON)
