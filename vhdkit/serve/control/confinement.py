# SPDX-License-Identifier: Apache-2.0
"""Where a control client of another user may let the server open and create files.

Decides which paths are accepted from a control owner who is not the server's user: those that, with every link
followed, lie in one of the folders named at the start (`INV-CONTROL-CONFINED`). The server may be root, and the
control owner any user; so a folder counts only if no other user can replace anything in it after the check
(`guarded`). Must not know what is done with the files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from vhdkit import errors
from vhdkit.beneath import find_beneath
from vhdkit.folder import real_path
from vhdkit.guarded import unguarded
from vhdkit.volume import Outcome

_HINT = "let the server's own user do this, or start the server with another --control-dir"


class Confinement:
    """The allowed folders of one server. Returned paths are real: no component is a link."""

    def __init__(self, real_folders: Mapping[str, str]) -> None:
        """Use `confined_to`. The folders' real paths, by the paths that were named."""
        self._named = dict(real_folders)
        self._folders = list(self._named.values())

    def image(self, path: str) -> str:
        """The real path of an image to serve. Raises AccessDenied, NotFound, InvalidArgument."""
        place = find_beneath(self._absolute(path), self._folders)
        if place.store is not None:
            place.store.close()
        if place.outcome is Outcome.OUTSIDE:
            raise self._outside(path)
        if place.outcome is Outcome.MISSING:
            raise errors.NotFound("does not exist", path=path)
        if place.outcome is Outcome.SPECIAL:
            raise errors.InvalidArgument("is not a regular file", path=path)
        _require_guarded(os.path.dirname(place.path), path)
        return place.path

    def folder(self, path: str) -> str:
        """The real path of a folder: one of those named, or one below. Raises as `image` does."""
        wanted = self._absolute(path)
        if wanted in self._folders:
            real = wanted
        else:
            place = find_beneath(wanted, self._folders)
            if place.store is not None:
                place.store.close()
                raise errors.InvalidArgument("is not a folder", path=path)
            if place.outcome is Outcome.OUTSIDE:
                raise self._outside(path)
            real = place.path
        _require_guarded(real, path)
        return real

    def new_file(self, path: str) -> str:
        """The path at which to create a new file that was requested as `path`. Raises as `image` does."""
        folder, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir):
            raise errors.InvalidArgument("is a folder; name a file", path=path)
        return os.path.join(self.folder(folder), name)

    def beside(self, image: str) -> None:
        """Allow a new file, under a name that we choose, beside a served image, if that folder is guarded."""
        _require_guarded(os.path.dirname(real_path(image)), image)

    def _absolute(self, path: str) -> str:
        if not os.path.isabs(path) or "\0" in path:
            raise errors.InvalidArgument("is not an absolute path, which a control owner must give", path=path)
        path = os.path.normpath(path)
        for named, real in self._named.items():  # as spelled at the start, wherever that path leads now
            if path == named or path.startswith(named.rstrip(os.sep) + os.sep):
                return os.path.normpath(real + path[len(named.rstrip(os.sep)) :])
        return path

    def _outside(self, path: str) -> errors.AccessDenied:
        named = ", ".join(errors.printable(one) for one in self._folders) or "none was given"
        return errors.AccessDenied(
            f"is outside the folders that the control owner may use ({named})", path=path, hint=_HINT
        )


def confined_to(folders: Sequence[str]) -> Confinement:
    """The confinement to these folders.

    Raises NotFound, and AccessDenied for a folder that the control owner, or another user, could change.
    """
    named = {os.path.abspath(folder): real_path(folder) for folder in folders}
    for folder, real in named.items():
        _require_guarded(real, folder)
    return Confinement(named)


def _require_guarded(real: str, path: str) -> None:
    why = unguarded(real)
    if why is not None:
        raise errors.AccessDenied(
            f"could be replaced by another user while it is in use: {why}",
            path=path,
            hint="make root or the server's user the owner and the only writer of the folder and those above it",
        )
