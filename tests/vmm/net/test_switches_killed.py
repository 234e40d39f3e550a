# SPDX-License-Identifier: Apache-2.0
"""`vmm switch create` and `delete` with kill -9 at any moment: leftovers are reported, and the next command cleans
them up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.vmm.net.hosts import bridge_host

WORDS = {
    "external": ["--type", "external", "--nic", "up0", "--yes"],
    "internal": ["--type", "internal", "--address", "10.77.9.1/24", "--nat", "--backend", "bridge"],
}


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.parametrize(("verb", "kind"), [("create", "external"), ("create", "internal"), ("delete", "external"),
                                            ("delete", "internal")])  # fmt: skip
def test_after_a_kill_at_any_point_the_next_command_cleans_up(tmp_path: Path, verb: str, kind: str) -> None:
    """`list`, `show` and `doctor` work and report it; `create` says what to do; `delete` leaves the host as it was."""
    with bridge_host(tmp_path) as host:
        host.link("up0", "net", "10.9.0.254/24")
        host.run("ip addr add 10.9.0.2/24 dev up0; ip route add default via 10.9.0.254")
        settings = [f"VMM_HOME={tmp_path / 'home'}", f"VMM_RUNTIME={tmp_path / 'run'}"]
        program = [sys.executable, "-m", "tests.vmm.net.switch_victim", verb, "11", "lab", *WORDS[kind]]
        done = host.execute(["env", *settings, *program])
        assert done.returncode == 0, done.stderr
        points, unfinished = json.loads(done.stdout)
        assert points > 20 and unfinished > 0
