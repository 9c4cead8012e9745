"""Any order in which surgeries are listed is the same plan, and ends with the same bits."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.composer.small_nets import make_sgd
from tests.together.matrix import FOUR
from tests.together.matrix_choices import STRATEGIES, Cell, Images, make_net
from tests.together.matrix_runs import SEED, be_quiet, by_hand, chosen, exported
from torchweld import Trainer, use
from torchweld.testing import run_ranks

# Two that draw weights, three that draw in every step, and one that depends on what is replaced.
LISTED = (*FOUR, "squeeze_excite", "colout")
SECONDS = 300.0


def listings() -> list[tuple[str, ...]]:
    """As it is, the other way round, and two shuffled."""
    shuffled = [random.Random(seed).sample(LISTED, len(LISTED)) for seed in (0, 1)]
    return [LISTED, LISTED[::-1], *map(tuple, shuffled)]


def trained(strategy: str, listed: Sequence[str]) -> tuple[str, dict[str, Tensor]]:
    """The plan's digest, and on rank 0 the weights after four steps."""
    be_quiet()
    name, options = STRATEGIES[strategy]
    trainer = Trainer(
        strategy=use(name, **options),
        data=use("torch", batch_size=4, shuffle=True),
        surgery=[chosen(key) for key in listed],
        max_epochs=2,
        seed=SEED,
        accelerator="cpu",
        barebones=True,
    )
    digest = trainer.plan.digest
    trainer.fit(make_net(), Images(), loss=F.cross_entropy, optimizer=make_sgd)
    return digest, exported(trainer)


def trained_by_each(strategy: str) -> list[tuple[str, dict[str, Tensor]]]:
    return [trained(strategy, listed) for listed in listings()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    ["ddp", "fsdp", "deepspeed stage 2", pytest.param("deepspeed stage 3", marks=pytest.mark.soak)],
)
def test_any_listing_is_the_same_plan_and_ends_with_the_same_weights(strategy: str) -> None:
    (digest, expected), *others = run_ranks(trained_by_each, 2, strategy, timeout_seconds=SECONDS)[
        0
    ]

    assert len(others) == 3
    for other, weights in others:
        assert other == digest
        assert weights.keys() == expected.keys()
        assert [n for n in expected if not torch.equal(weights[n], expected[n])] == []


@pytest.mark.slow
def test_pieces_called_in_another_order_end_with_other_weights() -> None:
    """The control: by hand, without a plan, the listing does decide."""
    pair = ("cutmix", "label_smoothing")

    right, wrong = (
        run_ranks(by_hand, 1, Cell("single", surgeries=order), None, timeout_seconds=SECONDS)[0]
        for order in (pair, pair[::-1])
    )

    assert any(not torch.equal(right.weights[n], wrong.weights[n]) for n in right.weights)
