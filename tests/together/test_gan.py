"""A GAN under the strategies that shard, against ``ddp``, which equals plain PyTorch bitwise.

DeepSpeed's third stage keeps a model's state for the rest of the process, so each run has its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.gan import gradients, train
from tests.parity.training import different
from torchweld import use
from torchweld.testing import run_ranks

SAMPLES = 40  # five batches of 4 for each of two processes
GRADIENTS = 1e-6  # relative; 2e-7 is what rounding in another order gives
WEIGHTS = 1e-5  # after ten steps of both models; 4e-7 found in windows, 0.0 without
SHARDED = {
    "fsdp": "fsdp",
    "zero2": use("deepspeed", stage=2),
    "zero3": use("deepspeed", stage=3, persistence_threshold=10),
}


def _train(name: str, folder: Path) -> dict[str, Any]:
    strategy: Any = SHARDED.get(name, name)
    folder = folder / name
    return {
        "weights": train(strategy, SAMPLES, folder / "whole"),
        "resumed": train(strategy, SAMPLES, folder / "resumed", resumes_after=7),
        "windows": train(strategy, SAMPLES, folder / "windows", accumulate_grad_batches=2),
        "every third": train(strategy, SAMPLES, folder / "third", every=3),
        "gradients": gradients(strategy, folder),
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``ddp`` makes of it."""
    found: dict[str, Any]
    found = run_ranks(_train, 2, "ddp", tmp_path_factory.mktemp("ddp"), timeout_seconds=300)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_a_gan_under_a_sharded_strategy_equals_ddp(
    name: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    result = run_ranks(_train, 2, name, tmp_path, timeout_seconds=300)[0]

    for kind in ("gradients", "weights", "windows", "every third"):
        tolerance = GRADIENTS if kind == "gradients" else WEIGHTS
        assert _furthest(result[kind], expected[kind]) < tolerance, kind
    assert different(result["weights"], result["resumed"]) == []
    # A silent clip at 1.0, which DeepSpeed's default is, would be seen.
    assert all(_norm(expected["gradients"], name) > 10 for name in ("g", "d"))


def _norm(gradients: dict[str, Tensor], model: str) -> float:
    """Of all gradients of one model."""
    own = [g.flatten() for name, g in gradients.items() if name.startswith(f"{model}.")]
    return float(torch.cat(own).norm())


def _furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest relative distance of two tensors of the same name."""
    assert left.keys() == right.keys()
    return max(
        float((left[n] - right[n]).norm() / right[n].norm())
        for n in right
        if right[n].is_floating_point() and torch.any(right[n] != 0)
    )
