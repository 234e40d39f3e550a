# SPDX-License-Identifier: Apache-2.0
"""Interfaces that cannot be a switch's card, on a real kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import require_root_and_namespaces
from tests.vmm.net.machines import Namespaces
from vmm.net import plan
from vmm.net.bridge import Kernel
from vmm.net.switch_spec import make_switch

pytestmark = [pytest.mark.netns]


@pytest.fixture
def here() -> Iterator[tuple[Namespaces, str]]:
    """A namespace with interfaces of many kinds."""
    require_root_and_namespaces()
    spaces = Namespaces()
    try:
        name = spaces.add("host")
        spaces.run(name, "ip link add up0 type veth peer name lan0 && ip link add up1 type veth peer name lan1")
        spaces.run(name, "ip link add br0 type bridge && ip link set lan0 master br0")
        spaces.run(name, "ip link add mv0 link up1 type macvlan && ip tuntap add tun0 mode tun")
        spaces.run(name, "ip tuntap add tap0 mode tap")
        yield spaces, name
    finally:
        spaces.close()


def test_each_kind_is_refused_before_anything_is_changed(here: tuple[Namespaces, str]) -> None:
    """The reasons cover what the kernel refuses, and what it would accept without ever delivering frames."""
    spaces, name = here

    def reasons(uplink: str) -> list[str]:
        spec = make_switch(name="x", type="external", backend="bridge", uplink=uplink)
        with spaces.inside(name), Kernel() as kernel:
            return plan.refusals(spec, kernel.facts(spec))

    assert reasons("up0") == reasons("tap0") == []
    for uplink, words in {
        "lo": "lo is not a network card",
        "tun0": "tun0 is not a network card",
        "br0": "br0 is a bridge",
        "lan0": "lan0 is already part of br0",
        "up1": "mv0 stand on up1",
        "mv0": "mv0 is of kind macvlan",
        "none0": "network card none0 does not exist",
    }.items():
        (said,) = reasons(uplink)
        assert words in said


def test_the_kernel_refuses_the_same_interfaces(here: tuple[Namespaces, str]) -> None:
    """Otherwise the plan would be too strict; the kernel accepts only a macvlan, which gets no frames but its own."""
    spaces, name = here
    spaces.run(name, "ip link add br1 type bridge")
    refused = [
        one
        for one in ("lo", "tun0", "br0", "lan0", "up1", "mv0", "up0", "tap0")
        if "refused" in spaces.run(name, f"ip link set {one} master br1 || echo refused")
    ]
    assert refused == ["lo", "tun0", "br0", "up1"]
