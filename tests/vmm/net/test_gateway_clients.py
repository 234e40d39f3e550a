# SPDX-License-Identifier: Apache-2.0
"""A foreign DHCP client on an internal switch of the user back end: busybox's udhcpc, in a namespace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.support import require_qemu, require_root_and_namespaces, require_tool
from tests.vmm.net.machines import MachineLab, Namespaces
from tests.waiting import wait_until
from vmm.net import frames, lease_file, switches
from vmm.net.engine import PortRules
from vmm.net.host_side import HostSide
from vmm.net.ports import PortSetup
from vmm.net.switch_spec import make_switch

pytestmark = [pytest.mark.netns]
MACS = {"one": "02:00:00:00:00:01", "two": "02:00:00:00:00:02"}


class ClientLab(MachineLab):
    """Hosts in namespaces, each with a card that a QEMU without a machine connects to the switch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.spaces = Namespaces()
        self.processes: list[subprocess.Popen[str]] = []

    def plug(self, switch: str, name: str) -> str:
        """Plug a host into the switch; return its namespace."""
        space = self.spaces.add(name)
        self.spaces.run(space, f"ip tuntap add eth0 mode tap; ip link set eth0 address {MACS[name]} up")
        peer, address = (str(self.folder / f"{name}.{end}") for end in ("g", "s"))
        words = ["ip", "netns", "exec", space, require_qemu(), "-machine", "none", "-nodefaults", "-display", "none"]
        words += ["-netdev", "tap,id=tap,ifname=eth0,script=no,downscript=no"]
        words += ["-netdev", "hubport,id=one,hubid=0,netdev=tap", "-netdev", "hubport,id=two,hubid=0,netdev=port"]
        words += ["-netdev", f"dgram,id=port,local.type=unix,local.path={peer},remote.type=unix,remote.path={address}"]
        self.processes.append(subprocess.Popen(words, text=True, stderr=subprocess.DEVNULL))
        wait_until(lambda: os.path.exists(peer), "QEMU has its end")
        rules = PortRules(addresses=frozenset({frames.parse_mac(MACS[name])}))
        HostSide(switches.load(switch)).user.plug(PortSetup(name, address, peer, rules))
        return space

    def client(self, space: str) -> subprocess.Popen[str]:
        """udhcpc, which keeps running after it got an address; it writes to standard error."""
        script = self.folder / "script"
        script.write_text(
            '#!/bin/sh\n[ "$1" = deconfig ] && ip addr flush dev eth0\n'
            '[ "$1" = bound ] && { ip addr add $ip/$mask dev eth0; ip route add default via $router; }\n'
            'echo "$1 $ip $router $dns $lease" >&2\n'
        )
        script.chmod(0o755)
        words = ["ip", "netns", "exec", space, require_tool("busybox"), "udhcpc", "-f", "-R", "-i", "eth0"]
        process = subprocess.Popen([*words, "-s", str(script)], text=True, stderr=subprocess.PIPE)
        self.processes.append(process)
        return process

    def close(self) -> None:
        """End everything."""
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
        super().close()
        self.spaces.close()


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[ClientLab]:
    """An internal switch of the user back end, called nat."""
    require_root_and_namespaces()
    require_tool("busybox")
    one = ClientLab(monkeypatch)
    try:
        lease = {"mac": MACS["two"], "address": "10.0.7.9", "name": "two"}
        settings = {"dhcp_first": "10.0.7.4", "dhcp_last": "10.0.7.4", "leases": [lease]}
        switches.create(make_switch(name="nat", type="internal", address="10.0.7.1/24", **settings))
        yield one
    finally:
        one.close()


def said(process: subprocess.Popen[str], pattern: str) -> str:
    """The line of a client's output that contains this."""
    assert process.stderr is not None
    heard = []
    while line := process.stderr.readline():
        heard.append(line)
        if re.search(pattern, line):
            return line.strip()
    raise AssertionError("".join(heard))


def test_udhcpc_uses_the_switchs_dhcp(lab: ClientLab) -> None:
    """It gets an address, reaches the gateway, renews by unicast, also from a switch that was restarted, and
    releases."""
    first, second = lab.plug("nat", "one"), lab.plug("nat", "two")
    one = lab.client(first)
    assert said(one, "^bound ") == "bound 10.0.7.4 10.0.7.1 10.0.7.2 3600"
    lab.spaces.run(first, "ping -c 1 -w 20 10.0.7.1")
    assert said(lab.client(second), "^bound ").split()[1] == "10.0.7.9"
    host = HostSide(switches.load("nat"))
    for restarted in (False, True):
        if restarted:
            status = host.user.status()
            assert status is not None
            os.kill(status["pid"], signal.SIGKILL)
            wait_until(lambda: not host.user.is_running(), "the switch ends")
            host.ensure()
        one.send_signal(signal.SIGUSR1)
        assert said(one, "^(renew|bound|nak) ") == "renew 10.0.7.4 10.0.7.1 10.0.7.2 3600"
    path = host.lease_path
    one.send_signal(signal.SIGUSR2)
    said(one, "^deconfig")
    wait_until(
        lambda: {one["address"]: one["expires"] for one in lease_file.read(path)}["10.0.7.4"] <= time.time(),
        "the lease is given back",
    )
