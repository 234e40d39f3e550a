# SPDX-License-Identifier: Apache-2.0
"""Which names a repository may contain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhdkit.backup import names
from vhdkit.backup.names import ImagePlace

HOSTILE = (
    "", ".", "..", ".hidden", "-rf", "a/b", "/etc/passwd", "../x", "a\0", "a\n", "a b", "ä", "a" * 129, "a\\b",
    "a@b", "\u202ea", "a\r", "%2e%2e", "~", "$(x)",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_refused(text: str) -> None:
    """No name leads out of its folder, hides a file, or looks like an option."""
    assert not names.is_name(text)
    assert ImagePlace.of_text(f"images/{text}/00001.vhd") is None
    assert ImagePlace.of_text(f"images/disk-0/{text}") is None
    assert ImagePlace.of_text(f"bases/{text}") is None


@given(st.text(max_size=140))
def test_an_allowed_name_is_one_component(text: str) -> None:
    """Whatever text is allowed as a name is a single visible component of a path, in ASCII."""
    if names.is_name(text):
        assert text.isascii() and text.isprintable() and len(text) <= 128
        assert not set(text) & set("/\\\0 @") and text[0] not in ".-"


def test_the_limit_of_a_name() -> None:
    """A name has at most 128 characters, and an image leaves room for the name of its table of sums."""
    assert names.is_name("a" * 128) and not names.is_name("a" * 129)
    assert names.is_image_name("a" * 123) and not names.is_image_name("a" * 124)
    assert not names.is_image_name("00001.vhd.sums")


@pytest.mark.parametrize("text", ["web", "prune", "Web server 2", "a.b-c_d", "7"])
def test_machine_names(text: str) -> None:
    """Machines keep the names that they have elsewhere, also names of commands and names with spaces."""
    assert names.is_machine_name(text)


@pytest.mark.parametrize("text", ["", " web", "web ", "web.", "a@b", "a/b", ".web", "-x", "a\n", "ä"])
def test_other_machine_names_are_refused(text: str) -> None:
    """A name cannot contain "@", which separates it from a night, nor begin like an option or a hidden file."""
    assert not names.is_machine_name(text)


@given(st.integers(1, names.MAX_NIGHT))
def test_a_night_has_one_word(number: int) -> None:
    """The word of a night stands for it, with at least five digits, and so does the name of its image."""
    word = names.night_word(number)
    assert len(word) >= 5 and names.night_of(word) == number
    assert names.night_of_file(f"{word}.avhd.sums") == number


@pytest.mark.parametrize(
    "text", ["00000", "1", "0001", "000001", "+0001", "1234567890", "٠٠٠٠١", "0x001", "00001 ", ""]
)
def test_other_words_are_no_nights(text: str) -> None:
    """A number with too few or too many digits, signs or other digits than ASCII's is no night."""
    assert names.night_of(text) is None


@given(st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True), st.booleans())
def test_places_are_read_as_they_are_written(name: str, is_base: bool) -> None:
    """The text of a place stands for it."""
    place = ImagePlace(None if is_base else "disk-0", name + ".vhd")
    assert ImagePlace.of_text(place.text) == place


@pytest.mark.parametrize(
    "text", ["", "images", "images/a", "images/a/b/c.vhd", "bases", "bases/a/b.vhd", "meta/1/x", "/"]
)
def test_other_places_are_refused(text: str) -> None:
    """An image lies in the folder of a disk or of bases, and nowhere else."""
    assert ImagePlace.of_text(text) is None


def test_ids_by_chance() -> None:
    """A new id is one, and two of them differ."""
    one, other = names.new_unique_id(), names.new_unique_id()
    assert names.is_unique_id(one) and one != other
    assert not names.is_unique_id(one.upper() if one.upper() != one else one[1:])
