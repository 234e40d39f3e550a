# SPDX-License-Identifier: Apache-2.0
"""Frames through real sockets: the receivers get what the engine decides, and slow or absent ones do not disturb
others."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.net import dhcp_client, packets
from tests.vmm.net.test_dhcp_server import SETUP
from tests.vmm.net.test_engine import any_frame, rules
from vmm.net import frames, port_socket
from vmm.net.capture import PacketCapture
from vmm.net.dhcp_message import MessageType
from vmm.net.dhcp_server import DhcpServer
from vmm.net.engine import Drop, Engine, PortRules, VlanMode
from vmm.net.mover import Mover
from vmm.net.ports import PortSetup

ONE, TWO, THREE = (packets.mac(number) for number in range(3))


class Lab:
    """A switch whose ports end in sockets of this test."""

    def __init__(self, *port_rules: PortRules) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmm-lab-"))
        self.mover = Mover(Engine())
        self.guests: dict[str, socket.socket] = {}
        for number, one in enumerate(port_rules):
            self.plug(f"p{number}", one)

    def plug(self, name: str, one: PortRules, *, connected: bool = True) -> None:
        """A port with a guest at its other end; like QEMU's, a socket that is not connected is just bound."""
        setup = PortSetup(name, str(self.folder / f"{name}.s"), str(self.folder / f"{name}.g"), one)
        guest = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        guest.bind(setup.peer)
        guest.setblocking(False)
        self.guests[name] = guest
        self.mover.add(setup)
        if connected:
            guest.connect(setup.address)

    def send(self, name: str, *sent: bytes, now: float = 0.0) -> None:
        """Send these frames into a port, and let the switch move all of them."""
        for frame in sent:
            self.guests[name].sendto(frame, self.mover.sockets[name].setup.address) if not _peer(
                self.guests[name]
            ) else self.guests[name].send(frame)
        while self.mover.pump(self.mover.sockets[name], now):
            pass

    def received(self, name: str) -> list[bytes]:
        """Everything that waits at a guest."""
        got = []
        while True:
            try:
                got.append(self.guests[name].recv(20000))
            except BlockingIOError:
                return got

    def close(self) -> None:
        """Remove everything."""
        for name in list(self.mover.sockets):
            self.mover.remove(name)
        for guest in self.guests.values():
            guest.close()
        shutil.rmtree(self.folder)


