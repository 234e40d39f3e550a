# SPDX-License-Identifier: Apache-2.0
"""Configurations in XML: hostile and damaged ones are refused in bounded time and memory."""

from __future__ import annotations

import pytest

from vmm.hyperv.keys import MAX_DEPTH, MAX_KEYS, Key
from vmm.hyperv.xml_file import MAX_XML_BYTES, read_xml
from vmm.model.errors import BadConfiguration


def parsed(text: str) -> Key:
    """The tree of a text below `configuration`."""
    found = read_xml("a.xml", f"<configuration>{text}</configuration>".encode()).at("configuration")
    assert found is not None
    return found


def test_values() -> None:
    """Line ends are LF, references are resolved, and a type that is not known leaves the text as it is."""
    found = parsed(
        '<a type="string">one\r\ntwo &lt;&amp;&#228;</a><b type="integer"> -7 </b><c type="bool">TRUE</c>'
        '<d type="bytes">AAEC\r\nAw==\r\n</d><e type="float">1.5</e><f>text</f><g></g><h type="string"/>'
    )
    assert [(key.name, key.value) for key in found.children] == [
        ("a", "one\ntwo <&ä"), ("b", -7), ("c", True), ("d", b"\0\1\2\3"), ("e", "1.5"), ("f", "text"), ("g", None),
        ("h", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('<a type="integer">1.5</a>', "a is not of the type integer in line 1"),
        ('<a type="integer">99999999999999999999</a>', "integer"),
        ('<a type="bool">yes</a>', "bool"),
        ('<a type="bytes">AAE</a>', "bytes"),
        ('<a type="bytes">AAEé</a>', "bytes"),
        ('<a type="string"><b/></a>', "a value and keys below it"),
        ("<a>", "not XML: mismatched tag"),
        ("&b;", "not XML: undefined entity"),
        ("<a>\0</a>", "not XML"),
        ("<a>" * 50 + "</a>" * 50, f"deeper than {MAX_DEPTH}"),
        ("<a/>" * MAX_KEYS, f"more than {MAX_KEYS} keys"),
    ],
)
def test_what_is_wrong_is_refused(text: str, problem: str) -> None:
    """With the line."""
    with pytest.raises(BadConfiguration, match=problem):
        parsed(text)


def test_a_document_type_is_refused() -> None:
    """And with it every entity, before one is expanded."""
    bomb = "".join(f'<!ENTITY e{n} "&e{n - 1};&e{n - 1};&e{n - 1};&e{n - 1};">' for n in range(1, 30))
    text = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e0 "x">{bomb}]><configuration>&e29;</configuration>'
    with pytest.raises(BadConfiguration, match="document type"):
        read_xml("a.xml", text.encode())


@pytest.mark.parametrize("content", [b"\xff\xfe<\0a", b"<\0c\0\x00\xd8", b"<\xff>"])
def test_an_encoding_that_is_broken_is_refused(content: bytes) -> None:
    """With the place of the first byte that does not fit."""
    with pytest.raises(BadConfiguration, match=r"not UTF-.* at byte|not XML"):
        read_xml("a.xml", content)


def test_what_is_too_large_is_not_parsed() -> None:
    """Real configurations have some hundred KiB."""
    with pytest.raises(BadConfiguration, match="at most"):
        read_xml("a.xml", bytes(MAX_XML_BYTES + 1))
