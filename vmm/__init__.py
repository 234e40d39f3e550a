# SPDX-License-Identifier: Apache-2.0
"""vmm: a thin KVM/QEMU virtual-machine manager whose disks are vhdkit chains.

This page of names is the whole public interface; everything else may change.

    import vmm

    manager = vmm.Manager()
    manager.create("web", memory_bytes=1 << 30, disks=[vmm.DiskWish("/srv/web.vhd")])
    manager.start("web")

Sizes are bytes. Every error is a `VmmError` with `machine`, `path`, `hint` and `exit_code`. Each name is imported when
it is first used, so a program that only starts a machine or catches errors loads nothing else.
"""

TYPE_CHECKING = False  # type checkers know the name; `typing` takes longer to import than all of this
if TYPE_CHECKING:
    from vmm.api.guest_access import GuestAccess
    from vmm.api.machine_snapshots import MachineSnapshots
    from vmm.api.manager import Deletion, DiskWish, MachineInfo, Manager
    from vmm.model.errors import (
        AccessDenied,
        AgentUnavailable,
        AlreadyExists,
        InUse,
        InvalidSpec,
        NoSpace,
        NotFound,
        QemuFailed,
        Refused,
        StoreFailed,
        TimedOut,
        Unsupported,
        VmmError,
        WrongState,
    )
    from vmm.model.spec import AdapterSpec, AutomaticSpec, DiskSpec, IntegrationSpec, MachineSpec, PathsSpec
    from vmm.snapshots.apply import Applied
    from vmm.snapshots.delete import Deleted
    from vmm.store.snapshots.tree import Snapshot
    from vmm.store.state import MachineState

__all__ = [
    "AccessDenied",
    "AdapterSpec",
    "AgentUnavailable",
    "AlreadyExists",
    "Applied",
    "AutomaticSpec",
    "Deleted",
    "Deletion",
    "DiskSpec",
    "DiskWish",
    "GuestAccess",
    "InUse",
    "IntegrationSpec",
    "InvalidSpec",
    "MachineInfo",
    "MachineSnapshots",
    "MachineSpec",
    "MachineState",
    "Manager",
    "NoSpace",
    "NotFound",
    "PathsSpec",
    "QemuFailed",
    "Refused",
    "Snapshot",
    "StoreFailed",
    "TimedOut",
    "Unsupported",
    "VmmError",
    "WrongState",
]

# Where each name lives, for the first use of it; the imports above say the same to type checkers.
_HOMES = {
    "vmm.model.errors": (
        "AccessDenied AgentUnavailable AlreadyExists InUse InvalidSpec NoSpace NotFound QemuFailed Refused "
        "StoreFailed TimedOut Unsupported VmmError WrongState"
    ),
    "vmm.api.guest_access": "GuestAccess",
    "vmm.api.manager": "Deletion DiskWish MachineInfo Manager",
    "vmm.snapshots.apply": "Applied",
    "vmm.snapshots.delete": "Deleted",
    "vmm.api.machine_snapshots": "MachineSnapshots",
    "vmm.store.snapshots.tree": "Snapshot",
    "vmm.model.spec": "AdapterSpec AutomaticSpec DiskSpec IntegrationSpec MachineSpec PathsSpec",
    "vmm.store.state": "MachineState",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


if not TYPE_CHECKING:

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
