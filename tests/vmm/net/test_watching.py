# SPDX-License-Identifier: Apache-2.0
"""A process of a switch that died is noticed, reported and restarted."""

from __future__ import annotations

import itertools
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

# Runs on its own host: a switch whose DHCP server is killed.
VICTIM = """
import json, os, signal, sys
from vmm.net import switches, watching
from vmm.net.host_side import HostSide
from vmm.net.dhcp import Dnsmasq
from vmm.net.switch_spec import make_switch
from vmm.api.doctor import _check_switches
os.umask(0o077)  # a machine's worker has it
switches.create(make_switch(name="nat", type="internal", backend="bridge", address="10.5.0.1/24"))
host = HostSide(switches.load("nat"))
server = Dnsmasq(host.spec, host.folder, host.lease_path)
def look():
    (check,) = _check_switches()
    return [one.what for one in watching.faults(host)], check.state, check.found
first = server.process()
said = {"before": look(), "quiet": watching.put_right(host).mended}
with open(f"/proc/{first.pid}/status") as file:
    facts = dict(line.split(":", 1) for line in file)
said["user"] = facts["Uid"].split()
said["capabilities"] = facts["CapBnd"].strip(), facts["CapEff"].strip()
said["root"] = sorted(os.listdir(f"/proc/{first.pid}/root"))
first.send(signal.SIGKILL)
first.wait(10)
said |= {"dead": look(), "mended": watching.put_right(host).mended}
said |= {"twice": watching.put_right(host).mended, "after": look()}
try:
    said["zombie"] = bool(os.waitpid(first.pid, os.WNOHANG))
except ChildProcessError:
    said["zombie"] = False
said["another"] = server.process() not in (None, first)
if "client" in sys.argv:
    print(json.dumps(said), flush=True)
    input()
switches.delete("nat")
said["gone"] = [one for one in watching.faults(host)]
print(json.dumps(said))
"""

# Runs on its own host: a switch whose DHCP server can never be started again.
HOPELESS = """
import json, signal, time
from vmm.model import errors
from vmm.net import dhcp, switches, watching
from vmm.net.host_side import HostSide
from vmm.net.switch_spec import make_switch
switches.create(make_switch(name="nat", type="internal", backend="bridge", address="10.5.0.1/24"))
host = HostSide(switches.load("nat"))
server = dhcp.Dnsmasq(host.spec, host.folder, host.lease_path)
server.stop()
clock, tries = [1000.0], []
watching.time.clock_gettime = lambda which: clock[0]
def ensure(self):
    tries.append(clock[0])
    raise errors.VmmError("it is broken")
kept, dhcp.Dnsmasq.ensure = dhcp.Dnsmasq.ensure, ensure
failed = []
for second in range(300):
    clock[0] += 1.0
    failed += watching.put_right(host).failed
said = {"tries": tries, "failed": [[one.what, one.problem] for one in failed]}
dhcp.Dnsmasq.ensure = kept
clock[0] += 60.0
said["mended"] = watching.put_right(host).mended
switches.delete("nat")
clock[0] += 1000.0
watching._is_there = lambda host: True  # it was deleted right after the look
try:
    watching.put_right(host)
except errors.NotFound:
    said["gone"] = True
said["runs"] = bool(server._all())
print(json.dumps(said))
"""


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A host for this test."""
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
    """`INV-SWITCH-WATCHED`: its death is shown, repaired once, and it serves clients again, enclosed as `INV-ENCLOSED`
    says."""
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
        assert said["zombie"] is False
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


def test_a_dhcp_server_that_never_starts_is_tried_rarely_and_reported_once(space: str) -> None:
    """Each attempt waits longer than the last, up to a minute; as soon as it can start, it does, but not on a deleted
    switch."""
    done = subprocess.run(
        ["ip", "netns", "exec", space, sys.executable, "-c", HOPELESS],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["tries"][0] == 1001.0
    pauses = [later - earlier for earlier, later in itertools.pairwise(said["tries"])]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    ((what, problem),) = said["failed"]
    assert (what, "cannot be started, and will be tried again: it is broken" in problem) == ("dhcp", True)
    assert (said["mended"], said["gone"], said["runs"]) == (["dhcp"], True, False)


def lease_of_a_client(space: str) -> str:
    """The network of the address that busybox's client gets on the bridge; it asks at the other end of a veth."""
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
