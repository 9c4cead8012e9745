"""From a model and data to a run, in one fixed order: seed, model, surgery, data, strategy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from torchweld import rng
from torchweld.callbacks import ModelCheckpoint
from torchweld.errors import CheckpointError, InvalidArgument, PlanError, RunError
from torchweld.interfaces import Parts, SetupRequest
from torchweld.loop.console import Console
from torchweld.loop.evaluation import Evaluator, bind_forward, bind_transform, check_metrics
from torchweld.loop.feed import Feed
from torchweld.loop.handle import Handle
from torchweld.loop.loggers import make_loggers
from torchweld.loop.recorder import Recorder
from torchweld.loop.wiring import Wiring, needs_closure
from torchweld.model.facts import loss_facts, model_facts, wants_channels_last
from torchweld.model.parameters import (
    CheckedFactory,
    as_factory,
    check_groups,
    check_materialised,
    check_trained,
    make_groups,
    model_digest,
    model_lines,
    without_frozen_groups,
)
from torchweld.model.remaking import Outcome, Weights, build_model, numbered, operate_all
from torchweld.processes.agree import agree_on_model
from torchweld.resolving.explain import render_problems
from torchweld.setup.launching import Launched, build, guarded
from torchweld.setup.loading import (
    evaluation_loader,
    make_timetable,
    run_numbers,
    train_loader,
    validation,
)
from torchweld.setup.memory import memory_report, parameter_shapes, summary

if TYPE_CHECKING:
    from torchweld.interfaces import Loader, ParamGroup, Prepared
    from torchweld.loop.timetable import Timetable
    from torchweld.plan import Plan
    from torchweld.setup.requests import Config, FitRequest


@dataclass(frozen=True)
class Remade:
    """The model after surgery, and what else surgeries made."""

    launched: Launched
    parts: Parts
    stateful: Mapping[str, Any]
    digest: str


def remake(launched: Launched, request: FitRequest, config: Config, console: Console) -> Remade:
    """Seed, build the model, decide what it tells, operate, and compare the ranks' models."""
    if launched.plan.settings.seed is not None:
        rng.seed_all(launched.plan.settings.seed)
    model = build_model(request.model, launched)
    visible = request.loss is not None and request.step is None
    facts = {**model_facts(model), **loss_facts(request.loss, visible=visible)}
    launched = replace(launched, plan=decided(launched.plan, facts))
    weights = Weights(request.init_weights)
    weights.load_early(model)
    if isinstance(request.model, torch.nn.Module):
        check_materialised(model)  # a strategy that built it itself may fill it later
    factory = as_factory(request.optimizer, model, request.param_groups)
    parts = Parts(
        model, request.loss, param_groups=request.param_groups, optimizer=factory,
        callbacks=config.extras.callbacks,
    )  # fmt: skip
    # Made anew for every run: a surgery may keep things between the steps of one.
    surgeries = [(chosen, build(chosen)) for chosen in launched.plan.surgeries]
    done = operate_all(parts, surgeries, launched.plan)
    weights.load_late(done.parts.model)
    _tell(done, console)
    lines = model_lines(done.parts.model)
    digest = model_digest(lines)
    agree_on_model(launched.ranks, lines, digest)
    return Remade(launched, done.parts, done.stateful, digest)


def _tell(done: Outcome, console: Console) -> None:
    for report in done.reports:
        console.say(str(report))
    for problem in done.problems:
        if problem.severity == "allowed":
            console.say(f"{problem.code} {problem.what}; you allowed it: {problem.key}")
        else:
            console.warn(f"{problem.code} {problem.what}: {problem.why}; {problem.fix}")


def decided(plan: Plan, facts: Mapping[str, bool]) -> Plan:
    """Resolve again with ``facts``; only what they decide can be new.

    Raises:
        PlanError: they make the plan impossible.
        RunError: they change options of components that are built already.
    """
    after = plan.with_facts(facts)
    after.raise_for_problems()
    if after.digest != plan.digest:
        raise RunError(
            "the facts of this model change the options of a component that is built already: "
            f"{after.adjusted}; give these options yourself"
        )
    return after


