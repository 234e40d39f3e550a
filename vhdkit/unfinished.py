# SPDX-License-Identifier: Apache-2.0
"""Files under construction: their temporary names, and when one that a dead process left behind may be removed.

The name identifies the process that makes the file, `.vhdkit-MAKER-CHANCE.part` (`maker`), and that process keeps the
file locked. The next program that makes a file in the folder removes it only if name and lock both show that no
process is working on it: anyone can make up a name, and a lock that another host holds on a file server may be
invisible here. Only regular files of our own user are removed. Everything else is left to `collect_garbage`, which
users run.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from itertools import islice

from vhdkit.errors import VhdkitError
from vhdkit.maker import MAKER_PATTERN, is_maker_dead, maker_word
from vhdkit.store import FileStore

_CHANCE_BYTES = 8
_PART = re.compile(rf"\.vhdkit-(?:({MAKER_PATTERN})-)?[0-9a-f]{{{2 * _CHANCE_BYTES}}}\.part")
_MAX_LOOKED_AT = 10_000  # names in a folder: a large folder must not make every new file slow


def part_name() -> str:
    """A temporary name for a new file. It has no maker if this host does not let us identify the process."""
    maker = maker_word()
    return f".vhdkit-{'' if maker is None else f'{maker}-'}{os.urandom(_CHANCE_BYTES).hex()}.part"


def is_part(name: str) -> bool:
    """True for the name of a file under construction."""
    return _PART.fullmatch(name) is not None


def parts(directory: str, limit: int | None = None) -> Iterator[str]:
    """The paths of the files under construction in `directory`, sorted; a `limit` bounds the names examined."""
    try:
        with os.scandir(directory or os.curdir) as entries:
            names = [one.name for one in islice(entries, limit) if is_part(one.name)]
    except OSError:
        return
    for name in sorted(names):
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode):
                yield path


def sweep(directory: str) -> None:
    """Remove what dead processes left in `directory`. Files that cannot be removed stay."""
    for path in parts(directory, _MAX_LOOKED_AT):
        with contextlib.suppress(OSError, VhdkitError):
            facts = os.lstat(path)
            if facts.st_uid != os.geteuid() or not _is_dead(os.path.basename(path), facts):
                continue
            with FileStore.open(path, follow_links=False) as store:
                store.lock(writer=True)  # the name still leads to it, and no process, such as a fork, holds it
                os.unlink(path)


def _is_dead(name: str, facts: os.stat_result) -> bool:
    found = _PART.fullmatch(name)
    return found is not None and found[1] is not None and is_maker_dead(found[1], facts)
