"""The pieces of ``Parts`` that ask an algorithm: one small object for each moment of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from torchweld.errors import CheckpointError, RunError
from torchweld.interfaces import Border, Run
from torchweld_composer.batches import own_container, targets_of, with_targets
from torchweld_composer.driver import Driver
from torchweld_composer.events import BATCH, GRADS, LOSS, ONCE_A_STEP, OPTIMIZER, STEP, TARGETS


class BatchPiece:
    """A batch transform: ``AFTER_DATALOADER`` to ``BEFORE_FORWARD``."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._first = driver.actions(BATCH)
        self._later = driver.actions(event for event in BATCH if event not in ONCE_A_STEP)
        once = bool(driver.chosen(ONCE_A_STEP))
        self._counts = once or driver.role.timed or driver.role.watched

    def bind(self, run: Run) -> BatchPiece:
        """Take what only the prepared run knows."""
        self.driver.bind(run)
        return self

    def __call__(self, batch: Any) -> Any:
        """Return the changed batch; the given container is left as it was."""
        driver = self.driver
        actions = self._first
        if self._counts and not driver.clock.micro_batch():
            actions = self._later
        driver.state.batch = batch if type(batch) is tuple else own_container(batch)
        for act in actions:
            act()
        return driver.state.batch


class TargetPiece:
    """A target transform: ``AFTER_FORWARD`` and ``BEFORE_LOSS``."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._actions = driver.actions(TARGETS)
        self._key = getattr(driver.algorithm, "target_key", 1)
        # On dense targets Composer's CutMix pastes into the target tensor in place.
        self._copies = hasattr(driver.algorithm, "_bbox")

    def bind(self, run: Run) -> TargetPiece:
        """Take what only the prepared run knows."""
        self.driver.bind(run)
        return self

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """Return the changed targets."""
        state = self.driver.state
        if self._copies and isinstance(targets, torch.Tensor) and targets.dim() > 2:
            targets = targets.clone()
        state.outputs = outputs
        batch = state.batch
        # The usual pair, in every step: the general way costs six Python calls.
        pair = isinstance(targets, torch.Tensor) and isinstance(batch, (tuple, list))
        if pair:
            state.batch = (batch[0] if batch else None, targets)
        else:
            state.batch = with_targets(batch, targets, self._key)
        for act in self._actions:
            act()
        if state.outputs is not outputs:
            raise RunError(
                f"{self.driver.role.name} replaced the outputs of the model, which a torchweld "
                "surgery cannot; change them in a module of the model instead"
            )
        return state.batch[1] if pair else targets_of(state.batch, targets, self._key)


class LossPiece:
    """Around the loss: ``AFTER_LOSS`` and ``BEFORE_BACKWARD``; in training only."""

    def __init__(self, driver: Driver, loss: Callable[[Any, Any], Any]) -> None:
        self.driver = driver
        self._loss = loss
        self._actions = driver.actions(LOSS)
        self._key = getattr(driver.algorithm, "target_key", 1)
        self._model = SimpleNamespace(loss=self._of_batch)

    def bind(self, run: Run) -> LossPiece:
        """Take what only the prepared run knows."""
        self.driver.bind(run)
        return self

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """Return the loss as the algorithm leaves it."""
        value = self._loss(outputs, targets)
        if not torch.is_grad_enabled():  # evaluation
            return value
        state, model = self.driver.state, self.driver.state.model
        state.outputs = outputs
        state.batch = with_targets(state.batch, targets, self._key)
        state.loss = value["loss"] if isinstance(value, Mapping) else value
        state.model = self._model
        try:
            for act in self._actions:
                act()
        finally:
            state.model = model
        return {**value, "loss": state.loss} if isinstance(value, Mapping) else state.loss

    def _of_batch(self, outputs: Any, batch: Any) -> Any:
        """``ComposerModel.loss``: algorithms give a pair of inputs and targets."""
        value = self._loss(outputs, batch[1])
        return value["loss"] if isinstance(value, Mapping) else value


class GradPiece:
    """A gradient transform: ``AFTER_TRAIN_BATCH``."""

    def __init__(self, driver: Driver) -> None:
        self._actions = driver.actions(GRADS)

    def __call__(self, named: Iterable[tuple[str, Any]]) -> None:
        """Let the algorithm change the gradients of the model in place."""
        for act in self._actions:
            act()


class OptimizerPiece:
    """An optimizer wrapper: ``AFTER_LOAD``."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def __call__(self, optimizer: Any) -> Any:
        """Return the optimizer that the algorithm leaves."""
        state = self.driver.state
        state.optimizers = [optimizer]
        for act in self.driver.actions(OPTIMIZER):
            act()
        (changed,) = state.optimizers
        return changed


