# SPDX-License-Identifier: Apache-2.0
"""The network card of an external switch: finding it under the name that the kernel uses now.

Decides what identifies a card: its MAC address, because names follow from slots and from the order in which drivers
load. An address that the kernel makes up at each boot does not identify a card. Reads sysfs, changes nothing.
"""

from __future__ import annotations

import os

from vmm.model import errors
from vmm.net.switch_spec import SwitchSpec

ROOT = "/sys/class/net"
_RANDOM = "1"  # of addr_assign_type: made up with the interface (Documentation/ABI/testing/sysfs-class-net)


def with_address(spec: SwitchSpec) -> SwitchSpec:
    """The switch with the MAC address of the card that currently has its uplink's name."""
    return spec.model_copy(update={"uplink_mac": None if spec.uplink is None else _address(spec.uplink)})


def found(spec: SwitchSpec) -> SwitchSpec:
    """The switch with the current name of its card. Raises Unsupported if the card is missing."""
    if spec.uplink is None or spec.uplink_mac is None or _address(spec.uplink) == spec.uplink_mac:
        return spec
    others = [name for name in _names() if _is_card(name) and _address(name) == spec.uplink_mac]
    if len(others) == 1:
        return spec.model_copy(update={"uplink": others[0]})
    what = f"{spec.uplink} is now another card" if os.path.isdir(f"{ROOT}/{spec.uplink}") else "it is missing"
    if others:
        what = f"several have that address: {', '.join(others)}"
    raise errors.Unsupported(
        f"the card of switch {spec.name!r} was {spec.uplink} with the address {spec.uplink_mac}, and {what}",
        hint=f"give it another: vmm switch set {spec.name} --nic INTERFACE",
    )


def mtu_bytes(name: str) -> int | None:
    """The MTU of an interface in bytes; None if it does not exist."""
    found = _read(name, "mtu")
    return int(found) if found.isdecimal() else None


def _names() -> list[str]:
    try:
        return sorted(os.listdir(ROOT))
    except OSError:
        return []


def _is_card(name: str) -> bool:
    """False for interfaces on top of others that share their address: bridges, VLANs, bonds."""
    folder = os.path.join(ROOT, name)
    try:
        return not any(one == "bridge" or one.startswith("lower_") for one in os.listdir(folder))
    except OSError:
        return False


def _address(name: str) -> str | None:
    """An interface's MAC address; None if it does not exist or its address does not identify it."""
    if _read(name, "addr_assign_type") == _RANDOM:
        return None
    return _read(name, "address") or None


def _read(name: str, fact: str) -> str:
    try:
        with open(os.path.join(ROOT, name, fact), encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""
