# SPDX-License-Identifier: Apache-2.0
"""The ports of a bridge, one file each, so that its rules can be loaded again at any time.

Decides the form of the files, that a file without a tap is removed, and what a damaged one means: its tap stays in the
bridge, but the guest can send nothing, because its guards are unknown. The machine that owns the port writes the
record again within a second (`joining`). Must not know bridges or rules.

    FOLDER/TAP.json   {"interface": TAP, "port": PORT}     PORT as in `ports`
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from vmm.model import errors, paths
from vmm.net import ports, records
from vmm.net.engine import PortRules
from vmm.net.ports import PortSetup

_INTERFACE = re.compile(r"[^/\s.][^/\s]{0,14}")
# No frame has the source address 0, so a port that may send only from it sends nothing.
CLOSED = PortRules(addresses=frozenset({bytes(6)}))


@dataclass(frozen=True, slots=True)
class PortFile:
    """A port whose tap is on the host. `setup` is None for a damaged record: `problem` says what is wrong."""

    interface: str
    path: str
    setup: PortSetup | None
    problem: str = ""


def read_all(folder: str, *, remove_stale: bool = False) -> list[PortFile]:
    """The ports whose taps exist, sorted by tap. With `remove_stale`, which needs the lock of the switch, records of
    other taps are removed.
    """
    found = []
    for interface, path in _files(folder):
        if os.path.exists(f"/sys/class/net/{interface}"):
            found.append(_read(interface, path))
        elif remove_stale:
            with contextlib.suppress(OSError):
                os.unlink(path)
    return found


def _files(folder: str) -> Iterator[tuple[str, str]]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise errors.of_os_error(error, "list the ports", path=folder) from error
    for name in names:
        interface, extension = os.path.splitext(name)
        if extension == ".json" and _INTERFACE.fullmatch(interface):
            yield interface, os.path.join(folder, name)


def _read(interface: str, path: str) -> PortFile:
    try:
        document = records.read_object(path)
        if document.get("interface") != interface:
            raise ValueError("it is the record of another interface")
        return PortFile(interface, path, ports.from_document(document.get("port")))
    except errors.VmmError as error:
        return PortFile(interface, path, None, error.problem)
    except OSError as error:
        return PortFile(interface, path, None, error.strerror or str(error))
    except ValueError as error:
        return PortFile(interface, path, None, str(error))


def write(folder: str, interface: str, setup: PortSetup) -> None:
    """Record a port, replacing what was recorded. Raises VmmError."""
    paths.make_private(folder)
    document = {"interface": interface, "port": ports.to_document(setup)}
    paths.write_whole(_path(folder, interface), json.dumps(document).encode(), durable=False)


def remove(folder: str, interface: str) -> None:
    """Forget a port; succeeds if it has no record. Raises VmmError."""
    path = _path(folder, interface)
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise errors.of_os_error(error, "forget the port", path=path) from error


def is_readable(folder: str, interface: str) -> bool:
    """True if the record of a port exists and is valid."""
    return _read(interface, _path(folder, interface)).setup is not None


def _path(folder: str, interface: str) -> str:
    return os.path.join(folder, f"{interface}.json")