def _peer(sock: socket.socket) -> bool:
    try:
        return bool(sock.getpeername())
    except OSError:
        return False


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three ports without rules."""
    one = Lab(PortRules(), PortRules(), PortRules())
    yield one
    one.close()


FRAMES = st.lists(any_frame().filter(len), max_size=100)


@given(st.lists(rules(), min_size=2, max_size=3), st.lists(st.tuples(st.integers(0, 2), FRAMES), max_size=4))
def test_moves_frames_as_the_engine_decides(
    port_rules: list[PortRules], rounds: list[tuple[int, list[bytes]]]
) -> None:
    """`INV-MOVER-IS-ENGINE`: batches of any frames reach the receivers of `Engine.forward`, each flow in order."""
    lab, model = Lab(*port_rules), Engine()
    try:
        for number, one in enumerate(port_rules):
            model.add_port(f"p{number}", one)
        for number, sent in rounds:
            source = f"p{number % len(port_rules)}"
            expected: dict[str, list[bytes]] = {name: [] for name in lab.guests}
            for frame in sent:
                for receiver, out in model.forward(source, frame, 0.0):
                    expected[receiver].append(out)
            lab.send(source, *sent)
            for name, wanted in expected.items():
                got = lab.received(name)
                assert sorted(got) == sorted(wanted)
                for flow in {one[:12] for one in wanted}:
                    assert [one for one in got if one[:12] == flow] == [one for one in wanted if one[:12] == flow]
        for name, port in model.ports.items():
            assert lab.mover.engine.ports[name].counters == port.counters
    finally:
        lab.close()


@pytest.mark.parametrize("size", [frames.MAX_FRAME_BYTES, frames.MAX_FRAME_BYTES + 1, 60000])
def test_longest_frames(lab: Lab, size: int) -> None:
    """`INV-BATCH-BOUNDED`: a frame at the limit passes unchanged; a longer one is dropped as malformed."""
    frame = packets.ethernet(TWO, ONE, bytes(size - 14))
    lab.send("p0", frame)
    fits = size <= frames.MAX_FRAME_BYTES
    assert lab.received("p1") == ([frame] if fits else [])
    assert lab.mover.engine.ports["p0"].counters.drops[Drop.MALFORMED] == (not fits)


def test_empty_datagrams_are_dropped(lab: Lab) -> None:
    """QEMU takes an empty datagram for the end of the network, so none is ever passed on."""
    lab.send("p0", b"", packets.ethernet(TWO, ONE), b"")
    assert lab.received("p1") == [packets.ethernet(TWO, ONE)]


def test_only_a_direct_sender_waits_for_a_slow_receiver(lab: Lab) -> None:
    """`INV-FLOOD-FREE`: a sender that floods, or is mirrored, never waits; a sender to a slow station does."""
    lab.plug("slow", PortRules(mirror_destination=True), connected=False)
    lab.mover.change("p1", replace(lab.mover.sockets["p1"].setup, rules=PortRules(mirror_source=True)))
    slow = lab.mover.sockets["slow"]

    def fill(destination: bytes) -> bool:
        was_congested = False
        for _ in range(4):
            lab.guests["p0"].send(packets.ethernet(destination, ONE, bytes(1000)))
        while lab.mover.pump(lab.mover.sockets["p0"], 0.0):
            was_congested = was_congested or lab.mover.congested
        for name in ("p1", "p2"):
            lab.received(name)
        return was_congested

    lab.send("p1", packets.ethernet(ONE, TWO))
    while len(slow.backlog) < port_socket.CONGESTED_FRAMES:
        assert not fill(TWO)
    assert slow.is_congested(0.0)
    assert not fill(frames.BROADCAST)
    assert not fill(THREE)  # an unknown station
    lab.guests["slow"].sendto(packets.ethernet(ONE, THREE), slow.setup.address)
    lab.mover.pump(slow, 0.0)
    assert fill(THREE)


def test_a_flood_is_kept_once(lab: Lab) -> None:
    """However many receivers are behind, memory under a storm does not grow with the number of ports."""
    for number in range(5):
        lab.plug(f"slow{number}", PortRules(), connected=False)
    lab.plug("tagged", PortRules(mode=VlanMode.TRUNK, allowed=frozenset({5})), connected=False)
    for number in range(100):
        lab.send("p0", packets.ethernet(frames.BROADCAST, ONE, number.to_bytes(2, "big") + bytes(1000)))
    kept = [lab.mover.sockets[f"slow{number}"].backlog for number in range(5)]
    assert len({len(one) for one in kept}) == 1
    assert len(kept[0]) > 50
    for copies in zip(*kept, strict=True):
        assert len({id(one) for one in copies}) == 1


def test_a_slow_receiver_gets_a_backlog_and_then_loses_frames(lab: Lab) -> None:
    """Frames that a guest like QEMU does not take at once wait, up to the limit; other guests get all of them at
    once."""
    lab.plug("slow", PortRules(), connected=False)
    sent = [packets.ethernet(frames.BROADCAST, ONE, number.to_bytes(2, "big")) for number in range(700)]
    for first in range(0, 700, 50):
        lab.send("p0", *sent[first : first + 50])
        assert lab.received("p1") == sent[first : first + 50]
    slow = lab.mover.sockets["slow"]
    assert lab.mover.full == [slow]
    assert len(slow.backlog) == port_socket.MAX_BACKLOG_FRAMES
    got: list[bytes] = []
    while slow.backlog or not got:
        got += lab.received("slow")
        slow.flush(0.0)
    got += lab.received("slow")
    assert got == sent[: len(got)]
    lost = slow.port.counters.drops[Drop.FULL]
    assert len(got) + lost == 700
    assert lost > 0


def test_frames_for_a_missing_guest_are_dropped_until_it_returns(lab: Lab) -> None:
    """Its return at the same path is noticed, and the other guests are not affected."""
    path = lab.mover.sockets["p1"].setup.peer
    lab.guests["p1"].close()
    lab.send("p0", packets.ethernet(frames.BROADCAST, ONE))
    assert len(lab.received("p2")) == 1
    assert not lab.mover.sockets["p1"].connected
    Path(path).unlink()
    guest = lab.guests["p1"] = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    guest.bind(path)
    guest.setblocking(False)
    lab.mover.sockets["p1"].check_peer()
    lab.send("p0", packets.ethernet(frames.BROADCAST, ONE))
    assert len(lab.received("p1")) == 1


def test_a_replaced_guest_is_noticed(lab: Lab) -> None:
    """Another socket at the same path, while the old one still exists, becomes the guest at the next check."""
    path = lab.mover.sockets["p1"].setup.peer
    old = lab.guests["p1"]
    Path(path).unlink()
    guest = lab.guests["p1"] = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    guest.bind(path)
    guest.setblocking(False)
    with pytest.raises(PermissionError):
        guest.sendto(packets.ethernet(TWO, ONE), lab.mover.sockets["p1"].setup.address)
    lab.mover.sockets["p1"].check_peer()
    guest.sendto(packets.ethernet(TWO, ONE), lab.mover.sockets["p1"].setup.address)
    old.close()


def test_links_in_place_of_the_guests_socket_are_not_followed(lab: Lab, tmp_path: Path) -> None:
    """A guest's process that replaces its socket by a link cannot redirect our frames."""
    elsewhere = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    elsewhere.bind(str(tmp_path / "log"))
    elsewhere.setblocking(False)
    path = Path(lab.mover.sockets["p1"].setup.peer)
    path.unlink()
    path.symlink_to(tmp_path / "log")
    lab.mover.sockets["p1"].check_peer()
    lab.send("p0", packets.ethernet(frames.BROADCAST, ONE))
    with pytest.raises(BlockingIOError):
        elsewhere.recv(100)
    elsewhere.close()


