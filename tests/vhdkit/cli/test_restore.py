# SPDX-License-Identifier: Apache-2.0
"""`vhdkit restore`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.cli.running import document, failure, good


@pytest.fixture(autouse=True)
def _repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good("create", "web.vhd", "--size", "8M")
    good("backup", "web.vhd", "repo")
    with vhdkit.open_disk("web.vhd", writable=True) as disk:
        disk.write(4096, b"second night")
    good("backup", "web.vhd", "repo")


def test_a_night_becomes_an_image() -> None:
    """The newest night, one by its number and one by a time; as it was, or in another format."""
    assert "restored disk to new.vhd" in good("restore", "repo", "web", "new.vhd", "--progress")
    assert "equal" in good("compare", "new.vhd", "web.vhd")
    good("restore", "repo", "web@1", "old.raw", "--to", "raw")
    assert b"second night" not in Path("old.raw").read_bytes()
    os.mkdir("folder")
    found = document("restore", "repo", "web@2100-01-01", "folder", "--dry-run")
    assert found["disks"] == {"disk": "folder/web.vhd"} and found["night"] == 2 and not os.listdir("folder")
    good("restore", "repo", "web", "folder", "--quiet", "--disk", "disk", "--to", "vhdx")
    assert os.listdir("folder") == ["web.vhdx"]


def test_what_is_refused() -> None:
    """Errors name the machine, the night, the file, and what can be done; nothing is replaced."""
    assert "no machine 'mail'" in failure("restore", "repo", "mail", "new.vhd", code=1)
    assert "no night 7" in failure("restore", "repo", "web@7", "new.vhd", code=1)
    assert "already exists" in failure("restore", "repo", "web", "web.vhd", code=1)
    assert "no disk 'x'" in failure("restore", "repo", "web", "new.vhd", "--disk", "x", code=1)
    image = next(Path("repo").rglob("00002.avhd"))
    raw = bytearray(image.read_bytes())
    raw[raw.index(b"second night")] ^= 1
    image.write_bytes(raw)
    assert "--no-check" in failure("restore", "repo", "web", "new.vhd", code=3)
    assert not os.path.exists("new.vhd")
    good("restore", "repo", "web", "new.vhd", "--no-check")
    good("restore", "repo", "web@1", "first.vhd")
