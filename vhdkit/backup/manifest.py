# SPDX-License-Identifier: Apache-2.0
"""The manifest of a night: which images, with which content, make up a machine as it was at one moment.

Decides the fields of a manifest, which values they may have, and how it is written. A night exists if and only if its
manifest does. Must not know how images are made, nor where the repository is.

A disk's record names the image that holds its content, by place, id and the root of its sums. The image may be that of
an earlier night: an unchanged disk makes none (`how` is "same"). `parent_image` is the next image of the chain, which
another manifest of the machine, or a record of a shared base, describes in the same way.

`id` identifies the night forever: numbers belong to one copy of a repository, and two copies that are both written to
use a number for different nights. A prune keeps the id. With `dropped` it is no longer a night that can be restored;
its manifest stays because other nights stand on its images.

A manifest is untrusted input (`documents`); every place is confined to the machine's folder and the shared bases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from enum import StrEnum
from typing import Any

from vhdkit.backup.documents import (
    DamagedRepository,
    Fields,
    encoded,
    offset_word,
    parsed,
    time_word,
)
from vhdkit.backup.names import (
    MAX_NIGHT,
    ImagePlace,
    is_machine_name,
    is_name,
    is_unique_id,
)
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH

FORMAT = 1
MAX_DISKS = 1024  # of one machine; Hyper-V's limit is 260
MAX_FILES = 1024  # beside the disks
MAX_BASES = MAX_CHAIN_DEPTH
MAX_WARNINGS = 1000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_IMAGE_ID = re.compile(r"[0-9a-f]{32}")
_ZONE = re.compile(r"[A-Za-z0-9_+/-]{1,64}")


class Consistency(StrEnum):
    """What a night is worth to the guest that starts from it."""

    AGENT = "agent"  # the guest's file systems were frozen
    CRASH = "crash"  # as after a power cut
    OFF_CLEAN = "off-clean"  # the machine had shut down
    OFF_UNCLEAN = "off-unclean"  # it was off because it had died: no better than `crash`


class How(StrEnum):
    """How the content of a disk was found."""

    FULL = "full"  # everything was copied
    LAYERS = "layers"  # what the layers above the reference own
    COMPARED = "compared"  # what differs from the night before
    SAME = "same"  # nothing has changed, and no image was made


@dataclass(frozen=True, slots=True)
class Frozen:
    """The layer of the source that reads as this night did: its image's id, its size and its modification time."""

    image_id: str
    size_bytes: int
    modified_ns: int

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"id": self.image_id, "size": self.size_bytes, "mtime_ns": self.modified_ns}


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """One disk of a night. Sizes are bytes. `image_id` is the id by which children know the image, as hexadecimal
    digits; all zeros for a raw image, which has none.

    `disk_id` names its folder. `slot` says where the machine has it, `serial` is what the guest sees, each empty if
    unknown. `file_size_bytes` and `sums_root` describe the whole file `image`; `data_bytes` is what it takes.
    `reference_night` is the night whose content an increment stands on. `raw_size_bytes` is the length of a raw disk's
    file, which need not be whole sectors; None for other disks.
    """

    disk_id: str
    image: ImagePlace
    image_id: str
    parent_image: ImagePlace | None
    virtual_size_bytes: int
    file_size_bytes: int
    data_bytes: int
    sums_root: str
    how: How
    slot: str = ""
    serial: str = ""
    reference_night: int | None = None
    frozen: Frozen | None = None
    raw_size_bytes: int | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.others,
            **({} if self.raw_size_bytes is None else {"raw_size": self.raw_size_bytes}),
            "id": self.disk_id,
            "slot": self.slot,
            "serial": self.serial,
            "image": self.image.text,
            "image_id": self.image_id,
            "parent_image": None if self.parent_image is None else self.parent_image.text,
            "virtual_size": self.virtual_size_bytes,
            "file_size": self.file_size_bytes,
            "data_bytes": self.data_bytes,
            "sums_root": self.sums_root,
            "how": self.how.value,
            "reference_night": self.reference_night,
            "frozen": None if self.frozen is None else self.frozen.document(),
        }


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Another file of a night, in its `meta` folder: a definition, firmware variables, memory."""

    name: str
    size_bytes: int
    sha256: str

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"name": self.name, "size": self.size_bytes, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """A shared base on which disks of the night stand: as a disk's image is described."""

    image: ImagePlace
    image_id: str
    parent_image: ImagePlace | None
    file_size_bytes: int
    sums_root: str

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "image": self.image.text,
            "image_id": self.image_id,
            "parent_image": None if self.parent_image is None else self.parent_image.text,
            "file_size": self.file_size_bytes,
            "sums_root": self.sums_root,
        }


