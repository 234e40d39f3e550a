# SPDX-License-Identifier: Apache-2.0
"""From the path of a leaf to its open layers: where a parent is looked for, and which file may be one.

Decides how the text of a locator becomes a path on this machine, which places are searched in which order, and
what an untrusted image may point at. Must not know blocks or bitmaps.

- `INV-PARENT-ID`: a file is a parent only when its unique id is the one the child recorded. Never skipped.
- `INV-PARENT-READ-ONLY`: only the leaf is opened for writing, and only when no image stands on it.
- A parent lies in the leaf's own folder or below it, or in a folder the user named. Links are followed first.
"""

from __future__ import annotations

import ntpath
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vhdkit import errors
from vhdkit.chain import pending
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.folder import find_ignoring_case, is_file_name, is_regular, is_within, real_path, regular_files
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.locator import ABSOLUTE, MAC, OLD_ABSOLUTE, OLD_RELATIVE, RELATIVE, Locator
from vhdkit.formats.vhd.metadata import Metadata, image_id, read_footers, read_metadata
from vhdkit.image import Layer
from vhdkit.store import FileStore, Store

MAX_CHAIN_DEPTH = 254  # owners are kept as one byte a sector, with one value left for "nobody"
_MAX_PLACES_TOLD = 32  # in one message: more than two folders and every kind of locator give
_MAX_NAME_TOLD = 500  # letters
NULL_ID = bytes(layout.UUID_SIZE)  # XenServer writes it for a raw parent
_LOCATOR_ORDER = (RELATIVE, ABSOLUTE, MAC, OLD_RELATIVE, OLD_ABSOLUTE)


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """What a user may say about opening a chain.

    `parent_dirs` are further folders parents may lie in. `allow_raw_parent` accepts a raw base under a child that
    records no id. `ignore_bitmaps` reads a dynamic disk's sectors under clear bits as data. `format_name` says
    what the leaf is instead of looking. `lock` False reads without holding the files (for `info`, `chain`).
    """

    parent_dirs: tuple[str, ...] = ()
    allow_raw_parent: bool = False
    ignore_bitmaps: bool = False
    format_name: FormatName | None = None
    lock: bool = True


@dataclass(slots=True)
class _Search:
    """What was looked at while searching one parent, for the error that says so."""

    places: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, bytes]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unreadable: list[errors.VhdkitError] = field(default_factory=list)


def open_layers(
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    options: OpenOptions | None = None,
    danger: str | None = "writing to it would corrupt that image",
) -> list[Layer]:
    """Open a leaf and all its parents, leaf first; only the leaf is writable.

    A writable one has no children: `danger` is what would happen to them. None is for who changes no content.

    Raises NotFound, AccessDenied, CorruptImage (also for loops and too deep chains), UnsupportedFormat,
    ImageInUse, HasChildren, ParentMissing, ParentMismatch, ParentRefused. On error nothing stays open.
    """
    options = options or OpenOptions()
    leaf_path = os.fspath(path)
    layers: list[Layer] = []
    store = FileStore.open(leaf_path, writable=writable)
    try:
        _hold(store, writable, options)
        if writable and danger is not None:
            refuse_with_children(store, options, danger)
        layers.append(_open_leaf(pending.view(store), False, options))
        _open_parents(layers, store, options)
        if writable:  # last: only now is it sure that the chain is whole, and this may mend the file
            pending.settle(store)
            layers[0] = _open_leaf(store, True, options)
    except BaseException:
        store.close()
        for layer in layers:
            layer.store.close()
        raise
    return layers


def _open_leaf(store: Store, writable: bool, options: OpenOptions) -> Layer:
    return open_layer(store, format_name=options.format_name, writable=writable, ignore_bitmaps=options.ignore_bitmaps)


def _hold(store: FileStore, writer: bool, options: OpenOptions) -> None:
    if options.lock:
        store.lock(writer=writer)


