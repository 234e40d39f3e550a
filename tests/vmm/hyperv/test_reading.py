# SPDX-License-Identifier: Apache-2.0
"""Files of Hyper-V machines: samples read as they should, and other files are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import sample as sample_of
from tests.vmm.hyperv.writing import Writer, as_xml, tree
from vmm.hyperv.keys import Key
from vmm.hyperv.reading import read
from vmm.model.errors import BadConfiguration, NotFound

LOOK_ALIKES = (
    "2012r2-gen2.xml",
    "2012r2-live-tree/Snapshots/AAAAAAA1-0000-4000-8000-000000000001.xml",
    "2012r2-live-tree/Snapshots/AAAAAAA2-0000-4000-8000-000000000002.xml",
    "2012r2-live-tree/Snapshots/AAAAAAA3-0000-4000-8000-000000000003.xml",
    "2012r2-live-tree/Virtual Machines/11111111-2222-4333-8444-555555555501.xml",
    "2019-gen1.vmcx",
    "2019-gen2.vmcx",
    "host-index/data.vmcx",
    "log-not-replayed.vmcx",
    "long-notes.vmcx",
    "physical-disk.xml",
    "utf8-says-utf16.xml",
)


def sample(name: str) -> str:
    """The path of a sample."""
    return os.fspath(sample_of(f"hyperv-machines/{name}"))


def expected() -> dict[str, Any]:
    """How each sample reads."""
    found: dict[str, Any] = json.loads(Path(sample("expected.json")).read_text("utf-8"))
    return found


def shown(key: Key) -> dict[str, Any]:
    """A tree as `expected.json` has it."""
    found: dict[str, Any] = {}
    for child in key.children:
        assert child.name not in found
        value = child.value
        found[child.name] = shown(child) if value is None else value.hex() if isinstance(value, bytes) else value
    return found


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_samples_read_as_expected(name: str) -> None:
    """Every value of every look-alike, XML and VMCX, also with a log that was not replayed."""
    found, wanted = shown(read(sample(name))), expected()[name]
    if "configuration" not in wanted and "configuration" in found:
        found = found["configuration"]
    assert found == wanted


def test_the_second_header_serves_if_the_first_is_gone() -> None:
    """The rest of the file is as it was."""
    assert read(sample("first-header-gone.vmcx")) == read(sample("2019-gen1.vmcx"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [("bad-entry-checksum.vmcx", "its checksum is wrong at byte"), ("truncated.vmcx", "past the end of the file")],
)
def test_damaged_samples_are_refused(name: str, problem: str) -> None:
    """With the file, the structure and the byte."""
    path = sample(name)
    with pytest.raises(BadConfiguration, match=problem) as caught:
        read(path)
    assert caught.value.path == path and caught.value.hint


def test_names_mean_nothing(tmp_path: Path) -> None:
    """Any extension is read by its content; those of other files of Hyper-V are refused by name."""
    for name in ("A.VMRS", "b.XML", "c", "d.vmcx"):
        for content in (as_xml(tree(configuration={"a": 1})), Writer().write(tree(configuration={"a": 1}))):
            (tmp_path / name).write_bytes(content)
            assert read(os.fspath(tmp_path / name)).at("configuration/a") == Key("a", 1)
    for name, problem in (("a.EXP", "2008"), ("a.bin", "memory"), ("a.vsv", "devices"), ("a.vmgs", "UEFI")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(BadConfiguration, match=problem):
            read(os.fspath(tmp_path / name))


def test_what_is_no_configuration_is_refused(tmp_path: Path) -> None:
    """Empty, a folder, a pipe, an image, nothing at all: each with its reason, without waiting."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "image").write_bytes(b"conectix" * 64)
    for name, problem in (
        ("pipe", "not a regular file"),
        ("", "a folder"),
        ("empty", "is empty"),
        ("image", "neither XML nor VMCX"),
    ):
        with pytest.raises(BadConfiguration, match=problem):
            read(os.fspath(tmp_path / name))
    with pytest.raises(NotFound):
        read(os.fspath(tmp_path / "missing"))


_NAMES = st.text("abcXYZ0_", min_size=1, max_size=6).map(lambda text: f"k{text}")
_TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), max_size=20)
_VALUES = st.one_of(st.integers(-(1 << 63), (1 << 63) - 1), st.booleans(), _TEXTS, st.binary(max_size=40))
_KEYS = st.recursive(
    st.builds(Key, _NAMES, _VALUES),
    lambda below: st.builds(lambda name, keys: Key(name, None, tuple(keys)), _NAMES, st.lists(below, max_size=4)),
    max_leaves=25,
)


@given(st.lists(_KEYS, min_size=1, max_size=4), st.integers(0, 9), st.sampled_from([0x200, 0x1000]))
@settings(deadline=None, max_examples=25)
def test_both_encodings_of_a_tree_read_alike(
    tmp_path_factory: pytest.TempPathFactory, keys: list[Key], slack: int, table_bytes: int
) -> None:
    """What is written is read, from several tables, with slack, from UTF-16 and UTF-8, with and without a mark."""
    whole = Key("", None, (Key("configuration", None, tuple(keys)),))
    path = os.fspath(tmp_path_factory.getbasetemp() / "hyperv-tree")
    contents = [
        Writer(table_bytes=table_bytes, slack=slack).write(whole),
        as_xml(whole),
        as_xml(whole, mark=b""),
        as_xml(whole, encoding="utf-8", mark=b""),
        as_xml(whole, encoding="utf-8", mark=b"\xef\xbb\xbf"),
        as_xml(whole, encoding="utf-16-be", mark=b"\xfe\xff"),
    ]
    for content in contents:
        Path(path).write_bytes(content)
        assert read(path) == whole
