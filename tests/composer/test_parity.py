"""``Trainer`` with Composer's algorithms: bit by bit what hand and composer.Trainer do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchweld_composer
from tests.composer.small_nets import (
    algorithm,
    images,
    loader,
    make_sgd,
    same_weights,
    seed_all,
    small_net,
    train_composer,
    train_parts,
)
from torchweld import ModelCheckpoint, Trainer
from torchweld.errors import (
    CheckpointError,
    InvalidArgument,
    PlanError,
    SurgeryError,
    TorchweldError,
)
from torchweld.registry import Registry

REGISTRY = Registry({"composer": torchweld_composer})
FOUR = ("label_smoothing", "channels_last", "cutmix", "blurpool")  # a wrong order
CLASSES = ("BlurPool", "ChannelsLast", "CutMix", "LabelSmoothing")

# SAM and SWA warn about resuming.
pytestmark = pytest.mark.filterwarnings("ignore:.*(resuming|resume).*")


def twins() -> tuple[nn.Module, nn.Module]:
    seed_all(0)
    model = small_net()
    return model, copy.deepcopy(model)


def fit(
    model: nn.Module, surgery: Any, data: Any = None, *, ckpt_path: Any = None, **flags: Any
) -> None:
    """Train two epochs of three steps with seed 3, as the other ways do."""
    arguments: dict[str, Any] = {"max_epochs": 2, "seed": 3, "barebones": True, **flags}
    trainer = Trainer(strategy="single", surgery=surgery, registry=REGISTRY, **arguments)
    trainer.fit(
        model,
        loader() if data is None else data,
        loss=F.cross_entropy,
        optimizer=make_sgd,
        ckpt_path=ckpt_path,
    )


def test_the_four_given_in_a_wrong_order_equal_hand_and_composers_trainer() -> None:
    ours, by_hand = twins()
    theirs = copy.deepcopy(ours)

    fit(ours, FOUR)
    train_parts([algorithm(name) for name in CLASSES], by_hand, loader())
    train_composer([algorithm(name) for name in CLASSES], theirs, loader())

    assert same_weights(ours, by_hand)
    assert same_weights(ours, theirs)


def test_extras_change_nothing(tmp_path: Path) -> None:
    bare, full = twins()

    fit(bare, FOUR)
    fit(full, FOUR, barebones=False, default_root_dir=tmp_path, enable_progress_bar=False)

    assert same_weights(bare, full)


ADOPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixup": ("MixUp", {}),
    "cutmix by loss": ("CutMix", {"interpolate_loss": True}),
    "progressive_resizing": ("ProgressiveResizing", {"delay_fraction": 0.2}),
    "selective_backprop": ("SelectiveBackprop", {"start": 0.2, "end": 0.9}),
    "ema": ("EMA", {"half_life": "2ba"}),
    "swa": ("SWA", {"swa_start": "0.3dur", "swa_end": "0.8dur", "update_interval": "1ba"}),
    "sam": ("SAM", {}),
    "layer_freezing": ("LayerFreezing", {"freeze_start": 0.0}),
    "clip norm": ("GradientClipping", {"clipping_type": "norm", "clipping_threshold": 0.1}),
    "clip value": ("GradientClipping", {"clipping_type": "value", "clipping_threshold": 0.01}),
    "clip adaptive": (
        "GradientClipping",
        {"clipping_type": "adaptive", "clipping_threshold": 0.01},
    ),
    "ghost_batchnorm": ("GhostBatchNorm", {"ghost_batch_size": 4}),
    "cutout": ("CutOut", {}),
    "squeeze_excite": ("SqueezeExcite", {"min_channels": 8}),
}


@pytest.mark.parametrize("name", ADOPTED)
def test_an_adopted_algorithm_equals_composers_trainer(name: str) -> None:
    kind, arguments = ADOPTED[name]
    ours, theirs = twins()

    fit(ours, [algorithm(kind, **arguments)])
    train_composer([algorithm(kind, **arguments)], theirs, loader())

    assert same_weights(ours, theirs)


def test_validation_sees_the_weights_and_ema_and_the_weights_are_what_stays(
    tmp_path: Path,
) -> None:
    ours, plain = twins()
    seen: list[Tensor] = []

    def accuracy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        seen.append(outputs.clone())
        return (outputs.argmax(1) == targets).sum(), len(targets)

    obj = algorithm("EMA", half_life="1ba")
    trainer = Trainer(
        strategy="single", surgery=[obj], registry=REGISTRY, max_epochs=1, seed=3, barebones=True
    )
    result = trainer.fit(
        ours,
        loader(),
        loader(),
        loss=F.cross_entropy,
        optimizer=make_sgd,
        metrics={"accuracy": accuracy},
    )
    batches = len(loader())
    during = seen[1], seen[1 + batches]  # the first is the trial before step 1
    fit(plain, [], max_epochs=1)

    assert same_weights(ours, plain)
    averaged = copy.deepcopy(ours)
    obj.get_ema_model(averaged)
    with torch.no_grad():
        expected = averaged.eval()(images()[0][:8])
        raw = ours.eval()(images()[0][:8])
    assert torch.equal(during[0], raw)
    assert torch.equal(during[1], expected)
    assert not torch.equal(raw, expected)

    for weights, name in (("trained", "val_loss"), ("average", "val_loss/average")):
        again = trainer.evaluate(data=loader(), weights=weights)
        assert again["loss"] == result.metrics[name]
    exported = load_file(trainer.export(tmp_path / "average.safetensors", weights="average"))
    assert all(torch.equal(p, exported[name]) for name, p in averaged.named_parameters())
    assert same_weights(ours, plain)


def test_an_average_that_nobody_keeps_is_refused() -> None:
    trainer = Trainer(strategy="single", registry=REGISTRY, barebones=True)
    trainer.fit(small_net(), loader(), loss=F.cross_entropy, optimizer=make_sgd)

    with pytest.raises(InvalidArgument, match="nothing in this run averages"):
        trainer.evaluate(data=loader(), weights="average")
    with pytest.raises(InvalidArgument, match="choose 'trained' or 'average'"):
        trainer.evaluate(data=loader(), weights="ema")


RESUMED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "the four": [(name, {}) for name in CLASSES],
    "ema and cutmix": [("EMA", {"half_life": "2ba"}), ("CutMix", {})],
    "progressive_resizing": [("ProgressiveResizing", {"delay_fraction": 0.0})],
    "swa": [("SWA", {"swa_start": "0.1dur", "swa_end": "0.9dur", "update_interval": "1ba"})],
    "sam every other step": [("SAM", {"interval": 2})],
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_inside_an_epoch_ends_bit_by_bit_like_the_other(
    name: str, tmp_path: Path
) -> None:
    straight, resumed = _straight_and_resumed(name, tmp_path, save_every=2)

    assert same_weights(straight, resumed)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_between_epochs_ends_bit_by_bit_like_the_other(
    name: str, tmp_path: Path
) -> None:
    straight, resumed = _straight_and_resumed(name, tmp_path, save_every=3)

    assert same_weights(straight, resumed)


def _straight_and_resumed(name: str, root: Path, *, save_every: int) -> tuple[nn.Module, nn.Module]:
    """One model trained without a break; one that fails in step 5 and goes on from a checkpoint."""

    def algorithms() -> list[Any]:
        return [algorithm(kind, **arguments) for kind, arguments in RESUMED[name]]

    straight, broken_off = twins()
    _, resumed = twins()
    fit(straight, algorithms())
    saver = ModelCheckpoint(every_n_train_steps=save_every)
    with pytest.raises(Broken):
        fit(broken_off, algorithms(), callbacks=[Break(save_every + 1), saver], **kept(root))
    fit(resumed, algorithms(), ckpt_path="last", **kept(root))
    return straight, resumed


def kept(root: Path) -> dict[str, Any]:
    """Flags of a run that writes checkpoints and nothing else."""
    return {
        "barebones": False,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }


class Broken(Exception):
    """What a run fails with."""


class Break:
    """Fails after a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def next_due(self, progress: Any) -> int | None:
        return self.step if progress.step < self.step else None

    def at(self, border: Any, run: Any) -> None:
        if border.progress.step >= self.step:
            raise Broken


