"""State of schedulers, loaders, callbacks and plugins as JSON beside tensors, without pickle.

JSON alone turns integer keys into strings and tuples into lists, after which most of torch's
schedulers resume wrongly without a word. What JSON cannot say is written as a tagged object::

    {"$": "tuple", "value": [0.9, 0.999]}
    {"$": "Counter", "value": [[30, 1], [80, 1]]}
    {"$": "tensor", "value": "component/ema/shadow"}      the key of a tensor stored beside it
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchweld.errors import CheckpointError

TAG = "$"
_Path = tuple[object, ...]
# The only factories of a defaultdict that come back; any other is code, which is never stored.
_FACTORIES = {"None": None, "int": int, "float": float, "list": list, "dict": dict, "set": set}
_EXACT_JSON_INT = 2**63
_NUMPY_NAMES = """bool int8 int16 int32 int64 uint8 uint16 uint32 uint64
float16 float32 float64 complex64 complex128"""
_NUMPY_DTYPES = {np.dtype(name) for name in _NUMPY_NAMES.split()}
_KEYS = (type(None), bool, int, float, str, tuple)


def encode(value: object, where: str) -> tuple[Any, dict[str, Tensor]]:
    """Split a state into JSON and tensors; cheap enough to check a component before step 1.

    Args:
        value: nested None, bool, int, float, str, bytes, complex, list, tuple, set, frozenset,
            dict, OrderedDict, Counter, defaultdict, Path, torch.Size, torch.dtype, torch.device,
            tensors, numpy arrays and scalars.
        where: the component, e.g. ``"component/ema"``; starts the tensors' keys and the message.

    Returns:
        What ``json.dumps`` takes, and the tensors by key. They alias the state: nothing is copied.

    Raises:
        CheckpointError: something has no form without pickle; names ``where``, path and type.
    """
    encoder = _Encoder(where)
    return encoder.encode(value, ()), encoder.tensors


def decode(encoded: object, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild what :func:`encode` was given; tensors come as they are in ``tensors``.

    Raises:
        CheckpointError: a tag is unknown or a tensor is missing.
    """
    return decode_with(encoded, lambda key: _lookup(tensors, key))


