# SPDX-License-Identifier: Apache-2.0
"""What a caller may give: types and values are looked at when they are given, not when they are used.

Decides which values stand for a flag, a number, a choice or a list of paths, and in which words others are refused.
Must not know what they mean. A text where a list of folders is wanted would be taken for its letters, "/" among them;
a text where a flag is wanted would always be true.
"""

from __future__ import annotations

import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, TypeVar, cast

from vhdkit.errors import InvalidArgument

_F = TypeVar("_F", bound=Callable[..., Any])
_E = TypeVar("_E", bound=StrEnum)


def flag(name: str, value: object) -> bool:
    """`value`, which is True or False. Raises InvalidArgument."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} is True or False, not {value!r}")
    return value


def number(name: str, value: object) -> int:
    """`value` as an int: also another library's whole number, but no truth value. Raises InvalidArgument."""
    if not isinstance(value, bool):
        try:
            return operator.index(cast("int", value))
        except TypeError:
            pass
    raise InvalidArgument(f"{name} is a whole number, not {value!r}")


def choice(kind: type[_E], name: str, value: object) -> _E:
    """The member of `kind` that is given, or that is called so. Raises InvalidArgument."""
    try:
        if isinstance(value, str):
            return kind(value)
    except ValueError:
        pass
    raise InvalidArgument(f"{name} is one of {', '.join(map(repr, map(str, kind)))}, not {value!r}")


def paths(name: str, value: object) -> tuple[str, ...]:
    """The paths in a list, as texts. Raises InvalidArgument, for a single path too."""
    if isinstance(value, str | bytes | os.PathLike):
        shown = os.fsdecode(value)
        raise InvalidArgument(f"{name} are several paths, not one", hint=f"write {name}=({shown!r},)")
    if not isinstance(value, Iterable):
        raise InvalidArgument(f"{name} are paths, not {value!r}")
    return tuple(_path(name, one) for one in value)


def _path(name: str, value: object) -> str:
    if not isinstance(value, str | bytes | os.PathLike):
        raise InvalidArgument(f"{name} are paths, not {value!r}")
    text = os.fsdecode(value)
    if not text or "\0" in text:
        raise InvalidArgument(f"{name} are paths, and {text!r} is none", hint="the working folder is '.'")
    return text


def checked(function: _F) -> _F:
    """A public function whose arguments are looked at, by their annotations, before it does anything.

    Truth values, numbers, choices and options are as they are annotated; a sequence is no single text.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def looking(*arguments: Any, **keywords: Any) -> Any:
        bound = signature.bind(*arguments, **keywords)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _looked_at(function, name, str(signature.parameters[name].annotation), value)
        return function(*bound.args, **bound.kwargs)

    return cast("_F", looking)


def _looked_at(function: Callable[..., Any], name: str, annotation: str, value: object) -> object:
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return value
    if kind == "bool":
        return flag(name, value)
    if kind == "int":
        return number(name, value)
    if kind.startswith("Sequence["):
        if isinstance(value, str | bytes | os.PathLike) or not isinstance(value, Iterable):
            raise InvalidArgument(f"{name} is a list, not {value!r}", hint=f"write {name}=[...]")
        return list(value)
    known = inspect.unwrap(function).__globals__.get(kind)
    if isinstance(known, type):
        if issubclass(known, StrEnum):
            return choice(known, name, value)
        if not isinstance(value, known):
            raise InvalidArgument(f"{name} is a {known.__name__}, not {value!r}")
    return value
