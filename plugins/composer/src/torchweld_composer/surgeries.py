"""What the four named components build; imported when one of them is selected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchweld.interfaces import Parts
from torchweld.nesting import map_tensors
from torchweld_composer.adapter import AlgorithmSurgery, known_surgery
from torchweld_composer.imports import composer_module
from torchweld_composer.known import KNOWN


def blurpool(
    *, replace_convs: bool, replace_maxpools: bool, blur_first: bool, min_channels: int
) -> AlgorithmSurgery:
    """Composer's ``BlurPool``.

    Source: Zhang 2019, "Making Convolutional Networks Shift-Invariant Again", arXiv 1904.11486.
    """
    algorithm = composer_module("composer.algorithms").BlurPool(
        replace_convs=replace_convs,
        replace_maxpools=replace_maxpools,
        blur_first=blur_first,
        min_channels=min_channels,
    )
    return known_surgery(algorithm, KNOWN["BlurPool"])


def channels_last(*, weights: bool) -> AlgorithmSurgery | ChannelsLastInputs:
    """Composer's ``ChannelsLast``, which changes the weights alone; or the inputs alone."""
    if not weights:
        return ChannelsLastInputs()
    algorithm = composer_module("composer.algorithms").ChannelsLast()
    return known_surgery(algorithm, KNOWN["ChannelsLast"])


def cutmix(*, alpha: float, interpolate_loss: bool, uniform_sampling: bool) -> AlgorithmSurgery:
    """Composer's ``CutMix``.

    Source: Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with
    Localizable Features", arXiv 1905.04899.
    """
    algorithm = composer_module("composer.algorithms").CutMix(
        alpha=alpha, interpolate_loss=interpolate_loss, uniform_sampling=uniform_sampling
    )
    return known_surgery(algorithm, KNOWN["CutMix"])


def label_smoothing(*, smoothing: float) -> AlgorithmSurgery:
    """Composer's ``LabelSmoothing``.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision",
    section 7, arXiv 1512.00567.
    """
    algorithm = composer_module("composer.algorithms").LabelSmoothing(smoothing=smoothing)
    return known_surgery(algorithm, KNOWN["LabelSmoothing"])


class ChannelsLastInputs:
    """Gives the inputs the NHWC format; convolutions then keep it through the model."""

    def apply(self, parts: Parts) -> Parts:
        """Add the input transform."""
        to_last: Callable[[Any], Any] = ToChannelsLast()
        transforms = (*parts.input_transforms, to_last)
        return replace(parts, input_transforms=transforms)


class ToChannelsLast:
    """Gives every 4-D floating tensor the NHWC memory format, where the loader has not.

    Attributes:
        memory_format: tells the data source, which can often make images so at no cost.
    """

    memory_format = torch.channels_last

    def __call__(self, inputs: Any) -> Any:
        """Return ``inputs``, with those tensors as they are that have the format."""
        if isinstance(inputs, Tensor):  # every step: a walk over containers costs five calls
            if inputs.dim() != 4 or not inputs.is_floating_point():
                return inputs
            return inputs.to(memory_format=torch.channels_last)
        return map_tensors(inputs, self)
