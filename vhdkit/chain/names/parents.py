# SPDX-License-Identifier: Apache-2.0
"""Where the parent of an image is searched, and which file is accepted.

Decides how the text of a parent's name becomes a path on this machine, which places are searched in which order, and
what an untrusted image may point at. Also decides which names a new child cannot have because of its parent's format.
Must not know blocks or bitmaps.

- `INV-PARENT-ID`: a file is a parent only if its linkage id is one that the child recorded. A child that recorded
  none has a raw parent, which is opened only if the caller allows it.
- A parent has its child's logical sector size: a bit in a child stands for one sector of both.
- `INV-NAME-WITHIN`: a parent lies, after links are followed, in the leaf's own folder or below it, or in a folder the
  user named; `Volume.follow` ensures that nothing else is examined.
"""

from __future__ import annotations

import ntpath
import os
import shlex
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from vhdkit import errors, formats
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.formats.format import Format
from vhdkit.formats.probe import identify
from vhdkit.image import NULL_ID, ImageFacts, NameDialect, ParentRef
from vhdkit.local_volume import LOCAL
from vhdkit.store import FileStore, ReadStore
from vhdkit.volume import Outcome, Volume, VolumeFile

_MAX_PLACES_SHOWN = 32  # in one message: more than two folders with every kind of locator
_MAX_NAME_SHOWN = 500  # letters


@dataclass(slots=True)
class _Search:
    """A search for one parent on a volume, and the places that were examined, for the error message."""

    volume: Volume
    places: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, bytes]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # targets of links in the folders
    outside: list[str] = field(default_factory=list)  # targets of names in the child
    unreadable: list[errors.VhdkitError] = field(default_factory=list)
    other_format: errors.ParentMismatch | None = (
        None  # for the first mismatched file, if its format cannot be the parent's
    )

    def note(self, place: str) -> None:
        """Record that a place inside the folders was examined."""
        if place not in self.places:
            self.places.append(place)


def parent_format(child: ImageFacts) -> Format:
    """The format in which the parent is opened, whatever its content: raw if no id is recorded, else the child's."""
    if parent_of(child).raw_allowed:
        return formats.plain()
    return formats.named(child.format_name)


def other_format(child: ImageFacts, path: str, store: ReadStore) -> errors.ParentMismatch | None:
    """The error if a parent of this child cannot have the file's format, else None.

    Raises IoFailed.
    """
    found, expected = formats.probed(store), formats.named(child.format_name)
    if found.child_format == child.format_name:
        return None
    new = converted_name(path, expected)
    return errors.ParentMismatch(
        f"{errors.printable(path)} is a {found.title}, and the parent of a {expected.title} is a {expected.title}",
        path=child.path,
        hint=f"convert it: vhdkit convert {shlex.quote(errors.printable(path))} {shlex.quote(errors.printable(new))},"
        f" and record the result: vhdkit rebase {shlex.quote(errors.printable(child.path))}"
        f" --parent {shlex.quote(errors.printable(new))} --unsafe-new-id (without the old parent, that command prints"
        " the one that accepts the new parent uncompared)",
    )


def converted_name(path: str, made: Format) -> str:
    """The name that messages propose for the image at `path` once it is converted to this format."""
    stem, suffix = os.path.splitext(path)
    return stem + made.suffixes[0] if suffix != made.suffixes[0] else f"{stem}-converted{suffix}"


def refuse_child_name(path: str, parent_path: str) -> None:
    """Raise InvalidArgument for a new child with the name of another format than the one its parent requires.

    In a chain whose parent has a wrong name as well, the child may have the same wrong name.
    Raises NotFound, AccessDenied and IoFailed for the parent.
    """
    if formats.by_suffix(path) in (None, formats.by_suffix(parent_path)):
        return
    with FileStore.open(parent_path) as store:
        view = pending.view(store)
        found = formats.probed(view)
        if found.is_plain and unidentified(view) is not None:
            return  # opening a parent that cannot be identified says why
    refuse_name_of_child(path, parent_path, found)


