# SPDX-License-Identifier: Apache-2.0
"""The types of a machine's settings against the model that decides them."""

from __future__ import annotations

from vmm.model.settings import ChangedSettings, MachineSettings
from vmm.model.spec import MachineSpec

_NEVER_SET = {"schema_version", "id", "generation", "disks", "adapters"}


def test_every_setting_has_a_type() -> None:
    """The typed settings are those of a machine that can be given: no one is missing, none is invented."""
    assert set(ChangedSettings.__annotations__) == set(MachineSpec.model_fields) - _NEVER_SET
    assert set(ChangedSettings.__annotations__) - set(MachineSettings.__annotations__) == {"name"}
