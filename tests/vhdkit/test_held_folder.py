# SPDX-License-Identifier: Apache-2.0
"""Files of an untrusted folder are reached by its descriptor, never through links, and appear whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhdkit import errors
from vhdkit.held_folder import HeldFolder, make_folder, open_folder

NO_NAMES = ("", ".", "..", "a/b", "/etc/passwd", "../x", "a\0b")


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[HeldFolder]:
    """A folder that is held; beside it lies a secret."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in").mkdir()
    with open_folder(tmp_path / "in") as folder:
        yield folder


@pytest.mark.parametrize("name", NO_NAMES)
def test_only_single_names(inside: HeldFolder, name: str) -> None:
    """INV-FOLDER-HELD: a name with folders in it, or none, reaches no system call, whatever is done with it."""
    for act in (inside.file, inside.folder, inside.made_folder, inside.remove, inside.exists, inside.remove_folder):
        with pytest.raises(errors.InvalidArgument):
            act(name)
    with pytest.raises(errors.InvalidArgument):
        inside.write(name, b"x")
    with pytest.raises(errors.InvalidArgument), inside.held_lock(name, "me"):
        raise AssertionError


def test_links_are_not_followed(inside: HeldFolder, tmp_path: Path) -> None:
    """INV-FOLDER-HELD: a link to a file, to a folder, to nothing and to itself is refused, and nothing is written
    through it."""
    here = Path(inside.path)
    (here / "file").symlink_to(tmp_path / "secret")
    (here / "folder").symlink_to(tmp_path)
    (here / "loop").symlink_to("loop")
    (here / "nothing").symlink_to(tmp_path / "new")
    for name in ("file", "loop", "nothing"):
        with pytest.raises(errors.InvalidArgument, match="link"):
            inside.file(name)
        with pytest.raises(errors.InvalidArgument), inside.held_lock(name, "me"):
            raise AssertionError
        with pytest.raises(errors.InvalidArgument, match="not a regular file"):
            inside.write(name, b"x", replace=True)
        with pytest.raises(errors.AlreadyExists):
            inside.write(name, b"x")
    for name in ("folder", "loop", "nothing"):
        with pytest.raises(errors.InvalidArgument):
            inside.folder(name)
        with pytest.raises(errors.InvalidArgument):
            inside.made_folder(name)
    assert (tmp_path / "secret").read_text() == "secret" and not (tmp_path / "new").exists()
    assert inside.remove("file") and (tmp_path / "secret").exists()


def test_other_kinds_of_files_are_not_opened(inside: HeldFolder) -> None:
    """INV-FOLDER-HELD: a pipe, a socket, a device and a folder are refused at once, without waiting."""
    here = Path(inside.path)
    os.mkfifo(here / "pipe")
    (here / "folder").mkdir()
    import socket

    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"/proc/self/fd/{inside._fd}/socket")
        for name in ("pipe", "folder", "socket"):
            with pytest.raises(errors.InvalidArgument):
                inside.file(name)
            with pytest.raises(errors.InvalidArgument), inside.held_lock(name, "me"):
                raise AssertionError
            with pytest.raises(errors.InvalidArgument):
                inside.write(name, b"x", replace=True)


def test_the_folder_stays_what_it_was(inside: HeldFolder, tmp_path: Path) -> None:
    """INV-FOLDER-HELD: a folder that is renamed and replaced by a link is still the one that was opened."""
    inside.write("a", b"1")
    Path(inside.path).rename(tmp_path / "moved")
    (tmp_path / "in").symlink_to(tmp_path)
    inside.write("b", b"2")
    assert sorted(inside.names(10)) == ["a", "b"] and inside.read("a", 10) == b"1"
    assert (tmp_path / "moved" / "b").read_bytes() == b"2" and not (tmp_path / "b").exists()


