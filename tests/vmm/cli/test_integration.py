# SPDX-License-Identifier: Apache-2.0
"""`vmm agent` with a real agent, and how facts about a guest are shown."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support import require_linux_guest
from tests.vmm.guests import linux
from tests.vmm.stage import SECONDS
from tests.waiting import wait_until
from tests.warm_commands import warm
from vmm.api.manager import Manager
from vmm.cli.integration import guest_pairs
from vmm.model.guest import GuestInfo, GuestInterface, OsInfo


def test_a_guest_without_an_agent() -> None:
    """For a guest that never answered, only the heartbeat is shown."""
    beat = GuestInfo("no contact", None, None, ())
    assert guest_pairs(beat) == [("heartbeat", "no contact")]


def test_a_guest_that_reports_little() -> None:
    """Empty facts leave no brackets and commas in the output."""
    system = OsInfo("Debian", version="", kernel="", machine="", host_name="")
    info = GuestInfo("ok", 0.4, system, (GuestInterface("eth0", "00:15:5d:00:00:01", ()),))
    assert guest_pairs(info) == [
        ("heartbeat", "ok (0.4 s ago)"),
        ("guest system", "Debian"),
        ("guest name", ""),
        ("guest address", "no address on eth0 (00:15:5d:00:00:01)"),
    ]


@pytest.mark.kvm
def test_a_real_agent(manager: Manager) -> None:
    """ping, show, set-time, freeze and thaw work on the command line; `vmm show` has the guest's own facts."""
    guest = require_linux_guest()

    def vmm(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*warm("vmm"), *words], capture_output=True, text=True, timeout=SECONDS, check=False)

    manager.create(
        "web", memory_bytes=int(linux.MEMORY) << 20, accelerator="tcg",
        kernel=str(guest.kernel), initrd=str(guest.initrd), append=guest.append,
    )  # fmt: skip
    manager.start("web")
    done = vmm("agent", "show", "web")  # it is still booting
    assert done.returncode == 1 and "qemu-guest-agent" in done.stderr
    wait_until(lambda: vmm("agent", "ping", "web").returncode == 0, "the agent answers", SECONDS, pause=0.3)
    assert "vmm test guest" in vmm("agent", "show", "web").stdout
    assert json.loads(vmm("agent", "show", "web", "--json").stdout)["heartbeat"] == "ok"
    assert vmm("agent", "set-time", "web").returncode == 0
    assert "frozen for at most 30 s" in vmm("agent", "freeze", "web", "--seconds", "30").stdout
    assert vmm("agent", "freeze", "web").returncode == 1
    assert "thawed" in vmm("agent", "thaw", "web").stdout
    assert vmm("agent", "freeze", "web", "--seconds", "0").returncode == 2
    shown = vmm("show", "web").stdout
    assert "vmm test guest" in shown and "vmm-guest" in shown and "heartbeat" in shown
    assert vmm("shutdown", "web").returncode == 0
