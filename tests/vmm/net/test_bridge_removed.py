# SPDX-License-Identifier: Apache-2.0
"""A bridge that is removed while machines are on it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests.support import ROOT, require_root_and_namespaces, require_tool
from tests.vmm.net.machines import Namespaces

pytestmark = [pytest.mark.netns]

_STORY = """
import json, subprocess
from vmm.net import switches
from vmm.net.host_side import HostSide
from vmm.net.adapter import Owner, interface_name, setup_of
from vmm.net.joining import join
from vmm.net.switch_spec import make_switch
from vmm.model.spec import make_adapter

def ip(words): subprocess.run(["ip", *words.split()], check=True)
def connected(): return sum(one["connected"] for one in host.port_status())

switches.create(make_switch(name="lab", backend="bridge"))
host, observed = HostSide(switches.load("lab")), []
adapters = [make_adapter(id=f"nic-{n}", switch="lab", mac=f"02:00:00:00:00:0{n}") for n in range(3)]
owners = [Owner(f"machine-{n}", "/nowhere") for n in range(3)]
for adapter, owner in zip(adapters, owners):
    name = interface_name(owner.machine_id, adapter.id)
    ip(f"tuntap add {name} mode tap")
    host.bridge.plug_tap(name, setup_of(adapter, owner))
observed.append(connected())
ip(f"link del {host.spec.bridge_name}")
observed.append(connected())
first = join(adapters[0], owners[0], host.spec.id)
observed += [first.switch_id == host.spec.id, connected()]
ip(f"link set {interface_name(owners[1].machine_id, 'nic-1')} nomaster")
observed.append(connected())
second = join(adapters[1], owners[1], host.spec.id)
observed += [second.switch_id == host.spec.id, connected()]
ip(f"link del {host.spec.bridge_name}")
switches.delete("lab", force=False)
print(json.dumps(observed))
"""


@pytest.fixture
def spaces() -> Iterator[Namespaces]:
    """The namespaces of this test."""
    require_root_and_namespaces()
    require_tool("nft")
    one = Namespaces()
    try:
        yield one
    finally:
        one.close()


@pytest.fixture
def folder() -> Iterator[str]:
    """A folder whose name is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="vmm-") as made:
        yield made


def test_ports_of_a_removed_bridge_are_reported_and_restored(spaces: Namespaces, folder: str) -> None:
    """Without the bridge no port is reported as connected; the first machine that notices makes it again, with all
    taps in it.

    A single tap that was taken out is put back by itself. A switch whose bridge is gone can be deleted.
    """
    here = spaces.add("host")
    observed = subprocess.run(
        ["ip", "netns", "exec", here, "env", f"VMM_HOME={folder}/h", f"VMM_RUNTIME={folder}/r",
         sys.executable, "-c", _STORY],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert observed.returncode == 0, observed.stderr
    assert json.loads(observed.stdout) == [3, 0, True, 3, 2, True, 3]
