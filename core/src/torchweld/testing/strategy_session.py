"""One model under one strategy on this rank, driven through the contract as the loop drives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from torchweld.components import Chosen, Settings
from torchweld.interfaces import Env, OptimizerFactory, Prepared, SetupRequest, Strategy
from torchweld.model.parameters import make_groups
from torchweld.processes.ranks import Ranks, launch
from torchweld.testing.states import Kept, keep

LR = 1024.0
"""So large that ``(w0 - w1) / LR`` shows a gradient to 2e-7; with 1 it is 4e-6."""

READABLE_SGD = partial(SGD, lr=LR)
DEFAULTS = Settings()

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Step:
    """One optimizer step: the global batches of its accumulation window, and how they go in."""

    window: tuple[Pair, ...]
    lr: float = LR
    forward: Mapping[str, Any] = field(default_factory=dict)
    branch_by_rank: bool = False


@dataclass(frozen=True)
class Case:
    """One model under one strategy, as every rank makes it.

    Attributes:
        scale: factor of the loss.
        seed_by_rank: every rank starts with other weights.
    """

    chosen: Chosen
    make_model: Callable[[], nn.Module]
    settings: Settings = DEFAULTS
    optimizer: OptimizerFactory | None = READABLE_SGD
    scale: float = 1.0
    seed_by_rank: bool = False
    seed: int = 0
    grad_transforms: Sequence[Callable[[Any], None]] = ()


@dataclass
class Trace:
    """What one rank saw.

    Attributes:
        states: this rank's pieces after set-up and after every step.
        applied: what ``step()`` returned.
        norms: ``grad_norm()`` after every step, and the name of its type.
    """

    states: list[list[Kept]] = field(default_factory=list)
    applied: list[object] = field(default_factory=list)
    norms: list[tuple[float | None, str]] = field(default_factory=list)


@dataclass
class Session:
    """A prepared model on this rank."""

    case: Case
    ranks: Ranks
    strategy: Strategy
    model: nn.Module
    prepared: Prepared

    @property
    def env(self) -> Env:
        """This rank among the others."""
        return self.ranks.env

    def state(self) -> list[Kept]:
        """This rank's pieces, copied."""
        return keep(self.prepared.shards())

    def share(self, batch: Pair) -> Pair:
        """This rank's part of a global batch."""
        inputs, targets = batch
        mine = slice(self.env.rank, None, self.env.world_size)
        return inputs[mine], targets[mine]

    def loss(self, batch: Pair, **forward: Any) -> Tensor:
        """The scaled loss of this rank's part."""
        inputs, targets = self.share(batch)
        return scaled_loss(self.prepared.forward(inputs, **forward), targets, self.case.scale)

    def take(self, step: Step) -> object:
        """Take one optimizer step as the loop does; returns what ``step()`` returned."""
        self.set_lr(step.lr)
        self.backward(step)
        return self.prepared.step()

    def backward(self, step: Step) -> None:
        """Forward and backward of a whole window, each announced as the loop announces it."""
        size = len(step.window)
        tell = self.prepared.window if self.case.settings.accumulate_grad_batches > 1 else None
        forward = dict(step.forward)
        if step.branch_by_rank:
            forward["branch"] = self.env.rank == 0
        for index, batch in enumerate(step.window):
            last = index == size - 1
            if tell is not None and (index == 0 or last):
                tell(last, size)
            self.prepared.backward(self.loss(batch, **forward))

    def set_lr(self, lr: float) -> None:
        """Set the learning rate as a schedule does."""
        assert self.prepared.optimizer is not None, "setup() was given an optimizer, and shows none"
        for group in self.prepared.optimizer.param_groups:
            group["lr"] = lr


def scaled_loss(outputs: Any, targets: Tensor, scale: float) -> Tensor:
    """Mean cross-entropy times ``scale``; of ``outputs["logits"]`` where they are a mapping."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
    return F.cross_entropy(logits, targets) * scale


@contextmanager
def prepared(case: Case) -> Iterator[Session]:
    """Launch, build and set up in the order that core does it."""
    ranks = launch("cpu")
    strategy: Strategy = case.chosen.make()
    ranks.join(strategy.backend)
    session = set_up(case, ranks, strategy)
    yield session
    strategy.teardown()


def set_up(case: Case, ranks: Ranks, strategy: Strategy) -> Session:
    """Build the model of a case and let ``strategy`` prepare it."""
    torch.manual_seed(case.seed + ranks.rank * case.seed_by_rank)
    model = case.make_model()
    request = SetupRequest(
        groups=make_groups(model, None),
        optimizer=case.optimizer,
        optimizer_wrappers=(),
        grad_transforms=case.grad_transforms,
        env=ranks.env,
        settings=case.settings,
    )
    result = strategy.setup(model, request)
    result.mode(True)
    return Session(case, ranks, strategy, model, result)


def plain_model(case: Case, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The same model without a strategy, with the weights of rank 0 or the given ones."""
    torch.manual_seed(case.seed)
    model = case.make_model()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return model


def local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, which may be a DTensor."""
    return cast(Tensor, tensor.to_local() if hasattr(tensor, "to_local") else tensor)
