"""Every rule that the plugin declares, with the trouble it prevents."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.composer.small_nets import (
    CLASSES,
    algorithm,
    images,
    loader,
    operated,
    seed_all,
    small_net,
    train_parts,
)
from torchweld.errors import PluginError, SurgeryError
from torchweld.interfaces import Parts
from torchweld_composer.imports import composer_module


def targets_of(parts: Parts, seed: int = 5) -> Tensor:
    """The targets of one step."""
    seed_all(seed)
    batch: Any = images()
    for transform in parts.batch_transforms:
        batch = transform(batch)
    outputs = torch.zeros(24, CLASSES)
    targets: Tensor = batch[1]
    for change in parts.target_transforms:
        targets = change(outputs, targets)
    return targets


def formats(model: nn.Module) -> list[bool]:
    """Of every convolution with more than one input channel and weight: whether it is NHWC."""
    return [
        m.weight.is_contiguous(memory_format=torch.channels_last)
        for m in model.modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)
    ]


@pytest.mark.parametrize("mixer", ["CutMix", "MixUp"])
def test_smoothing_before_mixing_smooths_too_little(mixer: str) -> None:
    """cutmix, mixup before targets.smoothed."""
    mix = algorithm(mixer, alpha=1.0)
    right = targets_of(operated([mix, algorithm("LabelSmoothing")], small_net()))
    wrong = targets_of(operated([algorithm("LabelSmoothing"), mix], small_net()))

    assert right.min().item() == pytest.approx(0.1 / CLASSES)
    assert wrong.min().item() < 0.9 * 0.1 / CLASSES


def test_a_layer_replaced_after_channels_last_loses_the_format() -> None:
    """channels_last after weights.replaced."""
    right = operated([algorithm("BlurPool"), algorithm("ChannelsLast")], small_net())
    wrong = operated([algorithm("ChannelsLast"), algorithm("BlurPool")], small_net())

    assert formats(right.model) == [True, True]
    assert formats(wrong.model) == [True, False]


def test_a_layer_replaced_after_weight_standardization_loses_it() -> None:
    """weight_standardization after weights.replaced."""
    standardized, blur = algorithm("WeightStandardization"), algorithm("BlurPool")

    wrong = operated([standardized], small_net()).model
    composer_module("composer.functional").apply_blurpool(wrong)

    assert _parametrized(operated([blur, standardized], small_net()).model) == 2
    assert _parametrized(wrong) == 1
    with pytest.raises(SurgeryError, match="ParametrizedConv2d"):
        operated([standardized, blur], small_net())


def _parametrized(model: nn.Module) -> int:
    return sum(torch.nn.utils.parametrize.is_parametrized(m) for m in model.modules())


@pytest.mark.parametrize("names", [("CutMix", "MixUp"), ("MixUp", "CutMix")])
def test_two_mixers_train_on_wrong_targets(names: tuple[str, str]) -> None:
    """Mixers forbid targets.soft: the share of each source image is not what the target says."""
    parts = operated([algorithm(name, alpha=1.0) for name in names], small_net())
    seed_all(0)
    sources = torch.eye(24).reshape(24, 24, 1, 1).expand(24, 24, 8, 8).contiguous()
    classes = torch.arange(24)

    batch: Any = (sources, classes)
    for transform in parts.batch_transforms:
        batch = transform(batch)
    outputs, targets = torch.zeros(24, 24), batch[1]
    for change in parts.target_transforms:
        targets = change(outputs, targets)

    truth = batch[0].mean(dim=(2, 3))
    assert (targets - truth).abs().sum(dim=1).mean() > 0.02


@pytest.mark.parametrize("name", ["CutMix", "MixUp"])
def test_one_mixer_trains_on_right_targets(name: str) -> None:
    parts = operated([algorithm(name)], small_net())
    seed_all(0)
    sources = torch.eye(24).reshape(24, 24, 1, 1).expand(24, 24, 8, 8).contiguous()

    mixed, targets = parts.batch_transforms[0]((sources, torch.arange(24)))
    soft = parts.target_transforms[0](torch.zeros(24, 24), targets)

    # Means over 64 pixels in fp32.
    torch.testing.assert_close(mixed.mean(dim=(2, 3)), soft, rtol=0, atol=1e-6)


def test_smoothing_twice_smooths_too_much() -> None:
    """label_smoothing forbids loss.smooths and targets.smoothed."""
    once = targets_of(operated([algorithm("LabelSmoothing")], small_net()))
    twice = targets_of(operated([algorithm("LabelSmoothing")] * 2, small_net()))
    outputs = torch.randn(24, CLASSES, generator=torch.Generator().manual_seed(0))

    assert twice.max() < once.max()
    smoothed_loss = partial(F.cross_entropy, label_smoothing=0.1)
    assert not torch.allclose(smoothed_loss(outputs, once), F.cross_entropy(outputs, once))


@pytest.mark.filterwarnings("ignore:Negative label indices:UserWarning")  # of Composer
@pytest.mark.parametrize("name", ["LabelSmoothing", "CutMix", "MixUp"])
def test_an_ignored_target_is_trained_on_once_it_is_a_probability(name: str) -> None:
    """What makes probabilities of targets forbids targets.ignored."""
    outputs = torch.randn(24, CLASSES, generator=torch.Generator().manual_seed(0))
    inputs, targets = images()
    targets[::2] = -100  # as ignore_index has it
    parts = operated([algorithm(name)], small_net())
    batch: Any = (inputs, targets)
    seed_all(5)
    for transform in parts.batch_transforms:
        batch = transform(batch)
    soft = parts.target_transforms[0](outputs, batch[1])

    right, wrong = F.cross_entropy(outputs, targets), F.cross_entropy(outputs, soft)

    assert abs(float(right) - float(wrong)) > 0.1


def test_ghost_batches_before_and_after_synchronised_batchnorm() -> None:
    """core synchronises after surgery: Composer finds no BatchNorm to replace afterwards."""
    ghost = composer_module("composer.algorithms.ghost_batchnorm")
    first = operated([algorithm("GhostBatchNorm", ghost_batch_size=2)], small_net()).model
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(first)
    late = nn.SyncBatchNorm.convert_sync_batchnorm(small_net())
    ghost.apply_ghost_batchnorm(late, ghost_batch_size=2)

    def kinds(model: nn.Module) -> list[str]:
        return [type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__]

    assert "GhostBatchNorm2d" in kinds(synchronised)
    assert kinds(late) == ["SyncBatchNorm"]


def test_mixing_losses_under_smoothing_leaves_half_of_it_out() -> None:
    """cutmix with interpolate_loss=True forbids targets.smoothed."""
    seed_all(1)
    inputs, hard = images()
    right = operated([algorithm("CutMix"), algorithm("LabelSmoothing")], small_net())
    wrong = operated(
        [algorithm("CutMix", interpolate_loss=True), algorithm("LabelSmoothing")], small_net()
    )
    wrong.model.load_state_dict(right.model.state_dict())

    assert abs(_loss(right, inputs, hard) - _loss(wrong, inputs, hard)) > 1e-4


def _loss(parts: Parts, inputs: Tensor, targets: Tensor) -> float:
    seed_all(3)
    mixed, changed = parts.batch_transforms[0]((inputs, targets))
    outputs = parts.model.eval()(mixed)
    for change in parts.target_transforms:
        changed = change(outputs, changed)
    assert parts.loss is not None
    return float(parts.loss(outputs, changed))


@pytest.mark.parametrize("name", ["CutMix", "MixUp", "LabelSmoothing"])
def test_a_loss_of_class_indices_cannot_take_soft_targets(name: str) -> None:
    """requires loss.accepts_soft_targets."""
    soft = targets_of(operated([algorithm(name)], small_net()))

    with pytest.raises(RuntimeError):
        F.nll_loss(torch.zeros(24, CLASSES), soft)


def test_cutmix_of_flat_inputs_fails() -> None:
    """cutmix requires inputs.4d."""
    parts = operated([algorithm("CutMix")], small_net())

    with pytest.raises(PluginError, match="cutmix failed at Composer's event BEFORE_FORWARD"):
        parts.batch_transforms[0]((torch.zeros(8, 5), torch.zeros(8, dtype=torch.int64)))


def test_blurpool_and_channels_last_do_nothing_without_convolutions() -> None:
    """require model.conv."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = copy.deepcopy(model.state_dict())

    parts = operated([algorithm("BlurPool"), algorithm("ChannelsLast")], model)

    assert list(parts.model.state_dict()) == list(before)
    assert all(p.stride() == before[n].stride() for n, p in parts.model.state_dict().items())


