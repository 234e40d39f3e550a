# SPDX-License-Identifier: Apache-2.0
"""The gateway's helper as a process: its rights, and the deaths of the processes around it."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.support import require_qemu, require_root
from tests.vmm.net.lab import SwitchLab
from tests.vmm.net.test_gateway import SETUP, is_answered
from tests.waiting import wait_until
from vmm.host.proc import ProcessRef
from vmm.model import errors
from vmm.net import gateway_note, gateway_process
from vmm.net.gateway import GatewaySetup
from vmm.net.gateway_process import ForkedStarter, Gateway, LocalStarter


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[SwitchLab]:
    """A switch that is not started yet."""
    require_qemu()
    one = SwitchLab(monkeypatch)
    yield one
    one.close()


def facts(pid: int) -> dict[str, str]:
    """What the kernel says about a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def children(pid: int) -> list[int]:
    """The processes that it started."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_rights_of_roots_gateway(lab: SwitchLab) -> None:
    """`INV-ENCLOSED`: it has its own user, no capability and no file; the switch that starts it has three
    capabilities."""
    require_root()
    guest = lab.plug("a")
    lab.backend.ask("set_gateway", gateway=asdict(SETUP))
    assert is_answered(lab, guest)
    status = lab.backend.status()
    assert status is not None
    helper, switch = facts(status["gateway"]["pid"]), facts(status["pid"])
    assert "0" not in (helper["Uid"] + helper["Gid"]).split()
    assert {int(helper[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert (helper["NoNewPrivs"], helper["Seccomp"], helper["Groups"]) == ("1", "2", "")
    seen = set(os.listdir(f"/proc/{status['gateway']['pid']}/root"))
    assert {"own", "usr"} <= seen
    assert not {"home", "root", "proc", "sys", "var", "run"} & seen
    assert {int(switch[f"Cap{kind}"], 16) for kind in ("Prm", "Eff", "Bnd")} == {0b1011}
    assert switch["NoNewPrivs"] == "1"


def test_a_switch_whose_starter_died_ends(lab: SwitchLab) -> None:
    """The machines on it then start both again; if the switch is killed, starter and helper end with it."""
    require_root()
    guest = lab.plug("a")
    lab.backend.ask("set_gateway", gateway=asdict(SETUP))
    assert is_answered(lab, guest)
    status = lab.backend.status()
    assert status is not None
    helper = ProcessRef.of(status["gateway"]["pid"])
    (starter,) = children(status["pid"])
    os.kill(starter, signal.SIGKILL)
    assert helper is not None
    assert helper.wait(20)
    wait_until(lambda: not lab.backend.is_running(), "the switch ends")
    lab.backend.ensure_running()
    assert lab.backend.status() is not None  # it has its ports
    assert is_answered(lab, guest)
    again = lab.backend.status()
    assert again is not None
    refs = [ProcessRef.of(pid) for pid in (again["gateway"]["pid"], *children(again["pid"]))]
    os.kill(again["pid"], signal.SIGKILL)
    for ref in refs:
        assert ref is None or ref.wait(20)
    wait_until(lambda: not lab.backend.is_running(), "the switch ends")  # its lock is free


def test_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper starts, confined, in its folder, and is ended; ending it twice is allowed."""
    require_qemu()
    monkeypatch.setattr(gateway_process, "owner_of", lambda folder: None)
    with tempfile.TemporaryDirectory(prefix="vmm-gw-") as folder:
        starter = LocalStarter(folder)
        gateway = Gateway(SETUP, folder, starter)
        gateway.start()
        try:
            wait_until(lambda: os.path.exists(gateway.peer), "the gateway has its socket")
            pid = starter.pid()
            assert pid is not None
            assert (facts(pid)["NoNewPrivs"], facts(pid)["Seccomp"]) == ("1", "2")
            assert gateway.status(True)["ready"]
        finally:
            gateway.stop()
            gateway.stop()
        assert gateway.status(True)["running"] is False
        assert not os.path.exists(gateway.peer)


