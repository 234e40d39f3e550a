# SPDX-License-Identifier: Apache-2.0
"""How a failure or warning reaches the user: one line on standard error, and an exit code for the cause.

Decides the text around an error or warning, and what a signal does. The sentence itself and the code of a library
error come from `vhdkit.errors`. With `--json` an error is one JSON object:

    {"error": {"kind": "CorruptImage", "exit_code": 3, "message": ..., "problem": ..., "path": ..., "structure": ...,
               "offset_bytes": ..., "expected": ..., "found": ..., "hint": ..., "reason": ...}}

Kinds are the names of the library's error classes, and UsageError, Interrupted and InternalError.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from vhdkit.errors import CorruptImage, VhdkitError, printable
from vhdkit.jsontext import json_text

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SIGNAL_BASE = 128  # and the signal's number, as shells count
_WORDS_OF_NUMBERS = {
    r"is not a valid integer( range)?": "is not a whole number",
    r"is not a valid float( range)?": "is not a number",
    r"is not in the range x>=(\S+)": r"must be \1 or more",
    r"is not in the range x>(\S+)": r"must be more than \1",
    r"is not in the range (\S+)<=x<=(\S+)": r"must be from \1 to \2",
}
_NO_THREAD = "can't start new thread"  # Python's words; it has no class for this
_STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DROPPED_SECONDS = 0.01  # until a signal comes again: longer than the finalizer that dropped it usually needs


class Interrupted(BaseException):
    """A signal asked us to stop. Not an `Exception`, so that no `except Exception` handles it as a failure."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return EXIT_SIGNAL_BASE + self.number


class WarningLines(logging.Handler):
    """Prints what the library logs on standard error, in the process that made the handler, but in no fork of it."""

    def __init__(self, level: int = logging.WARNING) -> None:
        super().__init__(level)
        self._pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record. A closed standard error does not stop the verb."""
        if os.getpid() == self._pid:
            word = "warning: " if record.levelno == logging.WARNING else ""
            with contextlib.suppress(OSError, ValueError):
                click.echo(printable(f"vhdkit: {word}{record.getMessage()}"), err=True)


def show_log(level: int, *, in_full: bool = False) -> None:
    """Print on standard error what is logged from this level on; `in_full` with the time, level and room of each."""
    form = "%(asctime)s level=%(levelname)s room=%(name)s %(message)s"
    handler = logging.StreamHandler(sys.stderr) if in_full else WarningLines(level)
    logging.basicConfig(level=level, format=form, handlers=[handler], force=True)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into `Interrupted`, so that half-made files are removed.

    Further signals are ignored until then: the removal is short, and an interrupted one would leave files behind.
    Where Python drops exceptions (in a finalizer or a callback of a weak reference, as imports have), the signal comes
    again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise Interrupted(number)

    def dropped(report: sys.UnraisableHookArgs) -> None:
        if not isinstance(report.exc_value, Interrupted):
            usual(report)
            return
        for one in before:
            signal.signal(one, stop)
        again = threading.Timer(_DROPPED_SECONDS, signal.pthread_kill, (main, report.exc_value.number))
        again.daemon = True
        late.append(again)
        again.start()

    main, usual, late = threading.get_ident(), sys.unraisablehook, list[threading.Timer]()
    # A signal that was ignored when we were started (nohup) stays ignored.
    before = {one: signal.getsignal(one) for one in _STOPPING_SIGNALS if signal.getsignal(one) != signal.SIG_IGN}
    for one in before:
        signal.signal(one, stop)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = usual
        for again in late:
            again.cancel()
        for one, handler in before.items():
            signal.signal(one, handler)


def report(error: BaseException, *, as_json: bool, verbose: bool) -> int:
    """Report the error on standard error; returns the exit code."""
    if isinstance(error, VhdkitError):
        facts = _facts_of_library(error)
    elif isinstance(error, click.ClickException):
        facts = _facts_of_usage(error)
    elif isinstance(error, Interrupted):
        facts = _facts("Interrupted", error.exit_code, "interrupted")
    elif isinstance(error, MemoryError):
        facts = _facts("InternalError", EXIT_FAILED, "not enough memory")
    elif isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        facts = _facts("InternalError", EXIT_FAILED, "the system allows no more threads (see `ulimit -u`)")
    else:
        what = printable(f"{type(error).__name__}: {error}")
        facts = _facts(
            "InternalError",
            EXIT_FAILED,
            f"internal error: {what}; this is a bug in vhdkit, please report it with the output of --verbose",
        )
        if verbose:
            import traceback

            traceback.print_exception(error)
    with contextlib.suppress(OSError):  # no one can read it; the exit code still reports the failure
        click.echo(json_text({"error": facts}) if as_json else f"vhdkit: {facts['message']}", err=True)
    code: int = facts["exit_code"]
    return code


def _facts(kind: str, exit_code: int, message: str, **more: object) -> dict[str, Any]:
    return {"kind": kind, "exit_code": exit_code, "message": message, **more}


def _facts_of_library(error: VhdkitError) -> dict[str, Any]:
    return _facts(
        type(error).__name__,
        error.exit_code,
        str(error),
        problem=error.problem,
        path=error.path,
        structure=error.structure,
        offset_bytes=error.offset_bytes,
        expected=None if error.expected is None else str(error.expected),
        found=None if error.found is None else str(error.found),
        hint=error.hint,
        reason=error.reason.value if isinstance(error, CorruptImage) else None,
    )


def _facts_of_usage(error: click.ClickException) -> dict[str, Any]:
    message = _words_of_usage(error)
    if isinstance(error, click.UsageError) and error.ctx is not None:
        path = error.ctx.command_path
        verb = path.removeprefix("vhdkit").strip()
        message = f"{verb}: {message}" if verb else message
        message += f"{' See' if message.endswith('?') else '; see'} `{path} --help`"
    return _facts("UsageError", error.exit_code, message)


def _words_of_usage(error: click.ClickException) -> str:
    """Click's message about a wrong command line, with "integer" and "float" in plain words."""
    words = printable(error.format_message())
    for theirs, ours in _WORDS_OF_NUMBERS.items():
        words = re.sub(theirs, ours, words)
    return words if words.endswith("..") else words.removesuffix(".")


def silence_standard_output() -> None:
    """The reader has gone: discard what is still buffered instead of failing at exit."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.close()


def settle_standard_error() -> None:
    """Discard what standard error did not accept; Python would try once more at exit, and end with code 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.close()
