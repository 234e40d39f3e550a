# SPDX-License-Identifier: Apache-2.0
"""Persistent settings of trusted folders: where they are made, and which sources count."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from vhdkit import trusted


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration file, not created yet; the folders above it have the right owners."""
    monkeypatch.setattr(trusted, "SYSTEM_CONFIG", str(tmp_path / "etc" / "config.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))

    def beneath(folder: str) -> str | None:  # folders above the test's own are not judged
        status = os.stat(folder)
        return f"{folder} is writable by users other than its owner" if status.st_mode & 0o022 else None

    monkeypatch.setattr(trusted, "unguarded", beneath)
    (tmp_path / "xdg" / "vhdkit").mkdir(parents=True, mode=0o755)
    (tmp_path / "etc").mkdir(mode=0o755)
    return tmp_path / "xdg" / "vhdkit" / "config.toml"


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """A file with this mode, whatever the umask is."""
    path.write_text(text)
    path.chmod(mode)


def test_without_settings() -> None:
    """Without a variable and files there are no folders and no messages."""
    assert vhdkit.trusted_parent_dirs() == vhdkit.TrustedFolders((), ())


def test_a_missing_file_causes_no_warning(config: Path) -> None:
    """Without a file there is no warning about a folder in which others could create one, as in many homes."""
    config.parent.chmod(0o777)
    assert vhdkit.trusted_parent_dirs() == vhdkit.TrustedFolders((), ())
    config.parent.rmdir()
    config.parent.parent.chmod(0o777)
    assert vhdkit.trusted_parent_dirs() == vhdkit.TrustedFolders((), ())


def test_the_variable_and_both_files(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All count, the variable's first; each folder is listed with its source."""
    monkeypatch.setenv("VHDKIT_PARENT_DIRS", "/srv/a::/srv/b/")
    monkeypatch.setenv("HOME", "/home/me")
    system = tmp_path / "etc" / "config.toml"
    write(config, 'parent_dirs = ["~/bases"]')
    write(system, 'parent_dirs = ["/srv/c"]')
    found = vhdkit.trusted_parent_dirs()
    assert [(one.path, one.source) for one in found.folders] == [
        ("/srv/a", "VHDKIT_PARENT_DIRS"),
        ("/srv/b", "VHDKIT_PARENT_DIRS"),
        ("/home/me/bases", str(config)),
        ("/srv/c", str(system)),
    ]
    assert found.findings == () and found.parent_dirs == ("/srv/a", "/srv/b", "/home/me/bases", "/srv/c")


def _others_may_write_the_file(config: Path) -> None:
    config.chmod(0o664)


def _others_may_write_the_folder(config: Path) -> None:
    config.parent.chmod(0o777)


def _linked_from_a_folder_of_others(config: Path) -> None:
    config.rename(config.parent.parent / "elsewhere.toml")
    config.symlink_to("../elsewhere.toml")
    config.parent.chmod(0o777)


def _is_a_pipe(config: Path) -> None:
    config.unlink()
    os.mkfifo(config, 0o600)


@pytest.mark.parametrize(
    "spoil",
    [_others_may_write_the_file, _others_may_write_the_folder, _linked_from_a_folder_of_others, _is_a_pipe],
)
def test_a_file_that_others_may_change_is_ignored(config: Path, spoil: Callable[[Path], None]) -> None:
    """It is ignored with a warning; a link is judged by the folder that it is in."""
    write(config, 'parent_dirs = ["/srv/a"]')
    assert vhdkit.trusted_parent_dirs().parent_dirs == ("/srv/a",)
    spoil(config)
    found = vhdkit.trusted_parent_dirs()
    assert found.folders == ()
    (ignored,) = found.findings
    assert ignored.severity is vhdkit.Severity.WARNING and ignored.path == str(config)
    assert ignored.message.startswith("is ignored: ")
    assert "--repair" not in ignored.message  # every command prints it, and most have no such option


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_ignored(config: Path) -> None:
    """A file that belongs to a user other than root is that user's choice."""
    write(config, 'parent_dirs = ["/srv/a"]')
    os.chown(config, 12345, 12345)
    (ignored,) = vhdkit.trusted_parent_dirs().findings
    assert "belongs to user 12345" in ignored.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parent_dirs = [", "not TOML"),
        ("#\udcff", "is ignored: it is not TOML: byte 1 is not UTF-8"),
        ('parent_dirs = "/srv/a"', "list of folders"),
        ("parent_dirs = [5]", "list of folders"),
        ('parent_dir = ["/srv/a"]', "only parent_dirs is known"),
        ('parent_dirs = ["bases"]', "not an absolute path"),
        ('parent_dirs = ["/a\\u0000b"]', "not an absolute path"),
        ("#" * (1 << 17), "at most 65536 bytes"),
    ],
)
def test_an_invalid_file_is_reported(config: Path, text: str, words: str) -> None:
    """An invalid file is ignored with the reason, and is never an error."""
    config.write_bytes(text.encode("utf-8", "surrogateescape"))
    config.chmod(0o600)
    found = vhdkit.trusted_parent_dirs()
    assert found.folders == () and words in found.findings[0].message


def test_a_relative_folder_in_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would mean another folder in every working folder."""
    monkeypatch.setenv("VHDKIT_PARENT_DIRS", "bases")
    found = vhdkit.trusted_parent_dirs()
    assert found.folders == () and "VHDKIT_PARENT_DIRS names 'bases'" in found.findings[0].message


def test_the_library_does_not_read_settings_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program passes on what it wants: without that a parent elsewhere is refused, with it it is found."""
    bases, leaves = tmp_path / "bases", tmp_path / "leaves"
    bases.mkdir()
    leaves.mkdir()
    vhdkit.create_image(bases / "base.vhd", "1M")
    vhdkit.create_child(leaves / "leaf.avhd", bases / "base.vhd")
    monkeypatch.setenv("VHDKIT_PARENT_DIRS", str(bases))
    with pytest.raises(vhdkit.ParentRefused):
        vhdkit.open_disk(leaves / "leaf.avhd")
    options = vhdkit.OpenOptions(parent_dirs=vhdkit.trusted_parent_dirs().parent_dirs)
    vhdkit.open_disk(leaves / "leaf.avhd", options=options).close()
