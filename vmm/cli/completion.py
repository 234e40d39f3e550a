# SPDX-License-Identifier: Apache-2.0
"""Shell completion of names: machines, switches, adapters, disks, snapshots and network interfaces.

Decides which names a parameter of a command can take, by the parameter's name and the command's group. Used only while
a shell asks for completions (`_VMM_COMPLETE`), so other commands do not pay for it. If names cannot be read, none are
offered: a completion never fails. Verbs, options and their choices are completed by click itself.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import click
from click.shell_completion import CompletionItem

from vmm.cli.common import AnyType
from vmm.model.errors import VmmError

Names: TypeAlias = Callable[[click.Context], Iterable[str]]


_NEW = (("create", "name"), ("add", "schedule"))  # a name that does not exist yet


class NameType(AnyType):
    """A text whose possible values are looked up when a shell asks for them."""

    name = "text"

    def __init__(self, names: Names) -> None:
        self._names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value unchanged."""
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin with `incomplete`."""
        with contextlib.suppress(VmmError, OSError):
            return [CompletionItem(name) for name in sorted(self._names(ctx)) if name.startswith(incomplete)]
        return []


def with_names(command: click.Command, verb: str) -> click.Command:
    """The command, or every command of a group, with completion of names."""
    for one in _commands_of(command):
        for param in one.params:
            is_new = (one.name, param.name) in _NEW
            names = None if is_new else _names_for(param.name or "", verb)
            if names is not None:
                param.type = NameType(names)
    return command


def _commands_of(command: click.Command) -> Iterator[click.Command]:
    """The command, or every command of a group and of the groups in it."""
    if not isinstance(command, click.Group):
        yield command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        if below is not None:
            yield from _commands_of(below)


def _names_for(parameter: str, verb: str) -> Names | None:
    """The values that a parameter can have; None if they are not names that are known."""
    if verb == "switch":
        return {"name": _switches, "uplink": _interfaces, "adapter": _adapters_of_all}.get(parameter)
    if parameter in ("machine", "names") or (parameter == "name" and verb != "snapshot"):
        return _machines
    return {
        "schedule": _schedules,
        "schedules": _schedules,
        "machines": _machines,
        "names": _machines,
        "nic": _switches,
        "adapter": _adapters,
        "drive": _drives,
        "snapshot": _snapshots,
    }.get(parameter, _disks if (verb, parameter) == ("disk", "disk") else None)


def _schedules(ctx: click.Context) -> Iterable[str]:
    from vmm.schedule import store

    return store.names()


def _switches(ctx: click.Context) -> Iterable[str]:
    from vmm.net import switches

    return switches.names()


def _interfaces(ctx: click.Context) -> Iterable[str]:
    return [name for _, name in socket.if_nameindex()]


def _machines(ctx: click.Context) -> Iterable[str]:
    from vmm.store import registry

    return registry.names()


def _adapters_of_all(ctx: click.Context) -> Iterable[str]:
    from vmm.store import registry

    return [f"{machine.name}/{one.id}" for machine in registry.load_all()[0] for one in machine.spec.adapters]


def _machine_of(ctx: click.Context) -> str:
    return str(ctx.params.get("machine") or ctx.params.get("name") or "")


def _adapters(ctx: click.Context) -> Iterable[str]:
    from vmm.store import registry

    return [one.id for one in registry.load(_machine_of(ctx)).spec.adapters]


def _disks(ctx: click.Context) -> Iterable[str]:
    from vmm.store import registry

    return [one.id for one in registry.load(_machine_of(ctx)).spec.disks]


def _drives(ctx: click.Context) -> Iterable[str]:
    from vmm.store import registry

    return [one.id for one in registry.load(_machine_of(ctx)).spec.disks if not one.is_image]


def _snapshots(ctx: click.Context) -> Iterable[str]:
    from vmm.store import registry
    from vmm.store.snapshots.store import load_tree

    return [one.name for one in load_tree(registry.load(_machine_of(ctx)).paths).snapshots.values()]