def test_blurpool_fails_when_weights_are_cast_and_its_filters_are_not() -> None:
    """blurpool requires precision.uniform."""
    parts = operated([algorithm("BlurPool")], small_net(batchnorm=False))
    for parameter in parts.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)

    with pytest.raises(RuntimeError):
        parts.model(images()[0].to(torch.bfloat16))


@pytest.mark.slow
def test_blurpool_breaks_a_compiled_graph() -> None:
    """blurpool forbids compile, as a warning."""
    plain, blurred = small_net(), operated([algorithm("BlurPool")], small_net()).model
    x = images()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own use of itself
        breaks = [torch._dynamo.explain(m)(x).graph_break_count for m in (plain, blurred)]

    assert breaks[0] == 0
    assert breaks[1] > 0


def test_fsdp_like_flattening_loses_the_strides_of_channels_last() -> None:
    """channels_last adapts weights=False unless params.strided: a flat copy has no strides."""
    model = operated([algorithm("ChannelsLast")], small_net()).model
    weight = next(p for p in model.parameters() if p.dim() == 4)

    with pytest.raises(RuntimeError, match="view"):
        weight.view(-1)


def test_the_four_that_have_no_rule_between_them_commute() -> None:
    """channels_last and cutmix, blurpool and label_smoothing, …: no rule, and none is needed."""
    names = ("BlurPool", "ChannelsLast", "CutMix", "LabelSmoothing")
    others = ("CutMix", "BlurPool", "LabelSmoothing", "ChannelsLast")
    seed_all(0)
    model = small_net()

    losses = [
        train_parts([algorithm(n) for n in listing], copy.deepcopy(model), loader())
        for listing in (names, others)
    ]

    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_inputs_in_channels_last_commute_with_cutmix() -> None:
    """channels_last(weights=False) and cutmix both edit batch.inputs, without a rule."""
    from torchweld_composer.surgeries import ToChannelsLast

    parts = operated([algorithm("CutMix")], small_net())
    inputs, targets = images()

    seed_all(9)
    after = ToChannelsLast()(parts.batch_transforms[0]((inputs, targets))[0])
    seed_all(9)
    before = parts.batch_transforms[0]((ToChannelsLast()(inputs), targets))[0]

    assert torch.equal(after, before)
    assert after.stride() == before.stride()


