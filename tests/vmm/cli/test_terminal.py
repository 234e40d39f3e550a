# SPDX-License-Identifier: Apache-2.0
"""A terminal connected to a console: raw mode and its end, the key that leaves, scripts, consoles that are
reopened."""

from __future__ import annotations

import os
import pty
import signal
import socket
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from vmm.cli.terminal import Ended, Join, raw_terminal
from vmm.model.errors import NotFound

SECONDS = 30.0


@dataclass
class Stage:
    """A connection in a thread, the guest's side of its console, and the user's side of its input and output."""

    guest: socket.socket
    input: int
    output: int
    ended: list[Ended] = field(default_factory=list)
    thread: threading.Thread | None = None

    def end_input(self) -> None:
        """End the user's input."""
        os.close(self.input)
        self.input = -1

    def wait(self) -> Ended:
        assert self.thread is not None
        self.thread.join(SECONDS)
        assert not self.thread.is_alive(), "it did not end"
        return self.ended[0]


def read_until(descriptor: int, words: bytes) -> bytes:
    """Read from a descriptor up to these words."""
    seen = b""
    while words not in seen:
        piece = os.read(descriptor, 4096)
        assert piece, seen
        seen += piece
    return seen


@contextmanager
def staged(*, terminal: bool = False, later: socket.socket | None = None, **options: object) -> Iterator[Stage]:
    """A connection whose input is a pipe or a terminal; `later` is what a second connection gets."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    output_read, output_write = os.pipe()
    if terminal:
        user, input_fd = pty.openpty()
    else:
        input_fd, user = os.pipe()

    def connect(is_again: bool) -> socket.socket:
        if not is_again:
            return theirs
        if later is None:
            raise NotFound("it is gone")
        return later

    join = Join(connect, input_fd, output_write, **options)  # type: ignore[arg-type]
    stage = Stage(ours, user, output_read)

    def run() -> None:
        stage.ended.append(join.run())

    # (A signal handler can be set in the main thread only.)
    stage.thread = threading.Thread(target=run, daemon=True)
    if not terminal:
        stage.thread.start()
    try:
        yield stage
    finally:
        ours.close()
        if stage.thread.ident is not None:
            stage.thread.join(SECONDS)
        for descriptor in (output_read, output_write, input_fd, stage.input):
            if descriptor >= 0:
                os.close(descriptor)


def test_input_of_a_script() -> None:
    """A script's lines reach the guest, the answers its output; when the guest falls silent, it ends."""
    with staged(linger_seconds=0.2) as stage:
        os.write(stage.input, b"ls\n")
        assert stage.guest.recv(100) == b"ls\n"
        stage.guest.sendall(b"file\r\n")
        stage.end_input()
        assert stage.wait() is Ended.INPUT_DONE
        assert read_until(stage.output, b"file") == b"file\r\n"


def test_a_script_may_send_any_byte() -> None:
    """The key that leaves a terminal is an ordinary byte in a script."""
    with staged(linger_seconds=0.1) as stage:
        os.write(stage.input, b"a\x1db")
        stage.end_input()
        assert stage.wait() is Ended.INPUT_DONE
        assert stage.guest.recv(100) == b"a\x1db"


def test_an_expected_text_in_pieces() -> None:
    """It ends when the text has arrived, even in pieces and long after the end of the input."""
    with staged(expect=b"login:", linger_seconds=0.0) as stage:
        stage.end_input()
        for piece in b"welcome\r\nlo", b"gi", b"n: ":
            stage.guest.sendall(piece)
            read_until(stage.output, piece)
        assert stage.wait() is Ended.FOUND


def test_the_time_out() -> None:
    """Without the expected text it ends when the time is over."""
    with staged(expect=b"never", timeout_seconds=0.1) as stage:
        stage.guest.sendall(b"something else")
        assert stage.wait() is Ended.TIMED_OUT


def test_large_inputs_and_outputs() -> None:
    """Neither side loses a byte when both send more than fits into a pipe."""
    sent = os.urandom(1 << 20)
    with staged(linger_seconds=1.0) as stage:
        received = bytearray()

        def guest() -> None:
            while len(received) < len(sent):
                piece = stage.guest.recv(65536)
                received.extend(piece)
                stage.guest.sendall(piece)

        def user() -> None:
            rest = sent
            while rest:
                rest = rest[os.write(stage.input, rest) :]
            stage.end_input()

        threads = [threading.Thread(target=target, daemon=True) for target in (guest, user)]
        for thread in threads:
            thread.start()
        shown = b""
        while len(shown) < len(sent):
            shown += os.read(stage.output, 65536)
        assert shown == sent and received == sent
        for thread in threads:
            thread.join(SECONDS)


def test_the_console_ends_with_the_machine() -> None:
    """When the machine is off, the connection ends."""
    with staged() as stage:
        stage.guest.close()
        assert stage.wait() is Ended.CONSOLE_GONE


def test_the_console_is_reopened() -> None:
    """When the worker has died and its successor has opened the console again, the connection continues there."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    with staged(later=theirs, is_coming_back=lambda: True, expect=b"again") as stage:
        stage.guest.close()
        os.write(stage.input, b"hello")
        assert ours.recv(100) == b"hello"
        ours.sendall(b"here again")
        assert stage.wait() is Ended.FOUND
    ours.close()


def test_a_missing_console() -> None:
    """Without a console there is an error at once."""

    def connect(is_again: bool) -> socket.socket:
        raise NotFound("there is none")

    with pytest.raises(NotFound):
        Join(connect, 0, 1).run()


def test_the_terminal_is_raw_and_then_restored() -> None:
    """Every key but the one that leaves is sent, Ctrl-C too; afterwards the terminal is as before."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    user, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    output_read, output_write = os.pipe()

    def person() -> None:
        while termios.tcgetattr(terminal)[3] & termios.ICANON:
            pass
        os.write(user, b"\x03x")
        assert ours.recv(2, socket.MSG_WAITALL) == b"\x03x"
        os.write(user, b"\x1d")

    thread = threading.Thread(target=person, daemon=True)
    thread.start()
    assert Join(lambda _: theirs, terminal, output_write).run() is Ended.LEFT
    thread.join(SECONDS)
    assert termios.tcgetattr(terminal) == before
    for descriptor in user, terminal, output_read, output_write:
        os.close(descriptor)
    ours.close()


def test_the_terminal_is_restored_on_sigterm() -> None:
    """SIGTERM does not leave the terminal in raw mode."""
    user, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    with pytest.raises(KeyboardInterrupt), raw_terminal(terminal):
        assert termios.tcgetattr(terminal) != before
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert termios.tcgetattr(terminal) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    os.close(user)
    os.close(terminal)
