# SPDX-License-Identifier: Apache-2.0
"""An obstacle to a later removal is detected before work begins."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.support import not_available, require_root, require_tool
from tests.vhdkit.chain.verbs.test_merge import content, make_chain
from vhdkit import errors
from vhdkit.attributes import check_removable
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.live_merge import live_merge


def as_user(work: Callable[[], None]) -> None:
    """Run `work` as an ordinary user, in a separate process; an AssertionError there is raised here."""
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
    """`check_removable` refuses the file, and an attempt to remove it fails."""
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


def test_permissions_of_the_folder(public: Path) -> None:
    """A read-only folder, and one in which only owners can remove files."""
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
    """Set an attribute; skip if the file system has none."""
    require_tool("chattr")
    if subprocess.run(["chattr", flag, path], check=False, capture_output=True).returncode:
        not_available("this file system has no attributes")


@pytest.mark.parametrize("flag", ["i", "a"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_attributes(public: Path, flag: str, what: str) -> None:
    """A file or a folder that is marked immutable or append-only."""
    file = public / "file"
    file.write_bytes(b"x")
    place = file if what == "file" else public
    marked(place, f"+{flag}")
    try:
        refused(file)
    finally:
        subprocess.run(["chattr", f"-{flag}", place], check=True)
    check_removable(str(file))


def test_merges_check_first(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        with pytest.raises(errors.AccessDenied), live_merge(chain, 1, 2):
            pass
    finally:
        subprocess.run(["chattr", "-i", names[1]], check=True)
    chain.close()
    assert {name: Path(name).read_bytes() for name in names} == files and sorted(os.listdir()) == sorted(names)
    assert content(names[0]) == before


def test_no_file_is_made_in_an_append_only_folder(public: Path) -> None:
    """A file under construction could never be removed there: it is refused in advance."""
    if subprocess.run(["chattr", "+a", public], check=False, capture_output=True).returncode:
        not_available("append-only folders")
    try:
        with pytest.raises(errors.AccessDenied, match="lsattr"):
            vhdkit.create_image(public / "a.vhd", "1M")
        assert list(public.iterdir()) == []
    finally:
        subprocess.run(["chattr", "-a", public], check=True)
    vhdkit.create_image(public / "a.vhd", "1M")


def test_a_folder_that_is_too_deep(tmp_path: Path) -> None:
    """If the full path of an image would be too long, no file is made: no child could find it."""
    vhdkit.create_image(tmp_path / "base.vhd", "1M")
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        while len(os.getcwd()) <= 4096:
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        for make in (
            lambda: vhdkit.create_image("a.vhd", "1M"),
            lambda: vhdkit.create_child("a.avhd", tmp_path / "base.vhd"),
            lambda: vhdkit.clone(tmp_path / "base.vhd", ["a.avhd"]),
            lambda: vhdkit.convert(tmp_path / "base.vhd", "a.raw", "raw"),
        ):
            with pytest.raises(errors.InvalidArgument, match="the path of its folder has"):
                make()
        assert os.listdir() == []
        while len(os.getcwd()) + 1 + 255 >= 4096:
            os.chdir("..")
        vhdkit.create_image("x" * 251 + ".vhd", "1M")  # the longest path and the longest name can be used
        os.unlink("x" * 251 + ".vhd")
    finally:
        os.chdir(tmp_path)
        shutil.rmtree("d" * 200, ignore_errors=True)
        os.chdir(here)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_a_folder_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A new file gets its name all the same, never replaces another one, and no partial file is left."""

    def refused(*arguments: object, **keywords: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    vhdkit.create_image(tmp_path / "a.vhd", "1M")
    with pytest.raises(errors.AlreadyExists):
        vhdkit.create_image(tmp_path / "a.vhd", "2M")
    assert [path.name for path in tmp_path.iterdir()] == ["a.vhd"]
