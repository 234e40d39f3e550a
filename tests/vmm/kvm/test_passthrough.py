# SPDX-License-Identifier: Apache-2.0
"""Giving devices to machines: every refusal on made-up hosts, and the claim on real loop devices."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_root, require_tool, run
from tests.vmm.host.fake_host import FakeHost
from tests.vmm.kvm.loops import MIB, loop_device
from vmm.host import block
from vmm.kvm import passthrough
from vmm.kvm.passthrough import Given
from vmm.model.errors import AccessDenied, InUse, InvalidSpec, NotFound, Refused
from vmm.model.spec import make_disk, make_spec


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A host with one unused disk, sda."""
    host = FakeHost(tmp_path / "root")
    host.disk("sda", "ata", device__wwid="naa.1")
    return host


def reasons(host: FakeHost, name: str, *, read_only: bool = False, given: Given | None = None) -> list[str]:
    """Why a device of a made-up host must not be given to a machine."""
    view = host.view
    facts = passthrough.facts_of(view.device(name), view)
    return [str(one) for one in passthrough.refusals(facts, read_only=read_only, given=given)]


# -- refusals -----------------------------------------------------------------------------------------------------


def test_an_unused_disk_is_accepted(host: FakeHost) -> None:
    """An unused disk with an identity, and a partition of it, are not refused."""
    host.partition("sda", 1)
    assert reasons(host, "sda") == [] and reasons(host, "sda1") == []


def test_mounted_disk(host: FakeHost) -> None:
    """A mounted device is refused with its mount points, and so is the disk of a mounted partition."""
    host.partition("sda", 1)
    host.partition("sda", 2)
    host.mount(host.view.device("sda1").number, "/dev/sda1", "/")
    host.mount(host.view.device("sda1").number, "/dev/sda1", "/var")
    assert reasons(host, "sda1") == ["is mounted at /, /var"]
    assert reasons(host, "sda") == ["its partition /dev/sda1 is mounted at /, /var"]
    assert reasons(host, "sda2") == []


def test_swap(host: FakeHost) -> None:
    """The host's swap space is refused."""
    host.partition("sda", 1)
    host.swap_to("/dev/sda1")
    assert reasons(host, "sda1") == ["is swap space of this host"]
    assert reasons(host, "sda") == ["its partition /dev/sda1 is swap space of this host"]


def test_part_of_a_volume(host: FakeHost) -> None:
    """The members of a volume or a RAID are refused with the volume's name; the volume itself is not."""
    host.partition("sda", 1)
    host.mapped("dm-0", "vg-data", "LVM-1", ["sda1"])
    assert reasons(host, "sda") == ["its partition /dev/sda1 is part of /dev/mapper/vg-data"]
    assert reasons(host, "dm-0") == []


def test_path_of_a_multipath_disk(host: FakeHost) -> None:
    """A single path of a LUN is refused with the name of the multipath device, although both paths have one
    identity."""
    for name, place in (("sdb", "fc"), ("sdc", "iscsi")):
        host.disk(name, place, device__wwid="naa.6")
    host.mapped("dm-0", "mpatha", "mpath-36", ["sdb", "sdc"])
    assert reasons(host, "sdb") == ["is one path of /dev/mapper/mpatha"]
    assert reasons(host, "dm-0") == []


def test_two_disks_that_look_alike(host: FakeHost) -> None:
    """If two devices have one identity (two paths without multipath), neither is accepted."""
    host.disk("sdb", "fc", device__wwid="naa.1")
    assert reasons(host, "sda") == ["has the same identity as /dev/sdb and could be taken for it"]


def test_no_identity(host: FakeHost) -> None:
    """A disk that could not be identified again is refused."""
    host.disk("vda", "virtio")
    assert reasons(host, "vda") == [passthrough.NO_IDENTITY]


@pytest.mark.parametrize(
    ("name", "place", "files", "sectors", "says"),
    [
        ("sr0", "usb", {"device/type": "5"}, 100, "CD-ROM"),
        ("zram0", "virtual", {}, 100, "memory"),
        ("loop0", "virtual", {}, 0, "no file behind it"),
        ("sdc", "usb", {"device/wwid": "naa.2"}, 0, "no medium"),
        ("sdc", "usb", {"device/wwid": "naa.2", "ro": "1"}, 100, "write-protected"),
    ],
)
def test_devices_that_are_not_usable_disks(
    host: FakeHost, name: str, place: str, files: dict[str, str], sectors: int, says: str
) -> None:
    """Drives, memory, empty and write-protected devices are refused, each with one reason."""
    host.disk_of(name, place, files, sectors)
    (reason,) = reasons(host, name)
    assert says in reason


def test_a_write_protected_disk_is_accepted_read_only(host: FakeHost) -> None:
    """A write-protected disk may be given to a machine for reading."""
    host.disk("sdc", "usb", device__wwid="naa.2", ro="1")
    assert reasons(host, "sdc", read_only=True) == []


