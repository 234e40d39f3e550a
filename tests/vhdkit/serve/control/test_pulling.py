# SPDX-License-Identifier: Apache-2.0
"""Filling layers under clients: none of their writes is lost, they wait only for moments, and it can be cancelled."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import pytest

import vhdkit
from tests.vhdkit.serve.control.test_merging import EACH, finished, frozen_often, writers_of
from tests.vhdkit.serve.control.test_operations import SIZE, Bench, bench_in
from vhdkit import errors
from vhdkit.chain.verbs import live_pull
from vhdkit.disk import open_disk
from vhdkit.serve.control import merging
from vhdkit.serve.control.pulling import PullRequest, plan_served_pull
from vhdkit.serve.control.server import BadParams
from vhdkit.serve.opening import ExportRequest, OpenMode, open_exports
from vhdkit.units import MIB


def progress(bench: Bench) -> Any:
    """What `status` says of the pull into the first export."""
    return cast("Any", bench.do("status"))["exports"][0]["pull"]


@EACH
def test_a_layer_below_the_leaf(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-PULL-PRESERVES: a layer is filled in parts while clients write and compare, and then stands on nothing."""
    monkeypatch.setattr(live_pull, "PART_BYTES", MIB)
    with bench_in(tmp_path, suffix) as bench:
        writers = writers_of(bench)
        layers = frozen_often(bench, 3, writers)
        done = bench.do("pull", export="a", layer=layers[1], cut=True)
        assert (done["pulled"], done["parent"], done["layer"]) == (layers[2:], None, layers[1])
        finished(bench, writers, layers[0], 2)
        assert all(Path(path).exists() for path in layers)
    assert vhdkit.chain_paths(layers[1]) == [layers[1]]


@EACH
def test_the_leaf(tmp_path: Path, suffix: str) -> None:
    """INV-PULL-PRESERVES: the leaf is filled from some layers, and is the leaf again at the end."""
    with bench_in(tmp_path, suffix) as bench:
        writers = writers_of(bench)
        layers = frozen_often(bench, 3, writers)
        done = bench.do("pull", export="a", to=layers[2], cut=True)
        assert done["parent"] == layers[3] and bench.exports[0].image_path == layers[0]
        finished(bench, writers, layers[0], 2)
    assert vhdkit.chain_paths(layers[0]) == [layers[0], layers[3]]


def test_a_pull_keeps_its_rate_and_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`status` shows the progress, nothing else may change the chain meanwhile, and `cancel` stops it."""
    monkeypatch.setattr(merging, "_REST", 0.0)
    with bench_in(tmp_path) as bench:
        writers = writers_of(bench)
        layers = frozen_often(bench, 2, writers)
        looked, failures = threading.Event(), []

        def pull() -> None:
            try:
                bench.do("pull", export="a", layer=layers[1], cut=True, max_rate_bytes=1)
            except errors.VhdkitError as error:
                failures.append(error)
            looked.set()

        thread = threading.Thread(target=pull, daemon=True)
        thread.start()
        while not looked.is_set():
            if (progress(bench) or {}).get("done_bytes"):
                with pytest.raises(errors.ImageInUse, match="being filled"):
                    bench.do("merge", export="a")
                assert bench.do("cancel", export="a") == {"exports": ["a"]}
                break
        thread.join(30)
        assert [type(one) for one in failures] == [errors.Cancelled]
        assert progress(bench) is None
        finished(bench, writers, layers[0], 3)


@EACH
@pytest.mark.parametrize("merges_back", [True, False])
def test_a_leaf_that_could_not_be_filled(
    tmp_path: Path, suffix: str, merges_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the leaf again, and the next pull fills it; where that fails, too, the error says where the disk is."""

    def full(*args: object) -> None:
        raise errors.NoSpace("no space left")

    with bench_in(tmp_path, suffix) as bench:
        writers = writers_of(bench)
        layers = frozen_often(bench, 2, writers)
        with monkeypatch.context() as patch:
            patch.setattr(live_pull, "fill", full)
            if not merges_back:
                patch.setattr(merging, "live_merge", full)
            with pytest.raises(errors.NoSpace) as caught:
                bench.do("pull", export="a", cut=True)
        assert ("--into " + layers[0] in (caught.value.hint or "")) == (not merges_back)
        if merges_back:
            assert [layer.store.name for layer in bench.exports[0].disk.chain.layers] == layers
        else:
            assert bench.exports[0].image_path in (caught.value.hint or "")
            bench.do("merge", export="a", into=layers[0])
        done = bench.do("pull", export="a", cut=True)
        assert (done["layer"], done["parent"]) == (layers[0], None)
        finished(bench, writers, layers[0], 1)


def test_the_image_that_a_follower_begins_at_is_not_cut_off(tmp_path: Path) -> None:
    """Served as the newest image above a named one, a disk stays findable from there: the next start must not serve
    an older state of it."""
    paths = [str(tmp_path / name) for name in ("base.vhd", "named.avhd", "upper.avhd", "leaf.avhd")]
    vhdkit.create_image(paths[0], MIB)
    for child, parent in zip(paths[1:], paths, strict=False):
        vhdkit.create_child(child, parent)
    base, named, upper, leaf = paths
    for asked, follow_leaf in ((named, True), (leaf, False)):
        [export] = open_exports([ExportRequest(asked)], OpenMode(vhdkit.OpenOptions(), follow_leaf=follow_leaf))
        assert export.image_path == leaf
        for request, is_refused in (
            (PullRequest(cuts=True), True),
            (PullRequest(layer=upper, to=named, cuts=True), True),
            (PullRequest(to=upper, cuts=True), False),
            (PullRequest(layer=named, cuts=True), False),
            (PullRequest(), False),
        ):
            if follow_leaf and is_refused:
                with pytest.raises(errors.InvalidArgument, match="older state"):
                    plan_served_pull(export, request)
            else:
                assert plan_served_pull(export, request).pulled[0] in (named, upper, base)
        export.disk.close()


def test_refused_pulls(tmp_path: Path) -> None:
    """Unknown layers, layers in the wrong order, a single image, wrong parameters."""
    with bench_in(tmp_path) as bench:
        with pytest.raises(errors.InvalidArgument, match="no parent"):
            bench.do("pull", export="a")
        bench.do("snapshot", exports={"a": None})
        layers = [layer.store.name for layer in bench.exports[0].disk.chain.layers]
        for params, kind in (
            ({"export": "nope"}, errors.NotFound),
            ({"export": "a", "layer": "/nowhere"}, errors.InvalidArgument),
            ({"export": "a", "layer": layers[1]}, errors.InvalidArgument),
            ({"export": "a", "to": layers[0]}, errors.InvalidArgument),
            ({"export": "a", "max_rate_bytes": 0}, BadParams),
            ({"export": "a", "cut": "yes"}, BadParams),
            ({"export": "a", "into": layers[1]}, BadParams),
        ):
            with pytest.raises(kind):
                bench.do("pull", **params)
        done = bench.do("pull", export="a")
        assert done["parent"] == layers[1]
        bench.running.end()
    with open_disk(layers[0]) as disk:
        assert disk.size_bytes == SIZE and len(disk.chain.layers) == 2
