# SPDX-License-Identifier: Apache-2.0
"""Kernel settings (sysctl) that several switches want at once, and what they were before the first.

Decides that a setting is put back when the last switch that holds it lets go, to what it was before the first took it:
in whatever order switches come and go, none loses what it needs, and in the end the host is as it was. Each of the two
works again when it was killed half way. Must not know which settings a switch needs.

    FOLDER/settings.json   {"boot_id": ..., "held": {SETTING: {"before": "0", "by": [SWITCH'S ID, ...]}, ...}}

`INV-SETTING-HELD`: what is in the file was read before the first write of that setting; a killed writer changes
nothing of it. A file of an earlier boot is worth nothing.
"""

from __future__ import annotations

import json
import os
from typing import Any

from vmm import errors, paths
from vmm.proc import locked

FILE_NAME, _LOCK_NAME = "settings.json", "settings.lock"


def hold(folder: str, setting: str, value: str, holder: str) -> None:
    """Give a setting this value until `holder` lets go of it; one that does not exist, as without IPv6, is fine."""
    with locked(os.path.join(folder, _LOCK_NAME)):
        held = _load(folder)
        one = held.setdefault(setting, {"before": _read(setting), "by": []})
        if holder not in one["by"]:
            one["by"].append(holder)
            _save(folder, held)
        write(setting, value)


def release(folder: str, setting: str, holder: str) -> None:
    """`holder` needs a setting no more; fine when it does not hold it."""
    with locked(os.path.join(folder, _LOCK_NAME)):
        held = _load(folder)
        one = held.get(setting)
        if one is None or holder not in one["by"]:
            return
        if one["by"] == [holder]:
            if one["before"] is not None:
                write(setting, one["before"])
            del held[setting]
        else:
            one["by"].remove(holder)
        _save(folder, held)


def _load(folder: str) -> dict[str, dict[str, Any]]:
    path = os.path.join(folder, FILE_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        held: dict[str, dict[str, Any]] = document["held"]
        return held if document["boot_id"] == boot_id() else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.VmmError(f"the settings from before cannot be read: {error}", path=path) from error


def _save(folder: str, held: dict[str, dict[str, Any]]) -> None:
    content = json.dumps({"boot_id": boot_id(), "held": held}, indent=1).encode()
    paths.write_whole(os.path.join(folder, FILE_NAME), content, durable=False)


def boot_id() -> str:
    """Another one after each boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _read(setting: str) -> str | None:
    try:
        with open(f"/proc/sys/{setting}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def write(setting: str, value: str) -> None:
    """Set it."""
    try:
        with open(f"/proc/sys/{setting}", "w", encoding="ascii") as file:
            file.write(value)
    except FileNotFoundError:
        return
    except OSError as error:
        raise errors.of_os_error(error, f"set {setting}") from error
