"""The last part of the set-up: bind, resume, try the first batch, choose how losses are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from torchweld import rng
from torchweld.callbacks import EarlyStopping, ModelCheckpoint
from torchweld.callbacks.monitored import check_measured
from torchweld.errors import InvalidArgument, RunError
from torchweld.loop.computing import (
    call_model,
    compute_by_model,
    compute_by_step,
    compute_mappings,
    compute_pairs,
    scalar_names,
    with_names,
)
from torchweld.loop.evaluation import check_pair
from torchweld.loop.keeping import hand_on
from torchweld.loop.placing import bind_transform
from torchweld.loop.run import TrainingRun
from torchweld.loop.saving import check_savable, find_checkpoint, restore_run
from torchweld.model.facts import batch_facts, try_first_batch
from torchweld.model.remaking import bind_parts
from torchweld.nesting import shapes
from torchweld.processes.agree import agree_on
from torchweld.setup.agreeing import hyper_parameters
from torchweld.setup.setting_up import decided
from torchweld.setup.surroundings import uncompiled

if TYPE_CHECKING:
    from torchweld.loop.wiring import Wiring
    from torchweld.setup.requests import FitRequest

Compute = Callable[[Any], Any]


def open_run(
    wiring: Wiring, request: FitRequest, where: dict[str, Any]
) -> tuple[TrainingRun, Compute | None]:
    """Return a run that is ready for step 1, and its ``batch -> loss``.

    Args:
        where: kept up to date with what the run is doing.

    Returns:
        The second is None where a resumed run has nothing left to do.
    """
    run = TrainingRun(wiring, where)
    if wiring.directory is not None:
        check_savable(wiring)
    _check_monitors(wiring, request)
    agree_on(wiring.ranks, "optimizer", hyper_parameters(wiring.optimizers))
    _bind(run, request)
    wiring = run.wiring
    seed = wiring.plan.settings.seed
    if seed is not None:
        rng.seed_all(seed + wiring.ranks.rank)
    _start_training(wiring)
    if request.ckpt_path is not None:
        checkpoint = find_checkpoint(wiring, request.ckpt_path, _monitored(wiring))
        wiring.console.say(restore_run(run, checkpoint))
        if request.ckpt_path == "last":
            hand_on(run, checkpoint)
        wiring = run.wiring
    _log_hparams(wiring)
    total = wiring.table.total_steps
    if total is not None and run.position.step >= total:
        wiring.console.say(f"nothing is left to do: {run.position.step} of {total} steps are done")
        return run, None
    compute = _first_batch(run, request)
    run.borders.start()
    return run, compute


def _check_monitors(wiring: Wiring, request: FitRequest) -> None:
    """Refuse what would follow a metric that this run never measures."""
    table, sets = wiring.table, wiring.validation.loaders
    epochs_end = table.steps_per_epoch is not None or wiring.ranks.world_size == 1
    by_epoch = epochs_end and table.val_every_epochs is not None
    validates = bool(sets) and (by_epoch or table.val_every_steps is not None)
    stopping = (c for c in wiring.callbacks if isinstance(c, EarlyStopping))
    followers = [(callback.monitor, type(callback).__name__) for callback in stopping]
    followers += [(s.monitor, "LRSchedule") for s in wiring.schedules if s.interval == "metric"]
    for monitor, who in followers:
        check_measured(monitor, who, validates=validates, epochs_end=epochs_end)
    # What is logged inside an epoch can be compared too, and a run may log values of its own.
    of_validation = {"val_loss", *(f"val_{name}" for name in request.metrics)}
    savers = [c for c in wiring.callbacks if isinstance(c, ModelCheckpoint)]
    for saver in [] if request.own_loop else savers:
        if saver.monitor is not None and saver.monitor in of_validation:
            check_measured(saver.monitor, "ModelCheckpoint", validates=validates, epochs_end=True)


def _bind(run: TrainingRun, request: FitRequest) -> None:
    """Give the run to everything that wants it, then tell the feed what batches go through."""
    wiring = run.wiring
    parts = bind_parts(wiring.parts, run)
    savers = tuple(c for c in wiring.callbacks if isinstance(c, ModelCheckpoint))
    others = tuple(c for c in parts.callbacks if not isinstance(c, ModelCheckpoint))
    evaluator = wiring.evaluator
    if request.eval_step is not None:
        evaluator = replace(evaluator, forward=partial(request.eval_step, run))
    run.rewire(
        replace(
            wiring,
            parts=parts,
            callbacks=(*others, *savers),
            evaluator=evaluator,
        )
    )
    feed, device = wiring.feed, wiring.ranks.env.device
    on_device = getattr(feed.loader, "on_device", False)
    feed.transform = bind_transform(
        device, on_device, parts.input_transforms, parts.batch_transforms
    )


def _start_training(wiring: Wiring) -> None:
    """Put the model into training, except for layers that were put into evaluation before."""
    frozen = [(name, m) for name, m in wiring.model.named_modules() if not m.training]
    wiring.handle.mode(True)
    for _, module in frozen:
        module.training = False
    if frozen:
        names = ", ".join(name or "the model itself" for name, _ in frozen[:3])
        more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
        wiring.console.say(f"in evaluation while training, as given: {names}{more}")


def _monitored(wiring: Wiring) -> tuple[str, str] | None:
    for callback in wiring.callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            return callback.monitor, callback.mode
    return None


def _log_hparams(wiring: Wiring) -> None:
    if wiring.hparams:
        for logger in wiring.loggers:
            if hasattr(logger, "log_hyperparams"):
                logger.log_hyperparams(wiring.hparams)


# ---- the first batch -----------------------------------------------------------------------------


def _first_batch(run: TrainingRun, request: FitRequest) -> Compute | None:
    """Look at the first batch, decide what is still open, and choose how losses are made.

    Raises:
        PlanError: the batch or the loss contradicts what a component needs.
        RunError: the loss fails on it.
    """
    wiring, position = run.wiring, run.position
    if not wiring.feed.is_open(position.epoch):
        wiring.feed.start(position.epoch, position.batch)
    batch = wiring.feed.show_first()
    base = wiring.evaluator.transform
    plan = decided(wiring.plan, batch_facts(batch))
    batch = base(batch) if base is not None else batch
    if request.step is not None:
        compute = compute_by_step(request.step, run, wiring.recorder)
        if request.val_sets and request.eval_step is None and isinstance(batch, (tuple, list)):
            check_pair(batch)
    else:
        tries = not request.names and _asks_for_soft_targets(wiring) and _is_pair(batch)
        if request.own_loop and not tries:
            run.plan = plan  # what the body of an own loop makes of a batch is its own affair
            return None
        _check_form(wiring, batch)
        with uncompiled(wiring.plan.settings):
            compute, facts = _tried(wiring, request, batch)
        plan = decided(plan, {name: v for name, v in facts.items() if name not in plan.facts})
    run.plan = plan
    return compute


def _asks_for_soft_targets(wiring: Wiring) -> bool:
    return any("loss." in deferred.relation for deferred in wiring.plan.deferred)


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def _check_form(wiring: Wiring, batch: Any) -> None:
    if isinstance(batch, Mapping) or _is_pair(batch):
        return
    if isinstance(batch, torch.Tensor) and wiring.loss is None:
        return
    size = f" of {len(batch)} items" if hasattr(batch, "__len__") else ""
    raise InvalidArgument(
        f"the first batch is a {type(batch).__name__}{size} ({shapes(batch)}): core knows pairs "
        "(inputs, targets) and mappings; give step=(run, batch) -> loss for anything else"
    )


def _tried(wiring: Wiring, request: FitRequest, batch: Any) -> tuple[Compute, dict[str, bool]]:
    """Try model and loss on the first batch; returns how losses are made, and what it told."""
    forward, loss = wiring.prepared.forward, wiring.loss
    transforms = wiring.parts.target_transforms
    if loss is None:
        trial = _whole_batches(call_model(wiring.prepared.evaluate, batch))
        scalars: list[str] = []

        def returned(outputs: Any, _targets: Any) -> Any:
            scalars.extend(scalar_names(outputs))
            return outputs

        facts, _ = try_first_batch(wiring.model, batch, lambda b: (trial(b), None), returned)
        return compute_by_model(call_model(forward, batch), scalars, wiring.recorder), facts
    make = compute_mappings if isinstance(batch, Mapping) else compute_pairs
    compute = make(forward, loss, transforms)
    facts, named = try_first_batch(
        wiring.model,
        batch,
        _trial_forward(wiring),
        loss,
        metrics=request.metrics if request.eval_step is None else None,
        asks_for_soft_targets=_asks_for_soft_targets(wiring),
    )
    return (with_names(compute, wiring.recorder) if named else compute), facts


def _whole_batches(compute: Compute) -> Compute:
    def tried(batch: Any) -> Any:
        try:
            return compute(batch)
        except TypeError as error:
            raise RunError(
                "loss=None, so the model is called with the whole batch and has to return its "
                f"loss: {error}; give loss=(outputs, targets) -> scalar"
            ) from error

    return tried


def _trial_forward(wiring: Wiring) -> Callable[[Any], tuple[Any, Any]]:
    evaluate = wiring.prepared.evaluate

    def forward(batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            return evaluate(**batch), batch
        return evaluate(batch[0]), batch[1]

    return forward
