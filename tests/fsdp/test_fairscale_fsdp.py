"""FairScale's FSDP: refused without CUDA; its code here held to the contract over gloo.

FairScale looks up CUDA streams, so on a CPU they are replaced by nothing at all. All else is real:
its sharding, its gathering, several processes. What that cannot show is what CUDA adds: overlap
and its races, which the tests marked ``gpu`` are for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.fsdp.fairscale_runs import (
    Blocks,
    Training,
    by_hand,
    compiled,
    difference,
    make_session,
    recomputing,
    shapes_of,
    through_torchweld,
    train,
)
from torchweld import Trainer
from torchweld.builtin import DDP
from torchweld.components import Component, Settings
from torchweld.interfaces import Prepared, SetupRequest
from torchweld.testing import RanksFailed, StrategyConformance, models, run_ranks
from torchweld.testing.registry import empty_registry
from torchweld.testing.states import Kept, assemble, weights
from torchweld_fsdp.fairscale import fully_sharded, imports
from torchweld_fsdp.fairscale.components import (
    FAIRSCALE_FSDP,
    fairscale_fsdp_claims,
)
from torchweld_fsdp.fairscale.fully_sharded import FairscaleFsdpStrategy, prepare_sharded
from torchweld_fsdp.fairscale.imports import fairscale_module

on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with CUDA the real streams are there, see the gpu tests"
)


class NoStream:
    """Stands where a CUDA stream would; work on a CPU is done when it returns."""

    def wait_stream(self, _other: Any) -> None:
        return


STREAM = NoStream()


def replace_streams() -> None:
    """In this process alone, which the pool of ranks keeps; nothing else in it uses CUDA."""
    wrapper = fairscale_module("fairscale.nn.data_parallel").FullyShardedDataParallel
    if hasattr(wrapper, "without_streams"):
        return
    original = wrapper._setup_streams

    def setup_streams(self: Any) -> None:
        if not self._streams and self._is_root:
            original(self)
            for name in ("fp32_to_fp16", "all_gather", "post_backward"):
                self._streams[name] = STREAM

    wrapper._setup_streams, wrapper.without_streams = setup_streams, True
    cuda: Any = torch.cuda
    cuda.stream, cuda.current_stream = nullcontext, lambda: STREAM
    tensors: Any = torch.Tensor
    tensors.record_stream = lambda _self, _stream: None
    collectives: Any = dist
    scatter = collectives._reduce_scatter_base

    def flat_scatter(output: torch.Tensor, inputs: torch.Tensor, group: Any) -> Any:
        # Gloo wants the shapes to fit, NCCL the sizes only.
        return scatter(output, inputs.flatten(), group=group)

    collectives._reduce_scatter_base = flat_scatter


class StreamlessStrategy(FairscaleFsdpStrategy):
    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        replace_streams()
        return prepare_sharded(model, request)


def claims(options: None, settings: Any) -> Any:
    return replace(fairscale_fsdp_claims(options, settings), requires=())


STREAMLESS = Component(
    name="streamless", summary="without CUDA", build=StreamlessStrategy, claims=claims
)


@on_cpu
class TestStreamless(StrategyConformance):
    component = STREAMLESS
    world_sizes = (2,)


def partly_frozen() -> nn.Module:
    model = Blocks()
    model.get_submodule("blocks.0.inner").requires_grad_(False)
    model.get_submodule("blocks.1.outer").requires_grad_(False)
    return model


def double_buffer() -> nn.Module:
    model = nn.Sequential(nn.Linear(models.NUM_FEATURES, 7), nn.BatchNorm1d(7))
    for name, buffer in list(model[1].named_buffers()):
        setattr(model[1], name, buffer.double())
    return model


ACCUMULATED = Settings(accumulate_grad_batches=2)


CASES = {
    "recomputed": Training(recomputing, settings=Settings(gradient_clip_val=0.5)),
    "compiled": Training(compiled),
    "clipped": Training(Blocks, settings=Settings(gradient_clip_val=0.5)),
    "bf16": Training(Blocks, settings=Settings(precision="bf16")),
    "partly frozen": Training(partly_frozen),
    "root frozen midrun": Training(Blocks, freezes="head"),
    "block frozen midrun": Training(Blocks, freezes="blocks.0"),
    "part frozen midrun": Training(Blocks, freezes="blocks.0.inner"),
    "unused in the root": Training(models.Branching, uses_branch=(True, False)),
    "used early": Training(
        models.Branching,
        uses_branch=(True, False),
        settings=Settings(accumulate_grad_batches=2, gradient_clip_val=0.5),
    ),
}


@on_cpu
@pytest.mark.parametrize("case", CASES)
def test_blocks_train_as_under_ddp(case: str) -> None:
    unused = {"find_unused_parameters": True}
    expected = run_ranks(through_torchweld, 2, CASES[case], DDP, unused)

    pieces = run_ranks(trained_pieces, 2, CASES[case])

    assert difference(weights(assemble(pieces)), expected[0].weights) <= 1e-7


def trained_pieces(training: Training) -> list[Kept]:
    session, _ = train(training, STREAMLESS)
    return session.state()


@on_cpu
def test_one_value_for_its_part_is_what_raw_fairscale_takes_when_accumulating() -> None:
    training = Training(Blocks, settings=ACCUMULATED)

    pieces = run_ranks(unchecked_pieces, 2, training)

    assert difference(weights(assemble(pieces)), by_hand(training).weights) > 1e-3


def unchecked_pieces(training: Training) -> list[Kept]:
    check: Any = fully_sharded
    check._check = lambda _model, _request: None
    try:
        return trained_pieces(training)
    finally:
        importlib.reload(fully_sharded)


@on_cpu
@pytest.mark.parametrize(
    ("training", "words"),
    [
        (Training(Blocks, settings=ACCUMULATED), "'blocks.0.scale' has shape"),
        (Training(settings=Settings(precision="bf16-true")), "cannot do precision='bf16-true'"),
        (Training(double_buffer), "'1.running_mean' is not fp32"),
    ],
)
def test_what_fairscale_gets_wrong_is_refused(training: Training, words: str) -> None:
    with pytest.raises(RanksFailed, match=words):
        run_ranks(trained_pieces, 2, training)


def test_raw_fairscale_keeps_the_groups_of_the_run_before() -> None:
    before, after = run_ranks(raw_groups_of_two_runs, 1)[0]

    assert before == after


@contextmanager
def unconnected_group() -> Iterator[None]:
    """A group of one process by torch's own tests: of gloo's, one soon after another can hang."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def raw_groups_of_two_runs() -> tuple[int, int]:
    cached = fairscale_module("fairscale.internal.parallel").get_process_group_cached
    found = []
    for _ in range(2):
        with unconnected_group():
            found.append(cached())
    del cached._global_group_cache
    return id(found[0]), id(found[1])


