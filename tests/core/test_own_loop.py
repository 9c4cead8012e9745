"""The own loop used in every way: right, or an error before it trains wrongly."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from tests.core.trainings import (
    Stream,
    arguments,
    assert_same,
    different,
    make_data,
    make_loader,
    make_model,
    make_net,
    make_trainer,
    of_dataset,
    train_by_hand,
    weights,
)
from torchweld.errors import InvalidArgument, LoopError, RanksDisagree
from torchweld.loop.run import TrainingRun
from torchweld.testing import run_ranks

Batches = list[Any]


@contextmanager
def prepared(
    model: nn.Module | None = None, train: Any = None, *, given: Any = None, **settings: Any
) -> Iterator[TrainingRun]:
    settings = {"max_epochs": 1, **settings}
    model = make_model() if model is None else model
    train = make_loader() if train is None else train
    with make_trainer(**settings).prepare(model, train, **(given or arguments())) as run:
        yield run


def learn(run: TrainingRun, batch: Any) -> None:
    inputs, targets = batch
    run.backward(run.loss(run.model(inputs), targets))
    run.step()


def in_windows(batches: Batches, size: int) -> list[Batches]:
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def by_hand(size: int, num_batches: int = 6, num_samples: int = 24) -> nn.Module:
    batches = list(make_loader(num_samples))[:num_batches]
    return train_by_hand(make_model(), in_windows(batches, size))


# ---- interrupted and taken up again --------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_break_inside_a_window_and_batches_again_is_as_without_break(stop_at: int) -> None:
    model = make_model()

    with prepared(model, accumulate_grad_batches=4) as run:
        for count, batch in enumerate(run.batches(), start=1):
            learn(run, batch)
            if count == stop_at:
                break
        for batch in run.batches():
            learn(run, batch)

    assert_same(model, by_hand(4))


def test_islice_reads_as_many_as_it_says_and_loses_none() -> None:
    model = make_model()

    with prepared(model, accumulate_grad_batches=2) as run:
        for size in (3, 1, 2):
            for batch in islice(run.batches(), size):
                learn(run, batch)

    assert_same(model, by_hand(2))


def test_two_iterators_hand_out_every_batch_once() -> None:
    model = make_model()

    with prepared(model) as run:
        first = run.batches()
        learn(run, next(first))
        for batch in run.batches():
            learn(run, batch)
        assert next(first, None) is None

    assert_same(model, by_hand(1))


@pytest.mark.parametrize("size", [1, 2])
def test_an_exception_caught_around_the_loop_loses_no_batch(size: int) -> None:
    model = make_model()

    with prepared(model, accumulate_grad_batches=size) as run:
        with suppress(ZeroDivisionError):
            for batch in run.batches():
                learn(run, batch)
                raise ZeroDivisionError
        plainly(run)

    assert_same(model, by_hand(size))


def test_leaving_early_keeps_the_steps_made_so_far() -> None:
    model = make_model()

    with prepared(model) as run:
        for batch in run.batches():
            learn(run, batch)
            if run.progress.step == 4:
                break

    assert_same(model, by_hand(1, num_batches=4))
    assert run.progress.step == 4


@pytest.mark.parametrize("stop_at", [4, 5, 6], ids=["in a window", "in the last", "unused batch"])
def test_leaving_early_inside_a_window_still_saves_the_last_step(
    stop_at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"barebones": False, "logger": False, "default_root_dir": tmp_path}
    model = make_model()

    with prepared(model, make_loader(28), accumulate_grad_batches=3, **settings) as run:
        for count, batch in enumerate(run.batches()):
            if count == stop_at:
                break
            learn(run, batch)

    assert "inside an accumulation window" in capsys.readouterr().out or stop_at == 6
    assert [path.name for path in tmp_path.glob("*/step-*")] == [f"step-{stop_at // 3}"]
    assert_same(model, by_hand(3, num_batches=stop_at // 3 * 3, num_samples=28))


def test_leaving_before_the_short_window_is_used_up_is_no_error() -> None:
    with prepared(make_model(), make_loader(22), accumulate_grad_batches=4) as run:
        for count, batch in enumerate(run.batches()):
            if count == 5:
                break
            learn(run, batch)

    assert run.progress.step == 1


def test_gradients_left_in_a_window_do_not_reach_the_next_run() -> None:
    model = make_model()
    with prepared(model, accumulate_grad_batches=4) as run:
        for batch in islice(run.batches(), 2):
            learn(run, batch)

    with prepared(model) as run:
        for batch in run.batches():
            learn(run, batch)

    assert_same(model, by_hand(1))


def test_stop_ends_the_loop_at_the_next_border() -> None:
    with prepared(barebones=False, enable_checkpointing=False, logger=False, max_epochs=9,
                  log_every_n_steps=2) as run:  # fmt: skip
        for batch in run.batches():
            learn(run, batch)
            if run.progress.step == 3:
                run.stop()

    assert run.progress.step == 4


def test_stop_ends_an_endless_stream_that_has_no_other_border() -> None:
    batch = next(iter(make_loader()))

    with prepared(train=repeat(batch), max_epochs=None, max_steps=3000) as run:
        for count, each in enumerate(run.batches(), start=1):
            learn(run, each)
            if count == 5:
                run.stop()

    assert run.progress.step <= 1000


# ---- every batch once ----------------------------------------------------------------------------


def loss_of(run: TrainingRun, batch: Any) -> torch.Tensor:
    inputs, targets = batch
    loss: torch.Tensor = run.loss(run.model(inputs), targets)
    return loss


def continues_before_backward(run: TrainingRun) -> None:
    for _ in run.batches():
        continue


def reads_ahead(run: TrainingRun) -> None:
    batches = run.batches()
    ahead = next(batches)
    for batch in batches:
        learn(run, ahead)
        ahead = batch


def lists_all(run: TrainingRun) -> None:
    for batch in list(run.batches()):
        learn(run, batch)


def steps_twice(run: TrainingRun) -> None:
    for batch in run.batches():
        learn(run, batch)
        run.step()


def goes_backward_twice(run: TrainingRun) -> None:
    for batch in run.batches():
        run.backward(loss_of(run, batch))
        run.backward(loss_of(run, batch))


def steps_without_backward(run: TrainingRun) -> None:
    for _ in run.batches():
        run.step()


def forgets_the_step(run: TrainingRun) -> None:
    for batch in run.batches():
        run.backward(loss_of(run, batch))


def leaves_before_the_step(run: TrainingRun) -> None:
    for batch in run.batches():
        run.backward(loss_of(run, batch))
        break


def swallows_an_error_of_forward(run: TrainingRun) -> None:
    for _, targets in run.batches():
        with suppress(RuntimeError):
            learn(run, (torch.ones(4, 99), targets))


def swallows_an_error_of_backward(run: TrainingRun) -> None:
    for batch in run.batches():
        with suppress(RuntimeError):
            run.backward(Fails.apply(loss_of(run, batch)))  # type: ignore[no-untyped-call]  # torch's


def retries_backward(run: TrainingRun) -> None:
    for batch in run.batches():
        with suppress(RuntimeError):
            run.backward(Fails.apply(loss_of(run, batch)))  # type: ignore[no-untyped-call]  # torch's
        run.backward(loss_of(run, batch))


def begins_without_a_batch(run: TrainingRun) -> None:
    run.backward(torch.zeros((), requires_grad=True))


class Fails(torch.autograd.Function):
    """Runs out of memory in backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")


