# SPDX-License-Identifier: Apache-2.0
"""vhdkit: read and write virtual hard disks (VHD, AVHD, raw), alone and in chains.

This page of names is the whole public interface; everything else may change.

    import vhdkit

    with vhdkit.open_disk("leaf.avhd") as disk:
        boot_sector = disk.read(0, 512)

Sizes and offsets are bytes unless a name says sectors (512 bytes). Chains are listed leaf first. Every error is a
`VhdkitError` with `path`, `structure`, `offset_bytes`, `errno` and `exit_code`; only the module `jsonrpc`, which
touches no file, has errors of its own.

Each name is imported when it is first used, so a program that only catches errors or talks to a server does not
load numpy.
"""

TYPE_CHECKING = False  # type checkers know the name; `typing` takes longer to import than all of this
if TYPE_CHECKING:
    from vhdkit import backups, jsonrpc
    from vhdkit.chain.engine.chain import Progress
    from vhdkit.chain.names.family import chain_held, chain_paths, find_children, image_id, mark_parents
    from vhdkit.chain.names.options import OpenOptions
    from vhdkit.chain.verbs.check import check
    from vhdkit.chain.verbs.compact import CompactResult, compact
    from vhdkit.chain.verbs.compare import Comparison, compare
    from vhdkit.chain.verbs.convert import convert
    from vhdkit.chain.verbs.copy_layers import CopiedLayers, copy_layers
    from vhdkit.chain.verbs.create import DiskFormat, create_child, create_image
    from vhdkit.chain.verbs.garbage import GarbageItem, GarbageKind, collect_garbage
    from vhdkit.chain.verbs.merge import merge
    from vhdkit.chain.verbs.merge_in_place import Merge
    from vhdkit.chain.verbs.merge_recovery import merge_under_way, resume_merge
    from vhdkit.chain.verbs.pull import Pull, pull
    from vhdkit.chain.verbs.rebase import rebase
    from vhdkit.chain.verbs.relocate import Move, relocate
    from vhdkit.chain.verbs.repair import Repair, repair, restore
    from vhdkit.chain.verbs.resize import ResizeResult, resize
    from vhdkit.chain.verbs.snapshot import clone, snapshot, snapshot_many
    from vhdkit.disk import Disk, open_disk
    from vhdkit.errors import (
        AccessDenied,
        AddressInUse,
        AlreadyExists,
        Cancelled,
        CorruptImage,
        CorruptReason,
        DiskClosed,
        HasChildren,
        ImageInUse,
        InvalidArgument,
        IoFailed,
        NoSpace,
        NotesUnwritten,
        NotFound,
        OutOfRange,
        ParentError,
        ParentMismatch,
        ParentMissing,
        ParentRefused,
        ReadOnly,
        Replaced,
        SyncFailed,
        Unprotected,
        UnsupportedFormat,
        VhdkitError,
    )
    from vhdkit.finding import Finding, Severity
    from vhdkit.formats.format import ByteRange, Fix
    from vhdkit.formats.probe import FormatName
    from vhdkit.image import Extent, ExtentKind, KnownRun
    from vhdkit.jsontext import json_text
    from vhdkit.maker import is_maker_dead, maker_word
    from vhdkit.serve.control.client import ControlClient
    from vhdkit.trusted import TrustedFolder, TrustedFolders, trusted_parent_dirs
    from vhdkit.uncached import CacheMode
    from vhdkit.units import DiskSize, parse_disk_size

__version__ = "0.2.0.dev0"  # pyproject.toml takes it from here

