# SPDX-License-Identifier: Apache-2.0
"""Processes by number and start time, detached starts, and locks that end with their holder."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vmm.host.proc import Lock, ProcessRef, command_words, is_locked, locked, machine_lock, spawn_detached
from vmm.model.errors import InUse, VmmError


def test_a_process_is_identified_by_number_and_start() -> None:
    """A process is alive only if its start time matches, too; a note of it reads back as the same process, garbage as
    none."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        ref = ProcessRef.of(process.pid)
        assert ref is not None and ref.is_alive()
        assert ProcessRef.from_document(ref.to_document()) == ref
        other = ProcessRef(ref.pid, ref.start_ticks + 1)
        assert not other.is_alive() and not other.send(signal.SIGKILL) and other.open_pidfd() is None
        assert not ref.wait(0.01)
        ref.kill()
        assert not ref.is_alive()  # a zombie counts as dead
    finally:
        process.kill()
        process.wait()
    assert ProcessRef.of(process.pid) is None
    for document in (None, 5, {}, {"pid": "1", "start_ticks": 1}, {"pid": 1, "start_ticks": 1}, {"pid": -1}):
        assert ProcessRef.from_document(document) is None


def test_the_command_line_of_a_new_process() -> None:
    """It is readable between the start of a program and its first instruction; a dead process has none."""
    for number in range(50):
        with subprocess.Popen(["sleep", f"{1000 + number}"]) as process:
            words = command_words(process.pid)
            process.kill()
        assert words == ["sleep", f"{1000 + number}"]
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert command_words(process.pid) == []  # a zombie
    assert command_words(process.pid) == []


def test_ending_a_process_asks_first() -> None:
    """A process that obeys is not killed; one that does not obey is."""
    for trap, code, seconds in (("exit 7", 7, 60.0), (":", -9, 0.1)):
        program = ["/bin/sh", "-c", f"trap '{trap}' TERM; echo ready; while :; do sleep 0.01; done"]
        process = subprocess.Popen(program, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        ref = ProcessRef.of(process.pid)
        assert ref is not None
        ref.end(seconds)
        assert process.wait() == code
        process.stdout.close()


def test_a_detached_process(tmp_path: Path) -> None:
    """It has its own session, no input, its output in the log, and just the descriptors that it was given."""
    log = tmp_path / "log"
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    program = (
        "import os, sys; fds = sorted(map(int, os.listdir('/proc/self/fd'))); "
        "print(os.getsid(0) == os.getpid(), repr(sys.stdin.read()), fds); os.write(7, b'given')"
    )
    pid = spawn_detached([sys.executable, "-c", program], log_path=str(log), descriptors={7: writing})
    os.close(writing)
    os.waitpid(pid, 0)
    assert os.read(reading, 10) == b"given" and os.read(reading, 10) == b""
    os.close(reading)
    assert log.read_text() == "True '' [0, 1, 2, 3, 7]\n"  # 3 is the listing itself
    with pytest.raises(FileNotFoundError):
        spawn_detached(["/absent/program"], log_path=str(log))


def test_locks_end_with_their_holder(tmp_path: Path) -> None:
    """One holder at a time; kill -9 releases the lock; a folder that was replaced has another lock."""
    path = str(tmp_path / "lock")
    lock = Lock(path)
    assert lock.try_take() and is_locked(path) and not Lock(path).try_take()
    lock.release()
    lock.release()
    assert not is_locked(path) and not is_locked(str(tmp_path / "absent"))
    program = (
        f"import sys, time; from vmm.host.proc import Lock; one = Lock({path!r}); "
        "print(one.try_take(), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    assert is_locked(path)
    holder.kill()
    holder.communicate()
    assert Lock(path).try_take()


def test_a_link_in_place_of_a_lock(tmp_path: Path) -> None:
    """A link with the name of the lock is not followed."""
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"symbolic|loop|Too many"):
        Lock(str(tmp_path / "lock")).try_take()
    assert not (tmp_path / "elsewhere").exists()


def test_one_command_for_a_machine(tmp_path: Path) -> None:
    """The second command is refused with the machine's name."""
    first, second = machine_lock(str(tmp_path), "web"), machine_lock(str(tmp_path), "web")
    with first, pytest.raises(InUse, match="web: another vmm command"), second:
        pass


def test_blocks_with_one_path_run_one_after_another(tmp_path: Path) -> None:
    """Of two blocks with one path the second begins when the first has ended, in whatever way."""
    path, order = str(tmp_path / "lock"), []

    def second() -> None:
        with locked(path):
            order.append("second")

    thread = threading.Thread(target=second)
    with contextlib.suppress(ValueError), locked(path):
        thread.start()
        thread.join(0.2)
        order.append("first")
        raise ValueError
    thread.join(60)
    assert order == ["first", "second"]
    with pytest.raises(VmmError, match="lock"), locked(str(tmp_path / "absent" / "lock")):
        pass
