"""A few optimizer steps under a strategy, and the same by hand with raw FairScale.

The raw loops show what goes wrong without this plugin's remedies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from torchweld.components import Chosen, Component, Settings
from torchweld.interfaces import GroupRule, OptimizerFactory, ParameterShape, SetupRequest
from torchweld.model.parameters import make_groups
from torchweld.processes.ranks import launch
from torchweld.testing import models
from torchweld.testing.strategy_session import Case, Session
from torchweld_fsdp.fairscale.imports import fairscale_module

MOMENTUM = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01)

Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """What is trained, and what happens on the way.

    Attributes:
        uses_branch: for each micro-batch whether ``models.Branching`` uses its branch.
        freezes: parameters of this prefix are frozen after the second step.
        schedule: ``optimizer -> scheduler``.
        transforms: of the gradients, before they are clipped.
    """

    make_model: Callable[[], nn.Module] = models.mlp
    make_data: Callable[..., Batch] = models.features
    optimizer: OptimizerFactory = MOMENTUM
    wrappers: Sequence[Callable[[Any], Any]] = ()
    settings: Settings = field(default_factory=Settings)
    groups: GroupRule | None = None
    steps: int = 4
    uses_branch: Sequence[bool] = ()
    freezes: str = ""
    schedule: Callable[[Any], Any] | None = None
    transforms: Sequence[Callable[[Any], None]] = ()

    def micro_batches(self, step: int) -> list[tuple[Batch, dict[str, bool]]]:
        """The global batches of one step, and how each goes in."""
        size = self.settings.accumulate_grad_batches
        numbers = range(step * size, (step + 1) * size)
        return [(self.make_data(8, seed=n), self._forward(n)) for n in numbers]

    def _forward(self, number: int) -> dict[str, bool]:
        if not self.uses_branch:
            return {}
        return {"branch": self.uses_branch[number % len(self.uses_branch)]}


@dataclass
class Trained:
    """What one rank has after the training."""

    weights: Weights
    norms: list[Any]
    bytes: Mapping[str, int]


def make_session(
    training: Training, component: Component, options: Mapping[str, Any] | None = None
) -> Session:
    """Prepare the model under a strategy on this rank."""
    made = component.options(**(options or {})) if component.options else None
    chosen = Chosen("strategy", component, made)
    ranks, strategy = launch("cpu"), chosen.make()
    ranks.join(strategy.backend)
    torch.manual_seed(0)
    model = training.make_model()
    request = SetupRequest(
        groups=make_groups(model, training.groups),
        optimizer=training.optimizer,
        optimizer_wrappers=training.wrappers,
        grad_transforms=training.transforms,
        env=ranks.env,
        settings=training.settings,
    )
    prepared = strategy.setup(model, request)
    prepared.mode(True)
    case = Case(chosen, training.make_model, training.settings, training.optimizer)
    return Session(case, ranks, strategy, model, prepared)


def through_torchweld(
    training: Training, component: Component, options: Mapping[str, Any] | None = None
) -> Trained:
    """Take the steps through the contract; the weights are this rank's."""
    session, norms = train(training, component, options)
    return Trained(_weights(session.model), norms, session.prepared.bytes_per_rank())


def train(
    training: Training, component: Component, options: Mapping[str, Any] | None = None
) -> tuple[Session, list[Any]]:
    """Take the steps through the contract; the session, and the norm of every step."""
    session = make_session(training, component, options)
    prepared = session.prepared
    norms: list[Any] = []
    schedule = training.schedule(prepared.optimizer) if training.schedule else None
    for step in range(training.steps):
        _freeze(prepared.named_parameters(), training, step)
        window = training.micro_batches(step)
        for place, (batch, forward) in enumerate(window):
            if prepared.window is not None:
                prepared.window(place == len(window) - 1, len(window))
            prepared.backward(session.loss(batch, **forward))
        prepared.step()
        norms.append(prepared.grad_norm())
        if schedule is not None:
            schedule.step()
    return session, norms


def by_hand(training: Training) -> Trained:
    """Take the steps in plain PyTorch, in one process."""
    torch.manual_seed(0)
    model = training.make_model()
    optimizer = training.optimizer(_groups(model, training))
    schedule = training.schedule(optimizer) if training.schedule else None
    norms: list[Any] = []
    for step in range(training.steps):
        _freeze(model.named_parameters(), training, step)
        _backward(model, training, step)
        for transform in training.transforms:
            transform(list(model.named_parameters()))
        if training.settings.gradient_clip_val is not None:
            limit = training.settings.gradient_clip_val
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit))
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return Trained(_weights(model), norms, {})