@dataclass(frozen=True, slots=True)
class Manifest:
    """A night. `taken` and `finished` are UTC; `zone` and `utc_offset` say how clocks showed `taken` where it was.

    `previous` is the number of the night before it when it was written. `snapshots` are facts about the machine's
    snapshots, for people. `others` are fields of a newer program.
    """

    repository: str
    machine_id: str
    machine_name: str
    night: int
    id: str
    previous: int | None
    taken: datetime
    zone: str
    utc_offset: timedelta
    finished: datetime
    tool: str
    consistency: Consistency
    disks: tuple[DiskRecord, ...]
    files: tuple[FileRecord, ...] = ()
    bases: tuple[BaseRecord, ...] = ()
    snapshots: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    protected: bool = False
    dropped: bool = False
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def local_time(self) -> datetime:
        """When it was taken, as the clocks showed it there."""
        return self.taken.astimezone(timezone(self.utc_offset))

    def disk(self, disk_id: str) -> DiskRecord | None:
        """The record of a disk."""
        return next((one for one in self.disks if one.disk_id == disk_id), None)

    def encoded(self) -> bytes:
        """The file of the manifest."""
        return encoded({
            **self.others,
            "format": FORMAT,
            "repository": self.repository,
            "machine": {"id": self.machine_id, "name": self.machine_name},
            "night": self.night,
            "id": self.id,
            "previous": self.previous,
            "taken": time_word(self.taken),
            "zone": self.zone,
            "utc_offset": offset_word(self.utc_offset),
            "finished": time_word(self.finished),
            "tool": self.tool,
            "consistency": self.consistency.value,
            "disks": [one.document() for one in self.disks],
            "files": [one.document() for one in self.files],
            "bases": [one.document() for one in self.bases],
            "snapshots": list(self.snapshots),
            "warnings": list(self.warnings),
            "protected": self.protected,
            "dropped": self.dropped,
        })  # fmt: skip

    def with_disks(self, disks: Iterable[DiskRecord]) -> Manifest:
        """The same night with other records of its disks."""
        return replace(self, disks=tuple(disks))


def parse_manifest(raw: bytes, path: str, *, repository: str, machine_id: str, night: int) -> Manifest:
    """The manifest in the file `path`, which lies in this repository, among this machine's, as that night's.

    Raises DamagedRepository, also if it belongs elsewhere, and UnsupportedFormat.
    """
    fields = parsed(raw, path, formats=(FORMAT,))
    machine = fields.object("machine")
    manifest = Manifest(
        repository=fields.taken("repository", is_unique_id),
        machine_id=machine.taken("id", is_name),
        machine_name=machine.taken("name", is_machine_name),
        night=fields.number("night", 1, MAX_NIGHT),
        id=fields.taken("id", is_unique_id),
        previous=fields.optional_number("previous", 1, MAX_NIGHT),
        taken=fields.time("taken"),
        zone=fields.taken("zone", is_zone_word),
        utc_offset=fields.offset("utc_offset"),
        finished=fields.time("finished"),
        tool=fields.taken("tool", lambda _: True),
        consistency=fields.converted("consistency", Consistency),
        disks=tuple(_disk(one) for one in fields.objects("disks", MAX_DISKS)),
        files=tuple(_file(one) for one in fields.objects("files", MAX_FILES)),
        bases=tuple(_base(one) for one in fields.objects("bases", MAX_BASES)),
        snapshots=tuple(one.others for one in fields.objects("snapshots", MAX_FILES)),
        warnings=fields.texts("warnings", MAX_WARNINGS),
        protected=fields.flag("protected"),
        dropped=fields.flag("dropped"),
    )
    manifest = replace(manifest, others=fields.others)
    for name, found, expected in (
        ("repository", manifest.repository, repository),
        ("machine.id", manifest.machine_id, machine_id),
        ("night", manifest.night, night),
    ):
        if found != expected:
            raise DamagedRepository(
                f"is the manifest of another {name.partition('.')[0]}",
                path=path,
                expected=f"{name} {expected}",
                found=f"{name} {found}",
                hint="a repository is copied as a whole; single files of another one have no place in it",
            )
    _check_once(fields, manifest)
    return manifest


