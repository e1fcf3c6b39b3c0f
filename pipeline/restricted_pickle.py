"""Reads pickles of NumPy arrays and old pandas frames without running anything that the file asks for.

A pickle is a program: it names callables and has them called. Two things keep it harmless here. A name that is not on
the list is refused. And what a listed name stands for is not NumPy's or pandas' own constructor but a stand-in of this
module, which only records its arguments; arrays are built afterwards, from checked shapes, types and bytes. That
matters: NumPy's own `dtype.__setstate__` takes its flags from the file, and an object array whose flags say "no
objects" has its bytes taken for pointers. It also makes the reading independent of the installed pandas.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from echoshift.pipeline.errors import ManifestError, UnsafePickleError

_PLAIN_KINDS = "biufcSUO"
_DAMAGE = (
    pickle.UnpicklingError, EOFError, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError,
    RecursionError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PickledFrame:
    """What a pickled pandas frame holds: its columns by name, each an array of `n_rows` values."""

    columns: dict[str, npt.NDArray[Any]]
    n_rows: int


class _Callable:
    """A stand-in for a function: may be called, but can't be given state or attributes by the pickle."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TypeError("a constructor takes no attributes")

    def __setstate__(self, state: object) -> NoReturn:
        raise TypeError("a constructor takes no state")


class _Sealed(type):
    """Makes a class whose attributes a pickle can't set."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError("a constructor takes no attributes")


class _DType:
    """A stand-in for numpy.dtype(code, align, copy); the state gives the byte order, anything more is refused."""

    def __init__(self, code: object) -> None:
        plain = np.dtype(code) if isinstance(code, str) else None
        if plain is None or plain.kind not in _PLAIN_KINDS or plain.fields is not None or plain.subdtype is not None:
            raise ValueError(f"array type {code!r} is not a plain one")
        self.value: np.dtype[Any] = plain

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 8 and state[2:5] == (None, None, None)):
            raise ValueError("an array type with fields, sub-arrays or metadata")
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise ValueError(f"unknown byte order {order!r}")
        if order in ("<", ">"):
            self.value = self.value.newbyteorder(order)


class _Array(metaclass=_Sealed):
    """A stand-in for numpy.ndarray: made empty, filled by its state (version, shape, dtype, fortran, data)."""

    def __init__(self) -> None:
        self.value: npt.NDArray[Any] | None = None

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise ValueError("an array whose state is not (version, shape, dtype, order, data)")
        self.value = _build_array(state[4], state[2], state[1], "F" if state[3] is True else "C")


class _BlockManager(metaclass=_Sealed):
    """A stand-in for pandas' BlockManager; keeps the axes and blocks that its state gives."""

    axes: list[Any]
    blocks: list[Any]

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 4 and isinstance(state[3], dict)):
            raise ValueError("a pandas frame of another age than 0.14 to 1.2")
        content = state[3]["0.14.1"]
        object.__setattr__(self, "axes", list(content["axes"]))
        object.__setattr__(self, "blocks", list(content["blocks"]))


class _Frame(metaclass=_Sealed):
    """A stand-in for pandas.DataFrame; keeps the block manager that its state gives."""

    manager: _BlockManager

    def __setstate__(self, state: object) -> None:
        manager = (state.get("_data") or state.get("_mgr")) if isinstance(state, dict) else None
        if not isinstance(manager, _BlockManager):
            raise TypeError("a pandas frame without its blocks")
        object.__setattr__(self, "manager", manager)


class _Index(metaclass=_Sealed):
    """A stand-in for pandas.Index."""

    def __init__(self, data: object) -> None:
        self.data = data


class _RangeIndex(_Index):
    """A stand-in for pandas.RangeIndex."""


def _make_dtype(code: object, _align: object = False, _copy: object = False) -> _DType:
    return _DType(code)


def _make_array(kind: object, shape: object, _code: object) -> _Array:
    if kind is not _Array or shape != (0,):
        raise ValueError("an array that is not made empty")
    return _Array()


def _make_array_from_buffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.value = _build_array(data, dtype, shape, "F" if order == "F" else "C")
    return array


def _make_scalar(dtype: object, data: object) -> Any:
    return _build_array(data, dtype, (), "C")[()]


def _make_index(kind: object, content: object) -> _Index:
    if not isinstance(content, dict):
        raise TypeError("an index without content")
    if kind is _RangeIndex:
        return _RangeIndex(range(content["start"], content["stop"], content["step"]))
    if kind is not _Index:
        raise ValueError("an index of an unknown kind")
    return _Index(content["data"])


def _build_array(data: object, dtype: object, shape: object, order: Any) -> npt.NDArray[Any]:
    if not isinstance(dtype, _DType):
        raise TypeError("an array without a plain type")
    if not (isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)):
        raise ValueError(f"impossible array shape {shape!r}")
    n_values = math.prod(shape)
    if dtype.value.kind == "O":
        if not (isinstance(data, list) and len(data) == n_values):
            raise ValueError(f"an object array of {n_values} values whose data are something else")
        flat = np.empty(n_values, dtype=object)
        for i, value in enumerate(data):
            flat[i] = value
        return flat.reshape(shape, order=order)
    if not isinstance(data, bytes | bytearray) or len(data) != n_values * dtype.value.itemsize:
        raise ValueError(f"an array of shape {shape} and type {dtype.value} with too few or too many bytes")
    return np.frombuffer(data, dtype=dtype.value).reshape(shape, order=order).copy()


