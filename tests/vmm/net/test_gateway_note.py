# SPDX-License-Identifier: Apache-2.0
"""What a switch records about its gateway is read by machines that do not trust it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm.net import gateway_note


def test_a_note_exists_until_it_is_removed(tmp_path: Path) -> None:
    """Its reason is cut to a length fit for a log; removing a note that does not exist, or whose folder is gone, is
    allowed."""
    folder = str(tmp_path)
    gateway_note.leave(folder, "x" * 1000)
    assert gateway_note.is_there(folder) and gateway_note.read(folder) == "x" * 500
    gateway_note.remove(folder)
    gateway_note.remove(folder)
    assert not gateway_note.is_there(folder) and gateway_note.read(folder) is None
    gateway_note.leave(str(tmp_path / "gone"), "x")


@pytest.mark.parametrize("content", ["", "7", "{}", '{"problem": 7}', '{"problem": ["x"]}'])
def test_a_damaged_note_is_ignored(tmp_path: Path, content: str) -> None:
    """It counts as no note; a pipe in its place does not block the reader."""
    path = tmp_path / "gateway.json"
    path.write_text(content)
    assert gateway_note.read(str(tmp_path)) is None
    path.unlink()
    os.mkfifo(path)
    assert gateway_note.read(str(tmp_path)) is None
