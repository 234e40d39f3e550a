# SPDX-License-Identifier: Apache-2.0
"""An external switch knows its card by its MAC address, whatever its name is, and can be given another card."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, require_root_and_namespaces, require_tool
from tests.vmm.net.machines import Namespaces
from vmm.model import errors
from vmm.net import cards
from vmm.net.switch_spec import SwitchSpec, make_switch

MAC, OTHER = "02:00:00:00:00:01", "02:00:00:00:00:02"


def card(root: Path, name: str, address: str, *more: str, kind: str = "0") -> None:
    """An interface, as in sysfs."""
    (root / name).mkdir()
    (root / name / "address").write_text(f"{address}\n")
    (root / name / "addr_assign_type").write_text(f"{kind}\n")
    for one in more:
        (root / name / one).mkdir()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cards of a host."""
    monkeypatch.setattr(cards, "ROOT", str(tmp_path))
    return tmp_path


def lan(mac: str | None = MAC) -> SwitchSpec:
    """A switch whose card was eth0."""
    return make_switch(name="lan", type="external", backend="bridge", uplink="eth0", uplink_mac=mac)


def test_only_permanent_addresses_are_recorded(root: Path) -> None:
    """A card's own address is recorded; one that was made up at this boot is not."""
    card(root, "eth0", MAC)
    assert cards.with_address(lan(None)).uplink_mac == MAC
    (root / "eth0" / "addr_assign_type").write_text("1\n")
    assert cards.with_address(lan(None)).uplink_mac is None


def test_a_card_with_another_name(root: Path) -> None:
    """It is found by its address, even if bridges and VLANs have the same one; a switch made by 0.1.0 goes by the
    name."""
    card(root, "enp3s0", MAC)
    card(root, "eth0", OTHER)
    card(root, "br0", MAC, "bridge")
    card(root, "enp3s0.5", MAC, "lower_enp3s0")
    assert cards.found(lan()).uplink == "enp3s0"
    assert cards.found(lan(None)).uplink == "eth0"


def test_a_missing_card(root: Path) -> None:
    """The error names the missing card and what helps; another card is never used instead."""
    with pytest.raises(errors.Unsupported, match=rf"eth0 with the address {MAC}, and it is missing.*switch set lan"):
        cards.found(lan())
    card(root, "eth0", OTHER)
    with pytest.raises(errors.Unsupported, match="eth0 is now another card"):
        cards.found(lan())
    card(root, "a", MAC)
    card(root, "b", MAC)
    with pytest.raises(errors.Unsupported, match="several have that address: a, b"):
        cards.found(lan())


_SCENE = """
import os, shutil, subprocess, sys
from vmm.model import paths
from vmm.net import switches
from vmm.net.switch_spec import make_switch
from vmm.net.host_side import HostSide

def run(command):
    subprocess.run(command, shell=True, check=True)

def addresses(name):
    return subprocess.run(["ip", "-4", "-o", "addr", "show", name], capture_output=True, text=True).stdout

switches.create(make_switch(name="lan", type="external", backend="bridge", uplink="up0"))
spec = switches.load("lan")
assert spec.uplink_mac == "02:00:00:00:00:01" and "10.9.0.2/24" in addresses(spec.bridge_name)
# As after another boot, in which the names were given the other way round.
HostSide(spec).remove()
run("ip link set up0 down; ip link set up0 name tmp0; ip link set up1 name up0; ip link set tmp0 name up1")
run("ip link set up1 up")
switches.ensure(switches.load("lan"))
spec = switches.load("lan")
assert spec.uplink == "up1", spec
assert os.path.exists("/sys/class/net/up1/brport") and not os.path.exists("/sys/class/net/up0/brport")
# The card is taken out: the other one takes its place, with the host's addresses.
run("ip link del up1")
changed = switches.set_uplink("lan", "up0")
assert (changed.uplink, changed.uplink_mac) == ("up0", "02:00:00:00:00:02")
assert switches.load("lan") == changed
assert os.path.exists("/sys/class/net/up0/brport") and "10.9.0.2/24" in addresses(spec.bridge_name)
# What cannot be changes nothing.
for name in ("nosuch0", "no/name"):
    try:
        switches.set_uplink("lan", name)
    except Exception as error:
        print(type(error).__name__, error)
assert switches.load("lan") == changed and os.path.exists("/sys/class/net/up0/brport")
switches.delete("lan")
assert "10.9.0.2/24" in addresses("up0") and not os.path.exists("/sys/class/net/" + spec.bridge_name)
print("done")
"""


@pytest.fixture
def host() -> Iterator[tuple[Namespaces, str]]:
    """A namespace that acts as a host with two cards that have permanent addresses."""
    require_root_and_namespaces()
    require_tool("nft")
    spaces = Namespaces()
    try:
        name = spaces.add("cards")
        for number, mac in enumerate((MAC, OTHER)):
            spaces.run(name, f"ip link add up{number} address {mac} type veth peer name far{number}")
            spaces.run(name, f"ip link set far{number} up; ip link set up{number} address {mac}")
        spaces.run(name, "ip addr add 10.9.0.2/24 dev up0; ip link set up0 up")
        yield spaces, name
    finally:
        spaces.close()


@pytest.mark.netns
def test_a_switch_and_its_cards(host: tuple[Namespaces, str], tmp_path: Path) -> None:
    """After a swap of names the switch is on its card; given another card it is on that one, with the host's
    addresses."""
    done = subprocess.run(
        ["ip", "netns", "exec", host[1], "env", f"VMM_HOME={tmp_path / 'home'}", "VMM_RUNTIME=" + f"/tmp/vc-{host[1]}",
         sys.executable, "-c", _SCENE], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    subprocess.run(["rm", "-rf", f"/tmp/vc-{host[1]}"], check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "done", done.stdout + done.stderr
    assert "network card nosuch0 does not exist" in done.stdout and "no/name" not in done.stderr
