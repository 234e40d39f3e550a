# SPDX-License-Identifier: Apache-2.0
"""The MAC address of an adapter: static ones are checked, dynamic ones come from a pool. Pure.

Decides the pool, which is Hyper-V's 00-15-5D-xx-yy-00 to -FF, where xx and yy are the last two octets of the host's
first IPv4 address (Microsoft KB 2804678), and that an address is never assigned twice. Hyper-V lets two hosts with
equal octets assign the same addresses, and fails at power-on when all 256 are used; here a collision is an error that
names the adapter with the address, and so is an empty pool. The caller passes the addresses that are taken.

`INV-MAC-UNIQUE`: what `pick` returns is in the pool and in none of the addresses that are taken.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vmm.model import errors
from vmm.net import frames

VENDOR = bytes.fromhex("00155d")  # Microsoft's, which Hyper-V's pools use
POOL_ADDRESSES = 256
PREFIX_BYTES = 5  # common to all addresses of a pool


@dataclass(frozen=True, slots=True)
class Pool:
    """256 addresses with the same prefix of five bytes."""

    prefix: bytes

    def addresses(self) -> list[bytes]:
        """All of them, in order."""
        return [self.prefix + bytes([last]) for last in range(POOL_ADDRESSES)]

    def __str__(self) -> str:
        return f"{self.prefix.hex('-').upper()}-00 to -FF"


def pool_of_host(first_ipv4: str | None, machine_id: str) -> Pool:
    """The host's pool; without an IPv4 address, two octets of a hash of the host's id are used."""
    if first_ipv4 is not None:
        return Pool(VENDOR + ipaddress.IPv4Address(first_ipv4).packed[2:])
    return Pool(VENDOR + hashlib.sha256(machine_id.encode()).digest()[:2])


def pick(pool: Pool, taken: Collection[bytes]) -> bytes:
    """The lowest free address. Raises NoSpace if none is free."""
    for address in pool.addresses():
        if address not in taken:
            return address
    raise errors.NoSpace(
        f"all {POOL_ADDRESSES} addresses of the MAC pool {pool} are taken",
        hint="remove adapters that are no longer needed, or give the new one an address of its own with mac=",
    )


def check_static(text: str, owners: Mapping[bytes, str]) -> bytes:
    """The address that a user typed. Raises InvalidSpec for an impossible one, AlreadyExists for one that is taken."""
    try:
        address = frames.parse_mac(text)
    except ValueError as error:
        raise errors.InvalidSpec(str(error)) from error
    if frames.is_group(address):
        hint = f"clear the lowest bit of the first byte: {frames.format_mac(bytes([address[0] & 0xFE]) + address[1:])}"
        raise errors.InvalidSpec(f"{text} is a group address, which no adapter can have", hint=hint)
    if not any(address):
        raise errors.InvalidSpec(f"{text} is not an address that an adapter can have")
    if address in owners:
        raise errors.AlreadyExists(
            f"the MAC address {frames.format_mac(address)} is already that of {owners[address]}",
            hint="choose another one, or omit mac= to get one from the pool",
        )
    return address
