# SPDX-License-Identifier: Apache-2.0
"""How a failure reaches the user: one line on standard error, and an exit code for the cause.

Decides the text around an error. The sentence and the code of a library error come from `vmm.model.errors`. With
`--json` the line is {"error": {"kind", "exit_code", "message", "problem", "machine", "path", "hint"}}.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

from vhdkit import json_text
from vmm.model.errors import EXIT_FAILED, VmmError, of_os_error, printable, to_document

EXIT_INTERRUPTED = 130  # the code that shells use for Ctrl-C
_WORDS_OF_NUMBERS = {
    r"is not a valid integer( range)?": "is not a whole number",
    r"is not a valid float( range)?": "is not a number",
    r"is not in the range x>=(\S+)": r"must be \1 or more",
    r"is not in the range x>(\S+)": r"must be more than \1",
    r"is not in the range (\S+)<=x<=(\S+)": r"must be from \1 to \2",
}
__all__ = ["EXIT_FAILED", "interruptible", "report", "settle_standard_error", "silence_standard_output"]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within this block Ctrl-C raises KeyboardInterrupt; before it, Ctrl-C ends the process (`entry`)."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def report(error: BaseException, *, as_json: bool, verbose: bool) -> int:
    """Report the error on standard error; returns the exit code."""
    facts = _facts(error)
    if verbose and facts["kind"] == "InternalError":
        import traceback

        traceback.print_exception(error)
    with contextlib.suppress(OSError):  # standard error is closed: only the exit code remains
        click.echo(json_text({"error": facts}) if as_json else f"vmm: {facts['message']}", err=True)
    code: int = facts["exit_code"]
    return code


def _facts(error: BaseException) -> dict[str, Any]:
    if isinstance(error, VmmError):
        return to_document(error)
    if isinstance(error, click.exceptions.Abort | KeyboardInterrupt):
        notes = getattr(error, "__notes__", None) or getattr(error.__cause__, "__notes__", [])
        return _plain("Interrupted", EXIT_INTERRUPTED, ": ".join(["interrupted", *notes]))
    if isinstance(error, click.ClickException):
        return _of_usage(error)
    if isinstance(error, OSError):
        return to_document(of_os_error(error, "write the output"))
    if type(error).__module__.startswith("vhdkit"):
        document = _plain(type(error).__name__, getattr(error, "exit_code", EXIT_FAILED), str(error))
        return {**document, "path": getattr(error, "path", None), "hint": getattr(error, "hint", None)}
    what = printable(f"{type(error).__name__}: {error}")
    words = f"internal error: {what}; this is a bug in vmm, please report it with the output of VMM_DEBUG=1"
    return _plain("InternalError", EXIT_FAILED, words)


def _plain(kind: str, exit_code: int, message: str) -> dict[str, Any]:
    return {"kind": kind, "exit_code": exit_code, "message": message}


def _of_usage(error: click.ClickException) -> dict[str, Any]:
    message = _words_of_usage(error)
    if isinstance(error, click.UsageError) and error.ctx is not None:
        path = error.ctx.command_path
        verb = path.removeprefix("vmm").strip()
        message = f"{verb}: {message}" if verb else message
        message += f"{' See' if message.endswith('?') else '; see'} `{path} --help`"
    return _plain("UsageError", error.exit_code, message)


def _words_of_usage(error: click.ClickException) -> str:
    """click's sentence about wrong arguments, with plain words for numbers."""
    words = printable(error.format_message())
    for theirs, ours in _WORDS_OF_NUMBERS.items():
        words = re.sub(theirs, ours, words)
    return words if words.endswith("..") else words.removesuffix(".")


def silence_standard_output() -> None:
    """Drop buffered output after the reader is gone, so that flushing it at exit does not fail."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.close()


def settle_standard_error() -> None:
    """Drop what standard error did not accept: Python would try again at exit, and end with code 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.close()
