# SPDX-License-Identifier: Apache-2.0
"""The learning switch: compared with a naive 802.1Q bridge, and each guard separately."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.net import packets
from tests.vmm.net.bridge_model import ModelBridge, ModelPort
from vmm.net import engine, frames
from vmm.net.engine import Drop, Engine, PortRules, VlanMode

STATIONS = [packets.mac(number) for number in range(5)]
GROUPS = [frames.BROADCAST, b"\x01\x00\x5e\x00\x00\x01", bytes.fromhex("0180c2000000"), bytes.fromhex("0180c2000010")]
VLANS = [0, 1, 10, 20, 4095]


@st.composite
def rules(draw: Any) -> PortRules:
    """Rules that the model can handle."""
    mode = draw(st.sampled_from(VlanMode))
    vlan = {VlanMode.UNTAGGED: 0}.get(mode, draw(st.sampled_from([1, 10, 20])))
    if mode is VlanMode.TRUNK:
        vlan = draw(st.sampled_from([0, 10]))
    allowed = draw(st.sets(st.sampled_from([1, 10, 20]))) if mode is VlanMode.TRUNK else set()
    return PortRules(
        addresses=frozenset(draw(st.sets(st.sampled_from(STATIONS), max_size=3))),
        spoofing=draw(st.booleans()),
        mode=mode,
        vlan=vlan,
        allowed=frozenset(allowed),
    )


def any_frame() -> st.SearchStrategy[bytes]:
    """Well-formed and malformed frames between few stations, with and without tags."""
    made = st.builds(
        packets.ethernet,
        st.sampled_from(STATIONS + GROUPS),
        st.sampled_from([*STATIONS, GROUPS[1]]),
        st.binary(max_size=4),
        vlan=st.none() | st.sampled_from(VLANS),
        kind=st.sampled_from([0x88B5, 0x8100, 0x88A8, 0x9100]),
    )
    prioritised = made.map(
        lambda frame: frame[:14] + bytes([frame[14] | 0xA0]) + frame[15:] if len(frame) > 15 else frame
    )
    cut = st.builds(lambda frame, size: frame[:size], made, st.integers(0, 18))
    return made | prioritised | cut


STEP = st.tuples(st.integers(0, 3), any_frame(), st.sampled_from([0.0, 1.0, 70.0, 299.0, 301.0]), st.integers(0, 19))


@given(st.lists(rules(), min_size=2, max_size=4), st.lists(STEP, max_size=60))
def test_switch_is_a_learning_bridge(port_rules: list[PortRules], steps: list[tuple[int, bytes, float, int]]) -> None:
    """`INV-SWITCH-MODEL`: for random ports, frames, pauses and changes of ports, both give the same."""
    switch, model = Engine(), ModelBridge(engine.AGEING_SECONDS)

    def put(name: str, one: PortRules) -> None:
        only = set() if one.spoofing else set(one.addresses)
        model.ports[name] = ModelPort(one.vlan, set(one.allowed), only, one.mode is VlanMode.TRUNK)

    for number, one in enumerate(port_rules):
        switch.add_port(f"p{number}", one)
        put(f"p{number}", one)
    now = 1000.0
    for number, frame, pause, event in steps:
        now += pause
        name = f"p{number % len(port_rules)}"
        if event == 0:
            switch.age(now)
        elif event == 1:
            switch.set_rules(name, port_rules[0])
            model.forget(name)
            put(name, port_rules[0])
        expected = model.forward(name, frame, now)
        cached = switch.ports[name].flows.get(frame[:16])
        assert sorted(switch.forward(name, frame, now)) == sorted(expected)
        _check_cache(switch, name, frame, cached, now)


def _check_cache(switch: Engine, name: str, frame: bytes, cached: object, now: float) -> None:
    """Every decision that a frame mover could have cached since the last change is still what the engine decides
    now."""
    port = switch.ports[name]
    if frames.is_malformed(frame[:16], len(frame)):
        return
    decision = switch.decide(port, frame[:16], now)
    if cached is not None and frame[:16] in port.flows:
        assert cached is decision
    port.flows[frame[:16]] = decision


@given(st.lists(st.tuples(st.integers(0, 2), any_frame()), max_size=50))
def test_frames_stay_in_their_vlan_and_never_return(steps: list[tuple[int, bytes]]) -> None:
    """`INV-VLAN-ISOLATED` and `INV-NO-REFLECTION`, whatever is sent."""
    switch = Engine()
    for name, vlan in (("a", 10), ("b", 20), ("c", 10)):
        switch.add_port(name, PortRules(mode=VlanMode.ACCESS, vlan=vlan))
    for number, frame in steps:
        name = "abc"[number]
        receivers = {receiver for receiver, _ in switch.forward(name, frame, 0.0)}
        assert name not in receivers
        assert "b" not in receivers
        assert name != "b" or not receivers


def switch_with(**ports: PortRules) -> Engine:
    """A switch with these ports."""
    switch = Engine()
    for name, one in ports.items():
        switch.add_port(name, one)
    return switch


def receivers(switch: Engine, name: str, frame: bytes, now: float = 0.0) -> str:
    """The names of the ports that get the frame."""
    return "".join(sorted(receiver for receiver, _ in switch.forward(name, frame, now)))


ONE, TWO, THREE = STATIONS[:3]


def test_learning_and_ageing() -> None:
    """Frames for unknown stations are flooded, for known ones sent only to them, and a silent station ages out."""
    switch = switch_with(a=PortRules(), b=PortRules(), c=PortRules())
    assert receivers(switch, "a", packets.ethernet(TWO, ONE)) == "bc"
    assert receivers(switch, "b", packets.ethernet(ONE, TWO)) == "a"
    assert receivers(switch, "a", packets.ethernet(TWO, ONE), 300.0) == "b"
    assert receivers(switch, "a", packets.ethernet(TWO, ONE), 301.0) == "bc"
    assert [(entry[1], entry[2]) for entry in switch.addresses(301.0)] == [(ONE, "a")]
    switch.age(301.0)
    assert len(switch.addresses(301.0)) == 1


def test_stations_move() -> None:
    """A station that sends from another port is expected there from then on."""
    switch = switch_with(a=PortRules(), b=PortRules(), c=PortRules())
    switch.forward("a", packets.ethernet(TWO, ONE), 0.0)
    switch.forward("b", packets.ethernet(TWO, ONE), 1.0)
    assert receivers(switch, "c", packets.ethernet(ONE, THREE), 2.0) == "b"


def test_access_ports_and_trunks() -> None:
    """A tag is added for the trunk and removed for the access port; the native VLAN has none."""
    switch = switch_with(
        access=PortRules(mode=VlanMode.ACCESS, vlan=10),
        trunk=PortRules(mode=VlanMode.TRUNK, vlan=20, allowed=frozenset({10, 20, 30})),
        native=PortRules(mode=VlanMode.ACCESS, vlan=20),
    )
    plain, tagged = packets.ethernet(TWO, ONE), packets.ethernet(TWO, ONE, vlan=10)
    assert switch.forward("access", plain, 0.0) == [("trunk", tagged)]
    assert switch.forward("native", plain, 0.0) == [("trunk", plain)]
    assert switch.forward("trunk", packets.ethernet(ONE, TWO, vlan=10), 0.0) == [
        ("access", packets.ethernet(ONE, TWO))
    ]
    assert switch.forward("trunk", packets.ethernet(ONE, TWO, vlan=20), 0.0) == [
        ("native", packets.ethernet(ONE, TWO))
    ]
    assert switch.forward("access", tagged, 0.0) == []
    assert switch.forward("trunk", packets.ethernet(ONE, TWO, vlan=40), 0.0) == []
    assert switch.ports["access"].counters.drops == {Drop.VLAN: 1}


@pytest.mark.parametrize("outer", [0, 10])
def test_a_tag_within_a_tag_leads_into_no_other_vlan(outer: int) -> None:
    """The outer tag is removed on the way to VLAN 10's own ports: the inner one must not become the frame's tag."""
    switch = switch_with(
        sender=PortRules(mode=VlanMode.TRUNK, vlan=10, allowed=frozenset({10})),
        access=PortRules(mode=VlanMode.ACCESS, vlan=10),
        victim=PortRules(mode=VlanMode.TRUNK, vlan=10, allowed=frozenset({20})),
    )
    for name in ("sender",) if outer else ("sender", "access"):
        inner = packets.ethernet(TWO, ONE, vlan=20)
        assert receivers(switch, name, inner[:12] + frames.tag(outer) + inner[12:]) == ""
        assert switch.ports[name].counters.drops == {"vlan": 1}
    carries = switch_with(
        a=PortRules(mode=VlanMode.TRUNK, allowed=frozenset({10})),
        b=PortRules(mode=VlanMode.TRUNK, allowed=frozenset({10})),
    )
    inner = packets.ethernet(TWO, ONE, vlan=20)
    assert receivers(carries, "a", inner[:12] + frames.tag(10) + inner[12:]) == "b"


def test_spoofed_senders_are_dropped_unless_allowed() -> None:
    """The guard is on by default where the port's addresses are known."""
    switch = switch_with(a=PortRules(addresses=frozenset({ONE})), b=PortRules())
    assert receivers(switch, "a", packets.ethernet(TWO, ONE)) == "b"
    assert receivers(switch, "a", packets.ethernet(TWO, THREE)) == ""
    assert switch.ports["a"].counters.drops[Drop.SPOOFED] == 1
    switch.set_rules("a", PortRules(addresses=frozenset({ONE}), spoofing=True))
    assert receivers(switch, "a", packets.ethernet(TWO, THREE)) == "b"


