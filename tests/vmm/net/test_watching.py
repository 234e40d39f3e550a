# SPDX-License-Identifier: Apache-2.0
"""What dies of a switch is seen, told and put right."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_root_and_namespaces, require_tool
from tests.vmm.net.machines import Namespaces

# Runs on a host of its own: a switch whose DHCP server is killed.
VICTIM = """
import json, os, signal, sys
from vmm.net import switches, watching
from vmm.net.dhcp import DhcpServer
from vmm.net.plan import make_switch
from vmm.host.doctor import _check_switches
switches.create(make_switch(name="nat", type="internal", backend="bridge", address="10.5.0.1/24"))
host = switches.HostSide(switches.load("nat"))
server = DhcpServer(host.spec, host.folder, switches.lease_path(host.spec))
def look():
    (check,) = _check_switches()
    return [one.what for one in watching.faults(host)], check.state, check.found
first = server.process()
said = {"before": look(), "quiet": watching.put_right(host)}
with open(f"/proc/{first.pid}/status") as file:
    facts = dict(line.split(":", 1) for line in file)
said["user"] = facts["Uid"].split()
said["capabilities"] = facts["CapBnd"].strip(), facts["CapEff"].strip()
said["root"] = sorted(os.listdir(f"/proc/{first.pid}/root"))
first.send(signal.SIGKILL)
first.wait(10)
os.waitpid(first.pid, 0)
said |= {"dead": look(), "mended": watching.put_right(host), "twice": watching.put_right(host), "after": look()}
said["another"] = server.process() not in (None, first)
if "client" in sys.argv:
    print(json.dumps(said), flush=True)
    input()
switches.delete("nat")
said["gone"] = [one for one in watching.faults(host)]
print(json.dumps(said))
"""


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A host of the test's own."""
    require_root_and_namespaces()
    for tool in ("nft", "dnsmasq", "busybox"):
        require_tool(tool)
    folder = Path(tempfile.mkdtemp(prefix="vmm-watch-"))
    monkeypatch.setenv("VMM_HOME", str(folder / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(folder / "run"))
    spaces = Namespaces()
    try:
        yield spaces.add("host")
    finally:
        spaces.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_dhcp_server_that_died_is_started_again(space: str) -> None:
    """`INV-SWITCH-WATCHED`: it is shown, put right once, and serves clients again, enclosed as `INV-ENCLOSED` says."""
    victim = subprocess.Popen(
        ["ip", "netns", "exec", space, sys.executable, "-c", VICTIM, "client"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert victim.stdout is not None
        assert victim.stdin is not None
        said = json.loads(victim.stdout.readline())
        assert said["before"] == [[], "ok", "nat"]
        assert (said["quiet"], said["mended"], said["twice"]) == ([], ["dhcp"], [])
        assert said["dead"][:2] == [["dhcp"], "limited"]
        assert "nat: its DHCP and name server (dnsmasq) does not run" in said["dead"][2]
        assert (said["after"], said["another"]) == ([[], "ok", "nat"], True)
        assert "0" not in said["user"]
        kept = f"{1 << 10 | 1 << 12 | 1 << 13:016x}"
        assert said["capabilities"] == [kept, kept]
        assert not {"home", "root", "proc", "sys", "var", "run"} & set(said["root"])
        assert lease_of_a_client(space) == "10.5.0."
        victim.stdin.write("\n")
        victim.stdin.close()
        assert json.loads(victim.stdout.read())["gone"] == []
        assert victim.wait(30) == 0
    finally:
        victim.kill()
        victim.wait()
        for stream in (victim.stdin, victim.stdout):
            if stream is not None:
                stream.close()


def lease_of_a_client(space: str) -> str:
    """The network of the address that busybox's client gets on the bridge; it asks at another end of a veth."""
    script = (
        "set -e; bridge=$(ls /sys/class/net | grep ^vmm); ip link add t0 type veth peer name g0;"
        "ip link set t0 master $bridge up; ip link set g0 up;"
        "exec busybox udhcpc -i g0 -n -q -t 20 -T 1 -s /bin/true 2>&1"
    )
    done = subprocess.run(
        ["ip", "netns", "exec", space, "sh", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    (line,) = [one for one in done.stdout.splitlines() if "obtained" in one]
    return line.split()[3].rpartition(".")[0] + "."
