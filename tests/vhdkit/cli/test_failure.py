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

from vhdkit import CorruptImage, CorruptReason
from vhdkit.cli import failure
from vhdkit.cli.failure import Interrupted, report, stopped_by_signals
from vhdkit.cli.main import main


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_becomes_an_exception(number: signal.Signals, code: int) -> None:
    """The first signal raises, further ones wait, and afterwards everything is as it was."""
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, stopped_by_signals():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # ignored: a second Ctrl-C must not stop the cleaning up
    assert caught.value.exit_code == code
    assert signal.getsignal(number) == before


def test_an_ignored_signal_stays_ignored() -> None:
    """Who starts us with nohup means it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_has_no_signals() -> None:
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


def test_a_library_error_is_its_own_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Path, structure, offset, values and hint are all in the line, and the code is the error's."""
    error = CorruptImage(
        CorruptReason.BLOCK_SIZE, "impossible", path="x.vhd", structure="dynamic header", offset_bytes=512,
        expected=1, found=2, hint="look",
    )  # fmt: skip
    assert report(error, as_json=False, verbose=False) == 3
    assert (
        capsys.readouterr().err
        == "vhdkit: x.vhd: dynamic header at byte 0x200: impossible (expected 1, found 2); look\n"
    )


def test_what_standard_error_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped, and not tried again at the end of the process, whose code would be 120 then."""
    with open(os.devnull, "w") as taking, open("/dev/full", "w") as full:
        for stream in (taking, full):
            stream.write("words")
            monkeypatch.setattr(sys, "stderr", stream)
            failure.settle_standard_error()
        assert full.closed and not taking.closed


@pytest.mark.parametrize("is_full", [False, True])
def test_a_note_that_nobody_takes(is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that did what it should has succeeded, though standard error is broken, or full."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as broken, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full if is_full else broken)
        with pytest.raises(SystemExit) as ended:
            main.main(["create", str(tmp_path / "new.vhd"), "--size", "0.1G"])
        failure.settle_standard_error()
        for stream in (broken, full):
            with contextlib.suppress(OSError):  # what it did not take
                stream.close()
    assert ended.value.code == 0 and (tmp_path / "new.vhd").exists()
