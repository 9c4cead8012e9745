"""What the ranks of the strategy suite do: each job prepares a model and tells what it sees."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchweld.checkpoint import Checkpoint, write
from torchweld.interfaces import Env
from torchweld.model.names import canonical
from torchweld.nesting import map_tensors
from torchweld.testing.states import Kept, keep
from torchweld.testing.strategy_session import (
    Case,
    Pair,
    Step,
    Trace,
    local,
    plain_model,
    prepared,
    set_up,
)


def train(case: Case, steps: Sequence[Step]) -> Trace:
    """Take the steps."""
    trace = Trace()
    with prepared(case) as session:
        trace.states.append(session.state())
        for step in steps:
            trace.applied.append(session.take(step))
            norm = session.prepared.grad_norm()
            number = None if norm is None else float(norm)
            trace.norms.append((number, type(norm).__name__))
            trace.states.append(session.state())
    return trace


def names_of(case: Case) -> list[str]:
    """The names that ``named_parameters`` gives."""
    with prepared(case) as session:
        return [name for name, _ in session.prepared.named_parameters()]


def evaluate(case: Case, step: Step, inputs: Tensor) -> tuple[list[Kept], list[Kept], Tensor, Any]:
    """Train a step, then evaluate: the state before and after it, the outputs, the buffers here."""
    with prepared(case) as session:
        if case.optimizer is not None:
            session.take(step)
        session.prepared.mode(False)
        before = session.state()
        with torch.no_grad():
            outputs = session.prepared.evaluate(inputs)
        buffers = {n: b.clone() for n, b in session.model.named_buffers()}
        return before, session.state(), outputs, buffers


def evaluate_between(case: Case, steps: Sequence[Step], inputs: Tensor) -> Trace:
    """Take the steps with an evaluation before each; uneven where that is allowed."""
    trace = Trace()
    with prepared(case) as session:
        uneven = session.env.rank == 0 and not session.prepared.evaluate_is_collective
        for step in steps:
            session.prepared.mode(False)
            with torch.no_grad():
                for _ in range(3 if uneven else 1):
                    session.prepared.evaluate(inputs)
            session.prepared.mode(True)
            trace.states.append(session.state())
            trace.applied.append(session.take(step))
        trace.states.append(session.state())
    return trace


def outputs_of(case: Case, inputs: Tensor) -> tuple[Any, Any, torch.dtype | None]:
    """Outputs of forward and of evaluate, and the dtype seen inside."""
    with prepared(case) as session:
        trained = session.prepared.forward(inputs)
        seen = getattr(session.model, "seen", None)
        session.prepared.mode(False)
        with torch.no_grad():
            evaluated = session.prepared.evaluate(inputs)
        # A graph cannot leave its process.
        return map_tensors(trained, Tensor.detach), evaluated, seen


def gradients_between(case: Case, step: Step) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes of what this rank holds of the trainable parameters, and of their gradients."""
    with prepared(case) as session:
        session.backward(step)
        named = session.prepared.named_parameters()
        return {
            n: (tuple(local(p).shape), None if p.grad is None else local(p.grad).clone())
            for n, p in named
            if p.requires_grad
        }


