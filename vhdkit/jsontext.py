# SPDX-License-Identifier: Apache-2.0
"""Documents as JSON that every parser accepts.

Decides how values that JSON cannot express are written: bytes of a name that are not UTF-8 become `\\xNN`, as they do
in output for people, and NaN and infinities become null.
"""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(document: object, *, indent: int | None = None) -> str:
    """The document as JSON text. Raises TypeError for values that cannot be serialized."""
    return json.dumps(_valid(document), indent=indent, allow_nan=False)


def _valid(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # lone surrogates, which Python uses for bytes that it could not decode
            return value.encode("utf-8", "surrogateescape" if _is_of_bytes(value) else "backslashreplace").decode(
                "utf-8", "backslashreplace"
            )
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_valid(key): _valid(one) for key, one in value.items()}
    return [_valid(one) for one in value] if isinstance(value, list | tuple) else value


def _is_of_bytes(text: str) -> bool:
    """True when every surrogate stands for a byte."""
    return all(not 0xD800 <= ord(c) <= 0xDFFF or 0xDC80 <= ord(c) <= 0xDCFF for c in text)
