# SPDX-License-Identifier: Apache-2.0
"""Deleting an external switch succeeds whatever happened to its card, and reports what could not be restored."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.net.hosts import BridgeHost, bridge_host
from tests.warm_commands import warm
from vmm.model import errors
from vmm.net.restoring import Resisted

pytestmark = [pytest.mark.netns]


class Scene:
    """A host with an external switch `lan` on the card up0, made with the command."""

    def __init__(self, host: BridgeHost, folder: Path) -> None:
        self.host = host
        self.environment = [f"VMM_HOME={folder / 'home'}", f"VMM_RUNTIME={folder / 'rt'}"]
        host.link("up0", "lan", "10.9.0.254/24")
        host.run("ip addr add 10.9.0.2/24 dev up0; ip route add default via 10.9.0.254")
        made = self.vmm("switch", "create", "lan", "--type", "external", "--nic", "up0", "--yes")
        assert made.returncode == 0, made.stderr

    def vmm(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command on the host."""
        return self.host.execute(["env", *self.environment, *warm("vmm"), *words])

    def bridge_is_there(self) -> bool:
        """True while the switch has its bridge."""
        return "vmm" in self.host.run("ip -br link show type bridge")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A host with a switch."""
    with bridge_host(tmp_path) as made:
        yield Scene(made, tmp_path)


def test_a_card_that_was_renamed_gets_everything_back(scene: Scene) -> None:
    """The card is known by its number until a reboot: another card with its old name gets nothing. INV-NET-UNDONE."""
    scene.host.run("ip link set up0 down; ip link set up0 name up7; ip link set up7 up")
    scene.host.run("ip link add up0 type veth peer name far0")
    done = scene.vmm("switch", "delete", "lan")
    assert (done.returncode, done.stderr) == (0, "")
    assert "10.9.0.2/24" in scene.host.run("ip -4 addr show dev up7")
    assert "default via 10.9.0.254 dev up7" in scene.host.run("ip route")
    assert scene.host.run("ip -4 addr show dev up0") == ""
    assert not scene.bridge_is_there()


def test_a_removed_card_is_reported_with_what_it_had(scene: Scene) -> None:
    """The switch is deleted without --force; the lost addresses and routes are reported, also as JSON."""
    scene.host.run("ip link del up0")
    done = scene.vmm("switch", "delete", "lan", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (words,) = document["not_put_back"]
    assert words == "the network card up0 is gone; it had 10.9.0.2/24, the route to 0.0.0.0/0 via 10.9.0.254"
    assert not scene.bridge_is_there()
    assert scene.vmm("switch", "show", "lan").returncode != 0


def test_a_refused_route_is_given_up_only_with_force(scene: Scene, tmp_path: Path) -> None:
    """A route that the kernel refuses keeps the switch, with a hint; if forced, the rest is restored and the switch
    deleted."""
    (journal,) = (tmp_path / "rt").glob("sw-*/journal.json")
    document = json.loads(journal.read_text())
    keep = next(one for one in document["done"] if one["kind"] == "keep")
    keep["before"]["routes"].append({**keep["before"]["routes"][0], "gateway": "224.0.0.1", "metric": 7})
    journal.write_text(json.dumps(document))
    refused = scene.vmm("switch", "delete", "lan")
    assert refused.returncode != 0
    assert "0.0.0.0/0 via 224.0.0.1" in refused.stderr and "--force" in refused.stderr
    done = scene.vmm("switch", "delete", "lan", "--force")
    assert done.returncode == 0
    assert "not put back: could not add the route 0.0.0.0/0 via 224.0.0.1 through up0" in done.stderr
    assert "10.9.0.2/24" in scene.host.run("ip -4 addr show dev up0")
    assert "default via 10.9.0.254 dev up0" in scene.host.run("ip route")
    assert not scene.bridge_is_there()


def age_journal(folder: Path, seconds: int) -> None:
    """Make the card's recorded state that many seconds older."""
    (journal,) = (folder / "rt").glob("sw-*/journal.json")
    document = json.loads(journal.read_text())
    next(one for one in document["done"] if one["kind"] == "keep")["before"]["at"] -= seconds
    journal.write_text(json.dumps(document))


