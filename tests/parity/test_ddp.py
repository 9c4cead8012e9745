"""``ddp`` on two gloo processes against torch's DistributedDataParallel by hand: bitwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from tests.parity.training import (
    BATCH,
    SEED,
    arguments,
    by_hand,
    core_order,
    different,
    make_data,
    make_model,
    make_trainer,
    own_loop,
    weights,
)
from torchweld.testing import run_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating": {"accumulate": 4},
    "clipping": {"clip": 0.5},
    "accumulating and clipping": {"accumulate": 4, "clip": 0.5},
}
SAMPLES = 88  # 11 batches of 4 for each of two processes


def _by_hand(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    dist.init_process_group("gloo")
    torch.manual_seed(SEED)
    model = make_model()
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(SEED + dist.get_rank())
    data = make_data(SAMPLES)
    sampler: DistributedSampler[Any] = DistributedSampler(data, seed=SEED)
    by_hand(wrapped, DataLoader(data, BATCH, sampler=sampler), **settings)
    return weights(model)


def _through_torchweld(settings: dict[str, Any], own: bool, data: str) -> dict[str, torch.Tensor]:
    model = make_model()
    trainer = make_trainer(strategy="ddp", seed=SEED, data=core_order(), **settings)
    train: Any = make_data(SAMPLES)
    if data == "loader":
        train = DataLoader(train, BATCH, shuffle=True)
    if own:
        with trainer.prepare(model, train, **arguments()) as run:
            own_loop(run)
    else:
        trainer.fit(model, train, **arguments())
    return weights(model)


@pytest.mark.parametrize("own", [False, True], ids=["fit", "own loop"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ddp_equals_torch_ddp_by_hand_bitwise(variant: str, own: bool) -> None:
    settings = VARIANTS[variant]
    expected = run_ranks(_by_hand, 2, settings)

    result = run_ranks(_through_torchweld, 2, settings, own, "dataset")

    for rank in range(2):
        parameters = [n for n in different(result[rank], expected[rank]) if "running" not in n]
        assert parameters == []
    assert different(result[0], expected[0]) == []


def test_a_default_dataloader_is_shared_out_as_its_dataset() -> None:
    from_dataset = run_ranks(_through_torchweld, 2, {}, False, "dataset")

    from_loader = run_ranks(_through_torchweld, 2, {}, False, "loader")

    assert different(from_loader[0], from_dataset[0]) == []


def test_one_process_of_ddp_equals_single() -> None:
    single = make_model()
    make_trainer(seed=SEED, data=core_order()).fit(single, make_data(), **arguments())

    result = run_ranks(_through_torchweld_alone, 1)

    assert different(result[0], weights(single)) == []


def _through_torchweld_alone() -> dict[str, torch.Tensor]:
    model = make_model()
    trainer = make_trainer(strategy="ddp", seed=SEED, data=core_order())
    trainer.fit(model, make_data(), **arguments())
    return weights(model)
