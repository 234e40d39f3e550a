# SPDX-License-Identifier: Apache-2.0
"""The document that describes a machine in one file."""

from __future__ import annotations

import json

import pytest

from vmm.model.errors import InvalidSpec
from vmm.model.spec import make_spec
from vmm.store.machine_document import MachineDocument, read_document
from vmm.store.snapshots.tree import Image, Tree

DOCUMENT = MachineDocument(
    make_spec(name="web", disks=[{"id": "disk-0", "path": "/disks/web.vhd"}]),
    {"disk-0": "web.vhd"},
    {"/isos/a.iso": "media/a.iso"},
    False,
    Tree(images={"/disks/web.vhd": Image(None, ours=False)}),
    {"disks/web.vhd": 4096},
)


def test_what_was_written_is_read() -> None:
    """All fields survive."""
    assert read_document(DOCUMENT.encoded(), "x") == DOCUMENT


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"format": None}, {"definition": {"name": "web", "more": 1}}, {"definition": None}, {"tree": {}},
     {"images": ["disk-0"]}, {"files": {"a": "large"}}, {"media": 7}],
    ids=str,
)  # fmt: skip
def test_anything_else_is_refused(change: dict[str, object]) -> None:
    """A document with a missing or impossible field is damaged, and the error names the file."""
    document = {**json.loads(DOCUMENT.encoded()), **change}
    with pytest.raises(InvalidSpec) as caught:
        read_document(json.dumps(document).encode(), "/backup/definition.json")
    assert caught.value.path == "/backup/definition.json"


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"format": 1}', b"\xff"])
def test_damage_is_reported(content: bytes) -> None:
    """Bytes that are no such document are damage, never another failure."""
    with pytest.raises(InvalidSpec, match=r"does not describe a machine|another version"):
        read_document(content, "x")
