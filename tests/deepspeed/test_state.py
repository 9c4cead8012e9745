"""One checkpoint for all stages, strategies and numbers of ranks, bitwise, nothing unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.deepspeed.runs import (
    ADAMW,
    SECONDS,
    bench_of,
    case_of,
    components,
    decays_matrices,
    different,
    largest_difference,
    steps_of,
)
from torchweld.checkpoint import Checkpoint, write
from torchweld.components import Settings
from torchweld.interfaces import SetupRequest
from torchweld.model.parameters import make_groups
from torchweld.processes.ranks import launch
from torchweld.testing import models, run_ranks
from torchweld.testing.processes import RanksFailed
from torchweld.testing.states import Kept, assemble, keep
from torchweld.testing.strategy_session import Case, Step, prepared

ZEROS = ("zero1", "zero2", "zero3")
ALL = tuple(sorted(components()))
WORLDS = {"single": 1}
"""Ranks of a strategy in the matrix of all pairs; two of the others."""


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a checkpoint was unpickled")


def save(case: Case, steps: list[Step], after: Step, path: str) -> Any:
    with prepared(case) as session:
        for step in steps:
            session.take(step)
        ranks = session.ranks
        write(
            Path(path),
            rank=ranks.rank,
            world_size=ranks.world_size,
            exchange=ranks.exchange,
            shards=session.prepared.shards(),
            header={},
        )
        saved = session.state()
        session.take(after)
        return saved, session.state()


def load(case: Case, dirty: Step, after: Step, path: str) -> Any:
    """Restore over a trained run, whose state must leave no trace; then go on."""
    with prepared(case) as session, pytest.MonkeyPatch.context() as patch:
        session.take(dirty)
        for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
            patch.setattr(module, name, refuse)
        session.prepared.restore(Checkpoint.open(path))
        loaded = session.state()
        session.take(after)
        return loaded, session.state()


def states(by_rank: Any) -> list[dict[str, Tensor]]:
    return [assemble(kept) for kept in zip(*by_rank, strict=True)]


def saved_by(
    strategy: str, world_size: int, path: Path, model: str = "mlp", **changes: Any
) -> list[dict[str, Tensor]]:
    bench = bench_of(strategy, world_size)
    *steps, after = steps_of(model)
    case = case_of(bench, model, **changes)
    return states(bench.run(save, case, steps, after, str(path)))


def loaded_by(
    strategy: str, world_size: int, path: Path, model: str = "mlp", **changes: Any
) -> list[dict[str, Tensor]]:
    bench = bench_of(strategy, world_size)
    dirty, after = steps_of(model, (1,) * 5)[-1], steps_of(model)[-1]
    case = case_of(bench, model, **{"seed": 9, **changes})
    return states(bench.run(load, case, dirty, after, str(path)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """A checkpoint of every strategy, what was in it, and what one more step made of it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: (folder / name, saved_by(name, WORLDS.get(name, 2), folder / name)) for name in ALL
    }


PAIRS = [(a, b) for a in ALL for b in ALL if a in ZEROS or b in ZEROS]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_any_strategy_reads_the_checkpoint_of_any_other(
    written: Any, source: str, target: str
) -> None:
    path, (saved, continued) = written[source]

    loaded, resumed = loaded_by(target, WORLDS.get(target, 2), path)

    assert different(loaded, saved) == []
    assert largest_difference(resumed, continued) <= 1e-7
    if source == target:
        assert different(resumed, continued) == []


@pytest.mark.parametrize(
    ("source", "target", "world_size"),  # all of them: test_matrix.py
    [
        ("zero1", "zero2", 1),
        ("zero3", "zero3", 1),
        ("ddp", "zero1", 1),
        ("zero2", "zero3", 4),
        ("zero3", "zero1", 4),
        ("zero1", "zero2", 4),
    ],
)
def test_a_checkpoint_is_read_by_another_number_of_ranks(
    written: Any, source: str, target: str, world_size: int
) -> None:
    path, (saved, continued) = written[source]

    loaded, resumed = loaded_by(target, world_size, path)

    assert different(loaded, saved) == []
    assert largest_difference(resumed, continued) <= 2e-7


@pytest.mark.parametrize(
    ("model", "stage", "world_size"),
    [("frozen", "zero1", 1), ("gpt", "zero2", 1), ("frozen", "zero3", 4), ("gpt", "zero3", 1)],
)
def test_frozen_and_tied_weights_are_there(
    tmp_path: Path, model: str, stage: str, world_size: int
) -> None:
    saved, continued = saved_by(stage, 2, tmp_path / "c", model)

    loaded, resumed = loaded_by(stage, world_size, tmp_path / "c", model)
    again = loaded_by("ddp", 2, tmp_path / "c", model)[0]

    assert different(loaded, saved) == different(again, saved) == []
    assert largest_difference(resumed, continued) <= 1e-5  # of the tied model, under Adam


@pytest.mark.parametrize(
    ("source", "target"), [("zero1", "zero3"), ("zero3", "zero1"), ("zero2", "zero2")]
)
def test_pieces_of_cast_parameters_are_read_by_every_stage(
    tmp_path: Path, source: str, target: str
) -> None:
    settings = Settings(precision="bf16-true")
    saved, continued = saved_by(source, 2, tmp_path / "c", settings=settings)

    loaded, resumed = loaded_by(target, 2, tmp_path / "c", settings=settings)

    assert different(loaded, saved) == []
    assert largest_difference(resumed, continued) <= (0.0 if source == target else 1e-2)


