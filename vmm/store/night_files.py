# SPDX-License-Identifier: Apache-2.0
"""What a night of a backup says about its machine, besides the disks: the files beside them, and facts for people.

    definition.json     the document of an export (`machine_document`), whose images are called by their disk's id
    uefi-vars.fd        the UEFI variables of a machine that has been started
    memory              on request: memory and devices, as QEMU wrote them (its migration stream)
    memory.json         the machine that they fit: the `state.json` of a saved machine

Decides which files these are, and what of them is believed when they are read back. Nothing is: a repository is
untrusted, and what its definition may have on this host is decided by those who restore it. Snapshots are facts for
people: they are not restored, so the document has none. Must not know repositories.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vmm.model.errors import InvalidSpec, NotFound, of_os_error
from vmm.model.paths import MachinePaths
from vmm.model.spec import MachineSpec
from vmm.store.machine_document import MachineDocument, read_document
from vmm.store.snapshots.tree import Tree

DEFINITION, UEFI_VARIABLES = "definition.json", "uefi-vars.fd"
MEMORY, MEMORY_STATE = "memory", "memory.json"
MAX_STATE_BYTES = 8 << 20
MAX_DEFINITION_BYTES = 4 << 20
MAX_VARIABLES_BYTES = 64 << 20  # UEFI firmware uses a few MiB
MAX_SNAPSHOTS = 1000  # of which a manifest has facts


def night_files(machine: MachinePaths, spec: MachineSpec, disks: Collection[str]) -> dict[str, bytes]:
    """The files of a night that has the disks with these ids, by name; `spec` is the definition at that moment.

    Raises AccessDenied, InvalidSpec for variables that no firmware writes.
    """
    images = {disk.id: disk.id for disk in spec.disks if disk.id in disks}
    found = {DEFINITION: MachineDocument(spec, images, flat=True).encoded()}
    if spec.firmware == "uefi" and (variables := _variables(machine)) is not None:
        found[UEFI_VARIABLES] = variables
    return found


def _variables(machine: MachinePaths) -> bytes | None:
    """The UEFI variables; None for a machine that has not been started yet."""
    path = machine.uefi_variables
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_VARIABLES_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise of_os_error(error, "read the UEFI variables", path=path) from error
    if len(content) > MAX_VARIABLES_BYTES:
        raise InvalidSpec(f"has more than {MAX_VARIABLES_BYTES} bytes, so it holds no UEFI variables", path=path)
    return content


def snapshot_facts(tree: Tree) -> tuple[dict[str, Any], ...]:
    """What a manifest says about the machine's snapshots, the newest first, for people."""
    newest = sorted(tree.snapshots.values(), key=lambda one: one.created, reverse=True)
    return tuple(
        {"id": one.id, "name": one.name, "created": one.created, "parent": one.parent, "is_now": one.id == tree.now}
        for one in newest[:MAX_SNAPSHOTS]
    )


def read_night_definition(content: bytes, path: str, disks: Collection[str]) -> MachineDocument:
    """The document in `content`, which is not trusted, of a night that has the disks with these ids.

    `path` is for messages. Raises InvalidSpec for one that is damaged, NotFound if the night lacks one of its disks.
    """
    document = read_document(content, path)
    known = {disk.id for disk in document.spec.disks if disk.is_image}
    if not known.issuperset(document.images):
        raise InvalidSpec("is damaged: it has an image of a disk that the machine does not have", path=path)
    if missing := sorted(set(document.images) - set(disks)):
        raise NotFound(f"names the disk {missing[0]}, which the night does not have", path=path)
    return document
