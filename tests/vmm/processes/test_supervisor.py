# SPDX-License-Identifier: Apache-2.0
"""What the supervisor does after a disk server has ended."""

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
def test_why_a_disk_server_ended(
    tmp_path: Path, log: str, status: int | None, kind: type[VmmError], words: str
) -> None:
    """Its own words give the reason; without them its exit status does, and a full file system is found even if it
    wrote nothing."""
    (tmp_path / "log").write_text(log)
    error = from_document(last_error_in(str(tmp_path / "log"), status))
    assert type(error) is kind and words in str(error)


def test_a_supervisor_that_starts_too_late(tmp_path: Path) -> None:
    """One that a dead worker had started leaves the folder of the machine's next start alone, and does not lock it."""
    runtime = RuntimePaths(str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    Path(runtime.running).write_text('{"disks": []}')
    command = python_command("vmm.processes.supervisor", str(tmp_path), runtime.folder)
    subprocess.run(command, env=python_environment(), check=True, timeout=60)
    assert os.listdir(runtime.folder) == [os.path.basename(runtime.running)]


def test_a_lock_in_a_folder_that_was_replaced(tmp_path: Path) -> None:
    """A lock stops being valid when its folder is removed, and does not become valid again with a new folder."""
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