def _open_parents(layers: list[Layer], leaf: FileStore, options: OpenOptions) -> None:
    folders = allowed_folders(leaf.name, options.parent_dirs)
    seen = {leaf.identity}
    while isinstance(child := layers[-1], DynamicImage) and child.is_differencing:
        if len(layers) >= MAX_CHAIN_DEPTH:
            raise CorruptImage(
                CorruptReason.CHAIN_DEPTH,
                f"the chain has more than {MAX_CHAIN_DEPTH} layers",
                path=leaf.name,
            )
        store = find_parent(child.metadata, folders, options)
        try:
            if store.identity in seen:
                raise CorruptImage(
                    CorruptReason.CHAIN_LOOP,
                    "the chain of parents leads back to itself",
                    path=child.metadata.path,
                )
            seen.add(store.identity)
            _hold(store, False, options)
            layers.append(_open_parent(store, child.metadata, options))
        except BaseException:
            store.close()
            raise


def _open_parent(store: FileStore, child: Metadata, options: OpenOptions) -> Layer:
    view = pending.view(store)
    return open_layer(view, format_name=parent_format(child), ignore_bitmaps=options.ignore_bitmaps)


def parent_format(child: Metadata) -> FormatName:
    """What the parent of `child` is taken for, whatever it looks like: a child of a raw disk records no id."""
    return FormatName.RAW if _parent_id(child) == NULL_ID else FormatName.VHD


def allowed_folders(leaf_path: str, parent_dirs: Sequence[str]) -> tuple[str, ...]:
    """The real folders parents may lie in: the leaf's own first."""
    folders = [os.path.dirname(real_path(leaf_path)), *(real_path(folder) for folder in parent_dirs)]
    return tuple(dict.fromkeys(folders))


def _parent_id(child: Metadata) -> bytes:
    assert child.header is not None
    return child.header.parent_unique_id


def find_parent(child: Metadata, folders: tuple[str, ...], options: OpenOptions) -> FileStore:
    """The open file of the parent of `child`, whose `path` says where it lies.

    Raises ParentMissing, ParentMismatch, ParentRefused, each naming every place that was searched.
    """
    if _parent_id(child) == NULL_ID and not options.allow_raw_parent:
        raise errors.ParentRefused(
            "the image records no id of its parent, which may be any raw file",
            path=child.path,
            hint="if you trust it, say --allow-raw-parent",
        )
    search = _Search()
    for candidate in dict.fromkeys(_candidates(child, folders)):
        store = _try(candidate, child, folders, search)
        if store is not None:
            return store
    raise _not_found(child, search)


def _try(candidate: str, child: Metadata, folders: tuple[str, ...], search: _Search) -> FileStore | None:
    """Open the candidate when it is the parent; else note why not."""
    # Links are followed before anything else is looked at: outside the allowed folders nothing is listed or opened.
    if not is_file_name(candidate) or not is_within(real_path(candidate), folders):
        (search.refused if is_regular(candidate) else search.places).append(candidate)
        return None
    found = find_ignoring_case(candidate, folders)
    if found is None:
        search.places.append(candidate)
        return None
    real = real_path(found)
    if not is_within(real, folders):
        search.refused.append(real)
        return None
    search.places.append(found)
    if not is_regular(real):
        return None
    try:
        store = FileStore.open(real, follow_links=False)
    except errors.VhdkitError as error:
        search.unreadable.append(error)
        return None
    try:
        parent_id = unique_id(store)
    except BaseException:
        store.close()
        raise
    if parent_id == _parent_id(child):
        return store
    search.mismatched.append((found, parent_id))
    store.close()
    return None


def unique_id(store: FileStore) -> bytes:
    """The id other images know this one by: its footer's, or all zeros for a raw image."""
    return image_id(pending.view(store))


def _candidates(child: Metadata, folders: tuple[str, ...]) -> Iterator[str]:
    """Paths to try, in order: locators by kind, the header's name, then the bare names in every folder."""
    here = os.path.dirname(real_path(child.path))
    texts = [text for _, text in _ordered_texts(child)]
    for text in texts:
        yield from _paths_of(text, here)
    names = bare_names(child)
    for folder in (here, *folders):
        for name in names:
            if name not in ("", os.curdir, os.pardir):
                yield os.path.join(folder, name)


def bare_names(child: Metadata) -> list[str]:
    """The names of the file that the child has for its parent, without folders."""
    return list(dict.fromkeys(ntpath.basename(text.rstrip("\\/")) for _, text in _ordered_texts(child)))


