"""From a batch to its loss: one function, chosen once for what this run is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchweld.errors import LoopError
from torchweld.loop.handle import NOT_THE_RUNS_MODEL
from torchweld.model.facts import check_loss, named_loss

if TYPE_CHECKING:
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


def call_model(forward: Callable[..., Any], first_batch: Any) -> Callable[[Any], Any]:
    """Call a model that returns its loss with whole batches of this form."""
    if isinstance(first_batch, Mapping):
        return lambda batch: forward(**batch)
    if isinstance(first_batch, (tuple, list)):
        return lambda batch: forward(*batch)
    return forward


def compute_by_model(
    call: Callable[[Any], Any], names: Sequence[str], recorder: Recorder
) -> Callable[[Any], Any]:
    """A model that returns its loss, alone or with further values.

    Args:
        call: :func:`call_model`.
        names: :func:`scalar_names` of what it returned for the first batch; they are logged.
        recorder: takes them.
    """
    if not names:
        return lambda batch: named_loss(call(batch))

    def compute(batch: Any) -> Any:
        outputs = call(batch)
        recorder.note({name: outputs[name] for name in names})
        return outputs["loss"]

    return compute


def scalar_names(outputs: Any) -> list[str]:
    """The scalars in a mapping beside its loss; a language model returns its logits there too."""
    if not isinstance(outputs, Mapping):
        return []
    return [name for name, value in outputs.items() if name != "loss" and _is_scalar(value)]


def _is_scalar(value: Any) -> bool:
    return value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, (int, float))


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
