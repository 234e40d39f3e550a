# SPDX-License-Identifier: Apache-2.0
"""Manifests are written and read unchanged, and every wrong value is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vhdkit.backup.repositories import MACHINE, disk_record, manifest
from vhdkit import errors
from vhdkit.backup.documents import DamagedRepository, encoded
from vhdkit.backup.manifest import (
    MAX_DISKS,
    BaseRecord,
    Consistency,
    DiskRecord,
    FileRecord,
    Frozen,
    How,
    Manifest,
    parse_manifest,
)
from vhdkit.backup.names import ImagePlace

REPOSITORY = "ab" * 16
hexes = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
sums = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
words = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(
    lambda one: not one.endswith(".sums")
)
sizes = st.integers(0, 1 << 60)
times = st.datetimes(datetime(1970, 1, 1), datetime(9998, 12, 31)).map(
    lambda one: one.replace(microsecond=0, tzinfo=UTC)
)


@st.composite
def disks(draw: st.DrawFn, disk_id: str) -> DiskRecord:
    """Any record of a disk."""
    return DiskRecord(
        disk_id=disk_id,
        image=ImagePlace(disk_id, draw(words)),
        image_id=draw(hexes),
        parent_image=draw(st.none() | st.builds(ImagePlace, st.sampled_from([disk_id, None]), words)),
        virtual_size_bytes=draw(sizes),
        file_size_bytes=draw(sizes),
        data_bytes=draw(sizes),
        sums_root=draw(sums),
        how=draw(st.sampled_from(How)),
        slot=draw(st.text(max_size=20)),
        serial=draw(st.text(max_size=20)),
        reference_night=draw(st.none() | st.integers(1, 99999)),
        frozen=draw(st.none() | st.builds(Frozen, hexes, sizes, st.integers(-(1 << 61), 1 << 61))),
        others=draw(st.dictionaries(st.just("newer"), st.integers(), max_size=1)),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest."""
    ids = draw(st.lists(words, max_size=3, unique=True))
    return Manifest(
        repository=REPOSITORY,
        machine_id=MACHINE,
        machine_name=draw(st.sampled_from(["web", "prune", "a b"])),
        night=7,
        id=draw(hexes),
        previous=draw(st.none() | st.integers(1, 6)),
        taken=draw(times),
        zone=draw(st.sampled_from(["UTC", "Europe/Berlin", "Etc/GMT+5"])),
        utc_offset=timedelta(seconds=draw(st.integers(-86399, 86399))),
        finished=draw(times),
        tool=draw(st.text(max_size=20)),
        consistency=draw(st.sampled_from(Consistency)),
        disks=tuple(draw(disks(one)) for one in ids),
        files=tuple(
            FileRecord(one, draw(sizes), draw(sums)) for one in draw(st.lists(words, max_size=2, unique=True))
        ),
        bases=tuple(
            BaseRecord(ImagePlace(None, one), draw(hexes), None, draw(sizes), draw(sums))
            for one in draw(st.lists(words, max_size=2, unique=True))
        ),
        warnings=tuple(draw(st.lists(st.text(max_size=20), max_size=2))),
        snapshots=tuple(draw(st.lists(st.dictionaries(st.text(max_size=5), st.integers(), max_size=2), max_size=2))),
        protected=draw(st.booleans()),
        dropped=draw(st.booleans()),
        others=draw(st.dictionaries(st.just("later"), st.integers(), max_size=1)),
    )


def read(raw: bytes, night: int = 7) -> Manifest:
    """The manifest in these bytes."""
    return parse_manifest(raw, "00007.json", repository=REPOSITORY, machine_id=MACHINE, night=night)


@given(manifests())
def test_a_manifest_is_read_as_it_was_written(made: Manifest) -> None:
    """Every field, known or not, survives being written and read."""
    assert read(made.encoded()) == made


