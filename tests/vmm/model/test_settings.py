# SPDX-License-Identifier: Apache-2.0
"""The types of a machine's settings, compared with the model that decides them."""

from __future__ import annotations

from vmm.model.settings import ChangedSettings, MachineSettings
from vmm.model.spec import MachineSpec

_NEVER_SET = {"schema_version", "id", "generation", "disks", "adapters"}


def test_every_setting_has_a_type() -> None:
    """The typed settings are those that a user can give a machine: none is missing, none is extra."""
    assert set(ChangedSettings.__annotations__) == set(MachineSpec.model_fields) - _NEVER_SET
    assert set(ChangedSettings.__annotations__) - set(MachineSettings.__annotations__) == {"name"}
