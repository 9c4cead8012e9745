"""Ranks that would do different things are told in what, all of them, before step 1."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR

from tests.core.small_runs import different, make_data, make_model, quiet_trainer, weights
from torchweld import (
    Component,
    EarlyStopping,
    LRSchedule,
    ModelCheckpoint,
    ProfilerWindow,
    Trainer,
    use,
)
from torchweld.errors import (
    CheckpointError,
    InvalidArgument,
    PlanError,
    PluginError,
    RankError,
    RankFailed,
    RankMissing,
    RanksDisagree,
    RunError,
    TorchweldError,
)
from torchweld.interfaces import Parts
from torchweld.testing import run_ranks

SOON = 40.0  # seconds, on any machine: 0.1 to 0.3 on an idle one; who hangs waits for minutes


def rank() -> int:
    """This process."""
    return int(os.environ["RANK"])


def outcome(work: Callable[[], Any]) -> tuple[type[BaseException] | None, str]:
    """Type and text of what ``work`` raised; soon."""
    began = time.monotonic()
    try:
        work()
    except TorchweldError as error:
        assert time.monotonic() - began < SOON
        return type(error), str(error)
    return None, ""


def fit(trainer: Trainer, model: nn.Module | None = None, **more: Any) -> Any:
    """Train a few steps."""
    given: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": partial(SGD, lr=0.1), **more}
    return trainer.fit(make_model() if model is None else model, make_data(), **given)


def bare(**settings: Any) -> Trainer:
    """A Trainer that writes nothing."""
    given: dict[str, Any] = {"data": use("torch", batch_size=4), "barebones": True, **settings}
    return Trainer(**given)


# ---- plans ---------------------------------------------------------------------------------------


def freeze(parts: Parts) -> Parts:
    """A surgery of the user's own."""
    next(parts.model.parameters()).requires_grad_(False)
    return parts


PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"precision": "bf16"}, "bf16"),
    "accumulation": ({"accumulate_grad_batches": 3}, "accumulate_grad_batches"),
    "clipping": ({"gradient_clip_val": 0.5}, "gradient_clip_val"),
    "option": ({"strategy": use("ddp", bucket_cap_mb=3)}, "bucket_cap_mb"),
    "surgery": ({"surgery": freeze}, "freeze"),
    "seed": ({"seed": 3}, "seed"),
}


def _fit_with_other_plan(settings: dict[str, Any]) -> tuple[type[BaseException] | None, str]:
    return outcome(lambda: fit(bare(**(settings if rank() == 1 else {}))))


@pytest.mark.parametrize("difference", PLANS)
def test_another_plan_on_one_rank_is_shown_on_all(difference: str) -> None:
    settings, named = PLANS[difference]

    results = run_ranks(_fit_with_other_plan, 2, settings)

    for kind, text in results:
        assert kind is RanksDisagree
        assert "TW504  rank 1 has another plan than rank 0" in text
        assert named in text


def _fit_with_planning_error(world_size: int) -> tuple[type[BaseException] | None, str]:
    return outcome(lambda: fit(bare(surgery="blurpol" if rank() == world_size - 1 else ())))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_planning_error_of_one_rank_is_shown_on_all(world_size: int) -> None:
    *others, (kind, text) = run_ranks(_fit_with_planning_error, world_size, world_size)

    assert (kind, "blurpol" in text) == (PlanError, True)
    for other, told in others:
        assert other is PlanError
        assert f"rank {world_size - 1} cannot start" in told
        assert "blurpol" in told


def _fit_with_broken_source() -> tuple[type[BaseException] | None, str]:
    return outcome(lambda: fit(bare(data=Component("mine", "of a test", build=_break_on_rank_1))))


def _break_on_rank_1(**options: Any) -> Any:
    from torchweld.data.torch_source import TorchSource

    if rank() == 1:
        raise OSError("no such disk")
    return TorchSource(
        batch_size=4, num_workers=0, shuffle=None, drop_last=False, pin_memory=False, shard=False,
        sharded=False,
    )  # fmt: skip


