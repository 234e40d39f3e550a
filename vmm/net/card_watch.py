# SPDX-License-Identifier: Apache-2.0
"""The card of an external switch that has left its bridge, or whose MTU changed: detected and corrected.

Decides when a card may be put back: if it is still the switch's card, nothing else has taken it, and the host does not
use it for itself, because its addresses would stop working. A check reads two or three files of sysfs, and reports no
fault while a command creates or deletes the switch. Must not know who checks, nor how often (`watching`).

`INV-CARD-BACK`: while a machine is on an external switch, a card that was removed from its bridge is back within a
second, unless the host uses it; then an event says why it is not.
"""

from __future__ import annotations

import os

from vmm.model import errors
from vmm.net import cards, plan
from vmm.net.host_side import HostSide
from vmm.net.switch_spec import USUAL_MTU_BYTES

_ROOT = "/sys/class/net"


def problem(host: HostSide) -> str | None:
    """Why no frame gets through the switch's card, for people; None if nothing is wrong. Changes nothing."""
    spec = host.spec
    if not _is_watched(host) or _master(str(spec.uplink)) == spec.bridge_name:
        return None
    try:
        card = str(cards.found(spec).uplink)  # it may have been renamed
    except errors.Unsupported as error:
        return _unless_changing(host, error.problem)
    master = _master(card)
    if master == spec.bridge_name:
        return None
    if not os.path.isdir(f"{_ROOT}/{card}"):
        return _unless_changing(host, f"its network card {card} is missing")
    where = f"is part of {master}" if master else "was removed"
    return _unless_changing(host, f"its network card {card} {where} and is not part of its bridge {spec.bridge_name}")


def put_back(host: HostSide) -> None:
    """Make the card part of the bridge again. The caller holds the switch's lock.

    Raises VmmError, with what to do, if that is not safe.
    """
    from vmm.net import ipv6
    from vmm.net.bridge import Kernel

    spec = cards.found(host.spec)
    card = str(spec.uplink)
    with Kernel() as kernel:
        facts = kernel.facts(spec)
        if reasons := plan.refusals(spec, facts):
            raise errors.Unsupported("; ".join(reasons))
        if facts.uplink is not None and facts.uplink.addresses:
            found = ", ".join(one.address for one in facts.uplink.addresses)
            raise errors.InUse(f"this host uses {card} itself ({found})", hint=f"first: ip addr flush dev {card}")
        ipv6.switch_off(card)
        kernel.set_master(card, spec.bridge_name)
        if os.path.exists(f"{_ROOT}/{spec.bridge_name}/bridge/vlan_filtering"):
            kernel.set_vlans(card, *plan.uplink_vlans())
        kernel.set_up(card)


def mtu_problem(host: HostSide) -> str | None:
    """How the MTU of the bridge or its taps differs from what the switch should carry; None if it does not. Changes
    nothing.

    Only one tap is checked: all of them are set together, and there may be hundreds.
    """
    spec = host.spec
    if not os.path.isdir(f"{_ROOT}/{spec.bridge_name}/brif"):
        return None
    if spec.uplink is not None and cards.mtu_bytes(spec.uplink) is None:
        return None  # a missing card has no MTU to compare with
    wanted = host.mtu_bytes() or USUAL_MTU_BYTES
    taps = sorted(name for name in _ports(spec.bridge_name) if name != spec.uplink)
    for name in (spec.bridge_name, *taps[:1]):
        there = cards.mtu_bytes(name)
        if there not in (None, wanted):
            words = f"bridge and taps carry {there} bytes (MTU), but should carry {wanted}"
            return _unless_changing(host, words)
    if spec.mtu_bytes is not None and wanted < spec.mtu_bytes:
        words = f"{spec.uplink} carries {wanted} bytes (MTU), and so does the switch, instead of {spec.mtu_bytes}"
        return _unless_changing(host, f"{words}: ip link set {spec.uplink} mtu {spec.mtu_bytes}")
    return None


def _ports(bridge: str) -> list[str]:
    try:
        return os.listdir(f"{_ROOT}/{bridge}/brif")
    except OSError:
        return []


def _is_watched(host: HostSide) -> bool:
    spec = host.spec
    return spec.type == "external" and spec.capabilities.in_kernel and os.path.isdir(f"{_ROOT}/{spec.bridge_name}")


def _unless_changing(host: HostSide, words: str) -> str | None:
    """The words; None while a command creates or removes the switch."""
    return None if host.bridge.is_half_done() else words


def _master(name: str) -> str | None:
    try:
        return os.path.basename(os.readlink(f"{_ROOT}/{name}/master"))
    except OSError:
        return None
