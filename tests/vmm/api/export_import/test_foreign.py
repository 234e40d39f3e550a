# SPDX-License-Identifier: Apache-2.0
"""What a stranger's definition may contain: every setting is decided; one that reaches outside requires consent."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, cast, get_args

import pytest
from pydantic import BaseModel

from vmm.api.export_import.foreign import ALLOWANCES, DECISIONS, Allowance, Consent, judge
from vmm.api.restoring.found_night import ALLOWED
from vmm.model.formats import ImageFormat
from vmm.model.spec import MachineSpec, make_spec

# A value for each setting that is confined or requires consent: what it refers to, and the option in the refusal.
REACHING: dict[str, tuple[dict[str, Any], str]] = {
    "MachineSpec.kernel": ({"kernel": "/boot/vmlinuz"}, "--map /boot/vmlinuz=NEW"),
    "MachineSpec.initrd": ({"kernel": "/own/kernel", "initrd": "/etc/shadow"}, "--map /etc/shadow=NEW"),
    "MachineSpec.background_capture": ({"background_capture": True}, "--allow background-capture"),
    "DiskSpec.path": ({"disks": [{"id": "disk-0", "path": "/dev/sda", "format": "raw"}]}, "--map /dev/sda=NEW"),
    "AdapterSpec.switch": ({"adapters": [{"id": "nic-0", "switch": "lan"}]}, "--switch lan=NEW"),
    "AdapterSpec.spoofing": ({"adapters": [{"id": "nic-0", "spoofing": True}]}, "--allow spoofing"),
    "AdapterSpec.mirror": ({"adapters": [{"id": "nic-0", "mirror": "destination"}]}, "--allow mirror"),
    "AutomaticSpec.start": ({"automatic": {"start": "always"}}, "--allow autostart"),
    "PathsSpec.disks": ({"paths": {"disks": "/etc"}}, "--map /etc=NEW"),
    "PathsSpec.snapshots": ({"paths": {"snapshots": "/root"}}, "--map /root=NEW"),
}


def models(kind: Any) -> Iterator[type[BaseModel]]:
    """The model and all models in its fields."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from models(field.annotation)
    elif isinstance(kind, types.UnionType) or get_args(kind):
        for part in get_args(kind):
            yield from models(part)


def undecided(kind: type[BaseModel]) -> set[str]:
    """Settings of a definition without a decision, and decisions without a setting."""
    found = set()
    for model in models(kind):
        names = {f"{model.__name__}.{name}" for name in model.model_fields}
        found |= names ^ {f"{model.__name__}.{name}" for name in DECISIONS.get(model, {})}
    return found


def test_every_setting_is_decided() -> None:
    """INV-IMPORT-CONFINED: a new setting makes this fail until it is decided whether an import may have it."""
    assert undecided(MachineSpec) == set()

    class Wider(MachineSpec):
        hook_script: str | None = None

    assert "Wider.hook_script" in undecided(Wider)
    asked = {f"{model.__name__}.{name}" for model, names in DECISIONS.items()
             for name, decision in names.items() if decision in ("confined", "asked")}  # fmt: skip
    assert asked == set(REACHING)
    assert set(get_args(Allowance)) == set(ALLOWED)
    assert set(ALLOWED) - set(ALLOWANCES) == {"memory"}, "only a night of a backup may have memory"


@pytest.mark.parametrize("setting", REACHING)
def test_settings_that_reach_outside_are_refused(setting: str) -> None:
    """Each such setting is refused with the option that would allow it; with that option it is accepted and
    reported."""
    settings, option = REACHING[setting]
    spec = make_spec(name="web", **settings)
    inside = {"/own/kernel": "/import/media/kernel"}
    judged = judge(spec, images={}, inside=inside, consent=Consent())
    assert list(judged.refused.values()) == [option] and not judged.granted
    word = option.split()[-1]
    old = word.removesuffix("=NEW")
    consent = {
        "--map": Consent(paths={old: "/mine"}),
        "--switch": Consent(switches={old: "mine"}),
        "--allow": Consent(allow=frozenset([word])),
    }[option.split()[0]]
    judged = judge(spec, images={}, inside=inside, consent=consent)
    assert not judged.refused and len(judged.granted) == 1 and judged.used == {old}
    if option.startswith("--map"):
        assert old not in judged.spec.model_dump_json() and "/mine" in judged.spec.model_dump_json()


def test_an_undecided_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused at run time, too."""
    decided = {name: one for name, one in DECISIONS[MachineSpec].items() if name != "append"}
    monkeypatch.setitem(cast(dict[Any, Any], DECISIONS), MachineSpec, decided)
    assert "the setting append" in judge(make_spec(name="a"), images={}, inside={}, consent=Consent()).refused


def test_settings_that_are_left_out(tmp_path: object) -> None:
    """With an empty name a drive is empty, a disk is left out, a kernel goes together with its initrd, a folder is the
    host's default."""
    disks = [
        {"id": "disk-0", "path": "/a/one.vhd", "format": "vhd", "parent_dirs": ["/etc"]},
        {"id": "disk-1", "path": "/dev/sdb", "kind": "pass-through", "unit": 1, "identity": "wwn=1"},
        {"id": "disk-2", "path": "/x.iso", "kind": "iso", "controller_index": 1, "read_only": True},
    ]
    spec = make_spec(name="web", disks=disks, kernel="/k", initrd="/i", append="x", paths={"disks": "/d"},
                     adapters=[{"id": "nic-0", "switch": "lan"}])  # fmt: skip
    gone = dict.fromkeys(("/dev/sdb", "/x.iso", "/k", "/i", "/d"), "")
    images: dict[str, tuple[str, ImageFormat]] = {"disk-0": ("/import/disks/one.vhd", "vhd")}
    judged = judge(spec, images=images, inside={}, consent=Consent(paths=gone, switches={"lan": "-"}))
    found = judged.spec
    assert not judged.refused and len(judged.granted) == 6
    assert [(disk.id, disk.path, disk.parent_dirs) for disk in found.disks] == [
        ("disk-0", "/import/disks/one.vhd", ()), ("disk-2", None, ())
    ]  # fmt: skip
    assert (found.kernel, found.initrd, found.append, found.paths.disks) == (None, None, None, None)
    assert found.adapters[0].switch is None


def test_a_device_never_belongs_to_the_folder() -> None:
    """A passed-through device that has the path of a file of the import requires consent all the same."""
    disk = {"id": "disk-0", "path": "/import/media/x", "kind": "pass-through", "controller": "scsi"}
    ide = {"id": "disk-1", "path": "/import/disks/a.vhd", "format": "vhd"}
    judged = judge(
        make_spec(name="web", disks=[disk, ide]), images={"disk-1": ("/import/disks/a.vhd", "vhd")},
        inside={"/import/media/x": "/import/media/x"}, consent=Consent(),
    )  # fmt: skip
    assert list(judged.refused.values()) == ["--map /import/media/x=NEW"]
