# SPDX-License-Identifier: Apache-2.0
"""What the supervisor makes of a disks' server that ended."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vmm.host.proc import Lock, python_command, python_environment
from vmm.model.errors import NoSpace, StoreFailed, VmmError, from_document
from vmm.model.paths import RuntimePaths
from vmm.processes.supervisor import last_error_in


@pytest.mark.parametrize(
    ("log", "status", "kind", "words"),
    [
        (
            '{"error": {"problem": "is damaged", "path": "/a.vhd", "exit_code": 3}}',
            3,
            StoreFailed,
            "/a.vhd: is damaged",
        ),
        ("", 7, NoSpace, "no space"),
        ("", 1, StoreFailed, "ended with code 1"),
        ("", -9, StoreFailed, "SIGKILL"),
        ("", None, StoreFailed, "ended"),
    ],
)
def test_why_a_server_ended(tmp_path: Path, log: str, status: int | None, kind: type[VmmError], words: str) -> None:
    """Its own words; without them what its end looked like, and a full file system is one even if it left none."""
    (tmp_path / "log").write_text(log)
    error = from_document(last_error_in(str(tmp_path / "log"), status))
    assert type(error) is kind and words in str(error)


def test_a_supervisor_that_comes_too_late(tmp_path: Path) -> None:
    """One that a dead worker had started leaves the folder of the machine's next start alone, and does not lock it."""
    runtime = RuntimePaths(str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    Path(runtime.running).write_text('{"disks": []}')
    command = python_command("vmm.processes.supervisor", str(tmp_path), runtime.folder)
    subprocess.run(command, env=python_environment(), check=True, timeout=60)
    assert os.listdir(runtime.folder) == [os.path.basename(runtime.running)]


def test_a_lock_in_a_folder_that_was_made_anew(tmp_path: Path) -> None:
    """A lock is no longer current when its folder was taken away, and not again when there is another."""
    folder = tmp_path / "run"
    folder.mkdir()
    lock = Lock(str(folder / "keeper.lock"))
    assert not lock.is_current() and lock.try_take() and lock.is_current()
    shutil.rmtree(folder)
    assert not lock.is_current()
    folder.mkdir()
    (folder / "keeper.lock").touch()
    assert not lock.is_current()
    lock.release()
