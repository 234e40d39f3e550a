# SPDX-License-Identifier: Apache-2.0
"""Which machine continues from the memory of a night, and what is said where it does not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.api.restoring.saved_nights import save_night
from tests.vmm.snapshots.machines import Machines
from vmm.api.manager import Manager
from vmm.api.restoring.found_night import RestoreRequest, consent_of
from vmm.api.restoring.restoring import look_at_night, restore_machine
from vmm.model.errors import InvalidSpec, Refused
from vmm.store import registry
from vmm.store.night_files import MEMORY, MEMORY_STATE
from vmm.store.saved import read_description
from vmm.store.snapshots.memory import description_document


def request(machines: Machines, *allow: str, **settings: Any) -> RestoreRequest:
    """A request for the night of the old machine."""
    consent = consent_of(allow, settings.pop("paths", {}), settings.pop("switches", {}))
    return RestoreRequest(str(machines.folder / "repo"), "web", register=True, consent=consent, **settings)


def saved(machines: Machines, change: Callable[[dict[str, Any]], object] = lambda document: None) -> None:
    """A night with memory of the machine web, described as changed; the machine is gone."""
    machines.create("web", 1, adapters=[{}])
    spec = registry.load("web").spec
    state = description_document(
        spec, qemu_version="7.2.0", accelerator="tcg", was_running=True, media={}, mtus={}
    )  # fmt: skip
    state["memory_file_bytes"] = 6
    change(state)
    files = {MEMORY: b"memory", MEMORY_STATE: json.dumps(state).encode()}
    save_night("web", machines.folder / "repo", files=files)
    Manager().delete("web", with_disks=True)


def test_the_machine_is_saved(machines: Machines) -> None:
    """With the memory allowed, the machine is saved, with its own new disks; without, nothing is made."""
    saved(machines)
    with pytest.raises(Refused, match="memory"):
        restore_machine(request(machines))
    assert "web" not in registry.names()
    done = restore_machine(request(machines, "memory"))
    machine = registry.load("web")
    description = read_description(machine.paths)
    assert done.is_saved and description.was_running and description.memory_file_bytes == 6
    assert description.definition == json.loads(machine.spec.to_json())
    assert (Path(machine.paths.saved) / "memory.bin").read_bytes() == b"memory"
    assert os.listdir(os.path.dirname(done.disks["disk-0"])) == [os.path.basename(done.disks["disk-0"])]


def other_processors(document: dict[str, Any]) -> None:
    document["definition"]["cpu_count"] += 1


def other_disks(document: dict[str, Any]) -> None:
    document["definition"]["disks"] = [3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_processors, "cpu_count"),
        (other_disks, "damaged"),
        (lambda document: document["definition"].update(disks=[]), "disks were changed"),
        (lambda document: document["definition"].update(adapters=[]), "adapters were changed"),
        (lambda document: document.update(had_kernel=True), "kernel"),
        (lambda document: document.update(mtus={"net-0": -1}), "damaged"),
        (lambda document: document.clear(), "damaged"),
    ],
)
def test_memory_that_does_not_fit_is_left_out(
    machines: Machines, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    """The machine is off then, and the reason is said; allowing the memory is no mistake."""
    saved(machines, change)
    told: list[str] = []
    done = restore_machine(request(machines, "memory"), announce=told.append)
    assert not done.is_saved and done.memory_left_out is not None and words in done.memory_left_out
    assert any("left out" in one for one in told) and not os.path.exists(registry.load("web").paths.saved)


def test_a_night_without_memory_has_nothing_to_allow(machines: Machines) -> None:
    """As with everything else that a definition does not have."""
    machines.create("web", 1)
    save_night("web", machines.folder / "repo")
    with pytest.raises(InvalidSpec, match="memory"):
        look_at_night(request(machines, "memory"))
