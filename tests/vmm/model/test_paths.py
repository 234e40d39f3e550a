# SPDX-License-Identifier: Apache-2.0
"""Where files lie, and that a runtime folder is private."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vmm.model import paths
from vmm.model.errors import AccessDenied, InvalidSpec, NotFound, VmmError

ID = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home for this test."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", "/tmp/vmm-test-run")


def test_homes_by_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root has the system's folders, other users their own, as XDG specifies."""
    for name in ("VMM_HOME", "VMM_RUNTIME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert (paths.home(), paths.runtime_home()) == ("/var/lib/vmm", "/run/vmm")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert (paths.home(), paths.runtime_home()) == ("/home/me/.local/share/vmm", "/tmp/vmm-1000")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert paths.runtime_home() == "/run/user/1000/vmm"


def test_runtime_folder_is_named_by_the_id() -> None:
    """The first twelve digits, so that sockets have short names."""
    assert paths.runtime_of(ID).nbd == "/tmp/vmm-test-run/0123456789ab/nbd.sock"


@pytest.mark.parametrize("machine_id", ["", "../../../../etc", "zzz", ID.upper(), ID + "\n", ID.replace("-", "/")])
def test_a_malformed_id_has_no_runtime_folder(machine_id: str) -> None:
    """A runtime folder is removed with everything in it, so an id edited by hand must never lead to another folder."""
    with pytest.raises(InvalidSpec, match="not the id"):
        paths.runtime_of(machine_id)


def test_runtime_homes_too_long_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime home in which sockets could not be bound is refused with what to set."""
    monkeypatch.setenv("VMM_RUNTIME", "/" + "x" * 90)
    with pytest.raises(InvalidSpec, match="VMM_RUNTIME"):
        paths.runtime_of(ID)


def test_a_private_folder_is_made_or_tightened(tmp_path: Path) -> None:
    """It has mode 0700 whatever the umask, even if it existed with wider rights."""
    folder = tmp_path / "a" / "b"
    paths.make_private(str(folder))
    folder.chmod(0o755)
    paths.make_private(str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_planted_folders_are_refused(tmp_path: Path) -> None:
    """A link, a file, or another user's folder in the place of our folder is refused."""
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(AccessDenied, match="another user"):
            paths.make_private(str(tmp_path / name))
    if os.geteuid() == 0:
        os.chown(tmp_path / "target", 12345, 12345)
        with pytest.raises(AccessDenied, match="another user"):
            paths.make_private(str(tmp_path / "target"))


def test_default_folders_are_set_and_reset(tmp_path: Path) -> None:
    """A folder that was set is used by the next command; None resets it; unknown keys and paths that are not folders
    are refused."""
    assert paths.default_folders()["disks"] == str(tmp_path / "home" / "disks")
    paths.set_default_folder("disks", str(tmp_path))
    assert paths.default_folders()["disks"] == str(tmp_path)
    paths.set_default_folder("disks", None)
    assert paths.default_folders()["disks"] == str(tmp_path / "home" / "disks")
    with pytest.raises(InvalidSpec, match="machines, disks, snapshots"):
        paths.set_default_folder("floppies", str(tmp_path))
    with pytest.raises(InvalidSpec, match="not a folder"):
        paths.set_default_folder("disks", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"paths": 5}', "\xff"])
def test_damaged_settings_are_reported(tmp_path: Path, text: str) -> None:
    """A damaged host.json is one clear error with its path."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "host.json").write_text(text)
    with pytest.raises(VmmError, match=r"host\.json"):
        paths.default_folders()


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    """A failed write leaves the old file and nothing else; only we can read the file."""
    target = tmp_path / "file"
    paths.write_whole(str(target), b"old")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with pytest.raises(NotFound):
        paths.write_whole(str(tmp_path / "absent" / "file"), b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(VmmError):
        paths.write_whole(str(tmp_path / "folder"), b"new")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder"]
