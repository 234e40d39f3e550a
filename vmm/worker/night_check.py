# SPDX-License-Identifier: Apache-2.0
"""Compares what a disk is filled from with its sums, in a process of its own, before anything of it is copied.

    python -m vmm.worker.night_check FOLDER DISK    FOLDER is the machine's; the answer is JSON on standard output

Decides what a night's damage is, as opposed to a repository that cannot be read at present, and that the process ends
with the worker. It may hang with its repository: nobody waits for its end.

Imports numpy only in that process, so that the worker stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from typing import Any

import vhdkit
from vmm.host.proc import python_command, python_environment
from vmm.model.errors import StoreFailed, VmmError, from_document, store_error, to_document
from vmm.model.paths import MachinePaths
from vmm.store.filling import Filling, read_filling


async def damage_in_night(folder: str, disk_id: str) -> tuple[str | None, list[str]]:
    """What is damaged of the files from which a disk of the machine in this folder is filled, None if nothing is; and
    the paths of those that cannot be compared, as an unfinished prune has changed them.

    Raises StoreFailed if they cannot be read at present.
    """
    process = await asyncio.create_subprocess_exec(
        *python_command("vmm.worker.night_check", folder, disk_id),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=python_environment(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        answer = await process.stdout.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()  # unless it has answered, and ends by itself
    try:
        document: dict[str, Any] = json.loads(answer)
        error, damage, unknown = document["error"], document["damage"], [str(one) for one in document["unknown"]]
    except (ValueError, TypeError, KeyError) as problem:
        raise StoreFailed("its sums could not be compared: the process for that has died") from problem
    if error is not None:
        raise from_document(error)
    return None if damage is None else str(damage), unknown


def _compared(filling: Filling, disk_id: str) -> dict[str, object]:
    from vhdkit import backups

    limit = None if filling.max_rate_bytes is None else backups.RateLimit(filling.max_rate_bytes)
    try:
        with backups.open_repository(filling.repository) as opened, opened.machine(filling.machine_id) as machine:
            night = machine.require_night(filling.night)
            if night.id != filling.night_id:
                raise vhdkit.NotFound(f"night {filling.night} is not the one that it was", path=machine.path)
            unknown = backups.check_disk(machine, night, disk_id, limit=limit)
    except backups.DamagedRepository as error:
        return {"damage": f"{error.path}: {error.problem}"}
    return {"unknown": list(unknown)}


def _end_with_worker() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Entry point of the process."""
    threading.Thread(target=_end_with_worker, name="vmm-worker", daemon=True).start()
    os.nice(10)
    answer: dict[str, object] = {"error": None, "damage": None, "unknown": []}
    try:
        filling = read_filling(MachinePaths(sys.argv[1]))
        if filling is not None:
            answer |= _compared(filling, sys.argv[2])
    except vhdkit.VhdkitError as error:
        answer["error"] = to_document(store_error(error))
    except VmmError as error:
        answer["error"] = to_document(error)
    os.write(1, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
