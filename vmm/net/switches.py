# SPDX-License-Identifier: Apache-2.0
"""The switches of this host: finding, making, changing and deleting whole ones.

Decides that a switch is there whole or not at all, that one process at a time changes switches, and that one with
ports in use is not deleted. What a switch is on the host follows from its file at any time (`host_side`), so a reboot
loses nothing. Must not know machines.

    home/switches/NAME.json    home/switches/ID.leases    runtime/sw-FIRST-12-OF-ID/
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Callable, Iterator

from pydantic import ValidationError

from vmm.host.proc import locked
from vmm.model import errors, paths
from vmm.model.complaints import words_of
from vmm.net import cards, guest_addresses, records, switch_spec
from vmm.net.host_side import HostSide
from vmm.net.switch_process import SwitchProcess
from vmm.net.switch_spec import SwitchSpec

# -- files ------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """The names of all switches, sorted."""
    try:
        found = os.listdir(paths.switches_folder())
        return sorted(one.removesuffix(".json") for one in found if one.endswith(".json"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise errors.of_os_error(error, "list the switches", path=paths.switches_folder()) from error


def load(name: str) -> SwitchSpec:
    """A switch by its name. Raises NotFound, InvalidSpec."""
    path = paths.switch_file(name)
    try:
        spec = SwitchSpec.model_validate(records.read_object(path))
    except FileNotFoundError as error:
        known = ", ".join(names()) or "none"
        hint = f"create it: vmm switch create {name} --type private"
        raise errors.NotFound(f"switch {name!r} does not exist; existing switches: {known}", hint=hint) from error
    except OSError as error:
        raise errors.of_os_error(error, "read the switch", path=path) from error
    except ValidationError as error:
        raise errors.InvalidSpec(f"is not the definition of a switch: {words_of(error)}", path=path) from error
    except ValueError as error:
        raise errors.InvalidSpec(f"is not the definition of a switch: {error}", path=path) from error
    if spec.name != name:  # it would be deleted in the place of another
        raise errors.InvalidSpec(
            f"is not the definition of switch {name!r}: it holds that of {spec.name!r}",
            path=path,
            hint="give the file the name of its switch, or remove it",
        )
    return spec


def load_all() -> list[SwitchSpec]:
    """All switches that can be read."""
    found = []
    for name in names():
        with contextlib.suppress(errors.VmmError):
            found.append(load(name))
    return found


def _changing() -> contextlib.AbstractContextManager[None]:
    """One process at a time changes the switches of this host."""
    return locked(os.path.join(paths.switches_folder(), ".lock"))


def create(spec: SwitchSpec) -> None:
    """Add a switch, and have it on the host when it is one of the bridge back end. All of it, or nothing.

    Raises AlreadyExists, InvalidSpec for a network that another switch has or too long names of sockets, and as
    `ensure` does.
    """
    SwitchProcess.of(spec.id, spec.name)
    if spec.type == "internal":
        guest_addresses.refuse_network(spec)
        guest_addresses.refuse_range(spec)
    spec = cards.with_address(spec)
    paths.make_home()
    try:
        paths.make_folders(paths.switches_folder())
    except OSError as error:
        raise errors.of_os_error(error, "make the folder", path=paths.switches_folder()) from error
    with _changing():
        path = paths.switch_file(spec.name)
        refuse_existing(spec.name)
        for other in load_all():
            if spec.uplink is not None and other.uplink == spec.uplink:
                raise errors.InUse(f"{spec.uplink} is already the uplink of switch {other.name!r}")
            if spec.address and other.address and spec.network.overlaps(other.network):
                raise errors.InvalidSpec(f"the network {spec.network} overlaps with switch {other.name!r}'s")
        paths.write_whole(path, spec.to_json())
        try:
            ensure(spec)
            HostSide(spec).backend.check()
        except BaseException:
            host = HostSide(spec)
            with contextlib.suppress(errors.VmmError):
                host.remove()
            if not host.bridge.is_half_made():  # else `delete` must find it, to put the rest back
                _forget(spec)
            raise


def delete(name: str, *, force: bool = False) -> list[str]:
    """Take a switch away, and put the host back; what could not be put back, in words: of a card that is gone.

    Raises InUse while guests are plugged in, VmmError for what resists. Forced it ends with neither.
    """
    load(name)  # this error comes first, before the folder for the lock exists
    with _changing():
        spec = load(name)
        host = HostSide(spec)
        if not force:  # else nothing depends on it, and a process that hangs would be waited for
            _refuse_in_use(host)
        try:
            left = host.remove(give_up=force)
        except errors.VmmError as error:
            if spec.capabilities.in_kernel and error.hint is None:
                error.hint = "with --force, what cannot be put back is listed and left as it is"
            raise
        _forget(spec)
    return left


def refuse_existing(name: str) -> None:
    """Raise AlreadyExists where there is a switch of that name, with what helps where its making was cut short."""
    try:
        path = paths.switch_file(name)
    except errors.NotFound:
        return  # no switch can have that name, as making one says
    if os.path.exists(path):
        hint = None
        with contextlib.suppress(errors.VmmError):
            if HostSide(load(name)).bridge.is_unfinished():
                hint = f"it was made or deleted by a command that was killed: first vmm switch delete {name}"
        raise errors.AlreadyExists(f"there is a switch {name!r} already", hint=hint)


def _refuse_in_use(host: HostSide) -> None:
    """Raise InUse while guests are plugged in, TimedOut where the switch's process does not say it."""
    try:
        in_use = [one["name"] for one in host.guests() if one["connected"]]
    except errors.TimedOut as error:
        error.hint = error.hint or "with --force it is ended and deleted, even with guests on it"
        raise
    if in_use:
        raise errors.InUse(
            f"switch {host.spec.name!r} has guests on it: {', '.join(in_use)}",
            hint="unplug them first, or use --force",
        )


