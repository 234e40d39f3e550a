# SPDX-License-Identifier: Apache-2.0
"""A disk as one argument, and the verbs of `disk`."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

import vhdkit
from tests.vmm.cli.running import document, failure, good
from tests.vmm.small_guests import make_machine
from vmm.api.manager import DiskRequest, Manager
from vmm.cli.disk import parse_disk
from vmm.processes.worker_connection import MachineRef

MIB = 1 << 20


@pytest.mark.parametrize(
    ("word", "wish"),
    [
        ("a.vhd", DiskRequest("a.vhd")),
        ("a,b.vhd", DiskRequest("a,b.vhd")),
        ("a.vhd,read-only", DiskRequest("a.vhd", read_only=True)),
        ("a,b.vhd,controller=scsi,index=1,unit=7", DiskRequest("a,b.vhd", "scsi", 1, 7)),
        ("x=y.vhd,serial=S", DiskRequest("x=y.vhd", serial="S")),
        ("a.vhd,cache=none", DiskRequest("a.vhd", cache="none")),
        (
            "a.vhd,parent-dir=/p,parent-dir=/q,allow-raw-parent",
            DiskRequest("a.vhd", parent_dirs=("/p", "/q"), allow_raw_parent=True),
        ),
    ],
)
def test_a_disk_in_one_argument(word: str, wish: DiskRequest) -> None:
    """Options follow commas; a comma without an option after it belongs to the name."""
    assert parse_disk(word) == wish


@pytest.mark.parametrize("word", ["", ",read-only", "a,unit=", "a,unit=-1", "a,controller=usb", "a,unit=1,what"])
def test_malformed_disks(word: str) -> None:
    """A malformed disk is a usage error."""
    with pytest.raises(click.BadParameter):
        parse_disk(word)


def test_a_drive_in_one_argument() -> None:
    """A medium accepts the options for a place, as disks do, and none that only images have; an empty name is an empty
    drive."""
    assert parse_disk("x.iso,unit=1", kind="iso") == DiskRequest("x.iso", unit=1, kind="iso")
    assert parse_disk("x,y.iso,controller=scsi", kind="iso") == DiskRequest("x,y.iso", "scsi", kind="iso")
    assert parse_disk("", kind="iso") == DiskRequest(None, kind="iso")
    assert parse_disk("x.iso,format=raw") == DiskRequest("x.iso", format="raw")
    for word in ("x.iso,format=raw", "x.iso,parent-dir=/p", "x.iso,allow-raw-parent", "x.iso,cache=none"):
        with pytest.raises(click.BadParameter, match="hard disks"):
            parse_disk(word, kind="iso")
    with pytest.raises(click.BadParameter, match="not a format"):
        parse_disk("x.vhd,format=qcow2")
    with pytest.raises(click.BadParameter, match="is not a cache; known are writeback, none"):
        parse_disk("x.vhd,cache=directsync")


@pytest.mark.kvm
def test_disks_of_a_running_machine(manager: Manager, tmp_path: Path) -> None:
    """Disks are added, listed, resized and removed while the machine runs, with text and JSON output."""
    make_machine(manager, tmp_path)
    vhdkit.create_image(tmp_path / "data.vhd", 8 * MIB)
    good("start", "small")
    assert "disk-1 on scsi0:0, serial DATA" in good("disk", "add", "small", tmp_path / "data.vhd,serial=DATA")
    assert "is attached twice" in failure("disk", "add", "small", tmp_path / "data.vhd", code=5)
    rows = document("disk", "list", "small")
    assert [(row["id"], row["size_bytes"]) for row in rows] == [("disk-0", 8 * MIB), ("disk-1", 8 * MIB)]
    assert "data.vhd" in good("disk", "list", "small")
    assert document("disk", "resize", "small", "DATA", "16M")["size_bytes"] == 16 * MIB
    assert "stays" in good("disk", "remove", "small", "disk-1")
    assert "has no disk" in failure("disk", "remove", "small", "disk-1", code=1)
    assert "is not a size" in failure("disk", "resize", "small", "disk-0", "big", code=2)
    assert "mutually exclusive" in failure("disk", "add", "small", "x", "--cdrom", "--pass-through", code=2)
    assert "name an IMAGE" in failure("disk", "add", "small", code=2)


@pytest.mark.kvm
def test_the_cache_mode_of_a_disk(manager: Manager, tmp_path: Path) -> None:
    """A disk with cache=none is served so, whether the machine starts with it or gets it while it runs; it keeps the
    mode when it gets a new leaf; `show` and `disk list` show it.
    """
    make_machine(manager, tmp_path)
    vhdkit.create_image(tmp_path / "a.vhd", 8 * MIB)
    vhdkit.create_image(tmp_path / "b.vhd", 8 * MIB)
    good("disk", "add", "small", f"{tmp_path / 'a.vhd'},cache=none,controller=scsi")

    def modes() -> dict[str, str]:
        with vhdkit.ControlClient(MachineRef.of("small").runtime.nbd_control) as client:
            return {one["name"]: one["cache"] for one in client.call("status")["exports"]}

    good("start", "small")
    assert modes() == {"disk-0": "writeback", "disk-1": "none"}
    good("disk", "add", "small", f"{tmp_path / 'b.vhd'},cache=none")
    good("snapshot", "create", "small")
    assert modes() == {"disk-0": "writeback", "disk-1": "none", "disk-2": "none"}
    assert [row["cache"] for row in document("disk", "list", "small")] == ["writeback", "none", "none"]
    for text in (good("disk", "list", "small"), good("show", "small")):
        assert text.count("not cached") == 2
    good("stop", "small")
    good("start", "small")
    assert modes() == {"disk-0": "writeback", "disk-1": "none", "disk-2": "none"}


def test_a_size_is_rounded_up_to_whole_sectors(manager: Manager, tmp_path: Path) -> None:
    """Any size is accepted for a disk, and the rounding is reported."""
    make_machine(manager, tmp_path)
    assert "0.1G is not a whole number of sectors: rounded up to 107374592 bytes" in good(
        "disk", "resize", "small", "disk-0", "0.1G"
    )
    assert document("disk", "resize", "small", "disk-0", "107374593")["size_bytes"] == 107374592 + 512
