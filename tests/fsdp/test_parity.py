"""``fsdp`` against plain PyTorch and DDP: bitwise where sums have one order, close elsewhere."""

from __future__ import annotations

import pytest

from tests.fsdp.strategies import ADAMW, different, is_layer, largest_difference, train
from torchweld.components import Settings

WINDOWS = Settings(accumulate_grad_batches=2, gradient_clip_val=0.5)


@pytest.mark.parametrize("model", ["mlp", "frozen", "convnet", "gpt"])
def test_one_rank_equals_single_bitwise(model: str) -> None:
    expected = train("single", 1, model, WINDOWS)

    assert different(train("fsdp", 1, model, WINDOWS), expected) == []


@pytest.mark.parametrize("wrap", [None, is_layer], ids=["root", "layers"])
@pytest.mark.parametrize("model", ["mlp", "frozen", "convnet", "gpt"])
def test_two_ranks_equal_ddp_bitwise_without_clipping(model: str, wrap: object) -> None:
    # a + b has one result in either order, so DDP and FSDP2 must not differ at all.
    changes = {"optimizer": ADAMW}
    expected = train("ddp", 2, model, changes=changes)

    assert different(train("fsdp", 2, model, changes=changes, wrap=wrap), expected) == []


def test_two_ranks_equal_ddp_bitwise_in_windows() -> None:
    settings = Settings(accumulate_grad_batches=2)
    expected = train("ddp", 2, "gpt", settings)

    assert different(train("fsdp", 2, "gpt", settings), expected) == []


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("model", ["mlp", "frozen", "gpt"])
def test_several_ranks_are_close_to_one_process(model: str, world_size: int) -> None:
    expected = train("single", 1, model, WINDOWS)

    found = train("fsdp", world_size, model, WINDOWS, wrap=is_layer)

    assert largest_difference(found, expected) <= 2e-7


def test_gradients_reduced_in_every_micro_batch_are_close_to_ddp() -> None:
    settings = Settings(accumulate_grad_batches=4)
    expected = train("ddp", 2, "mlp", settings)

    found = train("fsdp", 2, "mlp", settings, reduce_every_micro_batch=True)

    assert largest_difference(found, expected) <= 2e-7
