# SPDX-License-Identifier: Apache-2.0
"""Saves a disk that belongs to no machine: an image file, alone.

Decides under which name it is in a repository, which layer of its chain is saved, and what becomes of layers that a
backup froze. Must not know how a night is written (`night`), nor servers.

A disk is called by the name of its file, or as the user says, and is a machine with one disk in the repository. Each
night records the path that was given, and another path under the same name is refused: two disks would share a line.

    without a reference   the image is held as by a reader while it is saved, and its content is compared each night
    with one              the image is frozen: writes go on in a new child, whose name is another one. The frozen layer
                          is saved and marked, and merged into the one of the night before

So the name of the newest image changes with a reference. When the older name is given again, its newest descendant is
saved if the image is marked for this repository; an image with children and without a mark is refused, because it is
not the disk's present state.

Layers that a user froze are never merged: only those whose mark of this disk names the child that stands on them, and
which a backup made to freeze them. So an image that a backup marked, and was killed before it froze it, is the user's
when the user freezes it. A mark that names no night of the repository says that a backup froze the layer, and ended
before its night existed: an image is marked before the child has its name, and a served disk, which is being written
to, right after the freeze. The next night merges such layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from vhdkit import errors
from vhdkit.arguments import AnyPath, checked
from vhdkit.backup.clock import zone_here
from vhdkit.backup.manifest import Consistency, Manifest
from vhdkit.backup.names import is_machine_name, new_unique_id
from vhdkit.backup.night import Circumstances, FrozenDisk, Stages, Wishes, Writing, no_stages, writing
from vhdkit.backup.repository import Night, Repository, create_repository
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.family import chain_paths, find_children
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending, references
from vhdkit.chain.verbs.merge import merge
from vhdkit.chain.verbs.merge_parts import file_of_layer
from vhdkit.chain.verbs.newest import newest_leaf
from vhdkit.chain.verbs.snapshot import snapshot_noted
from vhdkit.folder import real_path
from vhdkit.store import FileStore

DISK = "disk"  # the only disk of such a machine
_SOURCE = "source"  # the field of a manifest with the path
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SingleWishes:
    """What the user asks for; `name` is what the disk is called in the repository, None for the usual name.

    `tool` is what the manifest says about the program.
    """

    name: str | None = None
    keep_reference: bool = False
    keep_free_bytes: int = 0
    night: Wishes = field(default_factory=Wishes)
    tool: str = "vhdkit"


@dataclass(frozen=True, slots=True)
class SavedDisk:
    """A night that was written: the repository's path, the manifest, the newest image of the disk, and what was merged
    to make the chain short again, into which layer.
    """

    repository: str
    machine: str
    manifest: Manifest
    leaf: str
    merged_into: str | None = None


class Line(Protocol):
    """The chain of a disk whose newest image is `leaf`: how it is frozen and merged."""

    @property
    def leaf(self) -> str:
        """The newest image."""
        ...

    @property
    def source(self) -> str:
        """What identifies the disk from night to night."""
        ...

    @property
    def must_freeze(self) -> bool:
        """Whether the disk is written to, so that it must be frozen to be saved."""
        ...

    def freeze(self, note: Callable[[FileStore, bytes], None]) -> str:
        """Let writes go on in a new child; returns the frozen image. Where the disk is not written to, `note` is
        called first, with the image's file and the child's id.
        """
        ...

    def give_back(self, frozen: str) -> None:
        """Merge the newest image into the frozen one, which is the newest again."""
        ...

    def merge(self, frozen: str, into: str) -> None:
        """Merge the frozen layer, and those in between, into an older one; writes go on in the newest image."""
        ...


@dataclass(slots=True)
class ImageLine:
    """The chain of an image that no program has open for writing."""

    given: str
    leaf: str
    options: OpenOptions
    must_freeze: bool = False

    @property
    def source(self) -> str:
        """See `Line.source`: the path that was given."""
        return real_path(self.given)

    def freeze(self, note: Callable[[FileStore, bytes], None]) -> str:
        """See `Line.freeze`."""
        frozen, self.leaf = self.leaf, snapshot_noted(self.leaf, note, self.options)
        return frozen

    def give_back(self, frozen: str) -> None:
        """See `Line.give_back`."""
        merge(self.leaf, into=frozen, options=self.options)
        self.leaf = frozen

    def merge(self, frozen: str, into: str) -> None:
        """See `Line.merge`."""
        merge(frozen, into=into, relink_children=True, options=self.options)


@checked
def backup_image(
    image: AnyPath,
    repository: AnyPath,
    wishes: SingleWishes = SingleWishes(),
    *,
    as_it_is: bool = False,
    options: OpenOptions | None = None,
    stage: Stages | None = None,
) -> SavedDisk:
    """Save the disk of an image, with all its parents, as the next night of a repository, which is made if needed.

    With `as_it_is` an image that has children is saved itself. Raises ImageInUse if a program writes to the image,
    HasChildren, InvalidArgument, NoSpace, and what opening the image and the repository raises.
    """
    options = options or OpenOptions()
    given = os.fsdecode(image)
    chain_paths(given, options=options)  # nothing is made for an image that does not open
    with create_repository(repository) as opened:
        leaf = given if as_it_is else _newest(opened, given, options)
        name = wishes.name or os.path.splitext(os.path.basename(given))[0]
        try:
            return save_line(ImageLine(given, leaf, options), opened, name, wishes, options, stage)
        except errors.ImageInUse as error:
            if error.path == leaf:
                error.hint = "if a vhdkit server writes to it: vhdkit backup run --control SOCKET REPO"
            raise


def _newest(repository: Repository, image: str, options: OpenOptions) -> str:
    """The image that holds the present state of the disk: itself, or the newest descendant of one that is marked."""
    children = find_children([image], everywhere=True, options=options)[image]
    if not children:
        return image
    if any(one.night.repository == repository.id for one in references.marks_at(image)):
        return newest_leaf(image, options)
    raise errors.HasChildren(
        f"is the parent of {errors.printable(children[0])}, so it is not the newest state of a disk",
        path=image,
        hint="name the newest image; to save this one as it is, add --as-it-is (as_it_is=True in the library)",
    )


def save_line(
    line: Line,
    repository: Repository,
    name: str,
    wishes: SingleWishes,
    options: OpenOptions,
    stage: Stages | None = None,
) -> SavedDisk:
    """Write the next night of a disk. After an error the disk goes on in the image in which it was before.

    Raises what `night.save` and freezing raise, and InvalidArgument for another disk under a name that is taken.
    """
    if not is_machine_name(name):
        raise errors.InvalidArgument(
            f"{errors.printable(name)!r} cannot be a name in a repository", hint="give it another one with --as NAME"
        )
    with writing(repository, _machine_id(repository, name), name, wishes.night) as night:
        if wishes.name is None:
            _refuse_other_source(night.nights, line.source, name)
        with Chain.open(line.leaf, options=replace(options, lock=False)) as chain:
            night.require_space([FrozenDisk(DISK, chain)], wishes.keep_free_bytes)
        freezes = wishes.keep_reference or line.must_freeze
        frozen = _frozen(line, night, options) if freezes else line.leaf
        try:
            child = _id_at(line.leaf) if freezes else None
            if line.must_freeze and child is not None:
                with contextlib.suppress(errors.VhdkitError), Chain.open(frozen, options=options) as chain:
                    _mark_attempt(file_of_layer(chain.leaf), child, night)
            manifest, older = _saved(night, frozen, child, line.source, wishes, options, stage)
        except BaseException:  # Ctrl-C too
            if freezes:
                with contextlib.suppress(errors.VhdkitError):  # then the next night saves both layers
                    line.give_back(frozen)
            raise
        try:
            if freezes and not wishes.keep_reference:
                line.give_back(older or frozen)
                older = None
            elif older is not None:
                line.merge(frozen, older)
        except errors.VhdkitError as error:  # the night exists: this is housekeeping, which a later night repeats
            _log.warning("%s@%d is saved, but layers were not merged afterwards: %s", name, manifest.night, error)
            older = None
        return SavedDisk(repository.path, name, manifest, line.leaf, older)


def _saved(
    night: Writing, frozen: str, child: str | None, source: str, wishes: SingleWishes, options: OpenOptions,
    stage: Stages | None,
) -> tuple[Manifest, str | None]:  # fmt: skip
    """Write the night; its manifest, and the layer into which what a backup froze can be merged now."""
    taken = datetime.now(UTC)
    zone, offset = zone_here(taken)
    facts = Circumstances(taken, zone, offset, wishes.tool, Consistency.CRASH, others={_SOURCE: source})
    with Chain.open(frozen, options=options) as chain:
        disk = FrozenDisk(DISK, chain, keeps_layer=wishes.keep_reference, child=child)
        manifest = night.save([disk], facts, stage=stage or no_stages)
        older = _mergeable(chain, night, is_kept=wishes.keep_reference)
    return manifest, older


def _frozen(line: Line, night: Writing, options: OpenOptions) -> str:
    """Freeze the disk; returns the frozen image, which a later night recognises as the work of a backup."""
    if line.must_freeze:
        return line.freeze(lambda file, child: None)
    leaf = line.leaf
    try:
        return line.freeze(lambda file, child: _mark_attempt(file, child.hex(), night))
    except BaseException:
        with contextlib.suppress(errors.VhdkitError), Chain.open(leaf, options=options) as chain:
            references.unmark(file_of_layer(chain.leaf), *night.place_of(DISK))
        raise


def _mark_attempt(file: FileStore, child: str, night: Writing) -> None:
    """Mark an image as the work of a backup, which freezes it by making this child.

    Unless the image has a mark of this disk already, the mark names a night that will never exist, so no night is
    saved against it. Where no mark can be written, a kill leaves a layer that only a user can merge.
    """
    with contextlib.suppress(errors.VhdkitError):
        attempt = references.SavedNight(*night.place_of(DISK), night.number, new_unique_id())
        before = next(iter(_marks_here(file, night)), attempt)
        references.mark(file, replace(before, child=child))


def _id_at(image: str) -> str:
    """The id that an image keeps as long as it exists. Raises IoFailed."""
    with FileStore.open(image) as store:
        return pending.id_of(pending.view(store)).hex()


def _marks_here(file: FileStore, night: Writing) -> list[references.SavedNight]:
    """The marks of this disk beside an image."""
    return [one.night for one in references.marks_of(file) if one.night.place == night.place_of(DISK)]


def _mergeable(chain: Chain, night: Writing, *, is_kept: bool) -> str | None:
    """The layer into which the frozen one can be merged; None if there is none.

    All layers above it were frozen by a backup of this disk: the one on top, and those of nights that failed. It is
    the first one of an earlier night, or the lowest one of a night that failed. What an earlier night keeps as its
    reference stays if this one keeps none.
    """
    known = {one.manifest.id for one in night.nights if one.manifest is not None}
    found = None
    for above, layer in itertools.pairwise(chain.layers):
        file, child = file_of_layer(layer), pending.id_of(above.store).hex()
        ours = [one for one in _marks_here(file, night) if one.child == child]
        if not ours or (not is_kept and any(one.night_id in known for one in ours)):
            break
        found = real_path(file.name)
        if any(one.night_id in known for one in ours):
            break
    return found


def _machine_id(repository: Repository, name: str) -> str:
    """The machine of this name, or the id of a new one: two first nights at the same time get the same."""
    try:
        return repository.find_machine(name)
    except errors.NotFound:
        return hashlib.sha256(f"{repository.id} {name}".encode()).hexdigest()[:32]


def _refuse_other_source(nights: Sequence[Night], source: str, name: str) -> None:
    """Raise InvalidArgument if the nights under this name are of another disk."""
    for one in reversed(nights):
        if one.manifest is not None and one.manifest.others.get(_SOURCE) not in (None, source):
            found = errors.printable(str(one.manifest.others[_SOURCE]))
            raise errors.InvalidArgument(
                f"the repository has nights of {found} under the name {name}",
                path=source,
                hint=f"add --as with another name; or --as {errors.quoted(name)} to go on with those nights",
            )
        if one.manifest is not None:
            return
