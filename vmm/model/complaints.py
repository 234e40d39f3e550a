# SPDX-License-Identifier: Apache-2.0
"""Validation errors in words that users understand; the validator's own messages are written for programmers.

Decides the sentence for each kind of error. A kind without its own sentence gets one that is true of every kind.
"""

from __future__ import annotations

import contextlib
from typing import Any

from pydantic import ValidationError

_MIB = 1 << 20
_SENTENCES = {
    "missing": "is missing",
    "extra_forbidden": "is not a known setting",
    "greater_than_equal": "must be {ge} or more",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be {le} or less",
    "less_than": "must be less than {lt}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "cannot be {input}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "too_long": "must have at most {max_length} entries",
    "string_unicode": "contains bytes that are not UTF-8: rename the file, or use a link whose name is UTF-8",
    "int_from_float": "must be a whole number",
    "finite_number": "must be a number",
}
_KINDS = (  # prefixes of the validator's error types: what the value should have been
    ("int_", "must be a whole number"),
    ("float_", "must be a number"),
    ("bool_", "must be true or false"),
    ("string_", "must be text"),
    ("bytes_", "must be text"),
    ("tuple_", "must be a list"),
    ("list_", "must be a list"),
    ("dict_", "must be a group of settings"),
    ("model_", "must be a group of settings"),
    ("none_", "must be empty"),
)


def words_of(error: ValidationError) -> str:
    """All errors in one line, each with the name of the setting."""
    complaints = []
    for one in error.errors(include_url=False):
        where = ".".join(str(part) for part in one["loc"])
        what = _sentence(str(one["type"]), where, one)
        complaints.append(f"{where}: {what}" if where else what)
    return "; ".join(dict.fromkeys(complaints))


def _sentence(kind: str, where: str, one: Any) -> str:
    if kind in ("value_error", "assertion_error"):
        return str(one["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    facts = {name: _amount(where, value) for name, value in one.get("ctx", {}).items()}
    facts["input"] = repr(one.get("input"))[:80]
    if (sentence := _SENTENCES.get(kind)) is not None:
        with contextlib.suppress(KeyError):  # other versions of the validator use other names for the limits
            return sentence.format(**facts)
    return next(
        (words for beginning, words in _KINDS if kind.startswith(beginning)), "has a value that is not allowed"
    )


def _amount(where: str, value: object) -> object:
    """A limit, with its unit if the setting is a size in bytes."""
    is_size = where.endswith("_bytes") and isinstance(value, int) and value % _MIB == 0
    return f"{value // _MIB} MiB" if is_size and isinstance(value, int) else value