def is_zone_word(text: str) -> bool:
    """True for text that can be the name of a time zone; it is only looked up where the user names it."""
    return _ZONE.fullmatch(text) is not None


def _check_once(fields: Fields, manifest: Manifest) -> None:
    """Each disk, file and base is described once, and lies where its kind belongs."""
    for name, keys in (
        ("disks", [one.disk_id for one in manifest.disks]),
        ("files", [one.name for one in manifest.files]),
        ("bases", [one.image.text for one in manifest.bases]),
    ):
        if len(set(keys)) != len(keys):
            raise fields.damaged(name, "names one of them twice")
    if any(one.image.disk_id != one.disk_id for one in manifest.disks):
        raise fields.damaged("disks", "has an image outside the folder of its disk")
    if any(one.image.disk_id is not None for one in manifest.bases):
        raise fields.damaged("bases", "has an image outside the folder of bases")


def _disk(fields: Fields) -> DiskRecord:
    frozen = fields.optional_object("frozen")
    record = DiskRecord(
        disk_id=fields.taken("id", is_name),
        image=fields.converted("image", ImagePlace.of_text),
        image_id=fields.taken("image_id", _IMAGE_ID.fullmatch),
        parent_image=_parent(fields),
        virtual_size_bytes=fields.number("virtual_size"),
        file_size_bytes=fields.number("file_size"),
        data_bytes=fields.number("data_bytes"),
        sums_root=fields.taken("sums_root", _SHA256.fullmatch),
        how=fields.converted("how", How),
        slot=fields.taken("slot", lambda _: True),
        serial=fields.taken("serial", lambda _: True),
        reference_night=fields.optional_number("reference_night", 1, MAX_NIGHT),
        frozen=None if frozen is None else _frozen(frozen),
        raw_size_bytes=fields.optional_number("raw_size"),
    )
    if record.parent_image is not None and record.parent_image.disk_id not in (None, record.disk_id):
        raise fields.damaged("parent_image", "is an image of another disk")
    return replace(record, others=fields.others)


def _frozen(fields: Fields) -> Frozen:
    return Frozen(
        fields.taken("id", _IMAGE_ID.fullmatch), fields.number("size"), fields.number("mtime_ns", -(1 << 62))
    )


def _file(fields: Fields) -> FileRecord:
    return FileRecord(fields.taken("name", is_name), fields.number("size"), fields.taken("sha256", _SHA256.fullmatch))


def _base(fields: Fields) -> BaseRecord:
    record = BaseRecord(
        fields.converted("image", ImagePlace.of_text),
        fields.taken("image_id", _IMAGE_ID.fullmatch),
        _parent(fields),
        fields.number("file_size"),
        fields.taken("sums_root", _SHA256.fullmatch),
    )
    if record.parent_image is not None and record.parent_image.disk_id is not None:
        raise fields.damaged("parent_image", "is an image of a machine")
    return record


def _parent(fields: Fields) -> ImagePlace | None:
    if fields.optional("parent_image", bool) is None:
        return None
    return fields.converted("parent_image", ImagePlace.of_text)
