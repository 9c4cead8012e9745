"""A stranger's algorithm on every kind of batch and at every event that has a place."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.composer.small_nets import (
    CLASSES,
    HandRun,
    algorithm,
    border,
    images,
    loader,
    make_sgd,
    operated,
    small_net,
    surgery_of,
    train_parts,
)
from torchweld.errors import CheckpointError, InvalidArgument, PluginError, RunError, SurgeryError
from torchweld.interfaces import Border, Parts, Progress
from torchweld_composer.adopt import Adopted
from torchweld_composer.clock import Clock
from torchweld_composer.imports import composer_module

Algorithm: Any = composer_module("composer.core").Algorithm
Event: Any = composer_module("composer.core").Event


class AddOne(Algorithm):  # type: ignore[misc]  # a class of an untyped library
    """Adds one to inputs and targets."""

    def __init__(self, input_key: Any = 0, target_key: Any = 1) -> None:
        self.input_key, self.target_key = input_key, target_key

    def match(self, event: Any, state: Any) -> bool:
        return event in {Event.AFTER_DATALOADER, Event.BEFORE_LOSS}

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        key = self.input_key if event == Event.AFTER_DATALOADER else self.target_key
        state.batch_set_item(key, state.batch_get_item(key) + 1)


class Recorder(Algorithm):  # type: ignore[misc]  # a class of an untyped library
    """Notes every event that it is asked to act at."""

    def __init__(self, *events: str) -> None:
        self.wanted = {Event[name] for name in events}
        self.seen: list[str] = []

    def match(self, event: Any, state: Any) -> bool:
        return event in self.wanted

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        self.seen.append(event.name)


@pytest.mark.parametrize("container", [tuple, list])
def test_pairs_keep_their_container_and_the_callers_is_left_alone(container: Any) -> None:
    parts = operated([AddOne()], small_net())
    given = container([torch.zeros(2, 3), torch.zeros(2)])

    changed = parts.batch_transforms[0](given)

    assert type(changed) is container
    assert torch.equal(changed[0], torch.ones(2, 3))
    assert torch.equal(given[0], torch.zeros(2, 3))
    assert changed is not given


@pytest.mark.parametrize("container", [dict, UserDict])
def test_mappings_keep_their_container_and_the_callers_is_left_alone(container: Any) -> None:
    parts = operated([AddOne("image", "label")], small_net())
    given = container({"image": torch.zeros(2, 3), "label": torch.zeros(2)})

    changed = parts.batch_transforms[0](given)
    targets = parts.target_transforms[0](torch.zeros(2, CLASSES), changed)

    assert type(changed) is container
    assert torch.equal(targets["label"], torch.ones(2))
    assert torch.equal(changed["label"], torch.zeros(2))
    assert torch.equal(given["image"], torch.zeros(2, 3))


def test_the_targets_of_a_mapping_can_come_alone() -> None:
    parts = operated([AddOne("image", "label")], small_net())
    batch = parts.batch_transforms[0]({"image": torch.zeros(2, 3), "label": torch.zeros(2)})

    targets = parts.target_transforms[0](torch.zeros(2, CLASSES), batch["label"])

    assert torch.equal(targets, torch.ones(2))


def test_a_wrong_key_is_an_error_that_names_algorithm_event_and_key() -> None:
    parts = operated([algorithm("CutMix")], small_net())

    with pytest.raises(PluginError) as error:
        parts.batch_transforms[0]({"image": torch.zeros(2, 3, 4, 4), "label": torch.zeros(2)})

    text = str(error.value)
    assert [w for w in ("cutmix", "BEFORE_FORWARD", "KeyError: 0") if w not in text] == []


STEP = (
    "AFTER_DATALOADER",
    "BATCH_START",
    "BEFORE_TRAIN_BATCH",
    "BEFORE_FORWARD",
    "AFTER_FORWARD",
    "BEFORE_LOSS",
    "AFTER_LOSS",
    "BEFORE_BACKWARD",
    "AFTER_TRAIN_BATCH",
    "BATCH_END",
    "BATCH_CHECKPOINT",
)


def test_all_events_come_in_the_order_of_composers_loop() -> None:
    recorder = Recorder(
        "INIT", "AFTER_LOAD", "FIT_START", "EPOCH_START", "EPOCH_END", "FIT_END", *STEP
    )

    train_parts([recorder], small_net(), loader(8), epochs=2)

    epoch = ["EPOCH_START", *STEP, "EPOCH_END"]
    assert recorder.seen[:3] == ["INIT", "AFTER_LOAD", "FIT_START"]
    assert recorder.seen[3:-1] == [*epoch, *epoch]
    assert recorder.seen[-1] == "FIT_END"


def test_only_the_pieces_that_are_needed_are_added() -> None:
    parts = operated([Recorder("INIT")], small_net())

    plain = Parts(parts.model, loss=F.cross_entropy)
    changed = [f for f in vars(plain) if getattr(parts, f) != getattr(plain, f)]
    assert changed == ["callbacks"]  # which looks for events that begin later


def test_an_event_that_begins_after_planning_is_refused_when_it_begins() -> None:
    class Late(Recorder):
        on = False

        def match(self, event: Any, state: Any) -> bool:
            return bool(self.on and event == Event.BEFORE_LOSS)

    obj = Late()
    parts = operated([obj], small_net())
    optimizer = make_sgd(parts.model.parameters())
    run = HandRun(parts.model, optimizer, steps=4, per_epoch=2)
    border(parts, run, 0, "fit_start")
    obj.on = True

    with pytest.raises(RunError, match="answers BEFORE_LOSS now and did not"):
        border(parts, run, 2, "epoch_end")


def test_once_a_step_events_come_once_in_an_accumulation_window() -> None:
    recorder = Recorder("BATCH_START", "BEFORE_FORWARD")
    parts = operated([recorder], small_net())
    run: Any = HandRun(parts.model, None, steps=2, per_epoch=2)
    run.plan.settings.accumulate_grad_batches = 2
    piece: Any = parts.batch_transforms[0]
    piece.bind(run)

    for _ in range(4):
        piece(images())

    assert recorder.seen == ["BATCH_START", "BEFORE_FORWARD", "BEFORE_FORWARD"] * 2


def test_replaced_outputs_are_refused() -> None:
    class Doubles(Recorder):
        def apply(self, event: Any, state: Any, logger: Any) -> None:
            state.outputs = state.outputs * 2

    parts = operated([Doubles("AFTER_FORWARD")], small_net())

    with pytest.raises(RunError, match="doubles replaced the outputs"):
        parts.target_transforms[0](torch.zeros(2, 3), torch.zeros(2))


def test_a_changed_loss_is_the_one_that_is_trained_on() -> None:
    class Halves(Recorder):
        def apply(self, event: Any, state: Any, logger: Any) -> None:
            state.loss = state.loss / 2

    parts = operated([Halves("AFTER_LOSS")], small_net())
    outputs, targets = (
        torch.zeros(2, CLASSES, requires_grad=True),
        torch.zeros(2, dtype=torch.int64),
    )

    assert parts.loss is not None
    loss: Tensor = parts.loss(outputs, targets)

    assert torch.equal(loss, F.cross_entropy(outputs, targets) / 2)


def test_an_algorithm_of_the_loss_needs_one() -> None:
    surgery = Adopted(Recorder("AFTER_LOSS"), "recorder", ("AFTER_LOSS",))()

    with pytest.raises(SurgeryError, match="recorder works on the loss"):
        surgery.apply(Parts(small_net()))


def test_an_algorithm_that_fails_is_named_with_its_event() -> None:
    class Fails(Recorder):
        def apply(self, event: Any, state: Any, logger: Any) -> None:
            raise ValueError("no luck")

    with pytest.raises(
        PluginError, match="fails failed at Composer's event INIT: ValueError: no luck"
    ):
        operated([Fails("INIT")], small_net())


def test_a_model_that_is_replaced_is_the_one_that_is_trained() -> None:
    class Replaces(Recorder):
        def apply(self, event: Any, state: Any, logger: Any) -> None:
            state.model = nn.Linear(1, 1)

    assert isinstance(operated([Replaces("INIT")], small_net()).model, nn.Linear)


@pytest.mark.parametrize(
    "borders",
    [
        [(2, "due", "epoch_end")],
        [(2, "eval_start"), (2, "due", "epoch_end", "eval_end")],
        [(2, "eval_start"), (2, "fit_end")],
    ],
)
def test_an_epoch_ends_before_its_evaluation_and_an_evaluation_always_ends(
    borders: list[tuple[Any, ...]],
) -> None:
    names = ("EPOCH_START", "EPOCH_END", "EVAL_START", "EVAL_END", "FIT_END")
    recorder = Recorder(*names)
    parts = operated([recorder], small_net())
    run = HandRun(parts.model, make_sgd(parts.model.parameters()), steps=4, per_epoch=2)
    border(parts, run, 0, "fit_start")

    for step, *kind in borders:
        border(parts, run, step, *kind)

    evaluation = ["EVAL_START", "EVAL_END"] if len(borders) > 1 else []
    last = "FIT_END" if "fit_end" in borders[-1] else "EPOCH_START"
    assert recorder.seen == ["EPOCH_START", "EPOCH_END", *evaluation, last]


# ---- the state that algorithms see -------------------------------------------------------------


def test_an_algorithm_sees_the_progress_of_the_run() -> None:
    seen: list[tuple[Any, ...]] = []

    class Looks(Recorder):
        def apply(self, event: Any, state: Any, logger: Any) -> None:
            time = state.timestamp
            elapsed = float(state.get_elapsed_duration())
            seen.append((time.epoch.value, time.batch.value, time.batch_in_epoch.value, elapsed))
            logger.log_metrics({"elapsed": elapsed})

    train_parts([Looks("BATCH_START", "BATCH_END", "EPOCH_END")], small_net(), loader(16), epochs=2)

    assert seen == [
        (0, 0, 0, 0.0),
        (0, 1, 1, 0.25),
        (0, 1, 1, 0.25),
        (0, 2, 2, 0.5),
        (1, 2, 0, 0.5),
        (1, 2, 0, 0.5),
        (1, 3, 1, 0.75),
        (1, 3, 1, 0.75),
        (1, 4, 2, 1.0),
        (2, 4, 0, 1.0),
    ]


def test_steps_are_counted_by_micro_batches_where_nobody_tells() -> None:
    clock = Clock()
    clock.accumulate = 3

    first = [clock.micro_batch() for _ in range(7)]

    assert first == [True, False, False, True, False, False, True]
    assert clock.step == 2


def test_a_border_puts_the_count_right() -> None:
    clock = Clock()
    clock.accumulate = 4
    for _ in range(6):  # a window of four and a short one of two
        clock.micro_batch()
    here = Border(frozenset({"due"}), Progress(step=2, samples=6), {})

    assert clock.at_border(here) is False
    assert (clock.step, clock.step_in_epoch) == (2, 2)
    assert clock.micro_batch() is True


def test_an_algorithm_that_follows_the_progress_needs_the_length_of_the_run() -> None:
    parts = operated([algorithm("ProgressiveResizing")], small_net())
    run: Any = HandRun(parts.model, None, steps=0, per_epoch=2)
    run.progress = SimpleNamespace(
        step=0, epoch=0, samples=0, steps_per_epoch=None, total_steps=None
    )
    piece: Any = parts.batch_transforms[0]

    with pytest.raises(RunError, match=r"progressive_resizing .* give Trainer\(max_steps=…\)"):
        piece.bind(run)


@pytest.mark.filterwarnings("ignore:SWA has known issues")
def test_the_learning_rate_schedule_of_swa_is_refused() -> None:
    obj = algorithm("SWA", schedule_swa_lr=True)

    with pytest.raises(InvalidArgument, match="lr_scheduler="):
        surgery_of(obj).apply(Parts(small_net()))


def _mean_only(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def test_selective_backprop_needs_a_loss_of_each_sample() -> None:
    parts = Parts(small_net(), loss=_mean_only)
    obj = algorithm("SelectiveBackprop", start=0.0, end=1.0, interrupt=0)
    parts = surgery_of(obj).apply(parts)
    run: Any = HandRun(parts.model, None, steps=4, per_epoch=2)
    piece: Any = parts.batch_transforms[0]
    piece.bind(run)

    with pytest.raises(InvalidArgument, match="needs the loss of each sample"):
        piece(images())


def test_layer_freezing_cannot_be_resumed() -> None:
    parts = operated([algorithm("LayerFreezing")], small_net())
    callback: Any = parts.callbacks[0]
    state = callback.state_dict()
    state["clock"]["step"] = 3

    with pytest.raises(CheckpointError, match="layer_freezing cannot be resumed"):
        callback.load_state_dict(state)
