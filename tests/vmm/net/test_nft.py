# SPDX-License-Identifier: Apache-2.0
"""nftables documents: each guard as a rule, and the kernel accepts them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_root_and_namespaces, require_tool
from tests.vmm.net import packets
from tests.vmm.net.machines import Namespaces
from tests.waiting import wait_until
from vmm.net import frames, nft
from vmm.net.engine import Engine, PortRules, VlanMode
from vmm.net.forwarding import Guard
from vmm.net.nft import GuestPort
from vmm.net.switch_spec import make_switch

ID = "01234567-89ab-cdef-0123-456789abcdef"
GUARDED = GuestPort(
    "vt0",
    PortRules(
        addresses=frozenset({b"\x02\0\0\0\0\x01"}), dhcp_guard=True, router_guard=True, storm_frames_per_second=100
    ),
    8_000_000,
)
FREE = GuestPort("vt1", PortRules(spoofing=True, mode=VlanMode.ACCESS, vlan=5))
_GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture
def space() -> Iterator[tuple[Namespaces, str]]:
    """A network namespace."""
    require_root_and_namespaces()
    require_tool("nft")
    spaces = Namespaces()
    try:
        yield spaces, spaces.add("nft")
    finally:
        spaces.close()


SWITCHES = {
    "private": make_switch(id=ID, name="x", backend="bridge"),
    "nat": make_switch(id=ID, name="x", backend="bridge", type="internal", address="10.77.0.1/24", nat=True),
    "closed": make_switch(id=ID, name="x", backend="bridge", type="internal", address="10.77.0.1/24"),
    "external": make_switch(id=ID, name="x", backend="bridge", type="external", uplink="eth0"),
    "without-host": make_switch(id=ID, name="x", backend="bridge", type="external", uplink="eth0", host=False),
}


@pytest.mark.netns
@pytest.mark.parametrize("name", SWITCHES)
def test_the_kernel_accepts_the_rules(space: tuple[Namespaces, str], name: str, tmp_path: Path) -> None:
    """nft prints them as intended (the golden files); loading twice has the effect of loading once; deleting leaves
    nothing behind."""
    spaces, here = space
    spaces.run(here, "ip link add vt0 type veth peer name up0 && ip link add vb0 type ifb")
    document = tmp_path / "rules.json"
    for _ in range(2):
        document.write_text(json.dumps(nft.document(SWITCHES[name], [GUARDED, FREE], guard=Guard())))
        spaces.run(here, f"nft -j -f {document}")
    said = re.sub(' comment "[0-9a-f]{12}"', "", spaces.run(here, "nft -s list ruleset"))  # see test_rule_watch
    assert said == (_GOLDEN / f"{name}.nft").read_text()
    for _ in range(2):
        document.write_text(json.dumps(nft.removal(SWITCHES[name])))
        spaces.run(here, f"nft -j -f {document}")
    assert spaces.run(here, "nft -s list ruleset") == ""


def test_a_port_without_rules_has_only_its_vlan_rule() -> None:
    """A port without known addresses may send from any; without a VLAN it neither sends nor gets tags."""
    found = nft.port_chains(GuestPort("vt0", PortRules())).chains
    assert [len(rules) for rules in found.values()] == [4, 3]  # and for link-local groups
    assert "8021q" in json.dumps(found["vt0.sending"])
    access = PortRules(mode=VlanMode.ACCESS, vlan=5)
    assert nft.port_chains(GuestPort("vt0", access)).chains == found
    trunk = nft.port_chains(GuestPort("vt0", PortRules(mode=VlanMode.TRUNK, allowed=frozenset({5})))).chains
    _, stacked = trunk["vt0.sending"]
    assert trunk["vt0.receiving"] == []
    assert "protocol" in json.dumps(stacked)


_EXCHANGE = """
import json, socket, sys, time
name, frames = sys.argv[1], json.load(sys.stdin)
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); sock.bind((name, 0))
if frames:
    for one in frames: sock.send(bytes.fromhex(one)); time.sleep(0.01)
    sys.exit()
sock.settimeout(20); print("ready", flush=True)
seen = []
while not seen or seen[-1] != 255:
    frame = sock.recv(2000)
    if frame[6:10] == bytes.fromhex("02000000"): seen.append(frame[11])
print(json.dumps(seen))
"""


def wrapped(frame: bytes, *wrappers: bytes) -> bytes:
    """The frame with these headers between its addresses and its type."""
    return frame[:12] + b"".join(wrappers) + frame[12:]


Listed = list[tuple[str, int, bytes]]
"""(what it is, its number, the frame); the number is the last byte of the sender's address."""


