# SPDX-License-Identifier: Apache-2.0
"""Which mounts are ours, according to the kernel's table."""

from __future__ import annotations

import pytest

from vhdkit.serve.mount.table import (
    driver_name,
    option_text,
    parse,
    server_address,
    stack_at,
    stacks,
    top_at,
)

TABLE = r"""
27 1 254:0 / / rw,relatime - ext4 /dev/root rw
42 27 0:39 / /run/vhdkit-a ro,nosuid,nodev - fuse.vhdkit /srv/my\040disk.vhd ro,user_id=1000,group_id=0
43 27 7:0 / /mnt/files ro,relatime shared:1 master:2 - ext4 /dev/loop0 ro
44 27 0:40 / /mnt/disk rw,nosuid - fuse.vhdkit /srv/leaf.avhd rw,user_id=0
45 27 0:41 / /mnt/win ro - fuse /mnt/disk/partitions/1.raw ro,user_id=0
46 27 7:1 / /mnt/other ro - ext4 /dev/loop1 ro
47 27 0:42 / /mnt/disk2 rw - fuse.nbdfuse nbdfuse rw
48 27 0:43 / /mnt/win/deep ro - tmpfs tmpfs rw
nonsense
49 27 0:44
"""
LOOPS = {"/dev/loop0": "/run/vhdkit-a/partitions/2.raw", "/dev/loop1": "/srv/own.img"}


def test_lines_are_read() -> None:
    """Names with blanks, optional fields, and nonsense."""
    mounts = parse(TABLE)
    assert len(mounts) == 8
    assert mounts[1].source == "/srv/my disk.vhd" and mounts[1].device == "0:39"
    assert mounts[1].owner_id == 1000 and not mounts[1].is_writable and mounts[1].is_ours
    assert mounts[2].file_system == "ext4" and mounts[2].source == "/dev/loop0" and mounts[2].owner_id is None
    assert mounts[3].is_writable and not mounts[6].is_ours


@pytest.mark.parametrize("end", ["\r", "\f", "\x1c", "\x85", "\u2028"])
def test_names_do_not_break_lines(end: str) -> None:
    """The kernel escapes only blanks and newlines: a name must neither hide its mount nor invent another."""
    text = f"50 27 0:50 / /mnt/a{end}60 27 0:39 / /etc rw - fuse.vhdkit x rw - fuse.vhdkit /x{end}y ro\n"
    assert [one.mountpoint for one in parse(text)] == [f"/mnt/a{end}60"]


def test_file_systems_are_found_on_their_base() -> None:
    """One on a loop device over a file of ours, one of a FUSE driver that reads one, and no other."""
    found = list(stacks(parse(TABLE), LOOPS))
    assert [(one.base.mountpoint, [inner.mountpoint for inner, _ in one.inside]) for one in found] == [
        ("/run/vhdkit-a", ["/mnt/files"]),
        ("/mnt/disk", ["/mnt/win"]),
    ]
    assert found[0].loops == ("/dev/loop0",) and found[1].loops == ()


def test_a_stack_is_found_by_either_end() -> None:
    """By the base or the file system on it, but not by what is below the base."""
    found = list(stacks(parse(TABLE), LOOPS))
    assert stack_at(found, "/mnt/files") is found[0] and stack_at(found, "/run/vhdkit-a") is found[0]
    assert stack_at(found, "/mnt/win") is found[1]
    assert stack_at(found, "/mnt/win/deep") is None and stack_at(found, "/mnt/other") is None


def test_a_file_beside_the_base_is_not_in_it() -> None:
    """/mnt/disk2 only shares a prefix with /mnt/disk."""
    text = TABLE + "50 27 7:2 / /mnt/x ro - ext4 /dev/loop2 ro\n"
    found = list(stacks(parse(text), {"/dev/loop2": "/mnt/disk2/nbd"}))
    assert all(not any(inner.mountpoint == "/mnt/x" for inner, _ in one.inside) for one in found)


def test_the_last_mount_at_a_place_counts() -> None:
    """Of two mounts at one place the newer hides the other."""
    text = TABLE + "51 27 0:50 / /mnt/win ro - tmpfs tmpfs rw\n"
    found = top_at(parse(text), "/mnt/win")
    assert found is not None and found.file_system == "tmpfs"
    assert top_at(parse(text), "/nowhere") is None


def test_drivers_have_names() -> None:
    """Even if FUSE gets none."""
    mounts = parse(TABLE)
    assert driver_name(mounts[4]) == "ntfs-3g" and driver_name(mounts[2]) == "ext4"


def test_options_are_escaped() -> None:
    """A comma in a path does not end the option; options that are off are omitted."""
    text = option_text({"fsname": "/a,b\\c", "ro": True, "allow_other": False, "subtype": "vhdkit"})
    assert text == "fsname=/a\\,b\\\\c,ro,subtype=vhdkit"


def test_each_server_has_its_own_address() -> None:
    """It is derived from the mount's device number, in the abstract namespace."""
    assert server_address("0:39") != server_address("0:40") and server_address("0:39").startswith("\0")
