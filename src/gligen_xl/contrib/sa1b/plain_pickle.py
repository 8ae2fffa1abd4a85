"""Reads pickles of plain values, by a machine that has only the instructions such files need.

A pickle is a program for a stack machine. Python's own has instructions that import, call and change anything; this one
makes numbers, texts, lists, tuples and dictionaries, and calls the functions that it is given, by the names that stand
for them in files. What those return is changed through `Placeholder.set` alone.
"""

from __future__ import annotations

import pickletools
from collections.abc import Mapping
from typing import IO, Any

Names = Mapping[tuple[str, str], Any]  # module and name, as files have them

OBJECTS = 5_000_000  # lists, dictionaries, tuples and remembered values; the published archives have about 600,000
HANDED = 4  # bytes that a byte of a file may become as functions hand it on; old protocols need two


class Refused(Exception):
    """A pickle asks for more than it may have."""


class Placeholder:
    """What a pickle asks for; the file says in two steps what that is."""

    def set(self, state: Any) -> None:
        """Do the second step; raise `Refused` if the state is not one that may be asked for."""
        raise NotImplementedError


_VALUES = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
))  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUTS, _GETS = frozenset(("PUT", "BINPUT", "LONG_BINPUT")), frozenset(("GET", "BINGET", "LONG_BINGET"))
_OBJECTS = _PUTS | {
    "MEMOIZE", "MARK", "EMPTY_LIST", "LIST", "EMPTY_DICT", "DICT", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(file: IO[bytes], size: int, names: Names) -> Any:
    """Read what a pickle describes: numbers, texts, lists, dictionaries with texts as keys, and what functions return.

    Args:
        size: of the file, in bytes. `HANDED` times as much may be handed to functions, but not the same megabyte over
            and over.
        names: that it may ask for: functions that it may call, and constants.

    Raises:
        Refused: it asks for something else.
        ValueError, TypeError, LookupError, and other exceptions: it is not a pickle, or a broken one.
    """
    left, objects = HANDED * size, 0
    stack: list[Any] = []
    marks: list[int] = []  # places on the stack
    memo: dict[int, Any] = {}

    def since(begin: int) -> list[Any]:
        items = stack[begin:]
        del stack[begin:]
        return items

    for opcode, argument, _ in pickletools.genops(file):
        name: str = opcode.name
        if name in _OBJECTS:
            objects += 1
            if objects > OBJECTS:  # of a byte each in the file, and a hundred in memory
                raise ValueError(f"it has more than {OBJECTS} lists, dictionaries and remembered values")
        if name in _VALUES:
            stack.append(argument)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _PUTS:
            memo[argument] = stack[-1]  # type: ignore[index]
        elif name in _GETS:
            stack.append(memo[argument])  # type: ignore[index]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(since(len(stack) - _TUPLES[name])))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since(marks.pop())))
        elif name in ("EMPTY_LIST", "LIST"):
            stack.append(since(marks.pop()) if name == "LIST" else [])
        elif name in ("APPEND", "APPENDS"):
            items = since(marks.pop() if name == "APPENDS" else len(stack) - 1)
            _target(stack, list).extend(items)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = since(len(stack) - 2 if name == "SETITEM" else marks.pop())
            if name == "DICT":
                stack.append({})
            if any(type(key) is not str for key in items[::2]):  # hashing may be made to take all of the stack
                raise ValueError("a dictionary whose keys are not text")
            _target(stack, dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_named(names, *str(argument).split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_named(names, *since(len(stack) - 2)))
        elif name == "REDUCE":
            function, arguments = since(len(stack) - 2)
            if not callable(function) or type(arguments) is not tuple:
                raise Refused("calls what is no function")
            left -= sum(len(argument) for argument in arguments if isinstance(argument, str | bytes))
            if left < 0:
                raise ValueError("it comes to more than its bytes can hold")
            stack.append(function(*arguments))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Placeholder):
                raise Refused("changes what it may not")
            stack[-1].set(state)
        elif name not in ("PROTO", "FRAME", "BINPERSID", "STOP"):  # torch names its storages by a BINPERSID
            raise Refused(f"has the instruction {name}, which no file of arrays needs")
    return stack.pop()


def _target(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise ValueError(f"items for what is no {kind.__name__}")
    return stack[-1]


def _named(allowed: Names, module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise ValueError("a name that is not text")
    if (module, name) not in allowed:
        raise Refused(f"asks for {module:.60}.{name:.60}, which no file of arrays needs")
    return allowed[module, name]