def _guarded_frames() -> Listed:
    """Frames that guards drop, and similar ones that pass."""
    dhcp, router = packets.dhcp_offer(packets.mac(0)), packets.router_advertisement(packets.mac(0))
    asking = packets.ethernet(
        frames.BROADCAST, packets.mac(0), packets.ipv4(17, packets.udp(68, 67, b"\x01" + bytes(19))), kind=0x0800
    )
    snap = b"\x00\x80\xaa\xaa\x03\x00\x00\x00"
    offer6 = packets.udp(547, 546, bytes(20))

    def six(following: int, payload: bytes) -> bytes:
        return packets.ethernet(frames.BROADCAST, packets.mac(0), packets.ipv6(following, payload), kind=0x86DD)

    def four(source: int, destination: int, payload: bytes, fragment: int = 0) -> bytes:
        packet = packets.ipv4(17, packets.udp(source, destination, payload), fragment=fragment)
        return packets.ethernet(frames.BROADCAST, packets.mac(0), packet + bytes(20), kind=0x0800)

    first = bytes([17, 0, 0, 1, 0, 0, 0, 9])
    fragment = bytes([60, 0, 0, 1, 0, 0, 0, 9])  # the first one, whose options end beyond it
    found = {
        "dhcp": dhcp,
        "router": router,
        "asking": asking,
        "dhcp, one tag": dhcp[:12] + frames.tag(5) + dhcp[12:],
        "dhcp, two tags": dhcp[:12] + frames.tag(5) + frames.tag(0) + dhcp[12:],
        "asking, one tag": asking[:12] + frames.tag(5) + asking[12:],
        "asking, two tags": asking[:12] + frames.tag(5) + frames.tag(7) + asking[12:],
        "dhcp, snap": dhcp[:12] + snap + dhcp[12:],
        "router, snap": router[:12] + snap + router[12:],
        "dhcp6, options": six(60, bytes([17, 31]) + bytes(254) + offer6),
        "dhcp6, cut": six(44, fragment + bytes([17, 40]) + bytes(6)),
        "dhcp, any port": four(1067, 68, b"\x02" + bytes(240)),
        "dhcp, relayed": four(1067, 67, b"\x02" + bytes(240)),
        "dhcp, relayed, one tag": wrapped(four(1067, 67, b"\x02" + bytes(240)), frames.tag(5)),
        "dhcp, first fragment": four(1067, 67, b"", 0x2000),
        "dhcp, first fragment, one tag": wrapped(four(1067, 67, b"", 0x2000), frames.tag(5)),
        "dhcp, overlapping fragment": four(5000, 6000, bytes(8), 1),
        "dhcp6, any port": six(17, packets.udp(1067, 546, b"\x02" + bytes(20))),
        "dhcp6, relayed": six(17, packets.udp(1067, 547, b"\x0d" + bytes(20))),
        "dhcp6, first fragment": six(44, first + packets.udp(1067, 547)),
        "dhcp6, overlapping fragment": six(44, bytes([17, 0, 0, 8, 0, 0, 0, 9]) + bytes(16)),
        "asking a relay": four(1067, 67, b"\x01" + bytes(240)),
        "asking6": six(17, packets.udp(546, 547, b"\x01" + bytes(20))),
        "udp, first fragment": four(5000, 6000, bytes(8), 0x2000),
        "udp, later fragment": four(5000, 6000, bytes(8), 2),
        "a later fragment": six(44, bytes([60, 0, 0, 16, 0, 0, 0, 9]) + bytes(64)),
        "udp6": six(17, packets.udp(5000, 6000, bytes(20))),
    }
    return [
        (name, number, one[:11] + bytes([number]) + one[12:]) for number, (name, one) in enumerate(found.items(), 1)
    ]


