# SPDX-License-Identifier: Apache-2.0
"""`script/fresh`: which settings it copies, and that it leaves nothing behind, with a stand-in for debootstrap.

CI runs the whole script, with a real root and everything in it.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, require_root_and_namespaces
from tests.waiting import wait_until

SCRIPT = ROOT / "script" / "fresh"
FAILS = "echo E: no such suite; exit 1"
# Enough of a root for the settings to be copied into, but nothing that could run in it.
EMPTY = 'for arg; do case $arg in */system) mkdir -p "$arg"/{etc/apt,etc/dpkg/dpkg.cfg.d,usr/sbin,opt} ;; esac; done'
HANGS = f'{EMPTY}; sleep 1000 & echo $! >"$NOTES"; readlink /proc/self/ns/pid >>"$NOTES"; wait'


class Stage:
    """A home with settings, a folder for roots, and programs that take precedence over the real ones."""

    def __init__(self, folder: Path) -> None:
        self.roots, self.home, self.programs = folder / "roots", folder / "home", folder / "programs"
        self.notes = folder / "notes"
        for made in (self.roots, self.home, self.programs):
            made.mkdir()
        self.started: list[subprocess.Popen[str]] = []

    def program(self, name: str, script: str) -> None:
        """Install a command of this name with this script."""
        (self.programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.programs / name).chmod(0o755)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Run script/fresh with the stand-in for debootstrap and the list of apt's sources."""
        self.program(
            "apt-get", 'case $1 in indextargets) echo "$VERSION_CODENAME http://127.0.0.1/debian main" ;; esac'
        )
        suite = subprocess.run(
            ["bash", "-c", '. /etc/os-release && echo "$VERSION_CODENAME"'], capture_output=True, text=True, check=True
        ).stdout.strip()
        variables = {
            **os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}", "HOME": str(self.home), "CI": "true",
            "TMPDIR": str(self.roots), "NOTES": str(self.notes), "VERSION_CODENAME": suite, **environment,
        }  # fmt: skip
        self.started.append(process := subprocess.Popen(
            ["bash", SCRIPT, *words], env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        ))  # fmt: skip
        return process

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """The exit code, and the output."""
        process = self.start(*words, **environment)
        said = process.communicate(timeout=120)[0]
        return process.returncode, said

    def hanging(self) -> tuple[subprocess.Popen[str], str]:
        """A run in the middle of debootstrap, and the name of its process namespace."""
        self.program("debootstrap", HANGS)
        process = self.start("true")

        def hangs() -> bool:
            assert process.poll() is None
            return self.notes.exists() and len(self.notes.read_text().split()) == 2

        wait_until(hangs, "debootstrap runs")
        return process, self.notes.read_text().split()[1]


def processes_in(namespace: str) -> list[str]:
    """The processes in this process namespace."""
    found = []
    for path in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            found += [path.parts[2]] if os.readlink(path) == namespace else []
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Root, namespaces, and no mount of the stage left at the end."""
    require_root_and_namespaces()
    yield (stage := Stage(tmp_path))
    for process in stage.started:
        process.terminate()
        process.communicate(timeout=60)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_root_that_cannot_be_made_fails(stage: Stage) -> None:
    """It reports what failed and runs nothing in its place; the folder is removed."""
    stage.program("debootstrap", FAILS)
    code, said = stage.run(f"touch {stage.notes}")
    assert code != 0 and "no such suite" in said and "debootstrap could not make the root" in said
    assert not stage.notes.exists() and not list(stage.roots.iterdir())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run(stage: Stage, sent: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and a closed terminal leave no process, no folder and no mount."""
    process, namespace = stage.hanging()
    assert processes_in(namespace)
    os.kill(process.pid, sent)
    process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else 143)
    assert not processes_in(namespace) and not list(stage.roots.iterdir())


def test_a_killed_run(stage: Stage) -> None:
    """`kill -9` leaves no process, and the next run removes the folder; a root in use and a kept one stay."""
    process, namespace = stage.hanging()
    stage.program("debootstrap", FAILS)
    assert "which a killed run left" not in stage.run("true")[1]
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not processes_in(namespace), "its processes end")
    (left,) = stage.roots.iterdir()
    kept = stage.roots / "vhdkit-fresh.kept"
    kept.mkdir()
    for name in ("lock", "kept"):
        (kept / name).touch()
    assert f"removing {left}, which a killed run left" in stage.run("true")[1]
    assert list(stage.roots.iterdir()) == [kept]


def test_settings_are_copied(stage: Stage, tmp_path: Path) -> None:
    """Those of apt, pip and npm are copied, from files and the environment, with the local folders that they name."""
    wheels, certificate = tmp_path / "wheels", tmp_path / "authority.pem"
    wheels.mkdir()
    certificate.touch()
    (stage.home / ".config" / "pip").mkdir(parents=True)
    (stage.home / ".config" / "pip" / "pip.conf").write_text(f"[global]\nfind-links = file://{wheels}\n")
    (stage.home / ".npmrc").write_text("fund=false\n")
    stage.program("debootstrap", EMPTY)
    code, said = stage.run(
        "--keep", "true", PIP_CERT=str(certificate), https_proxy="http://127.0.0.1:1/a b", OTHER="no"
    )
    assert code != 0, said  # nothing can run in an empty root
    (work,) = stage.roots.iterdir()
    root = work / "system"
    assert (root / "root/.npmrc").read_text() == "fund=false\n"
    assert str(wheels) in (root / "root/.config/pip/pip.conf").read_text()
    for path in Path("/etc/apt").rglob("*"):
        assert os.path.lexists(root / path.relative_to("/"))
    variables = (root / ".environment").read_text().splitlines()
    assert "export CI=true" in variables and f"export PIP_CERT={certificate}" in variables
    assert "export https_proxy=http://127.0.0.1:1/a\\ b" in variables
    assert not [line for line in variables if "OTHER" in line]
    missing = next(
        path for path in [*reversed(tmp_path.parents), tmp_path] if not (root / path.relative_to("/")).exists()
    )
    assert str(missing) in (work / "named").read_text().split() or (work / "named").read_text()


def test_in_place_only_on_request(stage: Stage) -> None:
    """Without a root every command runs, each failure is named, and the exit code is the last one's."""
    code, said = stage.run("--in-place", "exit 3", f"touch {stage.notes}")
    assert (code, stage.notes.exists()) == (3, True) and "exit code 3 from: exit 3" in said
    assert stage.run("--in-place", "--keep")[0] == 2 and stage.run("--nonsense")[0] == 2


def test_ci_runs_it() -> None:
    """CI runs it, so that software that happens to be installed cannot make a submission pass."""
    assert 'exec bash script/fresh "$@"' in (ROOT / ".ci" / "run").read_text()
