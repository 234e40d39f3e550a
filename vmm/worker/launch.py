# SPDX-License-Identifier: Apache-2.0
"""Everything that QEMU gets when it starts: sockets, descriptors, copies of files, and the command line.

Decides what a definition needs from this host, and that all of it is checked and held open before QEMU starts. What is
opened here reaches QEMU as a descriptor, so neither the permissions of QEMU's user nor later changes of names matter.
Must not know states.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from vmm.host.private_socket import bind_private
from vmm.kvm import program, uefi, userfault
from vmm.kvm.cmdline import UEFI_VARIABLES, Adapter, Device, Medium, Sockets, StartFacts, file_node, qemu_arguments
from vmm.kvm.process import Identity, check_reachable, private_copy, privileged_command
from vmm.model.errors import InvalidSpec, Unsupported, VmmError, of_os_error
from vmm.model.paths import MachinePaths, RuntimePaths
from vmm.model.spec import DiskSpec, MachineSpec
from vmm.store.media import is_device, kernel_hint, known_by, open_in_drive

FIRST_DESCRIPTOR = 10  # the first number that QEMU sees; lower ones have other uses
_NO_KERNEL_BYTES = 4096  # QEMU reads a header and four sectors of set-up code
UEFI_HINT = "install UEFI firmware for guests: sudo apt install ovmf"


@dataclass(slots=True)
class Launch:
    """What QEMU is started with. Call `close` once QEMU has started, or if it is not going to be started."""

    identity: Identity | None
    descriptors: dict[int, int] = field(default_factory=dict)  # number that QEMU sees -> our descriptor
    media: dict[str, str | None] = field(default_factory=dict)  # drive -> what identifies its medium
    # adapter -> (MTU restored, its switch's MTU); 0: none
    kept_mtus: dict[str, tuple[int, int]] = field(default_factory=dict)
    sets: int = 0
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def give(self, ours: int) -> int:
        """Pass this descriptor to QEMU under the number returned. `close` closes ours."""
        number = FIRST_DESCRIPTOR + len(self.descriptors)
        self.descriptors[number] = ours
        self._open.callback(os.close, ours)
        return number

    def give_set(self, ours: int) -> tuple[int, int]:
        """(set, number that QEMU sees) of a descriptor set with this one descriptor."""
        self.sets += 1
        return self.sets, self.give(ours)

    def give_secret(self, secret_id: str, content: bytes) -> Device:
        """Pass a secret to QEMU; returns the object with which QEMU reads it."""
        memory = os.memfd_create(secret_id, os.MFD_CLOEXEC)
        number = self.give(memory)
        os.write(memory, content)
        return {"qom-type": "secret", "id": secret_id, "file": f"/dev/fd/{number}"}

    def listen(self, path: str) -> int:
        """Listen on a socket at this path for QEMU; only our user can connect. Raises OSError."""
        return self.give(bind_private(path).detach())

    def close(self) -> None:
        """Close our descriptors."""
        self._open.close()


def no_adapters(launch: Launch) -> tuple[Adapter, ...]:
    """The adapters of a machine without a network."""
    del launch
    return ()


def prepare(
    spec: MachineSpec,
    machine: MachinePaths,
    runtime: RuntimePaths,
    *,
    accelerator: str,
    incoming: bool,
    identity: Identity | None,
    had_kernel: bool = False,
    adapters: Callable[[Launch], tuple[Adapter, ...]] = no_adapters,
    mtus: Mapping[str, int] = MappingProxyType({}),
) -> tuple[list[str], Launch]:
    """(the command line, what goes with it). Raises VmmError for anything missing; then nothing is left open.

    `adapters` provides the network adapters. `had_kernel`: the state to be restored was started with a kernel, so QEMU
    needs one, whatever its content. `mtus`: the MTUs that the restored guest knows, by adapter id.
    """
    check_reachable(runtime.folder, identity)
    for disk in spec.disks:
        if disk.controller == "ide" and disk.read_only and disk.kind != "iso":  # in a definition from elsewhere
            raise InvalidSpec(
                f"{disk.id} is read-only, but a disk on IDE cannot be read-only", machine=spec.name, path=disk.path,
                hint=f"vmm disk remove {spec.name} {disk.id}, and add it again with ,controller=scsi,read-only",
            )  # fmt: skip
    launch = Launch(identity, media={disk.id: None for disk in spec.disks if disk.kind == "iso"})
    try:
        media = {disk.id: _medium(spec, disk, launch) for disk in spec.disks if not disk.is_image and disk.path}
        services = spec.integration
        wants_agent = services.heartbeat or services.shutdown or services.time_sync or services.backup
        facts = StartFacts(
            accelerator=accelerator,
            nbd_socket=runtime.nbd,
            sockets=Sockets(
                qmp=launch.listen(runtime.qmp),
                serial=launch.listen(runtime.serial),
                agent=launch.listen(runtime.agent) if wants_agent else None,
                key_value=launch.listen(runtime.key_value) if services.key_value else None,
            ),
            vnc_socket=_display(runtime, identity) if spec.screen else None,
            kernel_path=_kernel(spec, runtime, identity, had_kernel=had_kernel),
            initrd_path=_copied(spec, "initrd", runtime, identity),
            media=media,
            adapters=tuple(_as_saved(one, mtus, launch) for one in adapters(launch)),
            incoming=incoming,
            uefi_code_path=find_uefi()[0] if spec.firmware == "uefi" else None,
            uefi_variables=_uefi_variables(machine, launch) if spec.firmware == "uefi" else None,
        )
        scratch = os.path.join(runtime.folder, "dev")
        with contextlib.suppress(FileExistsError):
            os.mkdir(scratch)
        os.chmod(scratch, 0o700)  # whatever our umask is; root mounts QEMU's device nodes over it
        command = privileged_command(
            [program.find(), *qemu_arguments(spec, facts)],
            identity=identity,
            uses_kvm=accelerator == "kvm",
            capture=userfault.best_way() if spec.background_capture and identity is not None else None,
            scratch_folder=scratch,
        )
    except OSError as error:
        launch.close()
        raise of_os_error(error, "prepare the machine's sockets") from error
    except BaseException:
        launch.close()
        raise
    return command, launch


def _display(runtime: RuntimePaths, identity: Identity | None) -> str:
    """Where QEMU itself listens for viewers of the screen: in the only folder that it may write to."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(runtime.vnc)
    if not os.path.isdir(runtime.display):
        os.mkdir(runtime.display, 0o700)
    if identity is not None:
        os.chown(runtime.display, *identity.owner, follow_symlinks=False)
    return runtime.vnc