def make_again(scene: Scene, commands: str) -> None:
    """Make the switch again, with other addresses and routes on the card."""
    assert scene.vmm("switch", "delete", "lan").returncode == 0
    scene.host.run(f"ip addr flush dev up0; {commands}")
    made = scene.vmm("switch", "create", "lan", "--type", "external", "--nic", "up0", "--yes")
    assert made.returncode == 0, made.stderr


def test_a_lease_that_expired_on_the_bridge_is_not_restored(scene: Scene, tmp_path: Path) -> None:
    """Nor are the routes that depended on it; before it expires, everything is restored."""
    lease = "ip addr add 10.9.0.7/24 dev up0 valid_lft 3000 preferred_lft 3000; ip route add default via 10.9.0.254"
    make_again(scene, lease)
    age_journal(tmp_path, 2000)
    assert scene.vmm("switch", "delete", "lan").returncode == 0
    shown = scene.host.run("ip -4 addr show dev up0")
    assert "10.9.0.7/24" in shown and 900 <= int(shown.split("valid_lft ")[1].split("sec")[0]) <= 1000
    assert "default via 10.9.0.254 dev up0" in scene.host.run("ip route")
    scene.vmm("switch", "create", "lan", "--type", "external", "--nic", "up0", "--yes")
    make_again(scene, lease)
    age_journal(tmp_path, 3001)
    done = scene.vmm("switch", "delete", "lan")
    assert (done.returncode, done.stderr) == (0, "")
    assert scene.host.run("ip -4 addr show dev up0") == ""
    assert "up0" not in scene.host.run("ip route")


def test_other_addresses_are_restored_beside_an_expired_lease(scene: Scene, tmp_path: Path) -> None:
    """The card's own address is restored with its routes, but no route from the expired address."""
    make_again(
        scene,
        "ip addr add 10.9.0.2/24 dev up0; ip addr add 10.9.0.7/24 dev up0 valid_lft 3000 preferred_lft 3000;"
        " ip route add default via 10.9.0.254; ip route add 10.8.0.0/24 via 10.9.0.254 src 10.9.0.7",
    )
    age_journal(tmp_path, 3001)
    assert scene.vmm("switch", "delete", "lan").returncode == 0
    shown = scene.host.run("ip addr show dev up0")
    assert "10.9.0.2/24" in shown and "10.9.0.7" not in shown
    assert "default via 10.9.0.254 dev up0" in scene.host.run("ip route")
    assert "10.8.0.0/24" not in scene.host.run("ip route")


@pytest.mark.parametrize("content", ["", '{"done": [7]}', '{"done": [{"kind": "keep", "before": {}}]}'])
def test_a_damaged_journal_does_not_keep_a_switch(scene: Scene, tmp_path: Path, content: str) -> None:
    """Without --force there is an error that names it, not a traceback; with --force the switch is deleted."""
    (journal,) = (tmp_path / "rt").glob("sw-*/journal.json")
    if content.endswith("}]}"):
        content = json.dumps({**json.loads(journal.read_text()), **json.loads(content)})
    journal.write_text(content)
    refused = scene.vmm("switch", "delete", "lan")
    assert refused.returncode != 0 and "Traceback" not in refused.stderr
    assert "--force" in refused.stderr
    done = scene.vmm("switch", "delete", "lan", "--force")
    assert done.returncode == 0, done.stderr
    assert "not put back: " in done.stderr
    assert scene.vmm("switch", "show", "lan").returncode != 0


def test_one_failed_step_does_not_keep_others_from_being_restored() -> None:
    """Unless failures are given up, the first error is raised; otherwise each is recorded, and the next step is
    tried."""
    with pytest.raises(errors.VmmError, match="refused"), Resisted().trying("do it"):
        raise errors.VmmError("refused")
    resisted = Resisted(give_up=True)
    for error in (errors.VmmError("refused"), KeyError("x")):
        with resisted.trying("do it"):
            raise error
    assert resisted.words == ["refused", "cannot do it: its record is damaged ('x')"]