def _bridged(spaces: Namespaces, here: str) -> tuple[str, str]:
    """Two namespaces at the ports vt0 and vt1 of a bridge that carries only the test's frames."""
    one, other = spaces.add("one"), spaces.add("two")
    spaces.run(here, "ip link add br0 type bridge && ip link set br0 up")
    for number, name in enumerate((one, other)):
        spaces.run(name, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1")
        spaces.run(here, f"ip link add vt{number} type veth peer name eth0 netns {name}")
        spaces.run(here, f"ip link set vt{number} master br0 up")
        spaces.run(name, "ip link set eth0 up")
    wait_until(lambda: spaces.run(here, "bridge link").count("state forwarding") == 2, "both ports forward")
    return one, other


def _passed(spaces: Namespaces, here: str, ends: tuple[str, str], rules: object, listed: Listed) -> set[str]:
    """Which of the frames pass from one end to the other under these rules."""
    spaces.run(here, f"nft -j -f - <<'END'\n{json.dumps(rules)}\nEND")
    last = packets.ethernet(frames.BROADCAST, packets.mac(255), bytes(50))

    def program(name: str) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", name, sys.executable, "-c", _EXCHANGE, "eth0"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    receiving, sending = program(ends[1]), program(ends[0])
    try:
        assert receiving.stdin is not None
        assert receiving.stdout is not None
        receiving.stdin.write("[]")
        receiving.stdin.close()
        receiving.stdin = None
        assert receiving.stdout.readline() == "ready\n"
        sending.communicate(json.dumps([frame.hex() for _, _, frame in listed] + [last.hex()]), timeout=30)
        seen = set(json.loads(receiving.communicate(timeout=30)[0]))
    finally:
        for process in (receiving, sending):
            process.kill()
            process.wait()
    return {name for name, number, _ in listed if number in seen}


@pytest.mark.netns
@pytest.mark.parametrize("mode", [VlanMode.UNTAGGED, VlanMode.TRUNK])
def test_guards_cannot_be_evaded(space: tuple[Namespaces, str], mode: VlanMode) -> None:
    """`INV-DHCP-GUARD`: the kernel's guards decide as the user switch's do.

    Ports, tags, SNAP, fragments, long and cut chains of IPv6 headers cannot hide a server or a router.
    """
    spaces, here = space
    ends = _bridged(spaces, here)
    allowed = frozenset({5}) if mode is VlanMode.TRUNK else frozenset[int]()
    guards = PortRules(mode=mode, allowed=allowed, spoofing=True, dhcp_guard=True, router_guard=True)
    listed = _guarded_frames()
    passed = _passed(spaces, here, ends, nft.document(SWITCHES["external"], [GuestPort("vt0", guards)]), listed)
    free = {"asking", "asking a relay", "asking6", "a later fragment", "udp6", "udp, first fragment"}
    assert passed == free | {"udp, later fragment"} | ({"asking, one tag"} if allowed else set())
    if allowed:  # an untagged adapter's tags are dropped before a guard looks
        judged = {name: frames.is_dhcp_server(one) or frames.is_router(one) for name, _, one in listed}
        stacked = "asking, two tags"  # the kernel's guards do not look behind the second
        assert {name for name, is_bad in judged.items() if not is_bad} - {stacked} == passed


def _tagged_frames() -> Listed:
    """Frames with all kinds of tags, and frames to link-local group addresses."""
    plain = packets.ethernet(frames.BROADCAST, packets.mac(0), bytes(60))
    kinds = {"8100": frames.TPID, "88a8": b"\x88\xa8", "9100": b"\x91\x00"}
    found = {"plain": plain}
    for outer, kind in kinds.items():
        found |= {f"{outer} {vlan}": wrapped(plain, kind + vlan.to_bytes(2, "big")) for vlan in (0, 1, 5, 4095)}
        found |= {f"8100 0, {outer} {vlan}": wrapped(plain, frames.tag(0), kind + bytes([0, vlan])) for vlan in (0, 5)}
    found["8100 0, with a priority"] = wrapped(plain, frames.tag(0, 0xA))
    found |= {f"reserved {last}": bytes.fromhex(f"0180c20000{last:02x}") + plain[6:] for last in (0, 1, 2, 3, 14, 16)}
    return [
        (name, number, one[:11] + bytes([number]) + one[12:]) for number, (name, one) in enumerate(found.items(), 1)
    ]


@pytest.mark.netns
@pytest.mark.parametrize("guarded", ["vt0", "vt1"])
def test_no_tags_pass_an_untagged_adapter_on_either_back_end(space: tuple[Namespaces, str], guarded: str) -> None:
    """`INV-UNTAGGED-ONLY`: none of a kernel's three kinds passes, sent or received; a priority tag does not count.

    Link-local frames, such as those of a spanning tree, do not leave a guest.
    """
    spaces, here = space
    ends, listed = _bridged(spaces, here), _tagged_frames()
    passed = _passed(spaces, here, ends, nft.document(SWITCHES["external"], [GuestPort(guarded, PortRules())]), listed)
    free = {"plain", "8100 0", "8100 0, with a priority", "reserved 16"}
    assert passed - {"reserved 0"} == free
    assert ("reserved 0" in passed) == (guarded == "vt1")  # the network's own may come in: bridges pass them on
    rules = PortRules(), PortRules(mode=VlanMode.TRUNK, allowed=frozenset({1, 5}))
    switch = Engine()
    for name, one in zip(("vt0", "vt1"), rules if guarded == "vt0" else reversed(rules), strict=True):
        switch.add_port(name, one)
    got = {name: [out for _, out in switch.forward("vt0", frame, 0.0)] for name, _, frame in listed}
    assert {name for name, out in got.items() if out} == free
    for name, _, frame in listed:
        if name in free:
            assert got[name] == [frame if name in ("plain", "reserved 16") else frame[:12] + frame[16:]]