def test_a_new_file_appears_whole(inside: HeldFolder) -> None:
    """A file is seen only when it is complete; after an exception nothing is left, and a file is never overwritten."""
    with pytest.raises(RuntimeError), inside.new_file("a") as store:
        store.pwrite(0, b"half")
        assert inside.names(10) == []
        raise RuntimeError
    assert os.listdir(inside.path) == []
    inside.write("a", b"first")
    with pytest.raises(errors.AlreadyExists):
        inside.write("a", b"second")
    assert inside.read("a", 10) == b"first"
    inside.write("a", b"second", replace=True)
    assert inside.read("a", 10) == b"second" and os.listdir(inside.path) == ["a"]
    assert os.stat(os.path.join(inside.path, "a")).st_mode & 0o777 == 0o600


def test_reading_is_bounded(inside: HeldFolder) -> None:
    """A file of exactly the limit is read, one that is longer by a byte is refused."""
    inside.write("a", b"x" * 100)
    assert len(inside.read("a", 100)) == 100
    with pytest.raises(errors.InvalidArgument, match="more than 99 bytes"):
        inside.read("a", 99)


def test_listing_is_bounded(inside: HeldFolder) -> None:
    """A folder with as many entries as allowed is listed, one more is refused before the rest is looked at."""
    for name in "abc":
        inside.write(name, b"")
    (Path(inside.path) / ".hidden").touch()
    assert inside.names(4) == ["a", "b", "c"]
    with pytest.raises(errors.InvalidArgument, match="more than 3 entries"):
        inside.names(3)


def test_one_process_holds_a_lock(inside: HeldFolder) -> None:
    """A lock that is held is refused with the name of its holder, and is free again when the holder dies."""
    program = (
        "import sys\nfrom vhdkit.held_folder import open_folder\n"
        "with open_folder(sys.argv[1]) as folder, folder.held_lock('lock', 'backing up web'):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, inside.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(errors.ImageInUse, match="backing up web"), inside.held_lock("lock", "me"):
            raise AssertionError
        other.kill()
        other.wait()
    with inside.held_lock("lock", "me"), pytest.raises(errors.ImageInUse), inside.held_lock("lock", "me too"):
        raise AssertionError
    with inside.held_lock("lock", "me"):
        pass


def test_a_hard_link_is_no_lock_file(inside: HeldFolder, tmp_path: Path) -> None:
    """INV-FOLDER-HELD: a lock file that is a second name of a file elsewhere is not written to."""
    os.link(tmp_path / "secret", Path(inside.path) / "lock")
    with pytest.raises(errors.InvalidArgument), inside.held_lock("lock", "me"):
        raise AssertionError
    assert (tmp_path / "secret").read_text() == "secret"


def test_folders_are_made_private(tmp_path: Path) -> None:
    """A new folder belongs to its owner alone; an existing one is taken as it is."""
    with make_folder(tmp_path / "new") as folder:
        assert os.stat(folder.path).st_mode & 0o777 == 0o700
        folder.made_folder("inner").close()
        assert not folder.remove_folder("none")
        folder.made_folder("inner").close()
        (tmp_path / "new/inner/x").touch()
        assert not folder.remove_folder("inner")
        (tmp_path / "new/inner/x").unlink()
        assert folder.remove_folder("inner") and os.listdir(folder.path) == []
    make_folder(tmp_path / "new").close()


def test_missing_folders(tmp_path: Path) -> None:
    """A folder that does not exist, and a file in its place, are typed errors."""
    with pytest.raises(errors.NotFound):
        open_folder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(errors.NotFound):
        open_folder(tmp_path / "file")


def test_an_own_file_has_no_second_name(inside: HeldFolder) -> None:
    """INV-FOLDER-HELD: a file is opened for writing if it is regular, has one name, and no other process writes to it;
    it is made if it does not exist."""
    with inside.own_file("new") as store:
        store.pwrite(0, b"content")
        with pytest.raises(errors.ImageInUse):
            inside.own_file("new")
    with inside.own_file("new") as store:
        assert store.pread(0, 100) == b"content"
    os.link(Path(inside.path) / "new", Path(inside.path) / "second")
    (Path(inside.path) / "link").symlink_to("new")
    os.mkfifo(Path(inside.path) / "pipe")
    for name in ("new", "second", "link", "pipe"):
        with pytest.raises(errors.InvalidArgument):
            inside.own_file(name)
    assert (Path(inside.path) / "new").read_bytes() == b"content"
