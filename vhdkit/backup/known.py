# SPDX-License-Identifier: Apache-2.0
"""Opens a repository only if it is one that is known to be at its path.

The folder of a repository may be a mount point. When its disk is not mounted, the folder is empty, or has what another
disk has; a repository that is made there fills the wrong disk, and looks like a good backup (`INV-TARGET-KNOWN`).
Decides what is said when the known repository is not there. Must not know who knows it, nor how it becomes known.
"""

from __future__ import annotations

from collections.abc import Collection

from vhdkit import errors
from vhdkit.arguments import AnyPath
from vhdkit.backup.repository import REPOSITORY_FILE, Repository, is_unused, opened_root
from vhdkit.held_folder import HeldFolder, open_folder

_MAX_SHOWN = 3  # ids in a message


class UnexpectedRepository(errors.VhdkitError):
    """The repository that is known to be at a path is not there."""

    exit_code = 1


def open_known(path: AnyPath, ids: Collection[str]) -> Repository:
    """Open the repository in a folder; its id must be one of `ids`, of which there is one at least. Makes nothing.

    Raises UnexpectedRepository, and what `open_repository` raises for a repository that is there.
    """
    assert ids
    try:
        root = open_folder(path)
    except errors.NotFound as error:
        raise _unexpected(error.path, ids, "the folder does not exist") from error
    try:
        if not root.exists(REPOSITORY_FILE):
            raise _unexpected(root.path, ids, _instead(root))
        found = opened_root(root)
        if found.id not in ids:
            raise _unexpected(root.path, ids, f"another repository is there, with the id {found.id}")
        return found
    except BaseException:
        root.close()
        raise


def _instead(root: HeldFolder) -> str:
    return "the folder is empty" if is_unused(root) else "the folder has no repository"


def _unexpected(path: str | None, ids: Collection[str], found: str) -> UnexpectedRepository:
    shown = " or ".join(sorted(ids)[:_MAX_SHOWN]) + (" or another known one" if len(ids) > _MAX_SHOWN else "")
    return UnexpectedRepository(
        f"should have the repository {shown}, in which earlier nights were saved, but {found}: is its disk mounted?",
        path=path,
    )
