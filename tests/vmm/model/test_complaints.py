# SPDX-License-Identifier: Apache-2.0
"""Wrong settings are reported in our words, whatever the checker's words are."""

from __future__ import annotations

from typing import Any, cast, get_args

import pytest
from pydantic import ValidationError
from pydantic_core.core_schema import ErrorType

from vmm.model.complaints import words_of
from vmm.model.errors import InvalidSpec
from vmm.model.spec import make_adapter, make_disk, make_spec, read_spec
from vmm.net.switch_spec import make_switch

_THEIR_WORDS = ("Input should", "Extra inputs", "Field required", "permitted", "should be", "String should", "valid ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory": 5}, "memory: is not a known setting"),
        ({"memory_bytes": 1 << 20}, "memory_bytes: must be 2 MiB or more"),
        ({"memory_bytes": 1 << 50}, "memory_bytes: must be 1048576 MiB or less"),
        ({"memory_bytes": (2 << 20) + 1}, "memory_bytes: must be a multiple of 1 MiB"),
        ({"memory_bytes": "much"}, "memory_bytes: must be a whole number"),
        ({"cpu_count": 0.5}, "cpu_count: must be a whole number"),
        ({"firmware": "efi"}, "firmware: must be 'bios' or 'uefi'"),
        ({"boot_order": "disk"}, "boot_order: must be a list"),
        ({"screen": "maybe"}, "screen: must be true or false"),
        ({"notes": 5}, "notes: must be text"),
        ({"notes": "x" * 70000}, "notes: must have at most 65536 characters"),
        ({"automatic": "always"}, "automatic: must be a group of settings"),
        ({"automatic": {"stop": "now"}}, "automatic.stop: must be 'save', 'turn-off' or 'shut-down'"),
        ({"cpu_model": "a b"}, "cpu_model: cannot be 'a b'"),
        ({"disks": [{"id": "disk-0"}]}, "disks.0.path: is missing"),
        ({"kernel": "a\0b"}, "kernel: contains a zero byte"),
    ],
)
def test_wrong_settings_of_a_machine(settings: dict[str, Any], words: str) -> None:
    """Each message names the setting, and its allowed values."""
    with pytest.raises(InvalidSpec) as caught:
        make_spec(**{"name": "web", **settings})
    assert words in caught.value.problem
    assert not any(theirs in caught.value.problem for theirs in _THEIR_WORDS)


def test_wrong_settings_of_anything_else() -> None:
    """Disks, adapters, switches, and a definition that was edited by hand."""
    with pytest.raises(InvalidSpec, match="unit: must be 0 or more"):
        make_disk(id="disk-0", path="/x", unit=-1)
    with pytest.raises(InvalidSpec, match="queues: must be 8 or less"):
        make_adapter(id="nic-0", queues=9)
    with pytest.raises(InvalidSpec, match="host_vlan: must be 4094 or less"):
        make_switch(name="lab", host_vlan=5000)
    with pytest.raises(InvalidSpec, match=r"/x: is not a machine definition: it is not JSON"):
        read_spec(b"{", "/x")


@pytest.mark.parametrize("kind", get_args(ErrorType))
def test_every_kind_of_error_has_a_message(kind: str) -> None:
    """Each error that the checker can raise has a message of ours, without any of its words."""

    class Complaint:
        """An error of the checker, at its shortest."""

        def errors(self, *, include_url: bool) -> list[dict[str, object]]:
            """Its only entry."""
            words = (
                "Value error, cannot be" if kind in ("value_error", "assertion_error") else "Input should be valid "
            )
            return [{"type": kind, "loc": ("setting",), "msg": words, "input": 5, "ctx": {}}]

    said = words_of(cast(ValidationError, Complaint()))
    assert said.startswith("setting: ") and not any(theirs in said for theirs in _THEIR_WORDS)
