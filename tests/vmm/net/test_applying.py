# SPDX-License-Identifier: Apache-2.0
"""A switch on the bridge back end, in a network namespace: made, made again, undone, killed at any point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, require_root_and_namespaces, require_tool
from tests.vmm.net.applying_victim import STATE
from tests.vmm.net.machines import Namespaces
from tests.waiting import wait_until
from tests.warm_commands import PYTHON, warm
from vmm.net import switch_spec

pytestmark = [pytest.mark.netns]


class Host:
    """A namespace that acts as a host with a card `up0` with addresses and routes, and another one as the network
    behind it."""

    def __init__(self, spaces: Namespaces, folder: Path) -> None:
        self.spaces = spaces
        self.folder = folder
        self.here, self.there = spaces.add("host"), spaces.add("lan")
        for name in (self.here, self.there):  # else addresses change by themselves a while after they were made
            spaces.run(name, "sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")
        spaces.run(self.here, f"ip link add up0 type veth peer name lan0 netns {self.there}")
        spaces.run(self.there, "ip addr add 10.9.0.254/24 dev lan0 && ip link set lan0 up")
        spaces.run(self.here, "ip addr add 10.9.0.2/24 brd + dev up0 && ip addr add 10.9.1.2/24 dev up0")
        spaces.run(self.here, "ip addr add 2001:db8::2/64 dev up0 nodad && ip link set up0 up")
        spaces.run(self.here, "ip addr add 10.9.2.2/24 valid_lft 3000 preferred_lft 3000 dev up0")
        spaces.run(self.there, "ip addr add 2001:db8::fe/64 dev lan0 nodad")
        spaces.run(self.here, "sysctl -qw net.ipv6.conf.up0.accept_ra=0")  # a program listens
        spaces.run(self.here, "ip addr add 2001:db8:7::2/128 dev up0 nodad valid_lft 3000 preferred_lft 2000")
        spaces.run(self.here, "ip route add default via 2001:db8::fe dev up0 proto ra metric 1024 expires 1800")
        spaces.run(self.here, "ip route add default via 10.9.0.254 metric 100 src 10.9.0.2")
        spaces.run(
            self.here, "ip route add 192.168.50.0/24 via 10.9.0.254 && ip route add 10.60.0.0/16 dev up0 table 77"
        )
        spaces.run(self.here, "ping -c 1 -w 10 10.9.0.254")
        # The kernel announces the carrier a second later.
        wait_until(
            lambda: "NO-CARRIER" not in spaces.run(self.here, "ip link show up0"), "up0 has a carrier", pause=0.1
        )

    def state(self) -> str:
        """Everything that must be as before."""
        return self.spaces.run(self.here, STATE)

    def command(self, verb: str, spec: switch_spec.SwitchSpec, *more: str) -> list[str]:
        """The program that applies or undoes."""
        path = self.folder / f"{spec.name}.json"
        path.write_bytes(spec.to_json())
        program = [sys.executable, "-m", "tests.vmm.net.applying_victim"]
        return ["ip", "netns", "exec", self.here, *program, verb, str(path), str(self.folder / "rt"), *more]

    def do(self, verb: str, spec: switch_spec.SwitchSpec, *more: str) -> subprocess.CompletedProcess[str]:
        """Run it, forked from a process that has loaded it."""
        (program,) = warm(PYTHON)
        command = [program if word == sys.executable else word for word in self.command(verb, spec, *more)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host with a network behind its card."""
    require_root_and_namespaces()
    for tool in ("nft", "dnsmasq"):
        require_tool(tool)
    spaces = Namespaces()
    try:
        yield Host(spaces, tmp_path)
    finally:
        spaces.close()


EXTERNAL = switch_spec.make_switch(name="ext", type="external", backend="bridge", uplink="up0")
ALONE = switch_spec.make_switch(name="alone", type="external", backend="bridge", uplink="up0", host=False)
INTERNAL = switch_spec.make_switch(name="int", type="internal", backend="bridge", address="10.77.9.1/24", nat=True)
PRIVATE = switch_spec.make_switch(name="prv", type="private", backend="bridge")
ALL = {spec.name: spec for spec in (EXTERNAL, ALONE, INTERNAL, PRIVATE)}


@pytest.mark.parametrize("name", ALL)
def test_apply_and_undo_are_idempotent_and_inverse(host: Host, name: str) -> None:
    """Applying twice has the effect of applying once, and undoing restores the exact previous state; undoing twice is
    allowed."""
    before = host.state()
    spec = ALL[name]
    assert host.do("apply", spec).returncode == 0
    applied = host.state()
    assert spec.bridge_name in applied
    again = host.do("apply", spec)
    assert again.returncode == 0, again.stderr
    assert host.state() == applied
    for _ in range(2):
        undone = host.do("undo", spec)
        assert undone.returncode == 0, undone.stderr
        assert host.state() == before


