# SPDX-License-Identifier: Apache-2.0
"""nftables documents: each guard as a rule, and the kernel takes them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_root_and_namespaces, require_tool
from tests.vmm.net.machines import Namespaces
from vmm.net import nft
from vmm.net.engine import PortRules, VlanMode
from vmm.net.nft import GuestPort
from vmm.net.plan import make_switch

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
def test_the_kernel_takes_the_rules(space: tuple[Namespaces, str], name: str, tmp_path: Path) -> None:
    """nft prints them as we mean them (the golden files); loading twice is loading once; nothing is left behind."""
    spaces, here = space
    document = tmp_path / "rules.json"
    for _ in range(2):
        document.write_text(json.dumps(nft.document(SWITCHES[name], [GUARDED, FREE])))
        spaces.run(here, f"nft -j -f {document}")
    assert spaces.run(here, "nft -s list ruleset") == (_GOLDEN / f"{name}.nft").read_text()
    for _ in range(2):
        document.write_text(json.dumps(nft.removal(SWITCHES[name])))
        spaces.run(here, f"nft -j -f {document}")
    assert spaces.run(here, "nft -s list ruleset") == ""


def test_a_port_without_rules_has_only_its_vlan_rule() -> None:
    """A port whose addresses nobody said may send from any; without a VLAN it neither sends nor gets tags."""
    sending, receiving = nft.port_rules(GuestPort("vt0", PortRules()))
    assert len(sending) == len(receiving) == 1
    assert "8021q" in json.dumps(sending)
    trunk = PortRules(mode=VlanMode.TRUNK, allowed=frozenset({5}))
    assert nft.port_rules(GuestPort("vt0", trunk)) == ([], [])


_SEND = """
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    try: sock.sendto(bytes(1472), ("10.5.0.2", 9999))
    except OSError: time.sleep(0.001)
"""
_COUNT = """
import socket, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); sock.bind(("10.5.0.2", 9999)); sock.settimeout(10)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
print("ready", flush=True)
sock.recv(2000); first = time.monotonic()
while time.monotonic() < first + 0.5: sock.recv(2000)
total, start = 0, time.monotonic()
while (now := time.monotonic()) < start + 2: total += len(sock.recv(2000)) + 42
print(total * 8 / (now - start))
"""


@pytest.mark.netns
@pytest.mark.slow
def test_bandwidth_limit_holds(space: tuple[Namespaces, str]) -> None:
    """What passes a bridge from a port that sends too much is its limit, within 15 %."""
    spaces, here = space
    one, other = spaces.add("one"), spaces.add("two")
    spaces.run(here, "ip link add br0 type bridge && ip link set br0 up")
    for number, name in ((1, one), (2, other)):
        spaces.run(here, f"ip link add vt{number - 1} type veth peer name eth0 netns {name}")
        spaces.run(here, f"ip link set vt{number - 1} master br0 up")
        spaces.run(name, f"ip addr add 10.5.0.{number}/24 dev eth0 && ip link set eth0 up")
    spaces.run(one, "ping -c 1 -w 10 10.5.0.2")
    limited = GuestPort("vt0", PortRules(spoofing=True), 8_000_000)
    rules = json.dumps(nft.document(SWITCHES["external"], [limited]))
    spaces.run(here, f"nft -j -f - <<'END'\n{rules}\nEND")
    counting = subprocess.Popen(
        ["ip", "netns", "exec", other, sys.executable, "-c", _COUNT], stdout=subprocess.PIPE, text=True
    )
    assert counting.stdout is not None
    assert counting.stdout.readline() == "ready\n"
    sending = subprocess.Popen(["ip", "netns", "exec", one, sys.executable, "-c", _SEND, "6"])
    try:
        rate = float(counting.stdout.readline())
    finally:
        sending.kill()
        sending.wait()
        counting.wait(10)
        counting.stdout.close()
    assert 0.85 * 8_000_000 < rate < 1.15 * 8_000_000
