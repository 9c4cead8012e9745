"""Composer's algorithms as surgeries, trained by hand, against ``composer.Trainer`` itself.

Every loss and every weight is compared bit by bit after six steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.composer.small_nets import (
    HandRun,
    algorithm,
    border,
    images,
    loader,
    make_sgd,
    operated,
    same_weights,
    seed_all,
    small_net,
    surgery_of,
    train_composer,
    train_parts,
)
from torchweld.errors import RunError
from torchweld.interfaces import Parts
from torchweld_composer.imports import composer_module

# SAM, SWA and StochasticDepth warn about resuming; torchweld resumes SAM, see below.
pytestmark = pytest.mark.filterwarnings("ignore:.*(resuming|resume).*")

RECIPES: dict[str, Callable[[], list[Any]]] = {
    "nothing": list,
    "the four": lambda: [
        algorithm(n) for n in ("BlurPool", "ChannelsLast", "CutMix", "LabelSmoothing")
    ],
    "blurpool": lambda: [algorithm("BlurPool")],
    "channels_last": lambda: [algorithm("ChannelsLast")],
    "cutmix": lambda: [algorithm("CutMix")],
    "cutmix by loss": lambda: [algorithm("CutMix", interpolate_loss=True)],
    "label_smoothing": lambda: [algorithm("LabelSmoothing")],
    "mixup": lambda: [algorithm("MixUp")],
    "mixup by loss": lambda: [algorithm("MixUp", interpolate_loss=True)],
    "progressive_resizing": lambda: [algorithm("ProgressiveResizing", delay_fraction=0.2)],
    "progressive cropping": lambda: [
        algorithm("ProgressiveResizing", delay_fraction=0.2, mode="crop")
    ],
    "ema": lambda: [algorithm("EMA", half_life="2ba")],
    "ema every epoch": lambda: [algorithm("EMA", half_life="1ep", update_interval="1ep")],
    "swa": lambda: [algorithm("SWA", swa_start="0.3dur", swa_end="0.8dur", update_interval="1ba")],
    "ghost_batchnorm": lambda: [algorithm("GhostBatchNorm", ghost_batch_size=4)],
    "squeeze_excite": lambda: [algorithm("SqueezeExcite", min_channels=8)],
    "weight_standardization": lambda: [algorithm("WeightStandardization")],
    "factorize": lambda: [
        algorithm(
            "Factorize", min_channels=8, latent_channels=0.25, min_features=4, latent_features=2
        )
    ],
    "selective_backprop": lambda: [algorithm("SelectiveBackprop", start=0.2, end=0.9)],
    "cutout": lambda: [algorithm("CutOut")],
    "colout": lambda: [algorithm("ColOut")],
    "gradient_clipping by value": lambda: [
        algorithm("GradientClipping", clipping_type="value", clipping_threshold=0.01)
    ],
    "gradient_clipping, adaptive": lambda: [
        algorithm("GradientClipping", clipping_type="adaptive", clipping_threshold=0.01)
    ],
    "layer_freezing": lambda: [algorithm("LayerFreezing", freeze_start=0.0, freeze_level=1.0)],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_and_weights_are_those_of_composers_trainer(recipe: str) -> None:
    ours, theirs = _twins()

    losses = train_parts(RECIPES[recipe](), ours, loader())
    expected = train_composer(RECIPES[recipe](), theirs, loader())

    assert len(losses) == len(expected) == 6
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert same_weights(ours, theirs)


def _twins() -> tuple[nn.Module, nn.Module]:
    seed_all(0)
    model = small_net()
    return model, copy.deepcopy(model)


def test_clipping_by_norm_is_cores_clipping() -> None:
    ours, theirs = _twins()
    by_norm = partial(algorithm, "GradientClipping", clipping_type="norm", clipping_threshold=0.1)

    train_parts([by_norm()], ours, loader(), clip=0.1)
    train_composer([by_norm()], theirs, loader())

    assert same_weights(ours, theirs)


@pytest.mark.parametrize("interval", [1, 2])
def test_sam_takes_the_steps_of_composers_trainer(interval: int) -> None:
    ours, theirs = _twins()

    train_parts([algorithm("SAM", interval=interval)], ours, loader())
    train_composer([algorithm("SAM", interval=interval)], theirs, loader())

    assert same_weights(ours, theirs)


def test_transforms_of_one_event_run_in_the_order_of_the_plan() -> None:
    """Composer's engine reverses AFTER_DATALOADER, so it is given the reverse."""
    ours, theirs = _twins()

    train_parts([algorithm("ColOut"), algorithm("CutOut")], ours, loader())
    train_composer([algorithm("CutOut"), algorithm("ColOut")], theirs, loader())

    assert same_weights(ours, theirs)


