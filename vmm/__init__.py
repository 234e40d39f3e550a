# SPDX-License-Identifier: Apache-2.0
"""vmm: a thin KVM/QEMU virtual-machine manager whose disks are vhdkit chains.

This page of names is the whole public interface; everything else may change.

    import vmm

    manager = vmm.Manager()
    manager.create("web", memory_bytes=1 << 30, disks=[vmm.DiskRequest("/srv/web.vhd")])
    manager.start("web")

Sizes are bytes. Every error is a `VmmError` with `machine`, `path`, `hint` and `exit_code`. Each name is imported when
it is first used, so a program that only starts a machine or catches errors loads nothing else.
"""

# The public names, by the module that defines them. Type checkers read the imports below, which a test compares.
_HOMES = {
    "vmm.api.disk_request": "DiskRequest DiskWish",
    "vmm.api.guest_access": "ConsoleConnection GuestAccess",
    "vmm.api.backups": "BackupWishes ForgottenNights MachineNight",
    "vmm.api.machine": "MergeResult",
    "vmm.api.machine_snapshots": "MachineSnapshots",
    "vmm.api.deletion": "Deletion KeptDisk",
    "vmm.api.manager": "DiskInfo MachineInfo Manager",
    "vmm.api.new_id": "NewId OwnDisk TakenOut",
    "vmm.api.export_import.foreign": "Consent",
    "vmm.api.repair": "RepairStep",
    "vmm.api.restoring.found_night": "RestoreRequest",
    "vmm.api.restoring.restoring": "RestoredMachine",
    "vmm.model.errors": (
        "AccessDenied AgentUnavailable AlreadyExists InUse InvalidSpec NoSpace NotFound QemuFailed Refused "
        "StoreFailed TimedOut Unsupported VmmError WrongState"
    ),
    "vmm.model.events": "Event",
    "vmm.model.guest": "ExchangedItem GuestInfo GuestInterface Heartbeat OsInfo",
    "vmm.model.spec": "AdapterSpec AutomaticSpec DiskSpec IntegrationSpec MachineSpec PathsSpec",
    "vmm.processes.answers": "FillProgress",
    "vmm.snapshots.apply": "Applied",
    "vmm.snapshots.delete": "Deleted",
    "vmm.store.snapshots.tree": "Snapshot",
    "vmm.store.state": "MachineState",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME_OF)  # noqa: PLE0605

TYPE_CHECKING = False  # type checkers know the name; `typing` takes longer to import than all of this
if TYPE_CHECKING:
    from vmm.api.backups import BackupWishes as BackupWishes
    from vmm.api.backups import ForgottenNights as ForgottenNights
    from vmm.api.backups import MachineNight as MachineNight
    from vmm.api.deletion import Deletion as Deletion
    from vmm.api.deletion import KeptDisk as KeptDisk
    from vmm.api.disk_request import DiskRequest as DiskRequest
    from vmm.api.disk_request import DiskWish as DiskWish
    from vmm.api.export_import.foreign import Consent as Consent
    from vmm.api.guest_access import ConsoleConnection as ConsoleConnection
    from vmm.api.guest_access import GuestAccess as GuestAccess
    from vmm.api.machine import MergeResult as MergeResult
    from vmm.api.machine_snapshots import MachineSnapshots as MachineSnapshots
    from vmm.api.manager import DiskInfo as DiskInfo
    from vmm.api.manager import MachineInfo as MachineInfo
    from vmm.api.manager import Manager as Manager
    from vmm.api.new_id import NewId as NewId
    from vmm.api.new_id import OwnDisk as OwnDisk
    from vmm.api.new_id import TakenOut as TakenOut
    from vmm.api.repair import RepairStep as RepairStep
    from vmm.api.restoring.found_night import RestoreRequest as RestoreRequest
    from vmm.api.restoring.restoring import RestoredMachine as RestoredMachine
    from vmm.model.errors import AccessDenied as AccessDenied
    from vmm.model.errors import AgentUnavailable as AgentUnavailable
    from vmm.model.errors import AlreadyExists as AlreadyExists
    from vmm.model.errors import InUse as InUse
    from vmm.model.errors import InvalidSpec as InvalidSpec
    from vmm.model.errors import NoSpace as NoSpace
    from vmm.model.errors import NotFound as NotFound
    from vmm.model.errors import QemuFailed as QemuFailed
    from vmm.model.errors import Refused as Refused
    from vmm.model.errors import StoreFailed as StoreFailed
    from vmm.model.errors import TimedOut as TimedOut
    from vmm.model.errors import Unsupported as Unsupported
    from vmm.model.errors import VmmError as VmmError
    from vmm.model.errors import WrongState as WrongState
    from vmm.model.events import Event as Event
    from vmm.model.guest import ExchangedItem as ExchangedItem
    from vmm.model.guest import GuestInfo as GuestInfo
    from vmm.model.guest import GuestInterface as GuestInterface
    from vmm.model.guest import Heartbeat as Heartbeat
    from vmm.model.guest import OsInfo as OsInfo
    from vmm.model.spec import AdapterSpec as AdapterSpec
    from vmm.model.spec import AutomaticSpec as AutomaticSpec
    from vmm.model.spec import DiskSpec as DiskSpec
    from vmm.model.spec import IntegrationSpec as IntegrationSpec
    from vmm.model.spec import MachineSpec as MachineSpec
    from vmm.model.spec import PathsSpec as PathsSpec
    from vmm.processes.answers import FillProgress as FillProgress
    from vmm.snapshots.apply import Applied as Applied
    from vmm.snapshots.delete import Deleted as Deleted
    from vmm.store.snapshots.tree import Snapshot as Snapshot
    from vmm.store.state import MachineState as MachineState
else:

    def __getattr__(name: str) -> object:
        from importlib import import_module

        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module 'vmm' has no attribute {name!r}")
        value = getattr(import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
