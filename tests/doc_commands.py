# SPDX-License-Identifier: Apache-2.0
"""The commands that a page of documentation shows, and a shell that runs them.

The language of a fenced block says what it is:

    ```console      `$ ` begins a command; the lines below it, up to the next one, are what it prints
    ```console similar          the same, where any number, id or time may stand for those that are shown
    ```sh           only commands, one a line (a backslash at the end continues it)
    ```python       a program
    anything else   is for reading: ```text for drawings and output, ```ini for a file

After a command, `# exit code 4` gives its exit code if that is not 0. In its output `...` stands for anything, and the
lines shown must appear in their order; other lines may come between them. `docs/*.md` and the README are read by
`pages`; this module knows no particular page.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT
from tests.waiting import wait_until

SECONDS = 120.0
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_IN_BACKGROUND = re.compile(r"&\s*(#.*)?$")
_NUMBER = re.compile(r"(?<![a-z])[0-9a-f]*[0-9][0-9a-f:.\\-]*")  # in a line whose special characters have backslashes
_EXIT_CODE = re.compile(r"#\s*exit code (\d+)")


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a page: its place (and the heading above), its text, its exit code, its output."""

    page: str
    line: int
    heading: str
    text: str
    exit_code: int = 0
    prints: tuple[str, ...] = ()
    similar: bool = False  # numbers, ids and times in `prints` are examples

    @property
    def words(self) -> str:
        """Its text without its comment: the name by which a test refers to it."""
        return re.sub(r"\s+#\s.*", "", self.text, flags=re.DOTALL).strip()

    @property
    def place(self) -> str:
        """`docs/mount.md:12`."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its page and line, the heading above it ("" before the first), its language and its text."""

    page: str
    line: int
    heading: str
    language: str
    text: str

    @property
    def is_console(self) -> bool:
        """True for commands with their output."""
        return self.language.split()[:1] == ["console"]

    def commands(self) -> Iterator[Command]:
        """The commands in it, in order; none in a block for reading."""
        lines = self.text.splitlines()
        number = 0
        while number < len(lines):
            first = number
            typed = self._typed(lines[number])
            number += 1
            if typed is None:
                continue
            while typed.endswith("\\") and number < len(lines):
                typed = f"{typed}\n{lines[number]}"
                number += 1
            prints: list[str] = []
            while self.is_console and number < len(lines) and not lines[number].startswith("$ "):
                prints.append(lines[number])
                number += 1
            code = _EXIT_CODE.search(typed)
            line = self.line + 1 + first
            ends = int(code[1]) if code else 0
            yield Command(self.page, line, self.heading, typed, ends, tuple(prints), "similar" in self.language)

    def _typed(self, line: str) -> str | None:
        if self.is_console:
            return line.removeprefix("$ ") if line.startswith("$ ") else None
        if self.language == "sh" and line.strip() and not line.startswith("#"):
            return line
        return None


