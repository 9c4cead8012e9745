"""``sync_batchnorm=True`` where torch cannot: on several processes without a GPU."""

from __future__ import annotations

import torch.nn.functional as F

from tests.composer.small_nets import make_sgd
from torchweld import Trainer, use
from torchweld.errors import RunError
from torchweld.testing import models, run_ranks

STRATEGIES = ["ddp", "fsdp", "deepspeed"]


def refusal(strategy: str) -> str:
    trainer = Trainer(
        strategy=strategy,
        data=use("torch", batch_size=2),
        sync_batchnorm=True,
        max_steps=1,
        accelerator="cpu",
        barebones=True,
    )
    data = list(zip(*models.images(8), strict=True))
    try:
        trainer.fit(models.batchnorm_convnet(), data, loss=F.cross_entropy, optimizer=make_sgd)
    except RunError as error:
        return str(error)
    return "trained"


def refusals() -> list[str]:
    return [refusal(strategy) for strategy in STRATEGIES]


def test_every_process_refuses_it_with_what_to_do() -> None:
    for found in run_ranks(refusals, 2, timeout_seconds=200):
        for said in found:
            assert "sync_batchnorm=True was asked for, and this run is on 'cpu'" in said
            assert "GroupNorm" in said


def test_one_process_has_nothing_to_synchronise() -> None:
    assert run_ranks(refusal, 1, "fsdp", timeout_seconds=200) == ["trained"]
