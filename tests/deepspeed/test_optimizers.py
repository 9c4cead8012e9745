"""Which optimizers ZeRO may step, and what it reads of tensors meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
from torch import Tensor, nn, optim
from torch.optim import SGD, Adagrad

from tests.deepspeed.runs import (
    SECONDS,
    Training,
    by_engine,
    by_hand,
    by_zero,
    decays_matrices,
    initialized,
    told,
    training_of,
)
from torchweld.processes.ranks import launch
from torchweld.testing import models, run_ranks
from torchweld.testing.processes import RanksFailed

PLAIN_SGD = partial(SGD, lr=1.0)


def refused(training: Training, **options: Any) -> None:
    run_ranks(by_zero, 1, training, options, timeout_seconds=SECONDS)


def test_deepspeed_drops_the_groups_of_adagrad() -> None:
    training = training_of("mlp", rule=decays_matrices, optimizer=partial(Adagrad, lr=0.1))

    assert run_ranks(groups_of_adagrad, 1, training, timeout_seconds=SECONDS) == [1]
    with pytest.raises(RanksFailed, match="their learning rates would be lost"):
        refused(training, stage=1)


def groups_of_adagrad(training: Training) -> int:
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    engine = initialized(training.make_model(), training, ranks.env, told(1))
    return len(engine.optimizer.optimizer.param_groups)


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Muon"])
def test_an_optimizer_that_looks_at_more_than_elements_is_refused(name: str) -> None:
    if not hasattr(optim, name):
        pytest.skip(f"this torch has no {name}")
    training = training_of("frozen", optimizer=partial(getattr(optim, name), lr=1e-3))
    if name == "Muon":
        training = training_of("mlp", make_model=matrices, optimizer=training.optimizer)

    with pytest.raises(RanksFailed, match=rf"{name} may look at whole parameters"):
        refused(training, stage=2)


def test_deepspeed_trains_wrongly_with_an_optimizer_that_looks_at_shapes() -> None:
    training = training_of("mlp", optimizer=partial(optim.Adafactor, lr=1e-2), clip=None)
    (expected,) = run_ranks(by_hand, 1, training, timeout_seconds=SECONDS)

    (found,) = run_ranks(by_engine, 1, training, told(2), timeout_seconds=SECONDS)

    apart = [abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True)]
    assert max(apart) >= 1e-4


def half(groups: list[dict[str, Any]]) -> SGD:
    """What is made of half of the parameters, as by a slip in a user's own function."""
    return SGD(groups[0]["params"][:2], lr=0.1)


def test_deepspeed_leaves_half_of_the_parameters_alone_without_a_word() -> None:
    training = training_of("mlp", optimizer=half)

    run_ranks(by_engine, 1, training, told(2), timeout_seconds=SECONDS)

    with pytest.raises(RanksFailed, match="4 parameters in 1 groups and has 2 parameters"):
        refused(training, stage=2)


def items_of(job: Any, training: Training, told_to: Mapping[str, Any]) -> int:
    """How often a tensor was brought to the host one number at a time, set-up included."""
    count = 0
    item: Any = Tensor.item

    def counted(self: Tensor) -> Any:
        nonlocal count
        count += 1
        return item(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "item", counted)
        job(training, told_to)
    return count


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_number_is_brought_to_the_host_beside_the_engines_own(stage: int) -> None:
    training = training_of("mlp")
    config = {**told(stage), "gradient_clipping": 0.5}

    theirs = run_ranks(items_of, 2, by_engine, training, config, timeout_seconds=SECONDS)
    ours = run_ranks(items_of, 2, by_zero, training, {"stage": stage}, timeout_seconds=SECONDS)

    assert len(training.steps) < ours[0] <= theirs[0]


def matrices() -> nn.Module:
    return nn.Linear(models.NUM_FEATURES, models.NUM_CLASSES, bias=False)


def test_compiled_adam_is_refused_for_another_optimizer() -> None:
    training = training_of("mlp", optimizer=PLAIN_SGD)

    with pytest.raises(RanksFailed, match="give Adam or AdamW"):
        refused(training, stage=2, offload_optimizer="cpu", cpu_adam=True)
