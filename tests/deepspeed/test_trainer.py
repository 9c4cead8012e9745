"""Whole runs under ``deepspeed``: what a user writes, on two processes, against DDP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import TensorDataset

from tests.deepspeed.runs import SECONDS, decays_matrices
from torchweld import Trainer, use
from torchweld.testing import models, run_ranks

SAMPLES = 26  # 6 batches of 2 on each of two ranks, and a last one of 1


def one_cycle(optimizer: Optimizer, total_steps: int) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.01, total_steps=total_steps)


def make_gpt() -> nn.Module:
    torch.manual_seed(1)
    return models.TinyGpt()


def trainer_of(strategy: Any, **settings: Any) -> Trainer:
    defaults = {
        "data": use("torch", batch_size=2),
        "max_epochs": 2,
        "seed": 3,
        "gradient_clip_val": 0.5,
        "accumulate_grad_batches": 3,
        "enable_progress_bar": False,
        "logger": False,
        "default_root_dir": "runs",
    }
    return Trainer(strategy=strategy, **{**defaults, **settings})


def fit_gpt(
    strategy: str, options: Mapping[str, Any], own_loop: bool = False
) -> tuple[dict[str, Tensor], float, list[Tensor]]:
    """Train, export; the whole weights, the last loss of validation, and outputs on its data."""
    trainer = trainer_of(use(strategy, **options))
    arguments: dict[str, Any] = {
        "loss": F.cross_entropy,
        "optimizer": partial(AdamW, lr=1e-3, eps=1e-4),
        "param_groups": decays_matrices,
        "lr_scheduler": one_cycle,
    }
    data, val = TensorDataset(*models.tokens(SAMPLES)), TensorDataset(*models.tokens(7, seed=1))
    loss, outputs = float("nan"), []
    if own_loop:
        with trainer.prepare(make_gpt, data, val=val, **arguments) as run:
            for inputs, targets in run.batches():
                run.backward(run.loss(run.model(inputs), targets))
                run.step()
            run.export("weights.safetensors")
    else:
        loss = trainer.fit(make_gpt, data, val=val, **arguments).metrics["val_loss"]
        trainer.export("weights.safetensors")
        outputs = trainer.predict(data=val)
    return load_file("weights.safetensors"), loss, outputs


@pytest.fixture(scope="module")
def by_ddp() -> tuple[dict[str, Tensor], float, list[Tensor]]:
    first, _ = run_ranks(fit_gpt, 2, "ddp", {}, timeout_seconds=SECONDS)
    return first  # type: ignore[no-any-return]  # what a rank returns has no type


@pytest.mark.parametrize(
    ("options", "own_loop"),
    [
        ({"stage": 1}, False),
        ({"stage": 2, "offload_optimizer": "cpu"}, False),
        ({"stage": 3, "zero_init": True, "persistence_threshold": 100}, False),
        ({"stage": 2}, True),
    ],
    ids=str,
)
def test_a_gpt_with_groups_and_a_schedule_trains_as_under_ddp(
    by_ddp: Any, options: dict[str, Any], own_loop: bool
) -> None:
    expected, loss, outputs = by_ddp

    (weights, found, predicted), _ = run_ranks(
        fit_gpt, 2, "deepspeed", options, own_loop, timeout_seconds=SECONDS
    )

    assert weights.keys() == expected.keys()
    assert max(float((weights[n] - expected[n]).abs().max()) for n in expected) <= 2e-6
    if not own_loop:
        assert found == pytest.approx(loss, abs=2e-6)
        assert len(predicted) == len(outputs) > 0
        for mine, theirs in zip(predicted, outputs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


# ---- beside other plugins ------------------------------------------------------------------------


def test_composers_gradient_clipping_becomes_the_engines() -> None:
    pytest.importorskip("torchweld_composer")
    algorithms = pytest.importorskip("composer.algorithms")
    clipping = algorithms.GradientClipping(clipping_type="norm", clipping_threshold=0.25)

    plan = Trainer(strategy="deepspeed", surgery=[clipping], barebones=True).plan

    assert not plan.has_errors, plan.explain()
    assert plan.settings.gradient_clip_val == 0.25
    assert "the engine clips gradients at the norm 0.25" in " ".join(plan.explain().split())


# ---- a run that goes on --------------------------------------------------------------------------


def fit_mlp(stage: int, stops: bool) -> dict[str, Tensor]:
    """Ten steps of momentum; with ``stops`` in two runs, the second from a checkpoint."""
    data = TensorDataset(*models.features(40))
    arguments: dict[str, Any] = {
        "loss": F.cross_entropy,
        "optimizer": partial(SGD, lr=0.1, momentum=0.9),
    }
    settings = {"max_epochs": None, "accumulate_grad_batches": 1}
    path = None
    if stops:
        torch.manual_seed(0)
        first = trainer_of(use("deepspeed", stage=stage), max_steps=4, **settings)
        path = first.fit(models.mlp(), data, **arguments).checkpoint
    torch.manual_seed(0 if path is None else 1)
    trainer = trainer_of(use("deepspeed", stage=stage), max_steps=10, **settings)
    trainer.fit(models.mlp(), data, ckpt_path=path, **arguments)
    trainer.export("weights.safetensors")
    return load_file("weights.safetensors")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_that_is_resumed_is_the_same_run_bitwise(stage: int) -> None:
    whole, _ = run_ranks(fit_mlp, 2, stage, False, timeout_seconds=SECONDS)
    resumed, _ = run_ranks(fit_mlp, 2, stage, True, timeout_seconds=SECONDS)

    assert [name for name in whole if not whole[name].equal(resumed[name])] == []
