# SPDX-License-Identifier: Apache-2.0
"""Rules of a bridge that are removed or changed, and the watchers that restore them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.vmm.net.hosts import BridgeHost, bridge_host
from tests.waiting import wait_until
from vmm.net import enforcing, rule_check, rule_watch
from vmm.net.host_side import HostSide
from vmm.net.switch_spec import make_switch

LAB = make_switch(name="lab", type="internal", backend="bridge", address="10.77.9.1/24", nat=True, dhcp=False)
TABLE = LAB.table_name
SECONDS = 120.0  # two programs start, on a possibly busy machine

_MAKE = """
import sys
from vmm.net import switches
from vmm.net.engine import PortRules
from vmm.net.switch_spec import SwitchSpec
from vmm.net.ports import PortSetup
from vmm.net.host_side import HostSide
spec = SwitchSpec.model_validate_json(sys.argv[1])
switches.create(spec)
rules = PortRules(addresses=frozenset({bytes.fromhex("020000000001")}), dhcp_guard=True, storm_frames_per_second=500)
HostSide(spec).bridge.plug_tap("vt0", PortSetup("0.nic-0", "/switch", "/guest", rules=rules))
"""
_WATCH = """
import json, time
from vmm.net import switches, watching
from vmm.net.host_side import HostSide
host = HostSide(switches.load("lab"))
watching.put_right(host)
print("ready", flush=True)
while True:
    if found := watching.put_right(host).mended: print(json.dumps(found), flush=True)
    time.sleep(0.05)  # one of two watchers, which look again and again as a worker does
"""
_SHOW = """
import json, subprocess, sys
from click.testing import CliRunner
from vmm.cli.switch import show_command
from vmm.api import doctor
def show(*words): return CliRunner().invoke(show_command, ["lab", *words], catch_exceptions=False).output
before = json.loads(show("--json"))["faults"]
subprocess.run(["sh", "-ec", sys.argv[1]], check=True)
examined = list(doctor._check_switches())
after = json.loads(show("--json"))["faults"]
print(json.dumps([before, after, show(), [[one.key, one.state, one.found] for one in examined]]))
"""
_TRY = """
import json, subprocess, sys
from vmm.net import switches, watching
from vmm.net.host_side import HostSide
observed = []
host = HostSide(switches.load("lab"))
def faults(): return [one.problem for one in watching.faults(host)]
for command in sys.argv[1:]:
    subprocess.run(["sh", "-ec", command], check=True)
    observed.append([faults(), watching.put_right(host).mended, faults()])
