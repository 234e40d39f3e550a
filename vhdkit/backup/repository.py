# SPDX-License-Identifier: Apache-2.0
"""A repository: a folder of ordinary images, and what each part of it is called.

Decides how a repository is made and opened, how a machine in it is found, which nights it has, which process may
change them, and what an unfinished night leaves. Must not know how an image is made, read or merged.

    REPO/repository.json                           {format: 1, id, created}
         machines/MACHINE-ID/machine.json          {format: 1, id, name, last_night}
                             lock                  held by the process that changes anything below
                             nights/00018.json     a manifest: only with it does the night exist
                             meta/00018/           other files of the night
                             prune.json            while a prune is under way; verify.json: see `verified`
                             copying/              while a copy changes what is there: see `copy_switch`
                             images/DISK-ID/       00018.avhd, 00018.avhd.sums
         bases/IMAGE-ID.vhd                        shared bases
         leases/LEASE-ID.json                      see `leases`
         copy.json, copies/COPY-ID.json            in a copy, and in what was copied: see `copies`

Everything is reached through descriptors of folders, and no link is followed (`held_folder`): a repository is
untrusted input. The number of nights and the length of all manifests are bounded.

- A night's number is used once: `last_night` is at least that of every night that was deleted.
- A manifest that cannot be read still counts as a night (`leftovers`).
- A copy (`copies`) is changed by copying alone: every other lock on a machine of it is refused.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from vhdkit import errors
from vhdkit.arguments import AnyPath
from vhdkit.backup.documents import MAX_DOCUMENT_BYTES, DamagedRepository, encoded, parsed, time_word
from vhdkit.backup.leases import FOLDER as LEASES
from vhdkit.backup.leases import leased
from vhdkit.backup.manifest import Manifest, parse_manifest
from vhdkit.backup.names import (
    BASES,
    IMAGES,
    MAX_NIGHT,
    ImagePlace,
    is_machine_name,
    is_name,
    is_unique_id,
    new_unique_id,
    night_of,
    night_word,
)
from vhdkit.held_folder import HeldFolder, make_folder, open_folder
from vhdkit.units import MIB

REPOSITORY_FILE, MACHINE_FILE, LOCK = "repository.json", "machine.json", "lock"
PRUNE_FILE = "prune.json"  # the journal of a prune
COPY_FILE = "copy.json"  # in a copy of another repository
COPIES = "copies"  # the states that were given to copies: see `copies`
SWITCH_FILE = "switch.json"  # the journal of a copy that changes images of a machine
MACHINES, NIGHTS, META = "machines", "nights", "meta"
MAX_MACHINES = 100_000
MAX_NIGHTS = 32_768  # of one machine: hourly for almost four years
MAX_ALL_MANIFESTS_BYTES = 256 * MIB  # of one machine; 8 KiB for each night
MAX_FILES = 4 * MAX_NIGHTS  # in one folder: images, their sums, records beside them
_JSON = ".json"
_LOST_AND_FOUND = "lost+found"  # what mkfs.ext4 makes in the root of a file system


@dataclass(frozen=True, slots=True)
class Night:
    """A night as it was found: its manifest, or why that cannot be used."""

    number: int
    manifest: Manifest | None
    problem: errors.VhdkitError | None = None


class Repository:
    """An open repository. Use `open_repository` or `create_repository`; the caller closes it."""

    def __init__(self, root: HeldFolder, repository_id: str, created: datetime) -> None:
        self.root, self.id, self.created = root, repository_id, created

    @property
    def path(self) -> str:
        """Its real path."""
        return self.root.path

    def machine_ids(self) -> list[str]:
        """The ids of its machines, sorted, without names that are no id, and without folders in which a run that was
        killed has recorded nothing yet.
        """
        try:
            folder = self.root.folder(MACHINES)
        except errors.NotFound:
            return []
        with folder:
            return [name for name in folder.names(MAX_MACHINES) if is_name(name) and not _is_blank(folder, name)]

    @contextlib.contextmanager
    def machine(self, machine_id: str) -> Iterator[MachineFolder]:
        """A machine by its id. Raises NotFound, DamagedRepository."""
        if not is_name(machine_id):
            raise errors.NotFound(f"has no machine {errors.printable(machine_id)!r}", path=self.path)
        with contextlib.ExitStack() as held:
            try:
                machines = held.enter_context(self.root.folder(MACHINES))
                folder = held.enter_context(machines.folder(machine_id))
            except errors.NotFound as error:
                raise errors.NotFound(f"has no machine {errors.printable(machine_id)!r}", path=self.path) from error
            yield MachineFolder(self, folder, machine_id, *_read_machine(folder, machine_id))

    @contextlib.contextmanager
    def made_machine(self, machine_id: str, name: str, *, copying: bool = False) -> Iterator[MachineFolder]:
        """The same; made if it does not exist. Its name becomes `name` with the next night. See `held` for copies."""
        if not copying:
            self.refuse_copy()
        if not is_name(machine_id) or not is_machine_name(name):
            raise errors.InvalidArgument(f"{errors.printable(name)!r} cannot be the name of a machine in a repository")
        with self.root.made_folder(MACHINES) as machines, machines.made_folder(machine_id) as folder:
            if not folder.exists(MACHINE_FILE):
                with contextlib.suppress(errors.AlreadyExists):  # another process made it first
                    folder.write(MACHINE_FILE, _machine_document(machine_id, name, 0))
            for inner in (NIGHTS, META, IMAGES):
                folder.made_folder(inner).close()
        with self.machine(machine_id) as machine:
            yield machine

    def find_machine(self, word: str) -> str:
        """The id of the machine that is called `word`, or has that id.

        Raises NotFound, and InvalidArgument if several are called so.
        """
        ids = self.machine_ids()
        if word in ids:
            return word
        found = [one for one in ids if self._name_of(one) == word]
        if len(found) > 1:
            raise errors.InvalidArgument(
                f"has {len(found)} machines called {errors.printable(word)!r}",
                path=self.path,
                hint=f"name one of them by its id: {', '.join(found[:3])}",
            )
        if not found:
            raise errors.NotFound(
                f"has no machine {errors.printable(word)!r}",
                path=self.path,
                hint=f"list them: vhdkit backup list {errors.quoted(self.path)}",
            )
        return found[0]

    def _name_of(self, machine_id: str) -> str | None:
        try:
            with self.machine(machine_id) as machine:
                return machine.name
        except (errors.NotFound, errors.InvalidArgument, DamagedRepository):
            return None

    def refuse_copy(self) -> None:
        """Raise InvalidArgument in a copy of another repository, which only copying changes."""
        if self.root.exists(COPY_FILE):
            raise errors.InvalidArgument(
                "is a copy of another repository, which only `vhdkit backup copy` changes",
                path=self.path,
                hint=f"change the other one; if that is lost: vhdkit backup promote {errors.quoted(self.path)}",
            )

    def bases(self, *, make: bool = False) -> HeldFolder:
        """The folder of shared bases. The caller closes it. Raises NotFound."""
        return self.root.made_folder(BASES) if make else self.root.folder(BASES)

    def close(self) -> None:
        """Close it. Closing twice is fine."""
        self.root.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class MachineFolder:
    """One machine's part of a repository, open while the block of `Repository.machine` runs.

    `name` and `last_night` are what `machine.json` says. What changes anything holds the lock (`held`) and reads the
    nights after that.
    """

    def __init__(
        self, repository: Repository, folder: HeldFolder, machine_id: str, name: str, last_night: int
    ) -> None:
        self.repository, self.folder, self.id = repository, folder, machine_id
        self.name, self.last_night = name, last_night

    @property
    def path(self) -> str:
        """The real path of its folder."""
        return self.folder.path

    @contextlib.contextmanager
    def held(self, doing: str, *, copying: bool = False) -> Iterator[None]:
        """Be the only process that changes the machine's nights; `doing` is what others are told about it.

        A dead process holds nothing. Raises ImageInUse, Unprotected; and InvalidArgument in a copy of another
        repository, which only `copying` changes.
        """
        now = time_word(datetime.now(UTC))
        owner = f"{doing} (process {os.getpid()} on {platform.node()}, since {now})"
        with self.folder.held_lock(LOCK, owner):
            if not copying:
                self.repository.refuse_copy()
            self.name, self.last_night = _read_machine(self.folder, self.id)
            yield

    # -- nights ---------------------------------------------------------------------------------------------------

    def nights(self) -> list[Night]:
        """Every night, oldest first, also dropped ones and those whose manifest is damaged.

        Raises InvalidArgument for more nights, or longer manifests, than any schedule makes.
        """
        try:
            folder = self.folder.folder(NIGHTS)
        except errors.NotFound:
            return []
        with folder:
            numbers = (night_of(one.removesuffix(_JSON)) for one in folder.names(MAX_NIGHTS) if one.endswith(_JSON))
            budget, found = MAX_ALL_MANIFESTS_BYTES, []
            for number in sorted(one for one in numbers if one is not None):
                night, size = self._night(folder, number)
                budget -= size
                if budget < 0:
                    raise errors.InvalidArgument(
                        f"its manifests have more than {MAX_ALL_MANIFESTS_BYTES} bytes in all", path=folder.path
                    )
                if night is not None:
                    found.append(night)
            return found

    def night(self, number: int) -> Night | None:
        """One night as it is now; None if it does not exist."""
        try:
            with self.folder.folder(NIGHTS) as folder:
                return self._night(folder, number)[0]
        except errors.NotFound:
            return None

    def _night(self, folder: HeldFolder, number: int) -> tuple[Night | None, int]:
        """A night, and the length of its manifest; None if it was removed meanwhile."""
        name = night_word(number) + _JSON
        try:
            raw = folder.read(name, MAX_DOCUMENT_BYTES)
        except errors.NotFound:
            return None, 0
        except (errors.InvalidArgument, errors.AccessDenied, errors.IoFailed) as error:
            return Night(number, None, error), MAX_DOCUMENT_BYTES
        try:
            manifest = parse_manifest(
                raw,
                os.path.join(folder.path, name),
                repository=self.repository.id,
                machine_id=self.id,
                night=number,
            )
        except (DamagedRepository, errors.UnsupportedFormat) as error:
            return Night(number, None, error), len(raw)
        return Night(number, manifest), len(raw)

    @contextlib.contextmanager
    def reading(self, number: int, purpose: str) -> Iterator[Manifest]:
        """A night, with a lease for as long as the block runs: no prune takes what is read.

        Raises NotFound, ImageInUse while the machine's nights are being pruned, and what is wrong with its manifest.
        """
        with leased(self.repository.root, self.id, number, purpose):
            yield self.require_night(number)

    def require_night(self, number: int) -> Manifest:
        """The manifest of a night that can be read now. Call it after making a lease. Raises as `reading`."""
        nights = self.nights()
        night = next((one for one in nights if one.number == number), None)
        if night is not None and night.problem is not None:
            raise night.problem
        if night is None or night.manifest is None or night.manifest.dropped:
            raise errors.NotFound(f"has no night {number} of {self.name}", path=self.repository.path)
        if self.folder.exists(SWITCH_FILE):
            raise errors.ImageInUse(
                "a copy is replacing images of this machine, or was interrupted while it did",
                path=self.path,
                hint="wait until it has ended, or run it again",
            )
        if self.folder.exists(PRUNE_FILE):
            with contextlib.suppress(errors.ReadOnly, errors.AccessDenied), self.held("looking for a prune"):
                pass  # one that was interrupted changes nothing at present, and is not in the way
        return night.manifest

    def next_number(self, nights: Iterable[Night]) -> int:
        """The number of the next night. Raises InvalidArgument when there is none."""
        number = max(self.last_night, *(one.number for one in nights), 0) + 1
        if number > MAX_NIGHT:
            raise errors.InvalidArgument("has used every number for a night", path=self.path)
        return number

    def write_manifest(self, manifest: Manifest, *, replace: bool = False) -> None:
        """Write a manifest: with a new one, the night exists when this returns. Call with the lock held."""
        assert (manifest.repository, manifest.machine_id) == (self.repository.id, self.id)
        with self.folder.made_folder(NIGHTS) as folder:
            folder.write(night_word(manifest.night) + _JSON, manifest.encoded(), replace=replace)
        if manifest.machine_name != self.name and not replace:
            self.record(name=manifest.machine_name)

    def remove_manifest(self, number: int) -> None:
        """Remove a manifest: the night no longer exists when this returns. Call with the lock held."""
        if number > self.last_night:
            with contextlib.suppress(errors.NoSpace):  # a full target: a night is known by its id, not by its number
                self.record(last_night=number)
        with self.folder.folder(NIGHTS) as folder:
            folder.remove(night_word(number) + _JSON)
            folder.sync()

    def record(self, *, name: str | None = None, last_night: int | None = None) -> None:
        """Change `machine.json`. Call with the lock held."""
        self.name = self.name if name is None else name
        self.last_night = self.last_night if last_night is None else last_night
        document = _machine_document(self.id, self.name, self.last_night)
        self.folder.write(MACHINE_FILE, document, replace=True)

    # -- files ----------------------------------------------------------------------------------------------------

    def disk_ids(self) -> list[str]:
        """The disks that have a folder of images."""
        try:
            folder = self.folder.folder(IMAGES)
        except errors.NotFound:
            return []
        with folder:
            return [one for one in folder.names(MAX_FILES) if is_name(one)]

    def images(self, disk_id: str, *, make: bool = False) -> HeldFolder:
        """The folder with a disk's images. The caller closes it. Raises NotFound."""
        assert is_name(disk_id)
        if make:
            with self.folder.made_folder(IMAGES) as images:
                return images.made_folder(disk_id)
        with self.folder.folder(IMAGES) as images:
            return images.folder(disk_id)

    def folder_of(self, place: ImagePlace) -> HeldFolder:
        """The folder in which an image lies. The caller closes it. Raises NotFound."""
        return self.repository.bases() if place.disk_id is None else self.images(place.disk_id)

    def meta(self, number: int, *, make: bool = False) -> HeldFolder:
        """The folder with a night's other files. The caller closes it. Raises NotFound."""
        if make:
            with self.folder.made_folder(META) as meta:
                return meta.made_folder(night_word(number))
        with self.folder.folder(META) as meta:
            return meta.folder(night_word(number))

    def sweep(self) -> None:
        """Remove what dead processes left under construction here, and in the folders of no machine."""
        self.folder.sweep()
        with contextlib.suppress(errors.NotFound), self.folder.folder(NIGHTS) as nights:
            nights.sweep()
        root = self.repository.root
        root.sweep()
        for name in (BASES, LEASES, COPIES):
            with contextlib.suppress(errors.NotFound), root.folder(name) as folder:
                folder.sweep()


