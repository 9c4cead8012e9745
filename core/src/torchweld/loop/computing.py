"""From a batch to its loss: one function, chosen once for what this run is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torchweld.errors import LoopError
from torchweld.loop.handle import NOT_THE_RUNS_MODEL
from torchweld.model.facts import check_loss, named_loss

if TYPE_CHECKING:
    from torch import Tensor

    from torchweld.loop.recorder import Recorder

Transforms = tuple[Callable[[Any, Any], Any], ...]


def compute_pairs(
    forward: Callable[..., Any], loss: Callable[[Any, Any], Any], transforms: Transforms
) -> Callable[[Any], Any]:
    """Pairs ``(inputs, targets)`` and a loss function."""

    def plain(batch: Any) -> Any:
        inputs, targets = batch
        return loss(forward(inputs), targets)

    def transformed(batch: Any) -> Any:
        inputs, targets = batch
        outputs = forward(inputs)
        for transform in transforms:
            targets = transform(outputs, targets)
        return loss(outputs, targets)

    return transformed if transforms else plain


def compute_mappings(
    forward: Callable[..., Any], loss: Callable[[Any, Any], Any], transforms: Transforms
) -> Callable[[Any], Any]:
    """Mapping batches, passed by keyword, and a loss function that sees the whole batch."""

    def compute(batch: Any) -> Any:
        outputs = forward(**batch)
        targets = batch
        for transform in transforms:
            targets = transform(outputs, targets)
        return loss(outputs, targets)

    return compute


def compute_by_model(forward: Callable[..., Any], first_batch: Any) -> Callable[[Any], Any]:
    """A model that returns its loss."""
    if isinstance(first_batch, Mapping):
        return lambda batch: named_loss(forward(**batch))
    if isinstance(first_batch, (tuple, list)):
        return lambda batch: named_loss(forward(*batch))
    return lambda batch: named_loss(forward(batch))


def compute_by_step(
    step: Callable[[Any, Any], Any], run: Any, recorder: Recorder
) -> Callable[[Any], Tensor]:
    """The user's ``step(run, batch)``; whatever it returns is looked at every time."""
    handle, bare = run.wiring.handle, run.wiring.forward_is_bare

    def compute(batch: Any) -> Tensor:
        handle.used = False
        result = step(run, batch)
        if not (handle.used or bare):
            raise LoopError(NOT_THE_RUNS_MODEL)
        return take_named(result, recorder)

    return compute


def with_names(compute: Callable[[Any], Any], recorder: Recorder) -> Callable[[Any], Tensor]:
    """A loss that is a mapping: train on its ``"loss"``, log the other scalars by name."""
    return lambda batch: take_named(compute(batch), recorder)


def take_named(result: Any, recorder: Recorder) -> Tensor:
    """Return the loss in ``result`` and note its further scalars."""
    loss = check_loss(result)
    if isinstance(result, Mapping):
        recorder.note({name: value for name, value in result.items() if name != "loss"})
    return loss
