# SPDX-License-Identifier: Apache-2.0
"""What block devices are used for, according to the kernel's tables: where they are mounted, and which ones are swap.

Decides how a line of each table is read; malformed lines are skipped. Must not know sysfs. Pure.

Sources: proc_pid_mountinfo(5), swapon(8).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator


def mounts_by_device(text: str) -> dict[str, list[str]]:
    """Mount points by device number and by source, from mountinfo: some file systems report a number of their own."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in text.splitlines():
        words = line.split(" ")
        if len(words) < 7 or "-" not in words[6:]:
            continue
        point, source = _unescaped(words[4]), words[words.index("-", 6) + 2 :][:1]
        for key in {words[2], *map(_unescaped, source)}:
            if point not in found[key]:
                found[key].append(point)
    return found


def swaps(text: str) -> Iterator[str]:
    """Paths of the devices used as swap."""
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) > 1 and words[1] == "partition":
            yield _unescaped(words[0])


def _unescaped(text: str) -> str:
    """Decode octal escapes: the kernel writes blanks in names as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
