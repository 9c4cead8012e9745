"""The four, built as core builds them, against the same objects of Composer's driven by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.composer.small_nets import algorithm, images, same_weights, seed_all, small_net
from torchweld.components import Chosen
from torchweld.interfaces import Parts
from torchweld_composer import BLURPOOL, CHANNELS_LAST, CUTMIX, LABEL_SMOOTHING
from torchweld_composer.imports import composer_module


def built(component: Any, **options: Any) -> Any:
    return Chosen("surgery", component, component.options(**options)).make()


def applied(component: Any, parts: Parts, **options: Any) -> Parts:
    result = built(component, **options).apply(parts)
    assert isinstance(result, Parts)
    return result


class ByHand:
    """Composer's own ``State``, with which the algorithms are driven without this plugin."""

    def __init__(self, model: nn.Module) -> None:
        state = composer_module("composer.core").State
        device = composer_module("composer.devices").DeviceCPU()
        self.state = state(model=model, rank_zero_seed=0, run_name="hand", device=device)
        self.events = composer_module("composer.core").Event
        self.logger = composer_module("composer.loggers").Logger(self.state)

    def fire(self, obj: Any, *events: str) -> None:
        for name in events:
            event = self.events[name]
            assert obj.match(event, self.state)
            obj.apply(event, self.state, self.logger)


def test_blurpool_makes_the_same_model_as_composers_object() -> None:
    ours, theirs = small_net(), small_net()
    theirs.load_state_dict(ours.state_dict())

    parts = applied(BLURPOOL, Parts(ours))
    ByHand(theirs).fire(algorithm("BlurPool"), "INIT")

    kinds = [type(module).__name__ for module in parts.model.modules()]
    assert kinds == [type(module).__name__ for module in theirs.modules()]
    assert set(kinds) >= {"BlurConv2d", "BlurMaxPool2d"}
    assert same_weights(parts.model, theirs)
    x = images()[0]
    assert torch.equal(parts.model.eval()(x), theirs.eval()(x))


def test_blurpool_passes_every_option_on() -> None:
    parts = applied(
        BLURPOOL,
        Parts(small_net()),
        replace_maxpools=False,
        blur_first=False,
        min_channels=1,
    )

    kinds = [type(module).__name__ for module in parts.model.modules()]
    assert kinds.count("BlurConv2d") == 1
    assert "BlurMaxPool2d" not in kinds
    blurred: Any = next(m for m in parts.model.modules() if type(m).__name__ == "BlurConv2d")
    assert blurred.blur_first is False


def test_blurpool_draws_what_composers_object_draws() -> None:
    ours, theirs = small_net(), small_net()

    seed_all(4)
    applied(BLURPOOL, Parts(ours))
    after_ours = torch.rand(1)
    seed_all(4)
    ByHand(theirs).fire(algorithm("BlurPool"), "INIT")

    assert torch.equal(after_ours, torch.rand(1))


def test_channels_last_changes_the_strides_of_the_weights_alone() -> None:
    model = small_net()
    before = {name: p.clone() for name, p in model.named_parameters()}
    parts = applied(CHANNELS_LAST, Parts(model))

    for name, parameter in parts.model.named_parameters():
        assert torch.equal(parameter, before[name])
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
    assert parts.input_transforms == ()


def test_channels_last_of_the_inputs_changes_nothing_else() -> None:
    model = small_net()
    before = [p.stride() for p in model.parameters()]

    parts = applied(CHANNELS_LAST, Parts(model), weights=False)
    (transform,) = parts.input_transforms
    given = {
        "image": images()[0],
        "mask": torch.ones(2, 3),
        "bytes": torch.zeros(1, 3, 4, 4).byte(),
    }
    changed = transform(given)

    assert [p.stride() for p in parts.model.parameters()] == before
    assert changed["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(changed["image"], given["image"])
    assert changed["mask"] is given["mask"]
    assert changed["bytes"] is given["bytes"]
    assert given["image"].is_contiguous()


def test_activations_stay_channels_last_with_the_inputs_alone() -> None:
    parts = applied(CHANNELS_LAST, Parts(small_net()), weights=False)
    seen: list[bool] = []
    for module in parts.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _m, _i, out: seen.append(
                    out.is_contiguous(memory_format=torch.channels_last)
                )
            )

    parts.model(parts.input_transforms[0](images()[0]))

    assert seen == [True, True]


def _steps_by_pieces(parts: Parts, seed: int) -> list[Tensor]:
    seed_all(seed)
    results: list[Tensor] = []
    for _ in range(5):
        batch: Any = images()
        for transform in parts.batch_transforms:
            batch = transform(batch)
        outputs, targets = parts.model(batch[0]), batch[1]
        for change in parts.target_transforms:
            targets = change(outputs, targets)
        results += [batch[0], targets]
    return results