# ---- the strategy and the optimizer ------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The model under its strategy.

    Attributes:
        optimizer_class: whose state is saved; a strategy may have put its own around it.
    """

    prepared: Prepared
    optimizer_class: str
    group_names: list[list[str]]
    provides: frozenset[str]


def set_up(remade: Remade, console: Console) -> Ready:
    """Group the parameters, hand the model to the strategy, check what is trained."""
    launched, parts = remade.launched, remade.parts
    provides = strategy_tokens(launched.plan)
    groups = _groups(parts, provides, console) if parts.optimizer is not None else []
    factory = None if parts.optimizer is None else CheckedFactory(parts.optimizer)
    request = SetupRequest(
        groups=groups,
        optimizer=factory,
        optimizer_wrappers=parts.optimizer_wrappers,
        grad_transforms=parts.grad_transforms,
        env=launched.ranks.env,
        settings=launched.plan.settings,
    )
    prepared = guarded(
        launched.plan.strategy, "set up", lambda: launched.strategy.setup(parts.model, request)
    )
    names = [group["names"] for group in groups]
    # Without "params.writable" the optimizer may hold copies, which only the strategy can compare.
    if parts.optimizer is not None and "params.writable" in provides:
        names = check_trained(prepared, groups)
    for note in prepared.notes:
        console.say(note)
    made = factory.made if factory is not None else ""
    if parts.optimizer_wrappers:
        made = type(prepared.optimizer).__name__
    return Ready(prepared, made, names, provides)


def strategy_tokens(plan: Plan) -> frozenset[str]:
    """What the strategy of ``plan`` provides with its options."""
    assert plan.strategy is not None
    tokens = plan.strategy.claims(plan.settings).provides
    return frozenset({tokens} if isinstance(tokens, str) else tokens)


def _groups(parts: Parts, provides: frozenset[str], console: Console) -> list[ParamGroup]:
    groups = make_groups(parts.model, parts.param_groups)
    check_groups(groups, parts.model)
    if "params.may_unfreeze" not in provides:
        groups, notes = without_frozen_groups(groups)
        for note in notes:
            console.say(note)
    return groups


# ---- the run -----------------------------------------------------------------------------------


def wire(launched: Launched, request: FitRequest, config: Config, console: Console) -> Wiring:
    """Make everything of a training run."""
    remade = remake(launched, request, config, console)
    launched, parts = remade.launched, remade.parts
    ranks, extras, plan = launched.ranks, config.extras, remade.launched.plan
    check_metrics(request.metrics, ranks.world_size)
    last = wants_channels_last(parts)  # before a strategy may lay the weights out anew
    make_loader = partial(evaluation_loader, launched, channels_last=last)
    seed = data_seed(launched)
    loader = train_loader(launched, request.train, parts, seed, channels_last=last)
    for note in filter(None, [getattr(loader, "note", "")]):
        console.say(f"data: {note}")
    log_every = None if extras.barebones else extras.log_every_n_steps
    table = make_timetable(launched, loader, config.duration, log_every, console)
    check_numbers(config, plan, loader, table, ranks.world_size, console)
    shapes = parameter_shapes(parts.model)  # before the strategy replaces them
    ready = set_up(remade, console)
    check_closure(ready.prepared, plan)
    if extras.model_summary:
        console.say(summary(plan, parts.model, ready.prepared))
        report = memory_report(launched, shapes, ready.prepared, console.say)
        parts = replace(parts, callbacks=(*report, *parts.callbacks))
    scheduler = _scheduler(request, ready.prepared, table)
    directory = _directory(launched, config)
    handle = Handle(ready.prepared)
    transform = bind_transform(
        ranks.env.device, getattr(loader, "on_device", False), parts.input_transforms
    )
    callbacks = _callbacks(parts.callbacks, config)
    known = loader.batch_size is not None and loader.num_samples is not None
    return Wiring(
        plan=plan,
        ranks=ranks,
        model=parts.model,
        parts=parts,
        prepared=ready.prepared,
        handle=handle,
        table=table,
        feed=Feed(loader, None, table.batches_per_epoch, count_samples=not known),
        recorder=Recorder(ranks),
        evaluator=Evaluator(
            handle,
            ready.prepared.evaluate_is_collective,
            ranks,
            bind_forward(
                ready.prepared.evaluate,
                takes_targets=request.model_has_loss,
            ),
            parts.loss,
            request.metrics,
            transform,
            parts.model,
        ),
        validation=validation(make_loader, request.val_sets, config.duration),
        scheduler=scheduler,
        callbacks=callbacks,
        loggers=make_loggers(extras.logger, directory) if ranks.rank == 0 else [],
        console=console,
        stateful={**remade.stateful, **_stateful_callbacks(extras.callbacks)},
        directory=directory,
        root=extras.root,
        model_digest=remade.digest,
        hparams=request.hparams,
        group_names=ready.group_names,
        optimizer_class=ready.optimizer_class,
        provides=ready.provides,
        make_loader=make_loader,
        loss=parts.loss,
    )


def data_seed(launched: Launched) -> int:
    """The seed of the order of samples, alike on all ranks.

    Without ``seed=`` it is what torch was seeded with on rank 0, which draws no random number.
    """
    seed = launched.plan.settings.seed
    if seed is not None:
        return seed
    mine = str(torch.initial_seed() % 2**62)
    return int(launched.ranks.exchange("data seed", mine)[0])


def check_numbers(
    config: Config, plan: Plan, loader: Loader, table: Timetable, world_size: int, console: Console
) -> None:
    """Let plugins judge the numbers of this run (TW6xx).

    Raises:
        PlanError: at least one of them refuses.
    """
    problems = config.registry.check_plan(plan, run_numbers(loader, table, world_size))
    errors = [p for p in problems if p.severity == "error"]
    if errors:
        raise PlanError(render_problems(problems), errors)
    for problem in problems:
        console.warn(f"{problem.code} {problem.what}: {problem.why}")


def check_closure(prepared: Prepared, plan: Plan) -> None:
    """Refuse an optimizer that needs a closure where it cannot have one.

    Raises:
        InvalidArgument: under this strategy, precision or accumulation.
    """
    if not needs_closure(prepared.optimizer):
        return
    name = type(prepared.optimizer).__name__
    if prepared.step_closure is None:
        assert plan.strategy is not None
        raise InvalidArgument(
            f"{name} evaluates the loss itself, which strategy {plan.strategy.name!r} with "
            f"precision {plan.settings.precision!r} cannot offer: choose another optimizer"
        )
    if plan.settings.accumulate_grad_batches > 1:
        raise InvalidArgument(
            f"{name} evaluates the loss itself, so accumulate_grad_batches="
            f"{plan.settings.accumulate_grad_batches} has no meaning: leave it at 1"
        )


def _scheduler(request: FitRequest, prepared: Prepared, table: Timetable) -> Any | None:
    if request.lr_scheduler is None:
        return None
    if table.total_steps is None:
        raise InvalidArgument("lr_scheduler= needs to know the number of steps: give max_steps=…")
    call = "it is called with (optimizer, total_steps): lambda optimizer, _: StepLR(optimizer, 30)"
    try:
        scheduler = request.lr_scheduler(prepared.optimizer, table.total_steps)
    except TypeError as error:
        raise InvalidArgument(f"lr_scheduler cannot be made ({error}): {call}") from error
    if not hasattr(scheduler, "step"):
        raise InvalidArgument(
            f"lr_scheduler returned {type(scheduler).__name__}, which has no step(): {call}"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise InvalidArgument(
            "lr_scheduler returned ReduceLROnPlateau, which needs a metric, and schedules are "
            "stepped after each optimizer step: choose another, or call it in a callback"
        )
    return scheduler


def _directory(launched: Launched, config: Config) -> Path | None:
    """Make the directory of the run, if anything is to be written; alike on all ranks.

    Raises:
        CheckpointError: it cannot be written.
    """
    extras, ranks = config.extras, launched.ranks
    if not extras.checkpointing and extras.logger is not True:
        return None
    made = ""
    if ranks.rank == 0:
        name = f"{time.strftime('%m%d-%H%M')}-{launched.plan.short}"
        made = _make_directory(extras.root, name)
    answer = ranks.exchange("run directory", made)[0]
    if answer.startswith("cannot"):
        raise CheckpointError(
            f"default_root_dir={str(extras.root)!r} {answer}: choose another, or write nothing "
            "with enable_checkpointing=False, logger=False"
        )
    return Path(answer)


def _make_directory(root: Path, name: str) -> str:
    """Make ``root/name`` (with a number if it is taken) and return it, or why it cannot be."""
    for number in range(1, 1000):
        directory = root / (name if number == 1 else f"{name}-{number}")
        try:
            directory.mkdir(parents=True)
            probe = directory / ".probe"
            probe.write_bytes(b"x")
            probe.unlink()
        except FileExistsError:
            if not directory.is_dir():
                return f"cannot be made: {directory} is a file"
            continue
        except OSError as error:
            return f"cannot be written: {error}"
        return str(directory)
    return "cannot be made: there are a thousand runs of this minute"


def _callbacks(callbacks: tuple[Any, ...], config: Config) -> tuple[Any, ...]:
    """The callbacks of the run; the one that saves comes last, to save what the others changed."""
    savers = [c for c in callbacks if isinstance(c, ModelCheckpoint)]
    others = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
    if savers and not config.extras.checkpointing:
        raise InvalidArgument(
            "callbacks has a ModelCheckpoint and enable_checkpointing=False: remove one of them"
        )
    if config.extras.checkpointing and not savers:
        savers = [ModelCheckpoint()]
    return (*others, *savers)


def _stateful_callbacks(callbacks: tuple[Any, ...]) -> dict[str, Any]:
    by_name: dict[str, list[Any]] = {}
    for callback in callbacks:
        if hasattr(callback, "state_dict"):
            by_name.setdefault(f"callback {type(callback).__name__}", []).append(callback)
    found: dict[str, Any] = {}
    for name, items in by_name.items():
        found.update(numbered(name, items))
    return found
