# SPDX-License-Identifier: Apache-2.0
"""Two names of a file, and one name that is seen twice: only of the former may one be removed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, require_root_and_namespaces
from tests.warm_commands import PYTHON, warm
from vhdkit import errors, hard_links
from vhdkit.hard_links import are_two_names, hard_link


def folders(path: Path) -> tuple[Path, Path]:
    """Two folders, in the first of which there is a file."""
    one, two = path / "one", path / "two"
    one.mkdir()
    two.mkdir()
    (one / "disk").write_bytes(b"data")
    return one, two


def test_a_second_name(tmp_path: Path) -> None:
    """It is recognised, in any order. The first name, links, copies, folders and missing files are none."""
    one, two = folders(tmp_path)
    assert hard_link(str(one / "disk"), str(two / "disk"))
    (two / "copy").write_bytes(b"data")
    (two / "link").symlink_to(one / "disk")
    (tmp_path / "same").symlink_to(one)
    assert are_two_names(str(one / "disk"), str(two / "disk"))
    assert are_two_names(str(two / "disk"), str(one / "disk"))
    for other in ("two/copy", "two/link", "two/none", "one/disk", "same/disk", "two"):
        assert not are_two_names(str(one / "disk"), str(tmp_path / other)), other
    with pytest.raises(errors.AlreadyExists):
        hard_link(str(one / "disk"), str(two / "copy"))


def test_a_file_system_without_second_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked, and whatever it answers is not taken for an error of the caller."""
    one, two = folders(tmp_path)
    for number in (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK):

        def refuse(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", refuse)
        assert not hard_link(str(one / "disk"), str(two / "disk"))


MOUNTED = """
mount --bind one two
{python} -m tests.vhdkit.test_hard_links one/disk two/disk
umount two
touch two/disk
mount --bind one/disk two/disk
{python} -m tests.vhdkit.test_hard_links one/disk two/disk
umount two/disk
rm two/disk
ln one/disk two/disk
{python} -m tests.vhdkit.test_hard_links one/disk two/disk
mount --bind two two
{python} -m tests.vhdkit.test_hard_links one/disk two/disk
"""


def test_a_name_that_is_mounted_again(tmp_path: Path) -> None:
    """A folder or a file that is mounted a second time shows the same file under another path, but it has one name;
    nor is a name counted that lies on another mount."""
    require_root_and_namespaces()
    folders(tmp_path)
    (python,) = warm(PYTHON)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", f"cd {tmp_path}{MOUNTED.format(python=f'PYTHONPATH={ROOT} {python}')}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout.split(), done.stderr) == (["False", "False", "True", "False"], "")
    assert os.listdir(tmp_path / "one") == ["disk"]


def test_without_the_kernels_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the mount of a name is not known, it counts as another one."""
    one, two = folders(tmp_path)
    os.link(one / "disk", two / "disk")
    monkeypatch.setattr(hard_links, "_FDINFO", "/proc/self/nothing/{}")
    assert not are_two_names(str(one / "disk"), str(two / "disk"))
    monkeypatch.setattr(hard_links, "_FDINFO", "/proc/self/comm")
    assert not are_two_names(str(one / "disk"), str(two / "disk"))


if __name__ == "__main__":
    print(are_two_names(*sys.argv[1:]))
