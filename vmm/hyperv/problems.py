# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a file of a Hyper-V machine: which file, which structure, which byte.

Decides how that is worded. Must not know which structures there are.
"""

from __future__ import annotations

from typing import NoReturn

from vmm.model.errors import BadConfiguration

COPY_AGAIN = "copy it again from the host, or from a backup"


def refuse(path: str, problem: str, *, at_byte: int | None = None, hint: str | None = COPY_AGAIN) -> NoReturn:
    """Raise BadConfiguration for a file; `at_byte` is where the structure that `problem` names lies."""
    place = "" if at_byte is None else f" at byte {at_byte}"
    raise BadConfiguration(f"{problem}{place}", path=path, hint=hint)