@on_cpu
def test_raw_fairscale_casts_buffers() -> None:
    assert run_ranks(raw_buffer_dtypes, 1) == [torch.float32]


def raw_buffer_dtypes() -> torch.dtype:
    model = raw_wrapped(double_buffer)
    model.eval()
    model(models.features(4)[0])
    buffer: torch.Tensor = model.get_buffer("_fsdp_wrapped_module._fpw_module.1.running_mean")
    return buffer.dtype


@on_cpu
def test_a_weight_written_after_an_evaluation_is_used() -> None:
    for before, after in run_ranks(written_after_an_evaluation, 2):
        assert float((after - before).abs().max()) > 0.1


def written_after_an_evaluation() -> tuple[torch.Tensor, torch.Tensor]:
    prepared = make_session(Training(), STREAMLESS).prepared
    inputs, _ = models.features(4)
    with torch.no_grad():
        before = prepared.evaluate(inputs).clone()
        for _, parameter in prepared.named_parameters():
            parameter.add_(1.0)
        return before, prepared.evaluate(inputs).clone()


@on_cpu
def test_raw_fairscale_uses_weights_of_the_last_evaluation_again() -> None:
    before, after = run_ranks(raw_written_after_an_evaluation, 2)[0]

    assert torch.equal(before, after)


def raw_wrapped(make_model: Any) -> Any:
    replace_streams()
    dist.init_process_group("gloo")
    imports.hide_deprecations()
    torch.manual_seed(0)
    return wrap_raw(make_model(), flatten_parameters=False)


def wrap_raw(model: nn.Module, **options: Any) -> Any:
    # Its own groups are kept for the process, so a second test would wait for ranks of the first.
    groups = {"process_group": dist.group.WORLD, "process_group_reduce_scatter": dist.group.WORLD}
    wrap = fairscale_module("fairscale.nn.data_parallel").FullyShardedDataParallel
    return wrap(model, compute_device=torch.device("cpu"), **groups, **options)


def raw_written_after_an_evaluation() -> tuple[torch.Tensor, torch.Tensor]:
    model = raw_wrapped(models.mlp)
    inputs, _ = models.features(4)
    with torch.no_grad():
        before = model(inputs).clone()
        for parameter in model.parameters():
            parameter.add_(1.0)
        return before, model(inputs).clone()


@on_cpu
def test_raw_fairscale_cannot_add_to_a_gradient_that_the_last_micro_batch_leaves() -> None:
    with pytest.raises(RanksFailed, match="AssertionError"):
        run_ranks(raw_two_micro_batches, 2)


def raw_two_micro_batches() -> None:
    model = raw_wrapped(models.Branching)
    for branch in (True, False):
        inputs, targets = models.features(4)
        torch.autograd.backward(F.cross_entropy(model(inputs, branch=branch), targets))


@on_cpu
def test_the_estimate_is_what_is_held() -> None:
    estimate = FairscaleFsdpStrategy().estimate(shapes_of(Blocks()), 1, 2, Settings())

    for held in run_ranks(held_bytes, 2):
        assert held == estimate


def held_bytes() -> dict[str, int]:
    session, _ = train(Training(Blocks), STREAMLESS)
    return dict(session.prepared.bytes_per_rank())


# ---- without CUDA ----------------------------------------------------------------------------


def test_a_plan_for_a_cpu_refuses_it_and_names_fsdp() -> None:
    registry = empty_registry(strategies=[FAIRSCALE_FSDP])
    trainer = Trainer(strategy="fairscale_fsdp", accelerator="cpu", registry=registry)

    problem, *others = trainer.plan.problems

    assert not others
    assert problem.code == "TW301"
    assert "KeyError: 'all_gather'" in problem.why
    assert "strategy='fsdp'" in problem.fix


def test_set_up_on_a_cpu_says_why_and_what_instead() -> None:
    with pytest.raises(RanksFailed, match=r"KeyError: 'all_gather'; choose strategy='fsdp'"):
        run_ranks(through_torchweld, 1, Training(), FAIRSCALE_FSDP)


@on_cpu
def test_raw_fairscale_fsdp_ends_on_a_cpu_in_a_key_error() -> None:
    # In this process, where the streams have not been replaced.
    with unconnected_group():
        wrapped = wrap_raw(models.mlp())

        with pytest.raises(KeyError, match="all_gather"):
            wrapped(models.features(4)[0])