WRONG: dict[Callable[[TrainingRun], None], str] = {
    continues_before_backward: "handed out and not used",
    reads_ahead: "prefetcher",
    lists_all: "every batch needs",
    steps_twice: r"run\.step\(\) was called twice",
    goes_backward_twice: "called twice for one batch",
    steps_without_backward: r"without run\.backward",
    forgets_the_step: r"run\.step\(\) is missing",
    leaves_before_the_step: r"run\.step\(\) is missing",
    swallows_an_error_of_forward: "handed out and not used",
    swallows_an_error_of_backward: "cannot go on",
    retries_backward: "a part of its gradients",
    begins_without_a_batch: "without a new batch",
}


def drive(body: Callable[[TrainingRun], None], **settings: Any) -> None:
    with prepared(**settings) as run:
        body(run)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("body", WRONG)
def test_a_batch_that_is_not_used_exactly_once_is_an_error(
    body: Callable[[TrainingRun], None], size: int
) -> None:
    with pytest.raises(LoopError, match=WRONG[body]):
        drive(body, accumulate_grad_batches=size)


def test_a_prefetching_thread_meets_the_error() -> None:
    caught: list[BaseException] = []

    def read(batches: Iterator[Any]) -> None:
        try:
            list(batches)
        except LoopError as error:
            caught.append(error)

    with prepared() as run:
        thread = threading.Thread(target=read, args=(run.batches(),))
        thread.start()
        thread.join()

    assert "not used" in str(caught[0])