print(json.dumps(observed))
"""


class RuleHost:
    """A host with the switch "lab" and one guest on it."""

    def __init__(self, host: BridgeHost, folder: Path) -> None:
        self.host = host
        self.environment = {"VMM_HOME": str(folder / "home"), "VMM_RUNTIME": str(folder / "run")}
        host.run("ip link add vt0 type veth peer name guest0; ip link set guest0 up")
        done = self.execute(_MAKE, LAB.model_dump_json())
        assert done.returncode == 0, done.stderr

    def command(self, program: str, *words: str) -> list[str]:
        """A Python program on the host, in the switch's home."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return ["ip", "netns", "exec", self.host.here, "env", *settings, sys.executable, "-c", program, *words]

    def execute(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run it."""
        return subprocess.run(
            self.command(program, *words), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )

    def rules(self) -> str:
        """All rules of the host, without counters."""
        return re.sub(r"packets \d+ bytes \d+", "", self.host.run("nft -s list ruleset"))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[RuleHost]:
    """A host whose rules are as planned."""
    with bridge_host(tmp_path) as made:
        yield RuleHost(made, tmp_path)


CHANGES = {
    "nft flush ruleset": "table bridge {0}: is gone",
    "nft delete table inet {0}_out": "table inet {0}_out: is gone",
    "nft flush chain bridge {0} vt0.sending": "chain vt0.sending lacks",
    "nft insert rule bridge {0} vt0.sending accept": "chain vt0.sending has 1 that does not belong to the switch",
    "nft delete rule bridge {0} sending handle"
    " $(nft -a list chain bridge {0} sending | sed -n 's/.*vmap.*handle //p')": "chain sending lacks 1 of its 1 rules",
    "nft 'flush chain bridge {0} sending; delete chain bridge {0} sending;"
    " add chain bridge {0} sending {{ type filter hook prerouting priority 5; }}'": "chain sending has been replaced",
    "nft 'add chain inet {0}_out forward {{ policy drop; }}'": "chain forward has been replaced",
    "nft 'add table bridge {0} {{ flags dormant; }}'": "table bridge {0}: is switched off",
}


@pytest.mark.netns
def test_every_change_is_found_and_repaired(lab: RuleHost) -> None:
    """`INV-RULES-BACK`: tables, chains, rules and their order are restored; unchanged ones are not touched."""
    before = lab.rules()
    done = lab.execute(_TRY, "true", *(command.format(TABLE) for command in CHANGES))
    assert done.returncode == 0, done.stderr
    nothing, *observed = json.loads(done.stdout)
    assert nothing == [[], [], []]
    for (command, words), (seen, restored, left) in zip(CHANGES.items(), observed, strict=True):
        assert any(words.format(TABLE) in one for one in seen), command
        assert restored == ["rules"], command
        assert left == [], command
    assert lab.rules() == before


@pytest.mark.netns
def test_differences_are_shown(lab: RuleHost) -> None:
    """`vmm switch show` and `vmm host doctor` compare the kernel with the plan."""
    done = lab.execute(_SHOW, f"nft delete table bridge {TABLE}")
    assert done.returncode == 0, done.stderr
    before, after, text, (check,) = json.loads(done.stdout)
    gone = f"table bridge {TABLE}: is gone"
    problem = f"its nftables rules are not as planned: {gone}"
    assert (before, after) == ([], [{"what": "rules", "problem": problem}])
    assert problem in text
    assert check == ["switches", "limited", f"lab: {problem}"]


@pytest.mark.netns
def test_rules_of_other_programs_are_ignored(lab: RuleHost) -> None:
    """Changes to another program's tables do not cause the switch's rules to be loaded."""
    other = "nft 'table inet firewall { chain c { type filter hook input priority 0; }; }'"
    done = lab.execute(_TRY, other, "nft delete table inet firewall")
    assert json.loads(done.stdout) == [[[], [], []]] * 2
    assert lab.host.run(f"nft list counters table bridge {TABLE}")


@pytest.mark.netns
def test_the_remaining_watcher_restores_rules(lab: RuleHost, tmp_path: Path) -> None:
    """`INV-RULES-BACK`: one of two watchers restores and reports; when it is killed, the other one does."""
    before = lab.rules()
    files = [tmp_path / f"watcher-{number}" for number in range(2)]
    watchers = []
    try:
        for path in files:
            with path.open("w") as file:
                watchers.append(subprocess.Popen(lab.command(_WATCH), cwd=ROOT, stdout=file))

        def reports() -> list[str]:
            return [line for path in files for line in path.read_text().splitlines() if line.startswith("[")]

        wait_until(lambda: all("ready" in path.read_text() for path in files), "two watchers", SECONDS)
        lab.host.run("nft flush ruleset")
        wait_until(lambda: len(reports()) == 1, "a report", SECONDS)
        assert lab.rules() == before
        watchers[0].send_signal(signal.SIGKILL)
        watchers[0].wait()
        lab.host.run("nft flush ruleset")
        wait_until(lambda: len(reports()) == 2, "the report of the other one", SECONDS)
        assert lab.rules() == before
        assert reports() == ['["rules"]'] * 2
    finally:
        for one in watchers:
            one.kill()
            one.wait()


def test_rules_that_never_match_are_not_loaded_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are loaded a few times, and then once for each change; as soon as they are readable again, all is as
    before."""
    state = {"generation": 7, "loaded": 0}

    def load(*arguments: object, anew: bool) -> None:
        assert anew
        state["generation"] += 1
        state["loaded"] += 1

    monkeypatch.setattr(rule_watch, "_is_there", lambda host: True)
    monkeypatch.setattr(rule_check, "generation", lambda: state["generation"])
    monkeypatch.setattr(rule_check, "differences", lambda *arguments: ["another spelling"])
    monkeypatch.setattr(enforcing, "enforce", load)
    monkeypatch.setattr(HostSide, "folder", str(tmp_path))
    host = HostSide(LAB)
    for _ in range(10):
        if not rule_watch.is_verified(host):
            assert rule_watch.restore(host) == ["another spelling"]
    assert state["loaded"] == rule_watch.MAX_ATTEMPTS
    state["generation"] += 1
    assert not rule_watch.is_verified(host)
    rule_watch.restore(host)
    assert rule_watch.is_verified(host)
    (tmp_path / "rules.json").write_text("rubbish")
    assert not rule_watch.is_verified(host)
    monkeypatch.setattr(rule_check, "differences", lambda *arguments: [])
    assert rule_watch.restore(host) == []
    assert rule_watch.is_verified(host)
