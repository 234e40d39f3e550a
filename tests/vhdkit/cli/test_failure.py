# SPDX-License-Identifier: Apache-2.0
"""Signals and the wording of failures."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from tests.waiting import wait_until
from vhdkit import CorruptImage, CorruptReason
from vhdkit.cli import failure
from vhdkit.cli.failure import Interrupted, report, stopped_by_signals
from vhdkit.cli.main import main


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_becomes_an_exception(number: signal.Signals, code: int) -> None:
    """The first signal raises, later ones wait, and afterwards all handlers are as they were."""
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, stopped_by_signals():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # ignored: a second Ctrl-C must not stop the cleanup
    assert caught.value.exit_code == code
    assert signal.getsignal(number) == before


def test_a_signal_that_python_drops_comes_again() -> None:
    """A signal that strikes in a finalizer, whose exceptions Python drops, stops the command all the same."""

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    usual = sys.unraisablehook
    with pytest.raises(Interrupted) as caught, stopped_by_signals():
        Finalized()
        wait_until(lambda: False, "a signal", 10)
    assert caught.value.number == signal.SIGTERM
    assert sys.unraisablehook is usual


def test_an_ignored_signal_stays_ignored() -> None:
    """A signal that was ignored at the start, as under nohup, stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_do_not_touch_signals() -> None:
    """Outside the main thread the signals are left alone."""
    problems: list[BaseException] = []

    def inside() -> None:
        try:
            with stopped_by_signals():
                pass
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert problems == []


def test_a_system_without_threads_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where no thread can be started, the message says that, and nothing is left."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    source = tmp_path / "x.raw"
    source.write_bytes(b"x" * 4096)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), str(tmp_path / "out.vhd")])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "vhdkit: the system allows no more threads (see `ulimit -u`)\n"
    assert list(tmp_path.iterdir()) == [source]


def test_a_library_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The line contains path, structure, offset, values and hint, and the exit code is the error's."""
    error = CorruptImage(
        CorruptReason.BLOCK_SIZE, "impossible", path="x.vhd", structure="dynamic header", offset_bytes=512,
        expected=1, found=2, hint="look",
    )  # fmt: skip
    assert report(error, as_json=False, verbose=False) == 3
    assert (
        capsys.readouterr().err
        == "vhdkit: x.vhd: dynamic header at byte 0x200: impossible (expected 1, found 2); look\n"
    )


def test_unwritable_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is dropped and not retried at the end of the process, which would then exit with code 120."""
    with open(os.devnull, "w") as taking, open("/dev/full", "w") as full:
        for stream in (taking, full):
            stream.write("words")
            monkeypatch.setattr(sys, "stderr", stream)
            failure.settle_standard_error()
        assert full.closed and not taking.closed


@pytest.mark.parametrize("is_full", [False, True])
def test_a_note_that_cannot_be_written(is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that did its work succeeds although standard error is broken or full."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as broken, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full if is_full else broken)
        with pytest.raises(SystemExit) as ended:
            main.main(["create", str(tmp_path / "new.vhd"), "--size", "0.1G"])
        failure.settle_standard_error()
        for stream in (broken, full):
            with contextlib.suppress(OSError):  # drop what could not be written
                stream.close()
    assert ended.value.code == 0 and (tmp_path / "new.vhd").exists()
