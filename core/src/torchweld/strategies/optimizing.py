"""The optimizer step of a strategy whose ranks hold whole gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from torchweld.interfaces import SetupRequest


class OptimizerStep:
    """Unscale, transform, clip, apply, zero: bound once, with only what this run needs.

    Attributes:
        optimizer: the wrapped optimizer; its ``param_groups`` decide the next step.
        scaler: the loss scaler of fp16, else None.
        norm: full gradient norm of the last step where clipping computed it, else None.
    """

    def __init__(self, model: nn.Module, request: SetupRequest) -> None:
        assert request.optimizer is not None
        settings = request.settings
        groups = [{k: v for k, v in group.items() if k != "names"} for group in request.groups]
        self.optimizer: Optimizer = request.optimizer(groups)
        for wrap in request.optimizer_wrappers:
            self.optimizer = wrap(self.optimizer)
        # What the user's own code left in .grad would be added to the first step.
        self.optimizer.zero_grad()
        self.scaler = torch.amp.GradScaler("cuda") if settings.precision == "16" else None
        self.norm: Tensor | None = None
        self._model, self._env = model, request.env
        self._between = self._between_backward_and_step(request)

    def bind(self) -> Callable[[], bool]:
        """Return the step of this run: the shortest that does what is asked for."""
        if self.scaler is not None:
            return self._scaled
        # Looked up in each step: a scheduler replaces `optimizer.step` by a counting one.
        optimizer, between = self.optimizer, self._between

        def step() -> bool:
            optimizer.step()
            optimizer.zero_grad()
            return True

        def full_step() -> bool:
            for act in between:
                act()
            optimizer.step()
            optimizer.zero_grad()
            return True

        return full_step if between else step

    def with_closure(self, closure: Callable[[], Tensor]) -> bool:
        """One step of an optimizer that evaluates the loss itself, perhaps several times."""

        def evaluate(**_: Any) -> Tensor:
            self.optimizer.zero_grad()
            loss = closure()
            for act in self._between:
                act()
            return self._over_ranks(loss)

        self.optimizer.step(evaluate)  # type: ignore[arg-type]  # torch says float, takes tensors
        self.optimizer.zero_grad()
        return True

    def _over_ranks(self, loss: Tensor) -> Tensor:
        """The mean over the ranks: by its own loss each would search along the line differently."""
        if self._env.world_size == 1:
            return loss
        mean = loss.detach() / self._env.world_size
        dist.all_reduce(mean, group=self._env.group)
        return mean

    def _between_backward_and_step(self, request: SetupRequest) -> tuple[Callable[[], None], ...]:
        actions: list[Callable[[], None]] = []
        settings = request.settings
        for transform in request.grad_transforms:
            named = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
            actions.append(_call_with(transform, named))
        if settings.gradient_clip_val is not None:
            limit = float(settings.gradient_clip_val)
            parameters = list(self._model.parameters())
            if settings.gradient_clip_algorithm == "norm":
                actions.append(self._clip_norm(parameters, limit))
            else:
                actions.append(lambda: nn.utils.clip_grad_value_(parameters, limit))
        return tuple(actions)

    def _clip_norm(self, parameters: Sequence[nn.Parameter], limit: float) -> Callable[[], None]:
        def clip() -> None:
            self.norm = nn.utils.clip_grad_norm_(parameters, limit)

        return clip

    def _scaled(self) -> bool:
        assert self.scaler is not None
        if self._between:
            self.scaler.unscale_(self.optimizer)
            for act in self._between:
                act()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        # The scaler tells a skipped step in no other way than by lowering its scale.
        return self.scaler.get_scale() >= scale


def _call_with(function: Callable[[Any], None], argument: Any) -> Callable[[], None]:
    return lambda: function(argument)