CARDS = {
    "given by NetworkManager, which makes the network's route itself": """
        ip addr add 10.9.0.2/24 dev up0 noprefixroute
        ip route add 10.9.0.0/24 dev up0 proto kernel scope link src 10.9.0.2 metric 100
        ip route add default via 10.9.0.254 dev up0 proto dhcp src 10.9.0.2 metric 100""",
    "rented: one address without a network, the gateway on the link": """
        ip addr add 10.55.0.9/32 dev up0
        ip route add default via 10.9.0.254 dev up0 onlink mtu 1400 advmss 1300""",
    "rented: the gateway has a route of its own": """
        ip addr add 10.55.0.9/32 dev up0
        ip route add 10.9.0.254 dev up0
        ip route add default via 10.9.0.254""",
    "point to point, labelled, with a metric": """
        ip addr add 10.9.0.2 peer 10.9.0.254/32 dev up0 label up0:p metric 50
        ip addr add 10.9.3.2/24 dev up0 scope link
        ip route add default via 10.9.0.254""",
}


@pytest.mark.parametrize("card", CARDS)
def test_cards_as_hosts_have_them(host: Host, card: str) -> None:
    """Addresses and routes move to the bridge and back with all their attributes; the host keeps its network
    connection."""
    host.spaces.run(host.here, "ip -4 addr flush dev up0; ip addr flush dev up0 scope global")
    host.spaces.run(
        host.here, "ip route flush dev up0 table 77; ip -6 route flush default; ip -6 route flush root 2001:db8::/32"
    )
    host.spaces.run(host.there, "ip route add 10.55.0.9 dev lan0")
    host.spaces.run(host.here, f"set -e{CARDS[card]}")
    host.spaces.run(host.here, "ping -c 1 -w 5 10.9.0.254")
    before = host.state()
    done = host.do("apply", EXTERNAL)
    assert done.returncode == 0, done.stderr
    host.spaces.run(host.here, "ping -c 1 -w 5 10.9.0.254")
    there = host.spaces.run(host.here, "ip route get 192.0.2.1")
    assert f"via 10.9.0.254 dev {EXTERNAL.bridge_name} " in there
    done = host.do("undo", EXTERNAL)
    assert done.returncode == 0, done.stderr
    assert host.state() == before


@pytest.mark.parametrize("first_away", [0, 1])
def test_switches_that_share_a_setting(host: Host, first_away: int) -> None:
    """Two switches with NAT need forwarding on the card: it stays while one of them exists, and is restored when both
    are gone."""
    before = host.state()
    two = [
        switch_spec.make_switch(
            name=f"nat{one}", type="internal", backend="bridge", address=f"10.77.{one}.1/24", nat=True
        )
        for one in range(2)
    ]

    def do(verb: str, spec: switch_spec.SwitchSpec) -> None:
        command = host.command(verb, spec)
        command[-1] = str(host.folder / "rt" / spec.name)
        Path(command[-1]).mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    for spec in two:
        do("apply", spec)
    do("undo", two[first_away])
    assert host.spaces.run(host.here, "cat /proc/sys/net/ipv4/conf/up0/forwarding").strip() == "1"
    do("undo", two[1 - first_away])
    assert host.state() == before


def test_a_route_through_several_cards_is_refused(host: Host) -> None:
    """Such a route cannot be moved, and would be lost with its card's addresses; the switch is refused and nothing is
    changed."""
    host.spaces.run(host.here, "ip link add other type veth peer name other2")
    host.spaces.run(host.here, "ip link set other up && ip addr add 10.8.0.1/24 dev other")
    host.spaces.run(
        host.here, "ip route add 10.61.0.0/16 nexthop via 10.9.0.254 dev up0 nexthop via 10.8.0.9 dev other"
    )
    before = host.state()
    done = host.do("apply", EXTERNAL)
    assert done.returncode != 0
    assert "10.61.0.0" in done.stderr
    assert host.state() == before


def test_external_keeps_the_host_on_its_network(host: Host) -> None:
    """Addresses and routes move to the bridge, with metrics, sources and tables, and the network answers through
    it."""
    assert host.do("apply", EXTERNAL).returncode == 0
    bridge = EXTERNAL.bridge_name
    routes = host.spaces.run(host.here, "ip route show table all")
    assert f"default via 10.9.0.254 dev {bridge} " in routes
    assert "src 10.9.0.2 metric 100" in routes
    assert f"10.60.0.0/16 dev {bridge} table 77" in routes
    addresses = json.loads(host.spaces.run(host.here, f"ip -j addr show dev {bridge}"))[0]["addr_info"]
    assert {one["local"] for one in addresses} >= {"10.9.0.2", "10.9.1.2", "10.9.2.2", "2001:db8::2"}
    host.spaces.run(host.here, "ping -c 1 -w 5 10.9.0.254")


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "name", "stride"), [("kill-apply", "ext", 5), ("kill-apply", "int", 5),
                                                      ("kill-undo", "ext", 7), ("kill-undo", "int", 7)])  # fmt: skip