def test_state_that_ddp_keeps_in_bf16_becomes_pieces_in_fp32(tmp_path: Path) -> None:
    settings = Settings(precision="bf16-true")
    saved, _ = saved_by("ddp", 2, tmp_path / "c", settings=settings)

    loaded, resumed = loaded_by("zero3", 2, tmp_path / "c", settings=settings)

    whole = {name for name, tensor in loaded.items() if tensor.dtype == torch.float32}
    assert whole == loaded.keys() == resumed.keys()
    assert different(loaded, {name: tensor.float() for name, tensor in saved.items()}) == []


def test_pieces_in_fp32_are_not_rounded_for_who_keeps_bf16_alone(tmp_path: Path) -> None:
    settings = Settings(precision="bf16-true")
    saved_by("zero2", 2, tmp_path / "c", settings=settings)

    with pytest.raises(RanksFailed, match="has float32, asked for bfloat16"):
        loaded_by("ddp", 2, tmp_path / "c", settings=settings)


# ---- averages ------------------------------------------------------------------------------------


def averaged_in_pieces(case: Case, steps: list[Step]) -> list[list[Kept]]:
    """The pieces after each step, and their average, which no rank asked another for."""
    states: list[list[Kept]] = []
    with prepared(case) as session:
        for step in steps:
            session.take(step)
            states.append([kept for kept in session.state() if kept.name.startswith("model/")])
    average = [kept.local.clone() for kept in states[0]]
    for state in states[1:]:
        torch._foreach_lerp_(average, [kept.local for kept in state], 0.3)
    pairs = zip(states[0], average, strict=True)
    return [*states, [replace(kept, local=local) for kept, local in pairs]]


@pytest.mark.parametrize("stage", ZEROS)
def test_an_average_of_pieces_is_that_of_the_weights_bitwise(stage: str) -> None:
    bench = bench_of(stage, 2)
    by_rank = bench.run(averaged_in_pieces, case_of(bench, "mlp"), steps_of("mlp"))

    *whole, found = states(by_rank)
    expected = {name: tensor.clone() for name, tensor in whole[0].items()}
    for state in whole[1:]:
        torch._foreach_lerp_(list(expected.values()), [state[name] for name in expected], 0.3)
    assert different(found, expected) == []
    assert different(found, whole[-1]) == sorted(expected)


# ---- groups and counters -------------------------------------------------------------------------


def grouped(stage: int, path: str, writes: bool) -> Any:
    """Two groups of parameters: train and save, or restore over another training."""
    ranks = launch("cpu")
    strategy = bench_of(f"zero{stage}", ranks.world_size).chosen().make()
    ranks.join(strategy.backend)
    torch.manual_seed(0 if writes else 5)
    model = models.mlp()
    groups = make_groups(model, decays_matrices)
    request = SetupRequest(groups, ADAMW, (), (), ranks.env, Settings())
    prepared = strategy.setup(model, request)
    inputs, targets = models.features(4, seed=1 if writes else 2)
    for _ in range(2 if writes else 1):
        prepared.backward(F.cross_entropy(prepared.forward(inputs), targets))
        prepared.step()
    if writes:
        to, world = Path(path), ranks.world_size
        exchange, shards = ranks.exchange, prepared.shards()
        write(to, rank=ranks.rank, world_size=world, exchange=exchange, shards=shards, header={})
    else:
        prepared.restore(Checkpoint.open(path))
    held = keep(prepared.shards())
    strategy.teardown()
    return held


@pytest.mark.parametrize(("source", "target"), [(1, 3), (3, 2), (2, 1)])
def test_groups_keep_their_state(tmp_path: Path, source: int, target: int) -> None:
    path = str(tmp_path / "c")
    saved = assemble(run_ranks(grouped, 2, source, path, True, timeout_seconds=SECONDS))

    loaded = assemble(run_ranks(grouped, 2, target, path, False, timeout_seconds=SECONDS))

    assert {"optim/0.weight/exp_avg", "optim/0.bias/exp_avg"} <= saved.keys()
    assert different(loaded, saved) == []


@pytest.mark.parametrize(
    ("branches", "said"),
    [((True, False), "'step' is 2 for"), ((False, False), "none of 'side.weight'")],
)
@pytest.mark.parametrize("stage", ZEROS)
def test_counters_that_differ_in_a_group_are_an_error_that_names_both(
    tmp_path: Path, stage: str, branches: tuple[bool, ...], said: str
) -> None:
    steps = [
        replace(s, forward={"branch": b}) for s, b in zip(steps_of("mlp"), branches, strict=False)
    ]
    after = replace(steps[0], forward={"branch": True})
    writer = case_of(bench_of("single", 1), "mlp", make_model=models.Branching)
    bench_of("single", 1).run(save, writer, steps, after, str(tmp_path / "c"))
    reader = replace(writer, chosen=bench_of(stage, 1).chosen())

    with pytest.raises(RanksFailed, match=said):
        bench_of(stage, 1).run(load, reader, after, after, str(tmp_path / "c"))
