"""What the user asks of a Trainer, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchweld.errors import InvalidArgument

if TYPE_CHECKING:
    from torchweld.flags import Duration, Extras
    from torchweld.plan import Plan
    from torchweld.registry import Registry


@dataclass(frozen=True)
class Config:
    """A Trainer's own arguments."""

    plan: Plan
    registry: Registry
    duration: Duration
    extras: Extras
    devices: int | None
    strict: bool


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

    def check(self) -> None:
        """Refuse what cannot work before anything is started.

        Raises:
            InvalidArgument: names the argument and what to give.
        """
        if isinstance(self.model, Mapping):
            raise InvalidArgument(
                "several models in one run are not supported yet: give one nn.Module, or a function "
                "that returns one"
            )
        if self.train is None:
            raise InvalidArgument(
                "train=None: give a Dataset, a DataLoader or an iterable of batches"
            )
        if self.optimizer is None:
            raise InvalidArgument(
                "optimizer=None: give a factory such as functools.partial(torch.optim.SGD, lr=0.1)"
            )
        for name in ("loss", "step", "eval_step", "lr_scheduler", "param_groups"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise InvalidArgument(f"{name}={value!r} is no function")

    @property
    def val_sets(self) -> Mapping[str, Any]:
        """The validation sets by name; a single one has the empty name."""
        if self.val is None:
            return {}
        return dict(self.val) if isinstance(self.val, Mapping) else {"": self.val}
