# SPDX-License-Identifier: Apache-2.0
"""Real file systems through real mounts: made, filled, checked and compared by their own tools."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.mounting import SECONDS, can_mount_kernel, cleaned, kill, mounted, require_fuse, require_loop, require_root
from tests.mounting import vhdkit as command
from tests.support import expected_samples, not_available, require_tool, run, sample

pytestmark = pytest.mark.interop

MIB = 1 << 20
PARTITIONS = """label: gpt
start=2048, size=65536, type=L, name="small one"
size=655360, type=L
size=65536, type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7
size=65536, type=U
"""


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """FUSE mounts below file systems lie in the test's own folder; none is left."""
    require_fuse()
    folder = tmp_path / "runtime"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    assert os.listdir(folder) == []


def make_tree(folder: Path, *, plain: bool = False) -> Path:
    """Files of all sizes, in folders, with odd names; with `plain` only names that FAT and mtools support."""
    rng = random.Random(3)
    for number, name in enumerate(
        ("a", "with blank", "plain" if plain else "umlaut-\u00e4", "deep/er/still", "empty")
    ):
        path = folder / name / f"file {number}.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(rng.randbytes(number * number * 70001))
    (folder / "empty" / "nothing").touch()
    if not plain:
        (folder / "link").symlink_to("a/file 0.bin")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A child of 420 MiB with a partition table that sfdisk wrote through a mount."""
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.avhd"
    vhdkit.create_image(base, 420 * MIB)
    vhdkit.create_child(leaf, base)
    with mounted(leaf, tmp_path / "mnt", "--rw") as mnt:
        subprocess.run(
            [require_tool("sfdisk"), "-q", "--no-reread", "--no-tell-kernel", str(mnt / "disk.raw")],
            input=PARTITIONS, text=True, check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    return leaf


MADE = {
    "ext4": (1, ["mke2fs", "-q", "-F", "-t", "ext4"], ["e2fsck", "-fn"]),
    "xfs": (2, ["mkfs.xfs", "-q", "-f"], ["xfs_repair", "-n", "-f"]),
    "ntfs": (3, ["mkntfs", "-Q", "-F"], ["ntfsfix", "-n"]),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_file_system_is_made_filled_and_checked(kind: str, disk: Path, tmp_path: Path) -> None:
    """Its own tool finds it clean, and `rsync -c` finds no difference; the parent has none of it."""
    require_loop()
    number, maker, checker = MADE[kind]
    if kind != "ntfs" and not can_mount_kernel(kind):
        pytest.skip(f"needs a kernel with {kind}")
    if kind == "ntfs":
        require_tool("ntfs-3g")
    rsync = require_tool("rsync")
    tree, mnt = make_tree(tmp_path / "tree"), tmp_path / "mnt"
    with mounted(disk, mnt, "--rw"):
        run([require_tool(maker[0]), *maker[1:], str(mnt / "partitions" / f"{number}.raw")])
    words = ["--partition", str(number), "--fs"]
    with mounted(disk, mnt, *words, "--rw"):
        run([rsync, "-rlt", f"{tree}/", f"{mnt}/"])
    with mounted(disk, mnt):
        run([require_tool(checker[0]), *checker[1:], str(mnt / "partitions" / f"{number}.raw")])
        below = (mnt / "layers" / "1-base.raw").open("rb")
        with below:
            assert os.lseek(below.fileno(), 0, os.SEEK_HOLE) == 0
    with mounted(disk, mnt, *words):
        changes = run([rsync, "-rlcni", "--delete", "--exclude=lost+found", f"{tree}/", f"{mnt}/"]).stdout
        assert [line for line in changes.splitlines() if line.startswith((">", "<", "c", "*"))] == []


def test_fat_through_mtools(disk: Path, tmp_path: Path) -> None:
    """FAT needs no driver: mtools read and write the partition's file, and its checker finds it clean."""
    mnt, tree = tmp_path / "mnt", make_tree(tmp_path / "tree", plain=True)
    with mounted(disk, mnt, "--rw"):
        part = str(mnt / "partitions" / "4.raw")
        run([require_tool("mkfs.fat"), "-n", "STICK", part])
        run([require_tool("mcopy"), "-s", "-i", part, *map(str, sorted(tree.iterdir())), "::"])
    with mounted(disk, mnt):
        part = str(mnt / "partitions" / "by-label" / "STICK")
        run([require_tool("fsck.fat"), "-n", part])
        out = tmp_path / "out"
        out.mkdir()
        run([require_tool("mcopy"), "-s", "-n", "-i", part, "::", str(out)])
        files = {path.relative_to(tree): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
        assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_everyday_tools(tmp_path: Path) -> None:
    """dd, cp with holes, sha256sum and losetup with an offset see the disk that vhdkit reads."""
    require_loop()
    image, rng = tmp_path / "disk.vhd", random.Random(4)
    vhdkit.create_image(image, 64 * MIB)
    with vhdkit.open_disk(image, writable=True) as open_disk:
        for place in (0, 7 * MIB + 4096, 40 * MIB):
            open_disk.write(place, rng.randbytes(MIB + 512))
    vhdkit.convert(image, tmp_path / "raw", disk_format=vhdkit.DiskFormat.RAW)
    with mounted(image, tmp_path / "mnt") as mnt:
        file = mnt / "disk.raw"
        sums = run(["sha256sum", str(file), str(tmp_path / "raw")]).stdout.split()
        assert sums[0] == sums[2]
        run(["dd", f"if={file}", f"of={tmp_path / 'dd'}", "bs=1000", "skip=7000", "count=3000", "status=none"])
        assert (tmp_path / "dd").read_bytes() == (tmp_path / "raw").read_bytes()[7_000_000:10_000_000]
        run(["cp", "--sparse=auto", str(file), str(tmp_path / "copy")])
        run(["cmp", str(tmp_path / "copy"), str(tmp_path / "raw")])
        assert (tmp_path / "copy").stat().st_blocks * 512 < 8 * MIB
        used = int(run(["du", "--block-size=1", str(file)]).stdout.split()[0])
        assert 3 * MIB <= used < 8 * MIB
        losetup = require_tool("losetup")
        part = ["--offset", str(7 * MIB), "--sizelimit", str(2 * MIB)]
        loop = run([losetup, "--find", "--show", "--read-only", *part, str(file)]).stdout.strip()
        try:
            assert Path(loop).read_bytes() == (tmp_path / "raw").read_bytes()[7 * MIB : 9 * MIB]
        finally:
            run([losetup, "--detach", loop])


WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for number in range(100000):
    os.pwrite(fd, number.to_bytes(4, "little") * 1024, number % 4096 * 4096)
    if number % 5 == 4:
        os.fsync(fd)
        print(number, flush=True)
"""


@pytest.mark.parametrize("pause", [0.05, 0.4])
def test_synced_data_survives_a_killed_server(pause: float, tmp_path: Path) -> None:
    """kill -9 of the server during writes: every page that fsync confirmed is there, or a newer one."""
    image, mnt = tmp_path / "disk.vhd", tmp_path / "mnt"
    vhdkit.create_image(image, 64 * MIB)
    mnt.mkdir()
    with cleaned(mnt):
        pid = json.loads(command("mount", image, mnt, "--rw", "--json").stdout)["pid"]
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(mnt / "disk.raw")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as writer:
            assert writer.stdout is not None
            acknowledged = int(writer.stdout.readline())
            time.sleep(pause)  # the moment of the kill
            kill(pid)
            for line in writer.stdout:
                acknowledged = int(line)
        command("umount", mnt)
    # Killed between two calls it may leave space that no block uses: a warning at most.
    assert [one for one in vhdkit.check(image) if one.severity is vhdkit.Severity.ERROR] == []
    with vhdkit.open_disk(image) as disk:
        for number in range(max(0, acknowledged - 4095), acknowledged + 1):
            page = disk.read(number % 4096 * 4096, 4096)
            found = int.from_bytes(page[:4], "little")
            assert page == page[:4] * 1024 and found >= number and found % 4096 == number % 4096


def test_a_full_file_system_on_the_host(tmp_path: Path) -> None:
    """The writer gets ENOSPC; earlier data stays, the image stays sound, and with free space it can be written to
    again."""
    require_root()
    host, mnt = tmp_path / "host", tmp_path / "mnt"
    host.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(host)])
    try:
        vhdkit.create_image(host / "disk.vhd", 64 * MIB)
        (host / "ballast").write_bytes(bytes(4 * MIB))
        with mounted(host / "disk.vhd", mnt, "--rw"):
            fd = os.open(mnt / "disk.raw", os.O_RDWR)
            with contextlib.closing(os.fdopen(fd, "rb+", buffering=0)) as file:
                written = 0
                with pytest.raises(OSError, match="No space left"):
                    while True:
                        os.pwrite(fd, bytes([1 + written % 250]) * MIB, written * MIB)
                        written += 1
                assert written >= 2
                os.fsync(fd)
                for number in range(written):
                    assert os.pread(fd, MIB, number * MIB) == bytes([1 + number % 250]) * MIB
                (host / "ballast").unlink()
                assert os.pwrite(file.fileno(), b"\xff" * MIB, written * MIB) == MIB
        command("check", host / "disk.vhd")
        with vhdkit.open_disk(host / "disk.vhd") as disk:
            assert disk.read((written - 1) * MIB, 1) == bytes([1 + (written - 1) % 250])
            assert disk.read(written * MIB, 2) == b"\xff\xff"
    finally:
        run(["umount", str(host)])


def _memory_group(limit: int) -> Path:
    """A new memory group with a limit, of either version of cgroups."""
    for base, name in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = base / f"vhdkit-test-{os.getpid()}-{threading.get_ident()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if (group / name).exists():
                (group / name).write_text(str(limit))
                return group
            group.rmdir()
    not_available("needs memory groups that root may make")


def test_dirty_pages_with_little_memory(tmp_path: Path) -> None:
    """A writer with very little memory fills a file system on a loop device without a deadlock."""
    require_loop()
    if not can_mount_kernel("ext4"):
        pytest.skip("needs a kernel with ext4")
    image, mnt = tmp_path / "disk.vhd", tmp_path / "mnt"
    vhdkit.create_image(image, 320 * MIB)
    with mounted(image, mnt, "--rw"):
        run([require_tool("mke2fs"), "-q", "-F", "-t", "ext4", str(mnt / "disk.raw")])
    group = _memory_group(24 * MIB)
    try:
        with mounted(image, mnt, "--fs", "--rw"):
            one = json.loads(command("mounts", "--json").stdout)["mounts"][-1]
            if one["driver"] != "ext4":
                pytest.skip("the memory of this process is limited: no loop device is used")
            script = f"echo $$ > {group}/cgroup.procs; dd if=/dev/zero of={mnt}/big bs=1M count=200 conv=fsync"
            subprocess.run(["sh", "-c", script], check=True, capture_output=True, timeout=SECONDS)
            assert (mnt / "big").stat().st_size == 200 * MIB
        with mounted(image, mnt):
            run([require_tool("e2fsck"), "-fn", str(mnt / "disk.raw")])
    finally:
        group.rmdir()


SAMPLES = {name: one for name, one in expected_samples().items() if one["type"] in ("VHD dynamic", "VHD fixed")}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name: str, tmp_path: Path) -> None:
    """Disks of Windows and others: the content has its known hash, and each partition the files that 7-Zip finds."""
    image = tmp_path / Path(name).name
    packed = sample(SAMPLES[name]["packed"])
    image.write_bytes(gzip.decompress(packed.read_bytes()) if packed.suffix == ".gz" else packed.read_bytes())
    zipped = require_tool("7zz")
    with mounted(image, tmp_path / "mnt") as mnt:
        assert run(["sha256sum", str(mnt / "disk.raw")]).stdout.split()[0] == SAMPLES[name]["content_sha256"]
        facts = json.loads((mnt / "info.json").read_text())
        parts = {one["number"]: one["file_system"] for one in facts["partitions"] if one["file_system"]}
        parts = parts or {0: facts["file_system"]}
        listings = {number: _in_7zip(zipped, mnt, number) for number in parts if parts[number]}
        for number, found in parts.items():
            if found and found["type"] == "vfat":
                assert _in_mtools(mnt, number) == listings.pop(number)
    if os.geteuid() == 0:
        for number, names in listings.items():
            words = ["--fs", *(["--partition", str(number)] if number else [])]
            with mounted(image, tmp_path / "mnt", *words) as mnt:
                ours = {path.relative_to(mnt).as_posix() for path in mnt.rglob("*") if path.is_file()}
            assert ours == names


def _in_7zip(program: str, mnt: Path, number: int) -> set[str]:
    """The files that 7-Zip finds in the file system, without its own additions."""
    file = mnt / "partitions" / f"{number}.raw" if number else mnt / "disk.raw"
    listing = subprocess.run(
        [program, "l", "-slt", "-ba", str(file)], capture_output=True, text=True, check=True
    ).stdout
    names = set()
    for block in listing.split("\n\n"):
        facts = dict(line.split(" = ", 1) for line in block.splitlines() if " = " in line)
        if facts.get("Folder") == "-" and not facts["Path"].startswith(("[SYSTEM]", "[UNKNOWN]", "[DELETED]")):
            names.add(facts["Path"])
    return names


def _in_mtools(mnt: Path, number: int) -> set[str]:
    file = mnt / "partitions" / f"{number}.raw"
    # (For an empty one it reports "not found".)
    words = [require_tool("mdir"), "-/", "-a", "-b", "-i", str(file), "::"]
    listing = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return {line.removeprefix("::/") for line in listing.splitlines() if line and not line.endswith("/")}