def leads_to(child: Metadata, parent_path: str, folders: tuple[str, ...]) -> bool:
    """True when a locator of the child leads to this file by itself: others do not look for its bare name."""
    here, parent = os.path.dirname(real_path(child.path)), real_path(parent_path)
    for text in (locator.text for locator in child.locators):
        for path in _paths_of(text or "", here):
            if is_file_name(path) and is_within(real_path(path), folders):
                found = find_ignoring_case(path, folders)
                if found is not None and real_path(found) == parent:
                    return True
    return False


def _ordered_texts(child: Metadata) -> list[tuple[str, str]]:
    """(structure, text) of every name the child has for its parent, the most telling first."""

    def rank(locator: Locator) -> int:
        return _LOCATOR_ORDER.index(locator.platform_code)

    known = [one for one in child.locators if one.platform_code in _LOCATOR_ORDER and one.text]
    texts = [(one.structure, one.text or "") for one in sorted(known, key=rank)]
    if child.parent_name:
        texts.append(("parent name", child.parent_name))
    return texts


def _paths_of(text: str, here: str) -> Iterator[str]:
    """Where a locator's text can point on this machine.

    A path with a drive letter or a server points nowhere here; its bare name is tried later.
    """
    drive, rest = ntpath.splitdrive(text)
    if drive:
        return
    path = rest.replace("\\", "/")
    yield os.path.normpath(path if path.startswith("/") else os.path.join(here, path))


def _not_found(child: Metadata, search: _Search) -> errors.VhdkitError:
    """The error that says where the parent was sought and what to do."""
    names = [text for _, text in _ordered_texts(child)]
    name = names[0] if names else "(unnamed)"
    quoted = _shortened(name)
    if search.refused:
        place = real_path(search.refused[0])
        return errors.ParentRefused(
            f"its parent {quoted} leads to {errors.printable(place)}, outside the image's folder",
            path=child.path,
            hint=f"if you trust it, say --allow-parent-dir {shlex.quote(os.path.dirname(place))}",
        )
    if search.unreadable:
        return errors.ParentMissing(f"its parent {quoted} cannot be read: {search.unreadable[0]}", path=child.path)
    if search.mismatched:
        place, found = search.mismatched[0]
        return errors.ParentMismatch(
            f"{errors.printable(place)} has the name of its parent but is another disk",
            path=child.path,
            expected=f"id {format_id(_parent_id(child))}",
            found=f"id {format_id(found)}" if found != NULL_ID else "no id",
            hint=_repoint(child),
        )
    places = ", ".join(_shortened(place) for place in search.places[:_MAX_PLACES_TOLD])
    if len(search.places) > _MAX_PLACES_TOLD:
        places += f" and {len(search.places) - _MAX_PLACES_TOLD} more"
    return errors.ParentMissing(
        f"its parent {quoted} (id {format_id(_parent_id(child))}) was not found;"
        f" searched {places or 'nowhere: it has no usable name'}",
        path=child.path,
        hint=_repoint(child),
    )


