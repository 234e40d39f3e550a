# SPDX-License-Identifier: Apache-2.0
"""nbdkit's callbacks, called as nbdkit would call them, with a stand-in for nbdkit's module."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vhdkit

MIB = 1 << 20
NAMES = (
    "API_VERSION", "block_size", "cache", "can_cache", "can_extents", "can_fast_zero", "can_flush", "can_fua",
    "can_multi_conn", "can_trim", "can_write", "can_zero", "cleanup", "close", "config", "config_complete",
    "default_export", "export_description", "extents", "flush", "get_ready", "get_size", "is_rotational",
    "list_exports", "open", "pread", "pwrite", "thread_model", "trim", "zero", "after_fork",
)  # fmt: skip


class FakeNbdkit(ModuleType):
    """What nbdkit 1.32 gives a script; it records the last error number."""

    THREAD_MODEL_PARALLEL = 3
    FLAG_MAY_TRIM, FLAG_FUA, FLAG_REQ_ONE, FLAG_FAST_ZERO = 1, 2, 4, 8
    FUA_NATIVE = CACHE_NATIVE = 2
    EXTENT_HOLE, EXTENT_ZERO = 1, 2

    def __init__(self) -> None:
        super().__init__("nbdkit")
        self.error = 0
        self.wanted_name = ""
        self.said: list[str] = []

    def set_error(self, number: int) -> None:
        """As nbdkit's function."""
        self.error = number

    def debug(self, text: str) -> None:
        """As nbdkit's function."""
        self.said.append(text)

    def export_name(self) -> str:
        """As nbdkit's function."""
        return self.wanted_name


@pytest.fixture
def nbdkit(monkeypatch: pytest.MonkeyPatch) -> FakeNbdkit:
    """The stand-in, where the plugin imports it."""
    module = FakeNbdkit()
    monkeypatch.setitem(sys.modules, "nbdkit", module)
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    return module


@pytest.fixture
def plugin(nbdkit: FakeNbdkit) -> Iterator[Any]:
    """The plugin as nbdkit loads it, without state of earlier tests."""
    sys.modules.pop("vhdkit.serve.nbdkit.plugin", None)
    module = importlib.import_module("vhdkit.serve.nbdkit.plugin")
    yield module
    module.cleanup()
    sys.modules.pop("vhdkit.serve.nbdkit.plugin")


def started(plugin: Any, *settings: tuple[str, str], readonly: bool = False) -> Any:
    """Go through nbdkit's start with KEY, VALUE pairs up to the first client; returns its handle."""
    for key, value in settings:
        plugin.config(key, value)
    plugin.config_complete()
    plugin.get_ready()
    plugin.after_fork()
    return plugin.open(readonly)


def image(folder: Path, name: str = "disk.vhd") -> str:
    """A dynamic image of 8 MiB."""
    path = folder / name
    vhdkit.create_image(path, 8 * MIB)
    return str(path)


def read(plugin: Any, handle: Any, offset: int, size: int) -> bytes:
    """What a client would read."""
    buffer = bytearray(size)
    plugin.pread(handle, memoryview(buffer), offset, 0)
    return bytes(buffer)


def test_every_callback_is_there(plugin: Any) -> None:
    """nbdkit looks up its callbacks by these names."""
    assert all(hasattr(plugin, name) for name in NAMES)
    assert plugin.API_VERSION == 2
    assert plugin.thread_model() == FakeNbdkit.THREAD_MODEL_PARALLEL


def test_large_sectors_are_the_smallest_request(plugin: Any, tmp_path: Path) -> None:
    """A disk with sectors of 4096 bytes asks for requests of whole ones, and serves others, too."""
    vhdkit.create_image(tmp_path / "large.vhdx", 8 * MIB, disk_format="vhdx", sector_bytes=4096)
    handle = started(plugin, ("image", str(tmp_path / "large.vhdx")))
    assert plugin.block_size(handle) == (4096, 4096, 64 * MIB)
    plugin.pwrite(handle, memoryview(b"x" * 1000), 12345, 0)
    assert read(plugin, handle, 12344, 1002) == b"\0" + b"x" * 1000 + b"\0"
    plugin.close(handle)


