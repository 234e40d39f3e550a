# SPDX-License-Identifier: Apache-2.0
"""What QEMU gets for an adapter, and how its port is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.cli.nic_words import parse_nic
from vmm.model import errors
from vmm.model.spec import make_adapter
from vmm.net import adapter, frames, nft, taps
from vmm.net.adapter import Owner
from vmm.net.engine import Drop, Engine, PortRules, VlanMode

OWNER = Owner("01234567-89ab-cdef-0123-456789abcdef", "/run/vmm/0123456789ab", (70000, 70000))
MAC = "00:15:5d:00:00:01"


def test_default_adapter_has_a_storm_limit_on_both_back_ends() -> None:
    """Of a guest's flood, 1000 frames a second pass the `user` switch, and a bridge's rules have the same limit."""
    made = make_adapter(id="nic-0", mac=MAC, **parse_nic("lab"))
    rules = adapter.rules_of(made)
    switch = Engine()
    port = switch.add_port("a", rules)
    switch.add_port("b", PortRules(spoofing=True))
    frame = frames.BROADCAST + frames.parse_mac(MAC) + b"\x88\xb5" + bytes(50)
    passed = [switch.forward("a", frame, 100 + n / 5000) for n in range(10_000)]
    count = sum(1 for one in passed if [name for name, _ in one] == ["b"])
    assert 2000 <= count <= 2200
    assert port.counters.drops[Drop.STORM] == 10_000 - count
    (limit,) = nft.port_chains(nft.GuestPort("vt0", rules)).limits.values()
    assert (limit["rate"], limit["per"], limit["burst"], limit["inv"]) == (1000, "second", 100, True)


def test_synthetic_and_legacy() -> None:
    """Virtio has no boot ROM, and several queues with two vectors each; rtl8139 boots from the network."""
    one = make_adapter(id="nic-0", mac=MAC, queues=4)
    assert adapter.device_of(one, 4) == {
        "driver": "virtio-net-pci",
        "id": "nic-0",
        "netdev": "nic-0.wire",
        "romfile": "",
        "mq": True,
        "vectors": 10,
        "mac": MAC,
    }
    old = make_adapter(id="nic-1", kind="legacy", mac=MAC)
    assert adapter.device_of(old) == {"driver": "rtl8139", "id": "nic-1", "netdev": "nic-1.wire", "mac": MAC}


def test_ports() -> None:
    """Ports are sockets in the machine's runtime folder, owned by QEMU's user; their names are derived from ids."""
    setup = adapter.setup_of(make_adapter(id="nic-0", mac=MAC, bandwidth_bits_per_second=10**8, link_up=False), OWNER)
    assert (setup.name, setup.owner, setup.link_up) == ("0123456789ab.nic-0", 70000, False)
    assert (setup.address, setup.peer) == (
        f"{OWNER.runtime_folder}/nic-0/switch.sock",
        f"{OWNER.runtime_folder}/nic-0/guest.sock",
    )
    assert len(adapter.interface_name(OWNER.machine_id, "nic-0")) <= 15
    assert adapter.interface_name(OWNER.machine_id, "nic-0") != adapter.interface_name(OWNER.machine_id, "nic-1")


def test_rules() -> None:
    """Each setting reaches the switch."""
    plain = adapter.rules_of(make_adapter(id="nic-0", mac=MAC))
    assert plain == PortRules(addresses=frozenset({bytes.fromhex("00155d000001")}), storm_frames_per_second=1000)
    access = adapter.rules_of(
        make_adapter(id="nic-0", mac=MAC, vlan=7, spoofing=True, dhcp_guard=True, mirror="source")
    )
    assert (access.mode, access.vlan, access.spoofing, access.dhcp_guard) == (VlanMode.ACCESS, 7, True, True)
    assert (access.mirror_source, access.mirror_destination, access.router_guard) == (True, False, False)
    trunk = adapter.rules_of(make_adapter(id="nic-0", mac=MAC, trunk=[5, 6], native_vlan=6, storm_frames_per_second=9))
    assert (trunk.mode, trunk.vlan, trunk.allowed) == (VlanMode.TRUNK, 6, frozenset({5, 6}))
    assert trunk.storm_frames_per_second == 9


def test_data_paths_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data path names the path of frames, the number of queues, and the reason for not having more or faster
    ones."""
    one, many = make_adapter(id="nic-0"), make_adapter(id="nic-0", queues=4)
    assert adapter.data_path(one, "user").endswith("one queue")
    assert "only a bridge supports several" in adapter.data_path(many, "user")
    monkeypatch.setattr(taps, "VHOST_PATH", "/no/such/vhost-net")
    assert (
        adapter.data_path(many, "bridge")
        == "bridge: tap, 4 queues, moved by QEMU (this kernel has no /no/such/vhost-net)"
    )
    monkeypatch.setattr(taps, "VHOST_PATH", "/dev/null")
    assert adapter.data_path(one, "bridge") == "bridge: tap, one queue, moved by the kernel (vhost)"
    assert "emulated" in adapter.data_path(make_adapter(id="nic-0", kind="legacy"), "bridge")


def test_without_a_cable() -> None:
    """An adapter without a switch exists with its other end unconnected; two of them do not see each other."""
    given: list[int] = []

    def give(ours: int) -> int:
        given.append(ours)
        return ours

    one, other = (adapter.plug(make_adapter(id=name), OWNER, give) for name in ("nic-0", "nic-1"))
    assert one.netdev["type"] == "hubport"
    assert one.netdev["hubid"] != other.netdev["hubid"]
    assert one.data_path == "not plugged into any switch"
    assert not given


def test_without_its_switch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is prepared for the back end that it was on last: a tap with its queues, or sockets."""
    owner = Owner(OWNER.machine_id, str(tmp_path / "run"))
    one = make_adapter(id="nic-0", mac=MAC, switch="gone", queues=2)
    monkeypatch.setattr(taps, "open_tap", lambda name, queues: list(range(50, 50 + queues)))
    monkeypatch.setattr(taps, "open_vhost", lambda queues: [])
    tap = adapter.prepare(one, owner, str, back_end="bridge", problem="it is gone")
    assert (tap.netdev["type"], tap.netdev["fds"], tap.problem) == ("tap", "50:51", "it is gone")
    assert tap.device["mq"] is True and tap.back_end == "bridge"
    sockets = adapter.prepare(one, owner, str, back_end="user", problem="it is gone")
    assert (sockets.netdev["type"], sockets.problem, sockets.back_end) == ("dgram", "it is gone", "user")

    def refused(name: str, queues: int) -> list[int]:
        raise errors.AccessDenied("a tap interface needs root")

    monkeypatch.setattr(taps, "open_tap", refused)
    assert adapter.prepare(one, owner, str, back_end="bridge", problem="it is gone") == sockets