def refuse_name_of_child(path: str, parent_path: str, found: Format) -> None:
    """The same for a parent whose format is known."""
    named = formats.by_suffix(path)
    if named is None or named is formats.by_suffix(parent_path) or found.child_format == named.name:
        return
    made, parent, new = (
        formats.named(found.child_format),
        errors.quoted(parent_path),
        converted_name(parent_path, named),
    )
    raise errors.InvalidArgument(
        f"has the name of a {named.title}, but its parent {errors.printable(parent_path)} is a {found.title}, whose"
        f" children are {made.title}s",
        path=path,
        hint=f"name the child {made.suffixes[-1]}; for a {named.title} convert the parent:"
        f" vhdkit convert {parent} {errors.quoted(new)}, and make the child on the result",
    )


def unidentified(store: ReadStore) -> errors.VhdkitError | None:
    """Why a file without an id is no raw disk either, but empty, damaged or in an unknown format; else None.

    Raises IoFailed.
    """
    try:
        identify(store)
    except (errors.CorruptImage, errors.InvalidArgument, errors.UnsupportedFormat) as error:
        return error
    return None


def allowed_folders(leaf_path: str, parent_dirs: Sequence[str], volume: Volume = LOCAL) -> tuple[str, ...]:
    """The folders in which parents may lie: real paths first, the leaf's own at the head, then differing spellings."""
    here = os.path.dirname(volume.real(leaf_path))
    real = [here, *(volume.real(folder) for folder in parent_dirs)]
    called = [volume.absolute(folder) for folder in (os.path.dirname(leaf_path), *parent_dirs)]
    if volume.real(called[0]) != here:  # the leaf was named by a link in another folder
        called.pop(0)
    return tuple(dict.fromkeys([*real, *called]))


def parent_of(child: ImageFacts) -> ParentRef:
    """What an image that has a parent records about it."""
    assert child.parent is not None
    return child.parent


def recorded_parent_id(child: ImageFacts) -> bytes:
    """The id that an image records for its parent, `NULL_ID` for a raw one."""
    return parent_of(child).linkage_id


def find_parent(
    child: ImageFacts, folders: tuple[str, ...], options: OpenOptions, volume: Volume = LOCAL
) -> VolumeFile:
    """The open file of the parent of `child`, on the child's volume; its `name` is where it was found.

    Raises ParentMissing, ParentMismatch, ParentRefused, each naming every place that was searched.
    """
    if parent_of(child).raw_allowed and not options.allow_raw_parent:
        raise errors.ParentRefused(
            "the image records no id of its parent, which may be any raw file",
            path=child.path,
            hint="if you trust it, add --allow-raw-parent",
        )
    search = _Search(volume)
    for candidate in dict.fromkeys(candidates(child, folders, volume)):
        store = _try(candidate, child, folders, search)
        if store is not None:
            return store
    raise _not_found(child, search)


def _try(candidate: str, child: ImageFacts, folders: tuple[str, ...], search: _Search) -> VolumeFile | None:
    """Open the candidate if it is the parent; else record why not. Nothing outside the folders is examined."""
    try:
        place = search.volume.follow(candidate, folders)
    except errors.VhdkitError as error:
        search.note(candidate)
        search.unreadable.append(error)
        return None
    if place.outcome is Outcome.OUTSIDE:
        (search.outside if place.path == candidate else search.refused).append(place.path)
        return None
    if place.store is None:
        search.note(candidate)
        return None
    search.note(place.path)
    if parent_of(child).raw_allowed:
        return place.store  # the child records it as raw: what its guest wrote to it, even a footer, is ignored
    is_parent = False
    try:
        is_parent = _has_recorded_id(place.path, place.store, child, search)
    finally:
        if not is_parent:
            place.store.close()
    return place.store if is_parent else None


def _has_recorded_id(path: str, store: VolumeFile, child: ImageFacts, search: _Search) -> bool:
    """True if the file has an id that the child recorded; else record why it is not the parent."""
    view = pending.view(store, search.volume)
    found = parent_format(child).linkage_id(view)
    if found in parent_of(child).linkage_ids:
        return True
    problem = unidentified(view) if found is None else None
    if problem is not None:
        problem.path, problem.hint = path, f"examine it: vhdkit check {shlex.quote(errors.printable(path))}"
        search.unreadable.append(problem)
        return False
    search.mismatched.append((path, found or NULL_ID))
    if found is None:
        search.other_format = search.other_format or other_format(child, path, view)
    return False