def decode_with(encoded: object, tensor: Callable[[str], Tensor]) -> Any:
    """Rebuild a state as :func:`decode` does, asking for tensors one by one."""
    if isinstance(encoded, list):
        return [decode_with(item, tensor) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if TAG not in encoded:
        return {key: decode_with(item, tensor) for key, item in encoded.items()}
    tag = encoded[TAG]
    if tag == "tensor":
        return tensor(encoded["value"])
    if tag == "ndarray":
        return tensor(encoded["value"]).numpy().astype(encoded["dtype"], copy=False)
    if tag not in _DECODERS:
        raise CheckpointError(f"a saved state has a part of the unknown kind {tag!r}")
    arguments = {
        key: decode_with(item, tensor) for key, item in encoded.items() if key not in (TAG, "value")
    }
    return _DECODERS[tag](decode_with(encoded["value"], tensor), **arguments)


def _lookup(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"a saved state needs the tensor {key!r}, which is not there")
    return tensors[key]


class _Encoder:
    """Walks one state; knows where it is, so that an error can say so."""

    def __init__(self, where: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._where = where
        self._open: set[int] = set()

    def encode(self, value: object, path: _Path) -> Any:
        """Return the JSON form of ``value``, which stands at ``path``."""
        if isinstance(value, Tensor):
            return {TAG: "tensor", "value": self._keep(value, path)}
        if isinstance(value, (np.ndarray, np.generic)):
            return self._numpy(value, path)
        if type(value) in _SCALARS:
            return _SCALARS[type(value)](value)
        if type(value) in (list, tuple, torch.Size, set, frozenset):
            return self._sequence(value, path)  # type: ignore[arg-type]  # just checked
        if type(value) in (dict, OrderedDict, Counter, defaultdict):
            return self._mapping(value, path)  # type: ignore[arg-type]  # just checked
        if isinstance(value, Path):
            return _tagged("Path", str(value))
        raise self._error(path, f"a {_type_name(value)}")

    def _sequence(self, value: Iterable[object], path: _Path) -> Any:
        with self._inside(value, path):
            items = [self.encode(item, (*path, i)) for i, item in enumerate(value)]
        if type(value) is list:
            return items
        if isinstance(value, (set, frozenset)):
            items.sort(key=repr)  # the same bytes for the same state
        return _tagged(type(value).__name__, items)

    def _mapping(self, value: Mapping[Any, object], path: _Path) -> Any:
        with self._inside(value, path):
            if type(value) is dict and TAG not in value and all(type(k) is str for k in value):
                return {key: self.encode(item, (*path, key)) for key, item in value.items()}
            items = [[self._key(k, path), self.encode(v, (*path, k))] for k, v in value.items()]
        tagged = _tagged(type(value).__name__, items)
        if isinstance(value, defaultdict):
            tagged["factory"] = self._factory(value, path)
        return tagged

    def _key(self, key: object, path: _Path) -> Any:
        if type(key) not in _KEYS:
            raise self._error(path, f"a key of type {_type_name(key)}")
        return self.encode(key, (*path, key))

    def _factory(self, value: defaultdict[Any, Any], path: _Path) -> str:
        for name, factory in _FACTORIES.items():
            if value.default_factory is factory:
                return name
        raise self._error(path, f"a defaultdict of {value.default_factory!r}")

    def _numpy(self, value: np.ndarray[Any, Any] | np.generic, path: _Path) -> Any:
        native = value.dtype.newbyteorder("=")
        if native not in _NUMPY_DTYPES:
            raise self._error(path, f"a numpy value of dtype {value.dtype}")
        if isinstance(value, np.generic):
            return _tagged("numpy", self.encode(value.item(), path), dtype=native.name)
        # torch warns about memory that it must not write to, although nobody will.
        array = value.astype(native, order="C", copy=not value.flags.writeable)
        key = self._keep(torch.from_numpy(array), path)
        return _tagged("ndarray", key, dtype=value.dtype.str)

    def _keep(self, tensor: Tensor, path: _Path) -> str:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise self._error(path, f"a {_type_name(tensor)} with layout {tensor.layout}")
        if tensor.is_meta or tensor.is_quantized:
            raise self._error(path, "a meta or quantized tensor")
        key = "/".join([self._where, *map(str, path)])
        while key in self.tensors:
            key += "~"
        self.tensors[key] = tensor.detach()
        return key

    @contextmanager
    def _inside(self, value: object, path: _Path) -> Iterator[None]:
        if id(value) in self._open:
            raise self._error(path, f"a {_type_name(value)} that contains itself")
        self._open.add(id(value))
        yield
        self._open.remove(id(value))

    def _error(self, path: _Path, what: str) -> CheckpointError:
        return CheckpointError(
            f"the state of {self._where!r} cannot be saved: {_place(path)} is {what}, which has "
            "no form without pickle; let its state_dict return numbers, strings, lists, dicts and "
            "tensors"
        )


def _place(path: _Path) -> str:
    return "state" + "".join(f"[{key!r}]" for key in path)


def _tagged(tag: str, value: Any, **more: Any) -> dict[str, Any]:
    return {TAG: tag, "value": value, **more}


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _encode_int(value: Any) -> Any:
    # Python refuses to print integers of more than 4300 digits in base 10.
    return value if abs(value) < _EXACT_JSON_INT else _tagged("int", hex(value))


def _encode_float(value: Any) -> Any:
    return value if math.isfinite(value) else _tagged("float", repr(value))


def _encode_complex(value: Any) -> Any:
    return _tagged("complex", [_encode_float(value.real), _encode_float(value.imag)])


def _same(value: Any) -> Any:
    return value


_SCALARS: dict[type, Callable[[Any], Any]] = {
    type(None): _same,
    bool: _same,
    str: _same,
    int: _encode_int,
    float: _encode_float,
    complex: _encode_complex,
    bytes: lambda value: _tagged("bytes", value.hex()),
    torch.dtype: lambda value: _tagged("dtype", dtype_name(value)),
    torch.device: lambda value: _tagged("device", str(value)),
}


def _decode_numpy(value: Any, dtype: str) -> Any:
    return np.dtype(dtype).type(value)


def _decode_defaultdict(value: Any, factory: str) -> Any:
    return defaultdict(_FACTORIES[factory], value)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_from(name: str) -> torch.dtype:
    """Return the dtype of that name.

    Raises:
        CheckpointError: this torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"the checkpoint has values of dtype {name!r}, unknown to this torch")
    return dtype


_DECODERS: dict[str, Callable[..., Any]] = {
    "int": partial(int, base=16),
    "float": float,
    "complex": lambda value: complex(*value),
    "bytes": bytes.fromhex,
    "numpy": _decode_numpy,
    "tuple": tuple,
    "Size": torch.Size,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda items: Counter(dict(items)),
    "defaultdict": _decode_defaultdict,
    "Path": Path,
    "dtype": dtype_from,
    "device": torch.device,
}
