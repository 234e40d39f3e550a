# SPDX-License-Identifier: Apache-2.0
"""How often a merge plans and opens: once, and once more only where the open target knows its file no longer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.chain.verbs.test_merge import BLOCK, SIZE, content, make_chain, stopped, write
from vhdkit import errors, formats
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.verbs import merge_plan
from vhdkit.chain.verbs.merge_in_place import InPlacePlan, described, plan_in_place, prepare
from vhdkit.chain.verbs.merge_plan import MergePlan
from vhdkit.descriptor import close_all
from vhdkit.image import Layer
from vhdkit.store import Store
from vhdkit.units import MIB


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Counts:
    """How many plans were made, and which layers were opened again for writing."""

    def __init__(self) -> None:
        self.plans = 0
        self.opened: list[str] = []


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """What merges do from now on."""
    found, plan, reopened = Counts(), MergePlan, formats.reopened

    def planned(*args: object) -> MergePlan:
        found.plans += 1
        return plan(*args)  # type: ignore[arg-type]

    def opened(layer: Layer, *, writable: bool, store: Store | None = None) -> Layer:
        if writable:
            found.opened.append(layer.store.name)
        return reopened(layer, writable=writable, store=store)

    monkeypatch.setattr(merge_plan, "MergePlan", planned)
    monkeypatch.setattr(formats, "reopened", opened)
    return found


def test_a_merge_makes_one_plan_and_opens_its_target_once(counts: Counts) -> None:
    """The usual merge: one plan, one opening for writing."""
    names = make_chain(3)
    vhdkit.merge(names[0], into=names[2])
    assert (counts.plans, counts.opened) == (1, [str(Path(names[2]).resolve())])


@pytest.mark.parametrize("size", [SIZE + 3 * MIB, SIZE + BLOCK])
def test_a_target_that_grows_is_opened_once_more(size: int, counts: Counts) -> None:
    """The layer that made the target larger does not know the new size; the plan holds for both sizes."""
    names = make_chain(2)
    vhdkit.resize(names[0], size)
    write(names[0], 7)
    before = content(names[0])
    counts.plans, counts.opened = 0, []
    vhdkit.merge(names[0])
    assert (counts.plans, len(counts.opened)) == (1, 2) and content(names[1]) == before


def test_what_an_earlier_attempt_left_costs_one_opening(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed merge plans once, too; its target is opened again after the end of the file was cut."""
    names = make_chain(2)
    stopped(monkeypatch, names, 2)
    counts.plans, counts.opened = 0, []
    vhdkit.resume_merge(names[1])
    assert (counts.plans, len(counts.opened)) == (1, 2)


def test_a_complete_merge_is_resumed_without_opening_its_target(
    counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only names are left to change, nothing is opened for writing as an image."""
    names = make_chain(2)
    stopped(monkeypatch, names, 3)
    counts.plans, counts.opened = 0, []
    vhdkit.resume_merge(names[1])
    assert (counts.plans, counts.opened) == (1, [])


@pytest.fixture
def planned() -> Iterator[InPlacePlan]:
    """A merge of two layers into the base, planned from the open chain."""
    names = make_chain(3)
    layers = open_layers(names[0])
    yield plan_in_place(layers, 2, relink_children=False)
    close_all(layer.store for layer in layers)


def test_a_plan_neither_locks_nor_changes(planned: InPlacePlan) -> None:
    """While a plan exists other programs read every image; `prepare` holds them all, and has changed nothing."""
    options = vhdkit.OpenOptions()
    before = {one.path: Path(one.path).read_bytes() for one in planned.names}
    vhdkit.open_disk(planned.names[0].path).close()
    with prepare(planned, options, dry_run=True) as prepared:
        assert described(prepared).merged == tuple(one.path for one in planned.names[:-1])
        for one in planned.names:
            with pytest.raises(errors.ImageInUse):
                vhdkit.open_disk(one.path)
    assert {one.path: Path(one.path).read_bytes() for one in planned.names} == before


def test_an_incomplete_target_is_refused_before_anything_is_opened(planned: InPlacePlan, counts: Counts) -> None:
    """A caller may name the error for data that would have to be copied; then nothing is opened for writing."""
    refused = errors.InvalidArgument("not all of it is there")
    with (
        pytest.raises(errors.InvalidArgument) as raised,
        prepare(planned, vhdkit.OpenOptions(), if_incomplete=refused),
    ):
        pass
    assert raised.value is refused and counts.opened == []
