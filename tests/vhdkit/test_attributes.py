# SPDX-License-Identifier: Apache-2.0
"""What stands in the way of a removal is known before anything is begun."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.support import not_available, require_root, require_tool
from tests.vhdkit.chain.test_merge import content, make_chain
from vhdkit import errors
from vhdkit.attributes import check_removable
from vhdkit.chain.chain import Chain
from vhdkit.chain.live_merge import LiveMerge


def as_user(work: Callable[[], None]) -> None:
    """Run it as an ordinary user, in a process of its own; an AssertionError there is one here."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refused(path: Path) -> None:
    """It cannot be removed, and trying agrees."""
    with pytest.raises(errors.AccessDenied):
        check_removable(str(path))
    with pytest.raises(OSError):
        os.unlink(path)


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A folder that every user may enter."""
    require_root()
    folder = Path("/tmp") / f"vhdkit-{os.getpid()}-removable"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    yield folder
    subprocess.run(["chattr", "-i", folder, *folder.iterdir()], check=False, capture_output=True)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_rights_of_the_folder(public: Path) -> None:
    """A folder that may not be written to, and one in which only owners remove files."""
    file = public / "file"
    file.write_bytes(b"x")
    file.chmod(0o666)
    as_user(lambda: refused(file))
    public.chmod(0o1777)
    as_user(lambda: refused(file))
    os.chown(file, 65534, 65534)
    as_user(lambda: check_removable(str(file)))
    os.chown(file, 0, 0)
    public.chmod(0o777)
    as_user(lambda: check_removable(str(file)))
    check_removable(str(file))
    check_removable(str(public / "none"))


def marked(path: Path, flag: str) -> None:
    """Set an attribute; skip where that cannot be."""
    require_tool("chattr")
    if subprocess.run(["chattr", flag, path], check=False, capture_output=True).returncode:
        not_available("this file system has no attributes")


@pytest.mark.parametrize("flag", ["i", "a"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_attributes(public: Path, flag: str, what: str) -> None:
    """A file, or a folder, that is marked as unchangeable or as one that only grows."""
    file = public / "file"
    file.write_bytes(b"x")
    place = file if what == "file" else public
    marked(place, f"+{flag}")
    try:
        refused(file)
    finally:
        subprocess.run(["chattr", f"-{flag}", place], check=True)
    check_removable(str(file))


def test_merges_look_first(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf that cannot be removed is not merged, neither offline nor while it is served: nothing has changed."""
    monkeypatch.chdir(public)
    names = make_chain(3)
    before, files = content(names[0]), {name: Path(name).read_bytes() for name in names}
    for place in (names[0], "."):
        marked(Path(place), "+i")
        try:
            for into in (names[1], names[2]):
                with pytest.raises(errors.AccessDenied):
                    vhdkit.merge(names[0], into=into)
                with pytest.raises(errors.AccessDenied):
                    vhdkit.merge(names[0], into=into, dry_run=True)
        finally:
            subprocess.run(["chattr", "-i", place], check=True)
    chain = Chain.open(names[0], writable=True)
    marked(Path(names[1]), "+i")
    try:
        with pytest.raises(errors.AccessDenied):
            LiveMerge(chain, 1, 2)
    finally:
        subprocess.run(["chattr", "-i", names[1]], check=True)
    chain.close()
    assert {name: Path(name).read_bytes() for name in names} == files and sorted(os.listdir()) == sorted(names)
    assert content(names[0]) == before
