# SPDX-License-Identifier: Apache-2.0
"""Configurations in XML, which Hyper-V wrote from Windows Server 2008 to 2012 R2.

Decides in which encoding such a file is, and which values its elements have. Must not know what any key means.

The file is not trusted. A document type, and with it every entity, is refused; the number, depth and size of elements
are bounded. What a file says about its own encoding is ignored: copies in UTF-8 exist that still say UTF-16.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import re
from typing import Any
from xml.parsers import expat

from vmm.hyperv.keys import MAX_DEPTH, MAX_KEYS, Key, Value
from vmm.hyperv.problems import refuse

MAX_XML_BYTES = 16 << 20  # real files have up to some hundred KiB
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_BOOLEANS = {"true": True, "false": False}


def is_xml(start: bytes) -> bool:
    """Whether a file that starts so may be one, in any of the encodings."""
    return start.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").startswith(b"<")


def read_xml(path: str, content: bytes) -> Key:
    """The tree of a file's keys, below a key without a name. Raises BadConfiguration."""
    if len(content) > MAX_XML_BYTES:
        refuse(path, f"it has {len(content)} bytes, a configuration in XML has at most {MAX_XML_BYTES}", hint=None)
    return _Builder(path).build(_decoded(path, content))


def _decoded(path: str, content: bytes) -> str:
    mark, encoding = next((one for one in _BYTE_ORDER_MARKS if content.startswith(one[0])), (b"", ""))
    start = len(mark)
    if not mark:
        encoding = {1: "utf-16-le", 0: "utf-16-be"}.get(content[:2].find(b"\0"), "utf-8")
    try:
        return content[start:].decode(encoding)
    except UnicodeDecodeError as error:
        refuse(path, f"it is not {encoding.upper()}", at_byte=start + error.start)


class _Element:
    """An element whose end has not been seen."""

    def __init__(self, name: str, kind: str | None) -> None:
        self.name = name
        self.kind = kind
        self.text: list[str] = []
        self.children: list[Key] = []


class _Builder:
    """One reading of one file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open: list[_Element] = [_Element("", None)]
        self._count = 0
        self._parser = parser = expat.ParserCreate("utf-8")
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        parser.StartDoctypeDeclHandler = self._document_type
        parser.EntityDeclHandler = self._document_type

    def build(self, text: str) -> Key:
        """The tree. Raises BadConfiguration."""
        try:
            self._parser.Parse(text.encode("utf-8", "surrogatepass"), True)
        except expat.ExpatError as error:
            self._refuse(f"it is not XML: {expat.ErrorString(error.code)}")
        root = self._open[0]
        if not root.children:
            self._refuse("it has no keys")
        return Key("", None, tuple(root.children))

    def _refuse(self, problem: str) -> None:
        refuse(self._path, f"{problem} in line {self._parser.CurrentLineNumber}")

    def _document_type(self, *_: Any) -> None:
        self._refuse("it has a document type or an entity, which no configuration has,")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > MAX_KEYS:
            self._refuse(f"it has more than {MAX_KEYS} keys")
        if len(self._open) > MAX_DEPTH:
            self._refuse(f"its keys lie deeper than {MAX_DEPTH}")
        self._open.append(_Element(name, attributes.get("type")))

    def _characters(self, text: str) -> None:
        self._open[-1].text.append(text)

    def _end(self, _: str) -> None:
        element = self._open.pop()
        text = "".join(element.text)
        value: Value | None = None
        if element.kind is not None:
            if element.children:
                self._refuse(f"{element.name} has a value and keys below it")
            value = self._value(element.name, element.kind, text)
        elif text.strip():
            value = text  # of no known type: shown as it is
        self._open[-1].children.append(Key(element.name, value, tuple(element.children)))

    def _value(self, name: str, kind: str, text: str) -> Value | None:
        if kind == "string":
            return text
        stripped = text.strip()
        if kind == "integer" and _INTEGER.fullmatch(stripped) and -(1 << 63) <= int(stripped) < 1 << 64:
            return int(stripped)
        if kind == "bool" and stripped.lower() in _BOOLEANS:
            return _BOOLEANS[stripped.lower()]
        if kind == "bytes":
            with contextlib.suppress(ValueError):
                return base64.b64decode("".join(stripped.split()), validate=True)
        if kind not in ("integer", "bool", "bytes"):
            return text  # of no known type: shown as it is
        self._refuse(f"{name} is not of the type {kind}")
        return None