def test_a_component_that_one_rank_cannot_build_ends_all() -> None:
    (other, told), (kind, text) = run_ranks(_fit_with_broken_source, 2)

    assert (kind, other) == (PluginError, RankFailed)
    assert "no such disk" in text
    assert "rank 1 stopped in set-up: PluginError: " in told


# ---- runs ----------------------------------------------------------------------------------------


def speaking(**settings: Any) -> Trainer:
    """A Trainer with callbacks."""
    return quiet_trainer(Path("runs"), **settings)


def _halve(optimizer: Optimizer, _total: int) -> StepLR:
    return StepLR(optimizer, 1, 0.5)


def _stop() -> list[Any]:
    return [EarlyStopping("train_loss")]


RUNS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "epochs": (lambda: fit(bare(max_epochs=2)), lambda: fit(bare(max_epochs=3)), "max_epochs: 2"),
    "validation on one": (
        lambda: fit(bare(), val=make_data()),
        lambda: fit(bare()),
        r"val: ['one set'] (rank 0), [] (rank 1)",
    ),
    "saving on one": (
        lambda: fit(speaking(callbacks=[ModelCheckpoint(every_n_train_steps=2)])),
        lambda: fit(speaking()),
        "every_n_train_steps=2",
    ),
    "stopping on one": (
        lambda: fit(speaking(callbacks=_stop())),
        lambda: fit(speaking()),
        "EarlyStopping(",
    ),
    "logging": (
        lambda: fit(speaking(log_every_n_steps=1)),
        lambda: fit(speaking(log_every_n_steps=2)),
        "log_every_n_steps: 1 (rank 0), 2 (rank 1)",
    ),
    "learning rate": (
        lambda: fit(bare(), optimizer=partial(SGD, lr=0.1)),
        lambda: fit(bare(), optimizer=partial(SGD, lr=0.2)),
        "lr, group 0, lr: 0.1 (rank 0), 0.2 (rank 1)",
    ),
    "schedule": (
        lambda: fit(bare(), lr_scheduler=LRSchedule(_halve, interval="epoch")),
        lambda: fit(bare(), lr_scheduler=LRSchedule(_halve)),
        "lr_scheduler: ",
    ),
    "profiling on one": (
        lambda: fit(speaking(callbacks=[ProfilerWindow(1, 2)])),
        lambda: fit(speaking()),
        "ProfilerWindow",
    ),
    "a directory for one": (
        lambda: fit(speaking(enable_checkpointing=False, logger="csv")),
        lambda: fit(speaking(enable_checkpointing=False, logger=False)),
        "writes into a directory: True (rank 0), False (rank 1)",
    ),
    "order of validation": (
        lambda: fit(bare(), val={"a": make_data(), "b": make_data()}),
        lambda: fit(bare(), val={"b": make_data(), "a": make_data()}),
        "val: ['a', 'b'] (rank 0), ['b', 'a'] (rank 1)",
    ),
    "fit and an own loop": (
        lambda: fit(bare()),
        lambda: bare().prepare(make_model(), make_data(), optimizer=partial(SGD, lr=0.1)),
        "call: 'fit' (rank 0), 'prepare' (rank 1)",
    ),
}


def _run_otherwise(name: str) -> tuple[type[BaseException] | None, str]:
    first, second, _ = RUNS[name]
    return outcome((first, second)[rank()])


@pytest.mark.parametrize("name", RUNS)
def test_another_run_on_one_rank_is_shown_on_all(name: str) -> None:
    for kind, text in run_ranks(_run_otherwise, 2, name):
        assert kind is RanksDisagree
        assert "TW504  rank 1 has another " in text
        assert RUNS[name][2] in text


class _Watcher:
    def __init__(self) -> None:
        self.seen = 0

    def at(self, border: Any, run: Any) -> None:
        """Count borders."""
        self.seen += 1


def _watch_on_one() -> int:
    watchers = [_Watcher()] if rank() == 0 else []
    return int(fit(speaking(callbacks=watchers)).progress.step)


def test_a_callback_of_ones_own_may_be_on_one_rank() -> None:
    assert run_ranks(_watch_on_one, 2) == [6, 6]


# ---- models --------------------------------------------------------------------------------------


