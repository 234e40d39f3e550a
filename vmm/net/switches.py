# SPDX-License-Identifier: Apache-2.0
"""The switches of this host: finding, creating, changing and deleting them.

Decides that a switch exists whole or not at all, that one process at a time changes switches, and that a switch with
ports in use is not deleted. Its state on the host follows from its file at any time (`host_side`), so a reboot loses
nothing. Must not know machines.

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
    if spec.name != name:  # otherwise it would be deleted in place of another one
        raise errors.InvalidSpec(
            f"is not the definition of switch {name!r}: it contains that of {spec.name!r}",
            path=path,
            hint="rename the file to its switch's name, or remove it",
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
    """Hold the lock with which one process at a time changes the switches of this host."""
    return locked(os.path.join(paths.switches_folder(), ".lock"))


def create(spec: SwitchSpec) -> None:
    """Add a switch, and create it on the host if it is of the bridge back end: completely, or not at all.

    Raises AlreadyExists, InvalidSpec for a network that another switch has or for too long socket paths, and whatever
    `ensure` raises.
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
            if not host.bridge.is_half_made():  # otherwise `delete` must find it, to undo the rest
                _forget(spec)
            raise


def delete(name: str, *, force: bool = False) -> list[str]:
    """Delete a switch and restore the host; returns, in words, what could not be restored, such as the settings of a
    missing card.

    Raises InUse while guests are plugged in, VmmError for what cannot be restored; with `force` it raises neither.
    """
    load(name)  # this error comes first, before the folder for the lock exists
    with _changing():
        spec = load(name)
        host = HostSide(spec)
        if not force:  # with `force` nothing depends on the answer, and a hanging process would delay it
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
    """Raise AlreadyExists if a switch of that name exists, with a hint if its creation was interrupted."""
    try:
        path = paths.switch_file(name)
    except errors.NotFound:
        return  # no switch can have that name, as creating one reports
    if os.path.exists(path):
        hint = None
        with contextlib.suppress(errors.VmmError):
            if HostSide(load(name)).bridge.is_unfinished():
                hint = f"a command that created or deleted it was killed: first vmm switch delete {name}"
        raise errors.AlreadyExists(f"a switch {name!r} already exists", hint=hint)


def _refuse_in_use(host: HostSide) -> None:
    """Raise InUse while guests are plugged in, TimedOut if the switch's process does not answer."""
    try:
        in_use = [one["name"] for one in host.guests() if one["connected"]]
    except errors.TimedOut as error:
        error.hint = error.hint or "--force ends and deletes it even with guests on it"
        raise
    if in_use:
        raise errors.InUse(
            f"switch {host.spec.name!r} has guests on it: {', '.join(in_use)}",
            hint="unplug them first, or use --force",
        )


def _forget(spec: SwitchSpec) -> None:
    """Remove its files; the one by which it is found is last."""
    for path in (paths.switch_leases(spec.id), paths.switch_file(spec.name)):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise errors.of_os_error(error, "delete the switch's file", path=path) from error


def change(name: str, changed: Callable[[SwitchSpec], SwitchSpec]) -> SwitchSpec:
    """Change the leases or the name of a switch: `changed` gets its current definition. Raises NotFound."""
    load(name)
    with _changing():
        spec = changed(load(name))
        paths.write_whole(paths.switch_file(name), spec.to_json())
        ensure(spec)
    return spec


@contextlib.contextmanager
def staying(name: str) -> Iterator[HostSide]:
    """The switch of that name; no other process deletes or changes it while the block runs.

    Used for plugging something into it: starting its process would bring back a deleted switch.

    Raises NotFound, InvalidSpec.
    """
    load(name)  # this error comes first, before the folder for the lock exists
    with _changing():
        yield HostSide(load(name))


def set_uplink(name: str, interface: str) -> SwitchSpec:
    """Give an external switch another network card, or its own under a new name; returns the changed switch.

    The old card gets its settings back; if it is gone, the new one gets them. Raises NotFound, InvalidSpec, InUse,
    Unsupported, AccessDenied, and whatever `ensure` raises; the switch is then on the old card again, if possible.
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
    """Change the MTU of a switch; returns it, and the ports whose guests keep the old MTU until they restart.

    Raises NotFound, InvalidSpec, Unsupported for more than the card carries, and whatever `ensure` raises; nothing has
    changed then.
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
    """Make the switch run on this host: rules, bridge and addresses, or its process. Idempotent."""
    HostSide(spec).ensure()
