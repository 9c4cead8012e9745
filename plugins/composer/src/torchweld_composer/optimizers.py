"""Sharpness-aware minimisation as an optimizer that can be resumed.

Source: Foret et al. 2020, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
arXiv 2010.01412.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchweld.errors import RunError
from torchweld_composer.imports import composer_module


class SamPiece:
    """An optimizer wrapper that makes Composer's ``SAMOptimizer``; its state is the step count."""

    def __init__(self, algorithm: Any) -> None:
        self._algorithm = algorithm
        self._optimizer: Any = None
        self._step = 0

    def __call__(self, optimizer: Any) -> Any:
        """Return the optimizer that takes two passes every ``interval`` steps."""
        algorithm = self._algorithm
        self._optimizer = _sam_class()(
            base_optimizer=optimizer,
            rho=algorithm.rho,
            epsilon=algorithm.epsilon,
            interval=algorithm.interval,
        )
        self._optimizer.global_step = self._step
        return self._optimizer

    def state_dict(self) -> dict[str, int]:
        """The step count, which decides when the next two passes come."""
        return {"step": self._step if self._optimizer is None else self._optimizer.global_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from this step, before or after the optimizer was made."""
        self._step = state["step"]
        if self._optimizer is not None:
            self._optimizer.global_step = self._step


def _sam_class() -> Any:
    """Composer's class, with one state for both optimizers and a clear word without a closure."""
    parent: Any = composer_module("composer.algorithms.sam.sam").SAMOptimizer

    class SamOptimizer(parent):  # type: ignore[misc]  # a class of an untyped library
        """Keeps the base optimizer's state as its own: Composer's is saved without momentum."""

        needs_closure = True

        @property
        def state(self) -> Any:
            """The base optimizer's state, with SAM's own entry beside it."""
            return self.base_optimizer.state

        @state.setter
        def state(self, value: Any) -> None:
            # The base class of all optimizers sets an empty one; the base optimizer's is kept.
            if value:
                self.base_optimizer.state = value

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """Take one step of one or two passes."""
            if closure is None:
                raise RunError(
                    "sam evaluates the loss twice a step, and this loop calls step() without a "
                    "closure; leave sam out"
                )
            return super().step(lambda **_: closure())

    return SamOptimizer