def require_parent(child: ImageFacts, parent: ReadStore) -> None:
    """Raise `Replaced` unless the image, as it must be read and now held, is still the parent of `child`.

    It was found by its id before it was held, and an id may change with the content.
    """
    recorded = parent_of(child)
    if not recorded.raw_allowed and parent_format(child).linkage_id(parent) not in recorded.linkage_ids:
        raise errors.Replaced("became another disk while the chain was opened", path=parent.name)


def other_sectors(child: ImageFacts, parent: ImageFacts) -> errors.CorruptImage | None:
    """The error if child and parent have different logical sector sizes, else None; a raw parent has the child's."""
    if parent_of(child).raw_allowed or child.sector_bytes == parent.sector_bytes:
        return None
    return errors.CorruptImage(
        errors.CorruptReason.CHAIN_SECTOR_SIZE,
        f"the image has sectors of {child.sector_bytes} bytes, but its parent {errors.printable(parent.path)} has"
        f" sectors of {parent.sector_bytes}, so one of the two is damaged or was replaced",
        path=child.path,
        hint="restore the parent on which the image was made; if it has another id, record it:"
        f" vhdkit rebase {shlex.quote(errors.printable(child.path))} --parent PARENT --unsafe-new-id",
    )


def linkage_id_of(store: VolumeFile, volume: Volume = LOCAL) -> bytes:
    """The linkage id, by which children know the image; `NULL_ID` for a raw image."""
    return formats.linkage_id(pending.view(store, volume)) or NULL_ID


def candidates(child: ImageFacts, folders: tuple[str, ...], volume: Volume = LOCAL) -> Iterator[str]:
    """Paths to try, in order: the names as recorded in the child, then the bare names in every folder."""
    here = os.path.dirname(volume.real(child.path))
    for one in parent_of(child).names:
        yield from _paths_of(one.text, here)
    names = bare_names(child)
    for folder in (here, *folders):
        for name in names:
            if name not in ("", os.curdir, os.pardir):
                yield os.path.join(folder, name)


def bare_names(child: ImageFacts) -> list[str]:
    """The file names that the child records for its parent, without folders."""
    return list(dict.fromkeys(ntpath.basename(one.text.rstrip("\\/")) for one in parent_of(child).names))


def leads_to(child: ImageFacts, parent_path: str, folders: tuple[str, ...], volume: Volume = LOCAL) -> bool:
    """True if a path in the child leads directly to this file, without a search for its bare name."""
    here, parent = os.path.dirname(volume.real(child.path)), volume.real(parent_path)
    texts = [one.text for one in parent_of(child).names if one.dialect is NameDialect.PATH]
    paths = [path for text in texts for path in _paths_of(text, here)]
    return any(_place_of(path, folders, volume) == parent for path in paths)


def names_lead_to(child: ImageFacts, parent_path: str, volume: Volume = LOCAL) -> bool:
    """True if any name recorded in the child leads to this file; a child of a raw disk has nothing else."""
    parent = volume.real(parent_path)
    folder = os.path.dirname(parent)
    here = os.path.dirname(volume.real(child.path))
    return any(_place_of(one, (folder, here), volume) == parent for one in candidates(child, (here,), volume))


def _place_of(path: str, folders: Sequence[str], volume: Volume) -> str | None:
    """The regular file to which a path leads, if it stays beneath the folders all the way."""
    try:
        place = volume.follow(path, folders)
    except errors.VhdkitError:
        return None
    if place.store is None:
        return None
    place.store.close()
    return place.path


def _paths_of(text: str, here: str) -> Iterator[str]:
    """The places on this machine that a name's text can mean.

    A path with a drive letter or a server has none; its bare name is tried later.
    """
    drive, rest = ntpath.splitdrive(text)
    if drive:
        return
    path = rest.replace("\\", "/")
    yield os.path.normpath(path if path.startswith("/") else os.path.join(here, path))


