# SPDX-License-Identifier: Apache-2.0
"""Checks of the caller's arguments: types and values are checked when they are passed, not when they are used.

Decides which values are accepted as a flag, a number, a choice or a list of paths, and how others are refused. Must
not know what they mean. Without these checks, a string passed as a list of folders would be split into its letters,
"/" among them, and a string passed as a flag would always be true.
"""

from __future__ import annotations

import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from typing import Any, Protocol, SupportsIndex, TypeAlias, TypeVar, cast

from vhdkit.errors import InvalidArgument
from vhdkit.units import parse_disk_size, parse_size

_F = TypeVar("_F", bound=Callable[..., Any])
_E = TypeVar("_E", bound=StrEnum)
_T_co = TypeVar("_T_co", covariant=True)

AnyPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Size: TypeAlias = SupportsIndex | str  # bytes: an integer of any library, or a string such as "10M"
NewSize: TypeAlias = SupportsIndex | str  # of a disk: a string such as "1.8T" is rounded up to whole sectors


class Several(Protocol[_T_co]):
    """A list, tuple, set and the like, for type checkers. `str` does not match, as its `__contains__` takes `str`."""

    def __contains__(self, value: object, /) -> bool: ...
    def __iter__(self) -> Iterator[_T_co]: ...
    def __len__(self) -> int: ...


def flag(name: str, value: object) -> bool:
    """`value`, which is True or False. Raises InvalidArgument."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be True or False, not {value!r}")
    return value


def number(name: str, value: object) -> int:
    """`value` as an int; accepts other libraries' integers, but not bool. Raises InvalidArgument."""
    if not isinstance(value, bool):
        try:
            return operator.index(cast("int", value))
        except TypeError:
            pass
    raise InvalidArgument(f"{name} must be a whole number, not {value!r}")


def byte_size(name: str, value: object, parse: Callable[[str], int] = parse_size) -> int:
    """`value` in bytes: an integer, or a string such as "10M" or "1.5 GiB". Raises InvalidArgument."""
    if isinstance(value, str):
        try:
            return parse(value)
        except ValueError as error:
            raise InvalidArgument(f"{name}: {error}") from error
    try:
        return number(name, value)
    except InvalidArgument as error:
        error.hint = error.hint or 'pass a number of bytes, or a string such as "10M"'
        raise


def choice(kind: type[_E], name: str, value: object) -> _E:
    """The member of `kind` that is passed, or whose value is passed. Raises InvalidArgument."""
    try:
        if isinstance(value, str):
            return kind(value)
    except ValueError:
        pass
    raise InvalidArgument(f"{name} must be one of {', '.join(map(repr, map(str, kind)))}, not {value!r}")


def paths(name: str, value: object) -> tuple[str, ...]:
    """The paths in a list, as strings. Raises InvalidArgument, also for a single path."""
    if isinstance(value, str | bytes | os.PathLike):
        shown = os.fsdecode(value)
        raise InvalidArgument(f"{name} must be several paths, not one", hint=f"write {name}=({shown!r},)")
    if not isinstance(value, Iterable):
        raise InvalidArgument(f"{name} must be paths, not {value!r}")
    return tuple(_path(f"{name} must be paths", one) for one in value)


def path(name: str, value: object) -> str:
    """The path as a string. Raises InvalidArgument for anything that is not a path."""
    return _path(f"{name} must be a path", value)


def _path(what: str, value: object) -> str:
    if not isinstance(value, str | bytes | os.PathLike):
        raise InvalidArgument(f"{what}, not {value!r}")
    text = os.fsdecode(value)
    if not text or "\0" in text:
        raise InvalidArgument(f"{what}, not {text!r}", hint="the working folder is '.'")
    return text


def checked(function: _F) -> _F:
    """Decorate a public function so that its arguments are checked, by their annotations, before it runs.

    Flags, numbers, sizes, choices and options must be what the annotation says; paths become strings; a single
    string is refused where several values are expected.
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
    if kind == "Size":
        return byte_size(name, value)
    if kind == "NewSize":
        return byte_size(name, value, parse_disk_size)
    if kind == "AnyPath":
        return path(name, value)
    if kind.startswith("Several["):
        if isinstance(value, str | bytes | os.PathLike) or not isinstance(value, Iterable):
            raise InvalidArgument(f"{name} must be a list, not {value!r}", hint=f"write {name}=[...]")
        return list(paths(name, value)) if kind == "Several[AnyPath]" else list(value)
    if kind == "str":
        if not isinstance(value, str):
            raise InvalidArgument(f"{name} must be a string, not {value!r}")
        return value
    assert kind != "int" and "PathLike" not in kind and not kind.startswith("Sequence["), annotation
    known = inspect.unwrap(function).__globals__.get(kind.removesuffix(" | str"))
    if isinstance(known, type):
        if issubclass(known, StrEnum):
            return choice(known, name, value)
        if not isinstance(value, known):
            raise InvalidArgument(f"{name} must be a {known.__name__}, not {value!r}")
    return value
