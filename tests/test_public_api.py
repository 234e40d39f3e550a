# SPDX-License-Identifier: Apache-2.0
"""The public names."""

from __future__ import annotations

import vhdkit

PUBLIC = """
AccessDenied AddressInUse AlreadyExists CompactResult Comparison ControlClient CorruptImage CorruptReason Disk
DiskFormat Extent ExtentKind Finding Fix FormatName GarbageItem GarbageKind HasChildren ImageInUse InvalidArgument
IoFailed Merge Move NoSpace NotFound OpenOptions OutOfRange ParentError ParentMismatch ParentMissing ParentRefused
Progress ReadOnly Repair ResizeResult Severity SyncFailed UnsupportedFormat VhdkitError check clone collect_garbage
compact compare convert create_child create_image merge merge_under_way open_disk rebase relocate repair resize restore
resume_merge snapshot snapshot_many
"""


def test_public_names_are_pinned() -> None:
    """A name is added or taken away on purpose only: here, and in the changelog."""
    assert sorted(vhdkit.__all__) == sorted(PUBLIC.split())


def test_every_public_name_is_documented() -> None:
    """Each public class and function says what it is."""
    undocumented = [name for name in vhdkit.__all__ if name != "Progress" and not getattr(vhdkit, name).__doc__]
    assert undocumented == []
