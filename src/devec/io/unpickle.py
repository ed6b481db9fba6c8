"""An unpickler that can build tensors and containers, and nothing else.

A pickle is a program. Python's own unpickler runs it by importing modules and calling what it finds; this one is
an interpreter of the same opcodes that imports nothing and calls nothing of the file's choosing:

* a global that tensors need is answered from the tables of ``devec.io.unpickle_globals``;
* a class or function of a model library listed there becomes a :class:`Name`; calling it, building it or
  filling it only records what was asked in an :class:`Inert` object;
* every other global is refused by name.

Tensors come out as :class:`TensorView`, a description of bytes to be read later.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from devec.core.errors import InputError, RefusedError
from devec.io.unpickle_globals import CALLS, Inert, Name, Storage, TensorView, find, is_count, plain_key

_MARK = object()


class Stream(Protocol):
    """What a pickle is read from."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


def load(file: Stream, storage: Callable[[tuple[Any, ...]], object], path: Path) -> Any:
    """Run one pickle from ``file`` up to its STOP and return what it built.

    ``storage`` answers the pickle's persistent ids (see :func:`storage_of`).
    Raises RefusedError for a global outside the tables, InputError for a pickle that is broken.
    """
    machine = _Machine(storage, path)
    try:
        for opcode, arg, _ in pickletools.genops(file):  # type: ignore[arg-type]
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, arg)
    except (RefusedError, InputError):
        raise
    except RecursionError:
        raise InputError("the pickle is nested too deeply", file=path) from None
    except (ValueError, TypeError, LookupError, EOFError, OverflowError, MemoryError, AttributeError) as error:
        raise InputError(
            f"the pickle is truncated or corrupt ({type(error).__name__}: {error})",
            file=path,
            remedy="Get the file again.",
        ) from None
    raise InputError("the pickle ends without its last opcode", file=path, remedy="Get the file again.")


def storage_of(pid: tuple[Any, ...]) -> Storage:
    """The storage that a persistent id ``('storage', type, key, location, count, ...)`` names.

    ``location`` (a device) is ignored: everything is read to the CPU.
    """
    if len(pid) < 5 or pid[0] != "storage":
        raise ValueError("unknown persistent id")
    kind, key, count = pid[1], pid[2], pid[4]
    if not isinstance(kind, torch.dtype) or not isinstance(key, (str, int)) or not is_count(count):
        raise ValueError("malformed storage id")
    return Storage(str(key), kind, count * kind.itemsize)


class _Machine:
    """Stack, memo and one method a kind of opcode."""

    def __init__(self, storage: Callable[[tuple[Any, ...]], object], path: Path) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storage = storage
        self.path = path

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("unexpected mark")
        return value

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise ValueError("unexpected mark")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise ValueError("no mark on the stack")

    def step(self, op: str, arg: Any) -> None:
        if op in _CONSTANTS:
            self.stack.append(_CONSTANTS[op]())
        elif op in _LITERALS:
            self.stack.append(arg)
        elif op in ("PROTO", "FRAME"):
            return
        elif op in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if op == "MEMOIZE" else int(arg)] = self.top()
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(arg)])
        elif op in _ACTIONS:
            _ACTIONS[op](self, arg)
        else:
            raise RefusedError(
                f"the pickle uses the opcode {op}, which tensors never need",
                file=self.path,
                remedy="Ask for the weights as safetensors.",
            )

    # containers
    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise TypeError("append to something that is not a list")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("items set on something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[plain_key(key)] = value

    def add_items(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, set):
            raise TypeError("items added to something that is not a set")
        target.update(plain_key(item) for item in items)

    def make_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(items))

    # globals and calls
    def push_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a global needs a module and a name")
        self.stack.append(find(module, name, self.path))

    def reduce(self) -> None:
        args, callee = self.pop(), self.pop()
        self.stack.append(self.call(callee, args))

    def new_object(self, with_keywords: bool) -> None:
        if with_keywords:
            self.pop()  # only ever recorded, and nothing reads them
        args, callee = self.pop(), self.pop()
        self.stack.append(self.call(callee, args))

    def call(self, callee: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise TypeError("call arguments are not a tuple")
        if not isinstance(callee, Name):
            raise TypeError(f"a {type(callee).__name__} is called")
        known = CALLS.get((callee.module, callee.name))
        return known(*args) if known is not None else Inert(callee, args)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
            for part in parts:
                if isinstance(part, dict):
                    target.state.update(part)
        elif not isinstance(target, (OrderedDict, TensorView)):
            # attributes of an ordered dict (torch's _metadata) and of a tensor carry no weights
            raise TypeError(f"state is put into a {type(target).__name__}")

    def persistent(self) -> None:
        pid = self.pop()
        if not isinstance(pid, tuple):
            raise TypeError("a persistent id is not a tuple")
        self.stack.append(self.storage(pid))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: _MARK,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_LITERALS = frozenset(
    ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
     "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
     "BINBYTES8", "BYTEARRAY8")
)  # fmt: skip
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.stack.append(m.top()),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.add_items(m.pop_mark()),
    "LIST": lambda m, _: m.stack.append(m.pop_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "FROZENSET": lambda m, _: m.stack.append(frozenset(plain_key(item) for item in m.pop_mark())),
    "DICT": lambda m, _: _dict(m),
    "TUPLE1": lambda m, _: m.make_tuple(1),
    "TUPLE2": lambda m, _: m.make_tuple(2),
    "TUPLE3": lambda m, _: m.make_tuple(3),
    "GLOBAL": lambda m, arg: m.push_global(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.push_global(*[m.pop(), m.pop()][::-1]),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.new_object(False),
    "NEWOBJ_EX": lambda m, _: m.new_object(True),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persistent(),
}


def _dict(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append({})
    machine.set_items(items)
