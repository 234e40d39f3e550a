# SPDX-License-Identifier: Apache-2.0
"""Which driver is tried when, and with which options."""

from __future__ import annotations

import pytest

from vhdkit.formats.filesystems import CONTAINERS, FileSystem
from vhdkit.serve.mount.drivers import advice, attempts, is_verdict


def names(kind: str, *, writable: bool = False, is_root: bool = True, safe_loop: bool = True) -> list[str]:
    """The names of the drivers to be tried, with a mark where the journal is skipped."""
    found = attempts(FileSystem(kind), writable=writable, is_root=is_root, safe_loop=safe_loop)
    return [one.name + ("!" if one.leaves_journal else "") for one in found]


def test_root_tries_the_kernels_drivers_first() -> None:
    """Then FUSE drivers; the journal is skipped only for read-only mounts, after an attempt with it."""
    assert names("ext4") == ["the kernel's ext4", "the kernel's ext4!", "fuse2fs", "fuse2fs!"]
    assert names("ext4", writable=True) == ["the kernel's ext4", "fuse2fs"]
    assert names("xfs", writable=True) == ["the kernel's xfs"]
    assert names("ntfs") == ["the kernel's ntfs3", "ntfs-3g"]


def test_ordinary_users_have_only_fuse() -> None:
    """The kernel's drivers need root."""
    assert names("ext4", is_root=False) == ["fuse2fs", "fuse2fs!"]
    assert names("xfs", is_root=False) == []


def test_no_loop_device_where_writes_could_deadlock() -> None:
    """Reading through one is always safe."""
    assert names("ext4", writable=True, safe_loop=False) == ["fuse2fs"]
    assert names("xfs", writable=True, safe_loop=False) == []
    assert names("ext4", safe_loop=False)[0] == "the kernel's ext4"


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4", "xfs", "btrfs", "ntfs", "exfat", "vfat"])
@pytest.mark.parametrize("writable", [False, True])
def test_images_are_mounted_without_trust(kind: str, writable: bool) -> None:
    """Without set-user-id programs and devices from the image; read-only unless requested otherwise."""
    for one in attempts(FileSystem(kind), writable=writable, is_root=True):
        if one.needs_loop:
            options = one.words[-1].split(",")
            assert {"nosuid", "nodev", "rw" if writable else "ro"} <= set(options)
        assert one.command("SOURCE", "TARGET")[-2:] == ["SOURCE", "TARGET"]


def test_two_layers_of_one_xfs_can_be_mounted() -> None:
    """They have the same id, which the kernel must ignore."""
    assert all("nouuid" in one.words[-1] for one in attempts(FileSystem("xfs"), writable=False, is_root=True))


def test_ordinary_users_may_read_every_file() -> None:
    """Owners inside an image are not users of this machine; others get no access, as they would be root in it."""
    (alone,) = attempts(FileSystem("ext4"), writable=True, is_root=False)
    (shared,) = attempts(FileSystem("ext4"), writable=True, is_root=False, allow_other=True)
    assert (alone.words[-1], shared.words[-1]) == ("rw,fakeroot", "rw,allow_other")


@pytest.mark.parametrize("is_root", [False, True])
def test_ntfs_is_not_open_to_all(is_root: bool) -> None:
    """ntfs-3g by default lets other users read and write everything."""
    for allow_other, mask in ((False, "umask=077"), (True, "umask=022")):
        found = attempts(FileSystem("ntfs"), writable=True, is_root=is_root, allow_other=allow_other)
        assert mask in list(found)[-1].words[-1].split(",")


def test_set_user_id_programs_are_known() -> None:
    """ntfs-3g runs as root whoever starts it, and a FUSE mount excludes even root."""
    assert [one.runs_as_root for one in attempts(FileSystem("ntfs"), writable=False, is_root=False)] == [True]


def test_a_verdict_differs_from_a_missing_driver() -> None:
    """A fault that the kernel finds is a verdict; a missing driver or permission is not."""
    assert is_verdict("wrong fs type, bad option, bad superblock on /dev/loop0, missing codepage or helper program")
    assert is_verdict("mount(2) system call failed: Structure needs cleaning")
    assert not is_verdict("unknown filesystem type 'ntfs3'") and not is_verdict("permission denied")
    assert not is_verdict("mount failed: Operation not permitted")


def test_advice() -> None:
    """The package, root, mtools, or what the data is."""
    assert "fuse2fs" in advice(FileSystem("ext4"), is_root=False, file="1.raw")
    assert "as root" in advice(FileSystem("xfs"), is_root=False, file="1.raw")
    assert "mcopy" in advice(FileSystem("vfat"), is_root=True, file="1.raw")
    assert "no driver" in advice(FileSystem("refs"), is_root=True, file="1.raw")
    assert "1.raw" in advice(None, is_root=True, file="1.raw")
    for kind, words in CONTAINERS.items():
        assert advice(FileSystem(kind), is_root=True, file="") == words
