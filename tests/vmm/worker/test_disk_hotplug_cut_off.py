# SPDX-License-Identifier: Apache-2.0
"""A change of a medium that fails, or whose worker dies, before the drive is empty: the guest keeps the old medium."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmm.model.errors import NoSpace
from vmm.model.paths import write_whole
from vmm.model.spec import MachineSpec, make_spec
from vmm.store import registry
from vmm.store.state import MachineState
from vmm.worker import disk_hotplug as plugging
from vmm.worker.disk_hotplug import CHANGE_MEDIUM, Plugging
from vmm.worker.running import Running
from vmm.worker.states import Verb, refuse


class Drive:
    """The monitor of a QEMU with one drive, and as much of a running machine as a change of media uses."""

    state = MachineState.RUNNING

    def __init__(self, folder: Path) -> None:
        (folder / "one.iso").write_bytes(b"first" * 1000)
        (folder / "two.iso").write_bytes(b"second" * 1000)
        self.is_open, self.asked = False, list[str]()
        disks = [{"id": "disk-0", "kind": "iso", "path": str(folder / "one.iso")}]
        self.spec: MachineSpec = make_spec(name="small", disks=disks)
        self.note = SimpleNamespace(operation=None, details={})
        self.machine = SimpleNamespace(definition=str(folder / "machine.json"))
        Path(self.machine.definition).write_bytes(self.spec.to_json())
        self.runtime = SimpleNamespace(running=str(folder / "running.json"))
        self.media: dict[str, str | None] = {}
        self.events: list[str] = []
        self.qmp = self

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Answer as QEMU does."""
        if command == "query-block":
            return [{"qdev": "disk-0", "tray_open": self.is_open, "inserted": {"node-name": "medium.0"}}]
        self.asked.append(command)
        self.is_open = {"blockdev-open-tray": True, "blockdev-close-tray": False}[command]
        return {}

    @contextlib.contextmanager
    def busy(self, operation: str) -> Any:
        """One operation at a time."""
        self.note.operation = operation
        yield
        self.note.operation = None

    def write_note(self) -> None:
        """Write no note: no process follows."""

    def need(self, verb: Verb) -> None:
        """Nothing: the machine runs, so every verb about disks is allowed."""
        refuse(verb, self.state)

    def redefine(self, spec: MachineSpec) -> None:
        """As for a running machine: the file comes first."""
        write_whole(self.runtime.running, spec.to_json(), durable=False)
        self.spec = spec

    async def wait_reachable(self) -> None:
        """Nothing: it is reachable."""

    def tell(self, event: str, **details: object) -> None:
        """Record an event."""
        self.events.append(event)


def test_a_full_file_system_keeps_the_medium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that cannot be recorded leaves the medium in a closed drive."""
    drive = Drive(tmp_path)
    one = Plugging(cast(Running, drive))

    def full(*_: object) -> None:
        raise NoSpace("no space is left")

    monkeypatch.setattr(registry, "update", full)
    monkeypatch.setattr(plugging, "holding", lambda *_: contextlib.nullcontext())
    with pytest.raises(NoSpace):
        asyncio.run(one._change({"disk": "disk-0", "path": str(tmp_path / "two.iso")}, lambda _: None))
    assert drive.asked == ["blockdev-open-tray", "blockdev-close-tray"]
    assert drive.spec.disks[0].path == str(tmp_path / "one.iso")
    assert (drive.note.details, drive.events) == ({}, [])


@pytest.mark.parametrize("was_open", [False, True])
def test_a_worker_killed_before_it_recorded_the_change(tmp_path: Path, *, was_open: bool) -> None:
    """Its successor closes the tray if it was opened, and the guest keeps its medium."""
    drive = Drive(tmp_path)
    drive.is_open = was_open
    drive.note.operation = CHANGE_MEDIUM
    drive.note.details = {"drive": "disk-0", "drive_had": str(tmp_path / "one.iso")}
    os.unlink(tmp_path / "one.iso")  # what is open stays
    asyncio.run(Plugging(cast(Running, drive)).finish_interrupted())
    assert (drive.asked, drive.is_open) == (["blockdev-close-tray"], False)
    assert (drive.note.operation, drive.note.details, drive.events) == (None, {}, [])


def test_a_worker_killed_and_the_new_medium_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded change that can no longer be made is undone: the definition names what the guest has."""
    drive = Drive(tmp_path)
    two = make_spec(
        **{**drive.spec.model_dump(), "disks": [{**drive.spec.disks[0].model_dump(), "path": "/gone.iso"}]}
    )
    Path(drive.machine.definition).write_bytes(two.to_json())
    drive.spec, drive.is_open = two, True
    drive.note.operation = CHANGE_MEDIUM
    drive.note.details = {"drive": "disk-0", "drive_had": str(tmp_path / "one.iso")}
    stored: list[str | None] = []
    monkeypatch.setattr(registry, "update", lambda _, change: stored.append(change(two).disks[0].path))
    monkeypatch.setattr(plugging, "holding", lambda *_: contextlib.nullcontext())
    asyncio.run(Plugging(cast(Running, drive)).finish_interrupted())
    assert (stored, drive.is_open, drive.events) == ([str(tmp_path / "one.iso")], False, ["medium-not-changed"])
    assert drive.spec.disks[0].path == str(tmp_path / "one.iso")