def test_guards_drop_only_servers() -> None:
    """A guarded port may be a client and talk to others, but not be a DHCP server or a router."""
    switch = switch_with(a=PortRules(dhcp_guard=True, router_guard=True), b=PortRules())
    assert receivers(switch, "a", packets.ethernet(TWO, ONE)) == "b"
    assert receivers(switch, "a", packets.dhcp_offer(ONE)) == ""
    assert receivers(switch, "a", packets.router_advertisement(ONE)) == ""
    assert switch.ports["a"].counters.drops == {Drop.DHCP: 1, Drop.ROUTER: 1}
    assert receivers(switch, "b", packets.dhcp_offer(TWO)) == "a"


def test_storms_are_limited_but_not_unicast() -> None:
    """Flooded frames pass at the given rate; all frames for a known station pass."""
    switch = switch_with(a=PortRules(storm_frames_per_second=100), b=PortRules(), c=PortRules())
    flood, known = packets.ethernet(frames.BROADCAST, ONE), packets.ethernet(TWO, ONE)
    switch.forward("b", packets.ethernet(ONE, TWO), 0.0)
    passed = sum(bool(switch.forward("a", flood, now / 1000)) for now in range(1000))
    assert 100 <= passed <= 100 + 100 * engine.STORM_BURST_SECONDS
    assert switch.ports["a"].counters.drops[Drop.STORM] == 1000 - passed
    assert all(switch.forward("a", known, 1.0) for _ in range(1000))


