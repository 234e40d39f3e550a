# SPDX-License-Identifier: Apache-2.0
"""The MTU of the card, or the one that was set, on the bridge, its taps and the guests' adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.net.hosts import BridgeHost, bridge_host
from tests.warm_commands import warm
from vmm.model import errors
from vmm.model.spec import make_adapter
from vmm.net import plan
from vmm.net.adapter import device_of
from vmm.net.dhcp import configuration
from vmm.net.host_side import HostSide
from vmm.net.plan import HostFacts, UplinkFacts
from vmm.net.switch_spec import make_switch


class Scene:
    """A host with a card whose MTU is 1400, and the command on it."""

    def __init__(self, host: BridgeHost, folder: Path) -> None:
        self.host = host
        self.environment = [f"VMM_HOME={folder / 'home'}", f"VMM_RUNTIME={folder / 'rt'}"]
        host.link("up0", "lan", "10.9.0.254/24")
        host.run("ip link set up0 mtu 1400")

    def vmm(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The command."""
        return self.host.execute(["env", *self.environment, *warm("vmm"), *words])

    def plug(self, switch: str, tap: str) -> None:
        """A permanent tap with the rules and the MTU of a port of the switch."""
        self.host.run(f"ip tuntap add {tap} mode tap")
        program = (
            "import sys\nfrom vmm.net import switches\nfrom vmm.net.host_side import HostSide\n"
            "from vmm.net.ports import PortSetup\n"
            f"HostSide(switches.load('{switch}')).bridge.plug_tap('{tap}', PortSetup('vm.nic-0', '-', '-'))"
        )
        done = self.host.execute(["env", *self.environment, sys.executable, "-c", program])
        assert done.returncode == 0, done.stderr

    def mtu(self, name: str) -> int:
        """Of an interface."""
        return int(json.loads(self.host.run(f"ip -j link show dev {name}"))[0]["mtu"])


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A host."""
    with bridge_host(tmp_path) as made:
        yield Scene(made, tmp_path)


@pytest.mark.netns
def test_bridge_and_taps_have_the_cards_mtu_or_the_one_that_is_set(scene: Scene) -> None:
    """Taps start with the card's MTU of 1400; a new setting takes effect at once, and one larger than the card's is
    refused.

    INV-ONE-MTU.
    """
    made = scene.vmm("switch", "create", "lan", "--type", "external", "--nic", "up0", "--yes", "--json")
    assert made.returncode == 0, made.stderr
    bridge = "vmm" + json.loads(made.stdout)["id"].replace("-", "")[:8]
    scene.plug("lan", "tap0")
    assert (scene.mtu(bridge), scene.mtu("tap0")) == (1400, 1400)
    changed = scene.vmm("switch", "set", "lan", "--mtu", "1280", "--json")
    assert changed.returncode == 0, changed.stderr
    assert json.loads(changed.stdout)["mtu_bytes"] == 1280
    assert json.loads(changed.stdout)["guests_with_old_mtu"] == ["vm.nic-0"]
    assert (scene.mtu(bridge), scene.mtu("tap0"), scene.mtu("up0")) == (1280, 1280, 1400)
    refused = scene.vmm("switch", "set", "lan", "--mtu", "9000")
    assert refused.returncode != 0
    assert "up0 carries 1400 bytes at most (MTU): first ip link set up0 mtu 9000" in refused.stderr
    assert (scene.mtu(bridge), scene.mtu("tap0")) == (1280, 1280)
    scene.host.run("ip link set up0 mtu 9000")
    assert scene.vmm("switch", "set", "lan", "--mtu", "9000").returncode == 0
    assert (scene.mtu(bridge), scene.mtu("tap0")) == (9000, 9000)
    assert scene.vmm("switch", "delete", "lan", "--force").returncode == 0


def test_an_mtu_that_a_switch_cannot_carry_is_refused() -> None:
    """Less than IPv4 needs, more than the user switch or its gateway supports, and more than the card's are
    refused."""
    for settings in ({"mtu_bytes": 500}, {"mtu_bytes": 9217}):
        with pytest.raises(errors.InvalidSpec, match="mtu_bytes"):
            make_switch(name="x", **settings)
    with pytest.raises(errors.InvalidSpec, match="gateway carries 1500"):
        make_switch(name="x", type="internal", address="10.0.0.1/24", mtu_bytes=9000)
    card = UplinkFacts("eth0", "02:00:00:00:00:01", 1500, True, None, False)
    spec = make_switch(name="x", type="external", backend="bridge", uplink="eth0", mtu_bytes=9000)
    assert "eth0 carries 1500 bytes" in plan.refusals(spec, HostFacts(uplink=card))[0]
    lower = make_switch(name="x", type="external", backend="bridge", uplink="eth0", mtu_bytes=1400)
    assert plan.refusals(lower, HostFacts(uplink=card)) == []
    assert plan.steps(lower, HostFacts(uplink=card))[1].arguments["mtu_bytes"] == 1400


def test_the_mtu_is_announced_to_guests() -> None:
    """A synthetic adapter has it as host_mtu, a legacy one gets it by DHCP; a user switch announces only an MTU that
    was set.

    INV-ONE-MTU.
    """
    synthetic = make_adapter(id="nic-0", switch="x", kind="synthetic")
    legacy = make_adapter(id="nic-0", switch="x", kind="legacy")
    assert device_of(synthetic, mtu_bytes=1400)["host_mtu"] == 1400
    assert "host_mtu" not in device_of(legacy, mtu_bytes=1400)
    assert HostSide(make_switch(name="x")).mtu_bytes() is None
    assert HostSide(make_switch(name="x", mtu_bytes=9000)).mtu_bytes() == 9000
    assert HostSide(make_switch(name="x", backend="bridge")).mtu_bytes() == 1500
    inside = {"name": "x", "type": "internal", "address": "10.0.0.1/24", "mtu_bytes": 1400}
    assert "dhcp-option=option:mtu,1400" in configuration(make_switch(**inside, backend="bridge"), "leases")
    setup = make_switch(**inside).dhcp_setup()
    assert setup is not None and setup.mtu_bytes == 1400
