# SPDX-License-Identifier: Apache-2.0
"""The images of a machine as its manifests describe them: which stands on which, and which nights need which.

Decides when descriptions contradict each other, what the chain of an image is, and which nights a set of images
reaches. Pure: works on manifests, examines no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.manifest import BaseRecord, DiskRecord, Manifest
from vhdkit.backup.names import ImagePlace
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What the manifests say about one image's file."""

    place: ImagePlace
    image_id: str
    parent: ImagePlace | None
    file_size_bytes: int
    sums_root: str


def record_of(one: DiskRecord | BaseRecord) -> ImageRecord:
    """The part of a record that describes the file."""
    return ImageRecord(one.image, one.image_id, one.parent_image, one.file_size_bytes, one.sums_root)


def records_of(manifest: Manifest) -> list[ImageRecord]:
    """What a manifest says about images."""
    return [*map(record_of, manifest.disks), *map(record_of, manifest.bases)]


class Images:
    """Every image that these manifests describe. `contradictory` are described in different ways, other than those
    that something is `changing` at present.
    """

    def __init__(self, manifests: Iterable[Manifest], changing: Iterable[ImagePlace] = ()) -> None:
        self.manifests = tuple(manifests)
        self.records: dict[ImagePlace, ImageRecord] = {}
        contradictory: set[ImagePlace] = set()
        for manifest in self.manifests:
            for record in records_of(manifest):
                if self.records.setdefault(record.place, record) != record:
                    contradictory.add(record.place)
        self.changing = frozenset(changing)
        self.contradictory = frozenset(contradictory) - self.changing

    def chain(self, place: ImagePlace) -> tuple[ImageRecord, ...]:
        """The image and all below it, leaf first. Raises DamagedRepository if it does not end, or is unknown."""
        found: dict[ImagePlace, ImageRecord] = {}
        here: ImagePlace | None = place
        while here is not None:
            record = self.records.get(here)
            if record is None:
                raise DamagedRepository(f"needs {here.text}, which no manifest describes", path=place.text)
            if here in found:
                raise DamagedRepository(f"its chain is a loop: {here.text} stands on itself", path=place.text)
            found[here] = record
            if len(found) > MAX_CHAIN_DEPTH:
                raise DamagedRepository(f"its chain has more than {MAX_CHAIN_DEPTH} images", path=place.text)
            here = record.parent
        return tuple(found.values())

    def needed(self, manifests: Iterable[Manifest]) -> list[ImageRecord]:
        """Every image that these nights need, each once; an image comes after those below it. What is wrong with a
        chain is left to `reached`.
        """
        found: dict[ImagePlace, ImageRecord] = {}
        for manifest in manifests:
            for disk in manifest.disks:
                for record in reversed(self._known_chain(disk.image, found)):
                    found.setdefault(record.place, record)
        return list(found.values())

    def _known_chain(self, place: ImagePlace, known: dict[ImagePlace, ImageRecord]) -> list[ImageRecord]:
        """The chain of an image down to one that is known already, as far as it can be followed."""
        found: dict[ImagePlace, ImageRecord] = {}
        here: ImagePlace | None = place
        while here is not None and here not in known and here not in found and here in self.records:
            found[here] = self.records[here]
            here = self.records[here].parent
        return list(found.values())

    def reached(self, manifest: Manifest, damaged: dict[ImagePlace, str]) -> Iterator[str]:
        """What is wrong with the disks of a night, if these images are damaged; each problem once."""
        for disk in manifest.disks:
            try:
                chain = self.chain(disk.image)
            except DamagedRepository as error:
                yield f"disk {disk.disk_id}: {error.problem}"
                continue
            for record in chain:
                if record.place in damaged:
                    yield f"disk {disk.disk_id}: {record.place.text} {damaged[record.place]}"
                elif record.place in self.contradictory:
                    yield f"disk {disk.disk_id}: manifests contradict each other about {record.place.text}"

    def children(self) -> dict[ImagePlace, list[ImagePlace]]:
        """The images that stand on each image."""
        found: dict[ImagePlace, list[ImagePlace]] = {}
        for record in self.records.values():
            if record.parent is not None:
                found.setdefault(record.parent, []).append(record.place)
        return found
