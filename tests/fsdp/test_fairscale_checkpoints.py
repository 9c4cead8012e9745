"""Checkpoints of OSS and ShardedDDP: nothing gathered, read by any strategy on any ranks."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

from tests.fsdp.fairscale_runs import Training, Weights, make_session
from torchweld import Trainer, use
from torchweld.builtin import DDP, SINGLE
from torchweld.checkpoint import Checkpoint, write
from torchweld.components import Component
from torchweld.testing import models, run_ranks
from torchweld.testing.registry import empty_registry
from torchweld.testing.states import Kept, assemble, assert_same_state
from torchweld.testing.strategy_session import Session
from torchweld_fsdp.components import FSDP
from torchweld_fsdp.fairscale.components import FAIRSCALE_OSS, FAIRSCALE_SDP
from torchweld_fsdp.fairscale.imports import fairscale_module

ADAMW = partial(AdamW, lr=0.01, eps=1e-4)
TRAINING = Training(models.TinyGpt, models.tokens, optimizer=ADAMW)
BOTH = pytest.mark.parametrize("component", [FAIRSCALE_OSS, FAIRSCALE_SDP], ids=lambda c: c.name)


def take(session: Session, *seeds: int) -> None:
    for seed in seeds:
        session.prepared.backward(session.loss(models.tokens(8, seed=seed)))
        session.prepared.step()


def save(component: Component, path: str, training: Training) -> list[Kept]:
    session = make_session(training, component)
    take(session, 0, 1, 2)
    write(
        Path(path),
        rank=session.env.rank,
        world_size=session.env.world_size,
        exchange=session.ranks.exchange,
        shards=session.prepared.shards(),
        header={},
    )
    return session.state()


def restore(component: Component, path: str, training: Training, steps: int) -> list[Kept]:
    session = make_session(training, component)
    take(session, 9)  # what is there before must be gone afterwards
    session.prepared.restore(Checkpoint.open(path))
    take(session, *range(3, 3 + steps))
    return session.state()


OTHERS = {"single": (SINGLE, 1), "ddp": (DDP, 2), "fsdp": (FSDP, 2)}
OURS = {
    "oss2": (FAIRSCALE_OSS, 2),
    "oss3": (FAIRSCALE_OSS, 3),
    "sdp1": (FAIRSCALE_SDP, 1),
    "sdp2": (FAIRSCALE_SDP, 2),
}
PAIRS = [(a, b) for a in OURS for b in OTHERS if a in {"oss2", "sdp2"}]
PAIRS += [(b, a) for a, b in PAIRS] + [("oss2", "sdp2"), ("sdp2", "oss3"), ("oss3", "sdp1")]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=["-".join(p) for p in PAIRS])
def test_a_checkpoint_moves_between_strategies_bitwise(
    source: str, target: str, tmp_path: Path
) -> None:
    path, everything = str(tmp_path / "checkpoint"), {**OTHERS, **OURS}
    component, ranks = everything[source]
    saved = assemble(run_ranks(save, ranks, component, path, TRAINING))

    component, ranks = everything[target]
    restored = assemble(run_ranks(restore, ranks, component, path, TRAINING, 0))

    assert_same_state(restored, saved, what=f"{source} -> {target}")


@BOTH
def test_training_goes_on_bitwise_from_ddp(component: Component, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    run_ranks(save, 2, DDP, path, TRAINING)
    expected = assemble(run_ranks(restore, 2, DDP, path, TRAINING, 3))

    found = assemble(run_ranks(restore, 2, component, path, TRAINING, 3))

    assert_same_state(found, expected, what="three steps after a checkpoint of ddp")


@BOTH
def test_state_that_the_checkpoint_lacks_is_cleared(component: Component, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    plain = Training(models.TinyGpt, models.tokens, optimizer=partial(SGD, lr=0.1))
    run_ranks(save, 1, SINGLE, path, plain)

    state = assemble(run_ranks(restore, 2, component, path, TRAINING, 0))

    assert [name for name in state if name.startswith("optim/")] == []


def _consolidated() -> tuple[Weights, Weights]:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = models.mlp()
    oss = fairscale_module("fairscale.optim").OSS(model.parameters(), optim=SGD, lr=1, momentum=0.9)
    inputs, targets = models.features(8)
    for step in range(2):
        oss.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(inputs), targets))
        oss.step()
        if step == 0:
            oss.consolidate_state_dict(0)
            saved = oss.state_dict()["state"]
            kept = copy.deepcopy(saved)
    return {str(k): v["momentum_buffer"] for k, v in kept.items()}, {
        str(k): v["momentum_buffer"] for k, v in saved.items()
    }


def test_raw_oss_changes_what_it_consolidated_in_the_next_step() -> None:
    kept, saved = run_ranks(_consolidated, 1)[0]

    assert any(not torch.equal(saved[name], kept[name]) for name in kept)


# ---- through the Trainer -----------------------------------------------------------------------


def fit(strategy: Any, directory: str, epochs: int, ckpt_path: str | None) -> Weights:
    registry = empty_registry(strategies=[FAIRSCALE_OSS, FAIRSCALE_SDP])
    trainer = Trainer(
        strategy=strategy,
        data=use("torch", batch_size=4),
        max_epochs=epochs,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        seed=3,
        default_root_dir=directory,
        logger=False,
        enable_progress_bar=False,
        registry=registry,
    )
    torch.manual_seed(1)
    model = models.batchnorm_convnet()
    trainer.fit(
        model,
        TensorDataset(*models.images(32)),
        val=TensorDataset(*models.images(8, seed=1)),
        loss=F.cross_entropy,
        optimizer=ADAMW,
        lr_scheduler=lambda optimizer, _: OneCycleLR(optimizer, max_lr=0.02, total_steps=9),
        ckpt_path=ckpt_path,
    )
    return {n: t.detach().clone() for n, t in model.named_parameters()}


def test_a_run_is_resumed_under_another_strategy(tmp_path: Path) -> None:
    run_ranks(fit, 2, "fairscale_sdp", str(tmp_path), 1, None)
    expected = run_ranks(fit, 2, "fairscale_oss", str(tmp_path / "whole"), 2, None)

    resumed = run_ranks(fit, 2, "fairscale_oss", str(tmp_path), 2, "last")

    for name, weight in expected[0].items():
        # A bias before BatchNorm has no gradient but rounding, which Adam divides by its own size.
        torch.testing.assert_close(resumed[0][name], weight, rtol=0, atol=1e-5)
        assert torch.equal(resumed[1][name], resumed[0][name])
