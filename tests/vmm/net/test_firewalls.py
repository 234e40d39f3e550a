# SPDX-License-Identifier: Apache-2.0
"""Firewall rules of other programs that block a switch are found, and the suggested commands help."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.net.hosts import BridgeHost, bridge_host
from tests.warm_commands import warm
from vmm.net import firewalls
from vmm.net.firewalls import Ruleset
from vmm.net.switch_spec import SwitchSpec, make_switch

# The names of tests contain values derived from the id, and must be the same in every worker.
_ID = "01234567-0000-4000-8000-000000000000"
NAT = make_switch(id=_ID, name="nat", type="internal", backend="bridge", address="10.77.9.1/24", nat=True, dhcp=False)
LAN = make_switch(name="lan", type="external", backend="bridge", uplink="up0")
PRIVATE = make_switch(name="prv", backend="bridge")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[BridgeHost]:
    """A host with a card."""
    with bridge_host(tmp_path) as made:
        made.link("up0", "lan", "10.9.0.254/24")
        made.run("ip addr add 10.9.0.2/24 dev up0; ip route add default via 10.9.0.254")
        yield made


def warnings_of(host: BridgeHost, spec: SwitchSpec) -> list[list[str]]:
    """The warnings: which rules block the switch, and what helps."""
    program = (
        "import json, sys\nfrom vmm.net import firewalls\nfrom vmm.net.switch_spec import SwitchSpec\n"
        "spec = SwitchSpec.model_validate_json(sys.argv[1])\n"
        "found = firewalls.obstacles(spec, firewalls.present())\n"
        "print(json.dumps([[one.words, one.remedy] for one in found]))"
    )
    done = host.execute([sys.executable, "-c", program, spec.model_dump_json()])
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.netns
@pytest.mark.parametrize("end", ["policy drop;", "policy accept; ct state invalid drop; counter reject;"])
def test_commands_that_open_a_closed_host_for_guests(host: BridgeHost, end: str) -> None:
    """Guests of a NAT switch are cut off by a chain that ends in a drop, until the suggested commands are run: then
    there is no warning any more. INV-DROPS-REPORTED."""
    assert warnings_of(host, NAT) == []
    host.run(f"nft 'table inet other {{ chain across {{ type filter hook forward priority 0; {end} }}; }}'")
    host.run(f"nft 'table inet other {{ chain into {{ type filter hook input priority 0; {end} }}; }}'")
    forwarding, asking = warnings_of(host, NAT)
    assert forwarding[0].startswith("the chain inet other across forwards only what its rules name")
    assert asking[0].startswith("the chain inet other into lets in only what its rules name")
    host.apply(NAT)
    assert warnings_of(host, NAT) == [forwarding, asking]
    guest = host.guest(NAT, "one", "10.77.9.2/24", "10.77.9.1")
    assert not host.ping(guest, "10.9.0.254", 1) and not host.ping(guest, "10.77.9.1", 1)
    host.run(f"{forwarding[1]} && {asking[1]}")
    assert host.ping(guest, "10.9.0.254") and host.ping(guest, "10.77.9.1")
    assert warnings_of(host, NAT) == []


@pytest.mark.netns
def test_rules_with_the_name_of_a_card(host: BridgeHost) -> None:
    """A rule about the card that becomes a port no longer matches; the warning comes beforehand and names the rule to
    add."""
    there = host.spaces.names[1]
    host.run("nft 'table inet other { chain into { type filter hook input priority 0; policy drop; }; }'")
    host.run("nft 'add rule inet other into iifname \"up0\" icmp type echo-request accept'")
    host.run("nft 'add rule inet other into iifname != \"up0\" tcp dport 22 accept'")
    assert host.ping(there, "10.9.0.2")
    ((words, remedy),) = warnings_of(host, LAN)
    assert "a rule of inet other into matches up0" in words and "icmp type echo-request accept" in words
    host.apply(LAN)
    assert not host.ping(there, "10.9.0.2", 1)
    host.run(remedy.replace('"', '\\"'))
    assert host.ping(there, "10.9.0.2")


@pytest.mark.netns
def test_the_plan_shows_the_warnings(host: BridgeHost, tmp_path: Path) -> None:
    """`switch create --dry-run`, also with --json, shows them, and so does `switch show` of an existing switch."""
    host.run("nft 'table inet other { chain across { type filter hook forward priority 0; policy drop; }; }'")
    vmm = ["env", f"VMM_HOME={tmp_path / 'home'}", f"VMM_RUNTIME={tmp_path / 'rt'}", *warm("vmm")]
    create = [*vmm, "switch", "create", "nat", "--type", "internal", "--nat", "--no-dhcp"]
    done = host.execute([*create, "--dry-run"])
    assert "warning: the chain inet other across forwards only what its rules name" in done.stdout
    (warning,) = json.loads(host.execute([*create, "--json"]).stdout)["warnings"]
    shown = json.loads(host.execute([*vmm, "switch", "show", "nat", "--json"]).stdout)
    assert len(shown["in_the_way"]) == 1 and "nft insert rule inet other across" in warning
    host.execute([*vmm, "switch", "delete", "nat"])


def chain(
    table: str, name: str, hook: str | None = None, policy: str = "accept", family: str = "ip"
) -> dict[str, Any]:
    """A chain, as nft prints it."""
    base = {} if hook is None else {"type": "filter", "hook": hook, "prio": 0, "policy": policy}
    return {"chain": {"family": family, "table": table, "name": name, "handle": 1, **base}}


def rule(table: str, name: str, *expressions: dict[str, Any], family: str = "ip") -> dict[str, Any]:
    """A rule, as nft prints it."""
    return {"rule": {"family": family, "table": table, "chain": name, "handle": 9, "expr": list(expressions)}}


def by_name(key: str, value: Any) -> dict[str, Any]:
    """A match on an interface."""
    return {"match": {"op": "==", "left": {"meta": {"key": key}}, "right": value}}


DOCKER = (
    chain("filter", "FORWARD", "forward", "drop"),
    chain("filter", "DOCKER-USER"),
    rule("filter", "FORWARD", {"counter": None}, {"jump": {"target": "DOCKER-USER"}}),
    rule("filter", "FORWARD", by_name("oifname", "docker0"), {"accept": None}),
)
UFW = (chain("filter", "INPUT", "input", "drop"), chain("filter", "ufw-user-input"), chain("filter", "ufw-x"))
FIREWALLD = (
    chain("firewalld", "filter_FORWARD", "forward", family="inet"),
    rule("firewalld", "filter_FORWARD", {"reject": {"type": "icmpx"}}, family="inet"),
)


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        (DOCKER, f"iptables -I DOCKER-USER -i {NAT.bridge_name} -j ACCEPT && iptables -I DOCKER-USER -o "),
        (UFW, f"ufw allow in on {NAT.bridge_name}"),
        (FIREWALLD, f"firewall-cmd --permanent --zone=trusted --add-interface={NAT.bridge_name}"),
    ],
)
def test_each_firewall_has_its_own_command(objects: tuple[dict[str, Any], ...], words: str) -> None:
    """Each program has its own way of adding a permanent rule. INV-DROPS-REPORTED."""
    (found,) = firewalls.obstacles(NAT, Ruleset(objects))
    assert words in found.remedy


@pytest.mark.parametrize("right", [NAT.bridge_name, "vmm*", {"set": ["eth9", NAT.bridge_name]}])
def test_a_chain_that_knows_the_bridge_is_left_alone(right: Any) -> None:
    """The bridge may be known by name, by a pattern or in a set, in a chain that is jumped to, even one that jumps
    back."""
    circle = rule("filter", "DOCKER-USER", {"jump": {"target": "FORWARD"}})
    opened = rule("filter", "DOCKER-USER", by_name("iifname", right), {"accept": None})
    assert firewalls.obstacles(NAT, Ruleset((*DOCKER, circle, opened))) == []
    dropped = rule("filter", "DOCKER-USER", by_name("iifname", right), {"drop": None})
    assert len(firewalls.obstacles(NAT, Ruleset((*DOCKER, circle, dropped)))) == 1


def test_switches_that_are_not_affected_get_no_warning() -> None:
    """A private switch forwards nothing, so it is affected only if chains that forward see frames between guests."""
    assert firewalls.obstacles(PRIVATE, Ruleset(DOCKER)) == []
    assert firewalls.obstacles(LAN, Ruleset(DOCKER)) == []
    for spec in (PRIVATE, LAN):
        (found,) = firewalls.obstacles(spec, Ruleset(DOCKER, filters_bridges=True))
        assert spec.bridge_name in found.remedy
    ours = chain("vmm_0123_out", "forward", "forward", "drop", family="inet")
    assert firewalls.obstacles(NAT, Ruleset((ours,))) == []


def test_iptables_legacy() -> None:
    """nft does not list its rules: policies and rules about the card are read from the output of its own command."""
    lines = ("-P INPUT DROP", "-P FORWARD DROP", "-A INPUT -i up0 -p tcp -m tcp --dport 22 -j ACCEPT")
    assert [one.remedy.split(" -i ")[0] for one in firewalls.obstacles(NAT, Ruleset(legacy=lines))] == [
        "iptables-legacy -I INPUT",
        "iptables-legacy -I FORWARD",
    ]
    (found,) = firewalls.obstacles(LAN, Ruleset(legacy=lines))
    assert found.remedy == f"iptables-legacy -A INPUT -i {LAN.bridge_name} -p tcp -m tcp --dport 22 -j ACCEPT"
    known = (*lines, f"-A INPUT -i {NAT.bridge_name} -j ACCEPT", f"-A FORWARD -i {NAT.bridge_name} -j ACCEPT")
    assert firewalls.obstacles(NAT, Ruleset(legacy=known)) == []
