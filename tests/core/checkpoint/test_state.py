"""State comes back as it was given, or is refused by name."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, lr_scheduler

from torchweld.checkpoint import decode, encode
from torchweld.errors import CheckpointError

VALUES = [
    None,
    True,
    7,
    -(2**80),
    10**5000,
    0.1,
    math.inf,
    -math.inf,
    complex(1.5, -math.inf),
    "two words \ud800",
    b"\x00\xff",
    [1, [2, "a"]],
    (0.9, 0.999),
    {1, 2},
    frozenset({"a"}),
    {"a": {"b": [None]}},
    {1: "a", "1": "b", 2.5: "c", None: "d", (1, 2): "e"},
    {"$": "tuple", "value": [1]},
    OrderedDict([("b", 1), ("a", 2)]),
    Counter({30: 1, 80: 2}),
    defaultdict(list, {"a": [1]}),
    torch.Size([2, 3]),
    torch.bfloat16,
    torch.device("cuda", 1),
    Path("a/b"),
    np.float32(0.1),
    np.int64(3),
    np.bool_(True),
]

TENSORS = [
    torch.randn(2, 3),
    torch.tensor(3),
    torch.randn(4).to(torch.bfloat16),
    torch.zeros(0, 3),
    torch.tensor([True, False]),
    torch.randn(2, dtype=torch.complex128),
    torch.randn(4, 4).to(torch.float8_e4m3fn),
    torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last),
]

FACTORIES: dict[str, Callable[[SGD], Any]] = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=3),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[3, 7, 7, 9]),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "ConstantLR": partial(lr_scheduler.ConstantLR, total_iters=7),
    "LinearLR": partial(lr_scheduler.LinearLR, total_iters=9),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=9),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=4),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=1.0, step_size_up=4),
    "CyclicLR exp_range": partial(
        lr_scheduler.CyclicLR, base_lr=0.1, max_lr=1.0, step_size_up=4, mode="exp_range", gamma=0.9
    ),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=20),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.MultiStepLR(optimizer, [2, 5])],
        milestones=[4],
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.MultiStepLR(optimizer, [6])]
    ),
}


def through_json(value: object) -> Any:
    encoded, tensors = encode(value, "component/x")
    return decode(json.loads(json.dumps(encoded, allow_nan=False)), tensors)


def make_schedule(make: Callable[[SGD], Any]) -> tuple[SGD, Any]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
    return optimizer, make(optimizer)


def run_schedule(optimizer: SGD, schedule: Any, steps: int) -> list[float]:
    rates = []
    for step in range(steps):
        optimizer.step()
        plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
        schedule.step(1.0 + 0.1 * step) if plateau else schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_state_returns_values_with_their_types(value: object) -> None:
    found = through_json(value)

    assert found == value
    assert type(found) is type(value)


def test_state_keeps_nan_and_the_sign_of_zero() -> None:
    nan, zero = through_json([math.nan, -0.0])

    assert math.isnan(nan)
    assert math.copysign(1, zero) == -1


def test_state_keeps_the_factory_of_a_defaultdict() -> None:
    found = through_json(defaultdict(int, {"a": 1}))

    assert found["new"] == 0


def test_state_keeps_the_order_of_a_dict() -> None:
    assert list(through_json({"b": 1, "a": 2})) == ["b", "a"]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: str(tensor.dtype))
def test_state_returns_tensors_bitwise(tensor: torch.Tensor) -> None:
    found = through_json({"a": [tensor]})["a"][0]

    assert found.dtype == tensor.dtype
    assert found.tolist() == tensor.tolist()


@pytest.mark.parametrize("dtype", ["bool", "uint32", "float16", ">f8", "complex64"])
def test_state_returns_numpy_arrays_with_their_dtype(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).T.astype(dtype)

    found = through_json(array)

    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


def test_state_takes_an_array_that_must_not_be_written() -> None:
    array = np.arange(3)
    array.flags.writeable = False

    assert np.array_equal(through_json(array), array)


def test_state_gives_tensors_keys_of_their_place() -> None:
    shared = torch.zeros(2)

    _, tensors = encode({"ema": {"0.weight": shared}, "ema/0.weight": shared}, "component/x")

    assert list(tensors) == ["component/x/ema/0.weight", "component/x/ema/0.weight~"]


def test_state_returns_both_of_two_aliased_tensors() -> None:
    tensor = torch.randn(3)

    first, second = through_json([tensor, tensor])

    assert torch.equal(first, tensor)
    assert torch.equal(second, tensor)


def test_numpy_and_python_random_states_come_back() -> None:
    generator = np.random.default_rng(3)
    state = through_json(generator.bit_generator.state)
    expected = generator.random(4)

    generator.bit_generator.state = state

    assert np.array_equal(generator.random(4), expected)


def test_numpy_global_state_comes_back() -> None:
    state = through_json(np.random.get_state())
    expected = np.random.random(4)

    np.random.set_state(state)

    assert np.array_equal(np.random.random(4), expected)


# torch's own SequentialLR calls step(0).
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("name", FACTORIES)
def test_schedule_continues_exactly_through_json(name: str) -> None:
    optimizer, schedule = make_schedule(FACTORIES[name])
    run_schedule(optimizer, schedule, 5)
    saved = through_json({"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()})
    expected = run_schedule(optimizer, schedule, 10)

    resumed, again = make_schedule(FACTORIES[name])
    again.load_state_dict(saved["schedule"])
    resumed.load_state_dict(saved["optimizer"])

    assert run_schedule(resumed, again, 10) == expected


def test_every_schedule_of_torch_is_tried() -> None:
    classes = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler)
    }

    assert classes - {"LRScheduler", "_LRScheduler", "SWALR"} <= {n.split()[0] for n in FACTORIES}


class Custom:
    """Something that only pickle could save."""


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Custom(), "Custom"),
        (lambda: 0, "function"),
        (deque([1]), "collections.deque"),
        (np.array(["a"]), "<U1"),
        (np.longdouble(1), "numpy value of dtype"),
        (torch.zeros(2).to_sparse(), "sparse_coo"),
        (torch.zeros(2, device="meta"), "meta"),
        (defaultdict(lambda: 0), "defaultdict of <function"),
        ({torch.float32: 1}, "key of type torch.dtype"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_state_names_what_has_no_form_without_pickle(value: object, what: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        encode({"a": [1, value]}, "component/lookahead")

    message = str(raised.value)
    assert "'component/lookahead'" in message
    assert "state['a'][1]" in message
    assert what in message


def test_state_refuses_a_list_that_contains_itself() -> None:
    loop: list[object] = []
    loop.append(loop)

    with pytest.raises(CheckpointError, match="contains itself"):
        encode(loop, "component/x")


def test_state_refuses_an_unknown_tag() -> None:
    with pytest.raises(CheckpointError, match=r"'os\.system'"):
        decode({"$": "os.system", "value": "true"}, {})


def test_state_names_a_tensor_that_is_missing() -> None:
    encoded, _ = encode({"ema": torch.zeros(1)}, "component/x")

    with pytest.raises(CheckpointError, match="component/x/ema"):
        decode(encoded, {})
