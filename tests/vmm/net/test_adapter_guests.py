# SPDX-License-Identifier: Apache-2.0
"""Real guests on a `user` switch, as a user would set them up: machines, switch and adapters made by the Manager."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.support import require_linux_guest
from tests.vmm.guests.shell import GuestShell
from tests.vmm.net.machines import MachineLab, address, lease, ping
from tests.waiting import wait_until
from vmm.net import switches
from vmm.net.adapter import port_name
from vmm.net.host_side import HostSide
from vmm.net.switch_spec import make_switch
from vmm.store import registry

pytestmark = [pytest.mark.kvm, pytest.mark.slow]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[MachineLab]:
    """The machines and switches of this test."""
    require_linux_guest()
    one = MachineLab(monkeypatch)
    try:
        yield one
    finally:
        one.close()


def drops(lab: MachineLab, switch: str, machine: str, adapter: str = "nic-0") -> dict[str, int]:
    """What the switch dropped of an adapter's frames."""
    name = port_name(registry.load(machine).spec.id, adapter)
    ports = HostSide(switches.load(switch)).port_status()
    found: dict[str, int] = next(one["drops"] for one in ports if one["name"] == name)
    return found


def fetched(shell: GuestShell, server: GuestShell, address: str) -> bool:
    """True if the 4 MB that `server` serves arrive complete over TCP."""
    server.check("dd if=/dev/urandom of=/tmp/file bs=64k count=64 2>/dev/null; httpd -p 5000 -h /tmp")
    wanted = server.check("md5sum </tmp/file")
    return shell.check(f"wget -q -O - http://{address}:5000/file | md5sum", seconds=120) == wanted


@pytest.mark.nightly  # the same with stations instead of guests every day
def test_three_guests_on_a_private_switch(lab: MachineLab) -> None:
    """Ping and TCP work; VLANs are apart, and joined by a trunk; a spoofed sender is dropped; the switch survives a
    kill; the cable can be unplugged and plugged in."""
    switches.create(make_switch(name="lab"))
    for name, nic in (("one", {}), ("two", {}), ("three", {"trunk": [10, 20]})):
        lab.define(name, {"switch": "lab", **nic})
        lab.manager.start(name)
    one, two, three = (lab.shell(name) for name in ("one", "two", "three"))
    for number, shell in enumerate((one, two, three), 1):
        address(shell, f"10.5.0.{number}/24")
    # Without a VLAN all are together, and so are the trunk's untagged frames.
    assert ping(one, "10.5.0.2").exit_code == 0
    assert ping(three, "10.5.0.1").exit_code == 0
    assert fetched(one, two, "10.5.0.2")
    # The switch is killed: the machines start it again, and the guests notice only a pause.
    status = HostSide(switches.load("lab")).user.status()
    assert status is not None
    two.check("(ping 10.5.0.1 >/tmp/pings 2>&1 &)")
    os.kill(status["pid"], signal.SIGKILL)
    wait_until(
        lambda: any(
            event.name == "switch-restarted" for name in ("one", "two", "three") for event in lab.manager.events(name)
        ),
        "the switch is started again",
    )
    assert ping(one, "10.5.0.2").exit_code == 0
    # VLANs are apart, and the trunk belongs to both.
    lab.manager.change_adapter("one", "nic-0", vlan=10)
    lab.manager.change_adapter("two", "nic-0", vlan=20)
    assert ping(one, "10.5.0.2", 2).exit_code != 0
    three.check("for one in llc stp garp mrp 8021q; do insmod /lib/modules/$one.ko; done; ip addr flush dev eth0")
    for vlan, number in ((10, 3), (20, 4)):
        three.check(f"ip link add link eth0 name eth0.{vlan} type vlan id {vlan}")
        three.check(f"ip addr add 10.5.0.{number}/32 dev eth0.{vlan}; ip link set eth0.{vlan} up")
    three.check("ip route add 10.5.0.1/32 dev eth0.10; ip route add 10.5.0.2/32 dev eth0.20")
    assert ping(three, "10.5.0.1").exit_code == 0
    assert ping(three, "10.5.0.2").exit_code == 0
    lab.manager.change_adapter("two", "nic-0", vlan=10)
    assert ping(one, "10.5.0.2").exit_code == 0
    # Frames of a guest that changes its card's address are dropped until spoofing is allowed.
    before = drops(lab, "lab", "one").get("spoofed", 0)
    one.check("ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:77; ip link set eth0 up")
    assert ping(one, "10.5.0.2", 2).exit_code != 0
    assert drops(lab, "lab", "one")["spoofed"] > before
    lab.manager.change_adapter("one", "nic-0", spoofing=True)
    assert ping(one, "10.5.0.2").exit_code == 0
    # The cable.
    lab.manager.change_adapter("one", "nic-0", link_up=False)
    assert one.check("cat /sys/class/net/eth0/carrier") == "0"
    assert ping(two, "10.5.0.1", 2).exit_code != 0
    lab.manager.change_adapter("one", "nic-0", link_up=True)
    assert ping(two, "10.5.0.1").exit_code == 0