class NoStarter:
    """A starter whose processes never run, unless set otherwise."""

    is_lost = False

    def __init__(self) -> None:
        self.tries = 0
        self.number: int | None = None

    def start(self, setup: GatewaySetup) -> None:
        """Count one more attempt."""
        self.tries += 1
        raise errors.Unsupported("it is not installed")

    def pid(self) -> int | None:
        """The number that was set."""
        return self.number

    def stop(self) -> None:
        """Stop nothing."""


def test_a_gateway_that_never_starts_is_tried_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end there is one attempt a minute, and soon again after a gateway that ran."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    starter = NoStarter()
    gateway = Gateway(SETUP, "/nowhere/sw-0123456789ab", starter)

    def tries_in(seconds: int) -> int:
        before = starter.tries
        for _ in range(seconds):
            clock[0] += 1.0
            gateway.keep_alive(starter.number is not None)
        return starter.tries - before

    assert tries_in(120) in range(5, 8)
    assert tries_in(600) in range(9, 12)
    starter.number = 1
    assert tries_in(100) == 0
    starter.number = None
    assert tries_in(6) == 2


def test_a_gateway_that_does_not_run_leaves_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note has the reason, from the first failure until the gateway takes frames again; not while it is merely
    starting."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    starter = NoStarter()
    folder = tmp_path / "sw-0123456789ab"
    folder.mkdir()
    gateway = Gateway(SETUP, str(folder), starter)
    (folder / "gateway.log").write_text("qemu-system-x86_64: -netdev {x}: Could not set up host forwarding\n")
    assert gateway_note.read(str(folder)) is None
    gateway.keep_alive(False)
    assert gateway_note.read(str(folder)) == "Could not set up host forwarding"
    clock[0] += 10
    gateway.keep_alive(False)
    assert gateway_note.read(str(folder)) == "it is not installed"
    starter.number = 1
    gateway.keep_alive(False)
    assert gateway_note.read(str(folder)) is not None
    gateway.keep_alive(True)
    assert gateway_note.read(str(folder)) is None
    gateway_note.leave(str(folder), "old")
    gateway.stop()
    assert gateway_note.read(str(folder)) is None


def test_low_ports_of_the_host_can_be_forwarded() -> None:
    """A gateway that forwards a low port has the capability to bind it, and no other gateway has any."""
    forwards = ("tcp:127.0.0.1:2222-10.0.7.9:22",)
    assert gateway_process.capabilities_for(replace(SETUP, forwards=forwards)) == ()
    low = replace(SETUP, forwards=(*forwards, "tcp::80-10.0.7.9:8080"))
    assert gateway_process.capabilities_for(low) == (10,)


def test_the_starter_refuses_anything_but_a_gateway(tmp_path: Path) -> None:
    """The process with root's rights refuses an impossible setup; data that is not a request has no effect."""
    require_root()
    starter = ForkedStarter(str(tmp_path / "sw-0123456789ab"), ())
    with pytest.raises(errors.InvalidSpec, match="not settings of a gateway"):
        starter.start(replace(SETUP, network="rubbish"))
    assert starter._ask("anything", words=["/bin/sh"]) is None
    assert starter.pid() is None
    assert starter.is_lost is False
    starter._channel.close()
    assert starter.pid() is None
    assert starter.is_lost
    os.wait()


def test_the_switch_gives_up_a_starter_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch, which moves no frames while it waits, stops waiting after a while, and ignores a late answer."""
    require_root()
    monkeypatch.setattr(gateway_process, "_ANSWER_SECONDS", 0.2)
    before = set(children(os.getpid()))
    starter = ForkedStarter(str(tmp_path / "sw-0123456789ab"), ())
    (pid,) = set(children(os.getpid())) - before
    try:
        os.kill(pid, signal.SIGSTOP)
        assert starter.pid() is None
        assert starter.is_lost
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(errors.VmmError, match="does not answer"):
            starter.start(SETUP)
    finally:
        starter._channel.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
