# SPDX-License-Identifier: Apache-2.0
"""How the kernel enforces the limits of a bridge's ports, between network namespaces that act as guests."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from tests.support import require_root_and_namespaces, require_tool
from tests.vmm.net import packets
from tests.vmm.net.machines import Namespaces
from vmm.model import errors
from vmm.net import enforcing, nft, shaping
from vmm.net.engine import PortRules
from vmm.net.nft import GuestPort
from vmm.net.switch_spec import SwitchSpec, make_switch

pytestmark = [pytest.mark.netns]
SPEC = make_switch(name="x", type="external", uplink="e0", backend="bridge")
ANY = PortRules(spoofing=True)
RATE = 8_000_000


class Bridge:
    """A host with a bridge br0 whose ports vt0 and vt1 lead to the eth0 of two guests."""

    def __init__(self) -> None:
        self.spaces = Namespaces()
        self.here, self.one, self.two = (self.spaces.add(word) for word in ("host", "one", "two"))
        self.spaces.run(self.here, "ip link add br0 type bridge && ip link set br0 up")
        for number, name in enumerate((self.one, self.two)):
            self.spaces.run(name, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1")
            self.spaces.run(self.here, f"ip link add vt{number} type veth peer name eth0 netns {name}")
            self.spaces.run(self.here, f"ip link set vt{number} master br0 up")
            self.spaces.run(name, f"ip addr add 10.5.0.{number + 1}/24 dev eth0 && ip link set eth0 up")
        self.spaces.run(self.one, "ping -c 1 -w 10 10.5.0.2")

    def enforce(self, *ports: GuestPort) -> None:
        """Enforce the ports as the switch does."""
        with self.spaces.inside(self.here):
            enforcing.enforce(SPEC, ports)

    def drops(self) -> dict[str, dict[str, int]]:
        """The drops, as the switch counts them."""
        with self.spaces.inside(self.here):
            return enforcing.drops(SPEC)

    def send(self, *frames: bytes) -> None:
        """Send frames from the first guest's card."""
        with self.spaces.inside(self.one):
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with sock:
            sock.bind(("eth0", 0))
            for frame in frames:
                sock.send(frame)

    def received_bytes(self) -> int:
        """How many bytes reached the second guest's card."""
        said = json.loads(self.spaces.run(self.two, "ip -j -s link show eth0"))
        found: int = said[0]["stats64"]["rx"]["bytes"]
        return found


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    """The namespaces of this test."""
    require_root_and_namespaces()
    require_tool("nft")
    one = Bridge()
    try:
        yield one
    finally:
        one.spaces.close()


_FLOOD = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    try: sock.sendto(bytes(1472), ("10.5.0.2", 9))
    except OSError: pass
