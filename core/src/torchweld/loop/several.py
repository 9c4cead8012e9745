"""The own loop over several models: each with its own backward, step and place in the window."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torchweld.errors import InvalidArgument, LoopError
from torchweld.loop.handle import NOT_THE_RUNS_MODEL
from torchweld.loop.own_loop import OwnLoop, Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from torchweld.loop.run import TrainingRun
    from torchweld.loop.wiring import Member, Wiring

_NOWHERE: deque[Any] = deque(maxlen=0)  # takes all, keeps nothing, and is no call of Python's
_UNUSED, _BACKWARD_BEGUN, _BACKWARD_DONE, _STEPPED = range(4)


@dataclass
class _Turn:
    """What one model did with the running batch.

    Attributes:
        noted: under which name its loss is logged.
        is_bare: calling the user's module is the same as calling the handle.
        waiting: its gradients after a step that only counted, in the first window after a border.
    """

    name: str
    noted: str
    member: Member
    advance: Callable[[], Any]
    is_bare: bool
    state: int = _STEPPED
    loss: Tensor | None = None
    waiting: frozenset[tuple[int, int]] = frozenset()

    def gradients(self) -> frozenset[tuple[int, int]]:
        """Which gradients there are, and how often each was written to."""
        parameters = (p for p in self.member.model.parameters() if p.requires_grad)
        return frozenset((id(g), g._version) for p in parameters if (g := p.grad) is not None)


class SeveralLoop:
    """Hands out batches; of each, a model has exactly one backward and then one step, or neither.

    At least one model must be used with a batch. Batch, window and position are kept by an
    ``OwnLoop``, which is told of a batch once all models that used it were stepped.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        # Whether a model was called is looked at in its own backward.
        self._own = OwnLoop(run, _NOWHERE.append, _NOWHERE.clear, checks_use=False)
        self._accumulates = run.wiring.plan.settings.accumulate_grad_batches > 1
        self._turns = {
            name: _Turn(
                name,
                f"train_loss/{name}",
                member,
                _advance(run.wiring, member),
                member.forward_is_bare,
            )
            for name, member in run.wiring.members.items()
            if member.trains
        }
        self._place = Place(1.0, is_first=True, is_last=True, begins_segment=True)
        self._note = run.wiring.recorder.note if len(self._turns) > 1 else _NOWHERE.append
        self._is_open = False  # a batch was handed out and is not settled
        self._window: set[str] = set()  # models that the running window began with
        self._iterating: Generator[Any, None, None] | None = None
        for name, member in run.wiring.members.items():
            turn = self._turns.get(name)
            handle = member.handle
            handle.backward = partial(self._backward, turn) if turn else partial(_frozen, name)
            handle.step = partial(self._step, turn) if turn else partial(_frozen, name, None)

    @property
    def in_window(self) -> bool:
        """Whether gradients are waiting for a step; a batch that all its models used is done."""
        if any(turn.state in {_BACKWARD_BEGUN, _BACKWARD_DONE} for turn in self._turns.values()):
            return True
        self._settle()
        return self._own.in_window

    def batches(self) -> Iterator[Any]:
        """Batches up to the end of the run; the border work is done between two of them.

        Raises:
            LoopError: a model had its backward with the batch before and not its step, or no model
                used it.
        """
        self._settle()
        if self._iterating is not None:
            self._iterating.close()
        self._iterating = self._hand_out()
        return self._iterating

    def _hand_out(self) -> Generator[Any, None, None]:
        try:
            for batch in self._own.batches():
                self._is_open, self._place = True, self._own.place()
                for turn in self._turns.values():
                    turn.state, turn.member.handle.used = _UNUSED, False
                yield batch
                self._settle()
                if self._is_open:  # nobody used it
                    self._own.check_used()
        finally:
            self._own.interrupt()

    # ---- of the only trained model -------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Gradients of the only model that is trained.

        Raises:
            LoopError: several are.
        """
        self._backward(self._only("backward(loss)"), loss)

    def step(self) -> None:
        """The step of the only model that is trained.

        Raises:
            LoopError: several are.
        """
        self._step(self._only("step()"))

    def _only(self, what: str) -> _Turn:
        if len(self._turns) > 1:
            name, *_ = self._turns
            raise LoopError(
                f"run.{what} was called, and this run trains several models "
                f"({', '.join(self._turns)}): call it of one, run.models[{name!r}].{what}"
            )
        return next(iter(self._turns.values()))

    # ---- of one of the models --------------------------------------------------------------------

    def _backward(self, turn: _Turn, loss: Tensor) -> None:
        what = f"run.models[{turn.name!r}].backward(loss)"
        if turn.state in {_BACKWARD_BEGUN, _BACKWARD_DONE}:
            raise LoopError(
                f"{what} was called twice for one batch, or failed the first time: add the losses "
                "of one model up before it"
            )
        if turn.state == _STEPPED:
            raise LoopError(f"{what} was called without a new batch of run.batches()")
        if not (turn.is_bare or turn.member.handle.used):
            raise LoopError(NOT_THE_RUNS_MODEL.replace("run.model", f"run.models[{turn.name!r}]"))
        turn.state = _BACKWARD_BEGUN
        weight = self._place.weight
        turn.member.prepared.backward(loss if weight == 1.0 else loss * weight)
        turn.state = _BACKWARD_DONE
        turn.loss = loss.detach()
        if self._place.begins_segment and self._place.is_first:
            self._check_others(turn)

    def _check_others(self, turn: _Turn) -> None:
        """Refuse gradients that a loss left in another model; looked for once after each border.

        Without this D would train on G's loss as well, without a word.
        """
        for other in self._turns.values():
            if other is turn or other.state in {_BACKWARD_BEGUN, _BACKWARD_DONE}:
                continue
            own = other.waiting if other.state == _STEPPED else frozenset()
            if other.gradients() - own:
                raise LoopError(
                    f"the loss of {turn.name!r} left gradients in {other.name!r}, which would be "
                    f"added to its own: compute it under `with run.models[{turn.name!r}].alone():` "
                    "or from detached tensors"
                )

    def _step(self, turn: _Turn) -> None:
        if turn.state != _BACKWARD_DONE:
            raise LoopError(
                f"run.models[{turn.name!r}].step() was called twice for one batch, or without a "
                "backward of this model before it: call each exactly once a batch"
            )
        turn.state = _STEPPED
        place = self._place
        if place.begins_segment and place.is_first:
            turn.waiting = frozenset() if place.is_last else turn.gradients()
        if place.is_last:
            turn.advance()

    # ---- the batch as a whole ------------------------------------------------------------------

    def _settle(self) -> None:
        """Count the batch that was handed out; a model that did not use it is left out."""
        if not self._is_open:
            return
        losses: dict[str, Tensor] = {}
        for turn in self._turns.values():
            if turn.state in {_BACKWARD_BEGUN, _BACKWARD_DONE}:
                raise LoopError(
                    f"run.models[{turn.name!r}].step() is missing after its backward, or that "
                    "failed: call it once for every batch that the model is trained with, also "
                    "inside an accumulation window, where it only counts"
                )
            if turn.loss is not None:
                losses[turn.noted] = turn.loss
        if not losses:
            return  # the loop underneath refuses to read another
        if self._accumulates:
            self._check_window()
        self._note(losses)
        self._is_open = False
        for turn in self._turns.values():
            turn.state, turn.loss = _STEPPED, None
        self._own.backward(sum(losses.values()))  # type: ignore[arg-type]  # at least one tensor
        self._own.step()

    def _check_window(self) -> None:
        used = {name for name, turn in self._turns.items() if turn.loss is not None}
        if self._place.is_first:
            self._window = used
        odd = self._window ^ used
        if odd:
            raise LoopError(
                f"{', '.join(sorted(odd))} took part in one batch of an accumulation window and "
                "not in another, so that a part of its gradients would be missing or left over: "
                "train a model with every batch of a window or with none"
            )

    def close(self) -> None:
        """End the iteration; the border that was reached, if any, is worked off.

        Raises:
            LoopError: a model had its backward with the last batch and not its step.
        """
        if self._iterating is not None:
            self._iterating.close()
        self._settle()
        self._own.close()


def _advance(wiring: Wiring, member: Member) -> Callable[[], Any]:
    """Step and schedule of one model."""
    return replace(wiring, prepared=member.prepared, schedule=member.schedule).advance()


def _frozen(name: str, _loss: Any) -> None:
    raise InvalidArgument(
        f"the model {name!r} has optimizer={{{name!r}: None}} and is not trained: give it an "
        "optimizer, or leave its backward and step out"
    )
