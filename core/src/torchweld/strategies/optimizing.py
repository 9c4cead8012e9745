"""The optimizer step: unscale, transform, clip, apply, zero."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from torchweld.model.names import named_parameters

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from torchweld.interfaces import ParamGroup, SetupRequest

ELEMENTWISE: tuple[type[Optimizer], ...] = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.ASGD,
)
"""What these do to an element depends on that element alone, so each rank can step its own."""


class Gradients(Protocol):
    """What the step does to gradients that a rank does not hold whole."""

    def collect(self) -> None:
        """Hand them to the optimizer's tensors; after the gradient transforms, before clipping."""

    def clip_norm(self, limit: float) -> Tensor:
        """Scale them to a norm of at most ``limit``; returns the full norm, equal on all ranks."""

    def clip_value(self, limit: float) -> None:
        """Clamp every element to ``[-limit, limit]``."""

    def zero(self) -> None:
        """Free them all, set to None."""


class OptimizerStep:
    """Unscale, transform, clip, apply, zero: bound once, with only what this run needs.

    Args:
        model: whose parameters the gradient transforms see.
        request: with an optimizer.
        gradients: where a rank does not hold whole gradients in its parameters; None: it does.
        optimizer: already made and wrapped; None: made here of the request's groups.
        scaler: of fp16, where torch's own would not agree between the ranks.

    Attributes:
        optimizer: the wrapped optimizer; its ``param_groups`` decide the next step.
        scaler: the loss scaler of fp16, else None.
        norm: full gradient norm of the last step where clipping computed it, else None.
    """

    def __init__(
        self,
        model: nn.Module,
        request: SetupRequest,
        *,
        gradients: Gradients | None = None,
        optimizer: Optimizer | None = None,
        scaler: Any | None = None,
    ) -> None:
        self.optimizer = optimizer if optimizer is not None else make_optimizer(request)
        self.scaler = scaler
        if scaler is None and request.settings.precision == "16":
            self.scaler = torch.amp.GradScaler("cuda")
        self.norm: Tensor | None = None
        self._model, self._env = model, request.env
        self._zero = self.optimizer.zero_grad if gradients is None else gradients.zero
        # What the user's own code left in .grad would be added to the first step.
        self._zero()
        self._between = self._between_backward_and_step(request, gradients)

    def bind(self) -> Callable[[], bool]:
        """Return the step of this run: the shortest that does what is asked for."""
        if self.scaler is not None:
            return self._scaled
        # Looked up in each step: a scheduler replaces `optimizer.step` by a counting one.
        optimizer, between, zero = self.optimizer, self._between, self._zero

        def step() -> bool:
            optimizer.step()
            zero()
            return True

        def full_step() -> bool:
            for act in between:
                act()
            optimizer.step()
            zero()
            return True

        return full_step if between else step

    def with_closure(self, closure: Callable[[], Tensor]) -> bool:
        """One step of an optimizer that evaluates the loss itself, perhaps several times."""

        def evaluate(**_: Any) -> Tensor:
            self._zero()
            loss = closure()
            for act in self._between:
                act()
            return self._over_ranks(loss)

        self.optimizer.step(evaluate)  # type: ignore[arg-type]  # torch says float, takes tensors
        self._zero()
        return True

    def _over_ranks(self, loss: Tensor) -> Tensor:
        """The mean over the ranks: by its own loss each would search along the line differently."""
        if self._env.world_size == 1:
            return loss
        mean = loss.detach() / self._env.world_size
        dist.all_reduce(mean, group=self._env.group)
        return mean

    def _between_backward_and_step(
        self, request: SetupRequest, gradients: Gradients | None
    ) -> tuple[Callable[[], None], ...]:
        actions: list[Callable[[], None]] = []
        settings = request.settings
        for transform in request.grad_transforms:
            named = [(n, p) for n, p in named_parameters(self._model) if p.requires_grad]
            actions.append(_call_with(transform, named))
        if gradients is not None:
            actions.append(gradients.collect)
        if settings.gradient_clip_val is not None:
            limit = float(settings.gradient_clip_val)
            if settings.gradient_clip_algorithm == "norm":
                actions.append(self._clip_norm(gradients, limit))
            else:
                actions.append(_clip_value(self._model, gradients, limit))
        return tuple(actions)

    def _clip_norm(self, gradients: Gradients | None, limit: float) -> Callable[[], None]:
        parameters = list(self._model.parameters())

        def clip() -> None:
            self.norm = nn.utils.clip_grad_norm_(parameters, limit)

        def clip_pieces() -> None:
            assert gradients is not None
            self.norm = gradients.clip_norm(limit)

        return clip if gradients is None else clip_pieces

    def _scaled(self) -> bool:
        assert self.scaler is not None
        if self._between:
            self.scaler.unscale_(self.optimizer)
            for act in self._between:
                act()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._zero()
        # The scaler tells a skipped step in no other way than by lowering its scale.
        return bool(self.scaler.get_scale() >= scale)


def plain_groups(request: SetupRequest) -> list[ParamGroup]:
    """The groups of ``request`` as torch takes them, without the names."""
    return [{k: v for k, v in group.items() if k != "names"} for group in request.groups]


def make_optimizer(request: SetupRequest) -> Optimizer:
    """Make the optimizer of the request's groups, and put its wrappers around it."""
    assert request.optimizer is not None
    optimizer = request.optimizer(plain_groups(request))
    for wrap in request.optimizer_wrappers:
        optimizer = wrap(optimizer)
    return optimizer


def _clip_value(model: nn.Module, gradients: Gradients | None, limit: float) -> Callable[[], None]:
    if gradients is not None:
        return partial(gradients.clip_value, limit)
    return partial(nn.utils.clip_grad_value_, list(model.parameters()), limit)


def _call_with(function: Callable[[Any], None], argument: Any) -> Callable[[], None]:
    return lambda: function(argument)