def test_a_device_belongs_to_one_machine(host: FakeHost) -> None:
    """A device, its partitions and its whole disk belong to one machine at a time."""
    host.partition("sda", 1)
    host.partition("sda", 2)
    whole = Given(identities={"wwn=naa.1": "web"})
    assert reasons(host, "sda", given=whole) == ["belongs to the machine web"]
    assert reasons(host, "sda1", given=whole) == ["the whole disk /dev/sda belongs to the machine web"]
    part = Given(identities={"wwn=naa.1,partition=2": "db"})
    assert reasons(host, "sda", given=part) == ["its partition /dev/sda2 belongs to the machine db"]
    assert reasons(host, "sda1", given=part) == []


def test_loop_device_of_a_machines_disk(host: FakeHost, tmp_path: Path) -> None:
    """A loop device on a file that is a machine's disk is refused, whatever name the machine has for the file."""
    file = tmp_path / "disk.vhd"
    file.write_text("")
    (tmp_path / "link").symlink_to(file)
    host.disk("loop0", "virtual", loop__backing_file=str(file))
    web = make_spec(name="web", disks=[make_disk(id="disk-0", path=str(tmp_path / "link"))])
    (reason,) = reasons(host, "loop0", given=passthrough.given_of([web]))
    assert "a disk of the machine web" in reason
    assert reasons(host, "loop0", given=passthrough.given_of([web], except_id=web.id)) == []


def test_what_counts_as_a_machines_device() -> None:
    """Devices count by their recorded identity, LUNs also by their URL, images by their path."""
    url = "iscsi://san/iqn.2001-04.com.example:store/1"
    disks = [
        make_disk(id="disk-0", path="/images/a.vhd"),
        make_disk(id="disk-1", kind="pass-through", path="/dev/sdb", identity="wwn=naa.1", unit=1),
        make_disk(id="disk-2", kind="pass-through", path=url, controller_index=1),
        make_disk(id="cd-0", kind="iso", path=None, controller_index=1, unit=1),
    ]
    given = passthrough.given_of([make_spec(name="web", disks=disks)], follow_links=False)
    assert given.images == {"/images/a.vhd": "web"}
    assert given.identities == {"wwn=naa.1": "web", "iscsi=iqn.2001-04.com.example:store,lun=1": "web"}


def test_all_reasons_are_reported_together(host: FakeHost) -> None:
    """All reasons against a device are reported together; if it is in use, that decides the kind of the error."""
    host.disk("sdb", "usb", ro="1")
    host.mount(host.view.device("sdb").number, "/dev/sdb", "/media")
    view = host.view
    found = passthrough.refusals(passthrough.facts_of(view.device("sdb"), view))
    assert len(found) == 3
    with pytest.raises(InUse, match="write-protected; is mounted at /media; has neither"):
        passthrough.refuse("/dev/sdb", found)
    with pytest.raises(Refused):
        passthrough.refuse("/dev/sdb", [one for one in found if not one.in_use])
    passthrough.refuse("/dev/sdb", [])


# -- the claim ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(device: str, point: Path) -> Iterator[None]:
    """The device's new ext4 file system, mounted for as long as the block lasts."""
    run([require_tool("mkfs.ext4"), "-q", device])
    point.mkdir()
    run([require_tool("mount"), device, point])
    try:
        yield
    finally:
        run([require_tool("umount"), point])


