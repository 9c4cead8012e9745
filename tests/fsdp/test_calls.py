"""What a step on shards costs: Python calls and collectives, counted, never timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fsdp.gpt import Gpt, text
from tests.fsdp.strategies import bench_of, case_of
from torchweld.components import Settings
from torchweld.testing import run_ranks
from torchweld.testing.strategy_session import Case, local, prepared

ADAMW = partial(AdamW, lr=1e-3)
Step = Callable[[], object]
Counted = tuple[int, list[str], dict[str, Tensor]]


class Collectives(TorchDispatchMode):
    """Notes the name of every collective operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no hints
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def calls_of(step: Step) -> int:
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def counted(step: Step, parameters: Callable[[], Any]) -> Counted:
    for _ in range(2):
        step()
    calls = calls_of(step)
    with Collectives() as collectives:
        step()
    return calls, collectives.names, {n: local(p.detach()).clone() for n, p in parameters()}


def by_hand() -> Counted:
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model: Any = Gpt()
    for block in model.h:
        fully_shard(block)
    fully_shard(model)
    if _sums():
        for module in model.modules():
            if hasattr(module, "set_all_reduce_hook"):
                module.set_all_reduce_hook(lambda gradient: gradient.div_(2))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    inputs, targets = share(torch.distributed.get_rank())

    def step() -> None:
        torch.autograd.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()

    return counted(step, model.named_parameters)


def _sums() -> bool:
    average = torch.empty(1)
    average_op = torch.distributed.ReduceOp.AVG
    torch.distributed.reduce_scatter_tensor(average, torch.ones(2), op=average_op)
    return float(average) != 1.0


def share(rank: int) -> tuple[Tensor, Tensor]:
    inputs, targets = text(8)
    return inputs[rank::2], targets[rank::2]


def through_torchweld(case: Case) -> Counted:
    with prepared(case) as session:
        forward, backward = session.prepared.forward, session.prepared.backward
        inputs, targets = share(session.env.rank)

        def step() -> None:
            backward(F.cross_entropy(forward(inputs), targets))
            session.prepared.step()

        return counted(step, session.prepared.named_parameters)


def test_a_gpt_step_makes_half_the_calls_of_fsdp2_by_hand_and_is_bitwise_equal() -> None:
    case = case_of(bench_of("fsdp", 2), Gpt, optimizer=ADAMW)
    theirs = run_ranks(by_hand, 2, timeout_seconds=180)

    ours = run_ranks(through_torchweld, 2, case, timeout_seconds=180)

    for (calls, collectives, weights), (hand, by_torch, expected) in zip(ours, theirs, strict=True):
        assert calls <= hand / 2
        assert collectives == by_torch
        assert [name for name in expected if not weights[name].equal(expected[name])] == []


def clipping(case: Case) -> tuple[int, list[str], int]:
    """Calls and collectives of clipping alone, and the number of parameters."""
    from torchweld_fsdp.stepping import ShardedGradients, make_pieces

    with prepared(case) as session:
        session.prepared.backward(session.loss(text(8)))
        pieces = make_pieces(session.model, local=False)
        assert session.env.group is not None
        gradients = ShardedGradients(pieces, session.env.group)
        calls = calls_of(partial(gradients.clip_norm, 0.5))
        with Collectives() as collectives:
            gradients.clip_norm(0.5)
        return calls, collectives.names, len(pieces)


def test_clipping_is_one_all_reduce_without_a_call_for_each_parameter() -> None:
    case = case_of(bench_of("fsdp", 2), Gpt, Settings(gradient_clip_val=0.5))

    for calls, collectives, num_parameters in run_ranks(clipping, 2, case, timeout_seconds=180):
        assert num_parameters == 40
        assert calls <= 20
        assert [name.partition(".default")[0] for name in collectives] == ["c10d.allreduce_"]
