"""A GAN, two models with an optimizer each, against the same in plain PyTorch: bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.gan import hand_ddp, hand_single, train
from tests.parity.training import different
from torchweld.testing import run_ranks

UNEVEN = 20  # five batches of 4
SHARED = 40  # five batches of 4 for each of two processes


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gan_equals_plain_pytorch_bitwise(accumulate: int, tmp_path: Path) -> None:
    expected = hand_single(UNEVEN, accumulate=accumulate)

    result = train("single", UNEVEN, tmp_path, accumulate_grad_batches=accumulate)

    assert different(expected, result) == []


def test_a_critic_that_is_not_frozen_is_trained_on_the_generators_loss() -> None:
    # The trouble that alone() prevents, shown on torch alone.
    right, wrong = hand_single(UNEVEN), hand_single(UNEVEN, freezes=False)

    assert not torch.equal(right["d.0.weight"], wrong["d.0.weight"])


def test_a_gan_resumed_in_the_middle_of_an_epoch_ends_bitwise_the_same(tmp_path: Path) -> None:
    expected = train("single", UNEVEN, tmp_path / "whole")

    result = train("single", UNEVEN, tmp_path / "resumed", resumes_after=3)

    assert different(expected, result) == []


def _on_ranks(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By hand and through torchweld, in windows, and interrupted."""
    found = {
        "ddp": train("ddp", SHARED, folder / "ddp"),  # makes the group, which the others take
        "resumed": train("ddp", SHARED, folder / "resumed", resumes_after=7),
        "windows": train("ddp", SHARED, folder / "windows", accumulate_grad_batches=2),
    }
    hand, hand_in_windows = hand_ddp(SHARED, [1, 2])
    return {**found, "hand": hand, "hand in windows": hand_in_windows}


def test_a_gan_under_ddp_equals_torch_ddp_by_hand_bitwise(tmp_path: Path) -> None:
    result = run_ranks(_on_ranks, 2, tmp_path, timeout_seconds=200)[0]

    assert different(result["hand"], result["ddp"]) == []
    assert different(result["ddp"], result["resumed"]) == []
    assert different(result["hand in windows"], result["windows"]) == []
