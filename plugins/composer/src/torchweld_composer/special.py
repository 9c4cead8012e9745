"""The few algorithms of Composer's that need more than their events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchweld.errors import InvalidArgument, SurgeryError
from torchweld.interfaces import Parts
from torchweld_composer.driver import Driver
from torchweld_composer.imports import composer_module
from torchweld_composer.optimizers import SamPiece


def _prepare_gyro_dropout(driver: Driver, _parts: Parts) -> None:
    driver.state.durations_in_epochs = True  # it takes the value of max_duration for epochs


def _prepare_seq_length_warmup(driver: Driver, _parts: Parts) -> None:
    # Its first step is a forward and backward pass of a HuggingFaceModel at full length, to find
    # out whether the memory suffices; the schedule of lengths needs neither.
    driver.algorithm._activated = True


def _prepare_selective_backprop(driver: Driver, parts: Parts) -> None:
    if parts.loss is None:
        raise SurgeryError(
            "selective_backprop chooses samples by their loss, which is computed inside the model "
            "or the step function here; give it to fit: loss=F.cross_entropy"
        )
    driver.state.model = _composer_model(driver, parts.loss)


def _composer_model(driver: Driver, loss: Callable[..., Any]) -> Any:
    """A stand-in of the class that SelectiveBackprop asks for, without parameters of its own."""
    parent: Any = composer_module("composer.models").ComposerModel

    class StandIn(parent):  # type: ignore[misc]  # a class of an untyped library
        """Forward of the prepared model, loss of each sample."""

        def forward(self, batch: Any) -> Any:
            return driver.forward(batch[0])

        def loss(self, outputs: Any, batch: Any, reduction: str = "mean") -> Any:
            try:
                return loss(outputs, batch[1], reduction=reduction)
            except TypeError as error:
                raise InvalidArgument(
                    "selective_backprop needs the loss of each sample, and the loss function takes "
                    f"no reduction={reduction!r} ({error}); use F.cross_entropy or one like it"
                ) from error

    return StandIn()


def _refuse_swa_schedule(driver: Driver, _parts: Parts) -> None:
    if driver.algorithm.schedule_swa_lr:
        raise InvalidArgument(
            "SWA(schedule_swa_lr=True) would step a second schedule beside that of "
            "the run; leave it at False and give lr_scheduler= to fit"
        )


class SampleTransform:
    """Applies an image transform to the first item of a sample."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self._transform = transform

    def __call__(self, sample: Any) -> Any:
        """Return the sample with its image changed."""
        if not isinstance(sample, tuple):
            return self._transform(sample)
        return (self._transform(sample[0]), *sample[1:])


def _randaugment(algorithm: Any) -> SampleTransform:
    make = composer_module("composer.algorithms.randaugment").RandAugmentTransform
    return SampleTransform(
        make(
            severity=algorithm.severity,
            depth=algorithm.depth,
            augmentation_set=algorithm.augmentation_set,
        )
    )


def _augmix(algorithm: Any) -> SampleTransform:
    make = composer_module("composer.algorithms.augmix").AugmentAndMixTransform
    return SampleTransform(
        make(
            severity=algorithm.severity,
            depth=algorithm.depth,
            width=algorithm.width,
            alpha=algorithm.alpha,
            augmentation_set=algorithm.augmentation_set,
        )
    )


def _colout(algorithm: Any) -> SampleTransform:
    make = composer_module("composer.algorithms.colout").ColOutTransform
    return SampleTransform(
        make(p_row=algorithm.p_row, p_col=algorithm.p_col, resize_target=algorithm.resize_target)
    )


PREPARE: Mapping[str, Callable[[Driver, Parts], None]] = {
    "GyroDropout": _prepare_gyro_dropout,
    "SWA": _refuse_swa_schedule,
    "SelectiveBackprop": _prepare_selective_backprop,
    "SeqLengthWarmup": _prepare_seq_length_warmup,
}
"""What is done before the first event."""

OPTIMIZER_OF: Mapping[str, Callable[[Any], Any]] = {"SAM": SamPiece}
"""Optimizer wrappers that do what the algorithm would, and can be resumed."""

SAMPLE_TRANSFORM: Mapping[str, Callable[[Any], SampleTransform]] = {
    "AugMix": _augmix,
    "ColOut": _colout,
    "RandAugment": _randaugment,
}
"""Transforms of single images; Composer puts them into a torchvision dataset."""