def test_mirroring() -> None:
    """The destination sees what the source sends and receives, once, and nothing else."""
    switch = switch_with(
        a=PortRules(mirror_source=True), b=PortRules(), c=PortRules(), m=PortRules(mirror_destination=True)
    )
    for name, station in (("a", ONE), ("b", TWO), ("c", THREE)):
        switch.forward(name, packets.ethernet(frames.BROADCAST, station), 0.0)
    assert receivers(switch, "a", packets.ethernet(TWO, ONE)) == "bm"
    assert receivers(switch, "b", packets.ethernet(ONE, TWO)) == "am"
    assert receivers(switch, "b", packets.ethernet(THREE, TWO)) == "c"
    assert receivers(switch, "a", packets.ethernet(frames.BROADCAST, ONE)) == "bcm"


def test_a_link_that_is_down_carries_nothing() -> None:
    """No frame passes in either direction, and addresses learned there are forgotten."""
    switch = switch_with(a=PortRules(), b=PortRules(), c=PortRules())
    switch.forward("a", packets.ethernet(TWO, ONE), 0.0)
    switch.set_link("a", False)
    assert receivers(switch, "a", packets.ethernet(TWO, ONE)) == ""
    assert receivers(switch, "b", packets.ethernet(ONE, TWO)) == "c"
    switch.set_link("a", True)
    assert receivers(switch, "b", packets.ethernet(ONE, TWO)) == "ac"


def test_table_is_bounded() -> None:
    """`INV-TABLE-BOUNDED`: one port's stations cannot fill the table; beyond the limit, frames for them are still
    flooded."""
    switch = switch_with(a=PortRules(), b=PortRules())
    for number in range(engine.MAX_PORT_ADDRESSES + 10):
        switch.forward("a", packets.ethernet(TWO, b"\x02\x01" + number.to_bytes(4, "big")), 0.0)
    assert len(switch.addresses(0.0)) == engine.MAX_PORT_ADDRESSES
    switch.forward("b", packets.ethernet(ONE, TWO), 0.0)
    assert len(switch.addresses(0.0)) == engine.MAX_PORT_ADDRESSES + 1


def test_whole_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ports together have at most MAX_ADDRESSES; ageing makes room again."""
    monkeypatch.setattr(engine, "MAX_ADDRESSES", 3)
    switch = switch_with(a=PortRules(), b=PortRules())
    for number in range(5):
        switch.forward("ab"[number % 2], packets.ethernet(frames.BROADCAST, packets.mac(number)), 0.0)
    assert len(switch.addresses(0.0)) == 3
    switch.age(1000.0)
    switch.forward("a", packets.ethernet(TWO, ONE), 1000.0)
    assert len(switch.addresses(1000.0)) == 1


def test_counters_count_both_directions() -> None:
    """Frames and bytes are counted as the guest sends and gets them: a removed tag is not counted."""
    switch = switch_with(
        a=PortRules(mode=VlanMode.TRUNK, allowed=frozenset({10})), b=PortRules(mode=VlanMode.ACCESS, vlan=10)
    )
    switch.forward("a", packets.ethernet(TWO, ONE, bytes(46), vlan=10), 0.0)
    one, other = switch.ports["a"].counters, switch.ports["b"].counters
    assert (one.received_frames, one.received_bytes) == (1, 64)
    assert (other.transmitted_frames, other.transmitted_bytes) == (1, 60)
