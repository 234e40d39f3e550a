# SPDX-License-Identifier: Apache-2.0
"""The parameters of control methods: which types they have, and that no other is accepted.

Must not know what they mean.
"""

from __future__ import annotations

from vhdkit.serve.control.server import BadParams, Params


def only(params: Params, *names: str) -> None:
    """Raise BadParams for a parameter that the method does not know: it may be a typing error."""
    unknown = [name for name in params if name not in names]
    if unknown:
        raise BadParams(f"unknown parameters: {', '.join(unknown)}")


def text(params: Params, name: str) -> str | None:
    """A string, or None."""
    value = params.get(name)
    if value is not None and not isinstance(value, str):
        raise BadParams(f'"{name}" must be a string')
    return value


def flag(params: Params, name: str) -> bool:
    """True or False, which is the default."""
    value = params.get(name, False)
    if not isinstance(value, bool):
        raise BadParams(f'"{name}" must be true or false')
    return value


def rate(params: Params) -> int | None:
    """The most bytes to copy per second, or None."""
    value = params.get("max_rate_bytes")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
        raise BadParams('"max_rate_bytes" must be a positive number')
    return value
