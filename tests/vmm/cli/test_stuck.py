# SPDX-License-Identifier: Apache-2.0
"""A backup to a repository that hangs, as a file server that does not answer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounting import require_fuse
from tests.vmm import nights
from tests.vmm.hanging_folder import hanging_folder
from tests.vmm.small_guests import wait_counting
from tests.waiting import becomes, wait_until
from vmm.api.manager import Manager
from vmm.cli import entry, stuck

pytestmark = pytest.mark.kvm

# The command's process stops the file system when the night begins to be written.
STOPPING = """
import os, sys
if "run" in sys.argv and os.path.exists({plan!r}):
    from vhdkit.backup.night import Writing
    from vmm.cli import stuck
    stuck.PATIENCE_SECONDS = 0.5
    save = Writing.save

    def stopping(*words):
        os.unlink({plan!r})
        os.kill({process}, 19)
        return save(*words)

    Writing.save = stopping
"""


def test_ctrl_c_ends_a_backup_whose_repository_hangs(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the repository does not answer, the guest runs on and other commands work; Ctrl-C ends the command, which
    says what is left, and the next night is right."""
    require_fuse()
    leaf = nights.make_writing(manager, tmp_path)
    images = nights.files_of(tmp_path)
    with hanging_folder(tmp_path) as (mount, process):
        (tmp_path / "code").mkdir()
        plan = tmp_path / "plan"
        (tmp_path / "code" / "sitecustomize.py").write_text(STOPPING.format(plan=str(plan), process=process))
        plan.touch()
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "code")}
        command = subprocess.Popen(
            [sys.executable, "-m", "vmm", "backup", "run", "small", str(mount / "repo")],
            env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            wait_until(lambda: not plan.exists() or command.poll() is not None, "the repository hangs")
            wait_counting(manager)
            manager.snapshots("small").create("meanwhile")
            manager.snapshots("small").delete("meanwhile")
            assert command.poll() is None
            command.send_signal(signal.SIGINT)
            _, said = command.communicate(timeout=60)
        finally:
            command.kill()
        assert command.returncode == 130 and "the repository did not answer" in said
        [event] = [one for one in manager.events("small") if one.name == "backup-failed"]
        assert "did not answer" in event.details["problem"]
        wait_counting(manager)
        os.kill(process, signal.SIGCONT)
        with nights.recorded() as expected:
            night = manager.save_night("small", str(mount / "repo"))
        assert night.night == 1 and nights.all_restored(mount / "repo", "small") == expected
    manager.forget_nights("small")
    manager.snapshots("small").merge_live()
    assert nights.files_of(tmp_path) == images and manager.show("small").spec.disks[0].path == str(leaf)  # type: ignore[union-attr]


def test_the_child_ends_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is killed takes its work along; one that ends well has the exit code of its work."""
    program = f"""
import os, sys, time
from pathlib import Path
from vmm.cli import entry, stuck
entry.is_own_process = True
code = stuck.exit_code_of_child(lambda: "words")
if code is not None:
    sys.exit(code)
Path({str(tmp_path / "child")!r}).write_text(str(os.getpid()))
if sys.argv[1] == "wait":
    time.sleep(600)
sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", program, "end"], check=False).returncode == 7
    (tmp_path / "child").unlink()
    parent = subprocess.Popen([sys.executable, "-c", program, "wait"])
    try:
        wait_until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text(), "the child works")
        child = int((tmp_path / "child").read_text())
    finally:
        parent.kill()
        parent.wait()

    def is_gone() -> bool:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(child, 0)
            return Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        return True

    assert becomes(is_gone, 30)


def test_a_program_that_calls_a_command_makes_no_child() -> None:
    """Only the command `vmm` itself goes on in a child."""
    assert not entry.is_own_process and stuck.exit_code_of_child(lambda: "words") is None
