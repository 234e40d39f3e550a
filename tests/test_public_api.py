# SPDX-License-Identifier: Apache-2.0
"""The public names."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import vhdkit
import vmm
from tests.vhdkit.cli.running import good

PUBLIC = """
AccessDenied AddressInUse AlreadyExists Cancelled CompactResult Comparison ControlClient CorruptImage CorruptReason
Disk DiskClosed DiskFormat DiskSize Extent ExtentKind Finding Fix FormatName GarbageItem GarbageKind HasChildren
ImageInUse InvalidArgument IoFailed Merge Move NoSpace NotFound OpenOptions OutOfRange ParentError ParentMismatch
ParentMissing ParentRefused Progress ReadOnly Repair Replaced ResizeResult Severity SyncFailed TrustedFolder
TrustedFolders Unprotected UnsupportedFormat VhdkitError __version__ chain_held chain_paths check clone
collect_garbage compact compare convert create_child create_image find_children image_id is_maker_dead json_text
jsonrpc maker_word mark_parents merge merge_under_way open_disk parse_disk_size rebase relocate repair resize restore
resume_merge snapshot snapshot_many trusted_parent_dirs
"""
MACHINES = """
AccessDenied AdapterSpec AgentUnavailable AlreadyExists Applied AutomaticSpec BackupResult ConsoleConnection Deleted
Deletion DiskInfo DiskRequest DiskSpec DiskWish Event ExchangedItem GuestAccess GuestInfo GuestInterface Heartbeat
InUse IntegrationSpec InvalidSpec KeptDisk MachineInfo MachineSnapshots MachineSpec MachineState Manager MergeResult
NewId NoSpace NotFound OsInfo OwnDisk PathsSpec QemuFailed Refused RepairStep Snapshot StoreFailed TakenOut TimedOut
Unsupported VmmError WrongState
"""


def test_public_names_change_only_on_purpose() -> None:
    """A name is added or removed only on purpose: here, and in the changelog."""
    assert sorted(vhdkit.__all__) == sorted(PUBLIC.split())
    assert sorted(vmm.__all__) == sorted(MACHINES.split())


def test_type_checkers_see_the_same_names() -> None:
    """The imports of vmm that only type checkers read are the same as at run time, from the same modules."""
    tree = ast.parse(Path(vmm.__file__).read_text(encoding="utf-8"))
    shown = {
        alias.name: node.module
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "importlib"
        for alias in node.names if alias.asname == alias.name
    }  # fmt: skip
    assert shown == vmm._HOME_OF


def test_every_public_name_is_documented() -> None:
    """Each public class and function has a docstring."""
    undocumented = [name for name in vhdkit.__all__ if name != "Progress" and not getattr(vhdkit, name).__doc__]
    undocumented += [name for name in vmm.__all__ if not getattr(vmm, name).__doc__]
    assert undocumented == []


def test_errors_and_the_control_client_need_no_numpy() -> None:
    """A program that only controls a server or catches errors does not import what disks need."""
    program = "import sys, vhdkit; vhdkit.ControlClient; vhdkit.VhdkitError; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False"]


def test_the_version_is_that_of_the_package() -> None:
    """The version in the module is the one that pip and --version show."""
    assert vhdkit.__version__ == importlib.metadata.version("vhdkit"), "run script/setup"
    assert f"vhdkit {vhdkit.__version__}, " in good("--version")


def test_unknown_names_are_attribute_errors() -> None:
    """A misspelt name fails as in any module, and dir() lists the public names."""
    with pytest.raises(AttributeError, match="opendisk"):
        vhdkit.opendisk  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="Menager"):
        vmm.Menager  # type: ignore[attr-defined]  # noqa: B018
    assert set(vhdkit.__all__) <= set(dir(vhdkit)) and set(vmm.__all__) <= set(dir(vmm))
