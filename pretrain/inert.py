"""Reads the instructions of a pickle without following them.

A pickle is a program. `pickle` runs it, and even if only harmless classes are admitted, the program
calls them with arguments of its choice and changes the objects: a numpy array can be made to reach
beyond its memory. Here nothing is called or constructed. The instructions run on a stack of our
own, where a class is its name and a call is a record of its arguments; the caller compares that
record with what a genuine file holds, and takes the numbers from it. Instructions that Python's and
numpy's own writers do not use for arrays are refused. So are more instructions than a file of
weights has: each is a byte of the file and may make an object of a hundred bytes.
"""

import pickletools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

MAX_INSTRUCTIONS = 1_000_000  # a ViT-g with the moments of its optimizer has a tenth of it

_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINBYTES", "SHORT_BINBYTES", "SHORT_BINSTRING",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Name(NamedTuple):
    """A class or function that a pickle names."""

    path: str


class Stored(NamedTuple):
    """What a pickle says lies elsewhere in its file."""

    key: object


@dataclass(eq=False)
class Call:
    """What a pickle would have made by a call.

    Attributes:
        function: path of what it would call.
        arguments: of the call.
        state: what it would set afterwards; None: nothing.
        items: what it would put under keys.
    """

    function: str
    arguments: tuple
    state: object = None
    items: dict = field(default_factory=dict)


def read_inert(file: BinaryIO, allowed: Collection[str]) -> object:
    """The containers, numbers and strings of a pickle; everything else is `Call`, `Name`, `Stored`.

    Containers may hold themselves, or each other many times: the caller has to bound its walk.

    Args:
        file: at the beginning of the pickle; afterwards at its end.
        allowed: paths of the classes and functions that it may name.

    Raises:
        ValueError: it is no pickle, is damaged, or holds what has no place in a file of weights.
    """
    try:
        return _read(file, allowed)
    except (IndexError, KeyError) as error:
        raise ValueError(
            "it is no pickle, or a damaged one: an instruction lacks its operand"
        ) from error


def _read(file: BinaryIO, allowed: Collection[str]) -> object:
    stack: list = []
    marked: list[list] = []  # the stacks below each open MARK
    memo: dict[int, object] = {}  # by number: a pickle may number its first entry 2**32 - 1
    for count, (instruction, argument, position) in enumerate(_instructions(file)):
        if count == MAX_INSTRUCTIONS:
            raise ValueError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        name = instruction.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name == "TUPLE":
            made = tuple(stack)
            stack = marked.pop()
            stack.append(made)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(name[-1])
            if len(stack) < length:
                raise IndexError
            stack[-length:] = [tuple(stack[-length:])]
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            if name.endswith("S"):
                values, stack = stack, marked.pop()
            else:
                length = 1 if name == "APPEND" else 2
                values = [stack.pop() for _ in range(length)][::-1]
            _put(stack[-1], values, name.startswith("SET"))
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ", 1) if name == "GLOBAL" else [stack.pop(), stack.pop()][::-1]
            path = ".".join(p if type(p) is str else "?" for p in parts)
            if path not in allowed:
                raise ValueError(f"it names {path!r:.100}, and only arrays of numbers are admitted")
            stack.append(Name(path))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            if type(function) is not Name or type(arguments) is not tuple:
                raise ValueError("it calls something that is no class")
            stack.append(Call(function.path, arguments))
        elif name == "BUILD":
            state, target = stack.pop(), stack[-1]
            if type(target) is not Call or target.state is not None:
                raise ValueError("it changes something that is complete")
            target.state = state
        elif name == "BINPERSID":
            stack.append(Stored(stack.pop()))
        elif name == "STOP":
            # What lies beneath, or is put where something was, would be made without being checked.
            if len(stack) != 1 or marked:
                raise ValueError("it makes more than one thing")
            return stack[0]
        else:
            raise ValueError(f"its instruction {name} at byte {position} has no place in weights")
    raise AssertionError("pickletools ends with STOP or an error")


def _instructions(file: BinaryIO) -> Iterator[tuple]:
    try:
        yield from pickletools.genops(file)
    except ValueError as error:
        raise ValueError("it is no pickle, or a damaged one") from error


def _put(target: object, values: list, pairs: bool) -> None:
    if not pairs:
        if type(target) is not list:
            raise ValueError("it appends to something that is no list")
        target.extend(values)
        return
    target = target.items if type(target) is Call else target
    # Other keys are never needed, and hashing a tuple nested 100,000 deep kills the process.
    if type(target) is not dict or any(type(k) not in (str, int) for k in values[::2]):
        raise ValueError("it puts a value under something that is no name")
    if len(values) % 2:
        raise IndexError
    for key, value in zip(values[::2], values[1::2], strict=True):
        if key in target:
            raise ValueError(f"{key!r:.100} is in it twice")
        target[key] = value
