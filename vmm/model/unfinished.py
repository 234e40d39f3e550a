# SPDX-License-Identifier: Apache-2.0
"""Partly created and partly removed files and folders: their names, and the removal of those left by dead processes.

The name identifies the process that made it: `.NAME.MAKER-CHANCE.part` (or `.removed`). vhdkit decides when a maker is
dead (`vhdkit.is_maker_dead`). Only files of our own user that are not links are removed, and only from a folder in
which the caller is about to create something.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from itertools import islice

import vhdkit

_MAKER = r"[0-9a-f]+-\d+-\d+-\d+"  # the form of `vhdkit.maker_word`, which checks the rest itself
_LEFT = re.compile(rf"(?:.*\.)?({_MAKER})-[0-9a-f]{{8}}\.(?:part|removed)")
FILE_PATTERN = rf"\.{_MAKER}-[0-9a-f]{{8}}\.part"  # of `part_of` for a file
_MAX_LOOKED_AT = 10_000  # directory entries examined


def part_of(path: str) -> str:
    """The path of a new file that will replace `path`: in the same folder, with a short unique name."""
    return os.path.join(os.path.dirname(path), f".{_token()}.part")


def folder_of(path: str, ending: str = "part") -> str:
    """The hidden name of a folder before it is renamed to `path`, or of the former `path` while it is removed.

    `ending`: "part" for the former, "removed" for the latter.
    """
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{_token()}.{ending}")


def sweep(folder: str, *, folders: bool = False) -> None:
    """Remove the files that dead processes left in `folder`; with `folders`, remove their folders as well.

    What cannot be removed is left in place.
    """
    with contextlib.suppress(OSError):
        with os.scandir(folder or os.curdir) as entries:
            names = [one.name for one in islice(entries, _MAX_LOOKED_AT) if _LEFT.fullmatch(one.name)]
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                facts = os.lstat(path)
                if facts.st_uid != os.geteuid() or not _is_dead(name, facts):
                    continue
                if stat.S_ISREG(facts.st_mode):
                    os.unlink(path)
                elif folders and stat.S_ISDIR(facts.st_mode):
                    import shutil  # slow to import, and rarely needed

                    shutil.rmtree(path)  # follows no link


def abandoned(folder: str) -> list[str]:
    """The folders that dead processes left in `folder`; for a caller that has more to end than the files in them."""
    with contextlib.suppress(OSError):
        with os.scandir(folder) as entries:
            found = [one for one in islice(entries, _MAX_LOOKED_AT) if _LEFT.fullmatch(one.name)]
        return [
            one.path for one in found
            if one.is_dir(follow_symlinks=False) and (facts := one.stat(follow_symlinks=False)).st_uid == os.geteuid()
            and _is_dead(one.name, facts)
        ]  # fmt: skip
    return []


def _token() -> str:
    """Our maker word and a random part. Without a maker word (the host does not identify us) it is never swept."""
    return f"{vhdkit.maker_word() or os.getpid()}-{os.urandom(4).hex()}"


def _is_dead(name: str, facts: os.stat_result) -> bool:
    found = _LEFT.fullmatch(name)
    return found is not None and vhdkit.is_maker_dead(found[1], facts)
