"""A model that is cut into pieces while it is built."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from tests.core.copying import copying
from tests.deepspeed.runs import SECONDS, decays_matrices
from torchweld import Trainer, use
from torchweld.components import Settings
from torchweld.errors import InvalidArgument
from torchweld.interfaces import SetupRequest
from torchweld.model.parameters import make_groups
from torchweld.processes.ranks import launch
from torchweld.testing import models, run_ranks
from torchweld.testing.states import assemble, keep
from torchweld.testing.strategy_bench import Bench
from torchweld_deepspeed import DEEPSPEED


class Initialised(nn.Module):
    """Draws weights in constructors and in ``apply``; an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = models.TinyGpt()
        self.apply(self._draw)

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens)  # type: ignore[no-any-return]  # a module


def built(zero_init: bool) -> dict[str, Any]:
    """Shapes that a rule of groups sees, and the pieces after set-up."""
    ranks = launch("cpu")
    options = {"stage": 3, "zero_init": zero_init, "persistence_threshold": 0}
    strategy = Bench(DEEPSPEED, options, ranks.world_size, 1e-6, SECONDS).chosen().make()
    ranks.join(strategy.backend)
    torch.manual_seed(3)
    model = strategy.construct(Initialised, ranks.env, Settings())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    groups = make_groups(model, decays_matrices)
    request = SetupRequest(groups, partial(AdamW, lr=1e-2), (), (), ranks.env, Settings())
    prepared = strategy.setup(model, request)
    held = keep(prepared.shards())
    inputs, targets = models.tokens(4)
    prepared.backward(F.cross_entropy(prepared.forward(inputs), targets))
    prepared.step()
    sizes = [len(names) for names in prepared.optimizer_names or ()]
    return {"shapes": shapes, "held": held, "after": keep(prepared.shards()), "groups": sizes}


def test_a_model_built_in_pieces_is_the_same_model() -> None:
    whole = run_ranks(built, 2, False, timeout_seconds=SECONDS)
    pieces = run_ranks(built, 2, True, timeout_seconds=SECONDS)

    assert pieces[0]["shapes"] == whole[0]["shapes"]
    assert pieces[0]["groups"] == whole[0]["groups"]
    for when in ("held", "after"):
        found, expected = (assemble([one[when] for one in each]) for each in (pieces, whole))
        assert found.keys() == expected.keys()
        assert [n for n in found if not torch.equal(found[n], expected[n])] == []


def written_into() -> None:
    """Write a weight before set-up, as a surgery may."""
    ranks = launch("cpu")
    strategy = Bench(DEEPSPEED, {"stage": 3, "zero_init": True}, 1, 1e-6, SECONDS).chosen().make()
    ranks.join(strategy.backend)
    model = strategy.construct(models.mlp, ranks.env, Settings())
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        next(model.parameters()).mul_(2.0)


def test_writing_a_weight_that_is_in_pieces_is_an_error() -> None:
    run_ranks(written_into, 1, timeout_seconds=SECONDS)


def loaded_into() -> None:
    """Start from weights, as a user who continues another training does."""
    trainer = Trainer(
        strategy=use("deepspeed", stage=3, zero_init=True),
        data=use("torch", batch_size=4),
        max_steps=1,
        barebones=True,
    )
    with pytest.raises(InvalidArgument, match="was cut into pieces while the model was built"):
        trainer.fit(
            models.mlp,
            TensorDataset(*models.features(8)),
            loss=F.cross_entropy,
            optimizer=partial(AdamW, lr=1e-2),
            init_weights=models.mlp().state_dict(),
        )


def test_weights_are_refused_for_what_is_in_pieces() -> None:
    run_ranks(loaded_into, 1, timeout_seconds=SECONDS)


# ---- a surgery that copies weights ---------------------------------------------------------------


def trained_with_copies(provides: str, zero_init: bool) -> tuple[str, float]:
    """What the plan or the error says, and the loss."""
    strategy = use("deepspeed", stage=3, zero_init=zero_init)
    trainer = Trainer(
        strategy=strategy, surgery=[copying(provides)], max_steps=1, barebones=True, seed=2
    )
    data = DataLoader(TensorDataset(*models.features(4)), 4)
    try:
        result = trainer.fit(models.mlp, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))
    except InvalidArgument as error:
        return str(error), 0.0
    return trainer.plan.explain(), result.metrics["train_loss"]


def test_a_model_whose_weights_a_surgery_copies_is_built_whole() -> None:
    (whole,) = run_ranks(trained_with_copies, 1, "weights.replaced", False)
    (adjusted,) = run_ranks(trained_with_copies, 1, "weights.replaced", True)

    assert "adjusted to zero_init=False" in adjusted[0]
    assert adjusted[1] == whole[1]


def test_copies_of_weights_that_are_in_pieces_are_refused() -> None:
    """The control: without the claim the copy has none of the values."""
    ((problem, _),) = run_ranks(trained_with_copies, 1, "", True)

    assert "'0.weight' was computed from weights that zero_init=True has cut into pieces" in problem