def test_only_the_guest_can_send_into_its_port(lab: Lab) -> None:
    """The kernel refuses every sender except the port's guest."""
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with pytest.raises(PermissionError):
        stranger.sendto(packets.ethernet(TWO, ONE), lab.mover.sockets["p0"].setup.address)
    stranger.close()


def test_guards_examine_each_frame_of_a_batch(lab: Lab) -> None:
    """In a batch of one flow, only the frames that the guard stops are dropped."""
    lab.mover.engine.set_rules("p0", PortRules(dhcp_guard=True))
    fine = packets.ethernet(frames.BROADCAST, ONE, packets.ipv4(17, packets.udp(68, 67)), kind=0x0800)
    lab.send("p0", fine, packets.dhcp_offer(ONE), fine)
    assert lab.received("p1") == [fine, fine]
    assert lab.mover.engine.ports["p0"].counters.drops == {Drop.DHCP: 1}


@pytest.mark.parametrize("vlan", [None, 0])
@pytest.mark.parametrize("is_learned", [True, False])
def test_dhcp_requests_go_to_the_switch(lab: Lab, vlan: int | None, is_learned: bool) -> None:
    """They never reach the gateway, which gets all other frames; `Engine.forward` decides the same.

    This holds also just after a restart, when the switch does not yet know where the gateway is.
    """
    mover = lab.mover
    mover.engine.set_dhcp(DhcpServer(SETUP), "p2")
    gateway = mover.engine.dhcp.mac if mover.engine.dhcp is not None else b""
    if is_learned:
        lab.send("p2", packets.ethernet(frames.BROADCAST, gateway))
        lab.received("p0"), lab.received("p1")
    question = dhcp_client.ask(ONE, dhcp_client.DISCOVER, vlan=vlan)
    renewal = dhcp_client.ask(
        ONE, dhcp_client.REQUEST, present="10.0.7.9", to="10.0.7.1", destination=gateway, vlan=vlan
    )
    elsewhere = dhcp_client.ask(ONE, dhcp_client.REQUEST, to="10.0.8.1", destination=gateway, vlan=vlan)
    others = [packets.ethernet(to, ONE, bytes(60), kind=0x0800, vlan=vlan) for to in (frames.BROADCAST, gateway)]
    sent = [others[0], question, others[1], renewal, elsewhere, question]
    expected: dict[str, int] = dict.fromkeys(lab.guests, 0)
    for frame in sent:
        for name, _ in mover.engine.forward("p0", frame, 0.0):
            expected[name] += 1
    lab.send("p0", *sent)
    assert sorted(message.kind for _, message in mover.questions) == [
        MessageType.DISCOVER,
        MessageType.DISCOVER,
        MessageType.REQUEST,
    ]
    assert {port.name for port, _ in mover.questions} == {"p0"}
    got = [len(lab.received(name)) for name in ("p1", "p2")]
    assert got == ([3, 3] if is_learned else [6, 3])
    assert got == [expected["p1"], expected["p2"]]


def test_dhcp_requests_in_a_vlan_are_not_the_switchs() -> None:
    """Its server is for adapters without a VLAN; a switch without a server receives no requests at all."""
    lab = Lab(PortRules(mode=VlanMode.ACCESS, vlan=5), PortRules(mode=VlanMode.ACCESS, vlan=5), PortRules())
    question = dhcp_client.ask(ONE, dhcp_client.DISCOVER)
    lab.mover.engine.set_dhcp(DhcpServer(SETUP), "p2")
    lab.send("p0", question)
    lab.mover.engine.set_dhcp(None, "p2")
    lab.send("p2", question)
    assert lab.mover.questions == []
    assert lab.received("p1") == [question]
    lab.close()


