# SPDX-License-Identifier: Apache-2.0
"""Every record of a machine, with any content: a verb works or says what is damaged, and nothing is removed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.vmm.conftest import machines as machines  # the fixture
from tests.vmm.snapshots.machines import Machines
from vmm.model.errors import VmmError
from vmm.store import registry
from vmm.store.state import SupervisorNote, WorkerNote

manager = vmm.Manager()
VERBS: list[Callable[[Path], object]] = [
    lambda here: manager.show("web"),
    lambda here: manager.machines(),
    lambda here: manager.disks("web"),
    lambda here: manager.set("web", notes="x"),
    lambda here: manager.snapshots("web").tree(),
    lambda here: manager.snapshots("web").merging(),
    lambda here: manager.snapshots("web").delete("a"),
    lambda here: manager.repair("web"),
    lambda here: manager.discard_saved("web"),
    lambda here: manager.events("web"),
    lambda here: manager.save_night("web", str(here / "copy")),
    lambda here: manager.delete("web", with_disks=True),
]
RECORDS = (
    "machine.json", "snapshots.json", "backup.json", "merging.json", "saved/state.json", "saved/disks.json",
    "events.jsonl", "unclean", "was-running", "RUN/state.json", "RUN/keeper.json", "RUN/running.json",
)  # fmt: skip


def shapes(record: Path) -> Iterator[bytes]:
    """Malformed content: other types at every place of it, and text that is not JSON."""
    yield from (b"", b"\xff\xfe", b"[" * 5000, b"7", b'"x"', b"null", b"[]", b"{}", b'{"x": 1}')
    with contextlib.suppress(OSError, ValueError):
        document = json.loads(record.read_bytes())
        ways = list(places(document))
        for number, place in enumerate(ways[:: max(1, len(ways) // 20)]):
            values: tuple[object, ...] = (7, "x", None, [], {}, -1.5, True, float("inf"), "/etc/../x")
            for value in (values[number % len(values)], values[(number + 3) % len(values)]):
                yield json.dumps(changed(document, place, value)).encode()


def places(document: object, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value of a document."""
    if way:
        yield way
    if isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*way, key))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from places(value, (*way, number))


def changed(document: Any, way: tuple[Any, ...], value: object) -> Any:
    """The document with another value there."""
    copy = json.loads(json.dumps(document))
    place = copy
    for step in way[:-1]:
        place = place[step]
    place[way[-1]] = value
    return copy


@pytest.mark.parametrize("name", RECORDS)
def test_any_shape_is_a_typed_error(machines: Machines, name: str) -> None:
    """INV-PROVEN-OURS: whatever a record contains, a verb works or fails with an error of vmm's, and nothing is
    removed."""
    machines.create().create("a")
    machine = registry.load("web")
    runtime = Path(machine.runtime.folder)
    precious = machines.folder / "precious.vhd"
    precious.write_bytes(b"precious")
    record = runtime / name[4:] if name.startswith("RUN/") else Path(machine.paths.folder, name)
    original = record.read_bytes() if record.exists() else None
    everything = {path: path.read_bytes() for path in Path(machine.paths.folder).rglob("*") if path.is_file()}
    for number, content in enumerate(shapes(record)):
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        record.write_bytes(content)
        for verb in [VERBS[number % len(VERBS)], VERBS[(number + 5) % len(VERBS)]]:
            with contextlib.suppress(VmmError):
                verb(machines.folder)
        WorkerNote.read(machine.runtime)
        SupervisorNote.read(machine.runtime)
        assert precious.read_bytes() == b"precious"
        for path, kept in everything.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kept)
        if original is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(record)
        else:
            record.write_bytes(original)
