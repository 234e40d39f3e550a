# SPDX-License-Identifier: Apache-2.0
"""The public names."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import vhdkit
import vmm
from tests.vhdkit.cli.running import good
from vhdkit import backups

PUBLIC = """
AccessDenied AddressInUse AlreadyExists ByteRange CacheMode Cancelled CompactResult Comparison ControlClient
CopiedLayers CorruptImage CorruptReason Disk DiskClosed DiskFormat DiskSize Extent ExtentKind Finding Fix FormatName
GarbageItem GarbageKind HasChildren ImageInUse InvalidArgument IoFailed KnownRun Merge Move NoSpace NotFound
NotesUnwritten OpenOptions OutOfRange ParentError ParentMismatch ParentMissing ParentRefused Progress Pull ReadOnly
Repair Replaced ResizeResult Severity SyncFailed TrustedFolder TrustedFolders Unprotected UnsupportedFormat
VhdkitError __version__ backups chain_held chain_paths check clone collect_garbage compact compare convert copy_layers
create_child create_image find_children image_id is_maker_dead json_text jsonrpc maker_word mark_parents merge
merge_under_way open_disk parse_disk_size pull rebase relocate repair resize restore resume_merge snapshot
snapshot_many trusted_parent_dirs
"""
MACHINES = """
AccessDenied AdapterSpec AgentUnavailable AlreadyExists Applied AutomaticSpec BackupWishes Consent ConsoleConnection
Deleted Deletion DiskInfo DiskRequest DiskSpec DiskWish Event ExchangedItem FillProgress ForgottenNights GuestAccess
GuestInfo GuestInterface Heartbeat InUse IntegrationSpec InvalidSpec KeptDisk MachineInfo MachineNight
MachineSnapshots MachineSpec MachineState Manager MergeResult NewId NoSpace NotFound OsInfo OwnDisk PathsSpec
QemuFailed Refused RepairStep RestoreRequest RestoredMachine Snapshot StoreFailed TakenOut TimedOut Unsupported
VmmError WrongState
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


def test_names_of_repositories_are_the_same_for_type_checkers() -> None:
    """Each public name of `vhdkit.backups` comes from the module from which type checkers take it, and exists."""
    tree = ast.parse(Path(backups.__file__).read_text(encoding="utf-8"))
    shown = {
        alias.name: node.module
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "importlib"
        for alias in node.names
    }  # fmt: skip
    assert shown == backups._HOME_OF and sorted(shown) == sorted(backups.__all__)
    assert [name for name in backups.__all__ if not hasattr(backups, name)] == []
    assert set(backups.__all__) <= set(dir(backups))
    with pytest.raises(AttributeError, match="prun"):
        backups.prun  # type: ignore[attr-defined]  # noqa: B018


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


# What a caller holds is typed all the same: these are JSON whose keys are open.
OPEN_DOCUMENTS = {
    "vmm.Event.details": "each event has details of its own",
    "vmm.MachineInfo.at_next_start": "each setting has a value of its own type",
}


def held_by_callers(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Each public function, method, property and field that our packages define, and its type as it is written."""
    for name in module.__all__:
        public = getattr(module, name)
        if inspect.isfunction(public):
            yield f"{module.__name__}.{name}", str(public.__annotations__.get("return", "None"))
        elif inspect.isclass(public):
            for base in public.__mro__:
                if base.__module__.split(".")[0] in ("vhdkit", "vmm"):
                    yield from ((f"{module.__name__}.{name}.{of}", words) for of, words in members(base))


def members(public: type) -> Iterator[tuple[str, str]]:
    """The same for one class."""
    yield from ((of, str(words)) for of, words in inspect.get_annotations(public).items() if not of.startswith("_"))
    for of, member in vars(public).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if inspect.isfunction(function) and (not of.startswith("_") or of in ("__enter__", "__iter__", "__getitem__")):
            yield of, str(function.__annotations__.get("return", "None"))


def untyped(words: str) -> bool:
    """True for a type whose parts have no names or types of their own: `tuple[int, str]`, `dict[str, Any]`."""
    for node in ast.walk(ast.parse(words, mode="eval")):
        if isinstance(node, ast.Subscript):
            kind = ast.unparse(node.value).rpartition(".")[2]
            inner = [
                ast.unparse(one) for one in (node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])
            ]
            if kind == "tuple" and inner[1:] != ["..."]:
                return True
            if kind in ("dict", "Mapping") and {"Any", "object"} & set(inner):
                return True
    bare = [ast.unparse(node) for node in ast.walk(ast.parse(words, mode="eval")) if isinstance(node, ast.Name)]
    return ("tuple" in bare and "tuple[" not in words) or ("dict" in bare and "dict[" not in words)


def test_callers_hold_typed_results() -> None:
    """No public function, method, property or field is a tuple of several things or a document, but those listed."""
    found = {where for module in (vhdkit, vmm) for where, words in held_by_callers(module) if untyped(words)}
    assert found == set(OPEN_DOCUMENTS)


@pytest.mark.parametrize(
    ("words", "is_untyped"),
    [
        ("tuple[str, int]", True), ("list[tuple[int, int]]", True), ("dict[str, Any]", True), ("tuple", True),
        ("Mapping[str, object] | None", True), ("tuple[str, ...]", False), ("dict[str, int]", False),
        ("list[DiskInfo]", False), ("None", False),
    ],
)  # fmt: skip
def test_untyped_results_are_found(words: str, is_untyped: bool) -> None:
    """Self-test: the rule knows a tuple and a document from a sequence and a table."""
    assert untyped(words) is is_untyped
