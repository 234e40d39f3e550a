# SPDX-License-Identifier: Apache-2.0
"""`vmm events` with a file that a user or a guest has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmm.cli.log import event_words
from vmm.cli.main import main
from vmm.model.events import Event
from vmm.model.spec import make_spec
from vmm.store import registry


@pytest.mark.parametrize("time", ["soon", 1e300, None, [], float("nan"), -1e30])
def test_events_that_were_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: object) -> None:
    """Whatever stands in place of the time, every event is shown, and no control characters reach the terminal."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    events = Path(registry.add(make_spec(name="web")).paths.events)
    events.write_text(json.dumps({"time": time, "event": "strange\x1b[2J", "why": "\x9b31m"}) + "\n")
    result = CliRunner().invoke(main, ["events", "web"])
    assert result.exit_code == 0 and "strange\\x1b[2J  (why: \\x9b31m)" in result.output


def test_a_followed_log_ends_with_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vmm logs --follow` and `vmm events --follow` end by themselves when the machine is deleted."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    registry.add(make_spec(name="web"))
    looks = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) % 3 == 0:
            with registry.changing("web") as machine:
                registry.remove(machine)
        assert len(looks) < 9, "it continues for ever"

    monkeypatch.setattr("time.sleep", look)
    assert CliRunner().invoke(main, ["logs", "web", "--of", "worker", "--follow"]).exit_code == 0
    registry.add(make_spec(name="web"))
    assert CliRunner().invoke(main, ["events", "web", "--follow"]).exit_code == 0
    assert len(looks) == 6


def test_times_of_events_in_json_have_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --json the unit is in the name of the field."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    events = Path(registry.add(make_spec(name="web")).paths.events)
    events.write_text('{"time": 12.5, "event": "off"}\n{"time": NaN, "event": "odd"}\n')
    events = json.loads(CliRunner().invoke(main, ["events", "web", "--json"]).output)
    assert events == [{"time_unix_seconds": 12.5, "event": "off"}, {"time_unix_seconds": None, "event": "odd"}]


def test_lists_in_events_are_words() -> None:
    """A list among the details of an event is shown as words, and an empty one as "none"."""
    event = Event("failed", 0.0, {"jobs": ["web", "mail"], "done": []})
    assert event_words(event).endswith("  failed  (jobs: web and mail, done: none)")
