# SPDX-License-Identifier: Apache-2.0
"""How a switch's helpers, which guests talk to, are started: enclosed, behind our system call filter.

Decides what a helper sees of the host: programs and libraries, a name server's address, and a folder of its own. The
enclosing itself is done by `enclosed`, which runs as a script. Must not know what the helpers do.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vmm.host import confined
from vmm.model import paths
from vmm.net import enclosed

# The folders of programs and libraries; they contain no secrets.
PROGRAM_PLACES = (
    "/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", "/nix", "/gnu",
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload",
    "/dev/null", "/dev/urandom", "/dev/random",
)  # fmt: skip
# Without a root of its own, a helper follows the host's name servers by itself, wherever their file is.
RESOLVER_PLACES = ("/etc", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager", "/run/connman")
OWN = "/own"  # the path at which a helper with a root of its own sees its folder
RESOLVER, RESOLVER_NAME = "/etc/resolv.conf", "resolv.conf"


def hint_for(said: str) -> str | None:
    """What to do about a helper that did not start and printed this."""
    if "cannot be enclosed" not in said or not said.endswith("Operation not permitted"):
        return None
    return "give this container CAP_SYS_ADMIN, which root needs to enclose it; other users need no capability"


@dataclass(frozen=True, slots=True)
class Enclosure:
    """A helper's place. `user` None: it runs as we do, in the host's file system. `folder` belongs to the helper."""

    folder: str
    user: int | None
    root: str = ""

    def seen(self, name: str) -> str:
        """The path at which the helper finds a file of its folder."""
        return f"{OWN if self.user is not None else self.folder}/{name}"

    def make(self) -> None:
        """Create the folders. Raises OSError, VmmError."""
        if self.user is None:
            paths.make_private(self.folder)
            return
        paths.make_private(self.root)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.folder, 0o700)
        os.chown(self.folder, self.user, self.user, follow_symlinks=False)
        self.refresh()

    def refresh(self) -> None:
        """Copy the host's current name servers to the helper; their file may be replaced at any time."""
        if self.user is None:
            return
        with contextlib.suppress(OSError):
            with open(RESOLVER, "rb") as file:
                content = file.read(1 << 16)
            copy = os.path.join(self.folder, RESOLVER_NAME)
            with contextlib.suppress(OSError), open(copy, "rb", opener=_unlinked) as file:
                if file.read(1 << 16) == content:
                    return
            _replace(self.folder, content)

    def command(
        self,
        words: Sequence[str],
        *,
        parent: int | None = None,
        keep: Sequence[int] = (),
        files: Sequence[str] = (),
        read: Sequence[str] = (),
    ) -> list[str]:
        """The command that starts `words`, whose first word is an absolute path. For the options see `enclosed`."""
        script = [sys.executable, "-I", "-S", confined.__file__, "--", sys.executable, "-I", "-S", enclosed.__file__]
        program = os.path.dirname(os.path.dirname(os.path.realpath(words[0])))  # such as /opt/qemu
        places = [*PROGRAM_PLACES, *read, *([program] if not program.startswith(PROGRAM_PLACES) else [])]
        if self.user is None:
            places += RESOLVER_PLACES
        else:
            script += ["--user", str(self.user), "--group", str(self.user), "--root", self.root]
            script += [word for one in keep for word in ("--keep", str(one))]
            script += [word for one in files for word in ("--file", one)]
        script += [word for one in places for word in ("--read", one)]
        script += ["--folder", self.folder]
        if parent is not None:
            script += ["--parent", str(parent)]
        return [*script, "--", *words]


def _unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _replace(folder: str, content: bytes) -> None:
    """Write the file there without following anything that the folder's owner may have put in its place."""
    place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        part = f".{RESOLVER_NAME}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=place)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(part, flags, 0o644, dir_fd=place)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)
            file.write(content)
        os.rename(part, RESOLVER_NAME, src_dir_fd=place, dst_dir_fd=place)
    finally:
        os.close(place)
