# SPDX-License-Identifier: Apache-2.0
"""The card of an external switch that is taken out of its bridge, or given another MTU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.net.hosts import BridgeHost, bridge_host
from vmm.net.switch_spec import make_switch

pytestmark = [pytest.mark.netns]
LAN = make_switch(name="lan", type="external", backend="bridge", uplink="up0")
BRIDGE = LAN.bridge_name
_MAKE = """
import sys
from vmm.net import switches
from vmm.net.switch_spec import SwitchSpec
switches.create(SwitchSpec.model_validate_json(sys.argv[1]))
"""
# After each command: faults, repairs, reports, and the faults that remain. A minute passes each time.
_TRY = """
import json, subprocess, sys, time
from vmm.net import switches, watching
from vmm.net.host_side import HostSide
host, clock, reports_after = HostSide(switches.load("lan")), [1000.0], []
watching.time.clock_gettime = lambda which: clock[0]
def faults(): return [one.problem for one in watching.faults(host)]
for command in sys.argv[1:]:
    subprocess.run(["sh", "-ec", command], check=True)
    clock[0] += 60
    wrong, outcome = faults(), watching.put_right(host)
    reports_after.append([wrong, outcome.mended, [one.problem for one in outcome.failed], faults()])
print(json.dumps(reports_after))
"""


class CardHost:
    """A host with the switch "lan" on its card up0, behind which 10.9.0.254 answers."""

    def __init__(self, host: BridgeHost, folder: Path) -> None:
        self.host = host
        self.settings = [f"VMM_HOME={folder / 'home'}", f"VMM_RUNTIME={folder / 'run'}"]
        host.link("up0", "net", "10.9.0.254/24")
        host.run("ip addr add 10.9.0.2/24 dev up0; ip route add default via 10.9.0.254")
        self.python(_MAKE, LAN.model_dump_json())

    def python(self, program: str, *words: str) -> str:
        """Run a Python program on the host, in the switch's home; return its output."""
        done = self.host.execute(["env", *self.settings, sys.executable, "-c", program, *words])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def reports_after(self, *commands: str) -> list[list[list[str]]]:
        """After each command: [faults, repairs, reports, the faults that remain]."""
        found: list[list[list[str]]] = json.loads(self.python(_TRY, *commands))
        return found

    def master(self, name: str) -> str | None:
        """The bridge that an interface belongs to."""
        found: str | None = json.loads(self.host.run(f"ip -j link show dev {name}"))[0].get("master")
        return found

    def mtu(self, name: str) -> int:
        """The MTU of an interface."""
        return int(json.loads(self.host.run(f"ip -j link show dev {name}"))[0]["mtu"])


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[CardHost]:
    """A host with a switch."""
    with bridge_host(tmp_path) as made:
        yield CardHost(made, tmp_path)


def test_a_card_that_was_taken_out_is_put_back(lab: CardHost) -> None:
    """`INV-CARD-BACK`: it is a port again, without its own IPv6, and the network answers; then no fault is left."""
    out = f"its network card up0 was removed and is not part of its bridge {BRIDGE}"
    nothing, back, still = lab.reports_after("true", "ip link set up0 nomaster; ip link set up0 down", "true")
    assert nothing == still == [[], [], [], []]
    assert back == [[out], ["card"], [], []]
    assert lab.master("up0") == BRIDGE
    assert lab.host.setting("net/ipv6/conf/up0/disable_ipv6") == "1"
    lab.host.run("ping -c 1 -w 5 10.9.0.254")


def test_a_card_that_is_in_use_is_left_alone(lab: CardHost) -> None:
    """A card that has an address, or belongs to another bridge, is reported once, with what to do; when it is free, it
    is put back."""
    used, again, other, free = lab.reports_after(
        "ip link set up0 nomaster; ip addr add 192.168.7.2/24 dev up0",
        "true",
        "ip addr flush dev up0; ip link add br7 type bridge; ip link set up0 master br7",
        "ip link set up0 nomaster",
    )
    assert used[1] == again[1] == other[1] == []
    assert "this host uses up0 itself (192.168.7.2/24); first: ip addr flush dev up0" in used[2][0]
    assert used[3] == again[0] and again[2] == [], "reported once"
    assert other[0] == [f"its network card up0 is part of br7 and is not part of its bridge {BRIDGE}"]
    assert "br7" in other[2][0] and "is not put back" in other[2][0]
    assert free[1:] == [["card"], [], []]
    assert lab.master("up0") == BRIDGE


