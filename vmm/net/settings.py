# SPDX-License-Identifier: Apache-2.0
"""Kernel settings (sysctl) that several switches want at once, and their values before the first switch.

Decides that a setting is restored when the last switch that holds it releases it, to its value before the first one
took it: in whatever order switches come and go, none loses what it needs, and in the end the host is as it was. Values
that other programs set or want meanwhile stay. Holding and releasing can both be repeated after a kill half-way. Must
not know which settings a switch needs.

    FOLDER/settings.json   {"boot_id": ..., "held": {SETTING: HELD, ...}}
    HELD                   {"before": "0", "value": "1", "everywhere": "0", "by": [SWITCH'S ID, ...]}
                           `everywhere`: the earlier value of the same setting under all/

`INV-SETTING-HELD`: a value in the file was read before the first write of that setting; a killed writer does not
change it. A file from an earlier boot is ignored.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from vmm.host.proc import locked
from vmm.model import errors, paths
from vmm.net import records

FILE_NAME, _LOCK_NAME = "settings.json", "settings.lock"
_SETTING = re.compile(r"net(/[^/\s]+)+")
_OF_INTERFACE = re.compile(r"(net/ipv[46]/conf/)([^/]+)(/.+)")


def hold(folder: str, setting: str, value: str, holder: str) -> None:
    """Give a setting this value until `holder` releases it; a setting that does not exist, as without IPv6, is
    skipped.
    """
    hold_all(folder, {setting: value}, holder)


def hold_all(folder: str, values: Mapping[str, str], holder: str) -> None:
    """As `hold`, for several settings, written in this order."""
    with locked(os.path.join(folder, _LOCK_NAME)):
        held = _load(folder)
        known = dict(held)
        for setting, wanted in values.items():
            one = held.setdefault(setting, _found(setting, known))
            one["value"] = wanted
            if holder not in one["by"]:
                one["by"].append(holder)
        _save(folder, held)
        for setting, wanted in values.items():
            write(setting, wanted)


def release(folder: str, setting: str, holder: str) -> None:
    """Release a setting that `holder` no longer needs; succeeds if it does not hold it."""
    release_all(folder, holder, lambda name: name == setting)


def release_all(folder: str, holder: str, concerns: Callable[[str], bool]) -> None:
    """As `release`, for everything that it holds and for which `concerns` returns True."""
    with locked(os.path.join(folder, _LOCK_NAME)):
        held = _load(folder)
        mine = [name for name, one in held.items() if holder in one["by"] and concerns(name)]
        if not mine:
            return
        for name in mine:
            if held[name]["by"] == [holder]:
                for newcomer in _newcomers(name, held):
                    _put_back(newcomer, held[name])
                _put_back(name, held[name])
        for name in mine:
            held[name]["by"].remove(holder)
        _save(folder, {name: one for name, one in held.items() if one["by"]})


def _found(setting: str, held: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a setting that no switch held yet. A value from a default of ours is not the old one."""
    there = value(setting)
    default = held.get(_of(setting, "default"), {})
    if there is not None and there == default.get("value"):
        there = default["before"]
    return {"before": there, "everywhere": _everywhere(setting), "by": []}


def before(folder: str, setting: str) -> str | None:
    """The value of a setting before the first switch took it; None if no switch holds it."""
    one = _load(folder).get(setting)
    return None if one is None else one["before"]


def _put_back(setting: str, one: Mapping[str, Any]) -> None:
    """Restore the old value, unless another program changed it meanwhile.

    A program may have set another value, or ours on all interfaces, as Docker and libvirt do with `ip_forward`.
    """
    ours, there = one.get("value"), value(setting)
    if one["before"] is None or there in (None, one["before"]) or (ours is not None and there != ours):
        return
    everywhere = _everywhere(setting)
    if everywhere is not None and everywhere == ours != one.get("everywhere"):
        return
    write(setting, one["before"])


def _of(setting: str, interface: str) -> str:
    """The same setting of another interface: writing to `all` changes every interface, a new one starts with
    `default`.
    """
    return _OF_INTERFACE.sub(rf"\g<1>{interface}\g<3>", setting)


def _everywhere(setting: str) -> str | None:
    return value(_of(setting, "all")) if _OF_INTERFACE.fullmatch(setting) else None


def _newcomers(setting: str, held: Mapping[str, Any]) -> list[str]:
    """The settings of interfaces that were created since and have the value of their default, `setting`."""
    found = _OF_INTERFACE.fullmatch(setting)
    if found is None or found[2] != "default":
        return []
    names = [name for name in interfaces(found[1]) if name not in ("all", "default", "lo")]
    return [other for name in names if (other := f"{found[1]}{name}{found[3]}") not in held]


def interfaces(folder: str = "net/ipv4/conf/") -> list[str]:
    """The interfaces that have settings in that folder of the kernel, with `all` and `default`."""
    try:
        return sorted(os.listdir(f"/proc/sys/{folder}"))
    except OSError:
        return []


def _load(folder: str) -> dict[str, dict[str, Any]]:
    path = os.path.join(folder, FILE_NAME)
    try:
        document = records.read_object(path)
        if document.get("boot_id") != boot_id():
            return {}
        held = document.get("held")
        if not isinstance(held, dict):
            raise ValueError("it does not list the settings")
        for name, one in held.items():
            _check(name, one)
        return held
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise errors.VmmError(
            f"the kernel settings from before the first switch cannot be read: {error}",
            path=path,
            hint="remove the file; the settings then stay as they are now",
        ) from error


def _check(name: str, one: object) -> None:
    """Raise ValueError for anything but a setting of ours: its name becomes a path that is written to."""
    if not _SETTING.fullmatch(name) or {".", ".."} & set(name.split("/")):
        raise ValueError(f"{name[:80]!r} is not a setting of the network")
    texts = [one.get(key) for key in ("before", "value", "everywhere")] if isinstance(one, dict) else [0]
    by = one.get("by") if isinstance(one, dict) else None
    is_sound = isinstance(by, list) and all(isinstance(holder, str) for holder in by)
    if not is_sound or not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"the entry of {name} is damaged")


def _save(folder: str, held: dict[str, dict[str, Any]]) -> None:
    content = json.dumps({"boot_id": boot_id(), "held": held}, indent=1).encode()
    paths.write_whole(os.path.join(folder, FILE_NAME), content, durable=False)


def boot_id() -> str:
    """An id that is different after each boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def value(setting: str) -> str | None:
    """The kernel's value; None if it has no such setting."""
    try:
        with open(f"/proc/sys/{setting}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def write(setting: str, value: str) -> None:
    """Set the value."""
    try:
        with open(f"/proc/sys/{setting}", "w", encoding="ascii") as file:
            file.write(value)
    except FileNotFoundError:
        return
    except OSError as error:
        raise errors.of_os_error(error, f"set {setting}") from error
