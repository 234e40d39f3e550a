# SPDX-License-Identifier: Apache-2.0
"""The MAC pool: uniqueness, exhaustion, collisions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.model import errors
from vmm.net import frames, mac

POOL = mac.pool_of_host("192.168.7.9", "")


def test_the_pool_is_that_of_hyper_v() -> None:
    """00-15-5D, the last two octets of the host's address, 00 to FF."""
    assert str(POOL) == "00-15-5D-07-09-00 to -FF"
    assert POOL.addresses()[0] == bytes.fromhex("00155d070900")
    assert POOL.addresses()[-1] == bytes.fromhex("00155d0709ff")
    assert len(set(POOL.addresses())) == mac.POOL_ADDRESSES


def test_hosts_without_an_address_have_their_own_pool() -> None:
    """The pool is derived from the host's id, always in the same way."""
    one, again, other = (mac.pool_of_host(None, name) for name in ("a", "a", "b"))
    assert one == again != other
    assert one.prefix[:3] == mac.VENDOR


@given(st.sets(st.sampled_from(POOL.addresses())))
def test_a_picked_address_is_free(taken: set[bytes]) -> None:
    """`INV-MAC-UNIQUE`: it belongs to the pool and is not taken, and one is found as long as any is free."""
    if len(taken) == mac.POOL_ADDRESSES:
        with pytest.raises(errors.NoSpace):
            mac.pick(POOL, taken)
        return
    address = mac.pick(POOL, taken)
    assert address in POOL.addresses()
    assert address not in taken


@given(st.lists(st.booleans(), max_size=600))
def test_added_and_removed_adapters_never_share_an_address(steps: list[bool]) -> None:
    """Any sequence of adding and removing keeps addresses distinct, and only the 257th at once is refused."""
    taken: list[bytes] = []
    for adds in steps:
        if adds and len(taken) < mac.POOL_ADDRESSES:
            taken.append(mac.pick(POOL, taken))
            assert len(set(taken)) == len(taken)
        elif taken:
            taken.pop(0)


def test_the_257th_address_is_an_error_with_a_hint() -> None:
    """The error comes when the adapter is added, not at power-on as in Hyper-V, and says what to do."""
    with pytest.raises(errors.NoSpace, match=r"all 256 .* 00-15-5D-07-09-00 to -FF are taken .*mac="):
        mac.pick(POOL, POOL.addresses())


def test_static_addresses_are_checked() -> None:
    """Group addresses, zeros and garbage are refused; the error for a taken address names its owner."""
    owners = {POOL.addresses()[3]: "adapter nic-0 of machine web"}
    assert mac.check_static("02-00-00-00-00-01", owners) == bytes.fromhex("020000000001")
    for text in ("01:00:5e:00:00:01", "00:00:00:00:00:00", "rubbish", frames.format_mac(frames.BROADCAST)):
        with pytest.raises(errors.InvalidSpec):
            mac.check_static(text, owners)
    with pytest.raises(errors.AlreadyExists, match="adapter nic-0 of machine web"):
        mac.check_static("00:15:5d:07:09:03", owners)
