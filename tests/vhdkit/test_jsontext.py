# SPDX-License-Identifier: Apache-2.0
"""JSON that every reader accepts, whatever names and numbers it contains."""

from __future__ import annotations

import json
import os

import pytest

from vhdkit.jsontext import json_text


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (os.fsdecode(b"/srv/d\xffsk"), "/srv/d\\xffsk"),
        ("\ud800", "\\ud800"),
        ("Grüße", "Grüße"),
        (float("nan"), None),
        (float("-inf"), None),
        (1.5, 1.5),
        ({os.fsdecode(b"\xfe"): [("a", os.fsdecode(b"\xfd"))]}, {"\\xfe": [["a", "\\xfd"]]}),
    ],
)
def test_values_that_json_cannot_express(value: object, read: object) -> None:
    """Bytes that are not UTF-8 become visible, numbers like NaN null; the text is strict JSON in UTF-8."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = json_text({"value": value})
    found = json.loads(text, parse_constant=refuse)["value"]
    assert found == read
    json.dumps(found, ensure_ascii=False).encode()  # no lone surrogate is left
