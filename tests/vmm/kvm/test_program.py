# SPDX-License-Identifier: Apache-2.0
"""Which QEMU is installed: how it is found and queried, and every way in which that can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import require_tool
from vmm.kvm import program
from vmm.model.errors import QemuFailed, TimedOut, Unsupported


def fake(path: Path, text: str) -> str:
    """A program of these lines of shell."""
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(0o755)
    return str(path)


def test_the_installed_qemu() -> None:
    """It has a version and supports at least translation."""
    found = program.inspect(require_tool("qemu-system-x86_64"))
    assert found.version[0].isdigit() and "tcg" in found.accelerators


def test_no_qemu_in_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="apt install qemu-system-x86"):
        program.find()


def test_a_qemu_that_fails(tmp_path: Path) -> None:
    """The error quotes its output."""
    with pytest.raises(QemuFailed, match="missing library"):
        program.inspect(fake(tmp_path / "qemu", "echo missing library >&2; exit 127"))


def test_a_program_without_a_version(tmp_path: Path) -> None:
    """A program that prints no version is refused."""
    with pytest.raises(QemuFailed, match="version"):
        program.inspect(fake(tmp_path / "qemu", "echo hello"))


def test_a_file_that_cannot_be_executed(tmp_path: Path) -> None:
    """The error has the system's reason."""
    path = tmp_path / "qemu"
    path.write_bytes(b"")
    with pytest.raises(Unsupported, match="Permission denied"):
        program.inspect(str(path))


def test_a_qemu_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that does not answer leads to an error after a time-out."""
    monkeypatch.setattr(program, "_ANSWER_SECONDS", 0.1)
    with pytest.raises(TimedOut):
        program.inspect(fake(tmp_path / "qemu", "exec sleep 30"))


def test_identity_changes_with_the_file(tmp_path: Path) -> None:
    """Another file under the same name counts as another program; a missing one is an error."""
    path = fake(tmp_path / "qemu", "true")
    before = program.identity(path)
    assert program.identity(path) == before
    fake(tmp_path / "other", "false")
    (tmp_path / "other").rename(path)
    assert program.identity(path) != before
    with pytest.raises(Unsupported):
        program.identity(str(tmp_path / "none"))