def fails(*command: str) -> str:
    """The output of a command that must fail."""
    done = subprocess.run(
        [require_tool(command[0]), *command[1:]], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


def assert_untouchable(device: str, point: Path) -> None:
    """Making a file system, wiping signatures, mounting and swapping (to swap space) are all refused."""
    assert "in use" in fails("mkfs.ext4", "-q", device)
    assert "busy" in fails("wipefs", "--all", device)
    assert "busy" in fails("mount", "-t", "ext4", device, str(point))
    assert "busy" in fails("swapon", device)


def test_a_claim_keeps_other_programs_out(tmp_path: Path) -> None:
    """We can write to a claimed device; other programs cannot format, wipe, mount or swap to it."""
    with loop_device(tmp_path / "file") as device:
        run([require_tool("mkswap"), device])
        with passthrough.claim(device) as claim:
            assert claim.size_bytes == 16 * MIB
            assert claim.identity == f"file={(tmp_path / 'file').resolve()}"
            assert_untouchable(device, tmp_path)
            with pytest.raises(InUse, match="fuser"):
                passthrough.claim(device)
        run([require_tool("wipefs"), "--all", device])


def test_mounted_device_is_refused(tmp_path: Path) -> None:
    """The error names the mount point, both before and after the device was opened."""
    with loop_device(tmp_path / "file") as device, mounted(device, tmp_path / "mnt"):
        with pytest.raises(InUse, match=f"is mounted at {tmp_path}/mnt"):
            passthrough.claim(device)
        assert os.path.ismount(tmp_path / "mnt")


def test_swap_device_is_refused(tmp_path: Path) -> None:
    """A device that the host swaps to is refused."""
    with loop_device(tmp_path / "file") as device:
        run([require_tool("mkswap"), device])
        os.chmod(device, 0o600)
        run([require_tool("swapon"), device])
        try:
            with pytest.raises(InUse, match="swap space"):
                passthrough.claim(device)
        finally:
            run([require_tool("swapoff"), device])


def test_a_use_that_no_table_shows_is_found(tmp_path: Path) -> None:
    """The kernel decides: a claim of another program is found although no table shows it."""
    with loop_device(tmp_path / "file") as device:
        other = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(InUse, match="another program on this host"):
                passthrough.claim(device)
        finally:
            os.close(other)
        passthrough.claim(device).close()


def test_a_device_is_found_by_its_identity(tmp_path: Path) -> None:
    """INV-DEVICE-IDENTITY: if the name leads to another device, the one with the identity is used."""
    with loop_device(tmp_path / "one") as one, loop_device(tmp_path / "two") as two:
        identity = block.find(one).identity
        with passthrough.claim(two, identity=identity) as claim:
            assert claim.device.path == one
        with pytest.raises(NotFound, match="is gone"):
            passthrough.claim(two, identity="wwn=naa.5")


def test_two_loop_devices_on_one_file(tmp_path: Path) -> None:
    """Two devices with the same bytes are refused: a claim on one would not protect the bytes of the other."""
    file = tmp_path / "file"
    with loop_device(file) as one, loop_device(file) as twin, pytest.raises(Refused, match=twin):
        passthrough.claim(one)


def test_a_write_protected_device(tmp_path: Path) -> None:
    """A write-protected device can be claimed only for reading."""
    with loop_device(tmp_path / "file", read_only=True) as device:
        with pytest.raises(Refused, match="write-protected"):
            passthrough.claim(device)
        with passthrough.claim(device, read_only=True) as claim, pytest.raises(OSError):
            os.write(claim.fd, bytes(4096))


def test_paths_that_are_not_devices(tmp_path: Path) -> None:
    """A file, a folder, /dev/null and a missing path are refused, and the error says what they are."""
    file = tmp_path / "file"
    file.write_bytes(b"")
    for path in (str(file), str(tmp_path), "/dev/null"):
        with pytest.raises(InvalidSpec, match="not a block device"):
            passthrough.claim(path)
    with pytest.raises(NotFound):
        passthrough.claim(str(tmp_path / "none"))


def test_without_rights(tmp_path: Path) -> None:
    """If the user may not open the device, the error says how to get the right."""
    with loop_device(tmp_path / "file") as device:
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                try:
                    passthrough.claim(device)
                except AccessDenied as error:
                    code = 0 if "setfacl" in str(error) else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    """A claim that fails after the device was opened closes it again."""
    with loop_device(tmp_path / "file") as device:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(NotFound):
            passthrough.claim(device, identity="wwn=none")
        passthrough.claim(device).close()
        assert os.listdir("/proc/self/fd") == before


# -- QEMU ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def qemu_with(claim: passthrough.Claim) -> Iterator[subprocess.Popen[bytes]]:
    """A sandboxed QEMU with the user nobody, whose paused guest has the device on its SCSI bus."""
    options = ",".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in flat(passthrough.blockdev_of("pt0", 7, read_only=claim.read_only)).items()
    )
    command = [require_tool("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    command += ["--bounding-set=-all", "--inh-caps=-all", require_tool("qemu-system-x86_64"), "-accel", "tcg"]
    command += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    command += ["-m", "16", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio"]
    command += ["-add-fd", f"fd={claim.fd},set=7", "-blockdev", options, "-device", "virtio-scsi-pci,id=scsi0"]
    command += ["-device", "scsi-hd,drive=pt0,bus=scsi0.0"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(claim.fd,)
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            greeting = process.stdout.readline()
            assert b"QMP" in greeting, process.stderr.read().decode()
            yield process
        finally:
            process.kill()


def flat(document: dict[str, object], prefix: str = "") -> dict[str, object]:
    """A nested description, spelt as on QEMU's command line."""
    result: dict[str, object] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


@pytest.mark.kvm
def test_qemu_without_rights_keeps_the_claim(tmp_path: Path) -> None:
    """INV-DEVICE-CLAIMED: an unprivileged QEMU uses the device, and the claim lasts without us until QEMU has
    ended."""
    require_root()
    with loop_device(tmp_path / "file") as device:
        run([require_tool("mkswap"), device])
        claim = passthrough.claim(device)
        with claim, qemu_with(claim) as qemu:
            claim.close()
            assert_untouchable(device, tmp_path)
            os.kill(qemu.pid, signal.SIGKILL)
            qemu.wait(30)
        run([require_tool("mkfs.ext4"), "-q", device])
        assert b"SWAPSPACE2" not in Path(device).read_bytes()


@pytest.mark.kvm
def test_qemu_reads_only(tmp_path: Path) -> None:
    """QEMU uses a device that was claimed for reading as a read-only disk."""
    with loop_device(tmp_path / "file") as device:
        run([require_tool("mkswap"), device])
        with passthrough.claim(device, read_only=True) as claim, qemu_with(claim):
            assert_untouchable(device, tmp_path)
