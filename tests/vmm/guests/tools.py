# SPDX-License-Identifier: Apache-2.0
"""Where the guests are kept, and how their parts are found.

Everything is kept by a hash of what it was made from, outside the project, so it is made once per machine. Two test
processes that want the same guest at once wait for each other. Nothing here is a test: a missing thing is a
`GuestUnavailable`, which tests turn into a skip (`tests.support.require_linux_guest`) and programs into a message.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TOOL_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class GuestUnavailable(Exception):
    """The guest cannot be made on this machine; the message says what is missing and how to get it."""


def cache_folder() -> Path:
    """The folder of the guests: $VHDKIT_GUEST_CACHE, else below the user's cache folder."""
    chosen = os.environ.get("VHDKIT_GUEST_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "vhdkit-guests"


def tool(name: str, package: str) -> str:
    """The full path of a command. Raises GuestUnavailable, which names Debian's package."""
    path = shutil.which(name, path=TOOL_PATH)
    if path is None:
        raise GuestUnavailable(f"needs the command {name}: run script/setup, or install Debian's package {package}")
    return path


def run(command: Sequence[str | os.PathLike[str]], **options: object) -> str:
    """Run a program; return its standard output. Raises GuestUnavailable with its message if it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300, **options
        )  # type: ignore[call-overload]
    except OSError as error:
        raise GuestUnavailable(f"could not run {command[0]}: {error}") from error
    if done.returncode != 0:
        words = " ".join(os.fspath(word) for word in command)
        raise GuestUnavailable(f"exit code {done.returncode} from: {words}\n{done.stderr.strip()}")
    return str(done.stdout)


def kept(kind: str, made_from: Sequence[str | bytes], make: Callable[[Path], None]) -> Path:
    """The folder of a product: from the cache if it was made before from the same parts, else filled by `make`.

    `make` gets an empty folder, which gets its name in the cache only when `make` returned.
    """
    digest = hashlib.sha256()
    for part in made_from:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    folder = cache_folder() / f"{kind}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with _locked(cache_folder() / f"{kind}.lock"):
            if not folder.is_dir():
                unfinished = Path(tempfile.mkdtemp(prefix=f"{kind}-", suffix=".part", dir=cache_folder()))
                try:
                    unfinished.chmod(0o755)  # QEMU may run as another user
                    make(unfinished)
                    unfinished.rename(folder)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise GuestUnavailable(f"could not make the guest {kind}: {error}") from error
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