def _shortened(text: str) -> str:
    """`text` for a message: a hostile name may be as long as a book."""
    if len(text) > _MAX_NAME_TOLD:
        text = text[: _MAX_NAME_TOLD // 2] + "..." + text[-_MAX_NAME_TOLD // 2 :]
    return errors.printable(text)


def _repoint(child: Metadata) -> str:
    """What to do about a parent that is somewhere else."""
    return (
        "name the folder it is in with --allow-parent-dir FOLDER, or repoint the image for good:"
        f" vhdkit rebase {shlex.quote(errors.printable(child.path))} --parent PARENT"
    )


def format_id(unique_id_bytes: bytes) -> str:
    """A unique id as people write it, 8-4-4-4-12."""
    text = unique_id_bytes.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def find_by_id(wanted_id: bytes, folders: Sequence[str], *, apart_from: tuple[int, int] | None = None) -> list[str]:
    """Paths of the files directly in `folders` that are the image with this id, whatever they are called.

    More than one is a copy: which one is meant, nobody can tell. Hard links count once. A null id is nobody's.
    """
    found: dict[tuple[int, int], str] = {}
    if wanted_id == NULL_ID:
        return []
    for folder in dict.fromkeys(real_path(folder) for folder in folders):
        for path in regular_files(folder):
            try:
                with FileStore.open(path, follow_links=False) as store:
                    if store.identity != apart_from and unique_id(store) == wanted_id:
                        found.setdefault(store.identity, path)
            except errors.VhdkitError:
                continue
    return list(found.values())


def folders_of_children(path: str, parent_dirs: Sequence[str]) -> tuple[str, ...]:
    """The real folders in which children of an image are looked for: those parents may lie in, and the one of the
    name it was given by, which may be a link: who made a child through that name put it there.
    """
    here = real_path(os.path.dirname(path) or os.curdir)
    return tuple(dict.fromkeys((*allowed_folders(path, parent_dirs), here)))


def find_children(
    parent_id: bytes,
    folders: Sequence[str],
    *,
    apart_from: tuple[int, int] | None = None,
    raw_parent: str | None = None,
) -> list[str]:
    """Paths of the differencing images in `folders` whose parent has this id. Damaged files are passed over.

    Children of raw disks record no id; with `raw_parent` those count whose names lead to that path.
    """
    children = []
    for folder in dict.fromkeys(real_path(folder) for folder in folders):
        for path in regular_files(folder):
            if _child_of(path, parent_id, apart_from, raw_parent):
                children.append(path)
    return children


def _child_of(path: str, parent_id: bytes, apart_from: tuple[int, int] | None, raw_parent: str | None) -> bool:
    child = _differencing(path, apart_from)
    return child is not None and _stands_on(child, parent_id, raw_parent)


def _differencing(path: str, apart_from: tuple[int, int] | None = None) -> Metadata | None:
    """What the file at `path` says of itself when it is a sound differencing image, else None."""
    try:
        with FileStore.open(path) as store:
            if store.identity == apart_from:
                return None
            image = pending.view(store)
            # The cookie is looked at first: a folder may hold many files that are no images at all.
            if not any(place.state.usable for place in read_footers(image)):
                return None
            metadata = read_metadata(image)
    except errors.VhdkitError:
        return None
    return metadata if metadata.is_differencing else None


def _stands_on(child: Metadata, parent_id: bytes, raw_parent: str | None) -> bool:
    if _parent_id(child) != parent_id:
        return False
    if parent_id != NULL_ID:
        return True
    names = _candidates(child, (os.path.dirname(real_path(child.path)),))
    return raw_parent is not None and any(is_file_name(one) and real_path(one) == raw_parent for one in names)


def find_children_of(parents: Sequence[tuple[bytes, str]], folders: Sequence[str]) -> list[list[str]]:
    """For each parent, (unique id, real path), what `find_children` finds; every file is looked at once."""
    families: list[list[str]] = [[] for _ in parents]
    for folder in dict.fromkeys(real_path(folder) for folder in folders):
        for path in regular_files(folder):
            child = _differencing(path)
            for (parent_id, parent_path), family in zip(parents, families, strict=True):
                if child is not None and path != parent_path and _stands_on(child, parent_id, parent_path):
                    family.append(path)
    return families


def refuse_with_children(
    store: FileStore,
    options: OpenOptions,
    danger: str,
    *,
    apart_from: str | None = None,
    hint: str = "work on the child instead, or move it away",
) -> None:
    """Raise HasChildren when an image in the file's folder, or in those the user named, stands on this one.

    `danger` says what would happen to it, `hint` what to do; the child at `apart_from` does not count.
    """
    folders = folders_of_children(store.name, options.parent_dirs)
    own_id, own_path = unique_id(store), real_path(store.name)
    children = find_children(own_id, folders, apart_from=store.identity, raw_parent=own_path)
    if apart_from is not None:
        children = [one for one in children if real_path(one) != real_path(apart_from)]
    if children:
        others = f" and {len(children) - 1} more" if len(children) > 1 else ""
        raise errors.HasChildren(
            f"is the parent of {errors.printable(children[0])}{others}; {danger}",
            path=store.name,
            hint=hint,
        )
