# SPDX-License-Identifier: Apache-2.0
"""Real guests on bridges, in network namespaces of the test, each of which acts as a host."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_linux_guest, require_root_and_namespaces, require_tool
from tests.vmm.guests.shell import GuestShell
from tests.vmm.net.machines import MachineLab, Namespaces, address, lease, ping
from tests.waiting import wait_until
from tests.warm_commands import warm
from vmm.store import registry
from vmm.store.state import processes_of

pytestmark = [pytest.mark.kvm, pytest.mark.netns, pytest.mark.slow]


# Runs at 0000:7C00: set DS, then each byte of the text to the first serial port when that is ready, then halt.
BOOT_PROGRAM = (
    bytes.fromhex(
        "31c0 8ed8 fc be217c ac 84c0 7411 88c4 bafd03 ec a820 74fb 88e0 b2f8 ee ebea f4 ebfd".replace(" ", "")
    )
    + b"BOOTED FROM THE NETWORK\r\n\0"
)


class BridgeLab(MachineLab):
    """A host in a namespace, with a network behind its card `up0` in another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.spaces = Namespaces()
        self.here, self.there = self.spaces.add("host"), self.spaces.add("lan")
        for name in (self.here, self.there):
            self.spaces.run(name, "sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")
        self.spaces.run(self.here, f"ip link add up0 type veth peer name lan0 netns {self.there}")
        self.spaces.run(self.there, "ip addr add 10.9.0.254/24 dev lan0 && ip link set lan0 up")
        self.spaces.run(self.here, "ip addr add 10.9.0.2/24 dev up0 && ip link set up0 up")
        self.spaces.run(self.here, "ip route add default via 10.9.0.254; ping -c 1 -w 10 10.9.0.254")
        # The kernel announces the carrier a second later.
        wait_until(
            lambda: "NO-CARRIER" not in self.spaces.run(self.here, "ip link show up0"), "up0 has a carrier", pause=0.1
        )

    def vmm(self, *words: str, code: int = 0) -> str:
        """Run the command on that host; return its output."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.here, *warm("vmm"), *words],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, f"vmm {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def boot(self, name: str, *nics: str, **settings: object) -> GuestShell:
        """Define a Linux guest here, and start it there."""
        self.define(name, **settings)
        for nic in nics:
            self.vmm("nic", "add", name, nic)
        self.vmm("start", name)
        return self.shell(name)

    def close(self) -> None:
        """End machines, switches and namespaces."""
        try:
            for name in self.manager.names():
                subprocess.run(
                    ["ip", "netns", "exec", self.here, *warm("vmm"), "stop", name],
                    capture_output=True,
                    timeout=60,
                    check=False,
                )
            super().close()
        finally:
            self.spaces.close()


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[BridgeLab]:
    """The machines, switches and namespaces of this test."""
    require_root_and_namespaces()
    require_linux_guest()
    for tool in ("nft", "dnsmasq"):
        require_tool(tool)
    one = BridgeLab(monkeypatch)
    try:
        yield one
    finally:
        one.close()


def eventfds(name: str) -> int:
    """How many eventfds QEMU has open."""
    pid, found = processes_of(registry.load(name).runtime)["qemu"].pid, 0
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed in the meantime
            found += "eventfd" in os.readlink(one)
    return found


def test_internal_and_private(lab: BridgeLab) -> None:
    """Leases (fixed or not), names, the host in both directions, NAT and several queues work; a private bridge is
    closed to the host."""
    before = lab.spaces.run(lab.here, "ip -j addr; ip route; nft -s list ruleset")
    lab.vmm("switch", "create", "nat", "--type", "internal", "--address", "10.77.5.1/24", "--nat")
    lab.vmm("switch", "create", "quiet", "--type", "private", "--backend", "bridge")
    lab.define("one", cpu_count=2)
    lab.vmm("nic", "add", "one", "nat,queues=2")
    lab.vmm("nic", "add", "one", "quiet")
    lab.vmm("switch", "lease", "nat", "one/nic-0", "10.77.5.10")
    lab.vmm("start", "one")
    two = lab.boot("two", "nat", "quiet")
    one = lab.shell("one")
    assert lease(one) == "10.77.5.10"
    second = lease(two)
    assert second.startswith("10.77.5.") and second != "10.77.5.10"
    assert one.check("ls -d /sys/class/net/eth0/queues/rx-* | wc -l") == "2"
    assert "2 queues" in lab.vmm("nic", "show", "one", "nic-0")
    assert "10.77.5.10" in lab.vmm("switch", "show", "nat")
    # The host in both directions, names, and the outside world, which sees only the host's address.
    assert ping(one, "10.77.5.1").exit_code == 0
    lab.spaces.run(lab.here, "ping -c 1 -w 10 10.77.5.10")
    assert "10.77.5.10" in two.check("nslookup one.vmm.internal 10.77.5.1")
    assert ping(two, "10.9.0.254").exit_code == 0
    assert eventfds("one") < 24, "each eventfd is polled for every frame of the guest"
    # A private bridge connects guests only.
    address(one, "10.78.0.1/24", "eth1")
    address(two, "10.78.0.2/24", "eth1")
    assert ping(one, "10.78.0.2").exit_code == 0
    bridge = json.loads(lab.vmm("switch", "show", "quiet", "--json"))["id"][:8]
    lab.spaces.run(lab.here, f"ip addr add 10.78.0.9/24 dev vmm{bridge}")
    assert "0 received" in lab.spaces.run(lab.here, "ping -c 1 -w 2 10.78.0.1", check=False)
    assert ping(one, "10.78.0.9", 2).exit_code != 0
    # Guards: frames with another address of the card are dropped.
    one.check("ip link set eth1 down; ip link set eth1 address 02:00:00:00:00:77; ip link set eth1 up")
    assert ping(one, "10.78.0.2", 2).exit_code != 0
    lab.vmm("nic", "set", "one", "nic-1", "spoofing=on")
    assert ping(one, "10.78.0.2").exit_code == 0
    # VLANs are refused with the reason if the kernel does not support them.
    if not os.path.exists(f"/sys/class/net/vmm{bridge}/bridge/vlan_filtering"):
        refusal = lab.vmm("nic", "set", "two", "nic-1", "vlan=5", code=8)
        assert "CONFIG_BRIDGE_VLAN_FILTERING" in refusal
    for name in ("one", "two"):
        lab.vmm("stop", name)
    assert "vt" not in lab.spaces.run(lab.here, "ip -br link")
    for name in ("nat", "quiet"):
        lab.vmm("switch", "delete", name, "--force")
    assert lab.spaces.run(lab.here, "ip -j addr; ip route; nft -s list ruleset") == before


def test_external_and_booting_from_the_network(lab: BridgeLab) -> None:
    """A guest gets its address from the network behind the card, the host stays on it, and a legacy adapter boots."""
    tftp = lab.folder / "tftp"
    tftp.mkdir(mode=0o755)
    (tftp / "boot.0").write_bytes(BOOT_PROGRAM)
    (tftp / "boot.0").chmod(0o644)
    dnsmasq = subprocess.Popen(
        [
            "ip", "netns", "exec", lab.there, require_tool("dnsmasq"), "-k", "--conf-file=/dev/null", "--port=0",
            "--interface=lan0", "--bind-interfaces", "--dhcp-range=10.9.0.50,10.9.0.99,5m", "--pid-file=",
            f"--dhcp-leasefile={lab.folder}/lan-leases", "--enable-tftp", f"--tftp-root={tftp}", "--dhcp-boot=boot.0",
            "--user=root",
        ],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        before = lab.spaces.run(lab.here, "ip -j addr; ip route; nft -s list ruleset")
        plan = lab.vmm("switch", "create", "lan", "--type", "external", "--nic", "up0", "--dry-run")
        assert "would add up0 to" in plan
        assert "confirm with --yes" in lab.vmm("switch", "create", "lan", "--type", "external", "--nic", "up0", code=2)
        assert lab.spaces.run(lab.here, "ip -j addr; ip route; nft -s list ruleset") == before
        lab.vmm("switch", "create", "lan", "--type", "external", "--nic", "up0", "--yes")
        lab.spaces.run(lab.here, "ping -c 1 -w 5 10.9.0.254")
        lab.define("old", kernel=None, initrd=None, append=None, memory_bytes=64 << 20, boot_order=["network"])
        lab.vmm("nic", "add", "old", "lan,type=legacy")
        lab.vmm("start", "old")
        one = lab.boot("one", "lan")
        assert lease(one).startswith("10.9.0.")
        assert ping(one, "10.9.0.254").exit_code == 0
        assert ping(one, "10.9.0.2").exit_code == 0
        log = lab.manager.log_path("old", "console")
        wait_until(
            lambda: b"BOOTED FROM THE NETWORK" in Path(log).read_bytes(),
            lambda: f"it boots from the network: {Path(log).read_bytes()[-2000:]!r}",
            90,
            pause=0.1,
        )
        for name in ("one", "old"):
            lab.vmm("stop", name)
        lab.vmm("switch", "delete", "lan", "--force")
        assert lab.spaces.run(lab.here, "ip -j addr; ip route; nft -s list ruleset") == before
    finally:
        dnsmasq.kill()
        dnsmasq.wait()