# ---- accumulation --------------------------------------------------------------------------------


def test_a_stream_fills_its_windows_over_the_end_of_an_epoch() -> None:
    model, batches = make_model(), list(DataLoader(Stream(), 4))

    settings: dict[str, Any] = {"max_steps": 5, "accumulate_grad_batches": 4, "data": of_dataset()}
    with prepared(model, Stream(), max_epochs=None, **settings) as run:
        for batch in run.batches():
            learn(run, batch)

    # Six batches an epoch: the windows hold 4, 2 + 2, 4, 4, 2 + 2.
    assert_same(model, train_by_hand(make_model(), in_windows((batches * 4)[:20], 4)))
    assert run.progress.epoch == 3


def test_a_stream_reads_like_fit() -> None:
    fitted, own = make_model(), make_model()
    settings: dict[str, Any] = {"max_steps": 5, "accumulate_grad_batches": 4, "data": of_dataset()}
    make_trainer(**settings).fit(fitted, Stream(22), **arguments())

    with prepared(own, Stream(22), max_epochs=None, **settings) as run:
        for batch in run.batches():
            learn(run, batch)

    assert_same(own, fitted)


def test_save_inside_a_window_is_an_error_and_after_it_none(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"barebones": False, "logger": False, "default_root_dir": tmp_path}
    with prepared(accumulate_grad_batches=2, **settings) as run:
        for count, batch in enumerate(run.batches(), start=1):
            learn(run, batch)
            if count % 2 == 0:
                assert run.save().name == f"step-{count // 2}"
            else:
                with pytest.raises(LoopError, match="inside an accumulation window"):
                    run.save()


def test_save_between_backward_and_step_is_an_error(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"barebones": False, "logger": False, "default_root_dir": tmp_path}
    with prepared(**settings) as run:
        for inputs, targets in run.batches():
            run.backward(run.loss(run.model(inputs), targets))
            with pytest.raises(LoopError, match="half a gradient"):
                run.save()
            run.step()


@pytest.mark.parametrize("size", [1, 4])
def test_evaluation_inside_the_loop_changes_nothing(size: int) -> None:
    def trained(evaluates: bool) -> nn.Module:
        model = make_net()
        torch.manual_seed(5)
        with prepared(model, make_loader(22, shuffle=True), accumulate_grad_batches=size) as run:
            for inputs, targets in run.batches():
                loss = run.loss(run.model(inputs), targets)
                if evaluates:
                    run.evaluate(make_loader(13, shuffle=True))
                run.backward(loss)
                run.step()
        return model

    assert_same(trained(True), trained(False))


# ---- what the body may do ------------------------------------------------------------------------


def test_the_body_makes_of_a_batch_what_it_likes() -> None:
    model = make_model()
    triples = [(x, y, torch.ones(())) for x, y in make_loader()]

    with prepared(model, iter(triples), max_epochs=None, max_steps=6,
                  given={"optimizer": arguments()["optimizer"]}) as run:  # fmt: skip
        for inputs, targets, weight in run.batches():
            run.backward(F.cross_entropy(run.model(inputs), targets) * weight)
            run.step()

    assert_same(model, by_hand(1))


def test_a_loss_between_two_outputs_is_not_tried_on_the_targets() -> None:
    views = [(x, x + 0.1) for x, _ in make_loader()]

    with prepared(train=iter(views), max_epochs=None, max_steps=6,
                  given=arguments(loss=F.mse_loss)) as run:  # fmt: skip
        for one, other in run.batches():
            run.backward(run.loss(run.model(one), run.model(other)))
            run.step()

    assert run.progress.step == 6


