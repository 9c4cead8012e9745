"""What the user asks of a Trainer, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from torchweld.errors import InvalidArgument

if TYPE_CHECKING:
    from torchweld.plan import Plan
    from torchweld.registry import Registry
    from torchweld.setup.flags import Duration, Extras


@dataclass(frozen=True)
class Config:
    """A Trainer's own arguments."""

    plan: Plan
    registry: Registry
    duration: Duration
    extras: Extras
    devices: int | None


@dataclass(frozen=True)
class FitRequest:
    """The arguments of ``fit`` and ``prepare``."""

    model: Any
    train: Any = None
    val: Any = None
    loss: Any = None
    step: Any = None
    eval_step: Any = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    lr_scheduler: Any = None
    param_groups: Any = None
    init_weights: Any = None
    ckpt_path: str | Path | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    own_loop: bool = False

    def check(self) -> None:
        """Refuse what cannot work before anything is started.

        Raises:
            InvalidArgument: names the argument and what to give.
        """
        if isinstance(self.model, Mapping):
            raise InvalidArgument(
                "several models in one run are not supported yet: give one nn.Module, or a "
                "function that returns one"
            )
        if self.train is None:
            raise InvalidArgument(
                "train=None: give a Dataset, a DataLoader or an iterable of batches"
            )
        if self.optimizer is None:
            raise InvalidArgument(
                "optimizer=None: give a factory such as functools.partial(torch.optim.SGD, lr=0.1)"
            )
        if self.lr_scheduler is not None and not callable(self.lr_scheduler):
            raise InvalidArgument(
                f"lr_scheduler={type(self.lr_scheduler).__name__}(…) belongs to an optimizer made "
                "before; give a function (optimizer, total_steps) -> scheduler"
            )
        check_functions(self, "loss", "step", "eval_step", "param_groups")
        check_metric_names(self.metrics)
        _check_loss_parameters(self.loss, self.model)

    @property
    def model_has_loss(self) -> bool:
        """Whether the model returns its loss, so that it is called with whole batches."""
        return self.loss is None and self.step is None and not self.own_loop

    @property
    def val_sets(self) -> Mapping[str, Any]:
        """The validation sets by name; a single one has the empty name."""
        if self.val is None:
            return {}
        return dict(self.val) if isinstance(self.val, Mapping) else {"": self.val}


def check_functions(request: Any, *names: str) -> None:
    """Refuse what cannot be called.

    Raises:
        InvalidArgument: names the argument.
    """
    for name in names:
        value = getattr(request, name)
        if value is not None and not callable(value):
            raise InvalidArgument(f"{name}={value!r} is no function")


def check_metric_names(metrics: Any) -> None:
    """Refuse metrics that are no mapping, or would hide another value.

    Raises:
        InvalidArgument: says what to give.
    """
    if not isinstance(metrics, Mapping):
        raise InvalidArgument(
            f"metrics={metrics!r} has no names: give a mapping such as {{'accuracy': accuracy}}"
        )
    if "loss" in metrics:
        raise InvalidArgument(
            "metrics={'loss': …}: the loss is measured under this name already; choose another"
        )


def _check_loss_parameters(loss: Any, model: Any) -> None:
    """Refuse a loss with parameters of its own: no group holds them, so nobody would train them."""
    if not isinstance(loss, nn.Module) or not isinstance(model, nn.Module):
        return
    trained = {id(parameter) for parameter in model.parameters()}
    for name, parameter in loss.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            raise InvalidArgument(
                f"loss has a trainable parameter {name!r} that is not the model's and would not be "
                "trained: make the loss a part of the model, which then returns it"
            )
