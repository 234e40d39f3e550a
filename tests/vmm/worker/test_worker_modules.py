# SPDX-License-Identifier: Apache-2.0
"""The module names with which processes of vmm 0.1.0, which outlive an upgrade, start a machine's other processes
again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vmm.host.proc import python_command, python_environment
from vmm.model.events import read_events
from vmm.model.paths import MachinePaths, RuntimePaths
from vmm.store.state import WorkerNote, WorkerPhase


@pytest.fixture
def places(tmp_path: Path) -> tuple[MachinePaths, RuntimePaths]:
    """A machine's folder, and the runtime folder of a machine that has ended."""
    for name in ("machine", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    machine, runtime = MachinePaths(str(tmp_path / "machine")), RuntimePaths(str(tmp_path / "run"))
    WorkerNote(phase=WorkerPhase.ENDED).write(runtime)
    return machine, runtime


def run(module: str, machine: MachinePaths, runtime: RuntimePaths) -> None:
    """Run the module as a process of 0.1.0 does, and wait for its end."""
    command = python_command(module, machine.folder, runtime.folder)
    subprocess.run(command, env={"PATH": "/usr/bin:/bin", **python_environment()}, timeout=60, check=True)


def test_a_worker_is_started_by_its_old_name(places: tuple[MachinePaths, RuntimePaths]) -> None:
    """`python -m vmm.worker` is the worker: it takes the machine up, and reports that its definition is gone."""
    machine, runtime = places
    run("vmm.worker", machine, runtime)
    assert [event.name for event in read_events(machine.events)] == ["worker-failed"]
    assert WorkerNote.read(runtime) is not None


def test_a_supervisor_is_started_by_its_old_name(places: tuple[MachinePaths, RuntimePaths]) -> None:
    """`python -m vmm.keeper` is the supervisor: it removes the runtime folder of a machine that has ended."""
    machine, runtime = places
    run("vmm.keeper", machine, runtime)
    assert not Path(runtime.folder).exists()
