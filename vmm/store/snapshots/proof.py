# SPDX-License-Identifier: Apache-2.0
"""Whether a file is the one that a record of ours describes, checked before it is removed, merged or followed.

Decides what counts as proof (`INV-PROVEN-OURS`). Records are untrusted, and images are precious: we may remove an
image if it is a regular file beside the image on which it stands, and has the id that was recorded when it was made. A
VHDX has no id that stays the same when it is written to, and a record of vmm 0.1.0 has none: in these cases the name
must be of vmm's form, and the image must really stand on what the record says. A file that fails is listed with the
reason, and left alone. Must not know what is done afterwards.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable
from dataclasses import replace

import vhdkit
from vmm.model.formats import child_suffix
from vmm.store.snapshots.snapshot import Image


def doubt(path: str, image: Image, folders: Collection[str]) -> str | None:
    """Why an image recorded as ours must not be touched; None if it is proven ours, or does not exist.

    `folders`: where the machine's images may have parents, besides their own folders.
    """
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"it cannot be examined: {error.strerror}"
    if not stat.S_ISREG(facts.st_mode):
        return "it is not a regular file"
    if image.parent is None or os.path.dirname(path) != os.path.dirname(image.parent):
        return "it does not lie beside the image that it stands on"
    try:
        found = vhdkit.image_id(path)
    except vhdkit.VhdkitError as error:
        return f"it cannot be read: {error.problem}"
    if image.id is not None:
        return None if found == image.id else "it is not the image that was made for the machine"
    if not path.endswith(child_suffix(image.format)) or not stands_on(path, image.parent, folders):
        return "nothing proves that it was made for the machine"
    return None


def options_on(parent: str, folders: Collection[str]) -> vhdkit.OpenOptions:
    """Options for opening an image that may stand on this one, which itself may have parents in these folders."""
    here = os.path.dirname(os.path.abspath(parent))
    return vhdkit.OpenOptions(parent_dirs=(here, *folders), allow_raw_parent=True)


def stands_on(child: str, parent: str, folders: Collection[str]) -> bool:
    """True if the child really stands on the parent, as found by its id and all its parent locators."""
    options = replace(options_on(parent, folders), lock=False)
    try:
        return vhdkit.chain_paths(child, options=options)[1:2] == [os.path.realpath(parent)]
    except vhdkit.VhdkitError:
        return False


def is_stood_on(path: str, leaves: Iterable[str], folders: Collection[str]) -> bool:
    """True for a regular file on which one of these images really stands: a base that a snapshot froze."""
    return os.path.isfile(path) and not os.path.islink(path) and any(stands_on(one, path, folders) for one in leaves)


def is_unused(child: str, options: vhdkit.OpenOptions) -> bool:
    """True for a leaf that owns no sector: it reads the same as the image on which it stands.

    Raises VhdkitError, ImageInUse while a program has it open for writing.
    """
    with vhdkit.open_disk(child, options=options) as disk:
        return not any(extent.layer_index == 0 for extent in disk.extents(0, disk.size_bytes))
