# SPDX-License-Identifier: Apache-2.0
"""New files that appear complete or not at all, scratch files, and case-insensitive lookup of names as on Windows."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhdkit import errors, folder, unfinished
from vhdkit.folder import NewFile


def _refusing(code: int) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("sync", [True, False])
def test_a_new_file_appears_with_the_commit(sync: bool, tmp_path: Path) -> None:
    """Before the commit the name does not exist, after it the whole content is there, and no other file."""
    path = tmp_path / "new.vhd"
    with NewFile(path) as new:
        new.store.pwrite(0, b"content")
        assert not path.exists()
        new.commit(sync=sync)
        assert path.read_bytes() == b"content"
    assert [one.name for one in tmp_path.iterdir()] == ["new.vhd"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, errors.NoSpace])
def test_an_error_leaves_nothing(kind: type[BaseException], tmp_path: Path) -> None:
    """An error or Ctrl-C before the commit: no file, neither under the name nor under another."""
    with pytest.raises(kind), NewFile(tmp_path / "new.vhd") as new:
        new.store.pwrite(0, b"half")
        raise kind("stop")
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    """A missing commit has the effect of an error."""
    with NewFile(tmp_path / "new.vhd") as new:
        new.store.pwrite(0, b"half")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["link", "fsync", "fdatasync"])
def test_a_failing_commit_gives_a_typed_error(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing commit raises. Before the name is given no file is left; if only the name cannot be flushed, the
    complete file stays, and the error says so."""
    with pytest.raises(errors.IoFailed) as caught, NewFile(tmp_path / "new.vhd") as new:
        new.store.pwrite(0, b"x")
        monkeypatch.setattr(os, call, _refusing(errno.EIO))
        new.commit()
    assert [one.name for one in tmp_path.iterdir()] == (["new.vhd"] if call == "fsync" else [])
    assert ("new.vhd: is complete, but its name may not survive a power cut" in str(caught.value)) == (call == "fsync")


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    """Neither at the start, nor if it was created during the work."""
    path = tmp_path / "there.vhd"
    path.write_bytes(b"precious")
    with pytest.raises(errors.AlreadyExists, match=r"already exists; choose another name$"):
        NewFile(path)
    path.unlink()
    with pytest.raises(errors.AlreadyExists), NewFile(path) as new:
        path.write_bytes(b"precious")
        new.commit()
    assert path.read_bytes() == b"precious"
    assert [one.name for one in tmp_path.iterdir()] == ["there.vhd"]