def raw_oss(training: Training, *, schedule_inner: bool = False) -> Trained:
    """Take the steps with DDP and a bare OSS."""
    model, oss = _raw_oss_model(training)
    wrapped = DistributedDataParallel(model, find_unused_parameters=bool(training.freezes))
    return _raw_steps(training, model, oss, wrapped, oss.zero_grad, schedule_inner)


def raw_sdp(
    training: Training, *, buffer: int = 2**23, zero: str = "optimizer", set_to_none: bool = True
) -> Trained:
    """Take the steps with ShardedDDP; ``zero``: whose ``zero_grad`` is called."""
    model, oss = _raw_oss_model(training)
    wrap = fairscale_module("fairscale.nn.data_parallel").ShardedDataParallel
    wrapped = wrap(model, oss, reduce_buffer_size=buffer)
    owner = oss if zero == "optimizer" else wrapped
    return _raw_steps(
        training, model, oss, wrapped, partial(owner.zero_grad, set_to_none=set_to_none)
    )


def _raw_oss_model(training: Training) -> tuple[nn.Module, Any]:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = training.make_model()
    groups = _groups(model, training)
    return model, fairscale_module("fairscale.optim").OSS(groups, optim=training.optimizer)


def _raw_steps(
    training: Training,
    model: nn.Module,
    oss: Any,
    wrapped: nn.Module,
    zero_grad: Callable[[], None],
    schedule_inner: bool = False,
) -> Trained:
    made = training.schedule(oss.optim if schedule_inner else oss) if training.schedule else None
    norms: list[Any] = []
    for step in range(training.steps):
        _freeze(model.named_parameters(), training, step)
        _backward(wrapped, training, step, dist.get_rank(), dist.get_world_size())
        if training.settings.gradient_clip_val is not None:
            norms.append(oss.clip_grad_norm(training.settings.gradient_clip_val))
        oss.step()
        zero_grad()
        if made is not None:
            made.step()
    return Trained(_weights(model), norms, {})


def _backward(
    model: nn.Module, training: Training, step: int, rank: int = 0, world_size: int = 1
) -> None:
    window = training.micro_batches(step)
    for place, ((inputs, targets), forward) in enumerate(window):
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = place == len(window) - 1
        elif hasattr(model, "no_sync"):
            model._should_accumulate_grads = place < len(window) - 1  # type: ignore[assignment]
        outputs = model(inputs[rank::world_size], **forward)
        loss = F.cross_entropy(outputs, targets[rank::world_size])
        torch.autograd.backward(loss / len(window))


def _groups(model: nn.Module, training: Training) -> list[dict[str, Any]]:
    made = make_groups(model, training.groups)
    return [{k: v for k, v in group.items() if k != "names"} for group in made]


def _freeze(named: Iterable[tuple[str, Any]], training: Training, step: int) -> None:
    if training.freezes and step == 2:
        for name, parameter in named:
            if name.startswith(training.freezes):
                parameter.requires_grad_(False)


def _weights(model: nn.Module) -> Weights:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def difference(found: Weights, expected: Weights) -> float:
    """The largest difference between two sets of weights."""
    return max(float((found[n] - t).abs().max()) for n, t in expected.items())


def shapes_of(model: nn.Module) -> dict[str, ParameterShape]:
    """What an estimate is made of."""
    named = model.named_parameters()
    return {n: ParameterShape(tuple(p.shape), p.dtype, p.requires_grad) for n, p in named}


# ---- models with blocks ---


class Block(nn.Module):
    """Two layers and a parameter of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(33, 17), nn.Linear(17, 33)
        self.scale = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.outer(torch.tanh(self.inner(inputs)))
        return inputs + self.scale * hidden


class Blocks(nn.Module):
    """Three blocks, the second of which may be left out, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(33, models.NUM_CLASSES)

    def forward(self, inputs: Tensor, *, branch: bool = True) -> Tensor:
        hidden = self.blocks[0](inputs)
        if branch:
            hidden = self.blocks[1](hidden)
        logits: Tensor = self.head(self.blocks[2](hidden))
        return logits


def recomputing() -> nn.Module:
    """Blocks that compute their activations again in backward, as activation checkpointing does."""
    model = Blocks()
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def compiled() -> nn.Module:
    """Blocks whose forward is compiled in place."""
    model = Blocks()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model
