# SPDX-License-Identifier: Apache-2.0
"""Bold, dim and a few colours, for lines of text; without rich, which takes a sixth of the time of a short verb.

Decides whether standard output shows styles, as rich decides it: on a terminal that is not dumb, or where FORCE_COLOR
or TTY_COMPATIBLE asks for it; NO_COLOR leaves bold and dim. Must not know what is printed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

_ATTRIBUTES = {"bold": "1", "dim": "2"}
_COLOURS = {"red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_DUMB = ("dumb", "unknown")
_NO_TERMINAL, _TERMINAL = "0", "1"  # values of TTY_COMPATIBLE

Part = str | tuple[str, str]  # text, or (text, style); a style is words of the two tables above


def line_of(parts: Iterable[Part]) -> str:
    """The parts as one line for standard output, with escape sequences where it shows them."""
    known = _shown()
    line = ""
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        codes = [known[word] for word in style.split() if word in known]
        line += f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes and text else text
    return line


def _shown() -> dict[str, str]:
    if not _is_terminal() or os.environ.get("TERM", "").strip().lower() in _DUMB:
        return {}
    return _ATTRIBUTES if os.environ.get("NO_COLOR") else _ATTRIBUTES | _COLOURS


def _is_terminal() -> bool:
    compatible = os.environ.get("TTY_COMPATIBLE")
    if compatible in (_NO_TERMINAL, _TERMINAL):
        return compatible == _TERMINAL
    forced = os.environ.get("FORCE_COLOR")
    if forced is not None:
        return forced != ""
    return sys.stdout.isatty()
