# SPDX-License-Identifier: Apache-2.0
"""Files of a foreign folder: only regular ones, and only from that folder, even while they are being swapped."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from vmm.api.export_import.inside import Inside
from vmm.model.errors import InvalidSpec, NotFound, Refused, VmmError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file, next to a secret."""
    made = tmp_path / "import"
    (made / "disks").mkdir(parents=True)
    (made / "disks" / "good").write_bytes(b"good")
    (tmp_path / "secret").write_bytes(b"secret")
    return made


def test_names_that_are_not_files_of_the_folder(folder: Path) -> None:
    """Links, folders, pipes, sockets, devices and names that lead out are refused; none of them is opened or waited
    for."""
    disks = folder / "disks"
    (disks / "link").symlink_to("../../secret")
    (disks / "inner").symlink_to("good")
    (folder / "linked").symlink_to(folder / "disks")
    (folder / "out").symlink_to(folder.parent)
    os.mkfifo(disks / "pipe")
    with socket.socket(socket.AF_UNIX) as listening, Inside(str(folder)) as inside:
        listening.bind(str(disks / "socket"))
        for name in ("disks/link", "disks/inner", "disks/pipe", "disks/socket", "disks", "linked"):
            with pytest.raises(InvalidSpec, match="files and folders only"):
                inside.open(name)
        for name in ("linked/good", "out/secret", "disks/good/x", "nothing", "disks/\ud800"):
            with pytest.raises((NotFound, InvalidSpec)):
                inside.open(name)
        for name in ("../secret", "/etc/passwd", "disks/../../secret", "", "disks//good", "./disks/good", "a\0b",
                     "/".join(["d"] * 50)):  # fmt: skip
            with pytest.raises(InvalidSpec, match="outside"):
                inside.open(name)
        assert inside.read("disks/good", 4) == b"good" and inside.has("disks/good") and not inside.has("disks/bad")
        with pytest.raises(InvalidSpec, match="more than 3 bytes"):
            inside.read("disks/good", 3)


@pytest.mark.skipif(os.geteuid() != 0, reason="makes devices and files of another user")
def test_devices_and_other_names_of_foreign_files(folder: Path) -> None:
    """A device is not opened, nor is a file of another user that has a second name in the folder."""
    os.mknod(folder / "null", 0o20600, os.makedev(1, 3))
    os.link(folder.parent / "secret", folder / "disks" / "hard")
    for path in (folder, folder / "disks", folder / "disks" / "good"):
        os.chown(path, 12345, 12345)
    with Inside(str(folder)) as inside:
        with pytest.raises(InvalidSpec, match="is a device"):
            inside.open("null")
        with pytest.raises(Refused, match="another user"):
            inside.open("disks/hard")
        assert inside.read("disks/good", 9) == b"good"


def test_files_swapped_between_check_and_use(folder: Path, tmp_path: Path) -> None:
    """INV-IMPORT-CONFINED: while file and folder are repeatedly swapped for links, no foreign file is read."""
    stop = threading.Event()
    disks = folder / "disks"
    (tmp_path / "good").write_bytes(b"secret")  # where the folder's link leads

    def swap() -> None:
        for number in range(100_000):
            if stop.is_set():
                return
            target = folder / f"swap{number % 2}"
            if number % 2:
                target.symlink_to(tmp_path / "secret")
                os.rename(target, disks / "good")
            else:
                target.write_bytes(b"good")
                os.rename(target, disks / "good")
            if number % 3 == 0:
                os.rename(disks, folder / "away")
                disks.symlink_to(tmp_path)
                os.unlink(disks)
                os.rename(folder / "away", disks)

    thread = threading.Thread(target=swap)
    thread.start()
    seen = 0
    try:
        with Inside(str(folder)) as inside:
            for number in range(20_000):
                copy = tmp_path / f"copy{number}"
                try:
                    inside.copy("disks/good", str(copy), 4)
                except VmmError:
                    continue
                assert copy.read_bytes() == b"good" and copy.stat().st_mode & 0o777 == 0o600
                copy.unlink()
                seen += 1
                if seen == 300:
                    break
    finally:
        stop.set()
        thread.join()
    assert seen


def test_files_that_others_can_change(folder: Path) -> None:
    """A file that is used where it lies must belong to us, and so must every folder on the way to it."""
    with Inside(str(folder)) as inside:
        inside.refuse_strangers(["disks/good"])
        os.chmod(folder / "disks", 0o777)
        with pytest.raises(Refused, match="other users"):
            inside.refuse_strangers(["disks/good"])
        os.chmod(folder / "disks", 0o755)
        os.link(folder / "disks" / "good", folder / "other")
        with pytest.raises(Refused, match="second name"):
            inside.refuse_strangers(["disks/good"])
        if os.geteuid() == 0:
            os.unlink(folder / "other")
            os.chown(folder, 12345, 12345)
            with pytest.raises(Refused, match="another user"):
                inside.refuse_strangers(["disks/good"])
