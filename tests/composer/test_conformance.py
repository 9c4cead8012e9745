"""The four named surgeries, held to what every stranger's is held to."""

from __future__ import annotations

from typing import ClassVar

from torchweld.testing import SurgeryConformance
from torchweld_composer import BLURPOOL, CHANNELS_LAST, CUTMIX, LABEL_SMOOTHING

WRAPPED = ("composer", "torchvision")


class TestBlurPool(SurgeryConformance):
    component = BLURPOOL
    wrapped = WRAPPED
    invalid_options = (
        {"min_channels": 0},
        {"replace_convs": False, "replace_maxpools": False},
    )


class TestChannelsLast(SurgeryConformance):
    component = CHANNELS_LAST
    wrapped = WRAPPED


class TestChannelsLastOfInputs(SurgeryConformance):
    component = CHANNELS_LAST
    options: ClassVar = {"weights": False}
    wrapped = WRAPPED


class TestCutMix(SurgeryConformance):
    component = CUTMIX
    wrapped = WRAPPED
    invalid_options = ({"alpha": 0.0}, {"alpha": -1.0}, {"alpha": float("nan")})


class TestCutMixOfLosses(SurgeryConformance):
    component = CUTMIX
    options: ClassVar = {"interpolate_loss": True}
    wrapped = WRAPPED


class TestLabelSmoothing(SurgeryConformance):
    component = LABEL_SMOOTHING
    wrapped = WRAPPED
    invalid_options = ({"smoothing": -0.1}, {"smoothing": 1.5})
