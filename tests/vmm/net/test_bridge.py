# SPDX-License-Identifier: Apache-2.0
"""The requests to the kernel for VLANs; they are examined as such, because few kernels of test machines have VLANs."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.net import bridge, plan


class Message(dict[str, Any]):
    """An answer of the kernel."""

    def get_attr(self, name: str) -> Any:
        """The attribute, as with pyroute2."""
        return self.get(name)


class Netlink:
    """A port of a filtering bridge, as pyroute2 shows it; `asked` has its requests."""

    def __init__(self, *vlans: int) -> None:
        self.vlans = vlans
        self.asked: list[tuple[str, Any, Any, Any]] = []

    def link_lookup(self, ifname: str) -> list[int]:
        """Any link."""
        return [7]

    def get_vlans(self, index: int) -> list[Message]:
        """The port's VLANs."""
        attributes = [("IFLA_BRIDGE_VLAN_INFO", {"vid": vlan, "flags": 0}) for vlan in self.vlans]
        return [Message(IFLA_AF_SPEC={"attrs": attributes} if attributes else None)]

    def vlan_filter(self, command: str, index: int, vlan_info: dict[str, Any], vlan_flags: int | None = None) -> None:
        """A request."""
        assert index == 7
        self.asked.append((command, vlan_info["vid"], vlan_info.get("flags"), vlan_flags))


@pytest.fixture
def kernel() -> bridge.Kernel:
    """A conversation that reaches no kernel."""
    return bridge.Kernel.__new__(bridge.Kernel)


OWN = 0x02 | 0x04  # PVID, and untagged on its way out


def test_changing_the_vlan_removes_the_old_one_first(kernel: bridge.Kernel) -> None:
    """From the bridge's own VLAN to 10, to 20, and back to none: a port never stays in its previous VLAN."""
    for before, vlan, expected in (
        ((1,), 10, [("del", "1", None, None), ("add", 10, OWN, None)]),
        ((10,), 20, [("del", "10", None, None), ("add", 20, OWN, None)]),
        ((20,), 0, [("del", "20", None, None), ("add", 1, OWN, None)]),
        ((1,), 0, [("add", 1, OWN, None)]),
    ):
        kernel._netlink = netlink = Netlink(*before)
        kernel.set_vlans("vt0", *plan.port_vlans(vlan, ()))
        assert netlink.asked == expected


def test_a_trunk_with_fewer_vlans(kernel: bridge.Kernel) -> None:
    """Removed VLANs are deleted, the remaining ones are set again, because one of them may have been the native
    VLAN."""
    kernel._netlink = netlink = Netlink(1, 10, 11, 12, 20)
    kernel.set_vlans("vt0", *plan.port_vlans(10, (10, 12, 13, 20)))
    assert netlink.asked == [
        ("del", "1", None, None),
        ("del", "11", None, None),
        ("add", 10, OWN, None),
        ("add", "12-13", None, None),
        ("add", "20", None, None),
    ]


def test_the_vlan_of_the_hosts_adapter_is_set_on_the_bridge(kernel: bridge.Kernel) -> None:
    """The request for its VLAN has the flag `self` (`bridge vlan add dev BRIDGE vid 30 pvid untagged self`)."""
    kernel._netlink = netlink = Netlink(1)
    kernel.set_vlans("vmm0", 30, (), own=True)
    assert netlink.asked == [("del", "1", None, 2), ("add", 30, OWN, 2)]