class StepPiece:
    """After every applied optimizer step: ``BATCH_END`` and ``BATCH_CHECKPOINT``."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._actions = driver.actions(STEP)

    def bind(self, run: Run) -> StepPiece:
        """Take what only the prepared run knows."""
        self.driver.bind(run)
        return self

    def __call__(self) -> None:
        """Count the step, then ask the algorithm."""
        self.driver.clock.applied()
        for act in self._actions:
            act()


class BorderPiece:
    """A callback: starts and ends of the run, of epochs and of evaluations; keeps the state."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._evaluating = False

    def bind(self, run: Run) -> BorderPiece:
        """Take what only the prepared run knows."""
        self.driver.bind(run)
        return self

    def at(self, border: Border, run: Run) -> None:
        """Ask the algorithm at the events of this border."""
        driver = self.driver
        driver.bind(run)
        events = self._events(border)
        if driver.role.watched:
            driver.refuse_other_events()
        for act in driver.actions(events):
            act()

    def _events(self, border: Border) -> list[str]:
        """Composer's events at this border, in the order of its loop; also moves the clock.

        The end of an evaluation is the next border, whatever its kind: an algorithm that has put
        averaged weights into the model takes them out before anything else happens. The end of an
        epoch is told at the evaluation that follows it, as Composer's loop ends the epoch first.
        """
        clock, kind = self.driver.clock, border.kind
        events: list[str] = []
        if self._evaluating:
            events.append("EVAL_END")
        self._evaluating = "eval_start" in kind
        epoch_ended = clock.at_border(border)
        if "fit_start" in kind:
            events.append("FIT_START")
        if epoch_ended:
            events += ["EPOCH_END", "EPOCH_CHECKPOINT"]
        if self._evaluating:
            events.append("EVAL_START")
        if clock.begins_epoch and kind & {"fit_start", "epoch_end"}:
            events.append("EPOCH_START")
        return [*events, "FIT_END"] if "fit_end" in kind else events

    def state_dict(self) -> dict[str, Any]:
        """Progress, and whatever the algorithm saves."""
        state = {} if self.driver.role.unresumable else dict(self.driver.algorithm.state_dict())
        state.pop("repr", None)  # Composer's own base class writes it; it describes, it is no state
        return {"clock": self.driver.clock.state_dict(), "algorithm": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: Composer's algorithm cannot be continued.
        """
        role = self.driver.role
        if role.unresumable and state["clock"]["step"]:
            raise CheckpointError(
                f"{role.name} cannot be resumed: {role.unresumable}; train from the start, or "
                f"give the weights alone (init_weights=) and leave {role.name} out"
            )
        self.driver.clock.load_state_dict(state["clock"])
        if state["algorithm"]:
            self.driver.algorithm.load_state_dict(dict(state["algorithm"]))


class AveragePiece(BorderPiece):
    """The callback of an algorithm that evaluates with averaged weights.

    Composer puts them into the model for every evaluation. Here evaluation is first with the
    weights that are trained, then with these.
    """

    def _events(self, border: Border) -> list[str]:
        events = super()._events(border)
        return [event for event in events if event not in {"EVAL_START", "EVAL_END"}]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the averaged weights in the model meanwhile; the others come back in any case."""
        for act in self.driver.actions(["EVAL_START"]):
            act()
        try:
            yield
        finally:
            for act in self.driver.actions(["EVAL_END"]):
                act()
