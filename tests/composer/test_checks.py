"""What Composer loses without a word when it replaces layers."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from tests.composer.small_nets import algorithm, images, operated, small_net
from torchweld.errors import SurgeryError
from torchweld_composer.imports import composer_module


def test_composer_itself_unfreezes_what_it_replaces() -> None:
    model = small_net().requires_grad_(False)

    composer_module("composer.functional").apply_blurpool(model)

    assert [n for n, p in model.named_parameters() if p.requires_grad] != []


def test_frozen_layers_stay_frozen(caplog: pytest.LogCaptureFixture) -> None:
    model = small_net().requires_grad_(False)

    with caplog.at_level(logging.INFO, logger="torchweld"):
        parts = operated([algorithm("BlurPool")], model)

    assert [n for n, p in parts.model.named_parameters() if p.requires_grad] == []
    assert "blurpool: kept 2 parameters of replaced layers frozen" in caplog.text


def test_a_half_frozen_layer_stays_half_frozen() -> None:
    model = small_net(batchnorm=False)
    model[2].weight.requires_grad_(False)

    parts = operated([algorithm("BlurPool")], model)

    flags = {n: p.requires_grad for n, p in parts.model.named_parameters()}
    assert flags["2.conv.weight"] is False
    assert flags["2.conv.bias"] is True


def test_new_layers_beside_a_frozen_one_train() -> None:
    model = small_net().requires_grad_(False)

    parts = operated([algorithm("SqueezeExcite", min_channels=8)], model)

    trainable = [n for n, p in parts.model.named_parameters() if p.requires_grad]
    assert trainable != []
    assert all(".conv." not in name for name in trainable)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    model = small_net().to(dtype)

    parts = operated([algorithm("BlurPool")], model)

    tensors = [*parts.model.parameters(), *parts.model.buffers()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {dtype}
    assert parts.model(images()[0].to(dtype)).dtype == dtype


def test_padding_that_would_become_zeros_is_refused() -> None:
    model = small_net(batchnorm=False)
    model[2] = nn.Conv2d(16, 16, 3, stride=2, padding=1, padding_mode="reflect")

    with pytest.raises(SurgeryError, match=r"blurpool would replace '2' \('reflect' padding\)"):
        operated([algorithm("BlurPool")], model)


def test_a_subclass_that_would_become_a_plain_layer_is_refused() -> None:
    class Standardized(nn.Conv2d):
        pass

    model = small_net(batchnorm=False)
    model[2] = Standardized(16, 16, 3, stride=2, padding=1)

    with pytest.raises(SurgeryError, match=r"'2' \(of class Standardized\)"):
        operated([algorithm("BlurPool")], model)


def test_what_is_not_replaced_may_be_special() -> None:
    model = small_net(batchnorm=False)
    model[0] = nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect")

    parts = operated([algorithm("BlurPool")], model)

    assert parts.model.get_submodule("0").padding_mode == "reflect"


def test_lost_forward_hooks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = small_net(batchnorm=False)
    model[2].register_forward_hook(lambda *_: None)

    with caplog.at_level(logging.WARNING, logger="torchweld"):
        operated([algorithm("BlurPool")], model)

    assert "blurpool: the forward hooks of the replaced layer '2' are gone" in caplog.text


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = small_net()

    with pytest.raises(
        SurgeryError, match=r"blurpool copies weights, and '0.weight' is on the meta"
    ):
        operated([algorithm("BlurPool")], model)


def test_nothing_to_replace_is_no_warning_of_python() -> None:
    operated([algorithm("BlurPool")], nn.Sequential(nn.Linear(2, 2)))