def test_run_loss_without_a_loss_says_so() -> None:
    with pytest.raises(InvalidArgument, match="no loss= was given"):
        drive(plainly, given={"optimizer": arguments()["optimizer"]})


def test_an_optimizer_with_a_closure_needs_fit() -> None:
    with pytest.raises(InvalidArgument, match="use fit"):
        drive(plainly, given=arguments(optimizer=torch.optim.LBFGS))


def _two_ranks(use_loop: Callable[[TrainingRun], None]) -> dict[str, torch.Tensor]:
    model = make_model()
    settings = {"strategy": "ddp", "seed": 3, "data": of_dataset(), "accumulate_grad_batches": 3}
    with prepared(model, make_data(28), **settings) as run:
        use_loop(run)
    return weights(model)


def plainly(run: TrainingRun) -> None:
    for batch in run.batches():
        learn(run, batch)


def in_pieces(run: TrainingRun) -> None:
    for size in (1, 1, 3):
        for batch in islice(run.batches(), size):
            learn(run, batch)


def test_two_processes_can_interrupt_a_window_and_stay_together() -> None:
    whole, pieces = run_ranks(_two_ranks, 2, plainly), run_ranks(_two_ranks, 2, in_pieces)

    assert different(pieces[0], whole[0]) == []
    assert different(pieces[1], pieces[0]) == []


def calls_the_module(run: TrainingRun) -> None:
    for inputs, targets in run.batches():
        run.backward(F.cross_entropy(run.wiring.model(inputs), targets))
        run.step()


def _module_on_two_ranks(in_step: bool) -> str:
    settings: dict[str, Any] = {"strategy": "ddp", "data": of_dataset(), "max_epochs": 1}
    model = make_model()
    try:
        if in_step:
            given = arguments(loss=None, step=lambda run, batch: model(batch[0]).mean())
            make_trainer(**settings).fit(model, make_data(), **given)
        else:
            drive(calls_the_module, model=model, train=make_data(), **settings)
    except LoopError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("in_step", [False, True], ids=["own loop", "step"])
def test_the_module_in_place_of_run_model_is_an_error_where_they_differ(in_step: bool) -> None:
    answers = run_ranks(_module_on_two_ranks, 2, in_step)

    assert all("without run.model" in answer for answer in answers), answers


def test_the_module_in_place_of_run_model_is_right_where_they_are_the_same() -> None:
    model = make_model()

    drive(calls_the_module, model=model)

    assert_same(model, by_hand(1))
    with pytest.raises(LoopError, match="the precision"):
        drive(calls_the_module, precision="bf16")


# ---- what the processes say to each other --------------------------------------------------------


def _gathered(run: TrainingRun) -> dict[str, Any]:
    """Of each kind of value what comes back, and what another shape or dtype is answered with."""
    rank, weight = run.env.rank, torch.ones(2, requires_grad=True)
    values: dict[str, Any] = {
        "float": torch.tensor([0.1, -0.0]) + rank,
        "float64": torch.tensor([[1 / 3], [float("nan") if rank else 1e300]], dtype=torch.float64),
        "int64": torch.tensor([2**53 + 1, -rank]),
        "bool": torch.tensor([True, rank == 1, False]),
        "int16": torch.tensor([300, -rank], dtype=torch.int16),
        "complex": torch.tensor([1 + 2j]) * (rank + 1),
        "half": torch.full((2, 2), 0.1 + rank, dtype=torch.bfloat16).T,
        "scalar": torch.tensor(7 + rank),
        "number": 0.5 + rank,
        "nothing": torch.zeros(0, 3),
        "with grad": weight * (rank + 1),
    }
    found = {name: run.gather(value) for name, value in values.items()}
    for name, value in {"rows": torch.ones(2 + rank), "dtypes": [rank, rank + 0.5][rank]}.items():
        with pytest.raises(RanksDisagree) as refused:
            run.gather(value)
        found[name] = str(refused.value)
    found["after"] = run.gather(rank)
    run.backward(run.model(torch.ones(1, 5)).sum())
    return found


def _gather() -> dict[str, Any]:
    with prepared(train=make_data(), strategy="ddp", data=of_dataset()) as run:
        for _ in islice(run.batches(), 1):
            found = _gathered(run)
            run.step()
    return found


