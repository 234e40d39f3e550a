# SPDX-License-Identifier: Apache-2.0
"""Finding a machine's worker when its definition was edited by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmm import contact, paths, registry
from vmm.errors import InvalidSpec
from vmm.spec import make_spec


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of the test's own."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))


@pytest.mark.parametrize("machine_id", ["../../victim", "../victim/x", "zzz", "", 5, None])
def test_id_that_is_none(tmp_path: Path, machine_id: object) -> None:
    """Every verb says that the definition is wrong, and what the id happens to lead to is left alone."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    (tmp_path / "run" / "x").mkdir(parents=True)
    path = Path(registry.add(make_spec(name="web")).paths.definition)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id": machine_id}))
    for verb in (contact.Place.of, contact.start):
        with pytest.raises(InvalidSpec, match="no machine definition: id"):
            verb("web")
    assert (victim / "file").read_text() == "precious"


@pytest.mark.parametrize("text", ["[" * 200_000, "", "[1]", '{"id": [1]}'])
def test_no_definition_at_all(text: str) -> None:
    """What is no definition is told as that, however deep it is."""
    path = Path(registry.add(make_spec(name="web")).paths.definition)
    path.write_text(text)
    with pytest.raises(InvalidSpec, match="is no machine definition"):
        contact.start("web")
    assert not Path(paths.runtime_home()).exists()
