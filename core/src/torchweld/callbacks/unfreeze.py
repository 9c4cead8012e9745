"""Trains layers from an epoch on that were frozen before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torchweld.errors import InvalidArgument

if TYPE_CHECKING:
    from torchweld.interfaces import Border, ModelHandle, Run


class Unfreeze:
    """Makes frozen parameters trainable at the beginning of an epoch.

    Freeze them before ``fit`` with ``requires_grad_(False)``; they are in the optimizer all along.
    Only under strategies that provide ``params.may_unfreeze``. Layers that you had put into
    evaluation (a BatchNorm) stay in it.

    Args:
        names: beginnings of canonical parameter names, e.g. ``"backbone."``.
        at_epoch: the first epoch in which they are trained, counted from 0.
        model: which model of a run of several, by its name there.
    """

    def __init__(
        self, names: str | Sequence[str], *, at_epoch: int, model: str | None = None
    ) -> None:
        if at_epoch < 1:
            raise InvalidArgument(
                f"at_epoch={at_epoch}: epochs count from 0, and what is trained from the first on "
                "need not be frozen; give at least 1"
            )
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.at_epoch, self.model = at_epoch, model
        self._done = False

    def at(self, border: Border, run: Run) -> None:
        """Unfreeze once the epoch has come; every rank does so at the same border."""
        if "fit_start" in border.kind:
            self._done = False
            self._check(border, run)
        if self._done or border.progress.epoch < self.at_epoch or "fit_end" in border.kind:
            return
        self._done = True
        parameters = self._chosen(run)
        for _, parameter in parameters:
            parameter.requires_grad_(True)
        run.say(f"epoch {border.progress.epoch + 1}: {len(parameters)} parameters are trained now")

    def __repr__(self) -> str:
        of = "" if self.model is None else f", model={self.model!r}"
        return f"Unfreeze({list(self.names)}, at_epoch={self.at_epoch}{of})"

    def _chosen(self, run: Run) -> list[tuple[str, Any]]:
        named = self._handle(run).named_parameters()
        return [(name, p) for name, p in named if name.startswith(self.names)]

    def _handle(self, run: Run) -> ModelHandle:
        if self.model is None and len(run.models) == 1:
            return run.model
        if self.model is None or self.model not in run.models:
            which = ", ".join(f"model={name!r}" for name in run.models)
            raise InvalidArgument(f"{self}: say of which model of this run ({which})")
        return run.models[self.model]

    def _check(self, border: Border, run: Run) -> None:
        """Refuse before step 1 what could not work.

        Raises:
            InvalidArgument: the strategy, the names, or nothing is frozen.
        """
        strategy = run.plan.strategy
        assert strategy is not None
        if "params.may_unfreeze" not in strategy.claims(run.plan.settings).provides:
            raise InvalidArgument(
                f"{self}: strategy {strategy.name!r} does not provide 'params.may_unfreeze'; make "
                "two runs of it, the second with init_weights= of what the first exported"
            )
        chosen, handle = self._chosen(run), self._handle(run)
        if handle.optimizer is None:
            raise InvalidArgument(f"{self}: this model has no optimizer that could train it")
        if not chosen:
            known = ", ".join(name for name, _ in handle.named_parameters())
            raise InvalidArgument(f"{self}: no parameter has such a name (there are {known})")
        early = border.progress.epoch < self.at_epoch
        trained = [name for name, parameter in chosen if parameter.requires_grad]
        if early and trained:
            raise InvalidArgument(
                f"{self}: {trained[0]!r} is trained already; freeze it before fit with "
                "requires_grad_(False)"
            )
