# SPDX-License-Identifier: Apache-2.0
"""The order in which the workers of pytest-xdist run the tests.

With `--dist worksteal` each worker begins with an equal part of the list, in order, and a worker that has finished
takes the last half of what another one has left. So the long tests stand at the beginnings of the parts, a share in
each, and what is left for the end is short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

# Files with tests that take seconds each, the longest first. A file is not divided: some have fixtures for all tests.
LONG_FILES = (
    "tests/vmm/net/test_adapter_guests.py",
    "tests/vmm/worker/test_capture.py",
    "tests/test_linters.py",
    "tests/vmm/worker/test_running.py",
    "tests/vmm/api/test_guest_access.py",
    "tests/vmm/net/test_applying.py",
    "tests/vmm/net/test_bridge_guests.py",
    "tests/vmm/processes/test_supervisor_killed.py",
    "tests/vmm/worker/test_disk_hotplug.py",
    "tests/test_doc_commands.py",
    "tests/vmm/store/test_devices.py",
    "tests/vmm/worker/test_recovery.py",
    "tests/vmm/store/test_media_changed.py",
    "tests/test_soak.py",
    "tests/vmm/worker/test_leaving.py",
    "tests/vmm/net/test_watching_machines.py",
    "tests/vmm/worker/test_live_merge_killed.py",
    "tests/test_exhaustive.py",
    "tests/test_guests.py",
    "tests/vmm/worker/test_live_merge.py",
    "tests/vmm/api/test_revert.py",
    "tests/vmm/snapshots/test_recovery.py",
    "tests/vmm/cli/test_console.py",
    "tests/vmm/kvm/test_guest_agent.py",
    "tests/vmm/worker/test_asking.py",
    "tests/test_tidy.py",
    "tests/vmm/cli/test_integration.py",
)


def shared_out(items: Sequence[T], path_of: Callable[[T], str], workers: int) -> list[T]:
    """The same items in the order described above; `path_of` names an item's file, from the project's root."""
    places = {path: number for number, path in enumerate(LONG_FILES)}
    files: dict[str, list[T]] = {}
    for item in items:
        files.setdefault(path_of(item), []).append(item)
    long = sorted((path for path in files if path in places), key=places.__getitem__)
    short = iter([item for path, inside in files.items() if path not in places for item in inside])
    order: list[T] = []
    for worker in range(workers):
        size = (len(items) - len(order)) // (workers - worker)  # as xdist divides the list
        part = [item for path in long[worker::workers] for item in files[path]]
        order += [*part, *islice(short, max(0, size - len(part)))]
    return [*order, *short]
