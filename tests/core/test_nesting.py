"""Tensors inside whatever a batch is."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from torchweld.nesting import cast_floats, map_tensors, num_samples, shapes, tensors


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Sample:
    image: Tensor
    label: int = 3


def double(tensor: Tensor) -> Tensor:
    return tensor * 2


ONE = torch.ones(2)

NESTED: list[Any] = [
    ONE,
    (ONE, [ONE, {"a": ONE}]),
    Point(ONE, "name"),
    UserDict(a=ONE, b=UserDict(c=ONE)),
    OrderedDict(b=ONE, a=ONE),
    defaultdict(list, a=[ONE]),
    Sample(ONE),
]


@pytest.mark.parametrize("value", NESTED, ids=lambda value: type(value).__name__)
def test_every_tensor_is_mapped_and_every_container_copied(value: Any) -> None:
    mapped = map_tensors(value, double)

    assert type(mapped) is type(value)
    assert [t.tolist() for t in tensors(mapped)] == [[2.0, 2.0]] * len(list(tensors(value)))
    assert all(torch.equal(t, ONE) for t in tensors(value))


def test_what_is_no_tensor_is_the_same_object() -> None:
    thing = object()

    assert map_tensors((thing, "text", 3, None), double) == (thing, "text", 3, None)


def test_a_mapping_that_cannot_be_changed_becomes_a_dict() -> None:
    mapped = map_tensors(MappingProxyType({"a": ONE}), double)

    assert type(mapped) is dict
    assert torch.equal(mapped["a"], 2 * ONE)


def test_only_floats_are_cast() -> None:
    value = {"x": torch.ones(2), "y": torch.ones(2, dtype=torch.int64), "z": torch.ones(2) > 0}

    cast = cast_floats(value, torch.bfloat16)

    assert [t.dtype for t in tensors(cast)] == [torch.bfloat16, torch.int64, torch.bool]


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((torch.ones(3, 2), torch.ones(3)), 3),
        ({"weight": torch.tensor(1.0), "x": torch.ones(5, 2)}, 5),
        (UserDict(x=torch.ones(4)), 4),
        ((["a", "b"], [1, 2]), 2),
        (torch.ones(7, 1), 7),
        (Sample(torch.ones(6)), 6),
    ],
)
def test_samples_are_counted_by_the_leading_dimension(batch: Any, count: int) -> None:
    assert num_samples(batch) == count


def test_shapes_are_said_for_a_message() -> None:
    batch = (torch.ones(8, 3), {"labels": torch.ones(8, dtype=torch.int64)})

    assert shapes(batch) == "(8, 3) float32, (8,) int64"
    assert shapes("text") == "str"