__all__ = [
    "AccessDenied",
    "AddressInUse",
    "AlreadyExists",
    "ByteRange",
    "CacheMode",
    "Cancelled",
    "CompactResult",
    "Comparison",
    "ControlClient",
    "CopiedLayers",
    "CorruptImage",
    "CorruptReason",
    "Disk",
    "DiskClosed",
    "DiskFormat",
    "DiskSize",
    "Extent",
    "ExtentKind",
    "Finding",
    "Fix",
    "FormatName",
    "GarbageItem",
    "GarbageKind",
    "HasChildren",
    "ImageInUse",
    "InvalidArgument",
    "IoFailed",
    "KnownRun",
    "Merge",
    "Move",
    "NoSpace",
    "NotFound",
    "NotesUnwritten",
    "OpenOptions",
    "OutOfRange",
    "ParentError",
    "ParentMismatch",
    "ParentMissing",
    "ParentRefused",
    "Progress",
    "Pull",
    "ReadOnly",
    "Repair",
    "Replaced",
    "ResizeResult",
    "Severity",
    "SyncFailed",
    "TrustedFolder",
    "TrustedFolders",
    "Unprotected",
    "UnsupportedFormat",
    "VhdkitError",
    "__version__",
    "backups",
    "chain_held",
    "chain_paths",
    "check",
    "clone",
    "collect_garbage",
    "compact",
    "compare",
    "convert",
    "copy_layers",
    "create_child",
    "create_image",
    "find_children",
    "image_id",
    "is_maker_dead",
    "json_text",
    "jsonrpc",
    "maker_word",
    "mark_parents",
    "merge",
    "merge_under_way",
    "open_disk",
    "parse_disk_size",
    "pull",
    "rebase",
    "relocate",
    "repair",
    "resize",
    "restore",
    "resume_merge",
    "snapshot",
    "snapshot_many",
    "trusted_parent_dirs",
]

# Where each name lives, for the first use of it; the imports above are the same for type checkers.
_HOMES = {
    "vhdkit.chain.engine.chain": "Progress",
    "vhdkit.chain.verbs.check": "check",
    "vhdkit.chain.verbs.compact": "CompactResult compact",
    "vhdkit.chain.verbs.compare": "Comparison compare",
    "vhdkit.chain.verbs.convert": "convert",
    "vhdkit.chain.verbs.copy_layers": "CopiedLayers copy_layers",
    "vhdkit.chain.verbs.create": "DiskFormat create_child create_image",
    "vhdkit.chain.names.family": "chain_held chain_paths find_children image_id mark_parents",
    "vhdkit.chain.verbs.garbage": "GarbageItem GarbageKind collect_garbage",
    "vhdkit.chain.verbs.merge": "merge",
    "vhdkit.chain.verbs.merge_in_place": "Merge",
    "vhdkit.chain.verbs.merge_recovery": "merge_under_way resume_merge",
    "vhdkit.chain.verbs.pull": "Pull pull",
    "vhdkit.chain.verbs.rebase": "rebase",
    "vhdkit.chain.verbs.relocate": "Move relocate",
    "vhdkit.chain.verbs.repair": "Repair repair restore",
    "vhdkit.chain.verbs.resize": "ResizeResult resize",
    "vhdkit.chain.names.options": "OpenOptions",
    "vhdkit.chain.verbs.snapshot": "clone snapshot snapshot_many",
    "vhdkit.trusted": "TrustedFolder TrustedFolders trusted_parent_dirs",
    "vhdkit.disk": "Disk open_disk",
    "vhdkit.errors": (
        "AccessDenied AddressInUse AlreadyExists Cancelled CorruptImage CorruptReason DiskClosed HasChildren "
        "ImageInUse InvalidArgument IoFailed NoSpace NotesUnwritten NotFound OutOfRange ParentError ParentMismatch "
        "ParentMissing ParentRefused ReadOnly Replaced SyncFailed Unprotected UnsupportedFormat "
        "VhdkitError"
    ),
    "vhdkit.finding": "Finding Severity",
    "vhdkit.formats.probe": "FormatName",
    "vhdkit.formats.format": "ByteRange Fix",
    "vhdkit.image": "Extent ExtentKind KnownRun",
    "vhdkit.jsontext": "json_text",
    "vhdkit.maker": "is_maker_dead maker_word",
    "vhdkit.serve.control.client": "ControlClient",
    "vhdkit.uncached": "CacheMode",
    "vhdkit.units": "DiskSize parse_disk_size",
}
_MODULES = ("backups", "jsonrpc")  # public as wholes
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

if not TYPE_CHECKING:  # type checkers use the imports above, and refuse missing names

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _MODULES:
            return import_module(f"vhdkit.{name}")
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module 'vhdkit' has no attribute {name!r}")
        value = getattr(import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
