# SPDX-License-Identifier: Apache-2.0
"""The document that describes a whole machine in one file: of an exported folder, and of a night of a backup.

    {"format", "definition", "images": {disk: name}, "media": {path: name}, "flat", "tree", "files": {name: size}}

Decides its fields and what makes one damaged. Whoever wrote it is not trusted: what its settings may do on this host
is decided in `api.export_import.foreign`, which files may have these names by the reader. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from vmm.model.errors import InvalidSpec, VmmError
from vmm.model.spec import MachineSpec, read_spec
from vmm.store.snapshots.tree import Tree, read_tree

FORMAT = 1
MAX_DOCUMENT_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class MachineDocument:
    """A machine as it is written down. Names are relative to the folder of the document.

    `images`: disk id -> the name of its newest image. `media`: a path as the definition has it -> the name of the
    file's copy. `flat`: each image is a copy without parents. `files`: the sizes of all files, in bytes.
    """

    spec: MachineSpec
    images: Mapping[str, str]
    media: Mapping[str, str] = field(default_factory=dict)
    flat: bool = False
    tree: Tree = field(default_factory=Tree)
    files: Mapping[str, int] = field(default_factory=dict)

    def encoded(self) -> bytes:
        """The file."""
        document = {
            "format": FORMAT,
            "definition": json.loads(self.spec.to_json()),
            "images": dict(self.images),
            "media": dict(self.media),
            "flat": self.flat,
            "tree": json.loads(self.tree.to_json()),
            "files": dict(self.files),
        }
        return json.dumps(document, indent=1).encode() + b"\n"


def read_document(content: bytes, path: str) -> MachineDocument:
    """Parse the file `path`. Raises InvalidSpec for anything that `encoded` cannot have written."""
    try:
        document = json.loads(content)
        if document["format"] != FORMAT:
            raise InvalidSpec("was written by another version of vmm", path=path)
        spec = read_spec(json.dumps(document["definition"]).encode(), path)
        tree = read_tree(json.dumps(document["tree"]).encode(), path)
        return MachineDocument(
            spec,
            {str(disk): str(name) for disk, name in document["images"].items()},
            {str(old): str(name) for old, name in document.get("media", {}).items()},  # 0.1.0 wrote none
            document["flat"] is True,
            tree,
            {str(name): int(size) for name, size in document["files"].items()},
        )
    except InvalidSpec:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, VmmError) as error:
        raise InvalidSpec("is damaged: it does not describe a machine", path=path) from error
