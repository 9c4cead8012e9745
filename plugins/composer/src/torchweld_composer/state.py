"""What Composer's algorithms find under ``state`` and ``logger``: records, not its Trainer.

The fields are those that the 28 algorithms of mosaicml 0.32.1 and the published third-party ones
read or write. ``model`` is the bare module: a strategy wraps it, or shards it in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchweld_composer.clock import Clock
from torchweld_composer.imports import composer_module

if TYPE_CHECKING:
    from torch import nn


class AlgorithmLogger:
    """Takes what an algorithm logs and keeps the last value of each name."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Keep the values."""
        self.metrics.update(metrics)

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Keep the values."""
        self.metrics.update(hyperparameters)

    def log_traces(self, traces: Mapping[str, Any]) -> None:
        """Traces are of Composer's engine, which does not run here."""


class BatchesAreHere:
    """Stands for Composer's ``Device``: core has moved model and batches already."""

    def batch_to_device(self, batch: Any) -> Any:
        """The batch itself."""
        return batch

    def tensor_to_device(self, tensor: Any) -> Any:
        """The tensor itself."""
        return tensor

    def module_to_device(self, module: Any) -> Any:
        """The module itself."""
        return module


class AlgorithmState:
    """The state of one algorithm in one run.

    Attributes:
        model: the bare module; a stand-in with ``loss`` while a loss is handed to an algorithm.
        optimizers: empty until the optimizer exists.
        batch: the current one, in a container of its own.
        durations_in_epochs: ``max_duration`` counts epochs, not steps.
    """

    fsdp_config_version = 0
    auto_microbatching = False
    schedulers: tuple[Any, ...] = ()
    callbacks: tuple[Any, ...] = ()
    profiler = None
    precision_config = None
    durations_in_epochs = False

    def __init__(self, model: nn.Module | None, clock: Clock) -> None:
        core = composer_module("composer.core")
        self.model: Any = model
        self.clock = clock
        self.optimizers: Any = []
        self.batch: Any = None
        self.outputs: Any = None
        self.loss: Any = None
        self.scaler: Any = None
        self.dataloader: Any = ()  # not None: an algorithm asserts that there is one
        self.device = BatchesAreHere()
        # Autocast is around run.model already; a context of the algorithm's own would be a second.
        self.precision = core.Precision.FP32
        # The low-precision layers look for autocast themselves; this one lets them be put in.
        self._precision = core.Precision.AMP_BF16
        self._time, self._timestamp = core.Time, core.Timestamp
        helpers = composer_module("composer.utils")
        self._get, self._set = helpers.batch_get, helpers.batch_set

    @property
    def timestamp(self) -> Any:
        """Composer's ``Timestamp`` of now."""
        clock = self.clock
        return self._timestamp(
            epoch=clock.epoch,
            batch=clock.step,
            batch_in_epoch=clock.step_in_epoch,
            sample=clock.samples,
        )

    @property
    def max_duration(self) -> Any:
        """The length of the run as Composer's ``Time``, in steps; None when nobody knows it."""
        total, per_epoch = self.clock.total_steps, self.clock.steps_per_epoch
        if total is None:
            return None
        if self.durations_in_epochs and per_epoch:
            return self._time(-(-total // per_epoch), "ep")
        return self._time(total, "ba")

    @property
    def dataloader_len(self) -> Any:
        """Steps in an epoch as Composer's ``Time``; None when nobody knows."""
        steps = self.clock.steps_per_epoch
        return None if steps is None else self._time(steps, "ba")

    def get_elapsed_duration(self) -> Any:
        """The part of the run that is over, as ``Time`` in [0, 1]; None for an open end."""
        total = self.clock.total_steps
        return None if total is None else self._time(self.clock.step / total, "dur")

    # Composer's helpers ask of every key what kind it is, in 71 Python calls a step of the four
    # named algorithms. What they do with a number and a tuple or list is said here at once.

    def batch_get_item(self, key: Any) -> Any:
        """Item ``key`` of the batch."""
        batch = self.batch
        if type(key) is int and type(batch) in {tuple, list}:
            return batch[key]
        return self._get(batch, key)

    def batch_set_item(self, key: Any, value: Any) -> None:
        """Put ``value`` under ``key`` into the batch."""
        batch = self.batch
        if type(key) is int and type(batch) in {tuple, list}:
            items = list(batch) if type(batch) is tuple else batch
            items[key] = value
            self.batch = tuple(items) if type(batch) is tuple else items
        else:
            self.batch = self._set(batch, key=key, value=value)