def test_read_write_flush(plugin: Any, tmp_path: Path) -> None:
    """Writes at any offset are read back, and are in the image when nbdkit has ended."""
    path = image(tmp_path)
    handle = started(plugin, ("image", path))
    assert plugin.get_size(handle) == 8 * MIB
    assert plugin.block_size(handle) == (1, 4096, 64 * MIB)
    plugin.pwrite(handle, memoryview(b"x" * 1000), 12345, 0)
    plugin.pwrite(handle, memoryview(b"y" * 512), 4 * MIB, FakeNbdkit.FLAG_FUA)
    assert read(plugin, handle, 12344, 1002) == b"\0" + b"x" * 1000 + b"\0"
    plugin.flush(handle, 0)
    plugin.cache(handle, 6 * MIB, MIB, 0)
    plugin.close(handle)
    plugin.cleanup()
    with vhdkit.open_disk(path) as disk:
        assert disk.read(12345, 1000) == b"x" * 1000 and disk.read(4 * MIB, 512) == b"y" * 512


@pytest.mark.parametrize("command", ["pwrite", "trim", "zero"])
def test_fua_flushes(plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """With FUA the disk is flushed before the answer, without it it is not."""
    handle = started(plugin, ("image", image(tmp_path)))
    flushes = []
    monkeypatch.setattr(handle.disk.chain, "flush", lambda: flushes.append(1))
    for flags in (0, FakeNbdkit.FLAG_FUA):
        if command == "pwrite":
            plugin.pwrite(handle, memoryview(b"d" * 4096), 0, flags)
        else:
            getattr(plugin, command)(handle, 4096, 0, flags | FakeNbdkit.FLAG_MAY_TRIM)
    assert len(flushes) == 1


def test_extents_of_partial_ranges(plugin: Any, tmp_path: Path) -> None:
    """Extents begin at the requested offset, cover the range, and are holes only where it reads as zeros."""
    handle = started(plugin, ("image", image(tmp_path)))
    plugin.pwrite(handle, memoryview(b"d" * 2 * MIB), 2 * MIB, 0)
    hole = FakeNbdkit.EXTENT_HOLE | FakeNbdkit.EXTENT_ZERO
    assert plugin.extents(handle, 8 * MIB, 0, 0) == [
        (0, 2 * MIB, hole), (2 * MIB, 2 * MIB, 0), (4 * MIB, 4 * MIB, hole)
    ]  # fmt: skip
    assert plugin.extents(handle, 2 * MIB, MIB + 7, 0) == [(MIB + 7, MIB - 7, hole), (2 * MIB, MIB + 7, 0)]
    assert plugin.extents(handle, 2 * MIB, MIB + 7, FakeNbdkit.FLAG_REQ_ONE) == [(MIB + 7, MIB - 7, hole)]
    assert plugin.extents(handle, 1, 8 * MIB - 1, 0) == [(8 * MIB - 1, 1, hole)]


def test_zero(plugin: Any, nbdkit: FakeNbdkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that may be holes are written here; if they must be data, or fast and are not, nbdkit gets an error."""
    handle = started(plugin, ("image", image(tmp_path)))
    plugin.pwrite(handle, memoryview(b"d" * MIB), 0, 0)
    with pytest.raises(OSError, match="zeros here"):
        plugin.zero(handle, MIB, 0, 0)
    assert nbdkit.error == errno.EOPNOTSUPP and read(plugin, handle, 0, MIB) == b"d" * MIB
    plugin.zero(handle, 1000, 100, FakeNbdkit.FLAG_MAY_TRIM)
    assert read(plugin, handle, 0, 2000) == b"d" * 100 + bytes(1000) + b"d" * 900
    monkeypatch.setattr(type(handle.disk), "zeroes_are_fast", lambda self: False)
    nbdkit.error = 0
    with pytest.raises(OSError, match="zeros here"):
        plugin.zero(handle, MIB, 0, FakeNbdkit.FLAG_MAY_TRIM | FakeNbdkit.FLAG_FAST_ZERO)
    assert nbdkit.error == errno.EOPNOTSUPP
    plugin.trim(handle, MIB, 0, 0)
    assert read(plugin, handle, 0, MIB) == bytes(MIB)


def test_errors_have_the_numbers_of_nbd(
    plugin: Any, nbdkit: FakeNbdkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing disk reaches the client as EIO, a full one as ENOSPC, and the log gets a line without a traceback."""
    handle = started(plugin, ("image", image(tmp_path)))
    for error, number in ((vhdkit.IoFailed("broken"), errno.EIO), (vhdkit.NoSpace("full"), errno.ENOSPC),
                          (vhdkit.ImageInUse("busy"), errno.EIO)):  # fmt: skip

        def fail(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(handle.disk.chain, "flush", fail)
        with pytest.raises(type(error)):
            plugin.flush(handle, 0)
        assert nbdkit.error == number and sys.tracebacklimit == 0
    monkeypatch.undo()


def test_a_bug_has_a_traceback(plugin: Any, nbdkit: FakeNbdkit, tmp_path: Path) -> None:
    """An unforeseen error has its traceback, even after a foreseen one."""
    handle = started(plugin, ("image", image(tmp_path)))
    with pytest.raises(vhdkit.OutOfRange):
        plugin.trim(handle, 512, 8 * MIB, 0)
    with pytest.raises(TypeError):
        plugin.pread(handle, None, 0, 0)
    assert (sys.tracebacklimit or 0) > 100


def test_read_only(plugin: Any, tmp_path: Path) -> None:
    """A read-only client leaves the image unchanged; meanwhile others can read the image."""
    path = image(tmp_path)
    before = Path(path).read_bytes()
    handle = started(plugin, ("image", path), readonly=True)
    assert not plugin.can_write(handle) and not plugin.can_trim(handle) and not plugin.can_zero(handle)
    with vhdkit.open_disk(path) as disk:
        assert disk.read(0, 1) == b"\0"
    assert plugin.can_flush(handle) and plugin.can_multi_conn(handle) and plugin.can_extents(handle)
    plugin.cleanup()
    assert Path(path).read_bytes() == before


def test_first_writer_opens_for_writing(plugin: Any, tmp_path: Path) -> None:
    """The image is locked for reading until a client wants to write; beside another reader writing is refused."""
    path = image(tmp_path)
    reader = started(plugin, ("image", path), readonly=True)
    second = plugin.open(False)
    assert not plugin.can_write(second)
    plugin.close(reader)
    plugin.close(second)
    writer = plugin.open(False)
    assert plugin.can_write(writer)
    with pytest.raises(vhdkit.ImageInUse):
        vhdkit.open_disk(path)
    plugin.pwrite(writer, memoryview(b"w"), 0, 0)
    plugin.close(writer)
    with vhdkit.open_disk(path) as other:
        assert other.read(0, 1) == b"w"
    assert read(plugin, plugin.open(True), 0, 1) == b"w"


def test_beside_another_reader(plugin: Any, nbdkit: FakeNbdkit, tmp_path: Path) -> None:
    """A client without a stated access may read an image that another program reads too, and gets a note."""
    path = image(tmp_path)
    with vhdkit.open_disk(path):
        handle = started(plugin, ("image", path))
        assert not plugin.can_write(handle) and read(plugin, handle, 0, 1) == b"\0"
        assert "another program is using this image" in nbdkit.said[0]
        plugin.close(handle)
    assert plugin.can_write(plugin.open(False))


def test_access_is_applied_at_start(plugin: Any, tmp_path: Path) -> None:
    """access=write locks at start, and an image that has children is refused at once."""
    path = image(tmp_path)
    started(plugin, ("image", path), ("access", "write"), readonly=True)
    with pytest.raises(vhdkit.ImageInUse):
        vhdkit.open_disk(path)


def test_access_read_never_writes(plugin: Any, tmp_path: Path) -> None:
    """access=read applies to clients that want to write, too."""
    assert not plugin.can_write(started(plugin, ("image", image(tmp_path)), ("access", "read")))


def test_failed_writable_open_still_reads(plugin: Any, nbdkit: FakeNbdkit, tmp_path: Path) -> None:
    """A client that wants to write to a protected image is refused; one that only reads is served."""
    path = image(tmp_path)
    vhdkit.create_child(tmp_path / "child.avhd", path)
    plugin.config("image", path)
    plugin.get_ready()
    plugin.after_fork()
    with pytest.raises(vhdkit.HasChildren):
        plugin.open(False)
    assert read(plugin, plugin.open(True), 0, 4) == bytes(4)


def test_several_exports(plugin: Any, nbdkit: FakeNbdkit, tmp_path: Path) -> None:
    """Each export has its name, description and disk; the first is the default; unknown names are refused."""
    one, two = image(tmp_path, "one.vhd"), image(tmp_path, "two=2.vhd")
    first = started(
        plugin, ("description", "our büro"), ("name", "a=b"), ("image", one), ("name", "zwei"), ("image", two)
    )
    assert [name for name, _ in plugin.list_exports(False, False)] == ["a=b", "zwei"]
    assert plugin.default_export(False, False) == first.name == "a=b"
    nbdkit.wanted_name = "zwei"
    second = plugin.open(False)
    plugin.pwrite(second, memoryview(b"2"), 0, 0)
    assert (read(plugin, first, 0, 1), read(plugin, second, 0, 1)) == (b"\0", b"2")
    assert "two=2.vhd" in plugin.export_description(second)
    assert plugin.export_description(first) == "our büro"
    nbdkit.wanted_name = "drei"
    with pytest.raises(vhdkit.NotFound, match="drei"):
        plugin.open(False)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([], "nothing to serve"),
        ([("image", "")], "empty"),
        ([("image", "a"), ("image", "b")], "two exports"),
        ([("image", "a"), ("name", "b")], "name=b has no image=PATH after it"),
        ([("name", "a"), ("name", "b"), ("image", "b")], "name=a has no image=PATH after it"),
        ([("image", "a"), ("description", "b")], "description=b has no image=PATH after it"),
        ([("name", "x" * 4097)], "at most 4096 bytes"),
        ([("colour", "red")], "colour= is not a known parameter"),
        ([("access", "maybe")], "access=maybe is not one of read, write"),
        ([("format", "qcow2")], "format=qcow2"),
        ([("allow-raw-parent", "perhaps")], "allow-raw-parent=perhaps"),
        ([("dynamic-bitmap", "x")], "dynamic-bitmap=x"),
        ([("cache", "some")], "cache=some is not one of writeback, none"),
    ],
)
def test_wrong_settings(plugin: Any, settings: list[tuple[str, str]], sentence: str) -> None:
    """An invalid setting is named before an image is opened."""
    with pytest.raises(vhdkit.InvalidArgument, match=sentence):
        for key, value in settings:
            plugin.config(key, value)
        plugin.config_complete()


def test_opening_options(plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parents elsewhere, raw parents, bitmaps and the format are given as on the command line; paths stay right."""
    bases, leaves = tmp_path / "bases", tmp_path / "leaves"
    bases.mkdir()
    leaves.mkdir()
    (bases / "base.img").write_bytes(b"r" * MIB)
    options = vhdkit.OpenOptions(parent_dirs=(str(bases),), allow_raw_parent=True)
    vhdkit.create_child(leaves / "leaf.avhd", bases / "base.img", options=options)
    monkeypatch.chdir(tmp_path)
    plugin.config("parent-dir", "bases")
    plugin.config("allow-raw-parent", "yes")
    plugin.config("dynamic-bitmap", "ignore")
    plugin.config("format", "vhd")
    plugin.config("cache", "none")
    plugin.config("image", os.path.join("leaves", "leaf.avhd"))
    monkeypatch.chdir("/")  # as nbdkit does when it goes to the background
    plugin.get_ready()
    plugin.after_fork()
    assert read(plugin, plugin.open(False), 0, 10) == b"r" * 10


def test_cleanup_closes_all(plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end every disk is closed, even after one that cannot be flushed, which is reported."""
    first = started(plugin, ("name", "1"), ("image", image(tmp_path, "1.vhd")),
                    ("name", "2"), ("image", image(tmp_path, "2.vhd")))  # fmt: skip
    closed = []
    real = vhdkit.Disk.close

    def close(disk: vhdkit.Disk) -> None:
        real(disk)
        closed.append(os.path.basename(disk.path))
        if disk is first.disk:
            raise vhdkit.SyncFailed("lost")

    monkeypatch.setattr(vhdkit.Disk, "close", close)
    with pytest.raises(vhdkit.SyncFailed):
        plugin.cleanup()
    assert closed == ["1.vhd", "2.vhd"]
    monkeypatch.undo()