def test_two_processes_gather_values_of_every_kind() -> None:
    found, other = run_ranks(_gather, 2)

    expected: dict[str, Any] = {
        "float": torch.stack([torch.tensor([0.1, -0.0]), torch.tensor([0.1, -0.0]) + 1]),
        "int64": torch.tensor([[2**53 + 1, 0], [2**53 + 1, -1]]),
        "bool": torch.tensor([[True, False, False], [True, True, False]]),
        "int16": torch.tensor([[300, 0], [300, -1]], dtype=torch.int16),
        "complex": torch.tensor([[1 + 2j], [2 + 4j]]),
        "half": torch.tensor([0.1, 1.1], dtype=torch.bfloat16)[:, None, None].expand(2, 2, 2),
        "scalar": torch.tensor([7, 8]),
        "number": torch.tensor([0.5, 1.5]),
        "nothing": torch.zeros(2, 0, 3),
        "with grad": torch.tensor([[1.0, 1.0], [2.0, 2.0]]),
        "after": torch.tensor([0, 1]),
    }
    for name, value in expected.items():
        for gathered in (found[name], other[name]):
            assert gathered.dtype == value.dtype, name
            assert torch.equal(gathered, value), name
            assert not gathered.requires_grad, name
    assert found["float64"][0].tolist() == [[1 / 3], [1e300]]
    assert found["float64"][1].isnan().tolist() == [[False], [True]]
    assert found["rows"] == other["rows"]
    assert "(2,) torch.float32 (rank 0), (3,) torch.float32 (rank 1)" in found["rows"]
    assert "() torch.int64 (rank 0), () torch.float32 (rank 1)" in found["dtypes"]


def test_one_process_gathers_its_own_value() -> None:
    with prepared() as run:
        assert torch.equal(run.gather(torch.tensor([True, False])), torch.tensor([[True, False]]))
        for batch in run.batches():
            learn(run, batch)


class Lines:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.metrics[step] = dict(metrics)


def test_what_run_log_is_given_is_logged_as_means_between_borders_and_over_the_epoch() -> None:
    logger = Lines()
    settings: dict[str, Any] = {"enable_checkpointing": False, "logger": logger, "max_epochs": 2}
    with prepared(barebones=False, log_every_n_steps=2, **settings) as run:
        for count, (inputs, targets) in enumerate(run.batches(), start=1):
            loss = run.loss(run.model(inputs), targets)
            run.log({"count": count, "same": loss * 2})
            if count % 2:
                run.log({"odd": torch.tensor(count)})
            run.backward(loss)
            run.step()

    assert {step: found["count"] for step, found in logger.metrics.items()} == {
        2: 1.5, 4: 3.5, 6: 5.5, 8: 7.5, 10: 9.5, 12: 11.5,
    }  # fmt: skip
    assert [logger.metrics[step]["odd"] for step in (2, 12)] == [1, 11]
    assert [logger.metrics[step]["count/epoch"] for step in (6, 12)] == [3.5, 9.5]
    for found in logger.metrics.values():
        assert found["same"] == pytest.approx(2 * found["train_loss"], rel=1e-6)


def _logged(scalars: Any) -> str:
    """The mean of what was logged, or why it could not be made."""
    try:
        with prepared(train=make_data(), strategy="ddp", data=of_dataset()) as run:
            for batch in run.batches():
                learn(run, batch)
                run.log(scalars)
    except LoopError as error:
        return str(error)
    return str(run.result().metrics["a"])


def _log_otherwise() -> list[str]:
    """Twice names that are not those of the other process, then the same."""
    rank = int(os.environ["RANK"])
    given: list[Any] = [{"ab"[rank]: 1.0}, {"a": 1.0} if rank == 0 else {}, {"a": rank}]
    return [_logged(scalars) for scalars in given]


def test_two_processes_log_the_same_names_or_are_told_which_they_logged() -> None:
    first, second = run_ranks(_log_otherwise, 2)

    said = "the processes logged different names at one border; rank"
    assert f"{said} 0 logged ['a']: " in first[0]
    assert f"{said} 1 logged ['b']: " in second[0]
    assert f"{said} 0 logged ['a']: " in first[1]
    assert f"{said} 1 logged []: " in second[1]
    assert (first[2], second[2]) == ("0.5", "0.5")