def _frozen(layer: nn.Linear) -> nn.Linear:
    layer.bias.requires_grad_(False)
    return layer


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "shape": (lambda: nn.Linear(6, 4), lambda: nn.Linear(6, 3)),
    "shape of as many numbers": (
        lambda: nn.Sequential(nn.Linear(6, 3, bias=False)),
        lambda: nn.Sequential(nn.Linear(3, 6, bias=False)),
    ),
    "order of layers": (
        lambda: nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}),
        lambda: nn.ModuleDict({"b": nn.Linear(6, 6), "a": nn.Linear(6, 6)}),
    ),
    "dtype": (lambda: nn.Linear(6, 3), lambda: nn.Linear(6, 3).double()),
    "what is trained": (lambda: nn.Linear(6, 3), lambda: _frozen(nn.Linear(6, 3))),
    "one more layer": (
        lambda: nn.Sequential(nn.Linear(6, 3)),
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3)),
    ),
    "a buffer": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Identity()),
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
    ),
}


def _fit_with_other_model(name: str) -> tuple[type[BaseException] | None, str]:
    return outcome(lambda: fit(bare(), MODELS[name][rank()]()))


@pytest.mark.parametrize("name", MODELS)
def test_another_model_on_one_rank_is_shown_on_all(name: str) -> None:
    results = run_ranks(_fit_with_other_model, 2, name)

    for kind, text in results:
        assert kind is RanksDisagree
        assert "TW504  rank 1 has another model than rank 0" in text


# ---- arrival -------------------------------------------------------------------------------------


def _fit_unless(late: int) -> tuple[type[BaseException] | None, str]:
    os.environ["TORCHWELD_TIMEOUT_SECONDS"] = "2"
    return (None, "") if rank() == late else outcome(lambda: fit(bare()))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_rank_that_never_arrives_is_named(late: int) -> None:
    results = run_ranks(_fit_unless, 3, late)

    arrived = [result for number, result in enumerate(results) if number != late]
    assert RankMissing in [kind for kind, _ in arrived]
    for _, text in arrived:
        assert f"rank {late} of 3 did not arrive at" in text
        assert "within 2 s" in text


def _fit_or_evaluate() -> tuple[type[BaseException] | None, str]:
    trainer = bare()
    fit(trainer)
    data = make_data()
    if rank() == 0:
        return outcome(lambda: fit(trainer))
    return outcome(lambda: trainer.evaluate(make_model(), data, loss=F.cross_entropy))


def test_ranks_at_different_calls_are_told_where_each_is() -> None:
    results = run_ranks(_fit_or_evaluate, 2)

    assert all(kind is not None and issubclass(kind, (RunError, RankError)) for kind, _ in results)
    assert any("every process must make the same calls" in text for _, text in results)


def _fit_with_devices(devices: int) -> tuple[type[BaseException] | None, str]:
    return outcome(lambda: fit(bare(devices=devices)))


@pytest.mark.parametrize(("devices", "world_size"), [(2, 1), (1, 2), (4, 2)])
def test_another_number_of_processes_than_asked_for_is_refused(
    devices: int, world_size: int
) -> None:
    results = run_ranks(_fit_with_devices, world_size, devices)

    for kind, text in results:
        assert kind is not None
        assert issubclass(kind, (InvalidArgument, RankFailed))
        assert f"devices={devices} was asked for, but {world_size} process" in text
        assert f"torchrun --nproc-per-node {devices}" in text


# ---- one after the other -------------------------------------------------------------------------


def _fit_after_errors() -> list[dict[str, Tensor]]:
    trained = []
    for number in range(3):
        kind, _ = outcome(lambda: fit(bare(surgery="blurpol")))
        assert kind is PlanError
        kind, _ = outcome(lambda: fit(bare(), optimizer=lambda groups: None))
        assert kind is not None
        if number == 2 and rank() == 1:
            kind, _ = outcome(lambda: fit(bare(), model=nn.Linear(6, 3)))
        elif number == 2:
            kind, _ = outcome(lambda: fit(bare()))
        model = make_model()
        fit(bare(seed=1), model)
        trained.append(weights(model))
    return trained