LEGAL = manifest(7, disks=(disk_record(),), files=(FileRecord("definition.json", 3, "00" * 32),))
WRONG: list[tuple[str, Any]] = [
    ("repository", "cd" * 16),
    ("repository", None),
    ("night", 8),
    ("night", 7.0),
    ("night", True),
    ("id", "x"),
    ("machine", {"id": "other", "name": "web"}),
    ("machine", {"id": MACHINE, "name": "../web"}),
    ("machine", []),
    ("taken", "2026-13-01T00:00:00Z"),
    ("taken", 1),
    ("zone", "../../etc/passwd\0"),
    ("zone", "x" * 65),
    ("utc_offset", "+99:00"),
    ("consistency", "perfect"),
    ("disks", {}),
    ("disks", [1]),
    ("disks", [{}] * (MAX_DISKS + 1)),
    ("files", [{"name": "../x", "size": 1, "sha256": "00" * 32}]),
    ("files", [{"name": "x", "size": -1, "sha256": "00" * 32}]),
    ("files", [{"name": "x", "size": 1, "sha256": "00"}]),
    ("files", [{"name": "x", "size": 1, "sha256": "00" * 32}] * 2),
    ("warnings", "text"),
    ("warnings", ["x" * 1001]),
    ("protected", 1),
    ("dropped", "yes"),
    ("previous", 0),
]
WRONG_DISK: list[tuple[str, Any]] = [
    ("id", "../disk"),
    ("image", "images/other/00001.vhd"),
    ("image", "bases/00001.vhd"),
    ("image", "/etc/passwd"),
    ("image", "images/disk-0/../../x.vhd"),
    ("image", None),
    ("image_id", "AB" * 16),
    ("image_id", 5),
    ("parent_image", "images/other/00001.vhd"),
    ("parent_image", "../00001.vhd"),
    ("parent_image", 3),
    ("virtual_size", -1),
    ("virtual_size", 1 << 63),
    ("file_size", "1"),
    ("data_bytes", 0.5),
    ("sums_root", "00"),
    ("how", "magic"),
    ("slot", 7),
    ("reference_night", 0),
    ("frozen", 7),
    ("frozen", {"id": "x", "size": 1, "mtime_ns": 1}),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_field_is_refused(name: str, value: Any) -> None:
    """A manifest with any field of a wrong type, out of bounds, or from another place is damaged."""
    document = {**json.loads(LEGAL.encoded()), name: value}
    with pytest.raises(DamagedRepository) as caught:
        read(encoded(document))
    assert caught.value.path == "00007.json"


@pytest.mark.parametrize(("name", "value"), WRONG_DISK, ids=range(len(WRONG_DISK)))
def test_a_wrong_field_of_a_disk_is_refused(name: str, value: Any) -> None:
    """An image outside its disk's folder, a place that leads elsewhere, or any other impossible value is damage."""
    document = json.loads(LEGAL.encoded())
    document["disks"][0][name] = value
    with pytest.raises(DamagedRepository):
        read(encoded(document))


@pytest.mark.parametrize("name", [*json.loads(LEGAL.encoded())])
def test_a_missing_field(name: str) -> None:
    """A manifest without a field that is always written is damaged; lists, flags and `previous` may be missing."""
    document = json.loads(LEGAL.encoded())
    del document[name]
    optional = {"previous", "disks", "files", "bases", "snapshots", "warnings", "protected", "dropped", "digest"}
    if name in optional:
        read(encoded(document))
    else:
        with pytest.raises((DamagedRepository, errors.UnsupportedFormat)):
            read(encoded(document))


def test_a_disk_is_described_once() -> None:
    """Two records of one disk contradict each other."""
    with pytest.raises(DamagedRepository, match="twice"):
        read(replace(LEGAL, disks=(disk_record(), disk_record())).encoded())


def test_local_time_is_that_of_the_place() -> None:
    """A night is shown with the time that the clocks showed when it was taken."""
    assert manifest(1).local_time.strftime("%H:%M %z") == "03:30 +0100"
