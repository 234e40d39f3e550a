# SPDX-License-Identifier: Apache-2.0
"""Files with any content are read in bounded time, and their faults are reported in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm.net import records

JUNK: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "not text": b"\xff\xfe",
    "another kind of JSON": b"[1, 2]",
    "a number": b"7",
    "nested too deep": b"[" * 200_000,
}


@pytest.mark.parametrize("content", list(JUNK.values()), ids=list(JUNK))
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    """The same kind of error, in words, whatever the content."""
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"it is not JSON|it does not hold a JSON object"):
        records.read_object(str(path))


def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path) -> None:
    """A directory, a pipe without a writer and a device are refused without waiting."""
    os.mkdir(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "folder", tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="it is not a regular file"):
            records.read_object(str(path))
        assert records.read_tail(str(path), 100) == ""
    with pytest.raises(FileNotFoundError):
        records.read_object(str(tmp_path / "missing"))
    assert records.read_tail(str(tmp_path / "missing"), 100) == ""


def test_files_have_a_maximum_size(tmp_path: Path) -> None:
    """A file at the limit is read, one byte more is refused; of a log the last part is read."""
    path = tmp_path / "x"
    path.write_bytes(b"a" * 10)
    assert records.read_bytes(str(path), 10) == b"a" * 10
    with pytest.raises(ValueError, match="it is larger than 9 bytes"):
        records.read_bytes(str(path), 9)
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match=f"it is larger than {records.MAX_RECORD_BYTES} bytes"):
        records.read_object(str(path))
    path.write_bytes(b"first\nlast\n")
    assert records.read_tail(str(path), 5) == "last"
