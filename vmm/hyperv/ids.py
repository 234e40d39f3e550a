# SPDX-License-Identifier: Apache-2.0
"""The fixed ids of Hyper-V's devices and settings.

Decides nothing. Those of devices that 2012 R2 lists in no manifest are where their settings are.
"""

from __future__ import annotations

IDE = "83f8638b-8dca-4152-9eda-2ca8b33039b4"
FLOPPY = "8f0d2762-0b00-4e04-af4f-19010527cb93"
SCSI = "d422512d-2bf2-4752-809d-7b82b5fcb1b4"
ADAPTER = "2fc216b0-d2e2-4967-9b6d-b8a5c9ca2778"
FIRMWARE = "ac6b8dc1-3257-4a70-b1b2-a9c9215659ad"
COM_PORTS = "8e3a359f-559a-4b6a-98a9-1690a6100ed7"
CLOCK = "e51b7ef6-4a7f-4780-aaae-d4b291aacd2e"

FEATURES = {
    "952c5004-4465-451c-8cb8-fa9ab382b773": "VLAN",
    "776e0ba7-94a1-41c8-8f28-951f524251b5": "security",
    "24ad3ce1-69bd-4978-b2ac-daad389d699c": "bandwidth",
}
SECURE_BOOT_TEMPLATES = {
    "1734c6e8-3154-4dda-ba5f-a874cc483422": "Microsoft Windows",
    "272e7447-90a4-4563-a4b9-8e4ab00526ce": "Microsoft UEFI Certificate Authority",
}


def plain(text: str) -> str:
    """An id without braces, in lower case."""
    return text.strip().strip("{}").lower()
