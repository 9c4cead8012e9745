"""What the user asks of a Trainer, as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from torchweld.errors import InvalidArgument
from torchweld.loop.metric_objects import check_value_names, value_names
from torchweld.loop.schedules import LRSchedule, refuse_made
from torchweld.model.earlier import EarlierSurgeries
from torchweld.model.names import canonical
from torchweld.spelling import did_you_mean, listing

if TYPE_CHECKING:
    from torchweld.plan import Plan
    from torchweld.registry import Registry
    from torchweld.setup.flags import Duration, Extras


_MEANT = {"loss": ": give one of (outputs, targets), such as torch.nn.functional.cross_entropy"}


@dataclass(frozen=True)
class Config:
    """A Trainer's own arguments."""

    plan: Plan
    registry: Registry
    duration: Duration
    extras: Extras
    devices: int | None
    earlier: EarlierSurgeries = field(default_factory=EarlierSurgeries)


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
        if self.names:
            check_several(self)
        if self.train is None:
            raise InvalidArgument(
                "train=None: give a Dataset, a DataLoader or an iterable of batches"
            )
        if self.optimizer is None:
            raise InvalidArgument(
                "optimizer=None: give a factory such as functools.partial(torch.optim.SGD, lr=0.1)"
            )
        schedulers = self.lr_scheduler if self.names else {"": self.lr_scheduler}
        for scheduler in (schedulers or {}).values():
            if scheduler is not None and not isinstance(scheduler, LRSchedule):
                refuse_made("lr_scheduler=", scheduler)
        check_functions(self, "loss", "step", "eval_step")
        if not self.names:
            check_functions(self, "param_groups")
        check_metric_names(self.metrics)
        _check_loss_parameters(self.loss, self.model)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models where a mapping of several was given, else none."""
        return tuple(self.model) if isinstance(self.model, Mapping) else ()

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


def check_several(request: FitRequest) -> None:
    """Refuse mappings that do not fit each other, before anything is started.

    Raises:
        InvalidArgument: names the argument and what to give.
    """
    names = request.names
    for name in names:
        if not str(name).isidentifier() or _is_taken(name):
            raise InvalidArgument(
                f"model={{{name!r}: …}}: parameters are named after their model, so give a name "
                "such as 'generator'"
            )
    for argument in ("optimizer", "lr_scheduler", "param_groups", "init_weights"):
        given = getattr(request, argument)
        if given is not None:
            _check_mapping(argument, given, names)
    missing = [name for name in names if name not in (request.optimizer or {})]
    if request.optimizer is not None and missing:
        raise InvalidArgument(
            f"optimizer has none for the model {missing[0]!r}: give optimizer={{{missing[0]!r}: "
            "functools.partial(torch.optim.SGD, lr=0.1)}, or None to keep the model frozen"
        )
    if request.val is not None and request.eval_step is None:
        raise InvalidArgument(
            f"val= was given with the models {listing(names)}: say how they are evaluated, "
            "eval_step=(run, batch) -> (outputs, targets)"
        )
    _check_trained(request)


def _is_taken(name: str) -> bool:
    # A wrapper's own name is left out of every parameter's.
    return hasattr(nn.ModuleDict(), name) or canonical(name) != name


def _check_mapping(argument: str, given: Any, names: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise InvalidArgument(
            f"{argument}={type(given).__name__} was given for several models: give a mapping with "
            f"their names ({listing(names)})"
        )
    for name in given:
        if name not in names:
            meant = did_you_mean(str(name), names) or f"the models are {listing(names)}"
            raise InvalidArgument(f"{argument} names {name!r}, which is no model: {meant}")


def _check_trained(request: FitRequest) -> None:
    trained = [name for name, one in (request.optimizer or {}).items() if one is not None]
    if request.optimizer is not None and not trained:
        raise InvalidArgument("optimizer is None for every model: nothing would be trained")
    if request.own_loop:
        return
    if request.step is None:
        raise InvalidArgument(
            f"fit was given the models {listing(request.names)} and no step=: it cannot know how a "
            "loss is made of them; give step=(run, batch) -> loss, or write the loop with prepare"
        )
    if len(trained) > 1:
        raise InvalidArgument(
            f"fit trains one model with one loss, and {listing(trained)} have optimizers: write "
            "the loop with prepare, where each has its backward and step"
        )


def check_functions(request: Any, *names: str) -> None:
    """Refuse what cannot be called.

    Raises:
        InvalidArgument: names the argument.
    """
    for name in names:
        value = getattr(request, name)
        if value is not None and not callable(value):
            raise InvalidArgument(f"{name}={value!r} is no function{_MEANT.get(name, '')}")
        if isinstance(value, type) and issubclass(value, nn.Module):
            made = f"{value.__name__}()"
            raise InvalidArgument(f"{name}={value.__name__} is a class: make one of it, {made}")


def check_metric_names(metrics: Any) -> None:
    """Refuse metrics that are no mapping, or would hide another value.

    Raises:
        InvalidArgument: says what to give.
    """
    if not isinstance(metrics, Mapping):
        raise InvalidArgument(
            f"metrics={metrics!r} has no names: give a mapping such as {{'accuracy': accuracy}}"
        )
    check_value_names({name: value_names(name, metric) for name, metric in metrics.items()})


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