def test_selective_backprop_after_a_batch_edit_sees_the_edited_samples() -> None:
    """selective_backprop before cutout and the others: it must choose by the sample itself."""
    seed_all(0)
    model = small_net(batchnorm=False)
    objects = [algorithm("SelectiveBackprop", start=0.0, end=1.0, interrupt=0), algorithm("CutOut")]
    losses = [
        train_parts(listing, copy.deepcopy(model), loader())
        for listing in (objects, [copy.deepcopy(o) for o in objects[::-1]])
    ]

    assert not all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_progressive_resizing_after_cutout_shrinks_the_hole() -> None:
    """progressive_resizing before cutout: the hole is a part of the size that is trained on."""
    resize = partial(algorithm, "ProgressiveResizing", delay_fraction=0.8)
    inputs = torch.ones(2, 3, 16, 16)
    sizes = []
    for listing in ([resize(), algorithm("CutOut")], [algorithm("CutOut"), resize()]):
        parts = operated(listing, small_net())
        for piece in parts.batch_transforms:
            piece.driver.clock.total_steps = 10  # type: ignore[attr-defined]  # a BatchPiece
        seed_all(0)
        batch: Any = (inputs, torch.zeros(2))
        for transform in parts.batch_transforms:
            batch = transform(batch)
        sizes.append(float(batch[0].mean()))

    assert sizes[0] != sizes[1]


def test_batchnorm_statistics_are_updated_twice_by_selective_backprop() -> None:
    """selective_backprop forbids model.batchnorm, as a warning."""
    model = small_net()
    obj = algorithm("SelectiveBackprop", start=0.0, end=1.0, interrupt=0)
    train_parts([obj], model, loader(), epochs=2)

    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.state_dict()["num_batches_tracked"] == 12  # in six steps