def test_a_card_that_is_gone_or_renamed(lab: CardHost) -> None:
    """Another name is not a fault while the card is in the bridge; a missing card is reported, and no other takes its
    place."""
    lab.host.run("ip link set up0 address 02:00:00:00:00:07; ip link set up0 down")
    program = (
        "from vmm.model import paths; from vmm.net import switches; spec = switches.load('lan')\n"
        "spec = spec.model_copy(update={'uplink_mac': '02:00:00:00:00:07'})\n"
        "paths.write_whole(paths.switch_file('lan'), spec.to_json())"
    )
    lab.python(program)
    renamed, gone = lab.reports_after(
        "ip link set up0 name up7; ip link set up7 up", "ip link del up7; ip link add up0 type veth peer name up9"
    )
    assert renamed == [[], [], [], []]
    assert "was up0 with the address 02:00:00:00:00:07, and up0 is now another card" in gone[0][0]
    assert gone[1] == [] and len(gone[2]) == 1
    assert lab.master("up0") is None


def test_a_switch_that_a_command_is_changing_is_left_alone(lab: CardHost) -> None:
    """While a switch is made or deleted, its card is not always in the bridge: that is not a fault.

    A switch whose command was killed is reported as unfinished, and left alone as well.
    """
    program = (
        "import json, os; from vmm.net import switches; from vmm.net.host_side import HostSide\n"
        "host = HostSide(switches.load('lan'))\n"
        "path = os.path.join(host.folder, 'journal.json'); journal = json.load(open(path))\n"
        "journal['complete'] = False; json.dump(journal, open(path, 'w')); print(host.folder)"
    )
    folder = lab.python(program).strip()
    look = (
        "import fcntl, json, sys; from vmm.net import card_watch, switches; from vmm.net.host_side import HostSide\n"
        "lock = open(sys.argv[1] + '/change.lock'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "host = HostSide(switches.load('lan'))\n"
        "print(json.dumps([card_watch.problem(host), card_watch.mtu_problem(host), host.bridge.is_unfinished()]))"
    )
    lab.host.run("ip link set up0 nomaster; ip link set up0 mtu 1400")
    assert json.loads(lab.python(look, folder)) == [None, None, False]
    (before, mended, failed, after) = lab.reports_after("true")[0]
    assert mended == failed == [] and before == after
    assert "vmm switch delete lan restores this host" in before[0]
    assert lab.master("up0") is None


def test_bridge_and_taps_follow_the_card_while_guests_run(lab: CardHost) -> None:
    """`INV-ONE-MTU`: whichever program changes the card's MTU; if a larger one was set for the switch, that is
    reported."""
    plug = (
        "from vmm.net import switches\nfrom vmm.net.host_side import HostSide\nfrom vmm.net.ports import PortSetup\n"
        "HostSide(switches.load('lan')).bridge.plug_tap('tap0', PortSetup('vm.nic-0', '-', '-'))"
    )
    lab.host.run("ip tuntap add tap0 mode tap")
    lab.python(plug)
    (lower,) = lab.reports_after("ip link set up0 mtu 1400")
    assert lower == [["bridge and taps carry 1500 bytes (MTU), but should carry 1400"], ["mtu"], [], []]
    assert [lab.mtu(name) for name in (BRIDGE, "tap0")] == [1400, 1400]
    lab.python("from vmm.net import switches; switches.set_mtu('lan', 1300)")
    assert [lab.mtu(name) for name in (BRIDGE, "tap0")] == [1300, 1300]
    higher, too_low, again = lab.reports_after("ip link set up0 mtu 9000", "ip link set up0 mtu 1280", "true")
    assert higher == [[], [], [], []]
    words = "up0 carries 1280 bytes (MTU), and so does the switch, instead of 1300: ip link set up0 mtu 1300"
    assert too_low[1:] == [[], [words], [words]]
    assert again == [[words], [], [], [words]], "reported once"
    assert [lab.mtu(name) for name in (BRIDGE, "tap0")] == [1280, 1280]
    assert lab.reports_after("ip link set up0 mtu 1500")[0][1:] == [["mtu"], [], []]
    assert [lab.mtu(name) for name in (BRIDGE, "tap0")] == [1300, 1300]
