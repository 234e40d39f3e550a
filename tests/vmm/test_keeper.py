# SPDX-License-Identifier: Apache-2.0
"""What the keeper makes of a disks' server that ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.errors import NoSpace, StoreFailed, VmmError, from_document
from vmm.keeper import last_error_in


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
