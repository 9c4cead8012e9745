"""From a model and data to a run, in one fixed order: seed, model, surgery, data, strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from torchweld import rng
from torchweld.data.repeated import RepeatedLoader
from torchweld.errors import InvalidArgument, PlanError, RunError
from torchweld.interfaces import Parts, SetupRequest
from torchweld.loop.console import Console
from torchweld.loop.evaluation import Evaluator, bind_forward
from torchweld.loop.feed import Feed
from torchweld.loop.handle import Handle
from torchweld.loop.loggers import make_loggers
from torchweld.loop.metric_objects import check_metrics
from torchweld.loop.placing import bind_transform
from torchweld.loop.recorder import Recorder
from torchweld.loop.schedules import Schedule, make_schedule
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
from torchweld.model.remaking import Outcome, operate_all
from torchweld.model.several import build_models, each_its_own, weights_of
from torchweld.processes.agree import agree_on_model
from torchweld.resolving.explain import render_problems
from torchweld.setup.directory import make_directory
from torchweld.setup.improving import improved
from torchweld.setup.launching import Launched, build, guarded
from torchweld.setup.loading import (
    data_seed,
    evaluation_loader,
    make_timetable,
    run_numbers,
    train_loader,
    validation,
)
from torchweld.setup.memory import memory_report, parameter_shapes, summary
from torchweld.setup.stateful import loss_scalers, ordered_callbacks, stateful_callbacks

if TYPE_CHECKING:
    from torchweld.interfaces import Loader, ParamGroup, Prepared
    from torchweld.loop.joint import Handles
    from torchweld.loop.timetable import Timetable
    from torchweld.loop.wiring import Member
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
    model = build_models(request.model, launched)
    if request.optimizer is not None:
        _into_training(model.children() if request.names else [model])
    visible = request.loss is not None and request.step is None
    facts = {**model_facts(model), **loss_facts(request.loss, visible=visible)}
    launched = replace(launched, plan=decided(launched.plan, facts))
    weights = weights_of(request.init_weights, request.names)
    weights.load_early(model)
    if isinstance(request.model, torch.nn.Module):
        check_materialised(model)  # a strategy that built it itself may fill it later
    rule = None if request.names else request.param_groups
    factory = each_its_own if request.names else as_factory(request.optimizer, model, rule)
    parts = Parts(
        model, request.loss, param_groups=rule, optimizer=factory,
        callbacks=config.extras.callbacks,
    )  # fmt: skip
    # Made anew for every run: a surgery may keep things between the steps of one.
    surgeries = [(chosen, build(chosen)) for chosen in launched.plan.surgeries]
    done = operate_all(parts, surgeries, launched.plan, config.earlier)
    weights.load_late(done.parts.model)
    _tell(done, console)
    lines = model_lines(done.parts.model)
    digest = model_digest(lines)
    agree_on_model(launched.ranks, lines, digest)
    return Remade(launched, done.parts, done.stateful, digest)


def _into_training(models: Iterable[torch.nn.Module]) -> None:
    """Train what is whole in evaluation: that is how libraries hand out pretrained models."""
    for model in models:
        if not any(module.training for module in model.modules()):
            model.train()


def _tell(done: Outcome, console: Console) -> None:
    for name in done.done_before:
        console.say(f"{name}: done to this model in an earlier run of this Trainer")
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
    launched = remade.launched
    parts = improved(launched, remade.parts, console)
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


@dataclass(frozen=True)
class Bound:
    """The model, or several as one, under the strategy: what a run needs of it.

    Attributes:
        reports: callbacks that tell what it holds.
        members: the models by name, where there are several.
        schedule: when the scheduler is stepped; None for several, which have their own.
    """

    ready: Ready
    handle: Handle | Handles
    scheduler: Any | None
    reports: tuple[Any, ...]
    members: Mapping[str, Member] = field(default_factory=dict)
    schedule: Schedule | None = None


Bind = Callable[[Remade, "FitRequest", "Timetable", "Config", Console], Bound]


def bind_one(
    remade: Remade,
    request: FitRequest,
    table: Timetable,
    config: Config,
    console: Console,
    *,
    label: str = "",
) -> Bound:
    """Set one model up, with its scheduler and a word on what it holds.

    Args:
        label: put before what is said of it.
    """
    launched, parts = remade.launched, remade.parts
    plan = launched.plan
    shapes = parameter_shapes(parts.model)  # before the strategy replaces them
    ready = set_up(remade, console)
    check_closure(ready.prepared, plan)
    reports: tuple[Any, ...] = ()
    if config.extras.model_summary:
        console.say(label + summary(plan, parts.model, ready.prepared))
        if ready.prepared.optimizer is not None:
            say = lambda line: console.say(label + line)  # noqa: E731
            reports = memory_report(launched, shapes, ready.prepared, say)
    world_size = remade.launched.ranks.world_size
    schedule = make_schedule(
        request.lr_scheduler, ready.prepared.optimizer, table, world_size=world_size
    )
    scheduler = schedule.scheduler if schedule is not None else None
    return Bound(ready, Handle(ready.prepared, parts.model), scheduler, reports, schedule=schedule)


def wire(
    launched: Launched,
    request: FitRequest,
    config: Config,
    console: Console,
    bind: Bind = bind_one,
) -> Wiring:
    """Make everything of a training run; ``bind`` sets one model up, or several."""
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
    if config.duration.overfit_batches is not None:
        assert table.batches_per_epoch is not None
        loader = RepeatedLoader(loader, table.batches_per_epoch)
    check_numbers(config, plan, loader, table, ranks.world_size, console)
    bound = bind(remade, request, table, config, console)
    ready, handle = bound.ready, bound.handle
    parts = replace(parts, callbacks=(*bound.reports, *parts.callbacks))
    directory = make_directory(launched.ranks, config.extras, launched.plan.short)
    transform = bind_transform(
        ranks.env.device, getattr(loader, "on_device", False), parts.input_transforms
    )
    callbacks = ordered_callbacks(parts.callbacks, config)
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
        validation=validation(make_loader, request.val_sets, config.duration, console),
        scheduler=bound.scheduler,
        schedule=bound.schedule,
        callbacks=callbacks,
        loggers=make_loggers(extras.logger, directory) if ranks.rank == 0 else [],
        console=console,
        stateful={
            **remade.stateful,
            **loss_scalers(ready.prepared, bound.members),
            **stateful_callbacks(extras.callbacks),
        },
        directory=directory,
        root=extras.root,
        model_digest=remade.digest,
        hparams=request.hparams,
        group_names=ready.group_names,
        optimizer_class=ready.optimizer_class,
        provides=ready.provides,
        make_loader=make_loader,
        loss=parts.loss,
        members=bound.members,
    )


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
