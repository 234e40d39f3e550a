# SPDX-License-Identifier: Apache-2.0
"""The switch process: ports, restarts, limits, captures, bad clients."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.support import require_qemu, require_tool
from tests.vmm.net import packets
from tests.vmm.net.lab import SwitchLab
from tests.vmm.net.test_gateway import SETUP
from tests.waiting import wait_until
from vmm.host.proc import ProcessRef
from vmm.model import errors
from vmm.net import frames, switch_process, user_switch
from vmm.net.engine import PortRules, VlanMode
from vmm.net.user_switch import UserSwitch

ONE, TWO = packets.mac(1), packets.mac(2)
HELLO, BACK = packets.ethernet(TWO, ONE), packets.ethernet(ONE, TWO)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[SwitchLab]:
    """A switch that is not started yet."""
    one = SwitchLab(monkeypatch)
    yield one
    one.close()


def port_status(lab: SwitchLab, name: str) -> dict[str, object]:
    """What the switch reports about a port."""
    status = lab.backend.status()
    assert status is not None
    found: dict[str, object] = next(one for one in status["ports"] if one["name"] == name)
    return found


def test_two_guests_talk(lab: SwitchLab) -> None:
    """The first port starts the switch; frames pass both ways and are counted, and stations are known."""
    one, other = lab.plug("a"), lab.plug("b")
    lab.send("a", HELLO)
    assert other.recv(2000) == HELLO
    lab.send("b", BACK)
    assert one.recv(2000) == BACK
    status = port_status(lab, "a")
    assert (status["received_frames"], status["transmitted_bytes"]) == (1, len(BACK))
    known = {(entry["mac"], entry["port"]) for entry in lab.backend.ask("addresses")}
    assert known == {(frames.format_mac(ONE), "a"), (frames.format_mac(TWO), "b")}


def test_a_kill_under_traffic_goes_unnoticed(lab: SwitchLab) -> None:
    """`INV-SWITCH-RESTART`: after kill -9 and a new start guests communicate as before, with the same rules, without
    any action of theirs."""
    lab.plug("a", rules=PortRules(mode=VlanMode.ACCESS, vlan=5))
    other = lab.plug("b", rules=PortRules(mode=VlanMode.ACCESS, vlan=5))
    lab.plug("c")
    status = lab.backend.status()
    assert status is not None
    got_before = got_after = 0
    deadline = time.monotonic() + 60
    killed = False
    while got_after < 5 and time.monotonic() < deadline:
        try:
            lab.send("a", HELLO)
            assert other.recv(2000) == HELLO
            got_after, got_before = got_after + killed, got_before + (not killed)
        except (OSError, TimeoutError):
            assert killed, "a frame was lost for no reason"
        if got_before == 5 and not killed:
            os.kill(status["pid"], signal.SIGKILL)
            killed = True
            other.settimeout(0.2)  # frames sent in the meantime are lost
        if killed:
            lab.backend.ensure_running()
    assert got_after == 5
    assert [port_status(lab, name)["vlan"] for name in "abc"] == [5, 5, 0]
    assert lab.backend.status() != status


def test_a_switch_that_does_not_answer_can_be_removed(lab: SwitchLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing a switch whose process hangs succeeds: the process is killed, and leaves nothing."""
    lab.plug("a")
    status = lab.backend.status()
    assert status is not None
    ref = ProcessRef.of(status["pid"])
    assert ref is not None
    assert ref.send(signal.SIGSTOP)
    monkeypatch.setattr(switch_process, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(switch_process, "GRACE_SECONDS", 0.2)
    lab.backend.stop()
    assert not ref.is_alive()
    assert not os.path.exists(lab.backend.folder)


def test_without_its_gateway_it_starts_again(lab: SwitchLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests still reach each other if the gateway's program is missing after a restart; it is tried again later."""
    require_qemu()
    lab.plug("a")
    other = lab.plug("b")
    lab.backend.ask("set_gateway", gateway=asdict(SETUP))
    lab.backend.ask("stop")
    lab.wait_for_end()
    monkeypatch.setenv("PATH", "/nowhere")
    lab.backend.ensure_running()
    status = lab.backend.status()
    assert status is not None
    assert status["gateway"]["running"] is False
    lab.send("a", HELLO)
    assert other.recv(2000) == HELLO


def test_many_starters_start_one(lab: SwitchLab) -> None:
    """However many callers start the switch at once, one process runs, and all of them find it."""
    program = (
        "import sys; from vmm.net.switch_process import SwitchProcess\n"
        "print(SwitchProcess(sys.argv[1], 'lab').ensure('status')['pid'])"
    )
    import sys

    starters = [
        subprocess.Popen([sys.executable, "-c", program, lab.backend.folder], stdout=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    assert len({starter.communicate(timeout=60)[0] for starter in starters}) == 1


def test_rules_change_while_it_runs(lab: SwitchLab) -> None:
    """A port that is plugged in again with other rules has them at once."""
    lab.plug("a")
    other = lab.plug("b")
    lab.send("a", HELLO)
    assert other.recv(2000) == HELLO
    lab.plug("a", rules=PortRules(addresses=frozenset({TWO})))
    lab.send("a", HELLO)
    wait_until(lambda: port_status(lab, "a")["received_frames"] == 2, "both frames arrive")
    assert port_status(lab, "a")["drops"] == {"spoofed": 1}


def test_links_go_down_and_up(lab: SwitchLab) -> None:
    """A link that is down drops frames and counts them; it is still down after a restart."""
    lab.plug("a")
    other = lab.plug("b")
    lab.backend.ask("set_link", name="a", up=False)
    lab.send("a", HELLO)
    wait_until(lambda: port_status(lab, "a")["drops"], "the frame is counted")
    status = lab.backend.status()
    assert status is not None
    os.kill(status["pid"], signal.SIGKILL)
    wait_until(lambda: not lab.backend.is_running(), "the switch ends")
    lab.backend.ensure_running()
    assert port_status(lab, "a")["link_up"] is False
    lab.backend.ask("set_link", name="a", up=True)
    lab.send("a", HELLO)
    assert other.recv(2000) == HELLO


@pytest.mark.slow
def test_bandwidth_limit_holds(lab: SwitchLab) -> None:
    """A guest that sends at full speed gets its limit, within 15 %; a second of waiting does not count."""
    lab.plug("a", rate_bits_per_second=8_000_000)
    other = lab.plug("b")
    sender = lab.guests["a"]
    sender.setblocking(False)
    frame = packets.ethernet(TWO, ONE, bytes(1486))
    started = first = 0.0
    received = 0
    for _ in range(200):  # the content of the buffers passes first
        try:
            lab.send("a", frame)
        except BlockingIOError:
            break
    rates: list[float] = []
    while not any(0.85 * 8_000_000 < rate < 1.15 * 8_000_000 for rate in rates):
        assert len(rates) < 30, rates
        try:
            while True:
                lab.send("a", frame)
        except BlockingIOError:
            pass
        got = len(other.recv(2000))
        first = first or time.monotonic()
        if not started:
            if time.monotonic() - first > 0.3:
                started = time.monotonic()
        elif time.monotonic() - started < 1.0:
            received += got
        else:
            rates.append((received + got) * 8 / (time.monotonic() - started))
            started, received = time.monotonic(), 0


@pytest.mark.interop
def test_captures_stream_to_their_readers(lab: SwitchLab, tmp_path: Path) -> None:
    """Both directions of a port are streamed until the reader disconnects; then the switch drops the capture."""
    one, other = lab.plug("a"), lab.plug("b")
    path = tmp_path / "c.pcapng"
    with lab.backend.capture("a") as stream, path.open("wb") as file:
        lab.send("a", HELLO)
        assert other.recv(2000) == HELLO
        lab.send("b", BACK)
        assert one.recv(2000) == BACK
        stream.settimeout(10)
        content = b""
        while content.count(HELLO[12:]) < 2:
            content += stream.recv(1 << 16)
        file.write(content)
    done = subprocess.run(
        [require_tool("tshark"), "-r", path, "-T", "fields", "-e", "eth.src"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.split() == [frames.format_mac(ONE), frames.format_mac(TWO)]
    wait_until(lambda: not (lab.backend.status() or {"capture_count": 0})["capture_count"], "the capture ends")
    with pytest.raises(errors.NotFound, match="no port unknown"), lab.backend.capture("unknown"):
        pass
    with pytest.raises(errors.InvalidSpec), lab.backend.capture(None, 5):
        pass


@pytest.mark.parametrize(
    "line",
    [
        b"rubbish\n",
        b"[]\n",
        b'{"jsonrpc": "2.0", "id": 1, "method": "nothing"}\n',
        b'{"jsonrpc": "2.0", "id": 1, "method": "add_port", "params": {"name": "x"}}\n',
        b'{"jsonrpc": "2.0", "id": 1, "method": "set_gateway", "params": {"gateway": {"network": "x"}}}\n',
        b'{"jsonrpc": "2.0", "id": 1, "method": "status", "params": []}\n',
        b"[" * 60000 + b"\n",
        b"\xff\xfe\n",
    ],
    ids=range(8),
)
def test_bad_requests_are_answered(lab: SwitchLab, line: bytes) -> None:
    """The answer is an error on one line, and the switch continues."""
    lab.backend.ensure("status")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(f"{lab.backend.folder}/control.sock")
        client.sendall(line)
        assert b'"error"' in client.makefile("rb").readline()
    assert lab.backend.status() is not None


def test_endless_lines_are_disconnected(lab: SwitchLab) -> None:
    """A client that never ends its line loses its connection, and costs bounded memory."""
    lab.backend.ensure("status")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(f"{lab.backend.folder}/control.sock")
        with pytest.raises(OSError):
            for _ in range(1000):
                client.sendall(bytes(1 << 16))
    assert lab.backend.status() is not None


def test_random_bytes_do_not_disturb_it(lab: SwitchLab) -> None:
    """A guest that sends garbage of every length is counted, and the others are not affected."""
    lab.plug("a")
    lab.plug("b")
    other = lab.plug("c")
    rng = random.Random(1)
    lab.send("b", BACK)
    for _ in range(2000):
        beginning = rng.choice((b"", TWO + ONE, TWO + ONE + frames.TPID, frames.BROADCAST + ONE + b"\x08\x00"))
        lab.send("a", beginning + rng.randbytes(rng.choice((0, 1, 3, 17, 60, 1500, 9300))))
    drained = 0
    other.settimeout(0.3)
    try:
        while True:
            other.recv(20000)
            drained += 1
    except TimeoutError:
        pass
    other.settimeout(10)
    lab.send("b", packets.ethernet(frames.BROADCAST, TWO, b"alive"))
    while not other.recv(20000).endswith(b"alive"):
        pass
    assert drained
    drops = port_status(lab, "a")["drops"]
    assert isinstance(drops, dict)
    assert drops["malformed"]


def test_it_ends_when_it_is_no_longer_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without ports and clients the process ends by itself; with a port it stays."""
    monkeypatch.setattr(user_switch, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(user_switch, "TICK_SECONDS", 0.01)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()
    switch = UserSwitch(str(tmp_path), "idle", listener)
    switch.run()
    switch.close()


def test_damaged_ports_are_logged_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ports that cannot be restored are named in the log; the switch starts."""
    (tmp_path / "ports.json").write_text('{"ports": [{"name": "x", "address": "/no/such/folder/s", "peer": "/p"}]}')
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()
    switch = UserSwitch(str(tmp_path), "lab", listener)
    switch.close()
    assert "/no/such/folder/s" in caplog.text
    (tmp_path / "ports.json").write_text("rubbish")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control2.sock"))
    listener.listen()
    UserSwitch(str(tmp_path), "lab", listener).close()
    assert "lost" in caplog.text