def test_a_gateways_dhcp_answers_are_dropped(lab: Lab) -> None:
    """Broadcasts of its own server are dropped; its other frames pass, with one decision per flow."""
    lab.mover.engine.set_rules("p2", PortRules(dhcp_guard=True))
    lab.mover.engine.set_dhcp(None, "p2")
    lab.send("p0", packets.ethernet(THREE, ONE))
    lab.received("p1"), lab.received("p2")
    fine = packets.ethernet(frames.BROADCAST, THREE, packets.ipv4(17, packets.udp(53, 68)), kind=0x0806)
    lab.send("p2", packets.dhcp_offer(THREE), fine, packets.ethernet(ONE, THREE))
    assert [lab.received("p0"), lab.received("p1")] == [[fine, packets.ethernet(ONE, THREE)], [fine]]
    port = lab.mover.engine.ports["p2"]
    assert not lab.mover.engine.decide(port, packets.ethernet(ONE, THREE), 0.0).inspect


def test_frames_sent_by_the_switch_itself(lab: Lab) -> None:
    """They are sent, counted and captured like others, and dropped if the receiver is missing or does not take
    them."""
    port, capture = lab.mover.engine.ports["p0"], PacketCapture("p0")
    lab.mover.add_capture(capture)
    frame = packets.ethernet(ONE, TWO)
    lab.mover.send_own(port, frame, 0.0)
    assert lab.received("p0") == [frame]
    assert frame in bytes(capture.pending)
    assert port.counters.transmitted_frames == 1
    lab.plug("slow", PortRules(), connected=False)
    slow = lab.mover.sockets["slow"]
    for _ in range(port_socket.MAX_BACKLOG_FRAMES + 300):
        lab.mover.send_own(slow.port, frame, 0.0)
    assert len(slow.backlog) == port_socket.MAX_BACKLOG_FRAMES
    assert lab.mover.full == [slow]
    assert slow.port.counters.drops[Drop.FULL] > 0
    lab.guests["p0"].close()
    lab.mover.send_own(port, frame, 0.0)
    assert port.counters.drops[Drop.LINK_DOWN] == 1
    lab.mover.remove("slow")
    lab.mover.send_own(slow.port, frame, 0.0)


def test_the_storm_limit_applies_within_batches() -> None:
    """The first frames of a burst pass, the rest is dropped, and more pass with time."""
    lab = Lab(PortRules(storm_frames_per_second=100), PortRules())
    frame = packets.ethernet(frames.BROADCAST, ONE)
    lab.send("p0", *[frame] * 30)
    assert len(lab.received("p1")) == 10
    lab.send("p0", *[frame] * 30, now=0.05)
    assert len(lab.received("p1")) == 5
    lab.close()


def test_made_up_headers_cannot_overfill_the_flow_table(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of flows is emptied when it is full, and frames still arrive where they should."""
    monkeypatch.setattr("vmm.net.mover.MAX_FLOWS", 10)
    lab.send("p1", packets.ethernet(frames.BROADCAST, TWO))
    sent = [packets.ethernet(TWO, ONE, bytes(4), kind=0x9000 + number) for number in range(35)]
    lab.send("p0", *sent)
    assert len(lab.mover.engine.ports["p0"].flows) <= 10
    assert lab.received("p1") == sent


def test_captures_show_what_guests_see() -> None:
    """A port's capture has both directions, sent frames in the form in which they leave; the switch's capture has each
    frame once."""
    lab = Lab(
        PortRules(mode=VlanMode.ACCESS, vlan=10),
        PortRules(mode=VlanMode.TRUNK, allowed=frozenset({10})),
    )
    port, whole = PacketCapture("p1"), PacketCapture(None)
    lab.mover.add_capture(port)
    lab.mover.add_capture(whole)
    plain, tagged = packets.ethernet(TWO, ONE), packets.ethernet(TWO, ONE, vlan=10)
    lab.send("p0", plain)
    assert tagged in bytes(port.pending)
    assert plain in bytes(whole.pending)
    assert whole.taken_frames == 1
    lab.plug("late", PortRules())
    assert lab.mover.sockets["late"].captures == [whole]
    lab.mover.remove_capture(port)
    lab.send("p0", plain)
    assert (port.taken_frames, whole.taken_frames) == (1, 2)
    lab.close()