class Doubling:
    """A gradient transform that notes the names it is given and doubles the gradients."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, named: Any) -> None:
        for name, parameter in named:
            self.names.append(name)
            if parameter.grad is not None:
                parameter.grad.mul_(2.0)


def transform_gradients(case: Case, step: Step) -> tuple[Trace, list[str]]:
    """One step with a transform that doubles the gradients, and the names it saw."""
    doubling = Doubling()
    trace = Trace()
    with prepared(replace(case, grad_transforms=(doubling,))) as session:
        trace.states.append(session.state())
        trace.applied.append(session.take(step))
        trace.states.append(session.state())
    return trace, doubling.names


def read_parameters(case: Case, step: Step) -> tuple[list[Kept], dict[str, Tensor], list[Kept]]:
    """After a step: the pieces, the parameters of this rank, and what is exported of them halved.

    An average is put into the parameters for an evaluation or an export.
    """
    with prepared(case) as session:
        session.take(step)
        state = session.state()
        named = session.prepared.named_parameters()
        shown = {n: local(p.detach()).clone() for n, p in named}
        _halve(session.prepared.named_parameters())
        return state, shown, keep((session.prepared.working_copies or session.prepared.shards)())


def write_parameters(case: Case, step: Step) -> list[list[Kept]]:
    """Halve every parameter between two steps; the pieces before, after and a step later."""
    with prepared(case) as session:
        session.take(step)
        states = [session.state()]
        _halve(session.prepared.named_parameters())
        states.append(session.state())
        session.take(Step(step.window, lr=0.0))
        states.append(session.state())
        return states


@torch.no_grad()
def _halve(named: Iterable[tuple[str, Any]]) -> None:
    for _, parameter in named:
        local(parameter).mul_(0.5)


def strides_after(case: Case, step: Step) -> dict[str, tuple[int, ...]]:
    """Strides of the parameters of a model in channels-last format, after a step."""
    with prepared(case) as session:
        session.take(step)
        return {n: local(p).stride() for n, p in session.prepared.named_parameters()}


def deepcopied(case: Case, step: Step) -> tuple[list[Kept], dict[str, Tensor]]:
    """The pieces after a step, and a deep copy of the model made then and read a step later."""
    with prepared(case) as session:
        session.take(step)
        state, copied = session.state(), copy.deepcopy(session.model)
        session.take(step)
        return state, {canonical(n): local(t.detach()) for n, t in copied.named_parameters()}


def flip_trainable(case: Case, steps: Sequence[Step], prefix: str) -> Trace:
    """Freeze what trains, and train what is frozen, under ``prefix`` after the first step."""
    trace = Trace()
    with prepared(case) as session:
        trace.applied.append(session.take(steps[0]))
        for name, parameter in session.prepared.named_parameters():
            if name.startswith(prefix):
                parameter.requires_grad_(not parameter.requires_grad)
        trace.states.append(session.state())
        trace.applied.append(session.take(steps[1]))
        trace.states.append(session.state())
    return trace


def has_closure(case: Case) -> bool:
    """Whether ``step_closure`` is there."""
    with prepared(case) as session:
        return session.prepared.step_closure is not None


def step_by_closure(case: Case, step: Step) -> Trace:
    """One step through a closure that evaluates the loss."""
    trace = Trace()
    with prepared(case) as session:
        trace.states.append(session.state())

        def closure() -> Tensor:
            loss = session.loss(step.window[0])
            session.prepared.backward(loss)
            return loss.detach()

        assert session.prepared.step_closure is not None
        trace.applied.append(session.prepared.step_closure(closure))
        trace.states.append(session.state())
    return trace


def two_models(first: Case, second: Case, step: Step) -> tuple[Trace, Trace]:
    """Prepare two models by one strategy and train them in turn."""
    traces = Trace(), Trace()
    with prepared(first) as session:
        sessions = session, set_up(second, session.ranks, session.strategy)
        for trace, each in zip(traces, sessions, strict=True):
            trace.states.append(each.state())
        for each in sessions:
            each.backward(step)
        for trace, each in zip(traces, sessions, strict=True):
            trace.applied.append(each.prepared.step())
            trace.states.append(each.state())
    return traces


def save(
    case: Case, steps: Sequence[Step], path: str, after: Step
) -> tuple[list[Kept], list[Kept]]:
    """Train, write a checkpoint, take one more step; the pieces before and after that step."""
    with prepared(case) as session:
        for step in steps:
            session.take(step)
        write(
            Path(path),
            rank=session.env.rank,
            world_size=session.env.world_size,
            exchange=session.ranks.exchange,
            shards=session.prepared.shards(),
            header={},
        )
        saved = session.state()
        session.take(after)
        return saved, session.state()


def resume(case: Case, dirty: Step, path: str, after: Step) -> tuple[list[Kept], list[Kept]]:
    """Train something else, restore the checkpoint, take one step; the pieces before and after."""
    with prepared(case) as session:
        session.take(dirty)
        session.prepared.restore(Checkpoint.open(path))
        restored = session.state()
        session.take(after)
        return restored, session.state()


class _CollectiveCounter(TorchDispatchMode):
    """Notes every call of a collective, also those of C++ (DDP's reducer)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own is untyped
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in {"c10d", "_c10d_functional"} and "wait" not in func.__name__:
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


def collectives(case: Case, step: Step) -> list[str]:
    """The collectives of one step in the middle of training."""
    with prepared(case) as session:
        session.take(step)
        session.take(step)
        counter = _CollectiveCounter()
        with counter:
            session.take(step)
        return counter.calls


ReferenceLoop = Callable[[nn.Module, Env], Callable[[Tensor, Tensor], None]]
"""``(model, env) -> step``: a hand-written loop's body, forward to zeroed gradients."""


def python_calls(case: Case, loop: ReferenceLoop, batch: Pair) -> tuple[float, float]:
    """Python calls of one step: through the strategy, and in the hand-written loop."""
    with prepared(case) as session:
        forward, backward = session.prepared.forward, session.prepared.backward
        apply, (inputs, targets) = session.prepared.step, session.share(batch)

        def ours(inputs: Tensor, targets: Tensor) -> None:
            backward(F.cross_entropy(forward(inputs), targets))
            apply()

        ours_counted = _count_calls(ours, inputs, targets)
        theirs = loop(plain_model(case), session.env)
        return ours_counted, _count_calls(theirs, inputs, targets)


def _count_calls(step: Callable[[Tensor, Tensor], None], inputs: Tensor, targets: Tensor) -> float:
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    for _ in range(3):
        step(inputs, targets)
    sys.setprofile(count)
    try:
        for _ in range(10):
            step(inputs, targets)
    finally:
        sys.setprofile(None)
    return calls / 10