def _not_found(child: ImageFacts, search: _Search) -> errors.VhdkitError:
    """The error that lists where the parent was searched, with a hint."""
    names = parent_of(child).names
    name = names[0].text if names else "(unnamed)"
    quoted = _shortened(name)
    if not search.refused and not search.unreadable and not search.mismatched and _leads_out(child, search):
        search.refused = search.outside
    if search.refused:
        place = search.refused[0]
        return errors.ParentRefused(
            f"its parent {quoted} leads to {errors.printable(place)}, outside the image's folder",
            path=child.path,
            hint=f"if you trust it, add --allow-parent-dir {shlex.quote(os.path.dirname(place))}",
        )
    if search.unreadable:
        unreadable = search.unreadable[0]
        where = f"{errors.printable(unreadable.path)}: " if unreadable.path else ""
        return errors.ParentMissing(
            f"its parent {quoted} cannot be read: {where}{unreadable.problem}", path=child.path, hint=unreadable.hint
        )
    if search.other_format is not None and len(search.mismatched) == 1:
        return search.other_format
    if search.mismatched:
        place, found = search.mismatched[0]
        return errors.ParentMismatch(
            f"{errors.printable(place)} has the name of its parent but is another disk",
            path=child.path,
            expected=f"id {format_id(recorded_parent_id(child))}",
            found=f"id {format_id(found)}" if found != NULL_ID else "no id",
            hint=_repoint(child) + _accepting(child, place, found),
        )
    if search.outside:
        search.places.append(f"not {_shortened(search.outside[0])}, which is outside these folders")
    places = ", ".join(_shortened(place) for place in search.places[:_MAX_PLACES_SHOWN])
    if len(search.places) > _MAX_PLACES_SHOWN:
        places += f" and {len(search.places) - _MAX_PLACES_SHOWN} more"
    return errors.ParentMissing(
        f"its parent {quoted} (id {format_id(recorded_parent_id(child))}) was not found;"
        f" searched {places or 'nowhere: it has no usable name'}",
        path=child.path,
        hint=_repoint(child),
    )


def _leads_out(child: ImageFacts, search: _Search) -> bool:
    """True if the most specific of the child's names leads out of the allowed folders."""
    here = os.path.dirname(search.volume.real(child.path))
    first = next((path for one in parent_of(child).names for path in _paths_of(one.text, here)), None)
    return first is not None and first in search.outside


def _shortened(text: str) -> str:
    """`text` shortened for a message: a hostile name may be very long."""
    if len(text) > _MAX_NAME_SHOWN:
        text = text[: _MAX_NAME_SHOWN // 2] + "..." + text[-_MAX_NAME_SHOWN // 2 :]
    return errors.printable(text)


def _repoint(child: ImageFacts) -> str:
    """The hint for a parent that is somewhere else."""
    return (
        "allow the folder of the parent with --allow-parent-dir FOLDER, or record its new path in the image:"
        f" vhdkit rebase {shlex.quote(errors.printable(child.path))} --parent PARENT"
    )


def _accepting(child: ImageFacts, place: str, found: bytes) -> str:
    """The other hint for a file with the parent's name: it may be the parent, with an id that a program changed."""
    if found == NULL_ID:
        return ""
    return (
        "; if it is the parent, and another program changed its id but not its content, record the new id at your own"
        f" risk: vhdkit rebase {shlex.quote(errors.printable(child.path))}"
        f" --parent {shlex.quote(errors.printable(place))} --accept-parent-id {format_id(found)}"
    )


def format_id(unique_id_bytes: bytes) -> str:
    """A unique id in its usual form, 8-4-4-4-12."""
    text = unique_id_bytes.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def find_by_id(
    linkage_ids: Collection[bytes],
    folders: Sequence[str],
    *,
    apart_from: Hashable | None = None,
    volume: Volume = LOCAL,
) -> list[str]:
    """Paths of the files directly in `folders` that are the image with one of these ids, under any name.

    Several results are copies, and it is unknown which one is meant. Hard links count once. A null id matches none.
    """
    found: dict[Hashable, str] = {}
    wanted = frozenset(linkage_ids) - {NULL_ID}
    if not wanted:
        return []
    for folder in dict.fromkeys(volume.real(folder) for folder in folders):
        for path in volume.siblings(folder):
            try:
                with volume.open_regular(path, follow_links=False) as store:
                    if store.identity != apart_from and linkage_id_of(store, volume) in wanted:
                        found.setdefault(store.identity, path)
            except errors.VhdkitError:
                continue
    return list(found.values())
