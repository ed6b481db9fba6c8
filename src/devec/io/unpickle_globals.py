"""What a weights pickle may mention, and what each mention stands for. See ``devec.io.unpickle``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from devec.core.errors import RefusedError


@dataclass(frozen=True)
class Storage:
    """A run of bytes in the file. ``dtype`` is what the storage was saved as; ``bytes`` its whole length."""

    key: str
    dtype: torch.dtype
    bytes: int


@dataclass(frozen=True)
class TensorView:
    """A tensor as a strided view of a storage; ``offset`` and ``stride`` count elements of ``dtype``."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements from the first to one past the last that the view touches."""
        if prod(self.shape) == 0:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True)
class Name:
    """A global that the pickle mentions. It is text: there is nothing behind it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Inert:
    """What the pickle wanted to make by calling ``source``; ``state`` is what it then wanted to put into it."""

    source: Name
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)


_LEGACY_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_STORAGE_MODULES = ("torch", "torch.storage", "torch.cuda")
_DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}

_INERT_PREFIXES: tuple[str, ...] = (
    "torch.nn.", "torchvision.", "transformers.", "timm.", "open_clip.", "clip.", "ultralytics.", "models.", "utils.",
    "src.", "pytorch_lightning.", "lightning.",
)  # fmt: skip
"""Libraries whose pickled modules are read: their classes become inert names."""
_NUMPY_CORE = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_INERT_NAMES = {
    ("argparse", "Namespace"), ("datetime", "datetime"), ("datetime", "timedelta"), ("datetime", "timezone"),
    ("_codecs", "encode"), ("numpy", "dtype"), ("numpy", "ndarray"), ("torch", "Tensor"),
    ("torch.serialization", "_get_layout"), ("torch", "Generator"),
    *((m, n) for m in _NUMPY_CORE for n in ("_reconstruct", "scalar", "_frombuffer")),
    *((m, n) for m in ("pathlib", "pathlib._local")
      for n in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
}  # fmt: skip
"""What training scripts leave beside the weights; recorded, never made."""


_MAX_REPEATED = 1 << 24


def find(module: str, name: str, path: Path) -> Any:
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    if module in _STORAGE_MODULES and name in _LEGACY_STORAGES:
        return _LEGACY_STORAGES[name]
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if (module, name) in CALLS or (module, name) in _INERT_NAMES or f"{module}.".startswith(_INERT_PREFIXES):
        return Name(module, name)
    # the name is the file's own text: keep terminal control characters out of the message
    shown = f"{module}.{name}".encode("unicode_escape").decode("ascii")[:200]
    raise RefusedError(
        f"the pickle asks for {shown}, which loading weights never needs; it was not run",
        file=path,
        remedy="Ask for the weights as safetensors, or save the bare state dict again from a program you trust.",
    )


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > 64 or not all(is_count(n) for n in value):
        raise ValueError("a shape or stride is not a tuple of sizes")
    return tuple(value)


def _view(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> TensorView:
    if not isinstance(storage, Storage) or not is_count(offset):
        raise TypeError("a tensor without a storage")
    size, step = _counts(shape), _counts(stride)
    if len(size) != len(step):
        raise ValueError("shape and stride differ in length")
    view = TensorView(storage, dtype or storage.dtype, offset, size, step)
    if (offset + view.extent) * view.dtype.itemsize > storage.bytes and view.extent:
        raise ValueError(f"a tensor of shape {size} reaches beyond its storage")
    # strides of zero repeat elements; a few bytes must not become terabytes when the tensor is made contiguous
    if prod(size) > max(_MAX_REPEATED, storage.bytes // view.dtype.itemsize):
        raise ValueError(f"a tensor of shape {size} repeats its storage too often")
    return view


def _tensor_v2(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorView:
    return _view(storage, offset, shape, stride)


def _tensor_v3(*args: Any) -> TensorView:
    storage, offset, shape, stride, _requires_grad, _hooks, dtype = args[:7]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor without a dtype")
    return _view(storage, offset, shape, stride, dtype)


def _parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, (TensorView, Inert)):
        raise TypeError("a parameter without a tensor")
    return data


def _from_type(function: Any, _kind: Any, args: Any, *_: Any) -> Any:
    known = CALLS.get((function.module, function.name)) if isinstance(function, Name) else None
    if known is None or known not in (_tensor_v2, _tensor_v3, _parameter):
        raise TypeError("a tensor subclass with its own rebuilding")
    return known(*args)


def _object(kind: Any, *_: Any) -> Inert:
    if not isinstance(kind, Name):
        raise TypeError("an object without a class")
    return Inert(kind)


def plain_key(value: Any) -> Any:
    """``value`` if it is a plain key. Nested tuples are refused: hashing them can take exponential time."""
    scalar = (str, bytes, int, float, type(None), Inert, Name, torch.dtype)
    if isinstance(value, scalar) or (isinstance(value, tuple) and all(isinstance(v, scalar) for v in value)):
        return value
    raise TypeError(f"a {type(value).__name__} is used as a key")


def _mapping(pairs: Any = ()) -> OrderedDict[Any, Any]:
    items = pairs.items() if isinstance(pairs, dict) else pairs
    return OrderedDict((plain_key(key), value) for key, value in items)


def _sequence(make: Callable[..., Any]) -> Callable[..., Any]:
    def build(items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple)):
            raise TypeError("a sequence made from something else")
        return make(items)

    return build


def _set(items: Any = ()) -> set[Any]:
    return {plain_key(item) for item in _sequence(list)(items)}


CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch.nn.parameter", "Buffer"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "Size"): lambda sizes=(): _counts(sizes),
    ("torch", "device"): lambda *args: None,
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): lambda *_: OrderedDict(),
    ("collections", "Counter"): lambda *_: OrderedDict(),
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): _set,
    ("builtins", "list"): _sequence(list),
    ("builtins", "tuple"): _sequence(tuple),
    ("builtins", "dict"): _mapping,
    ("builtins", "object"): lambda *_: Inert(Name("builtins", "object")),
    ("builtins", "int"): lambda *_: None,
    ("builtins", "complex"): lambda *_: None,
    ("builtins", "slice"): lambda *_: None,
    ("copyreg", "_reconstructor"): _object,
}
