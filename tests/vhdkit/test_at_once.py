# SPDX-License-Identifier: Apache-2.0
"""Work that must not wait for a device: what it reads comes from memory, or it is given up."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vhdkit import store as store_module
from vhdkit.at_once import NotInMemory, is_required, required, taken
from vhdkit.store import FileStore


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """A file of two pages."""
    path = tmp_path / "file"
    path.write_bytes(b"a" * 4096 + b"b" * 4096)
    return FileStore.open(path)


def not_there(*arguments: object) -> int:
    """In place of preadv, for what is not in memory."""
    raise BlockingIOError


def test_reads_come_from_memory(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the block a read returns what is in memory, or names the place that it lacks; afterwards it waits."""
    with store:
        with required():
            assert is_required()
            assert store.pread(4090, 10) == b"a" * 6 + b"b" * 4
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "_preadv", not_there)
            with pytest.raises(NotInMemory) as caught, required():
                store.pread(4090, 10)
            assert caught.value.file is store and caught.value.offset_bytes == 4099
            assert not is_required() and store.pread(4090, 10) == b"a" * 6 + b"b" * 4
        with pytest.raises(NotInMemory), required():
            store.pread(8000, 1000)  # where the file ends may change: that is for a read that may wait


def test_other_threads_and_nested_blocks(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requirement is of one thread, and of the whole outer block."""
    monkeypatch.setattr(store_module, "_preadv", not_there)
    seen: list[bytes] = []
    with store, required():
        with required():
            pass
        assert is_required()
        thread = threading.Thread(target=lambda: seen.append(store.pread(0, 2)), daemon=True)
        thread.start()
        thread.join(30)
    assert seen == [b"aa"]


def test_locks_are_not_waited_for() -> None:
    """A lock that is held elsewhere ends the work; a free one is held in the block and released after it."""
    lock = threading.Lock()
    with taken(lock):
        assert lock.locked()
        with pytest.raises(NotInMemory) as caught, required(), taken(lock):
            pass
        assert caught.value.file is None
    with pytest.raises(ValueError, match="any"), required(), taken(lock):
        assert lock.locked()
        raise ValueError("any")
    assert not lock.locked()
