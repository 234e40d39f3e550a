# SPDX-License-Identifier: Apache-2.0
"""Every test of the command line runs in its own folder, so that names on its command lines are short."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, daily_or_nightly
from tests.vhdkit.cli import running

# Tests of these files run with a chain of VHDs. Every night those with `make_chain` also run with chains of VHDX, all
# but these, which are about bytes and messages of a VHD, or about what a VHDX does not have.
VHD_ONLY = {
    "test_warnings", "test_errors_come_first", "test_quiet_keeps_the_exit_code", "test_info_of_a_chain",
    "test_info_lists_findings", "test_info_of_a_damaged_image", "test_a_damaged_parent_is_shown_as_far_as_it_goes",
    "test_a_bad_block_table_breaks_the_chain", "test_a_loop_ends", "test_dump", "test_dump_of_a_damaged_file",
    "test_snapshot_reports_what_it_made", "test_snapshot_of_a_set_as_json", "test_snapshots_while_fio_writes",
    "test_session", "test_nothing_is_overwritten", "test_a_lost_parent_can_be_replaced", "test_a_converted_parent",
    "test_a_parent_of_another_size_must_be_confirmed", "test_merging_while_serving", "test_a_signal_cancels_a_merge",
    "test_info_of_a_vhdx", "test_refusals",
}  # fmt: skip
# The same for sectors of 4096 bytes: a VHD has none, and a part of one is written as a whole.
SECTORS_OF_512_ONLY = VHD_ONLY | {
    "test_a_chain_to_every_kind", "test_from_a_pipe", "test_to_a_pipe", "test_json_and_quiet",
    "test_force_is_suggested_only_where_it_helps", "test_chain_tree", "test_json_is_exact",
    "test_chains_between_all_formats",
}  # fmt: skip
DAILY = {
    "test_a_chain_to_every_kind", "test_chain_of_an_image_in_use", "test_overlay_leaves_the_images_unchanged",
    "test_keep_overlay", "test_follow_leaf", "test_json_is_exact", "test_info_as_json", "test_moves_a_chain",
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that make a chain over several kinds of chains."""
    name = metafunc.function.__name__
    if "make_chain" not in metafunc.function.__code__.co_names or name in VHD_ONLY:
        return
    kinds = ["vhd"]
    if name in DAILY or daily_or_nightly(0, 1):
        kinds += ["vhdx"] if name in SECTORS_OF_512_ONLY or not daily_or_nightly(0, 1) else ["vhdx", "vhdx-4096"]
    if len(kinds) > 1:
        metafunc.parametrize("chain_kind", kinds, indirect=True)


@pytest.fixture(autouse=True)
def chain_kind(request: pytest.FixtureRequest) -> Iterator[None]:
    """What `make_chain` makes during the test."""
    running.chain_kind[0] = running.CHAINS[getattr(request, "param", "vhd")]
    yield
    running.chain_kind[0] = running.CHAINS["vhd"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder the test runs in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("VHDKIT_DEBUG", raising=False)
    return tmp_path
