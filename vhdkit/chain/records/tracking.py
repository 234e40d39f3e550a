# SPDX-License-Identifier: Apache-2.0
"""The files beside an image in which Hyper-V tracks changed blocks for backups.

Decides which files these are, and the wording of the warning when the image is written to. They hold no data of the
disk and are left alone, but Hyper-V does not notice what is written here, so its next incremental backup would lack
it. Must not know when an image is written to.

    NAME.rct    blocks that changed since a backup (resilient change tracking)
    NAME.mrt    the same, coarser, for the time after a crash

Whether anything inside a VHDX refers to them is not known.
"""

from __future__ import annotations

import logging
import os

from vhdkit.errors import printable
from vhdkit.finding import Finding, Severity
from vhdkit.folder import is_regular
from vhdkit.store import FileStore

SUFFIXES = (".rct", ".mrt")
TRACKED = "change-tracking"  # the code of the finding
_log = logging.getLogger(__name__)


def finding_of(store: FileStore) -> Finding | None:
    """The warning about an image that is written to while such a file lies beside it."""
    names = [name for suffix in SUFFIXES if is_regular(name := store.name + suffix)]
    if not names or store.is_device:
        return None
    files = " and ".join(printable(os.path.basename(name)) for name in names)
    message = (
        f"Hyper-V tracks changed blocks for backups in {files} beside the image, and does not notice what is written"
        " here: keep these files, and make the next backup on Hyper-V a full one"
    )
    return Finding(Severity.WARNING, TRACKED, message, store.name)


def warn(store: FileStore) -> None:
    """Log the warning about an image that is about to be written to."""
    found = finding_of(store)
    if found is not None:
        _log.warning("%s: %s", printable(store.name), found.message)
