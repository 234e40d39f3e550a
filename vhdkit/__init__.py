# SPDX-License-Identifier: Apache-2.0
"""vhdkit: read and write virtual hard disks (VHD, AVHD, raw), alone and in chains.

This page of names is the whole public interface; everything else may change.

    import vhdkit

    with vhdkit.open_disk("leaf.avhd") as disk:
        boot_sector = disk.read(0, 512)

Sizes and offsets are bytes unless a name says sectors (512 bytes). Chains are listed leaf first. Every error is a
`VhdkitError` with `path`, `structure`, `offset_bytes`, `errno` and `exit_code`.
"""

from vhdkit.chain.chain import Progress
from vhdkit.chain.check import check
from vhdkit.chain.compact import CompactResult, compact
from vhdkit.chain.compare import Comparison, compare
from vhdkit.chain.convert import convert
from vhdkit.chain.create import DiskFormat, create_child, create_image
from vhdkit.chain.garbage import GarbageItem, GarbageKind, collect_garbage
from vhdkit.chain.merge import Merge, merge, merge_under_way, resume_merge
from vhdkit.chain.rebase import rebase
from vhdkit.chain.relocate import Move, relocate
from vhdkit.chain.repair import Repair, repair, restore
from vhdkit.chain.resize import ResizeResult, resize
from vhdkit.chain.resolve import OpenOptions
from vhdkit.chain.snapshot import clone, snapshot, snapshot_many
from vhdkit.disk import Disk, open_disk
from vhdkit.errors import (
    AccessDenied,
    AddressInUse,
    AlreadyExists,
    CorruptImage,
    CorruptReason,
    HasChildren,
    ImageInUse,
    InvalidArgument,
    IoFailed,
    NoSpace,
    NotFound,
    OutOfRange,
    ParentError,
    ParentMismatch,
    ParentMissing,
    ParentRefused,
    ReadOnly,
    SyncFailed,
    UnsupportedFormat,
    VhdkitError,
)
from vhdkit.finding import Finding, Severity
from vhdkit.formats.probe import FormatName
from vhdkit.formats.vhd.repair import Fix
from vhdkit.image import Extent, ExtentKind
from vhdkit.serve.control_client import ControlClient

__all__ = [
    "AccessDenied",
    "AddressInUse",
    "AlreadyExists",
    "CompactResult",
    "Comparison",
    "ControlClient",
    "CorruptImage",
    "CorruptReason",
    "Disk",
    "DiskFormat",
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
    "Merge",
    "Move",
    "NoSpace",
    "NotFound",
    "OpenOptions",
    "OutOfRange",
    "ParentError",
    "ParentMismatch",
    "ParentMissing",
    "ParentRefused",
    "Progress",
    "ReadOnly",
    "Repair",
    "ResizeResult",
    "Severity",
    "SyncFailed",
    "UnsupportedFormat",
    "VhdkitError",
    "check",
    "clone",
    "collect_garbage",
    "compact",
    "compare",
    "convert",
    "create_child",
    "create_image",
    "merge",
    "merge_under_way",
    "open_disk",
    "rebase",
    "relocate",
    "repair",
    "resize",
    "restore",
    "resume_merge",
    "snapshot",
    "snapshot_many",
]
