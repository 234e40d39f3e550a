# SPDX-License-Identifier: Apache-2.0
"""Processes that are killed at their n-th change of a file, and a record of their changes in order.

`CrashStore` cuts the power inside one file. Here whole verbs run on real files, in a forked process that dies silently
(`os._exit`) before its n-th call that changes a name or a byte: what `kill -9` there would leave.

    for number in killings(work):        # 1, 2, 3, ... until `work` ends by itself
        ... look at the files ... put them back ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

CHANGING = ("link", "unlink", "rename", "fsync", "fdatasync", "pwrite", "ftruncate", "copy_file_range")
KILLED, _FAILED = 42, 43


def _die() -> None:
    os._exit(KILLED)


def killed_at(number: int, work: Callable[[], object], *, strike: Callable[[], object] = _die) -> bool:
    """Run `work` in a separate process that dies before its `number`-th changing call; False if it ended normally.

    Another `strike` happens there in place of its death: it may kill others, and end the process with `KILLED` or not.
    """
    pid = os.fork()
    if pid == 0:  # no code of the test may continue in the child
        code = _FAILED
        try:
            left = [number]
            for name in CHANGING:
                setattr(os, name, _dying(getattr(os, name), left, strike))
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, KILLED), f"the work failed in its process: exit code {status}"
    return status == KILLED


def _dying(call: Callable[..., Any], left: list[int], strike: Callable[[], object]) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            strike()
        return call(*args, **options)

    return counted


def killings(work: Callable[[], object], *, step: int = 1) -> Iterator[int]:
    """Kill `work` at its 1st, 2nd, 3rd ... changing call; after each the test looks and restores the files.

    Ends when `work` came to its end, which is given as the last number, negative.
    """
    number = 1
    while killed_at(number, work):
        yield number
        number += step
    yield -number


def recorded(work: Callable[[], object]) -> list[tuple[str, str]]:
    """(call, path) of every changing call of `work`, in order."""
    calls: list[tuple[str, str]] = []
    before = {name: getattr(os, name) for name in CHANGING}

    def noting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            about = args[-1] if name in ("link", "rename") else args[0]
            path = os.readlink(f"/proc/self/fd/{about}") if isinstance(about, int) else os.fspath(about)
            result = before[name](*args, **options)
            calls.append((name, path))
            return result

        return call

    try:
        for name in CHANGING:
            setattr(os, name, noting(name))
        work()
    finally:
        for name, call in before.items():
            setattr(os, name, call)
    return calls