# ---- EMA ---------------------------------------------------------------------------------------


def test_ema_keeps_the_average_of_composers_trainer() -> None:
    ours, theirs = _twins()
    averages = [algorithm("EMA", half_life="2ba") for _ in range(2)]

    train_parts([averages[0]], ours, loader())
    train_composer([averages[1]], theirs, loader())

    first, second = (list(a.ema_model.named_parameters_dict.values()) for a in averages)
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_ema_evaluates_with_both_and_trains_on_with_the_weights() -> None:
    model, _ = _twins()
    obj = algorithm("EMA", half_life="2ba")
    parts, run = _trained(obj, model)
    weights, average = _values(model), _average(obj)

    border(parts, run, 3, "eval_start")
    raw = _values(model)
    with next(c for c in parts.callbacks if hasattr(c, "averaged")).averaged():
        evaluated = _values(model)
    border(parts, run, 3, "eval_end")

    assert all(torch.equal(a, b) for a, b in zip(raw, weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(evaluated, average, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(_values(model), weights, strict=True))


def _trained(obj: Any, model: nn.Module, steps: int = 3) -> tuple[Parts, Any]:
    parts = operated([obj], model)
    run: Any = HandRun(model, make_sgd(model.parameters()), steps=9, per_epoch=3)
    for piece in (*parts.after_step, *parts.callbacks):
        piece.bind(run)  # type: ignore[union-attr]  # pieces of this plugin
    border(parts, run, 0, "fit_start")
    _steps(parts, run, steps)
    return parts, run


def _steps(parts: Parts, run: Any, steps: int) -> None:
    inputs, targets = images()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(parts.model(inputs), targets)
        loss.backward()
        run.model.optimizer.step()
        run.model.optimizer.zero_grad()
        for act in parts.after_step:
            act()  # type: ignore[operator]  # pieces of this plugin


def _values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _average(obj: Any) -> list[Tensor]:
    return [value.clone() for value in obj.ema_model.named_parameters_dict.values()]


def test_ema_resumes_bit_by_bit() -> None:
    model, _ = _twins()
    straight = algorithm("EMA", half_life="2ba")
    parts, run = _trained(straight, model)
    saved, weights = copy.deepcopy(parts.callbacks[0].state_dict()), copy.deepcopy(model)  # type: ignore[attr-defined]  # a BorderPiece
    momentum = copy.deepcopy(run.model.optimizer.state_dict())
    _steps(parts, run, 3)

    resumed = algorithm("EMA", half_life="2ba")
    parts, run = _trained(resumed, weights, steps=0)
    run.model.optimizer.load_state_dict(momentum)
    parts.callbacks[0].load_state_dict(saved)  # type: ignore[attr-defined]  # a BorderPiece
    _steps(parts, run, 3)

    assert all(
        torch.equal(a, b) for a, b in zip(_average(straight), _average(resumed), strict=True)
    )


# ---- SAM ---------------------------------------------------------------------------------------


def test_sam_saves_the_momentum_that_composers_optimizer_leaves_out() -> None:
    model, _ = _twins()
    base = make_sgd(model.parameters())
    theirs = composer_module("composer.algorithms.sam.sam").SAMOptimizer(
        make_sgd(model.parameters())
    )
    (wrap,) = operated([algorithm("SAM")], model).optimizer_wrappers
    ours = wrap(base)

    for optimizer in (theirs, ours):
        optimizer.step(_closure(model, optimizer))

    assert "momentum_buffer" not in next(iter(theirs.state.values()))
    assert "momentum_buffer" in next(iter(ours.state.values()))
    assert ours.state is base.state
    assert ours.param_groups[0] is base.param_groups[0]


def _closure(model: nn.Module, optimizer: Any) -> Any:
    inputs, targets = images()

    def closure(**_: Any) -> Tensor:
        optimizer.zero_grad()
        with torch.set_grad_enabled(True):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
        return loss

    return closure


def test_sam_remembers_its_interval_over_a_checkpoint() -> None:
    model, _ = _twins()
    (wrap,) = operated([algorithm("SAM", interval=3)], model).optimizer_wrappers
    optimizer = wrap(make_sgd(model.parameters()))
    optimizer.step(_closure(model, optimizer))
    state = wrap.state_dict()  # type: ignore[attr-defined]  # a SamPiece

    (resumed,) = operated([algorithm("SAM", interval=3)], model).optimizer_wrappers
    resumed.load_state_dict(state)  # type: ignore[attr-defined]  # a SamPiece

    assert state == {"step": 1}
    assert resumed(make_sgd(model.parameters())).global_step == 1


def test_sam_without_a_closure_is_refused() -> None:
    model, _ = _twins()
    (wrap,) = operated([algorithm("SAM")], model).optimizer_wrappers

    with pytest.raises(RunError, match="sam evaluates the loss twice a step"):
        wrap(make_sgd(model.parameters())).step()


# ---- algorithms that need more than their events -----------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:'mode' parameter is deprecated:DeprecationWarning"
)  # torchvision
@pytest.mark.parametrize("name", ["RandAugment", "AugMix"])
def test_image_augmentations_become_sample_transforms(name: str) -> None:
    pytest.importorskip("PIL")
    (transform,) = operated([algorithm(name)], small_net()).sample_transforms
    image = (torch.rand(3, 8, 8) * 255).to(torch.uint8)

    seed_all(0)
    changed, target = transform((image, 3))

    assert target == 3
    assert changed.shape == image.shape
    assert not torch.equal(changed, image)


def test_colout_of_samples_becomes_a_sample_transform() -> None:
    parts = operated([algorithm("ColOut", batch=False, p_row=0.25, p_col=0.25)], small_net())

    changed, target = parts.sample_transforms[0]((torch.rand(3, 8, 8), 1))

    assert changed.shape == (3, 6, 6)
    assert target == 1
    assert parts.batch_transforms == ()


def test_sequence_length_warmup_cuts_mapping_batches() -> None:
    obj = algorithm(
        "SeqLengthWarmup", duration=0.5, min_seq_length=4, max_seq_length=16, step_size=4
    )
    parts = surgery_of(obj).apply(Parts(small_net()))
    run: Any = HandRun(parts.model, None, steps=12, per_epoch=4)
    piece: Any = parts.batch_transforms[0]
    piece.bind(run)
    given = {"input_ids": torch.zeros(2, 32, dtype=torch.int64)}

    lengths = [piece(given)["input_ids"].shape[1] for _ in range(9)]

    assert lengths == [4, 4, 8, 8, 12, 12, 16, 16, 16]
    assert given["input_ids"].shape == (2, 32)


def test_gyro_dropout_takes_the_run_in_epochs() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match="resumption"):
        obj = algorithm("GyroDropout", sigma=4, tau=2)
    parts = operated([obj], model)
    run: Any = HandRun(model, None, steps=6, per_epoch=3)

    border(parts, run, 0, "fit_start")

    layer: Any = next(m for m in model if type(m).__name__ == "GyroDropoutLayer")
    assert (layer.iters_per_epoch, layer.max_epoch) == (3, 2)


def test_stochastic_depth_replaces_the_forward_of_bottlenecks() -> None:
    bottleneck: Any = pytest.importorskip("torchvision.models.resnet").Bottleneck
    model = nn.Sequential(*(bottleneck(16, 4) for _ in range(3)))
    obj = algorithm(
        "StochasticDepth",
        target_layer_name="ResNetBottleneck",
        stochastic_method="sample",
        drop_rate=0.9,
    )

    parts = operated([obj], model)

    seed_all(0)
    inputs = torch.randn(4, 16, 4, 4)
    assert not torch.equal(parts.model(inputs), parts.model(inputs))