def test_internal_switch_without_root_and_adapter_hotplug(lab: MachineLab) -> None:
    """On an internal switch without root, guests get DHCP and reach the gateway and each other; a second adapter can
    be added and removed."""
    switches.create(make_switch(name="nat", type="internal", address="10.77.200.1/24", dhcp_first="10.77.200.50"))
    switches.create(make_switch(name="b"))
    lab.define("one", {"switch": "nat"})
    lab.define("two", {"switch": "nat"}, {"switch": "b"})
    for name in ("one", "two"):
        lab.manager.start(name)
    one, two = lab.shell("one"), lab.shell("two")
    found = [lease(shell) for shell in (one, two)]
    assert len(set(found)) == 2
    assert all(one.startswith("10.77.200.") for one in found)
    assert ping(one, found[1]).exit_code == 0
    assert ping(one, "10.77.200.1").exit_code == 0
    # The guest and the definition have it until it is removed.
    added = lab.manager.add_adapter("one", switch="b")
    assert added.id == "nic-1"
    wait_until(lambda: one.run("test -e /sys/class/net/eth1").exit_code == 0, "the guest has eth1", pause=0.2)
    assert one.check("cat /sys/class/net/eth1/address") == added.mac
    address(one, "10.6.0.1/24", "eth1")
    address(two, "10.6.0.2/24", "eth1")
    assert ping(two, "10.6.0.1").exit_code == 0
    assert [adapter.id for adapter in registry.load("one").spec.adapters] == ["nic-0", "nic-1"]
    lab.manager.remove_adapter("one", "nic-1")
    assert one.run("test -e /sys/class/net/eth1").exit_code != 0
    assert [adapter.id for adapter in registry.load("one").spec.adapters] == ["nic-0"]
    ports = HostSide(switches.load("b")).port_status()
    assert [one["name"] for one in ports] == [port_name(registry.load("two").spec.id, "nic-1")]


@pytest.mark.nightly
def test_a_restored_guest_keeps_its_mtu(lab: MachineLab) -> None:
    """A guest saved with an MTU and restored on a switch that announces another one, or none, continues, with an
    event.

    QEMU cannot restore an adapter that announced an MTU into one that announces none. INV-ONE-MTU.
    """

    def kept() -> list[tuple[object, object]]:
        found = [one for one in lab.manager.events("one") if one.name == "adapter-mtu-kept"]
        return [(one.details["mtu_bytes"], one.details.get("switch_mtu_bytes")) for one in found]

    switches.create(make_switch(name="lab", mtu_bytes=4000))
    one = lab.start("one", {"switch": "lab"})
    assert one.check("cat /sys/class/net/eth0/mtu") == "4000"
    for mtu_bytes, expected in ((2000, [(4000, 2000)]), (None, [(4000, 2000), (4000, None)])):
        lab.manager.save("one")
        switches.delete("lab", force=True)
        switches.create(make_switch(name="lab", mtu_bytes=mtu_bytes))
        lab.manager.start("one")
        one = lab.shell("one")
        assert one.check("cat /sys/class/net/eth0/mtu") == "4000"
        assert kept() == expected
    switches.set_mtu("lab", 4000)
    lab.manager.save("one")
    lab.manager.start("one")
    assert len(kept()) == 2, "the MTUs are equal"
    lab.manager.stop("one")
    switches.set_mtu("lab", 2000)
    lab.manager.start("one")
    assert lab.shell("one").check("cat /sys/class/net/eth0/mtu") == "2000"
