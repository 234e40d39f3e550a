# SPDX-License-Identifier: Apache-2.0
"""INV-NAME-HELD: files that are replaced, moved or removed while they are opened, held, or given children.

A hook in the lock's system calls stands for another process: it acts at the worst moment, each time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vhdkit
from vhdkit import errors, locks
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.verbs import garbage, merge_steps, rebase, relocate, snapshot
from vhdkit.chain.verbs.live import freezing
from vhdkit.chain.verbs.live_merge import live_merge
from vhdkit.folder import NewFile
from vhdkit.serve.opening import ExportRequest, OpenMode, open_exports
from vhdkit.store import FileStore
from vhdkit.unfinished import parts
from vhdkit.units import KIB, MIB

SIZE = 4 * MIB
OLD, NEW = b"old!" * 128, b"new!" * 128


def _image(path: str, content: bytes = OLD) -> None:
    vhdkit.create_image(path, SIZE, block_size_bytes=512 * KIB)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, content)


def _first(path: str) -> bytes:
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, 512)


def _replace(path: str) -> None:
    """Another image with another id takes the name, as by `convert --force` or a restore."""
    _image("other.vhd", NEW)
    os.replace("other.vhd", path)


def _before_the_lock(monkeypatch: pytest.MonkeyPatch, path: str, act: Callable[[], None], times: int = 1) -> None:
    """`act` happens between the opening of `path` and its lock."""
    hold, left = locks.hold, [times]

    def racing(fd: int, held_path: str, *, writer: bool) -> None:
        if os.path.basename(held_path) == os.path.basename(path) and left[0]:
            left[0] -= 1
            act()
        hold(fd, held_path, writer=writer)

    monkeypatch.setattr(locks, "hold", racing)


def _after(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, act: Callable[[], object]) -> None:
    """`act` happens when this function of vhdkit has returned."""
    function = getattr(module, name)

    def racing(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        act()
        return result

    monkeypatch.setattr(module, name, racing)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_file_replaced_before_its_lock_is_reopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NAME-HELD: a flushed write is in the named file, even if that came between opening and lock."""
    _image("a.vhd")
    _before_the_lock(monkeypatch, "a.vhd", lambda: _replace("a.vhd"))
    with vhdkit.open_disk("a.vhd", writable=True) as disk:
        assert disk.read(0, 512) == NEW
        disk.write(0, b"mine" * 128)
    assert _first("a.vhd") == b"mine" * 128


def test_a_file_removed_before_its_lock_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data is written to a file without a name."""
    _image("a.vhd")
    _before_the_lock(monkeypatch, "a.vhd", lambda: os.unlink("a.vhd"))
    with pytest.raises(vhdkit.NotFound):
        vhdkit.open_disk("a.vhd", writable=True)


def test_a_name_that_keeps_changing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening is retried a bounded number of times, and then the error says what happens."""
    _image("a.vhd")
    _before_the_lock(monkeypatch, "a.vhd", lambda: _replace("a.vhd"), 1000)
    with pytest.raises(vhdkit.Replaced, match=r"a\.vhd: was moved, removed or replaced"):
        vhdkit.open_disk("a.vhd", writable=True)


def test_a_replaced_parent_is_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain is reopened if a file below its leaf was replaced, here by a copy of itself."""
    _image("base.vhd")
    vhdkit.create_child("leaf.avhd", "base.vhd")

    def copied() -> None:
        shutil.copy("base.vhd", "copy")
        os.replace("copy", "base.vhd")

    _before_the_lock(monkeypatch, "base.vhd", copied)
    with vhdkit.open_disk("leaf.avhd", writable=True) as disk:
        parent = disk.chain.layers[1].store
        assert isinstance(parent, FileStore) and parent.still_named()


VERBS: dict[str, Callable[[], object]] = {
    "resize": lambda: vhdkit.resize("a.vhd", 2 * SIZE),
    "compact": lambda: vhdkit.compact("a.vhd"),
    "repair": lambda: vhdkit.repair("a.vhd"),
    "check": lambda: vhdkit.check("a.vhd"),
    "snapshot": lambda: vhdkit.snapshot("a.vhd"),
    "clone": lambda: vhdkit.clone("a.vhd", ["c.avhd"]),
    "create_child": lambda: vhdkit.create_child("c.avhd", "a.vhd"),
    "relocate": lambda: vhdkit.relocate("a.vhd", "to"),
    "convert": lambda: vhdkit.convert("a.vhd", "c.vhd", vhdkit.DiskFormat.DYNAMIC),
    "replace": lambda: vhdkit.create_image("a.vhd", SIZE, replace=True),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_holds_the_file_that_has_the_name(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb works on the image under the name, or on none."""
    _image("a.vhd")
    os.mkdir("to")
    _before_the_lock(monkeypatch, "a.vhd", lambda: _replace("a.vhd"))
    VERBS[verb]()
    children = [name for name in ("a.avhd", "c.avhd", "c.vhd") if os.path.exists(name)]
    place = "to/a.vhd" if verb == "relocate" else "a.vhd"
    assert _first(place) == (bytes(512) if verb == "replace" else NEW)
    for child in children:
        assert _first(child) == NEW
    if verb == "resize":
        with vhdkit.open_disk("a.vhd") as disk:
            assert disk.size_bytes == 2 * SIZE


