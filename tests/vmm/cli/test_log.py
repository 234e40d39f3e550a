# SPDX-License-Identifier: Apache-2.0
"""`vmm events` with a file that people or a guest had a hand in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmm import registry
from vmm.cli.main import main
from vmm.spec import make_spec


@pytest.mark.parametrize("time", ["soon", 1e300, None, [], float("nan"), -1e30])
def test_events_that_were_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: object) -> None:
    """Whatever stands for the time, every event is told, and nothing in it reaches into the terminal."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    events = Path(registry.add(make_spec(name="web")).paths.events)
    events.write_text(json.dumps({"time": time, "event": "strange\x1b[2J", "why": "\x9b31m"}) + "\n")
    result = CliRunner().invoke(main, ["events", "web"])
    assert result.exit_code == 0 and "strange\\x1b[2J  (why: \\x9b31m)" in result.output
