# SPDX-License-Identifier: Apache-2.0
"""Reading the small files in which switches are described and their state is kept.

Decides that such a file is never trusted: it may be damaged, replaced by a directory or a pipe, or as large as the
disk. Reading one takes bounded time and memory, and ends with its content or with an OSError or ValueError that says
what is wrong. Must not know what the content means; the caller checks that.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any

MAX_RECORD_BYTES = 1 << 20


def read_bytes(path: str, limit_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """The content of a regular file. Raises OSError, and ValueError for anything but a file of `limit_bytes` or less.

    Opening a pipe does not wait for a writer.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(limit_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > limit_bytes:
        raise ValueError(f"it is larger than {limit_bytes} bytes")
    return content


def read_object(path: str) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError, ValueError."""
    return parse_object(read_bytes(path))


def parse_object(content: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if not isinstance(document, dict):
        raise ValueError("it does not hold a JSON object")
    return document


def read_tail(path: str, limit_bytes: int) -> str:
    """The last part of a log, empty if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                return ""
            said = os.pread(descriptor, limit_bytes, max(0, facts.st_size - limit_bytes))
            return said.decode(errors="replace").strip()
        finally:
            os.close(descriptor)
    except OSError:
        return ""
