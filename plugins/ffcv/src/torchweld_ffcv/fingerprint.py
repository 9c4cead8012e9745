"""Recognise a dataset: the same dataset and options give the same words in every process.

What is looked at, in this order of trust: the dataset's own fingerprint where it has one (as those
of Hugging Face do); path, size and time of every file of an image folder; else everything that the
dataset object holds, and the bytes of some samples, spread over it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import PurePath
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from torchweld.errors import InvalidArgument
from torchweld.guard import attempt, one_line
from torchweld.identity import identity
from torchweld_ffcv.fields import kind_data
from torchweld_ffcv.kinds import Kind
from torchweld_ffcv.sources import Source
from torchweld_ffcv.values import is_pil_image, is_tensor

_FORMAT = 1  # raised when the same dataset would be written differently
_SAMPLES = 16
_DEEPEST = 12
_DIGITS = 32


def fingerprint(
    source: Source, fields: Mapping[str, Kind] | None, *, skip_bad: bool = False
) -> str:
    """Return 32 hexadecimal digits for a dataset and how it is stored.

    Raises:
        InvalidArgument: a generator cannot be recognised the next time.
    """
    hasher = _Hasher()
    hasher.add("format", _FORMAT, source.length, skip_bad)
    hasher.add([(name, kind_data(kind)) for name, kind in (fields or {}).items()])
    if source.files:
        _add_files(hasher, source)
    else:
        hasher.add(source.dataset)
        for sample in _some_samples(source):
            hasher.add(sample)
    return hasher.digest()


def _add_files(hasher: _Hasher, source: Source) -> None:
    change = getattr(source.dataset, "target_transform", None)
    hasher.add("files", change)
    for path, target in source.files:
        found = os.stat(path)  # noqa: PTH116  # a million of them
        hasher.text(f"{path}\0{target!r}\0{found.st_size}\0{found.st_mtime_ns}\n")


def _some_samples(source: Source) -> Iterable[Any]:
    if source.read is not None:
        length = source.length or 0
        spread = np.linspace(0, length - 1, min(_SAMPLES, length)).astype(int)
        found = [attempt(source.read, int(index)) for index in spread]
        # A sample that cannot be read is one too; converting will tell.
        return [one.value if one.error is None else one_line(one.error) for one in found]
    assert source.iterate is not None  # a source either reads or iterates
    samples = source.iterate()
    if samples is source.dataset:
        raise InvalidArgument(
            f"{source.label} can be read once only, and could not be recognised the next time: "
            "give a Dataset, or write the file yourself: "
            "torchweld_ffcv.convert(samples, 'data.beton')"
        )
    return islice(samples, _SAMPLES)


class _Hasher:
    """Hashes values by what they hold; never by address, nor by the order of sets."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=_DIGITS // 2)
        self._inside: set[int] = set()

    def digest(self) -> str:
        return self._hash.hexdigest()

    def text(self, words: str) -> None:
        self._hash.update(words.encode(errors="surrogatepass"))

    def add(self, *values: Any) -> None:
        for value in values:
            self._add(value)

    def _add(self, value: Any) -> None:
        if value is None or isinstance(value, (bool, int, float, complex, str, PurePath)):
            self.text(f"{type(value).__name__}:{value!r};")
        elif isinstance(value, (bytes, bytearray, memoryview)):
            self.text(f"bytes:{len(value)};")
            self._hash.update(value)
        elif is_tensor(value) or isinstance(value, np.ndarray):
            self._add_numbers(value)
        elif is_pil_image(value):
            self.text(f"image:{value.mode}:{value.size};")
            self._hash.update(value.tobytes())
        elif id(value) in self._inside or len(self._inside) > _DEEPEST:
            self.text(f"{type(value).__qualname__}(…);")
        else:
            self._inside.add(id(value))
            self._add_whole(value)
            self._inside.discard(id(value))

    def _add_numbers(self, value: Any) -> None:
        array = value if isinstance(value, np.ndarray) else attempt(_numpy_of, value).value
        if array is None or array.dtype.hasobject:
            self.text(f"{value!r};")
            return
        self.text(f"array:{array.dtype.str}:{array.shape};")
        self._hash.update(np.ascontiguousarray(array).data.cast("B"))

    def _add_whole(self, value: Any) -> None:
        self.text(f"{type(value).__module__}.{type(value).__qualname__}(")
        # Exactly these types: an object of a class derived from one has attributes besides.
        if type(value) is dict:
            self.add(*[part for pair in value.items() for part in pair])
        elif type(value) in {list, tuple}:
            self.add(*value)
        elif type(value) in {set, frozenset}:
            self.add(*sorted(map(identity, value)))
        elif isinstance(value, CodeType):
            self.add(value.co_code, value.co_consts, value.co_names)
        elif isinstance(value, FunctionType):  # another body is another function
            self.add(value.__qualname__, value.__code__, value.__defaults__)
            self.add(*[attempt(getattr, cell, "cell_contents").value for cell in _cells(value)])
        elif isinstance(value, (type, ModuleType)):
            self.text(identity(value))
        else:
            self._add_object(value)
        self.text(")")

    def _add_object(self, value: Any) -> None:
        own = getattr(value, "_fingerprint", None)
        # What pickle would write: the state as the object's author wants it kept, without open
        # files, and the arguments of types written in C.
        reduced = attempt(value.__reduce_ex__, 4).value
        if isinstance(own, str):
            self.text(own)
        elif isinstance(reduced, tuple):
            made, given, *state = reduced
            self.text(getattr(made, "__qualname__", ""))
            self.add(given, *[list(one) if isinstance(one, Iterator) else one for one in state])
        else:
            self.add(getattr(value, "__dict__", None) or identity(value))


def _cells(function: FunctionType) -> tuple[Any, ...]:
    return function.__closure__ or ()


def _numpy_of(tensor: Any) -> Any:
    return tensor.detach().cpu().numpy()