def test_ranks_train_after_errors_that_all_of_them_had() -> None:
    first, second = run_ranks(_fit_after_errors, 2)

    assert different(first[0], first[2]) == []
    assert [name for name in different(first[2], second[2]) if "running" not in name] == []


def _fit_twice(strategy: str) -> list[dict[str, Tensor]]:
    trainer = bare(strategy=strategy, seed=1)
    trained = []
    for made in (trainer, trainer, bare(strategy=strategy, seed=1, accelerator="cpu")):
        model = make_model()
        fit(made, model)
        trained.append(weights(model))
    return trained


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("ddp", 1), ("ddp", 2)])
def test_one_run_after_another_trains_alike(strategy: str, world_size: int) -> None:
    results = run_ranks(_fit_twice, world_size, strategy)

    for first, second, third in results:
        assert different(first, second) == []
        assert different(first, third) == []


def _fit_in_own_group() -> tuple[bool, int, dict[str, Tensor]]:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    model = make_model()
    run_count = fit(bare(seed=1, strategy="ddp"), model).progress.step
    dist.barrier()
    return dist.group.WORLD is group, run_count, weights(model)


def test_a_process_group_of_the_users_is_taken_over() -> None:
    results = run_ranks(_fit_in_own_group, 2)

    expected = run_ranks(_fit_twice, 2, "ddp")
    for (same, num_steps, trained), other in zip(results, expected, strict=True):
        assert (same, num_steps) == (True, 3)
        assert different(trained, other[0]) == []


def _alone_then_in_a_group() -> tuple[int, int, int]:
    variables = [os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")]
    alone = fit(bare(seed=1)).progress.step
    place = f"file://{Path.cwd()}/rendezvous"
    dist.init_process_group("gloo", place, rank=int(variables[0]), world_size=int(variables[1]))
    together = fit(bare(seed=1)).progress.step
    with _one_by_one(int(variables[0])):
        dist.destroy_process_group()
        afterwards = fit(bare(seed=1)).progress.step
        gc.collect()  # models that refer to the group are in cycles
    return alone, together, afterwards


@contextmanager
def _one_by_one(rank: int) -> Iterator[None]:
    """Go on with the last of two ranks first: gloo can hang where both take their group down."""
    dist.barrier()
    time.sleep(0.1)  # or while its threads still hold the tensors of the barrier
    gone = Path("gone")  # in the directory that the ranks of a job share
    while rank == 0 and not gone.exists():
        time.sleep(0.01)
    yield
    gone.touch()


def test_a_group_made_after_a_first_run_is_seen_and_its_end_too() -> None:
    assert run_ranks(_alone_then_in_a_group, 2) == [(6, 3, 6), (6, 3, 6)]


def _afterwards(root: str) -> dict[str, Any]:
    trainer, model = quiet_trainer(root, strategy="ddp"), make_model()
    data = make_data()
    fit(trainer, model)
    exported = trainer.export(Path(root) / "model.safetensors")
    return {
        "metrics": trainer.evaluate(data=data),
        "again": trainer.evaluate(model, data, loss=F.cross_entropy),
        "outputs": torch.cat(trainer.predict(data=data)),
        "exported": load_file(exported),
        "model": weights(model),
    }


def test_evaluation_prediction_and_export_follow_a_fit_on_two_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(_afterwards, 2, str(tmp_path))

    model, data = make_model(), make_data()
    model.load_state_dict(first["exported"])
    outputs = model.eval()(data.tensors[0]).detach()
    loss = float(F.cross_entropy(outputs, data.tensors[1]))
    assert first["metrics"] == second["metrics"] == first["again"]
    assert first["metrics"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert different(first["exported"], first["model"]) == []
    assert len(first["outputs"]) + len(second["outputs"]) == len(data)


def _export_where_nobody_can(root: str) -> tuple[type[BaseException] | None, str]:
    trainer = bare(strategy="ddp")
    fit(trainer)
    return outcome(lambda: trainer.export(Path(root) / "a file" / "model.safetensors"))


def test_an_export_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()

    results = run_ranks(_export_where_nobody_can, 2, str(tmp_path))

    for kind, text in results:
        assert kind is CheckpointError
        assert "the weights could not be written to" in text
