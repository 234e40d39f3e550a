# SPDX-License-Identifier: Apache-2.0
"""Changes to the bridges of a real machine while it runs: noticed by its worker, repaired, and reported."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.net.hosts import BridgeHost, bridge_host
from tests.vmm.small_guests import make_machine
from tests.waiting import wait_until
from vmm.api.manager import Manager
from vmm.model import paths

pytestmark = [pytest.mark.kvm, pytest.mark.netns]


class Scene:
    """A host with the machine "small" on an internal switch with NAT and on an external one."""

    def __init__(self, host: BridgeHost, manager: Manager, folder: Path) -> None:
        self.host, self.manager = host, manager
        host.link("up0", "net", "10.9.0.254/24")
        host.run("ip addr add 10.9.0.2/24 dev up0; ip route add default via 10.9.0.254")
        make_machine(manager, folder)
        self.vmm("switch", "create", "nat", "--type", "internal", "--address", "10.77.9.1/24", "--nat")
        self.vmm("switch", "create", "lan", "--type", "external", "--nic", "up0", "--yes")
        for switch in ("nat", "lan"):
            self.vmm("nic", "add", "small", switch)
        self.vmm("start", "small")

    def vmm(self, *words: str) -> str:
        """Run a command on that host; return its output."""
        done = self.host.execute([sys.executable, "-m", "vmm", *words])
        assert done.returncode == 0, f"vmm {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        """End the machine and its switches."""
        self.vmm("stop", "small")
        for name in ("nat", "lan"):
            self.vmm("switch", "delete", name, "--force")

    def mended(self) -> list[tuple[object, object]]:
        """(switch, what) of every repair by the machine's worker."""
        found = [one for one in self.manager.events("small") if one.name == "switch-mended"]
        return [(one.details["switch"], one.details["what"]) for one in found]

    def rules(self) -> list[str]:
        """All lines of all rules, without counters, with the tables in the order of their creation."""
        return sorted(re.sub(r"packets \d+ bytes \d+", "", self.host.run("nft -s list ruleset")).splitlines())

    def dnsmasq(self) -> set[str]:
        """The process numbers of the host's dnsmasq processes."""
        pids = subprocess.run(["ip", "netns", "pids", self.host.here], capture_output=True, text=True, check=True)
        found = set()
        for one in pids.stdout.split():
            with contextlib.suppress(OSError):  # it ended after it was listed
                if Path(f"/proc/{one}/comm").read_text() == "dnsmasq\n":
                    found.add(one)
        return found

    def faults(self, switch: str) -> list[str]:
        """The faults that `vmm switch show` reports."""
        return [one["problem"] for one in json.loads(self.vmm("switch", "show", switch, "--json"))["faults"]]


@pytest.fixture
def scene(manager: Manager, tmp_path: Path) -> Iterator[Scene]:
    """A machine that runs."""
    with bridge_host(tmp_path) as host:
        made = Scene(host, manager, tmp_path)
        try:
            yield made
        finally:
            made.close()


def test_a_running_machine_repairs_its_switches(scene: Scene) -> None:
    """It restores flushed rules, a killed dnsmasq, a card that was taken out, and follows a changed MTU.

    `INV-RULES-BACK`, `INV-SWITCH-WATCHED`, `INV-CARD-BACK`, `INV-ONE-MTU`.
    """
    before, (server,) = scene.rules(), scene.dnsmasq()
    assert "masquerade" in str(before) and scene.mended() == []
    scene.host.run("nft flush ruleset")
    wait_until(lambda: scene.rules() == before, "the rules are restored")
    wait_until(lambda: set(scene.mended()) == {("nat", "rules"), ("lan", "rules")}, "the repair is reported")
    scene.host.run(f"kill -9 {server}")
    wait_until(lambda: scene.dnsmasq() - {server}, "there is another dnsmasq")
    wait_until(lambda: ("nat", "dhcp") in scene.mended(), "the repair is reported")
    scene.host.run("ip link set up0 nomaster")
    wait_until(lambda: ("lan", "card") in scene.mended(), "the card is back in the bridge")
    assert "master vmm" in scene.host.run("ip link show up0")
    scene.host.run("ping -c 1 -w 10 10.9.0.254; ip link set up0 mtu 1400")
    wait_until(lambda: ("lan", "mtu") in scene.mended(), "the MTU follows the card's")
    assert scene.host.run("ip link show").count("mtu 1400") == 3, "card, bridge and tap"
    assert scene.faults("nat") == scene.faults("lan") == []
    assert [one for one in scene.manager.events("small") if one.name == "switch-impaired"] == []


def test_a_route_into_the_guests_network_is_reported(scene: Scene) -> None:
    """A VPN that comes up later may take a part of the switch's network: `switch show` says so, and what to do.

    A route to other networks is not a fault.
    """
    scene.host.run("ip link add tun7 type veth peer name tun8; ip link set tun7 up")
    scene.host.run("ip route add 10.99.0.0/16 dev tun7")
    assert scene.faults("nat") == []
    scene.host.run("ip route add 10.77.9.128/25 dev tun7")
    (problem,) = scene.faults("nat")
    assert problem.startswith("this host's route to 10.77.9.128/25 takes a part of its network 10.77.9.0/24")
    scene.host.run("ip route del 10.77.9.128/25")
    assert scene.faults("nat") == []


def test_a_port_with_a_damaged_record_is_restored(scene: Scene) -> None:
    """Its machine knows the settings: it restores record and rules, and keeps watching its switch."""
    before = scene.rules()
    (port,) = json.loads(scene.vmm("switch", "ports", "nat", "--json"))
    (record,) = Path(paths.runtime_home()).glob(f"sw-*/ports/{port['interface']}.json")
    content = record.read_bytes()
    record.write_bytes(b"rubbish")
    assert scene.vmm("switch", "show", "nat")
    wait_until(lambda: record.read_bytes() == content, "the record is restored")
    wait_until(lambda: scene.rules() == before, "the rules are as before")
    scene.host.run("nft flush ruleset")
    wait_until(lambda: scene.rules() == before, "the machine loads the rules again")