def _forget(spec: SwitchSpec) -> None:
    """Its files; last the one by which it is found."""
    for path in (paths.switch_leases(spec.id), paths.switch_file(spec.name)):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise errors.of_os_error(error, "delete the switch's file", path=path) from error


def change(name: str, changed: Callable[[SwitchSpec], SwitchSpec]) -> SwitchSpec:
    """Other leases or names for a switch: what `changed` makes of what it is by then. Raises NotFound."""
    load(name)
    with _changing():
        spec = changed(load(name))
        paths.write_whole(paths.switch_file(name), spec.to_json())
        ensure(spec)
    return spec


@contextlib.contextmanager
def staying(name: str) -> Iterator[HostSide]:
    """The switch of that name, which no other process deletes or changes while the block runs.

    For plugging something into it: starting its process would bring a deleted switch back.

    Raises NotFound, InvalidSpec.
    """
    load(name)  # this error comes first, before the folder for the lock exists
    with _changing():
        yield HostSide(load(name))


def set_uplink(name: str, interface: str) -> SwitchSpec:
    """Give an external switch another network card, or its own under another name; what it is then.

    The old card gets back what it had; where it is gone, the new one gets that. Raises NotFound, InvalidSpec, InUse,
    Unsupported, AccessDenied, and as `ensure` does; then it is on the old card, where that is possible.
    """
    from vmm.net.applying import Applying

    with staying(name) as host:
        spec = host.spec
        if spec.type != "external":
            raise errors.InvalidSpec(f"switch {name!r} is {spec.type}: only an external one has a network card")
        if any(one.name != name and one.uplink == interface for one in load_all()):
            raise errors.InUse(f"{interface} is already the uplink of another switch")
        changed = cards.with_address(switch_spec.make_switch(**{**spec.model_dump(), "uplink": interface}))
        if reasons := HostSide(changed).backend.plan().refusals:
            raise errors.Unsupported("; ".join(reasons))
        with host.bridge.changing():
            Applying(spec, host.folder, host.lease_path).undo(heir=interface)
        paths.write_whole(paths.switch_file(name), changed.to_json())
        try:
            HostSide(changed).ensure()
        except BaseException:
            paths.write_whole(paths.switch_file(name), spec.to_json())
            with contextlib.suppress(errors.VmmError):
                host.ensure()
                host.bridge.plug_again()
            raise
        HostSide(changed).bridge.plug_again()
        return changed


def set_mtu(name: str, mtu_bytes: int) -> tuple[SwitchSpec, list[str]]:
    """Have a switch carry other frames; it, and the ports whose guests keep theirs until they start again.

    Raises NotFound, InvalidSpec, Unsupported for more than the card carries, and as `ensure` does: all is as before.
    """
    with staying(name) as host:
        changed = switch_spec.make_switch(**{**host.spec.model_dump(), "mtu_bytes": mtu_bytes})
        if reasons := HostSide(changed).backend.plan().refusals:
            raise errors.Unsupported("; ".join(reasons))
        paths.write_whole(paths.switch_file(name), changed.to_json())
        try:
            HostSide(changed).ensure()
        except BaseException:
            paths.write_whole(paths.switch_file(name), host.spec.to_json())
            with contextlib.suppress(errors.VmmError):
                host.ensure()
            raise
        return changed, [one["name"] for one in host.guests() if one["connected"]]


def free_address() -> str:
    """The host's address for a new internal switch, in a network that is not in use here."""
    from vmm.net.bridge import Kernel

    taken = [spec.network for spec in load_all() if spec.address]
    with Kernel() as kernel:
        taken += [ipaddress.IPv4Interface(one).network for one in (*kernel.networks(), *kernel.routed())]
    return str(switch_spec.free_network(taken))


def ensure(spec: SwitchSpec) -> None:
    """Have the switch on this host now: rules, bridge and addresses, or its process. Doing it twice is fine."""
    HostSide(spec).ensure()
