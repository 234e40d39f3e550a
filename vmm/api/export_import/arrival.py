# SPDX-License-Identifier: Apache-2.0
"""Examining a folder that is to become a machine: what it contains, and what of that is acceptable.

Nothing in the folder is trusted. Decides which names its files may have, how large they may be, that all
definitions are judged (`foreign`), including those of snapshots, and that every chain lies in the folder. Creates
nothing: `importing` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import vhdkit
from vmm.api.export_import.exporting import MANIFEST
from vmm.api.export_import.foreign import LEAVE_OUT, Consent, Judged, judge
from vmm.api.export_import.inside import Inside
from vmm.model.errors import InvalidSpec, NotFound, Refused, VmmError
from vmm.model.formats import ImageFormat, child_format
from vmm.model.spec import MachineSpec, make_disk, read_spec
from vmm.snapshots.steps import store_problem
from vmm.store import devices
from vmm.store.images import as_found, refuse_frozen
from vmm.store.machine_document import MAX_DOCUMENT_BYTES, read_document
from vmm.store.media import open_medium
from vmm.store.night_files import UEFI_VARIABLES
from vmm.store.snapshots.tree import MAX_LIMIT, Tree

_MAX_DEFINITION_BYTES = 4 << 20
_MAX_FILES = 16384
# Files that are read whole have limits of their own; the others only take space, which is checked.
_MAX_UEFI_BYTES, _MAX_DESCRIPTION_BYTES = 64 << 20, 8 << 20
_MAX_FILE_BYTES = 65 << 40  # of a VHDX of 64 TiB; a file with holes may seem as large as anything
_MAX_LISTED = 20  # problems in one message
_OPTIONS = vhdkit.OpenOptions(allow_raw_parent=True)  # parents lie in the image's own folder and nowhere else


@dataclass(slots=True)
class Arrival:
    """A folder that was examined. Its paths are names in the folder: `disks/one.avhd`.

    `definitions`: by the snapshot's id, and None for the machine itself; as read, not yet judged.
    """

    folder: str
    definitions: dict[str | None, MachineSpec]
    tree: Tree
    files: dict[str, int]
    images: dict[str, str]  # disk id -> name
    media: dict[str, str]  # a path as definitions have it -> name
    flat: bool
    judged: dict[str | None, MachineSpec] = field(default_factory=dict)
    granted: tuple[str, ...] = ()

    @property
    def has_memory(self) -> bool:
        """True for a machine that was saved."""
        return "saved/memory.bin" in self.files and "saved/state.json" in self.files

    def leaves(self) -> set[str]:
        """The names of all images that are the top of a chain in some state of the machine."""
        return {*self.images.values(), *(path.lstrip("/") for path in self.tree.frozen())}


# -- looking -----------------------------------------------------------------------------------------------------


def look_at_export(inside: Inside) -> Arrival:
    """The contents of an exported folder; every file that it names exists. Raises NotFound, InvalidSpec, Refused."""
    path = os.path.join(inside.root, MANIFEST)
    try:
        content = inside.read(MANIFEST, MAX_DOCUMENT_BYTES)
    except NotFound as error:
        raise NotFound("is not an export: it contains no vmm-export.json", path=inside.root) from error
    document = read_document(content, path)
    spec, tree, files = document.spec, document.tree, dict(document.files)
    images = {disk: f"disks/{name}" for disk, name in document.images.items()}
    if len(files) > _MAX_FILES:
        raise InvalidSpec(f"names more than {_MAX_FILES} files", path=path)
    tree.journal = None
    tree.limit = min(max(tree.limit, 1), MAX_LIMIT)
    arrival = Arrival(inside.root, {None: spec}, tree, files, images, dict(document.media), document.flat)
    _check_names(arrival)
    for name, size in files.items():
        _check_file(inside, name, size, spec)
    for one in tree.snapshots.values():
        name = f"snapshots/{one.id}/{one.id}.json"
        content = inside.read(name, _MAX_DEFINITION_BYTES)
        arrival.definitions[one.id] = read_spec(content, os.path.join(inside.root, name))
    return arrival


def _check_file(inside: Inside, name: str, size: int, spec: MachineSpec) -> None:
    path = os.path.join(inside.root, name)
    found = inside.size(name)
    if found != size:
        raise InvalidSpec(f"has {found} bytes instead of {size}: copy it again", path=path)
    limit = {UEFI_VARIABLES: _MAX_UEFI_BYTES, "saved/state.json": _MAX_DESCRIPTION_BYTES}.get(name)
    if name.startswith("snapshots/") and not name.endswith(".bin"):
        limit = _MAX_UEFI_BYTES if name.endswith(".nvram") else _MAX_DESCRIPTION_BYTES
    if limit is None:
        limit = _MAX_FILE_BYTES
    if size > limit:
        raise InvalidSpec(f"has {size} bytes, and such a file has at most {limit}", path=path)


def _check_names(arrival: Arrival) -> None:
    """Raise InvalidSpec unless each file that is named is in the folder, in the place for such files."""
    frozen = [*arrival.tree.frozen(), *arrival.tree.images, *_parents(arrival.tree)]
    for name in (*arrival.images.values(), *(path.lstrip("/") for path in frozen)):
        base = name.removeprefix("disks/")
        if name not in arrival.files or name != f"disks/{base}" or "/" in base:
            raise InvalidSpec(f"names an image outside the export: {name!r}", path=arrival.folder)
    for name in arrival.media.values():
        if name not in arrival.files or not name.startswith("media/") or name.count("/") != 1:
            raise InvalidSpec(f"names a file outside the export: {name!r}", path=arrival.folder)
    for name in arrival.files:
        base = os.path.basename(name)
        if base.startswith(".") and ".vhdkit-" in base:  # vhdkit's records describe files of the exporting host
            raise InvalidSpec(f"contains a record of vhdkit, which an export never has: {name!r}", path=arrival.folder)
    for one in arrival.tree.snapshots.values():
        Tree().check_name(one.name)


def _parents(tree: Tree) -> Iterator[str]:
    return (one.parent for one in tree.images.values() if one.parent is not None)


def check_chains(arrival: Arrival, disks: str) -> None:
    """Raise Refused or StoreFailed unless every chain opens and lies wholly in that folder."""
    real = os.path.realpath(disks)
    for leaf in arrival.leaves():
        path = os.path.join(disks, os.path.basename(leaf))
        for image in chain_of(path, arrival):
            if os.path.dirname(image) != real or f"disks/{os.path.basename(image)}" not in arrival.files:
                raise Refused("stands on an image that is not part of the import", path=path)


def chain_of(path: str, arrival: Arrival) -> list[str]:
    raw_names = {os.path.basename(arrival.images[disk.id]) for disk in arrival.definitions[None].disks
                 if disk.id in arrival.images and disk.format == "raw" and not arrival.flat}  # fmt: skip
    raw_names |= {os.path.basename(name) for name, one in arrival.tree.images.items() if one.format == "raw"}
    kind = vhdkit.FormatName.RAW if os.path.basename(path) in raw_names else None
    try:
        with vhdkit.chain_held(path, options=replace(_OPTIONS, format_name=kind)) as chain:
            return chain
    except vhdkit.VhdkitError as error:
        raise store_problem(error, "read the images") from error


# -- judging -----------------------------------------------------------------------------------------------------


def resolved(consent: Consent) -> Consent:
    """The same with real paths: what the user named is used, even if links change. Raises NotFound."""
    paths = {}
    for old, new in consent.paths.items():
        if new != LEAVE_OUT and "://" not in new:
            if not os.path.exists(new):
                raise NotFound("does not exist", path=new)
            new = os.path.realpath(new)
        paths[old] = new
    return replace(consent, paths=paths)


def judge_all(arrival: Arrival, consent: Consent, announce: Callable[[str], None]) -> None:
    """Judge all definitions; everything that is refused is reported in one error. Raises Refused, InvalidSpec."""
    own = arrival.definitions[None]
    # By the path in the definition: the files of the export, and those that are named by their path in this folder.
    inside = {old: placed(arrival, name) for old, name in arrival.media.items()}
    inside |= {placed(arrival, name): placed(arrival, name) for name in arrival.files if name.startswith("media/")}
    inside |= {str(disk.path): placed(arrival, arrival.images[disk.id]) for disk in own.disks
               if disk.id in arrival.images}  # fmt: skip
    refused: dict[str, str] = {}
    granted: list[str] = []
    used: set[str] = set()
    media = placed(arrival, "media") + os.sep
    for key, spec in arrival.definitions.items():
        judged = judge(spec, images=_images_for(arrival, key, spec), inside=inside, consent=consent)
        if any(disk.is_image and str(disk.path).startswith(media) for disk in judged.spec.disks):
            raise InvalidSpec("names an image in the folder for media, where an export has none", path=media)
        refused |= judged.refused
        granted += [words for words in judged.granted if words not in granted]
        used |= judged.used
        if not judged.refused:
            arrival.judged[key] = looked_at(judged)
    if refused:
        raise refusal(
            arrival.folder, refused, "would reach outside the export",
            hint="allow what you trust with the options in brackets; NEW is the replacement, or empty for none",
        )  # fmt: skip
    if unused := sorted({*consent.paths, *consent.switches, *consent.allow} - used):
        raise InvalidSpec(f"contains nothing called {unused[0]!r}", path=arrival.folder, hint="see vmm import --help")
    arrival.granted = tuple(granted)
    for words in granted:
        announce(words)


def placed(arrival: Arrival, name: str) -> str:
    return os.path.join(arrival.folder, name)


def _images_for(arrival: Arrival, key: str | None, spec: MachineSpec) -> dict[str, tuple[str, ImageFormat]]:
    """Disk id -> (path, format) of the images that the export has for a definition."""
    if key is None:
        return {disk.id: (placed(arrival, arrival.images[disk.id]),
                          child_format(disk.format) if arrival.flat else disk.format or "vhd")
                for disk in spec.disks if disk.id in arrival.images}  # fmt: skip
    found: dict[str, tuple[str, ImageFormat]] = {}
    for disk in spec.disks:
        path = arrival.tree.snapshots[key].disks.get(disk.id)
        if path is not None:
            image = arrival.tree.images.get(path)
            found[disk.id] = (placed(arrival, path.lstrip("/")), image.format if image else disk.format or "vhd")
    return found


def looked_at(judged: Judged) -> MachineSpec:
    """The definition, after what the user named is examined as by `vmm disk add`. Raises VmmError."""
    spec, disks = judged.spec, []
    for disk in spec.disks:
        path = disk.path
        if disk.id in judged.given and path is not None:
            if disk.kind == "pass-through":
                found = devices.looked_at(path, read_only=disk.read_only, machine_id=spec.id)
                disk = make_disk(**{**disk.model_dump(), **found})
            elif disk.kind == "iso":
                os.close(open_medium(path))
            else:
                disk = as_found(disk)
                refuse_frozen(disk)
        disks.append(disk)
    for file in (spec.kernel, spec.initrd):
        if file is not None:
            os.close(open_medium(file))
    return spec.changed(disks=disks)


def refusal(folder: str, refused: Mapping[str, str], problem: str, *, hint: str) -> VmmError:
    """The error that names everything that is refused, each with the option that allows it."""
    things = [f"{what} [{option}]" for what, option in refused.items()]
    more = f"; and {len(things) - _MAX_LISTED} more" if len(things) > _MAX_LISTED else ""
    return Refused(
        f"{problem}: {'; '.join(things[:_MAX_LISTED])}{more}",
        path=folder,
        hint=hint,
    )
