# SPDX-License-Identifier: Apache-2.0
"""What the kernel allows: trying it leaves no trace, and a failure is a text, never an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import run
from vmm.host import kernel


def links() -> list[str]:
    """The network interfaces of this namespace."""
    return sorted(os.listdir("/sys/class/net"))


@pytest.mark.parametrize("probe", [kernel.bridge, kernel.bridge_vlan_filtering, kernel.bridge_guards])
def test_trying_leaves_no_trace(probe: object) -> None:
    """A bridge or table that was made only to see whether it is possible does not exist afterwards."""
    assert callable(probe)
    before = links()
    problem = probe()
    assert problem is None or (problem and "\n" not in problem)
    assert links() == before and "probe" not in before


def test_answers_agree_with_ip() -> None:
    """What is reported as possible works with `ip` in a separate namespace."""
    if kernel.bridge() is None:
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        words = ["ip", "-o", "link", "show", "type", "bridge"]
        text = "ip link add name b type bridge && " + " ".join(words)
        assert ": b:" in run(["unshare", *user, "--net", "sh", "-c", text]).stdout


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without ip or unshare the answer names it."""
    monkeypatch.setattr(kernel, "program_path", lambda: str(tmp_path))
    assert kernel.bridge() == "this host has no command ip"
    (tmp_path / "ip").write_text("#!/bin/sh\n")
    (tmp_path / "ip").chmod(0o755)
    assert kernel.bridge() == "this host has no command unshare"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'RTNETLINK answers: Operation not supported' >&2; exit 2", "Operation not supported"),
        ("echo >&2; echo 'Error: Unknown device type.' >&2; exit 1", "Unknown device type."),
        ("exit 3", "ip ended with 3"),
        ("exec sleep 30", "ip did not end within 0 s"),
    ],
)
def test_a_failure_is_reported_in_the_programs_words(
    script: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The program's message is reported without its decoration; a program that hangs leads to a time-out."""
    for name, text in (("ip", "exit 0"), ("unshare", script)):
        (tmp_path / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(kernel, "program_path", lambda: str(tmp_path))
    monkeypatch.setattr(kernel, "_SECONDS", 0.4)
    assert kernel.bridge() == says


def test_devices(tmp_path: Path) -> None:
    """A device that can be opened is good; otherwise the system's message is reported with its path."""
    assert kernel.device("/dev/null") is None
    assert kernel.device(str(tmp_path / "none")) == f"{tmp_path}/none: No such file or directory"


def test_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying leaves no descriptor open, and an unknown processor is reported."""
    before = os.listdir("/proc/self/fd")
    kernel.write_protecting_userfaultfd()
    assert os.listdir("/proc/self/fd") == before
    monkeypatch.setattr("platform.machine", lambda: "vax")
    assert kernel.write_protecting_userfaultfd() == "not known on vax"
