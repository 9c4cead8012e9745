"""What ``fsdp`` claims, and the trouble that each claim keeps away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from tests.core.copying import copying
from torchweld import Claims, Component, Rel, Trainer, use
from torchweld.components import Settings
from torchweld.errors import InvalidArgument, PlanError
from torchweld.testing import models, run_ranks, spawn_ranks
from torchweld_fsdp import FSDP, FsdpOptions
from torchweld_fsdp.components import OLD_TORCH, fsdp_claims
from torchweld_fsdp.fairscale.components import (
    OssOptions,
    SdpOptions,
    fairscale_fsdp_claims,
    oss_claims,
    sdp_claims,
)

ALWAYS = {
    "params.local",
    "params.writable",
    "params.may_freeze",
    "params.may_unfreeze",
    "grads.elementwise",
    "step.closure",
}


@contextmanager
def group() -> Iterator[None]:
    """The group of this job; whoever runs jobs destroys it, once every rank has come so far."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    yield


@pytest.mark.parametrize(
    ("options", "precision", "autocast"),
    [
        ({}, "32", True),
        ({}, "bf16", True),
        ({}, "16", True),
        ({}, "bf16-true", False),
        ({"param_dtype": "bf16"}, "bf16", False),
    ],
)
def test_what_is_provided_follows_from_options_and_precision(
    options: Mapping[str, Any], precision: Any, autocast: bool
) -> None:
    claims = fsdp_claims(FsdpOptions(**options), Settings(precision=precision))

    dtype = "precision.uniform" if precision == "bf16-true" else "precision.autocast"
    kept = autocast or precision == "bf16-true"
    assert set(claims.provides) == ALWAYS | ({dtype} if kept else set())
    assert ("precision.autocast" in claims.lacks) is not autocast


@pytest.mark.parametrize(
    "token", ["params.strided", "params.deepcopy", "grads.whole", "graph.per_rank"]
)
def test_a_surgery_that_needs_what_fsdp_lacks_is_refused_with_the_reason(token: str) -> None:
    surgery = Component(
        "needy", "needs it", lambda: None, claims=Claims(requires=Rel(token, "it needs it"))
    )
    plan = Trainer(strategy="fsdp", surgery=[surgery], barebones=True).plan

    (problem,) = plan.problems

    assert problem.code == "TW301"
    lacks = fsdp_claims(FsdpOptions(), Settings()).lacks
    assert lacks[token] in problem.why


# ---- a surgery that copies weights ---------------------------------------------------------------


def train_with_copies(provides: str) -> str:
    """Train a model given as a function; returns what it said and the problem there was."""
    trainer = Trainer(strategy="fsdp", surgery=[copying(provides)], max_steps=1, barebones=True)
    data = DataLoader(TensorDataset(*models.features(4)), 4)
    optimizer = partial(SGD, lr=0.1)
    try:
        trainer.fit(models.mlp, data, loss=F.cross_entropy, optimizer=optimizer)
    except InvalidArgument as error:
        return str(error)
    return trainer.plan.explain()


def test_a_model_whose_weights_a_surgery_copies_is_built_whole() -> None:
    (explained,) = run_ranks(train_with_copies, 1, "weights.replaced")

    assert "adjusted to deferred_init=False" in explained


def test_copies_of_weights_that_were_left_out_are_refused() -> None:
    """The control: without the claim, the model is there without values."""
    (problem,) = run_ranks(train_with_copies, 1, "")

    assert "'0.weight' was computed from weights that have no values yet" in problem


# ---- the troubles --------------------------------------------------------------------------------


def channels_last_weights() -> str:
    with group():
        model = nn.Conv2d(3, 8, 3)
        model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
        with pytest.raises(NotImplementedError) as caught:
            fully_shard(model)
        return str(caught.value)


def test_fsdp2_keeps_no_strides() -> None:
    assert "non-contiguous" in run_ranks(channels_last_weights, 2)[0]


def local_gradient() -> tuple[tuple[int, ...], tuple[int, ...]]:
    with group():
        model: Any = models.mlp()
        fully_shard(model)
        inputs, targets = models.features(4)
        torch.autograd.backward(F.cross_entropy(model(inputs), targets))
        gradient = model[0].weight.grad
        return tuple(gradient.shape), tuple(gradient.to_local().shape)


def test_a_rank_holds_rows_of_a_gradient() -> None:
    first, second = run_ranks(local_gradient, 2)

    assert (first, second) == (((65, 33), (33, 33)), ((65, 33), (32, 33)))


def skip_on_one_rank() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    model: Any = models.Branching()
    fully_shard(model.side)
    fully_shard(model)
    inputs, targets = models.features(4)
    for _ in range(2):
        outputs = model(inputs, branch=dist.get_rank() == 0)
        torch.autograd.backward(F.cross_entropy(outputs, targets))


