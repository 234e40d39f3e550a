# SPDX-License-Identifier: Apache-2.0
"""Completions that a shell offers for a partial command of `vmm`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmm.cli.main import main
from vmm.model.spec import make_adapter, make_spec
from vmm.net import switches
from vmm.net.switch_spec import make_switch
from vmm.schedule import store
from vmm.schedule.definition import make_schedule
from vmm.store import registry


@pytest.fixture(autouse=True)
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two machines, one of which has an adapter, and two switches."""
    monkeypatch.setenv("VMM_HOME", str(short_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(short_path / "run"))
    for name in ("lab", "lan"):
        switches.create(make_switch(name=name))
    adapter = make_adapter(id="nic-0", switch="lab", mac="02:00:00:00:00:01")
    registry.add(make_spec(name="web", adapters=[adapter]))
    registry.add(make_spec(name="base"))
    store.add(make_schedule(name="nightly", kind="backup", when="22:30", created=datetime.now(UTC), work={}))
    yield short_path
    for name in ("lab", "lan"):
        switches.delete(name, force=True)


def offered(line: str) -> list[str]:
    """The completions that bash offers for the last word of the line, which may be empty."""
    words = line.split(" ")
    asked = {"_VMM_COMPLETE": "bash_complete", "COMP_WORDS": line.rstrip(), "COMP_CWORD": str(len(words) - 1)}
    result = CliRunner().invoke(main, env=asked, prog_name="vmm")
    assert result.exit_code == 0, result.output
    return [answer.partition(",")[2] for answer in result.output.splitlines() if answer]


@pytest.mark.parametrize("line, names", [
    ("vmm switch sh", ["show"]),
    ("vmm switch show ", ["lab", "lan"]),
    ("vmm switch ports la", ["lab", "lan"]),
    ("vmm switch capture lan", ["lan"]),
    ("vmm switch lease lab ", ["web/nic-0"]),
    ("vmm switch create ", []),
    ("vmm switch create lan --type e", ["external"]),
    ("vmm start ", ["base", "web"]),
    ("vmm snapshot create w", ["web"]),
    ("vmm nic set web ", ["nic-0"]),
    ("vmm nic set absent ", []),
    ("vmm nic add web la", ["lab", "lan"]),
    ("vmm create ", []),
    ("vmm backup ver", ["verify"]),
    ("vmm backup schedule show ", ["nightly"]),
    ("vmm backup schedule add ", []),
    ("vmm backup run w", ["web"]),
    ("vmm backup list repo b", ["base"]),
])  # fmt: skip
def test_names_are_completed(line: str, names: list[str]) -> None:
    """Names of switches, machines and adapters are offered where one is expected, but not for a new name."""
    assert offered(line) == names


def test_interfaces_are_completed() -> None:
    """The card of a switch is one of the host's interfaces."""
    assert "lo" in offered("vmm switch set lan --nic ")


def test_damaged_definitions_are_not_offered(home: Path) -> None:
    """A damaged definition does not stop the completion."""
    (home / "home" / "machines" / "web" / "machine.json").write_text(json.dumps({"name": 3}))
    assert offered("vmm nic set web ") == []
    assert offered("vmm start ") == ["base", "web"]
