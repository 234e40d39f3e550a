# SPDX-License-Identifier: Apache-2.0
"""The parent locator: pairs of texts."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.vhdx.locator import build_locator, linkage_text, parent_ref, parse_locator

ID = uuid.UUID(int=5).bytes
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)


@given(pairs=st.dictionaries(TEXT, TEXT, min_size=1, max_size=6))
def test_a_locator_is_read_as_it_was_built(pairs: dict[str, str]) -> None:
    """Any texts are read back in their order."""
    assert list(parse_locator(build_locator(pairs), "c.avhdx", 0).items()) == list(pairs.items())


def test_paths_are_tried_in_their_order() -> None:
    """Paths are tried in a fixed order, whatever their order in the file; an id of zeros is ignored."""
    pairs = {"absolute_win32_path": "a", "relative_path": "r", "parent_linkage": linkage_text(ID)}
    ref = parent_ref(pairs | {"parent_linkage2": linkage_text(bytes(16))}, "c.avhdx", 0)
    assert ref.linkage_ids == (ID,) and [one.text for one in ref.names] == ["r", "a"]
    assert parent_ref(pairs | {"parent_linkage": str(uuid.UUID(int=5)).upper()}, "c", 0).linkage_ids == (ID,)


@pytest.mark.parametrize(
    "pairs",
    [
        {"relative_path": "r"},
        {"parent_linkage": linkage_text(ID)},
        {"parent_linkage": "x", "relative_path": "r"},
        {"parent_linkage": linkage_text(bytes(16)), "relative_path": "r"},
    ],
)
def test_a_locator_that_names_no_parent_is_refused(pairs: dict[str, str]) -> None:
    """A locator without an id or a path is refused."""
    with pytest.raises(CorruptImage) as caught:
        parent_ref(pairs, "c.avhdx", 64)
    assert (caught.value.reason, caught.value.offset_bytes) == (CorruptReason.LOCATOR_KEYS, 64)


GOOD = build_locator({"k": "v", "l": "w"})


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (GOOD[:19], CorruptReason.LOCATOR_LENGTH),
        (b"x" + GOOD[1:], CorruptReason.LOCATOR_TYPE),
        (GOOD[:18] + bytes(2) + GOOD[20:], CorruptReason.LOCATOR_LENGTH),
        (GOOD[:18] + b"\xff\xff" + GOOD[20:], CorruptReason.LOCATOR_LENGTH),
        (GOOD[:-1], CorruptReason.LOCATOR_LENGTH),
        (GOOD[:-2] + b"\0\xd8", CorruptReason.LOCATOR_TEXT),
        (GOOD[:-2] + bytes(2), CorruptReason.LOCATOR_TEXT),
        (GOOD[:-4] + b"k\0" + GOOD[-2:], CorruptReason.LOCATOR_TEXT),
    ],
    ids=["short", "type", "no-pair", "many", "outside", "surrogate", "zero", "twice"],
)
def test_what_cannot_be_a_locator_is_refused(raw: bytes, reason: CorruptReason) -> None:
    """Errors name the offset of the item."""
    with pytest.raises(CorruptImage) as caught:
        parse_locator(raw, "c.avhdx", 64)
    found = caught.value
    assert (found.reason, found.path, found.structure) == (reason, "c.avhdx", "parent locator")
    assert found.offset_bytes == 64