def _steps_by_hand(model: nn.Module, objects: list[Any], seed: int) -> list[Tensor]:
    """Composer's events around forward and loss, on Composer's own state."""
    seed_all(seed)
    results: list[Tensor] = []
    hand = ByHand(model)
    events = hand.events
    for _ in range(5):
        hand.state.batch = images()
        for obj in objects:
            if obj.match(events.BEFORE_FORWARD, hand.state):
                hand.fire(obj, "BEFORE_FORWARD")
        hand.state.outputs = model(hand.state.batch[0])
        for obj in objects:
            hand.fire(obj, "BEFORE_LOSS")
        results += [hand.state.batch[0], hand.state.batch[1]]
    return results


def test_cutmix_and_label_smoothing_are_bitwise_composers_objects() -> None:
    model = small_net().eval()
    parts = applied(CUTMIX, Parts(model, loss=F.cross_entropy), alpha=0.7, uniform_sampling=True)
    parts = applied(LABEL_SMOOTHING, parts, smoothing=0.2)
    objects = [
        algorithm("CutMix", alpha=0.7, uniform_sampling=True),
        algorithm("LabelSmoothing", smoothing=0.2),
    ]

    ours = _steps_by_pieces(parts, seed=11)
    theirs = _steps_by_hand(model, objects, seed=11)

    assert len(ours) == len(theirs) == 10
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_label_smoothing_equals_the_loss_that_smooths() -> None:
    parts = applied(LABEL_SMOOTHING, Parts(small_net()), smoothing=0.2)
    inputs, targets = images()
    outputs = parts.model(inputs)
    (smooth,) = parts.target_transforms

    loss = F.cross_entropy(outputs, smooth(outputs, targets))

    # Two sums of the same numbers in another order, in fp32.
    torch.testing.assert_close(loss, F.cross_entropy(outputs, targets, label_smoothing=0.2))


def test_cutmix_by_loss_mixes_the_losses_of_both_targets() -> None:
    parts = applied(CUTMIX, Parts(small_net(), loss=F.cross_entropy), interpolate_loss=True)
    by_target = applied(CUTMIX, Parts(parts.model, loss=F.cross_entropy))
    losses = []

    for chosen in (parts, by_target):
        seed_all(2)
        inputs, targets = chosen.batch_transforms[0](images())
        outputs = chosen.model.eval()(inputs)
        for change in chosen.target_transforms:
            targets = change(outputs, targets)
        assert chosen.loss is not None
        losses.append(chosen.loss(outputs, targets))

    # Cross entropy is linear in the targets: both forms are one number, up to rounding in fp32.
    torch.testing.assert_close(losses[0], losses[1])


def test_cutmix_by_loss_leaves_evaluation_alone() -> None:
    parts = applied(CUTMIX, Parts(small_net(), loss=F.cross_entropy), interpolate_loss=True)
    parts.batch_transforms[0](images())
    inputs, targets = images()

    with torch.no_grad():
        outputs = parts.model.eval()(inputs)
        assert parts.loss is not None
        loss = parts.loss(outputs, targets)

    assert torch.equal(loss, F.cross_entropy(outputs, targets))


def test_cutmix_by_loss_keeps_the_other_scalars_of_a_loss() -> None:
    def named(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(outputs, targets), "twice": outputs.sum()}

    parts = applied(CUTMIX, Parts(small_net(), loss=named), interpolate_loss=True)
    inputs, targets = parts.batch_transforms[0](images())
    assert parts.loss is not None
    value = parts.loss(parts.model(inputs), targets)

    assert sorted(value) == ["loss", "twice"]
    value["loss"].backward()


def test_a_batch_and_its_tensors_are_left_as_they_were() -> None:
    parts = applied(CUTMIX, Parts(small_net(), loss=F.cross_entropy))
    parts = applied(LABEL_SMOOTHING, parts)
    inputs, targets = images()
    kept = copy.deepcopy((inputs, targets))

    mixed = parts.batch_transforms[0]((inputs, targets))
    outputs = parts.model(mixed[0])
    soft = mixed[1]
    for change in parts.target_transforms:
        soft = change(outputs, soft)

    assert torch.equal(inputs, kept[0])
    assert torch.equal(targets, kept[1])
    assert soft.shape == outputs.shape


def test_dense_targets_are_not_pasted_into_in_place() -> None:
    parts = applied(CUTMIX, Parts(nn.Identity(), loss=F.cross_entropy))
    inputs, _ = images()
    masks = torch.randint(4, (24, 8, 8))
    kept = masks.clone()
    seed_all(0)  # some boxes are empty: then nothing is pasted at all

    mixed = parts.batch_transforms[0]((inputs, masks))
    changed = parts.target_transforms[0](mixed[0], mixed[1])

    assert torch.equal(masks, kept)
    assert not torch.equal(changed, kept)