def _copied(
    spec: MachineSpec, what: Literal["kernel", "initrd"], runtime: RuntimePaths, identity: Identity | None
) -> str | None:
    """Copy a file that QEMU opens by name to where QEMU's user may read it. None if the machine has none."""
    path = spec.kernel if what == "kernel" else spec.initrd
    if path is None:
        return None
    target = os.path.join(runtime.folder, what)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    try:
        return private_copy(path, target, identity)
    except VmmError as error:
        error.hint = error.hint or kernel_hint(spec.name, what)
        raise


def _as_saved(adapter: Adapter, mtus: Mapping[str, int], launch: Launch) -> Adapter:
    """The adapter as the restored memory knows it, whatever MTU its switch has now."""
    name = str(adapter.device["id"])
    wanted = int(adapter.device.get("host_mtu", 0))
    kept = mtus.get(name, wanted)
    if kept == wanted:
        return adapter
    launch.kept_mtus[name] = (kept, wanted)
    device = {key: value for key, value in adapter.device.items() if key != "host_mtu"}
    return replace(adapter, device={**device, "host_mtu": kept} if kept else device)


def _kernel(spec: MachineSpec, runtime: RuntimePaths, identity: Identity | None, *, had_kernel: bool) -> str | None:
    """The kernel; if memory is restored whose kernel is gone, a file of zeros, with which no guest can boot.

    QEMU restores memory only if there is a kernel exactly when there was one: a kernel brings a ROM, which is part of
    memory.
    """
    if spec.kernel is not None or not had_kernel:
        return _copied(spec, "kernel", runtime, identity)
    target = os.path.join(runtime.folder, "kernel")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    with open(target, "xb") as file:
        file.write(bytes(_NO_KERNEL_BYTES))
    os.chmod(target, 0o444)
    return target


def _medium(spec: MachineSpec, disk: DiskSpec, launch: Launch) -> Medium:
    if disk.kind == "iso":
        opened = open_in_drive(spec, disk)
        launch.media[disk.id] = known_by(opened, disk.path)
        number, descriptor = launch.give_set(opened)
        node = file_node(disk.id, number, read_only=True, is_device=is_device(opened))
        return Medium(node, ((number, descriptor),))
    from vmm.store.devices import medium_of  # few machines need this import, and every start would wait for it

    return medium_of(spec, disk, give_set=launch.give_set, give_secret=launch.give_secret)


def find_uefi() -> tuple[str, str]:
    """(code, empty variables) of the UEFI firmware. Raises Unsupported if none is installed."""
    if (found := uefi.find()) is not None:
        return found
    raise Unsupported("this host has no UEFI firmware for guests", hint=UEFI_HINT)


def _uefi_variables(machine: MachinePaths, launch: Launch) -> Medium:
    """The machine's own UEFI variables, created at its first start."""
    path = machine.uefi_variables
    try:
        if not os.path.exists(path):
            part = f"{path}.part"
            shutil.copyfile(find_uefi()[1], part)
            os.chmod(part, 0o600)
            os.rename(part, path)
        number, descriptor = launch.give_set(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
    except OSError as error:
        raise of_os_error(error, "open the UEFI variables", path=path) from error
    return Medium(file_node(UEFI_VARIABLES, number, read_only=False), ((number, descriptor),))
