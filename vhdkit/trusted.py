# SPDX-License-Identifier: Apache-2.0
"""Folders in which a user or the administrator allows parents to lie, configured once instead of on every command.

    VHDKIT_PARENT_DIRS=/srv/bases:/mnt/templates        the environment

    # $XDG_CONFIG_HOME/vhdkit/config.toml (~/.config/vhdkit/config.toml), and /etc/vhdkit/config.toml
    parent_dirs = ["/srv/bases"]

Decides where such folders are listed and which lists count: a file that anyone but root and its user could change is
ignored, with a warning. Must not know what is opened there. The library never reads this by itself: a program that
wants to follow its user's settings passes them in `OpenOptions.parent_dirs`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vhdkit import errors
from vhdkit.arguments import checked
from vhdkit.errors import printable
from vhdkit.finding import Finding, Severity
from vhdkit.folder import exists, read_whole, real_path
from vhdkit.guarded import unguarded, unguarded_file
from vhdkit.units import KIB

VARIABLE = "VHDKIT_PARENT_DIRS"
SYSTEM_CONFIG = "/etc/vhdkit/config.toml"
MAX_CONFIG_BYTES = 64 * KIB  # enough for hundreds of folders
MAX_FOLDERS = 1000  # from all sources together: each is searched for every parent
_KNOWN_KEYS = {"parent_dirs"}


@dataclass(frozen=True, slots=True)
class TrustedFolder:
    """A folder in which parents may lie. `source` says what allows it: the variable's name, or the file's path."""

    path: str
    source: str


@dataclass(frozen=True, slots=True)
class TrustedFolders:
    """All trusted folders, those from the environment first, and what was ignored and why."""

    folders: tuple[TrustedFolder, ...]
    findings: tuple[Finding, ...]

    @property
    def parent_dirs(self) -> tuple[str, ...]:
        """The folders, in the form that `OpenOptions` takes."""
        return tuple(folder.path for folder in self.folders)


@checked
def trusted_parent_dirs() -> TrustedFolders:
    """The folders that `VHDKIT_PARENT_DIRS` and the configuration files of the user and the system name.

    A file counts if it, its folder and all folders above belong to root or this user, and no other user may write
    to them. Files that do not count, errors in them, and relative paths are ignored and reported in `findings`.
    """
    folders: list[TrustedFolder] = []
    findings: list[Finding] = []
    named = [(one, VARIABLE) for one in os.environ.get(VARIABLE, "").split(os.pathsep) if one]
    for config in dict.fromkeys((_user_config(), SYSTEM_CONFIG)):
        if config is not None:
            try:
                named += [(_at_home(one), config) for one in _folders_of(config)]
            except errors.VhdkitError as error:
                findings.append(_warning(f"is ignored: {error.problem}", config))
    for path, source in named[:MAX_FOLDERS]:
        if os.path.isabs(path) and "\0" not in path:
            folders.append(TrustedFolder(os.path.normpath(path), source))
        else:
            problem = f"{source} names {printable(path)!r}, which is not an absolute path: ignored"
            findings.append(_warning(problem, None))
    return TrustedFolders(tuple(dict.fromkeys(folders)), tuple(findings))


def _warning(message: str, path: str | None) -> Finding:
    return Finding(Severity.WARNING, "trusted-folders-ignored", message, path or "")


def _user_config() -> str | None:
    """Where the user's file lies (XDG Base Directory Specification: a relative folder is ignored)."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):
        base = _at_home("~/.config")
    return os.path.join(base, "vhdkit", "config.toml") if os.path.isabs(base) else None


def _at_home(path: str) -> str:
    """`path` with the user's home folder in place of a leading "~"."""
    home = os.environ.get("HOME", "")
    return os.path.join(home, path[2:]) if path.startswith("~/") and home else path


def _folders_of(config: str) -> list[str]:
    """The folders listed in one file; empty if it does not exist. Raises InvalidArgument, AccessDenied, IoFailed."""
    real = real_path(config)
    if not exists(real):  # no file, so no warning, even if its folder would not count
        return []
    try:
        # Both the folder of the name, which may be a link, and the folder of the file it leads to.
        for folder in dict.fromkeys((real_path(os.path.dirname(config)), os.path.dirname(real))):
            if why := unguarded(folder):
                raise errors.InvalidArgument(f"{why}, so another user could change it")
        if why := unguarded_file(real):
            raise errors.InvalidArgument(why)
    except errors.NotFound:
        return []
    raw = read_whole(real, MAX_CONFIG_BYTES)
    if raw is None:
        raise errors.InvalidArgument(f"it is not a regular file of at most {MAX_CONFIG_BYTES} bytes")
    import tomllib  # a slow import, and most users have no such file

    try:
        document = tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(f"it is not TOML: byte {error.start} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise errors.InvalidArgument(f"it is not TOML: {printable(str(error))}") from error
    if unknown := sorted(set(document) - _KNOWN_KEYS):
        raise errors.InvalidArgument(f"it sets {', '.join(map(printable, unknown))}, but only parent_dirs is known")
    folders = document.get("parent_dirs", [])
    if not isinstance(folders, list) or not all(isinstance(one, str) and one for one in folders):
        raise errors.InvalidArgument("parent_dirs must be a list of folders")
    return folders