def test_a_kill_at_any_point_can_be_undone(host: Host, verb: str, name: str, stride: int) -> None:
    """`INV-NET-UNDONE`: after kill -9 before or after any change, while applying or undoing, an undo restores
    everything."""
    if os.environ.get("HYPOTHESIS_PROFILE") == "long":
        stride = 1
    done = host.do(verb, ALL[name], str(stride))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


@pytest.mark.parametrize(("gateway", "rule"), [("10.9.0.254", "drop"), ("2001:db8::fe", "meta protocol ip6 drop")])
def test_everything_is_undone_if_the_gateway_stops_answering(host: Host, gateway: str, rule: str) -> None:
    """If the network does not accept the bridge, or its IPv6, the error says so, and the host is connected as before.

    INV-SIX-MOVES.
    """
    # The network passes only the first few frames of the card, as a port with a MAC limit would.
    host.spaces.run(
        host.there, "nft 'table netdev t { chain c { type filter hook ingress device lan0 priority 0; }; }'"
    )
    before = host.state()
    host.spaces.run(host.here, "ping -c 1 -w 10 2001:db8::fe")
    program = (
        "import subprocess, sys\n"
        "from vmm.net.bridge import Kernel\n"
        "from tests.vmm.net import applying_victim as victim\n"
        # On a busy machine an answer may take long; the gateway that is cut off gives none.
        "asked = Kernel.answers\n"
        "def answers(self, name, gateway, seconds):\n"
        f"    is_cut = gateway == {gateway!r} and name == {EXTERNAL.bridge_name!r}\n"
        "    return asked(self, name, gateway, 0.5 if is_cut else 30.0)\n"
        "Kernel.answers = answers\n"
        "usual = Kernel.add_route\n"
        "def cut(self, name, route):\n"
        "    usual(self, name, route)\n"
        "    if len(sys.argv) > 5:\n"
        "        drop = ['nft', 'add', 'rule', 'netdev', 't', 'c', sys.argv.pop(-2)]\n"
        "        subprocess.run(['ip', 'netns', 'exec', sys.argv.pop(), *drop])\n"
        "Kernel.add_route = cut\n"
        "victim.main()\n"
    )
    command = host.command("apply", EXTERNAL)
    at = command.index("-m")
    done = subprocess.run(
        [*command[:at], "-c", program, *command[at + 2 :], rule, host.there],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert f"the gateway {gateway} does not answer through the switch, so everything was undone" in done.stderr
    assert host.state() == before
    host.spaces.run(host.there, "nft delete table netdev t")
    host.spaces.run(host.here, "ping -c 1 -w 10 10.9.0.254")


def test_a_foreign_interface_of_the_same_name_is_left_alone(host: Host) -> None:
    """Another program's interface with the bridge's name leads to a refusal, and still exists afterwards."""
    host.spaces.run(host.here, f"ip link add {PRIVATE.bridge_name} type bridge")
    before = host.state()
    refused = host.do("apply", PRIVATE)
    assert "already exists" in refused.stderr
    assert host.state() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"type": "external", "uplink": "nosuch0"}, "network card nosuch0 does not exist"),
        ({"type": "external", "uplink": "up0", "host_vlan": 5}, "CONFIG_BRIDGE_VLAN_FILTERING"),
    ],
)
def test_refusals_change_nothing(host: Host, settings: dict[str, object], words: str) -> None:
    """What the host cannot provide is refused before anything is touched."""
    spec = switch_spec.make_switch(name="no", backend="bridge", **settings)
    if "host_vlan" in settings and Path("/proc/config.gz").exists() is False:
        pytest.skip("the kernel's configuration cannot be read")
    before = host.state()
    refused = host.do("apply", spec)
    assert words in refused.stderr
    assert host.state() == before


def test_journals_of_an_earlier_boot_are_ignored(host: Host) -> None:
    """A reboot has undone everything in the kernel: the journal is not applied, and the switch is made again."""
    assert host.do("apply", PRIVATE).returncode == 0
    journal = host.folder / "rt" / "journal.json"
    document = json.loads(journal.read_text())
    host.do("undo", PRIVATE)
    document["boot_id"] = "another"
    journal.write_text(json.dumps(document))
    done = host.do("apply", PRIVATE)
    assert done.returncode == 0, done.stderr
    assert PRIVATE.bridge_name in host.state()
