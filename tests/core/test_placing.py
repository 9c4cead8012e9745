"""What a batch goes through before the model, as one function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from torchweld.loop.placing import bind_transform
from torchweld.nesting import move

META, CPU = torch.device("meta"), torch.device("cpu")  # "meta" is another device on any machine


def double(inputs: Tensor) -> Tensor:
    return inputs * 2


def swapped(batch: Any) -> Any:
    return batch[1], batch[0]


def counted(function: Callable[[Any], Any], batch: Any) -> int:
    calls = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        function(batch)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("container", [tuple, list])
def test_a_pair_is_moved_in_two_calls_and_keeps_its_container(container: Any) -> None:
    batch = container([torch.ones(2, 3), torch.ones(2)])
    transform = bind_transform(META, False, ())
    assert transform is not None

    moved = transform(batch)

    assert type(moved) is container
    assert [item.device for item in moved] == [META, META]
    assert counted(transform, batch) == 2


@pytest.mark.parametrize(
    "batch",
    [
        {"inputs": torch.ones(2), "name": "one"},
        [torch.ones(2), "label"],
        (torch.ones(2), torch.ones(2), torch.ones(2)),
        [torch.ones(2), [torch.ones(2), torch.ones(2)]],
    ],
)
def test_anything_else_is_moved_as_well(batch: Any) -> None:
    moved = move(batch, META)

    assert type(moved) is type(batch)
    assert str(moved).count("device='meta'") == str(batch).count("tensor(")


def test_inputs_change_before_batches_do() -> None:
    transform = bind_transform(CPU, False, (double,), (swapped,))
    assert transform is not None

    targets, inputs = transform([torch.ones(2), torch.zeros(2)])

    assert inputs.tolist() == [2, 2]
    assert targets.tolist() == [0, 0]


def test_a_transform_alone_is_called_directly() -> None:
    assert bind_transform(CPU, False, (), (swapped,)) is swapped
    assert bind_transform(META, True, (), (swapped,)) is swapped
    assert bind_transform(CPU, False, ()) is None