def test_a_unit_that_one_rank_leaves_out_ends_the_run(tmp_path: Path) -> None:
    with spawn_ranks(skip_on_one_rank, 2, directory=tmp_path) as ranks:
        codes = ranks.wait(timeout_seconds=120)

    assert any(code != 0 for code in codes)


def batchnorm_gathered_in_bf16() -> str:
    with group():
        model = nn.Sequential(nn.Linear(33, 7), nn.BatchNorm1d(7))
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with pytest.raises(RuntimeError) as caught:
            model(models.features(4)[0])
        return str(caught.value)


def with_batchnorm(options: Mapping[str, Any], precision: Any) -> str:
    model = nn.Sequential(nn.Linear(33, 7), nn.BatchNorm1d(7))
    trainer = Trainer(
        strategy=use("fsdp", **options),
        data=use("torch", batch_size=4),
        precision=precision,
        max_epochs=1,
        barebones=True,
    )
    data = TensorDataset(*models.features(16))
    try:
        trainer.fit(model, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))
    except PlanError as error:
        return str(error)
    return "trained"


def test_batchnorm_is_refused_where_parameters_alone_are_gathered_in_bf16() -> None:
    assert "BFloat16" in run_ranks(batchnorm_gathered_in_bf16, 2)[0]

    refused, _ = run_ranks(with_batchnorm, 2, {"param_dtype": "bf16"}, "bf16")

    assert "TW302" in refused
    assert "leave param_dtype out" in refused
    for precision in ("bf16", "bf16-true"):
        assert run_ranks(with_batchnorm, 2, {}, precision) == ["trained", "trained"]


def offloaded() -> str:
    with group():
        model = models.mlp()
        try:
            fully_shard(model, offload_policy=CPUOffloadPolicy())
            model(models.features(4)[0])
        except RuntimeError as error:
            return str(error)
        return "runs"


def test_offloading_without_a_gpu_fails_late() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")

    assert run_ranks(offloaded, 2)[0] != "runs"


# ---- the oldest torch ----------------------------------------------------------------------------


@pytest.mark.parametrize(("torch_version", "is_asked"), [("2.6.0+cpu", True), ("2.7.0", False)])
def test_cuda_is_asked_for_where_streams_of_the_cpu_lack_events(
    torch_version: str, is_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchweld_fsdp.components.version", {"torch": torch_version}.get)

    asked = fsdp_claims(FsdpOptions(), Settings()).requires

    assert asked == ((OLD_TORCH,) if is_asked else ())


def test_streams_of_the_cpu_have_events_where_it_is_not_asked_for() -> None:
    has_events = hasattr(torch.cpu.Stream, "record_event")

    assert (fsdp_claims(FsdpOptions(), Settings()).requires == ()) == has_events


# ---- precision -----------------------------------------------------------------------------------


def losses(strategy: str, options: Mapping[str, Any], precision: Any) -> list[float]:
    torch.manual_seed(0)
    found: list[float] = []

    def step(run: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = F.cross_entropy(run.model(batch[0]), batch[1])
        found.append(loss.detach().item())
        return loss

    trainer = Trainer(
        strategy=use(strategy, **options),
        data=use("torch", batch_size=4, shuffle=False),
        precision=precision,
        max_epochs=1,
        barebones=True,
    )
    data = TensorDataset(*models.features(64))
    trainer.fit(models.mlp(), data, step=step, optimizer=partial(SGD, lr=0.1))
    return found


def test_bf16_losses_equal_those_of_ddp_and_gathering_in_bf16_is_close() -> None:
    expected, _ = run_ranks(losses, 2, "ddp", {}, "bf16")

    autocast, _ = run_ranks(losses, 2, "fsdp", {}, "bf16")
    gathered, _ = run_ranks(losses, 2, "fsdp", {"param_dtype": "bf16"}, "bf16")

    assert autocast == expected
    assert gathered == pytest.approx(expected, abs=2e-2)


def test_the_component_is_what_the_plugin_offers() -> None:
    assert FSDP.options is FsdpOptions


@pytest.mark.parametrize("synchronised", [False, True])
def test_what_batchnorm_sees_is_said_as_it_is(synchronised: bool) -> None:
    settings = Settings(sync_batchnorm=synchronised)

    said = [what for what, _ in fsdp_claims(FsdpOptions(), settings).settles]
    assert any("each process's own batch" in what for what in said) is not synchronised
    assert any("checkpoints take rank 0's buffers" in what for what in said)
    for claims in (
        oss_claims(OssOptions(), settings),
        sdp_claims(SdpOptions(), settings),
        fairscale_fsdp_claims(None, settings),
    ):
        own = any("its own batch" in what for what, _ in claims.settles)
        assert own is not synchronised
