# SPDX-License-Identifier: Apache-2.0
"""A machine's life by commands, with the boot-sector guest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vmm.cli.running import document, failure, good, run
from tests.vmm.small_guests import console, make_machine, wait_counting
from tests.waiting import wait_until
from vmm.api.manager import Manager
from vmm.processes import worker_connection as contact

pytestmark = pytest.mark.kvm


def test_the_life_of_a_machine(manager: Manager, tmp_path: Path) -> None:
    """Start, show, pause, resume, save, start, reset, set, shutdown: text, JSON and exit codes on the way."""
    make_machine(manager, tmp_path)
    assert good("start", "small") == "small is running\n"
    assert "is already running" in failure("start", "small", code=5)
    wait_counting(manager)
    row = document("list")[0]
    assert row["state"] == "running" and set(row["pids"]) == {"keeper", "worker", "server", "qemu"}
    assert "state         running" in good("show", "small")
    assert document("pause", "small") == {"name": "small", "state": "paused"}
    assert "is paused: cannot pause" in failure("pause", "small", code=5)
    assert good("resume", "small") == "small is running\n"
    assert "takes effect at its next start" in good("set", "small", "--memory", "32M")
    assert "cannot be renamed now" in failure("set", "small", "--rename", "big", code=5)
    assert "cannot delete it" in failure("delete", "small", "--yes", code=5)
    good("set", "small", "--memory", "16M")
    assert good("save", "small") == "small is saved\n"
    assert "small  saved" in good("list")
    assert "is saved: cannot stop" in failure("stop", "small", code=5)
    good("start", "small", "--quiet")
    wait_counting(manager)
    assert good("reset", "small") == "small is running\n"
    wait_until(lambda: console(manager).count("READY") == 2, "it boots again")
    assert good("shutdown", "small", "--timeout", "60") == "small is off\n"
    assert "is off: cannot shut it down" in failure("shutdown", "small", code=5)
    good("start", "small")
    assert good("stop", "small") == "small is off\n"
    for verb in ("start", "stop", "shutdown", "pause", "resume", "reset", "save", "events", "logs"):
        assert "machine 'absent' does not exist" in failure(verb, "absent", code=1)


def test_events_and_logs(manager: Manager, tmp_path: Path) -> None:
    """Events in their order, as text and JSON; the logs of every program; none of a machine that never ran."""
    make_machine(manager, tmp_path)
    assert [event["event"] for event in document("events", "small")] == ["created"]
    assert document("logs", "small", "--of", "qemu")["qemu"]["lines"] == []
    good("start", "small")
    wait_counting(manager)
    follow = subprocess.Popen(
        [sys.executable, "-m", "vmm", "events", "small", "--json", "--follow"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert follow.stdout is not None
        followed = [json.loads(follow.stdout.readline())["event"] for _ in range(2)]
        good("stop", "small")
        followed += [json.loads(follow.stdout.readline())["event"] for _ in range(2)]
    finally:
        follow.kill()
        follow.communicate()
    assert followed == ["created", "started", "stopped", "off"]
    assert "started  (accelerator: tcg)" in good("events", "small")
    assert "tick" in good("logs", "small", "--of", "console")
    assert good("logs", "small", "--of", "console", "--lines", "2").count("\n") == 2
    assert "disks.log" in good("logs", "small")
    assert "--of PROGRAM" in failure("logs", "small", "--follow", code=2)


def test_start_imports_few_modules(manager: Manager, tmp_path: Path) -> None:
    """Most of a start's time is imports: the command needs neither models nor numpy nor an event loop."""
    program = (
        "import sys, vmm.cli.life, vmm.processes.worker_connection; "
        "heavy = ('numpy', 'pydantic', 'rich', 'asyncio', 'pyroute2'); "
        "print([one for one in heavy if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_worker_does_not_import_numpy_and_stays_small(manager: Manager, tmp_path: Path) -> None:
    """A worker has neither numpy nor rich, and uses less than 60 MiB of memory."""
    make_machine(manager, tmp_path)
    good("start", "small")
    pid = document("show", "small")["pids"]["worker"]
    assert "numpy" not in Path(f"/proc/{pid}/maps").read_text()
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0])
    assert resident <= 60 << 10


def test_an_interrupted_command(manager: Manager, tmp_path: Path) -> None:
    """Ctrl-C at a waiting command is one line and 130, and the machine is not affected."""
    make_machine(manager, tmp_path)
    good("start", "small")
    wait_counting(manager)
    process = subprocess.Popen(
        [sys.executable, "-m", "vmm", "events", "small", "--follow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(2)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said.strip()) == (130, b"vmm: interrupted")
    wait_counting(manager)


@pytest.mark.parametrize("verb", ["shutdown", "stop", "save"])
def test_a_command_interrupted_while_the_worker_works(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Ctrl-C at a verb that a running machine's worker carries out: the message says that it continues."""

    class Worker:
        """A worker that is at work when the command is interrupted."""

        def call(self, method: str, **params: object) -> object:
            raise KeyboardInterrupt

        def __enter__(self) -> Worker:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

    make_machine(manager, tmp_path)
    monkeypatch.setattr(contact, "contact", lambda *words: Worker())
    result = run(verb, "small")
    assert result.exit_code == 130
    assert f"vmm: interrupted: the {verb} continues; vmm events small shows how it ends" in result.stderr


def test_a_host_without_qemu(manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the command that installs QEMU, and nothing is left."""
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    assert "apt install qemu-system-x86" in failure("create", "web", code=8)