"""


@pytest.mark.slow
def test_a_bandwidth_limit_holds_from_the_first_moment(bridge: Bridge) -> None:
    """A sender that floods gets at most 5 % more than its limit, idle before or not; lost frames are counted."""
    bridge.enforce(GuestPort("vt0", ANY, RATE), GuestPort("vt1", ANY))
    before, start = bridge.received_bytes(), time.monotonic()
    flood = subprocess.Popen(["ip", "netns", "exec", bridge.one, sys.executable, "-c", _FLOOD])
    try:
        while time.monotonic() < start + 1.5 or not bridge.drops().get("vt0", {}).get("bandwidth"):
            bridge.enforce(GuestPort("vt0", ANY, RATE), GuestPort("vt1", replace(ANY, dhcp_guard=True)))
            assert time.monotonic() < start + 60
            time.sleep(0.1)  # the rate is measured over a while
        got = bridge.received_bytes() - before
        seconds = time.monotonic() - start
    finally:
        flood.kill()
        flood.wait()
    assert got * 8 / seconds <= 1.05 * RATE


def test_a_limit_is_changed_and_removed(bridge: Bridge) -> None:
    """Another rate takes effect at once; without a limit, and after the switch is deleted, there is no queue."""
    bridge.enforce(GuestPort("vt0", ANY, RATE))
    assert "rate 8Mbit burst 10000b" in bridge.spaces.run(bridge.here, "tc qdisc show dev vb0")
    bridge.enforce(GuestPort("vt0", ANY, 64_000), GuestPort("vt1", ANY, 10 * RATE))
    assert "rate 64Kbit burst 303" in bridge.spaces.run(bridge.here, "tc qdisc show dev vb0")
    bridge.spaces.run(bridge.one, "ping -c 1 -w 10 10.5.0.2")
    bridge.enforce(GuestPort("vt0", ANY), GuestPort("vt1", ANY, 10 * RATE))
    bridge.spaces.run(bridge.one, "ping -c 1 -w 10 10.5.0.2")
    assert [name for name in ("vb0", "vb1") if name in bridge.spaces.run(bridge.here, "ip -br link")] == ["vb1"]
    bridge.spaces.run(bridge.here, "ip link set vt1 mtu 9000")
    bridge.enforce(GuestPort("vt1", ANY, RATE))
    assert "burst 1803" in bridge.spaces.run(bridge.here, "tc qdisc show dev vb1")
    with bridge.spaces.inside(bridge.here):
        enforcing.end(SPEC)
    assert "vb" not in bridge.spaces.run(bridge.here, "ip -br link")
    assert bridge.spaces.run(bridge.here, "nft list ruleset") == ""


def test_a_queue_whose_maker_was_killed_is_removed_with_the_switch(bridge: Bridge) -> None:
    """This includes a queue that has no owner yet, whether its tap exists or not; queues of other switches stay."""
    for name in ("vb0", "vb0123456789ab", "ifb7"):
        bridge.spaces.run(bridge.here, f"ip link add {name} type ifb")
    bridge.enforce(GuestPort("vt0", ANY, RATE))
    with bridge.spaces.inside(bridge.here):
        enforcing.end(SPEC)
    links = bridge.spaces.run(bridge.here, "ip -br link show type ifb")
    assert "ifb7" in links and "vb" not in links


def test_a_queue_stays_when_its_tap_has_moved_to_another_switch(bridge: Bridge) -> None:
    """The switch that had the tap before removes only its own queues."""
    other = make_switch(name="y", type="external", uplink="e1", backend="bridge")
    bridge.enforce(GuestPort("vt0", ANY, RATE))
    with bridge.spaces.inside(bridge.here):
        enforcing.enforce(other, [GuestPort("vt0", ANY, RATE)])
        enforcing.end(SPEC)
        assert "vb0" in bridge.spaces.run(bridge.here, "ip -br link show type ifb")
        enforcing.end(other)
    assert "vb0" not in bridge.spaces.run(bridge.here, "ip -br link show type ifb")


def test_a_missing_tap_is_skipped(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that ends while rules are loaded does not keep the other ports from getting theirs."""
    limited = GuestPort("vt0", ANY, RATE), GuestPort("vt1", ANY, RATE)
    bridge.enforce(*limited)
    load = nft.load
    calls: list[list[GuestPort]] = []

    def end_meanwhile(spec: SwitchSpec, ports: list[GuestPort], *, anew: bool) -> None:
        calls.append(ports)
        if len(calls) == 1:
            bridge.spaces.run(bridge.here, "ip link del vt0")
            raise errors.VmmError("there is no vt0")  # as reported by kernels before 6.16
        load(spec, ports, anew=anew)

    monkeypatch.setattr(nft, "load", end_meanwhile)
    bridge.enforce(*limited)
    assert len(calls) == 2
    listed = bridge.spaces.run(bridge.here, "nft list ruleset")
    assert 'fwd to "vb1"' in listed
    assert 'fwd to "vb0"' not in listed


