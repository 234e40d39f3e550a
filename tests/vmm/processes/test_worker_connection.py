# SPDX-License-Identifier: Apache-2.0
"""How a machine's worker is found, also when its definition was edited by hand."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.host.proc import Lock
from vmm.model import paths
from vmm.model.errors import AccessDenied, InvalidSpec
from vmm.model.spec import make_spec
from vmm.processes import worker_connection as contact
from vmm.processes.answers import MachineStatus
from vmm.store import registry
from vmm.store.state import MachineState


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home for this test."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))


@contextlib.contextmanager
def as_ordinary_user(folder: Path) -> Iterator[None]:
    """A user to whom access rights apply: root becomes one for a while."""
    is_root = os.geteuid() == 0
    for one in (folder, *folder.parents) if is_root else ():
        if not one.stat().st_mode & 0o001 and one.name.startswith(("pytest-", "popen-", "test_")):
            one.chmod(0o711)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("machine_id", ["../../victim", "../victim/x", "zzz", "", 5, None])
def test_a_malformed_id(tmp_path: Path, machine_id: object) -> None:
    """Every verb reports that the definition is wrong, and what the id happens to lead to is left alone."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    (tmp_path / "run" / "x").mkdir(parents=True)
    path = Path(registry.add(make_spec(name="web")).paths.definition)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id": machine_id}))
    for verb in (contact.MachineRef.of, contact.start):
        with pytest.raises(InvalidSpec, match="not a machine definition: id"):
            verb("web")
    assert (victim / "file").read_text() == "precious"


@pytest.mark.parametrize("text", ["[" * 200_000, "", "[1]", '{"id": [1]}'])
def test_a_file_that_is_not_a_definition(text: str) -> None:
    """It is reported as such, however deeply it is nested."""
    path = Path(registry.add(make_spec(name="web")).paths.definition)
    path.write_text(text)
    with pytest.raises(InvalidSpec, match="is not a machine definition"):
        contact.start("web")
    assert not Path(paths.runtime_home()).exists()


def test_a_home_that_cannot_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's machines are reported as inaccessible, not as missing."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    monkeypatch.setenv("VMM_HOME", str(folder / "home"))
    with as_ordinary_user(tmp_path), pytest.raises(AccessDenied, match="look for the machine"):
        contact.MachineRef.of("web")


@pytest.mark.parametrize("part", ["keeper", "worker"])
def test_the_remains_of_ending_processes_are_removed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that holds the machine's lock waits until a killed process has ended, and removes what it left."""
    runtime = registry.add(make_spec(name="web")).runtime
    os.makedirs(runtime.folder)
    ending = Lock(runtime.lock(part))
    assert ending.try_take()
    looked = contact.is_looked_after

    def is_looked_after(runtime: paths.RuntimePaths) -> bool:
        found = looked(runtime)
        ending.release()
        return found

    monkeypatch.setattr(contact, "is_looked_after", is_looked_after)
    monkeypatch.setattr(contact, "COME_BACK_SECONDS", 5.0)
    with contact.changing("web") as (_, client):
        assert client is None
    assert not os.path.exists(runtime.folder)
    assert contact.status_of(contact.MachineRef.of("web")) == MachineStatus(MachineState.OFF)
