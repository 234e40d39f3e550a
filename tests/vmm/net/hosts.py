# SPDX-License-Identifier: Apache-2.0
"""A network namespace that acts as a host with bridge switches, and other namespaces as its guests and networks."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support import ROOT, require_root_and_namespaces, require_tool
from tests.vmm.net.machines import Namespaces
from tests.warm_commands import PYTHON, warm
from vmm.net.switch_spec import SwitchSpec


class BridgeHost:
    """A host without cards; `link` adds a card, `guest` plugs a guest into one of its bridges."""

    def __init__(self, spaces: Namespaces, folder: Path) -> None:
        self.spaces = spaces
        self.folder = folder
        self.here = spaces.add("host")
        self.run("sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")

    def run(self, command: str, *, check: bool = True) -> str:
        """Run a shell command on the host; return its output."""
        return self.spaces.run(self.here, command, check=check)

    def link(self, card: str, network: str, there: str) -> str:
        """Add a card with a network behind it, whose router has the address `there`; return the network's
        namespace."""
        name = self.spaces.add(network)
        self.spaces.run(name, "sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")
        self.run(f"ip link add {card} type veth peer name far netns {name}")
        self.spaces.run(name, f"ip addr add {there} dev far; ip link set far up")
        self.run(f"ip link set {card} up")
        return name

    def guest(self, spec: SwitchSpec, word: str, address: str, gateway: str | None = None) -> str:
        """Add a guest with an address of the switch's network; return its namespace."""
        name = self.spaces.add(word)
        self.run(f"ip link add tap-{word} type veth peer name eth0 netns {name}")
        self.run(f"ip link set tap-{word} master {spec.bridge_name}; ip link set tap-{word} up")
        self.spaces.run(name, f"ip addr add {address} dev eth0; ip link set eth0 up")
        if gateway is not None:
            self.spaces.run(name, f"ip route add default via {gateway}")
        return name

    def guest_of_another(self, bridge: str, address: str, guest: str, gateway: str) -> str:
        """Add another program's container: a bridge with the host's address, and one guest on it; return its
        namespace."""
        name = self.spaces.add(bridge)
        self.run(f"ip link add {bridge} type bridge; ip addr add {address} dev {bridge}; ip link set {bridge} up")
        self.run(f"ip link add p-{bridge} type veth peer name eth0 netns {name}")
        self.run(f"ip link set p-{bridge} master {bridge}; ip link set p-{bridge} up")
        self.spaces.run(name, f"ip addr add {guest} dev eth0; ip link set eth0 up; ip route add default via {gateway}")
        return name

    def ping(self, name: str, target: str, seconds: int = 5) -> bool:
        """True if an answer arrives within that time."""
        return " 1 received" in self.spaces.run(name, f"ping -c 1 -w {seconds} {target}", check=False)

    def do(self, verb: str, spec: SwitchSpec) -> subprocess.CompletedProcess[str]:
        """Run `apply` or `undo` for the switch."""
        path, folder = self.folder / f"{spec.name}.json", self.folder / "rt" / spec.name
        path.write_bytes(spec.to_json())
        folder.mkdir(parents=True, exist_ok=True)
        command = [*warm(PYTHON), "-m", "tests.vmm.net.applying_victim", verb, str(path), str(folder)]
        return self.execute(command)

    def execute(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a program on the host."""
        return subprocess.run(
            ["ip", "netns", "exec", self.here, *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def apply(self, *specs: SwitchSpec) -> None:
        """Make switches."""
        for spec in specs:
            done = self.do("apply", spec)
            assert done.returncode == 0, done.stderr

    def undo(self, spec: SwitchSpec) -> None:
        """Undo a switch."""
        done = self.do("undo", spec)
        assert done.returncode == 0, done.stderr

    def setting(self, name: str) -> str:
        """The value of a kernel setting on the host."""
        return self.run(f"cat /proc/sys/{name}").strip()

    def mac(self, name: str) -> str:
        """The MAC address of an interface of the host."""
        return str(json.loads(self.run(f"ip -j link show dev {name}"))[0]["address"])


@contextlib.contextmanager
def bridge_host(folder: Path) -> Iterator[BridgeHost]:
    """A host, which is removed completely afterwards."""
    require_root_and_namespaces()
    for tool in ("nft", "dnsmasq"):
        require_tool(tool)
    spaces = Namespaces()
    try:
        yield BridgeHost(spaces, folder)
    finally:
        spaces.close()
