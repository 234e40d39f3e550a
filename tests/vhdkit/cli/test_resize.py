# SPDX-License-Identifier: Apache-2.0
"""`vhdkit resize`."""

from __future__ import annotations

from pathlib import Path

from tests.vhdkit.cli.running import MIB, document, failure, good, make_chain, run


def test_resize_reports_what_it_did() -> None:
    """Larger, unchanged, smaller, with a plan first; the disk keeps its content."""
    content = make_chain()
    assert "would be resized 8.0 MiB (8388608 bytes) -> 4.0 GiB" in good("resize", "--dry-run", "leaf.avhd", "4G")
    assert "resized 8.0 MiB (8388608 bytes) -> 4.0 GiB" in good("resize", "leaf.avhd", "4G")
    assert "is 4.0 GiB (4294967296 bytes) already" in good("resize", "leaf.avhd", "4G")
    assert "-> 8.0 MiB" in good("resize", "--shrink", "leaf.avhd", "8M")
    Path("flat.raw").write_bytes(content)
    assert "equal" in good("compare", "leaf.avhd", "flat.raw")
    assert run("check", "leaf.avhd").exit_code == 0


def test_json() -> None:
    """The document has the disk's sizes and the file's."""
    good("create", "disk.vhd", "--size", "8M")
    result = document("resize", "disk.vhd", "16M")
    assert (result["virtual_size_before_bytes"], result["virtual_size_after_bytes"]) == (8 * MIB, 16 * MIB)
    assert result["file_size_after_bytes"] == Path("disk.vhd").stat().st_size and result["notes"] == []


def test_refusals() -> None:
    """Parents, invalid sizes, sizes that are too large, missing files: each has its exit code and one line."""
    make_chain()
    assert "is the parent of" in failure("resize", "base.vhd", "16M", code=5)
    assert run("resize", "leaf.avhd", "much").exit_code == 2
    failure("resize", "leaf.avhd", "3T", code=2)
    assert "smaller than its parent" in failure("resize", "--shrink", "leaf.avhd", "4M", code=2)
    failure("resize", "gone.vhd", "4M", code=1)
    good("create", "disk.vhd", "--size", "8M")
    assert "add --shrink" in failure("resize", "disk.vhd", "4M", code=2)
    assert "add --shrink" in failure("resize", "--dry-run", "disk.vhd", "4M", code=2)


def test_a_size_is_rounded_up_to_whole_sectors() -> None:
    """Any size works; the rounding is reported on standard error, but not in JSON or with --quiet."""
    good("create", "disk.vhd", "--size", "8M")
    result = run("resize", "disk.vhd", "0.1G")
    assert result.exit_code == 0 and "0.1G is not a whole number of 512-byte sectors" in result.stderr
    assert document("info", "disk.vhd")["virtual_size_bytes"] == 107374592
    assert document("resize", "disk.vhd", "107374593")["virtual_size_after_bytes"] == 107374592 + 512
    assert run("resize", "disk.vhd", "0.3G", "--quiet").output == ""
