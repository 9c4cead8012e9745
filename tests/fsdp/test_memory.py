"""Bytes a rank: predicted by the strategy, found after steps, and at the peak of one."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fsdp.gpt import CONTEXT, text, wide_gpt
from tests.fsdp.strategies import bench_of, case_of
from torchweld import Trainer
from torchweld.components import Settings
from torchweld.interfaces import ParameterShape
from torchweld.testing import run_ranks
from torchweld.testing.models import mlp
from torchweld.testing.strategy_session import Case, prepared

ADAMW = partial(AdamW, lr=1e-3)
MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made by torch operations hold at once, besides ``roots``."""

    def __init__(self, roots: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no hints
        self._storages: dict[int, Any] = {}
        self.add(*roots)
        self.base = self.peak = self.now()

    def add(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            plain = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            storage = plain.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)

    def now(self) -> int:
        live = [(key, reference()) for key, reference in self._storages.items()]
        self._storages = {key: weakref.ref(s) for key, s in live if s is not None}
        return sum(storage.nbytes() for _, storage in live if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # the operations on local tensors within are seen
        out = func(*args, **(kwargs or {}))
        self.add(*(t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)))
        self.peak = max(self.peak, self.now())
        return out


def found(case: Case) -> tuple[dict[str, int], float]:
    """Bytes after two steps, and the peak of a third above the parameters, in MiB."""
    with prepared(case) as session:
        inputs, targets = text(2, vocabulary=2048)
        if isinstance(session.model, nn.Sequential):
            inputs, targets = torch.randn(2, 33), torch.zeros(2, dtype=torch.int64)

        def step() -> None:
            loss = F.cross_entropy(session.prepared.forward(inputs), targets)
            session.prepared.backward(loss)

        for _ in range(2):
            step()
            session.prepared.step()
        live = LiveBytes([p.detach() for _, p in session.prepared.named_parameters()])
        with live:
            step()
        return dict(session.prepared.bytes_per_rank()), (live.peak - live.base) / MIB


def predicted(case: Case, world_size: int) -> dict[str, int]:
    named = case.make_model().named_parameters()
    shapes = {n: ParameterShape(tuple(p.shape), p.dtype, p.requires_grad) for n, p in named}
    strategy = case.chosen.make()
    estimate: dict[str, int] = strategy.estimate(shapes, 2, world_size, Settings())
    return estimate


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("make_model", [wide_gpt, mlp], ids=["gpt", "odd mlp"])
def test_bytes_a_rank_are_those_predicted(make_model: Any, world_size: int) -> None:
    bench = bench_of("fsdp", world_size)
    case = case_of(bench, make_model, optimizer=ADAMW)
    expected = predicted(case, world_size)

    for bytes_here, _ in run_ranks(found, world_size, case, timeout_seconds=180):
        for kind in ("parameters", "gradients"):
            assert bytes_here[kind] == expected[kind]
        # The optimizer's tensors are not padded, and it keeps one step count a parameter.
        assert bytes_here["optimizer"] <= expected["optimizer"] * 1.01 + 1000
    total = 16 * sum(p.numel() for p in make_model().parameters()) / world_size
    assert total <= sum(expected.values()) <= total * (1.01 if make_model is wide_gpt else 1.08)


def test_the_plan_names_units_and_bytes() -> None:
    from torchweld.cli.building import estimate_memory

    plan = Trainer(strategy="fsdp", barebones=True).plan

    memory = estimate_memory(plan, model="tests.fsdp.gpt:Gpt", optimizer="adamw", world_size=2)

    assert memory.units == "3 Block (92 % of the parameters, largest 31 %)"
    assert memory.sum_bytes == pytest.approx(16 * memory.num_parameters / 2, rel=0.01)


def test_the_peak_of_a_step_stays_below_the_whole_model() -> None:
    case = case_of(bench_of("fsdp", 2), wide_gpt, optimizer=ADAMW)
    whole = case_of(bench_of("ddp", 2), wide_gpt, optimizer=ADAMW)

    (_, sharded), _ = run_ranks(found, 2, case, timeout_seconds=180)
    (_, replicated), _ = run_ranks(found, 2, whole, timeout_seconds=180)

    assert CONTEXT == 16  # the activations that the limit below leaves room for
    assert sharded <= 24.5
    assert sharded < replicated
