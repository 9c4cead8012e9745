"""FairScale's family on CUDA devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from torchweld import Trainer
from torchweld.testing import models, run_ranks
from torchweld.testing.registry import empty_registry
from torchweld_fsdp.fairscale.components import FAIRSCALE_FSDP, FAIRSCALE_OSS, FAIRSCALE_SDP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RUNS = [
    *(
        (name, precision)
        for name in ("fairscale_oss", "fairscale_sdp")
        for precision in ("32", "bf16", "bf16-true")
    ),
    ("fairscale_oss", "16"),
    ("fairscale_fsdp", "32"),
    ("fairscale_fsdp", "bf16"),
]


def make_model() -> nn.Module:
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 33)) for _ in range(3)]
    return nn.Sequential(nn.ModuleList(blocks)[0], *blocks[1:], nn.Linear(33, models.NUM_CLASSES))


def fit(strategy: str, precision: Any, directory: str, ckpt_path: str | None) -> dict[str, float]:
    registry = empty_registry(strategies=[FAIRSCALE_OSS, FAIRSCALE_SDP, FAIRSCALE_FSDP])
    trainer = Trainer(
        strategy=strategy,
        precision=precision,
        max_epochs=20 if ckpt_path is None else 22,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        seed=3,
        default_root_dir=directory,
        logger=False,
        registry=registry,
    )
    inputs, _ = models.features(64)
    data = TensorDataset(inputs, inputs[:, : models.NUM_CLASSES].argmax(1))
    result = trainer.fit(
        make_model(),
        DataLoader(data, 4),
        loss=F.cross_entropy,
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        ckpt_path=ckpt_path,
    )
    return dict(result.metrics)


@pytest.mark.parametrize(("strategy", "precision"), RUNS)
def test_it_learns_and_is_resumed_on_gpus(strategy: str, precision: str, tmp_path: Any) -> None:
    num_gpus = min(torch.cuda.device_count(), 2)

    run_ranks(fit, num_gpus, strategy, precision, str(tmp_path), None)
    resumed = run_ranks(fit, num_gpus, strategy, precision, str(tmp_path), "last")

    assert max(metrics["train_loss"] for metrics in resumed) < 0.8


@pytest.mark.parametrize("strategy", ["fairscale_oss", "fairscale_sdp", "fairscale_fsdp"])
def test_it_reaches_the_loss_of_ddp_on_gpus(strategy: str, tmp_path: Any) -> None:
    num_gpus = min(torch.cuda.device_count(), 2)
    expected = run_ranks(fit, num_gpus, "ddp", "32", str(tmp_path / "ddp"), None)

    found = run_ranks(fit, num_gpus, strategy, "32", str(tmp_path / strategy), None)

    assert abs(found[0]["train_loss"] - expected[0]["train_loss"]) < 1e-3
