# SPDX-License-Identifier: Apache-2.0
"""The linters and the type checker, as tests: `pytest` is the complete gate."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import CODE_FOLDERS, ROOT, not_available, require_module

FOLDERS = [folder for folder in CODE_FOLDERS if any((ROOT / folder).glob("**/*.py"))]


def _passes(module: str, *arguments: str) -> None:
    require_module(module)
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command[1:])}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_check() -> None:
    """The rules chosen in pyproject.toml hold everywhere."""
    _passes("ruff", "check", "--quiet", *FOLDERS)


def test_ruff_format() -> None:
    """Every file is formatted (`ruff format` does it)."""
    _passes("ruff", "format", "--check", "--quiet", *FOLDERS)


def test_mypy_strict() -> None:
    """Every file type-checks under mypy --strict, the tests too."""
    _passes("mypy", "--strict", "--no-error-summary", *FOLDERS)


def test_codespell() -> None:
    """No common misspellings in code and documents."""
    _passes("codespell_lib", ".")


def test_a_failing_linter_fails_the_test() -> None:
    """Self-test: a linter that complains makes the test fail."""
    with pytest.raises(pytest.fail.Exception, match="ruff"):
        _passes("ruff", "check", "--no-such-option")


def test_a_missing_tool_skips_here_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: a missing tool skips with its reason on a developer's machine and fails in CI."""
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="no such thing"):
        not_available("no such thing")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no such thing"):
        not_available("no such thing")