def pages() -> list[str]:
    """The README and every page of docs/, as paths from the root of the project."""
    return ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page: str, text: str | None = None) -> list[Block]:
    """All fenced blocks of a page, in order; `text` replaces the page's content."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found = []
    for fence in _FENCE.finditer(text):
        headings = re.findall(r"^##+ (.*)$", _FENCE.sub("", text[: fence.start()]), re.MULTILINE)
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, headings[-1] if headings else "", fence[1].strip(), fence[2]))
    return found


def not_printed(wanted: tuple[str, ...], printed: str, *, similar: bool = False) -> str | None:
    """The first of these lines that is missing from the output, in their order; None if all are there.

    `...` stands for anything, and runs of spaces for each other; with `similar`, any number, id or time matches
    another one.
    """
    lines = iter(printed.splitlines())
    for want in filter(str.strip, wanted):
        form = ".*".join(re.escape(part.strip()) for part in want.split("..."))
        if similar:
            form = _NUMBER.sub(lambda _: r"[0-9a-f:.\-]+", form)
            form = re.sub(r"[KMGT]iB|\bB\b", r"([KMGT]i)?B", form)
        shape = re.compile(re.sub(r"(\\ )+", r"\\s+", form))
        if not any(shape.search(line) for line in lines):
            return want
    return None


class Shell:
    """A bash in which commands are run one after the other; folder, variables and jobs persist. Use it with `with`."""

    def __init__(self, folder: Path, printed: Path, environment: Mapping[str, str], *prefix: str) -> None:
        """Start it in `folder`; the output of commands is kept in the folder `printed`. `prefix` is what runs it."""
        self._printed = printed
        self._printed.mkdir(exist_ok=True)
        self._count = 0
        self._ends, report = os.pipe()
        self._process = subprocess.Popen(
            [*prefix, "bash", "--noprofile", "--norc"], cwd=folder, env=dict(environment), stdin=subprocess.PIPE,
            pass_fds=[report], start_new_session=True,
        )  # fmt: skip
        os.close(report)
        self._code = report

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *reason: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._ends)

    def run(self, text: str, *, seconds: float = SECONDS) -> tuple[int, str]:
        """Run a command and wait for its end: (exit code, all of its output)."""
        printed = self._new_file()
        self._type(f"{{ {text}\n}} >{printed} 2>&1 </dev/null; echo $? >&{self._code}")
        code = self._end(seconds, text, printed)
        if _IN_BACKGROUND.search(text):  # a server is ready when it reports that
            self._wait_for(".", text, printed, seconds, lambda: True)
        return code, printed.read_text(encoding="utf-8", errors="replace")

    def run_until(self, pattern: str, text: str, *, seconds: float = SECONDS) -> tuple[int, str]:
        """Run a command that does not end by itself, and press Ctrl-C when it has printed the pattern: like `run`."""
        printed = self._new_file()
        self._type(
            f"{{ exec {text}\n}} >{printed} 2>&1 </dev/null & echo $! >&{self._code}; wait $!; echo $? >&{self._code}"
        )
        pid = self._end(seconds, text, printed)
        # (If it ends by itself it does so with its exit code, which the caller sees.)
        self._wait_for(pattern, text, printed, seconds, lambda: os.path.exists(f"/proc/{pid}"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
        code = self._end(seconds, text, printed)
        return code, printed.read_text(encoding="utf-8", errors="replace")

    def _wait_for(self, pattern: str, text: str, printed: Path, seconds: float, is_alive: Callable[[], bool]) -> None:
        shape = re.compile(pattern)
        wait_until(
            lambda: not is_alive() or shape.search(printed.read_text(encoding="utf-8", errors="replace")),
            lambda: f"{text}: prints {pattern!r}: {printed.read_text()}",
            seconds,
        )

    def _new_file(self) -> Path:
        self._count += 1
        printed = self._printed / str(self._count)
        printed.touch()
        return printed

    def _type(self, line: str) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(line.encode() + b"\n")
        stdin.flush()

    def _end(self, seconds: float, text: str, printed: Path) -> int:
        """The next number that the shell reports."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._ends, selectors.EVENT_READ)
            number = b""
            deadline = time.monotonic() + seconds
            while not number.endswith(b"\n"):
                left = deadline - time.monotonic()
                assert left > 0 and selector.select(left), f"{text}: not done in {seconds} s: {printed.read_text()}"
                piece = os.read(self._ends, 1)
                assert piece, f"{text}: the shell ended: {printed.read_text()}"
                number += piece
        return int(number)


def reader_environment(folder: Path, programs: Path) -> dict[str, str]:
    """The environment of a user who types in `folder`: a home next to it, our commands on the search path."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    path = f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin"
    return {**os.environ, "HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}


def type_in(shell: Shell, command: Command, *, until: str | None = None, seconds: float = SECONDS) -> str:
    """Run a page's command, up to `until`; it must end and print as the page shows. Returns its output."""
    if until is None:
        code, printed = shell.run(command.text, seconds=seconds)
    else:
        code, printed = shell.run_until(until, command.text, seconds=seconds)
    allowed = {command.exit_code} if until is None else {command.exit_code, 130}
    assert code in allowed, f"{command.place}: {command.text}: exit code {code}\n{printed}"
    missing = not_printed(command.prints, printed, similar=command.similar)
    assert missing is None, f"{command.place}: {command.text}: no line {missing!r} in\n{printed}"
    return printed
