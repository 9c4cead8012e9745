"""``single`` against the same training written by hand: bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.parity.training import (
    BATCH,
    arguments,
    by_hand,
    different,
    make_data,
    make_model,
    make_trainer,
    own_loop,
    weights,
)
from torchweld import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating": {"accumulate": 4},
    "clipping": {"clip": 0.5},
    "accumulating and clipping": {"accumulate": 4, "clip": 0.5},
}


def reference(optimizer: str = "sgd", **settings: Any) -> dict[str, torch.Tensor]:
    model = make_model()
    torch.manual_seed(3)
    by_hand(model, DataLoader(make_data(), BATCH, shuffle=True), optimizer=optimizer, **settings)
    return weights(model)


def trained(trainer: Trainer, *, own: bool, optimizer: str = "sgd", **more: Any) -> dict[str, Any]:
    model = make_model()
    torch.manual_seed(3)
    loader = DataLoader(make_data(), BATCH, shuffle=True)
    if own:
        with trainer.prepare(model, loader, **arguments(optimizer), **more) as run:
            own_loop(run)
    else:
        trainer.fit(model, loader, **arguments(optimizer), **more)
    return weights(model)


@pytest.mark.parametrize("own", [False, True], ids=["fit", "own loop"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_single_equals_a_loop_by_hand_bitwise(variant: str, own: bool) -> None:
    settings = VARIANTS[variant]

    result = trained(make_trainer(**settings), own=own)

    assert different(result, reference(**settings)) == []


@pytest.mark.parametrize("own", [False, True], ids=["fit", "own loop"])
def test_extras_change_no_weight(own: bool, tmp_path: Path) -> None:
    trainer = make_trainer(extras=True, default_root_dir=tmp_path)

    result = trained(trainer, own=own, val=DataLoader(make_data(13), BATCH, shuffle=True))

    assert different(result, reference()) == []
    assert list(tmp_path.glob("*/step-*"))


def own_order() -> DataLoader[Any]:
    """A loader that is shuffled by a generator of its own, which draws again after each epoch."""
    generator = torch.Generator().manual_seed(5)
    return DataLoader(make_data(), BATCH, shuffle=True, generator=generator)


@pytest.mark.parametrize("own", [False, True], ids=["fit", "own loop"])
def test_a_loader_with_a_generator_keeps_its_order_in_every_epoch(own: bool) -> None:
    by_ours, by_hands = make_model(), make_model()
    torch.manual_seed(3)
    by_hand(by_hands, own_order())
    torch.manual_seed(3)

    if own:
        with make_trainer().prepare(by_ours, own_order(), **arguments()) as run:
            own_loop(run)
    else:
        make_trainer().fit(by_ours, own_order(), **arguments())

    assert different(weights(by_ours), weights(by_hands)) == []


def test_a_loader_with_a_generator_goes_on_in_its_order(tmp_path: Path) -> None:
    def fit(epochs: int, **more: Any) -> dict[str, torch.Tensor]:
        model = make_model()
        torch.manual_seed(3)
        trainer = Trainer(max_epochs=epochs, logger=False, default_root_dir=tmp_path)
        given = {**arguments(), "lr_scheduler": None, **more}
        trainer.fit(model, own_order(), **given)
        return weights(model)

    whole = fit(3)
    fit(1)

    assert different(fit(3, ckpt_path="last"), whole) == []


def test_adamw_equals_a_loop_by_hand_bitwise() -> None:
    result = trained(make_trainer(accumulate=3), own=False, optimizer="adamw")

    assert different(result, reference(optimizer="adamw", accumulate=3)) == []


def test_a_fresh_optimizer_instance_trains_like_its_factory() -> None:
    model = make_model()
    torch.manual_seed(3)
    given = {**arguments(), "optimizer": arguments()["optimizer"](model.parameters())}

    make_trainer().fit(model, DataLoader(make_data(), BATCH, shuffle=True), **given)

    assert different(weights(model), reference()) == []