def _pair_modules(names: Mapping[str, object], *modules: str) -> dict[tuple[str, str], object]:
    return {(module, name): stand_in for module in modules for name, stand_in in names.items()}


# NumPy 2 renamed numpy.core to numpy._core; files name whichever wrote them.
NUMPY_CONSTRUCTORS: Mapping[tuple[str, str], object] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Callable(_make_dtype),
    **_pair_modules(
        {"_reconstruct": _Callable(_make_array), "scalar": _Callable(_make_scalar)},
        "numpy.core.multiarray", "numpy._core.multiarray",
    ),
    **_pair_modules({"_frombuffer": _Callable(_make_array_from_buffer)}, "numpy.core.numeric", "numpy._core.numeric"),
}  # fmt: skip
PANDAS_CONSTRUCTORS: Mapping[tuple[str, str], object] = {
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas.core.internals.managers", "BlockManager"): _BlockManager,
    ("pandas.core.indexes.base", "_new_Index"): _Callable(_make_index),
    ("pandas.core.indexes.base", "Index"): _Index,
    ("pandas.core.indexes.range", "RangeIndex"): _RangeIndex,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path, allowed: Mapping[tuple[str, str], object]) -> None:
        super().__init__(file)
        self._path = path
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise UnsafePickleError(
                f"{self._path} asks for {module}.{name}, which such a file doesn't need: it was not read; "
                "get the file again from its official source"
            )
        return self._allowed[module, name]


def read_restricted_pickle(path: Path, allowed: Mapping[tuple[str, str], object] = NUMPY_CONSTRUCTORS) -> Any:
    """Read a pickle of plain Python data, NumPy arrays and, with PANDAS_CONSTRUCTORS allowed too, pandas frames.

    `allowed` maps (module, name) to the stand-ins of this module; pass NUMPY_CONSTRUCTORS, or that joined with
    PANDAS_CONSTRUCTORS. Lists, tuples and dicts come back as such, arrays as fresh writable np.ndarray, a frame as
    PickledFrame. Raises UnsafePickleError naming module.name and the file for anything else that the pickle asks for,
    and ManifestError if the file is damaged or no pickle.
    """
    try:
        with path.open("rb") as file:
            return _resolve(_RestrictedUnpickler(file, path, allowed).load(), {}, ())
    except FileNotFoundError as error:
        raise ManifestError(f"no file {path}") from error
    except _DAMAGE as error:
        raise ManifestError(f"{path} is damaged or no pickle of arrays: {error}; get the file again") from error


def _resolve(value: Any, done: dict[int, Any], inside: tuple[int, ...]) -> Any:
    """Put arrays and frames in the place of their stand-ins; `done` keeps what is shared, shared."""
    if not isinstance(value, list | tuple | dict | np.ndarray | _Array | _Frame):
        if isinstance(value, _DType | _BlockManager | _Index | _Callable | type):
            raise TypeError("a piece of an array or frame that belongs to none")
        return value
    key = id(value)
    if key in inside:
        raise ValueError("data that contain themselves")
    if key not in done:
        # The stand-in is kept beside the result, so that its id isn't given to another object meanwhile.
        done[key] = (value, _resolve_container(value, done, (*inside, key)))
    return done[key][1]


def _resolve_container(value: Any, done: dict[int, Any], inside: tuple[int, ...]) -> Any:
    if isinstance(value, list):
        return [_resolve(v, done, inside) for v in value]
    if isinstance(value, tuple):
        return tuple(_resolve(v, done, inside) for v in value)
    if isinstance(value, dict):
        return {_resolve(k, done, inside): _resolve(v, done, inside) for k, v in value.items()}
    if isinstance(value, _Frame):
        return _build_frame(value.manager, done, inside)
    array = value.value if isinstance(value, _Array) else value
    if array is None:
        raise ValueError("an array without content")
    if array.dtype.kind == "O":
        for i, item in enumerate(array.flat):
            array.flat[i] = _resolve(item, done, inside)
    return array


def _build_frame(manager: _BlockManager, done: dict[int, Any], inside: tuple[int, ...]) -> PickledFrame:
    names, index = (axis.data for axis in manager.axes)
    names = [str(name) for name in _resolve(names, done, inside)]
    n_rows = len(index if isinstance(index, range) else _resolve(index, done, inside))
    columns: dict[str, npt.NDArray[Any]] = {}
    for block in manager.blocks:
        values = _resolve(block["values"], done, inside)
        for place, row in zip(_resolve(block["mgr_locs"], done, inside), values, strict=True):
            if len(row) != n_rows:
                raise ValueError(f"column {names[place]} has {len(row)} of {n_rows} values")
            columns[names[place]] = row
    if sorted(columns) != sorted(names):
        raise ValueError("blocks and column names that don't belong together")
    return PickledFrame({name: columns[name] for name in names}, n_rows)