def test_a_change_at_a_port_leaves_counters_and_limits_alone(bridge: Bridge) -> None:
    """`INV-LIMITS-KEPT`: the kernel keeps the same objects with the same counts when other ports change."""
    stormy = PortRules(spoofing=True, storm_frames_per_second=10)
    bridge.enforce(GuestPort("vt0", stormy, RATE), GuestPort("vt1", ANY))
    tagged = packets.ethernet(packets.mac(2), packets.mac(1), bytes(50), vlan=5)
    bridge.send(*[tagged] * 7)

    def kept() -> list[dict[str, dict[str, str]]]:
        listed = json.loads(bridge.spaces.run(bridge.here, "nft -j list ruleset"))["nftables"]
        return [one for one in listed if {"counter", "limit"} & set(one)]

    before = [one for one in kept() if "vt0" in str(one)]
    assert bridge.drops() == {"vt0": {"vlan": 7}}
    assert {next(iter(one.values()))["name"] for one in before} >= {"vt0.storm", "vt0.vlan", "vt0.storm-limit.10"}
    for other in (GuestPort("vt1", replace(stormy, dhcp_guard=True)), GuestPort("vt1", ANY, RATE)):
        bridge.enforce(GuestPort("vt0", stormy, RATE), other)
        assert [one for one in kept() if "vt0" in str(one)] == before
    bridge.enforce(GuestPort("vt0", stormy, RATE))
    assert [one for one in kept() if one not in before] == []
    assert bridge.drops() == {"vt0": {"vlan": 7}}


def test_rules_are_flushed_while_a_port_changes(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nft flush ruleset` between reading the rules and loading the new ones is not an error, and all rules are there
    afterwards."""
    stormy = PortRules(spoofing=True, storm_frames_per_second=10)
    bridge.enforce(GuestPort("vt0", stormy), GuestPort("vt1", stormy))
    own, looks = nft._own, []

    def flushed(spec: SwitchSpec) -> list[tuple[str, dict[str, Any]]]:
        found = own(spec)
        looks.append(len(found))
        if len(looks) == 1:
            bridge.spaces.run(bridge.here, "nft flush ruleset")
        return found

    monkeypatch.setattr(nft, "_own", flushed)
    bridge.enforce(GuestPort("vt0", stormy))
    assert len(looks) == 2
    listed = bridge.spaces.run(bridge.here, "nft list ruleset")
    assert "vt0.sending" in listed and "vt1" not in listed


def test_every_reason_is_counted(bridge: Bridge) -> None:
    """Drops for spoofing, tags, guards and storms are counted separately, at the port that sent."""
    me = packets.mac(1)
    rules = PortRules(frozenset({me}), dhcp_guard=True, router_guard=True, storm_frames_per_second=10)
    bridge.enforce(GuestPort("vt0", rules), GuestPort("vt1", ANY))
    hello = packets.ethernet(packets.mac(2), me, bytes(50))
    bridge.send(hello, packets.ethernet(packets.mac(2), packets.mac(9), bytes(50)))
    bridge.send(packets.ethernet(packets.mac(2), me, bytes(50), vlan=5))
    bridge.send(packets.dhcp_offer(me), packets.router_advertisement(me))
    assert bridge.drops() == {"vt0": {"spoofed": 1, "vlan": 1, "dhcp-guard": 1, "router-guard": 1}}
    sent, start = 1000, time.monotonic()
    bridge.send(*[packets.ethernet(b"\xff" * 6, me, bytes(50))] * sent)
    refilled = (time.monotonic() - start) * 10 + 1
    assert sent - 1 - refilled <= bridge.drops()["vt0"]["storm"] < sent


def test_a_kernel_without_queues_refuses_a_limit(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which module to load; no limit is set in part."""

    def refuse(*arguments: object) -> None:
        raise NetlinkError(95, "Operation not supported")

    monkeypatch.setattr(shaping, "_ensure", refuse)
    with pytest.raises(errors.Unsupported, match="cannot limit bandwidth"):
        bridge.enforce(GuestPort("vt0", ANY, RATE))
    assert bridge.spaces.run(bridge.here, "nft list ruleset") == ""