def test_layer_freezing_is_refused_on_resume(tmp_path: Path) -> None:
    model, again = twins()
    saver = ModelCheckpoint(every_n_train_steps=2)
    with pytest.raises(Broken):
        fit(model, [algorithm("LayerFreezing")], callbacks=[Break(3), saver], **kept(tmp_path))

    with pytest.raises(CheckpointError, match="layer_freezing cannot be resumed"):
        fit(again, [algorithm("LayerFreezing")], ckpt_path="last", **kept(tmp_path))


# ---- what is wrong is said before step 1 -------------------------------------------------------


def test_flat_inputs_to_cutmix_are_refused_before_step_1() -> None:
    data = TensorDataset(torch.randn(8, 5), torch.zeros(8, dtype=torch.int64))

    with pytest.raises(PlanError) as error:
        fit(nn.Linear(5, 4), "cutmix", DataLoader(data, batch_size=4))

    assert [w for w in ("TW301", "cutmix", "4-D") if w not in str(error.value)] == []


def test_an_index_loss_is_refused_before_step_1() -> None:
    trainer = Trainer(
        strategy="single", surgery="label_smoothing", registry=REGISTRY, barebones=True
    )

    with pytest.raises(PlanError, match="label_smoothing"):
        trainer.fit(small_net(), loader(), loss=F.nll_loss, optimizer=make_sgd)


def test_a_loss_that_smooths_is_refused_before_step_1() -> None:
    trainer = Trainer(
        strategy="single", surgery="label_smoothing", registry=REGISTRY, barebones=True
    )
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    with pytest.raises(PlanError, match="smoothing twice"):
        trainer.fit(small_net(), loader(), loss=loss, optimizer=make_sgd)


@pytest.mark.parametrize("surgery", ["label_smoothing", "cutmix"])
def test_targets_that_the_loss_ignores_are_refused_before_step_1(surgery: str) -> None:
    inputs, targets = images()
    targets[3] = -100
    trainer = Trainer(strategy="single", surgery=surgery, registry=REGISTRY, barebones=True)
    data = DataLoader(TensorDataset(inputs, targets), batch_size=8)

    with pytest.raises(PlanError, match="ignore_index"):
        trainer.fit(small_net(), data, loss=F.cross_entropy, optimizer=make_sgd)


@pytest.mark.filterwarnings("ignore:SAM has known issues")
def test_sam_and_windows_are_refused_before_step_1() -> None:
    trainer = Trainer(
        strategy="single",
        surgery=[algorithm("SAM")],
        accumulate_grad_batches=2,
        registry=REGISTRY,
        barebones=True,
    )

    with pytest.raises(InvalidArgument, match="evaluates the loss itself"):
        trainer.fit(small_net(), loader(), loss=F.cross_entropy, optimizer=make_sgd)


def test_blurpool_without_strided_convolutions_is_an_error_under_strict() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    with pytest.raises(SurgeryError, match="blurpool changed nothing"):
        fit(model, "blurpool", strict=True)


def test_a_bad_argument_of_an_object_is_refused_before_step_1() -> None:
    with pytest.raises(TorchweldError, match=r"alpha=-1\.0 is not a number > 0"):
        fit(small_net(), [algorithm("MixUp", alpha=-1.0)])
