# SPDX-License-Identifier: Apache-2.0
"""A machine's snapshot tree as a value: the snapshots, the images they stand on, and the machine's present position.

    base.vhd <- base_1.avhd <- base_3.avhd            images: each stands on the one to its left
      |            |              '-- the machine writes here ("now")
      |            '-- frozen by snapshot B
      '-- frozen by snapshot A                       tree: A <- B <- now

Decides what a snapshot is, how names are chosen and found, and what happens to the tree when a snapshot is taken,
deleted or applied. An image that a snapshot froze is never written again, so a snapshot's disks are the paths of such
images. `images` are those that a merge may write to: made for this machine (`ours`, which may also be removed), or a
user's own image that a snapshot froze. Pure: no files are examined here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from vmm.model.errors import AlreadyExists, InvalidSpec, NotFound, Refused, VmmError
from vmm.model.formats import ImageFormat, child_format
from vmm.store.snapshots.kept import MAX_KEPT, Kept, kept_document, kept_of, note_repository, repositories_of
from vmm.store.snapshots.snapshot import (
    Image,
    Snapshot,
    TakenIn,
    absolute_path,
    image_document,
    image_of,
    snapshot_document,
    snapshot_of,
)

if TYPE_CHECKING:
    from vmm.store.snapshots.journal import Journal

__all__ = ["Image", "Snapshot", "TakenIn", "Tree", "read_tree", "snapshot_document", "snapshot_of"]

SCHEMA_VERSION: Final = 1
DEFAULT_LIMIT, MAX_LIMIT = 50, 1000  # 50 as in Hyper-V; an image has at most some hundred layers below it
MAX_NAME_CHARACTERS = 120
MAX_NOTES_CHARACTERS = 64 * 1024
MAX_DOCUMENT_BYTES = 16 << 20
_SHORTEST_ID = 4  # minimum length of an abbreviated id


@dataclass(slots=True)
class Tree:
    """All snapshots of a machine. `now` is the snapshot on which the present state is based.

    `journal` describes the operation in progress; see `snapshots.recovery`. `kept`: layers that backups need.
    `saved_in`: path of a repository -> ids of the repositories that have had that path, the newest last.
    """

    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    now: str | None = None
    images: dict[str, Image] = field(default_factory=dict)
    limit: int = DEFAULT_LIMIT
    journal: Journal | None = None
    kept: tuple[Kept, ...] = ()
    saved_in: dict[str, tuple[str, ...]] = field(default_factory=dict)

    # -- lookups -------------------------------------------------------------------------------------------------

    def find(self, word: str) -> Snapshot:
        """A snapshot by its name, its id, or a prefix of its id. Raises NotFound."""
        for snapshot in self.snapshots.values():
            if word in (snapshot.name, snapshot.id):
                return snapshot
        if len(word) >= _SHORTEST_ID:
            found = [one for one in self.snapshots.values() if one.id.startswith(word.lower())]
            if len(found) == 1:
                return found[0]
        if not self.snapshots:
            raise NotFound("has no snapshots", hint="vmm snapshot create NAME takes one")
        raise NotFound(f"has no snapshot {word!r}", hint="vmm snapshot list shows names and ids")

    def children(self, snapshot_id: str | None) -> list[Snapshot]:
        """The direct children of a snapshot, oldest first; None: the snapshots without a parent."""
        return sorted(
            (one for one in self.snapshots.values() if one.parent == snapshot_id), key=lambda one: one.created
        )

    def subtree(self, snapshot_id: str) -> list[Snapshot]:
        """The snapshot and all its descendants, parents first."""
        found = [self.snapshots[snapshot_id]]
        for one in found:  # the list grows during the iteration
            found += self.children(one.id)
        return found

    def frozen(self) -> Iterator[str]:
        """The images whose content snapshots or backups need."""
        for snapshot in self.snapshots.values():
            yield from snapshot.disks.values()
        for one in self.kept:
            yield one.image

    def free_name(self, now: float) -> str:
        """A name for an unnamed snapshot: the time."""
        name = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        taken = {one.name for one in self.snapshots.values()}
        return next(one for number in range(1, len(taken) + 2) if (one := _numbered(name, number)) not in taken)

    # -- changing ------------------------------------------------------------------------------------------------

    def check_new(self, name: str) -> None:
        """Raise if a snapshot cannot be added: Refused beyond the limit, AlreadyExists, InvalidSpec."""
        if len(self.snapshots) >= self.limit:
            raise Refused(
                f"already has {len(self.snapshots)} snapshots; its limit is {self.limit}",
                hint="delete some of them, or allow more: vmm snapshot limit MACHINE NUMBER",
            )
        self.check_name(name)

    def check_name(self, name: str) -> None:
        """Raise InvalidSpec if no snapshot can have this name, AlreadyExists if it is taken."""
        if not name.strip() or len(name) > MAX_NAME_CHARACTERS or not name.isprintable() or name != name.strip():
            raise InvalidSpec(
                f"{name!r} cannot be the name of a snapshot: use 1 to {MAX_NAME_CHARACTERS} printable "
                "characters, without a space at either end"
            )
        if any(name == one.name for one in self.snapshots.values()):
            raise AlreadyExists(f"already has a snapshot {name!r}")

    def add(self, snapshot: Snapshot) -> None:
        """Add a snapshot of the present state; the machine is now based on it."""
        assert snapshot.id not in self.snapshots and snapshot.parent == self.now
        self.snapshots[snapshot.id] = snapshot
        self.now = snapshot.id

    def grow(self, frozen: str, child: str, format_name: ImageFormat, *, child_id: str | None = None) -> None:
        """Add a frozen image of that format and the child made on it, whose file has that id."""
        self.images.setdefault(frozen, Image(None, ours=False, format=format_name))
        self.images[child] = Image(frozen, ours=True, format=child_format(format_name), id=child_id)

    def remove(self, snapshots: Iterable[Snapshot]) -> None:
        """Remove snapshots; their children move to their parents. The images stay for the delete rule."""
        for gone in snapshots:
            parent = self.snapshots.pop(gone.id).parent
            for one in self.children(gone.id):
                self.snapshots[one.id] = replace(one, parent=parent)
            if self.now == gone.id:
                self.now = parent

    def rename(self, snapshot: Snapshot, name: str) -> None:
        """Rename a snapshot. Raises as `check_name`."""
        if name != snapshot.name:
            self.check_name(name)
            self.snapshots[snapshot.id] = replace(snapshot, name=name)

    def annotate(self, snapshot: Snapshot, notes: str) -> None:
        """Replace a snapshot's notes. Raises InvalidSpec."""
        if len(notes) > MAX_NOTES_CHARACTERS:
            raise InvalidSpec(f"notes have at most {MAX_NOTES_CHARACTERS} characters")
        self.snapshots[snapshot.id] = replace(snapshot, notes=notes)

    def begin_night(self, kept: Iterable[Kept]) -> None:
        """Keep these layers, which a night that is being written has frozen."""
        self.kept = (*self.kept, *kept)

    def end_night(self, night_id: str, repository: str, *, exists: bool) -> None:
        """The night exists: its layers are kept in place of those of the repository's earlier nights. Or it will never
        exist: its layers are not kept any more.
        """
        if not exists:
            self.kept = tuple(one for one in self.kept if one.night_id != night_id)
            return
        others = [one for one in self.kept if one.repository != repository or one.maker is not None]
        done = [replace(one, maker=None) for one in self.kept if one.night_id == night_id]
        self.kept = (*(one for one in others if one.night_id != night_id), *done)

    def note_repository(self, paths: Iterable[str], repository: str) -> None:
        """The machine has a night in this repository, which was found under these paths."""
        self.saved_in = note_repository(self.saved_in, paths, repository)

    def repositories_at(self, paths: Collection[str]) -> set[str]:
        """The ids of the repositories under these paths in which the machine has nights."""
        found = {one for path in paths for one in self.saved_in.get(path, ())}
        return found | {one.repository for one in self.kept if one.maker is None and one.folder in paths}

    def keep_only(self, needed: Callable[[Kept], bool]) -> bool:
        """End the keeping of all other layers; True if there were any."""
        before, self.kept = self.kept, tuple(one for one in self.kept if needed(one))
        return self.kept != before

    def below(self, leaves: Collection[str]) -> set[str]:
        """These images, and all that they stand on, as far as the tree knows."""
        found: set[str] = set()
        for leaf in leaves:
            step: str | None = leaf
            while step is not None and step not in found:
                found.add(step)
                step = self.images[step].parent if step in self.images else None
        return found

    def forget(self, path: str) -> None:
        """Drop an image that no longer exists, or that is the user's own again."""
        self.images.pop(path, None)

    def let_go(self, path: str) -> Image | None:
        """The image is no longer the machine's: it stays as it is, with all that it stands on. Returns its record."""
        return self.images.pop(path, None)

    def is_in_no_snapshot(self, path: str) -> bool:
        """True for an image of which neither itself nor anything below it is frozen by a snapshot."""
        of_snapshots = {image for one in self.snapshots.values() for image in one.disks.values()}
        return not of_snapshots & self.below([path])

    def forget_users_image(self, path: str) -> None:
        """Drop an image that was not made for the machine, unless an image or a snapshot in the tree needs it."""
        image = self.images.get(path)
        is_needed = path in self.frozen() or any(one.parent == path for one in self.images.values())
        if image is not None and not image.ours and not is_needed:
            self.forget(path)

    def rename_users_images(self, rename: Callable[[str], str]) -> None:
        """Replace the paths of images that were not made for the machine by what `rename` returns for them."""
        names = {path: new for path, one in self.images.items() if not one.ours and (new := rename(path)) != path}
        if not names:
            return
        self.images = {
            names.get(path, path): replace(one, parent=names.get(one.parent or "", one.parent))
            for path, one in self.images.items()
        }
        for one in list(self.snapshots.values()):
            disks = {disk: names.get(path, path) for disk, path in one.disks.items()}
            self.snapshots[one.id] = replace(one, disks=disks)
        self.kept = tuple(replace(one, image=names.get(one.image, one.image)) for one in self.kept)

    def merged(self, target: str, layers: Iterable[str]) -> None:
        """`layers`, newest first, were merged into `target`, which takes the place of the newest of them."""
        gone = list(layers)
        for path, image in list(self.images.items()):
            if image.parent == gone[0]:
                self.images[path] = replace(image, parent=target)
        for one in list(self.snapshots.values()):
            disks = {disk: target if path == gone[0] else path for disk, path in one.disks.items()}
            self.snapshots[one.id] = replace(one, disks=disks)
        self.kept = tuple(replace(one, image=target) if one.image == gone[0] else one for one in self.kept)
        for path in gone:
            self.forget(path)

    # -- storing -------------------------------------------------------------------------------------------------

    def to_json(self) -> bytes:
        """The tree as it is stored."""
        document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "now": self.now,
            "limit": self.limit,
            "snapshots": [snapshot_document(one) for one in self.snapshots.values()],
            "images": {path: image_document(one) for path, one in self.images.items()},
            "journal": None if self.journal is None else _journal_document(self.journal),
        }
        if self.kept:
            document["kept"] = [kept_document(one) for one in self.kept]
        if self.saved_in:
            document["saved_in"] = self.saved_in
        return json.dumps(document, indent=1).encode() + b"\n"


