# SPDX-License-Identifier: Apache-2.0
"""This terminal, connected to a machine's console: keys go one way, output the other.

Decides how a terminal is made raw and reliably restored, which key disconnects, when a script's console ends (its
input is used up and the guest is silent, a text has appeared, or the time is up), and that a console whose worker
died is connected again. Must not know what the console is: `connect` returns a connected socket, or raises a VmmError.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
import socket
import termios
import time
import tty
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from vmm.model.errors import VmmError
from vmm.model.waiting import looks

LEAVE_KEY: Final = b"\x1d"  # Ctrl-]
LINGER_SECONDS: Final = 1.0
RECONNECT_SECONDS: Final = 30.0  # a killed worker is replaced much sooner, unless the host is busy
_RETRY_SECONDS: Final = 0.1  # each attempt asks for the machine's state
_PIECE_BYTES: Final = 16 * 1024
_MAX_UNSENT_BYTES: Final = 64 * 1024

Connect = Callable[[bool], socket.socket]  # connect(is_again)


class Ended(enum.Enum):
    """Why the connection ended."""

    LEFT = "left"  # Ctrl-]
    INPUT_DONE = "input done"  # the script's input is used up, and the guest is silent
    FOUND = "found"
    TIMED_OUT = "timed out"
    CONSOLE_GONE = "console gone"


class Join:
    """One connection of a terminal to a console."""

    def __init__(
        self,
        connect: Connect,
        input_fd: int,
        output_fd: int,
        *,
        expect: bytes | None = None,
        timeout_seconds: float | None = None,
        linger_seconds: float = LINGER_SECONDS,
        is_coming_back: Callable[[], bool] = lambda: False,
    ) -> None:
        """`expect`: end when this text has appeared. `is_coming_back`: whether to wait for a console that ended."""
        self._connect = connect
        self._input = input_fd
        self._output = output_fd
        self._expect = expect
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._linger = linger_seconds
        self._is_coming_back = is_coming_back
        self._is_terminal = os.isatty(input_fd)
        self._input_open = True
        self._unsent = b""
        self._recent = b""  # the end of the output, in which `expect` may have begun
        self._last_output = time.monotonic()

    def run(self) -> Ended:
        """Stay connected until one of the ends occurs. Raises VmmError if the console is missing at the beginning."""
        link = self._connect(False)
        try:
            with raw_terminal(self._input):
                while True:
                    ended = self._converse(link)
                    if ended is not Ended.CONSOLE_GONE:
                        return ended
                    link.close()
                    again = self._connect_again()
                    if again is None:
                        return ended
                    link = again
        finally:
            link.close()

    def _connect_again(self) -> socket.socket | None:
        for _ in looks(RECONNECT_SECONDS, every_seconds=_RETRY_SECONDS):
            if not self._is_coming_back():
                break
            with contextlib.suppress(VmmError):
                return self._connect(True)
        return None

    def _converse(self, link: socket.socket) -> Ended:
        self._last_output = time.monotonic()
        while True:
            reading: list[int] = [link.fileno()]
            if self._input_open and len(self._unsent) < _MAX_UNSENT_BYTES:
                reading.append(self._input)
            writing = [link.fileno()] if self._unsent else []
            readable, writable, _ = select.select(reading, writing, [], self._seconds_to_wait())
            try:
                if link.fileno() in readable:
                    data = link.recv(_PIECE_BYTES)
                    if not data:
                        return Ended.CONSOLE_GONE
                    if self._show(data):
                        return Ended.FOUND
                if writable:
                    self._unsent = self._unsent[link.send(self._unsent) :]
            except ConnectionError:
                return Ended.CONSOLE_GONE
            if self._input in readable and self._take_input():
                return Ended.LEFT
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                return Ended.TIMED_OUT
            if self._is_quiet(now):
                return Ended.INPUT_DONE

    def _seconds_to_wait(self) -> float | None:
        ends = [] if self._deadline is None else [self._deadline]
        if self._lingers():
            ends.append(self._last_output + self._linger)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _lingers(self) -> bool:
        """True if only the guest's silence is awaited."""
        return not self._input_open and not self._unsent and self._expect is None

    def _is_quiet(self, now: float) -> bool:
        return self._lingers() and now >= self._last_output + self._linger

    def _show(self, data: bytes) -> bool:
        """Write output; True if the expected text has appeared."""
        self._last_output = time.monotonic()
        rest = data
        while rest:
            rest = rest[os.write(self._output, rest) :]
        if self._expect is None:
            return False
        self._recent += data
        found = self._expect in self._recent
        self._recent = self._recent[-len(self._expect) :]
        return found

    def _take_input(self) -> bool:
        """Read keys; True if the key that disconnects was among them."""
        data = os.read(self._input, _PIECE_BYTES)
        if not data:
            self._input_open = False
            self._last_output = time.monotonic()
        if self._is_terminal and LEAVE_KEY in data:
            return True
        self._unsent += data
        return False


@contextlib.contextmanager
def raw_terminal(descriptor: int) -> Iterator[None]:
    """Pass every key through unchanged within this block, and restore the terminal afterwards, whatever happens.

    Does nothing if the descriptor is not a terminal.
    """
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt  # runs the `finally` below

    handlers = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
