# SPDX-License-Identifier: Apache-2.0
"""A run that leaves something behind fails, and lists it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leftovers import MARK, Run
from tests.support import ROOT

LEAVES = """
import subprocess, tempfile
from multiprocessing import resource_tracker
def test_that_leaves():
    resource_tracker.ensure_running()
    tempfile.mkdtemp(prefix="left-")
    with open("pid", "w") as file:
        file.write(str(subprocess.Popen(["sleep", "300"], start_new_session=True).pid))
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_a_run_that_leaves_a_process_fails(tmp_path: Path, workers: tuple[str, ...]) -> None:
    """The test passes and the run fails, naming the process; the temporary folder is unchanged."""
    (tmp_path / "test_sample.py").write_text(LEAVES)
    (tmp_path / "conftest.py").write_text("import tests.leftovers\ntests.leftovers._SECONDS = 0.1\n")
    above = tmp_path / "tmp"
    above.mkdir()
    environment = {**os.environ, "TMPDIR": str(above), "PYTEST_DEBUG_TEMPROOT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", *options, *workers, str(tmp_path / "test_sample.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 9)
    assert done.returncode == 1 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert f"process {pid}: sleep 300" in done.stdout and "resource_tracker" not in done.stdout
    assert not list(above.iterdir())


def test_a_new_process_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even between the start of a program and its first instruction, when it has neither command line nor
    environment."""
    for name in ("TMPDIR", "PYTEST_DEBUG_TEMPROOT", MARK):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    run = Run(str(tmp_path))
    for _ in range(20):
        with subprocess.Popen(["sleep", "300"], env=os.environ) as process:
            left = run.left()
            process.kill()
        assert left == [f"process {process.pid}: sleep 300"]
    monkeypatch.setattr("tests.leftovers._SECONDS", 0.0)
    assert run.end() == []


@pytest.mark.parametrize(("outer", "reported"), [("", ["network namespace lost"]), ("run:other:", [])])
def test_a_run_within_a_test_reports_no_namespaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: str, reported: list[str]
) -> None:
    """In CI a namespace that is left is reported by the whole run; those beside an inner run belong to others."""
    for name, value in (("TMPDIR", ""), ("PYTEST_DEBUG_TEMPROOT", ""), (MARK, outer)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr("tests.leftovers._SECONDS", 0.0)
    monkeypatch.setattr("tests.leftovers._namespaces", set)
    run = Run(str(tmp_path))
    monkeypatch.setattr("tests.leftovers._namespaces", lambda: {"lost"})
    assert run.end() == reported


def test_mounts_in_our_folder_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounts and loop devices of others are left alone; if one of ours is left, the folder stays."""
    for name in ("TMPDIR", "PYTEST_DEBUG_TEMPROOT", MARK):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    former = os.environ.copy()
    run = Run(str(tmp_path))
    mounts = ["/", f"{tmp_path}/other", f"{run.folder}/mnt"]
    monkeypatch.setattr("tests.leftovers._mounts", lambda: mounts)
    monkeypatch.setattr("tests.leftovers._loops", lambda: [("loop7", "/x.vhd"), ("loop8", f"{run.folder}/x.vhd")])
    monkeypatch.setattr("tests.leftovers._SECONDS", 0.0)
    assert run.left() == [f"mount {run.folder}/mnt", f"loop device loop8 on {run.folder}/x.vhd"]
    run.end()
    assert run.folder.exists() and os.environ.copy() == former
    mounts.pop()
    run.end()
    assert not run.folder.exists()