def test_a_file_is_replaced_only_if_it_is_the_one_that_was_held() -> None:
    """`--force` replaces the file that it checked; one that came meanwhile stays, and no partial file is left."""
    _image("a.vhd")
    with FileStore.open_held("a.vhd") as old, NewFile("a.vhd", replace=True, old=old) as new:
        _replace("a.vhd")
        with pytest.raises(vhdkit.Replaced):
            new.commit()
    assert _first("a.vhd") == NEW
    with NewFile("b.vhd", replace=True) as new:
        _image("b.vhd", NEW)
        with pytest.raises(vhdkit.AlreadyExists):
            new.commit()
    assert _first("b.vhd") == NEW and list(parts(".")) == []


def test_a_new_file_removed_before_its_lock_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gc` may take a file under construction for an abandoned one until it is locked."""

    def clear() -> None:
        for path in parts("."):
            os.unlink(path)

    _before_the_lock(monkeypatch, "a.vhd", clear)
    vhdkit.create_image("a.vhd", SIZE)
    assert _first("a.vhd") == bytes(512)


def test_gc_searches_children_while_it_holds_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NAME-HELD: a child that is made after the first search and before the lock keeps its parent."""
    _image("keep.vhd")
    _image("base.vhd")
    _after(monkeypatch, garbage, "_doomed", lambda: vhdkit.create_child("child.avhd", "base.vhd"))
    [item] = vhdkit.collect_garbage(".", ["keep.vhd"], delete=True)
    assert not item.removed and item.kept is not None and "child.avhd" in item.kept
    assert _first("child.avhd") == OLD


def test_gc_keeps_a_leaf_that_was_replaced_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NAME-HELD: the leaf to keep is the file that has the name at the time of removal."""
    _image("keep.vhd")
    _after(monkeypatch, garbage, "_reached", lambda: _replace("keep.vhd"))
    [item] = vhdkit.collect_garbage(".", ["keep.vhd"], delete=True)
    assert not item.removed and _first("keep.vhd") == NEW


def _moved_away() -> None:
    os.rename("a.vhd", "moved.vhd")


@pytest.mark.parametrize("act", [lambda: _replace("a.vhd"), _moved_away, lambda: os.unlink("a.vhd")])
@pytest.mark.parametrize("moment", ["before", "prepared"])
def test_a_changed_name_gets_no_child(act: Callable[[], None], moment: str) -> None:
    """INV-NAME-HELD: a live snapshot of a replaced or moved image makes no child, and the disk stays usable."""
    _image("a.vhd")
    with Chain.open("a.vhd", writable=True) as chain:
        if moment == "before":
            act()
            with pytest.raises(vhdkit.Replaced), freezing([(chain, "new.avhd")]):
                pass
        else:
            with freezing([(chain, "new.avhd")]) as prepared:
                act()
                with pytest.raises(vhdkit.Replaced):
                    prepared.freeze()
        assert not os.path.exists("new.avhd")
        chain.write(0, memoryview(b"more" * 128))
        chain.flush()


def test_a_moved_folder_is_noticed() -> None:
    """The same if the folder was moved, and another one took its place."""
    os.mkdir("vm")
    _image("vm/a.vhd")
    with Chain.open("vm/a.vhd", writable=True) as chain:
        os.rename("vm", "saved")
        os.mkdir("vm")
        _image("vm/a.vhd", NEW)
        with pytest.raises(vhdkit.Replaced), freezing([(chain, None)]):
            pass
    assert os.listdir("vm") == ["a.vhd"]


def test_an_offline_snapshot_checks_again_before_naming(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf that is moved while its child is written gets no child under its old name."""
    _image("a.vhd")
    _after(monkeypatch, snapshot, "write_child", lambda: _replace("a.vhd"))
    with pytest.raises(vhdkit.Replaced):
        vhdkit.snapshot("a.vhd")
    assert not os.path.exists("a.avhd") and list(parts(".")) == []


def _chain_of_three() -> None:
    _image("base.vhd")
    vhdkit.create_child("middle.avhd", "base.vhd")
    vhdkit.create_child("leaf.avhd", "middle.avhd")
    with vhdkit.open_disk("leaf.avhd", writable=True) as disk:
        disk.write(0, b"leaf" * 128)


def test_a_merge_removes_no_other_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NAME-HELD: a source that is replaced while a merge copies is kept, and `--resume` keeps it, too."""
    _chain_of_three()
    _after(monkeypatch, merge_steps, "fold", lambda: _replace("leaf.avhd"))
    with pytest.raises(vhdkit.Replaced):
        vhdkit.merge("leaf.avhd", into="base.vhd")
    assert _first("leaf.avhd") == NEW and os.path.exists("middle.avhd")


@pytest.mark.parametrize("name", ["leaf.avhd", "middle.avhd", "base.vhd"])
def test_a_live_merge_of_a_replaced_layer_is_refused(name: str) -> None:
    """INV-NAME-HELD: before it begins, and before files change; the disk stays as it was."""
    _chain_of_three()
    with Chain.open("leaf.avhd", writable=True) as chain:
        with live_merge(chain, 1, 2) as merging:
            merging.copy()
            _replace(name)
            again, problem = merging.exchange()
            assert again is chain and isinstance(problem, vhdkit.Replaced)
        with pytest.raises(vhdkit.Replaced), live_merge(chain, 1, 2):
            pass
        buffer = bytearray(512)
        chain.read_into(0, memoryview(buffer))
        assert buffer == b"leaf" * 128
    assert _first(name) == NEW


def test_relocation_removes_no_other_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is replaced while its chain moves keeps its old name."""
    _image("a.vhd")
    os.mkdir("to")
    _after(monkeypatch, relocate, "_check_new", lambda: _replace("a.vhd"))
    with pytest.raises(vhdkit.Replaced):
        vhdkit.relocate("a.vhd", "to")
    assert _first("a.vhd") == NEW


def test_rebase_records_the_parent_that_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NAME-HELD: a parent that is replaced before its names are written is refused."""
    _image("base.vhd")
    vhdkit.create_child("leaf.avhd", "base.vhd")
    _after(monkeypatch, rebase, "names_of", lambda: _replace("base.vhd"))
    with pytest.raises(vhdkit.Replaced):
        vhdkit.rebase("leaf.avhd", "base.vhd")


def test_following_ends_at_the_named_images_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NAME-HELD: if the newest image is replaced before it is opened, the line is followed again."""
    _image("base.vhd")
    vhdkit.create_child("leaf.avhd", "base.vhd")
    _before_the_lock(monkeypatch, "leaf.avhd", lambda: _replace("leaf.avhd"))
    open_mode = OpenMode(OpenOptions(), follow_leaf=True)
    [export] = open_exports([ExportRequest("base.vhd")], open_mode)
    assert export.disk.path == "base.vhd"
    export.disk.close()


def test_an_undo_log_is_not_written_beside_another_file() -> None:
    """A change that needs a log is refused if the image has lost its name: the log would apply to another file."""
    vhdkit.create_image("a.vhd", SIZE, disk_format=vhdkit.DiskFormat.FIXED)
    with FileStore.open_held("a.vhd", writable=True) as store:
        _replace("a.vhd")
        with pytest.raises(errors.Replaced):
            pending.change(store, [(0, b"x" * 512)])
    assert os.listdir(".") == ["a.vhd"]