@pytest.mark.parametrize("exists", [False, True])
def test_file_systems_without_hard_links(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is renamed there, and one that was created meanwhile is still kept."""
    monkeypatch.setattr(os, "link", _refusing(errno.EPERM))
    path = tmp_path / "new.vhd"
    if not exists:
        with NewFile(path) as new:
            new.store.pwrite(0, b"x")
            new.commit()
        assert path.read_bytes() == b"x"
        return
    with pytest.raises(errors.AlreadyExists), NewFile(path) as new:
        path.write_bytes(b"precious")
        new.commit()
    assert path.read_bytes() == b"precious"


def test_replacing_keeps_the_old_file_until_the_commit(tmp_path: Path) -> None:
    """With `replace` the old content stays readable until the new one is complete; an error keeps it."""
    path = tmp_path / "there.vhd"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), NewFile(path, whatever=True) as new:
        new.store.pwrite(0, b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    with NewFile(path, whatever=True) as new:
        new.store.pwrite(0, b"new")
        assert path.read_bytes() == b"old"
        new.commit()
    assert path.read_bytes() == b"new"
    assert [one.name for one in tmp_path.iterdir()] == ["there.vhd"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_link_is_never_written_through(replace: bool, tmp_path: Path) -> None:
    """A link at the destination, dangling or not, is refused; its target is unchanged."""
    (tmp_path / "target").write_bytes(b"precious")
    for name, target in (("link", "target"), ("dangling", "none")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises((errors.AlreadyExists, errors.InvalidArgument)):
            NewFile(tmp_path / name, replace=replace)
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "none").exists()


def test_a_device_is_not_replaced() -> None:
    """`--force` onto a device would put a file in its place."""
    with pytest.raises(errors.InvalidArgument, match="not a regular file"):
        NewFile("/dev/null", whatever=True)
    with pytest.raises(errors.AlreadyExists):
        NewFile("/dev/null")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("", errors.InvalidArgument),
        (".", errors.InvalidArgument),
        ("..", errors.InvalidArgument),
        ("folder", errors.InvalidArgument),
        ("folder/", errors.InvalidArgument),
        ("none/new.vhd", errors.NotFound),
        ("file/new.vhd", errors.NotFound),
        ("x" * 300, errors.InvalidArgument),
    ],
)
def test_invalid_names_are_refused(
    name: str, kind: type[errors.VhdkitError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, a name in a missing folder, a name that is too long; no file is left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(kind), NewFile(name, whatever=True) as new:
        new.commit()
    assert {one.name for one in tmp_path.iterdir()} == {"folder", "file"}


def test_a_relative_name_is_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name needs no folder; the longest name a file may have works."""
    monkeypatch.chdir(tmp_path)
    for name in ("new.vhd", "x" * 255):
        with NewFile(name) as new:
            new.commit()
        assert (tmp_path / name).exists()


def test_new_files_are_private(tmp_path: Path) -> None:
    """INV-NEW-PRIVATE: whatever the umask is, others do not read a new file (`test_likeness`)."""
    before = os.umask(0o027)
    try:
        with NewFile(tmp_path / "new.vhd") as new:
            new.commit()
    finally:
        os.umask(before)
    assert (tmp_path / "new.vhd").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("supported", [True, False])
def test_scratch_has_no_name(supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch space is an invisible file, even if the file system cannot make nameless files."""
    if not supported:
        real_open = os.open

        def open_without_tmpfile(path: str, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no")
            return real_open(path, flags, mode)

        monkeypatch.setattr(os, "open", open_without_tmpfile)
    with folder.scratch_store(str(tmp_path)) as store:
        store.pwrite(0, b"x")
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(errors.NotFound):
        folder.scratch_store(str(tmp_path / "none"))


def test_names_are_found_ignoring_case(tmp_path: Path) -> None:
    """Every component may differ in case; an exact match wins; a missing name is None."""
    (tmp_path / "Disks" / "SUB").mkdir(parents=True)
    (tmp_path / "Disks" / "SUB" / "Bäse.VHD").write_bytes(b"")
    (tmp_path / "Disks" / "a.vhd").write_bytes(b"")
    (tmp_path / "Disks" / "A.vhd").write_bytes(b"")
    found = folder.find_ignoring_case
    assert found(str(tmp_path / "disks/sub/BÄSE.vhd")) == str(tmp_path / "Disks/SUB/Bäse.VHD")
    assert found(str(tmp_path / "disks" / "a.vhd")) == str(tmp_path / "Disks" / "a.vhd")
    assert found(str(tmp_path / "disks" / "A.vhd")) == str(tmp_path / "Disks" / "A.vhd")
    assert found(str(tmp_path / "disks" / "A.VHD")) == str(tmp_path / "Disks" / "A.vhd")
    assert found(str(tmp_path / "disks" / "b.vhd")) is None
    assert found(str(tmp_path / "Disks" / "a.vhd" / "x")) is None
    assert found(str(tmp_path / ("x" * 5000))) is None


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=300))
def test_any_name_can_be_searched(name: str) -> None:
    """Whatever name an image contains, the search returns a path or None."""
    found = folder.find_ignoring_case("/nowhere-at-all/" + name)
    assert found is None


def test_within_means_the_folder_or_below() -> None:
    """Not a sibling whose name begins the same."""
    assert folder.is_within("/a/b/c", ("/a/b",)) and folder.is_within("/a/b", ("/a/b",))
    assert not folder.is_within("/a/bc", ("/a/b",)) and not folder.is_within("/a", ("/a/b",))
    assert folder.is_within("/x/y", ("/a", "/x")) and folder.is_within("/x", ("/",))


def test_regular_files_only(tmp_path: Path) -> None:
    """Links, folders and pipes are omitted; names are in order; a missing folder is empty."""
    for name in ("b", "a"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert list(folder.regular_files(str(tmp_path))) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert list(folder.regular_files(str(tmp_path / "none"))) == []
    assert folder.is_regular(str(tmp_path / "link")) and not folder.is_regular(str(tmp_path / "pipe"))
    assert not folder.is_regular("a\0b")


def test_a_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing sync of a folder is an error, except if the file system does not support it."""
    folder.sync_directory(str(tmp_path))
    monkeypatch.setattr(os, "fsync", _refusing(errno.EINVAL))
    folder.sync_directory(str(tmp_path))
    monkeypatch.setattr(os, "fsync", _refusing(errno.EIO))
    with pytest.raises(errors.IoFailed):
        folder.sync_directory(str(tmp_path))


def test_file_names() -> None:
    """Text with a zero byte or a lone surrogate is not a file name."""
    assert folder.is_file_name("a/ä.vhd")
    assert not folder.is_file_name("a\0b")
    assert not folder.is_file_name("\ud800")


def test_a_sidecar_is_hidden_beside_the_real_file(tmp_path: Path) -> None:
    """Through any name of an image its records are found in one place, even if the name leaves no room."""
    image, link = tmp_path / "disk.vhd", tmp_path / "elsewhere" / "link.vhd"
    link.parent.mkdir()
    link.symlink_to(image)
    assert folder.sidecar_path(link, "undo") == str(tmp_path.resolve() / ".disk.vhd.vhdkit-undo")
    long_names = [folder.sidecar_path(tmp_path / (letter * 255), "undo") for letter in "ab"]
    assert long_names[0] != long_names[1]
    assert all(len(Path(name).name) <= 255 for name in long_names)


def test_files_under_construction_are_listed_separately(tmp_path: Path) -> None:
    """They do not count as images of the folder: their names are exact."""
    with folder.NewFile(tmp_path / "new.vhd"):
        (tmp_path / ".vhdkit-0123.part").touch()
        (tmp_path / ".vhdkit-0123456789abcdef.part.vhd").touch()
        (part,) = unfinished.parts(str(tmp_path))
        assert part not in list(folder.regular_files(str(tmp_path)))
        assert len(list(folder.regular_files(str(tmp_path)))) == 2
    assert list(unfinished.parts(str(tmp_path))) == []
