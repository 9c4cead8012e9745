"""The four on two processes, against the same objects of Composer's with torch DDP by hand."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchweld_composer
from tests.composer.small_nets import algorithm, images, make_sgd, operated, seed_all, small_net
from torchweld import Trainer
from torchweld.registry import Registry
from torchweld.testing import run_ranks

CLASSES = ("BlurPool", "ChannelsLast", "CutMix", "LabelSmoothing")


def test_the_four_under_ddp_equal_ddp_by_hand_on_every_rank() -> None:
    by_trainer = run_ranks(train_by_trainer, 2)
    by_hand = run_ranks(train_by_hand, 2)

    for weights in (*by_trainer[1:], *by_hand):
        assert all(torch.equal(a, b) for a, b in zip(by_trainer[0], weights, strict=True))


def train_by_trainer() -> list[Tensor]:
    model = _model()
    trainer = Trainer(
        strategy="ddp",
        surgery=["label_smoothing", "channels_last", "cutmix", "blurpool"],
        registry=Registry({"composer": torchweld_composer}),
        max_epochs=2,
        seed=3,
        accelerator="cpu",
        barebones=True,
    )
    trainer.fit(model, _loader(), loss=F.cross_entropy, optimizer=make_sgd)
    return _weights(model)


def train_by_hand() -> list[Tensor]:
    dist.init_process_group("gloo")
    model = _model()
    seed_all(3)
    parts = operated([algorithm(name) for name in CLASSES], model)
    wrapped = DistributedDataParallel(parts.model, gradient_as_bucket_view=True)
    optimizer = make_sgd(wrapped.parameters())
    seed_all(3 + int(os.environ["RANK"]))
    data = _loader()
    for _ in range(2):
        for given in data:
            batch: Any = parts.batch_transforms[0](given)
            outputs, targets = wrapped(batch[0]), batch[1]
            for change in parts.target_transforms:
                targets = change(outputs, targets)
            F.cross_entropy(outputs, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return _weights(model)


def _model() -> nn.Module:
    seed_all(0)
    # A rank's own BatchNorm statistics would differ from the other's, as they should.
    return small_net(batchnorm=False)


def _loader() -> DataLoader[Any]:
    data = TensorDataset(*images())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sampler: DistributedSampler[Any] = DistributedSampler(
        data, num_replicas=world_size, rank=rank, shuffle=False
    )
    return DataLoader(data, batch_size=4, sampler=sampler)


def _weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]
