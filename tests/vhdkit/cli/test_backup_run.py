# SPDX-License-Identifier: Apache-2.0
"""`vhdkit backup run` and its short form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vhdkit
from tests.servers import serving
from tests.vhdkit.cli.running import MIB, document, failure, good, run


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good("create", "web.vhd", "--size", "8M")


def write(path: str, offset: int) -> None:
    """Write a page."""
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(offset, b"\xa5" * 4096)


def test_nights_one_after_the_other() -> None:
    """Each says what it saved, how much, and how it is restored; the short form means the same."""
    write("web.vhd", 0)
    first = good("backup", "run", "web.vhd", "repo")
    assert first.startswith("web@1: all of the disk, ") and "`vhdkit restore " in first
    write("web.vhd", MIB)
    assert good("backup", "web.vhd", "repo").startswith("web@2: what differs from night 1, ")
    found = document("backup", "run", "web.vhd", "repo", "--keep-reference", "--compare", "--full-every", "9")
    assert (found["night"], found["how"], found["data_bytes"]) == (3, "same", 0)
    write(found["leaf"], 2 * MIB)
    result = run("backup", "web.vhd", "repo", "--keep-reference")
    assert "what changed since night 3" in result.stdout and "goes on in" in result.stderr
    assert "is now part of" in result.stderr and os.path.exists("web-1.avhd") and not os.path.exists("web.avhd")
    assert good("backup", "web.vhd", "repo", "--quiet") == ""
    lines = good("backup", "list", "repo", "web").splitlines()
    assert len(lines) == 6
    assert "whole" in good("backup", "verify", "repo")


def test_wrong_words() -> None:
    """What is missing, and what does not belong together, is said in one line; nothing is made."""
    for words, text in (
        (["web.vhd"], "IMAGE and REPO"),
        (["run"], "REPO"),
        (["--control", "x", "web.vhd", "repo"], "REPO alone"),
        (["web.vhd", "repo", "--export", "x"], "--control"),
    ):
        assert text in failure("backup", *words, code=2)
    assert "no server is listening" in failure("backup", "--control", "nowhere", "repo", code=1)
    assert "lst" in failure("backup", "lst", "repo", code=2)
    assert sorted(os.listdir()) == ["web.vhd"]


def test_an_image_that_is_called_like_a_command() -> None:
    """A command's name is a command; an image of this name is written with a path, or after `run`."""
    os.rename("web.vhd", "list")
    assert "list@1" in good("backup", "./list", "repo") and "list@2" in good("backup", "run", "list", "repo")
    failure("backup", "list", "nowhere", code=1)


def test_a_served_disk() -> None:
    """A disk is saved through the control socket of its server, and keeps its name."""
    os.mkdir("elsewhere")
    with serving("web.vhd", "--control", "web.ctl", "--socket", "web.sock"):
        os.chdir("elsewhere")  # the server's paths are relative to its own folder
        assert document("backup", "--control", "../web.ctl", "../repo")["machine"] == "web"
        found = document("backup", "run", "--control", "../web.ctl", "../repo", "--export", "web.vhd")
        assert (found["night"], found["how"]) == (2, "same")
        os.chdir("..")
        assert "--control" in failure("backup", "web.vhd", "repo", "--as", "other", code=5)
    assert {one for one in os.listdir() if not one.endswith((".ctl", ".sock"))} == {"elsewhere", "repo", "web.vhd"}