def open_repository(path: AnyPath) -> Repository:
    """Open a repository. Raises NotFound, DamagedRepository, UnsupportedFormat, AccessDenied."""
    root = open_folder(path)
    try:
        return opened_root(root)
    except BaseException:
        root.close()
        raise


def create_repository(path: AnyPath) -> Repository:
    """Make a repository in a folder that does not exist or is empty, or open the one that is there."""
    root = make_folder(path)
    try:
        if not root.exists(REPOSITORY_FILE):
            if not is_unused(root):
                raise errors.InvalidArgument(
                    "is neither a repository nor an empty folder", path=root.path, hint="name a new folder"
                )
            document = {"format": 1, "id": new_unique_id(), "created": time_word(datetime.now(UTC))}
            with contextlib.suppress(errors.AlreadyExists):  # another process made it first
                root.write(REPOSITORY_FILE, encoded(document))
        return opened_root(root)
    except BaseException:
        root.close()
        raise


def is_unused(root: HeldFolder, *ours: str) -> bool:
    """True if a folder without a repository has nothing in it, but for these names and what mkfs puts there."""
    return not set(root.names(MAX_MACHINES)) - {_LOST_AND_FOUND, *ours}


def opened_root(root: HeldFolder) -> Repository:
    """The repository in a folder that is held. Raises NotFound, DamagedRepository, UnsupportedFormat."""
    try:
        raw = root.read(REPOSITORY_FILE, MAX_DOCUMENT_BYTES)
    except errors.NotFound as error:
        raise errors.NotFound(f"is not a backup repository: it has no {REPOSITORY_FILE}", path=root.path) from error
    except errors.InvalidArgument as error:
        raise DamagedRepository(error.problem, path=error.path) from error
    fields = parsed(raw, os.path.join(root.path, REPOSITORY_FILE))
    return Repository(root, fields.taken("id", is_unique_id), fields.time("created"))


def _is_blank(machines: HeldFolder, name: str) -> bool:
    """True for the folder of a machine without a record and without nights."""
    with contextlib.suppress(errors.VhdkitError), machines.folder(name) as folder:
        if folder.exists(MACHINE_FILE):
            return False
        with contextlib.suppress(errors.NotFound), folder.folder(NIGHTS) as nights:
            return not any(one.endswith(_JSON) for one in nights.names(MAX_NIGHTS))
        return True
    return False


def _read_machine(folder: HeldFolder, machine_id: str) -> tuple[str, int]:
    """The machine's name and its last night."""
    path = os.path.join(folder.path, MACHINE_FILE)
    try:
        fields = parsed(folder.read(MACHINE_FILE, MAX_DOCUMENT_BYTES), path)
    except (errors.NotFound, errors.InvalidArgument) as error:
        raise DamagedRepository(error.problem, path=path) from error
    if fields.taken("id", is_name) != machine_id:
        raise fields.damaged("id", "is that of another machine")
    return fields.taken("name", is_machine_name), fields.number("last_night", 0, MAX_NIGHT)


def _machine_document(machine_id: str, name: str, last_night: int) -> bytes:
    return encoded({"format": 1, "id": machine_id, "name": name, "last_night": last_night})