def _journal_document(journal: Journal) -> dict[str, Any]:
    from vmm.store.snapshots.journal import journal_document  # most trees have none, and every command loads this

    return journal_document(journal)


def _read_journal(document: object, path: str) -> Journal:
    from vmm.store.snapshots.journal import read_journal

    return read_journal(document, path)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


def read_tree(content: bytes, path: str) -> Tree:
    """Parse a stored tree. Raises VmmError for anything else: a guess could remove images that are still needed."""
    try:
        document = json.loads(content)
        if document["schema_version"] != SCHEMA_VERSION:
            raise VmmError("was written by another version of vmm", path=path, hint="use that version")
        snapshots = [snapshot_of(one) for one in document["snapshots"]]
        images = {absolute_path(name): image_of(one) for name, one in document["images"].items()}
        journal = None if document["journal"] is None else _read_journal(document["journal"], path)
        kept = tuple(kept_of(one) for one in document.get("kept", ()))
        if len(kept) > MAX_KEPT:
            raise ValueError("kept")
        tree = Tree({one.id: one for one in snapshots}, document["now"], images, int(document["limit"]), journal, kept)
        tree.saved_in = repositories_of(document.get("saved_in", {}))
        _check(tree)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise VmmError(
            "is damaged: it holds no tree of snapshots", path=path,
            hint="put a copy of it back; or move it away, which forgets the snapshots and keeps their images, then: "
            "vmm repair MACHINE",
        ) from error  # fmt: skip
    return tree


def _check(tree: Tree) -> None:
    """Raise ValueError for an inconsistent tree: a parent that does not exist, a cycle."""
    if tree.now is not None and tree.now not in tree.snapshots:
        raise ValueError("now")
    for parents in (
        {one.id: one.parent for one in tree.snapshots.values()},
        {path: one.parent if one.parent in tree.images else None for path, one in tree.images.items()},
    ):
        good: set[str] = set()
        for start in parents:
            way: list[str] = []
            step: str | None = start
            while step is not None and step not in good:
                if step in way or step not in parents:
                    raise ValueError("parent")
                way.append(step)
                step = parents[step]
            good.update(way)
