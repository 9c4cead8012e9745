"""Evaluation and prediction on their own, with the trained model or another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torchweld.errors import InvalidArgument
from torchweld.loop.averages import averaged, check_weights
from torchweld.loop.console import Console
from torchweld.loop.evaluation import Evaluator, bind_forward, evaluate_data
from torchweld.loop.handle import Handle
from torchweld.loop.metric_objects import check_metrics
from torchweld.loop.placing import bind_transform
from torchweld.model.facts import wants_channels_last
from torchweld.setup.loading import evaluation_loader
from torchweld.setup.requests import FitRequest, check_functions, check_metric_names
from torchweld.setup.setting_up import remake, set_up
from torchweld.setup.surroundings import surroundings
from torchweld.setup.versions import headline

if TYPE_CHECKING:
    from torchweld.interfaces import Env, Loader
    from torchweld.loop.run import TrainingRun
    from torchweld.plan import Plan
    from torchweld.setup.launching import Launched
    from torchweld.setup.requests import Config

    MakeLoader = Callable[[Any], Loader]


@dataclass(frozen=True)
class EvaluationRequest:
    """The arguments of ``evaluate`` and ``predict``."""

    model: Any
    data: Any
    loss: Any = None
    eval_step: Any = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    init_weights: Any = None
    weights: str = "trained"


@dataclass(frozen=True)
class EvaluationRun:
    """What ``eval_step`` is given where nothing is trained."""

    model: Handle
    env: Env
    plan: Plan


def evaluate_model(
    request: EvaluationRequest, launched: Launched, config: Config, trained: TrainingRun | None
) -> dict[str, float]:
    """Return loss and metrics; of the trained model where there is one."""
    with (
        launched.ranks.first_cause({"doing": "evaluation"}),
        surroundings(launched.plan.settings),
        _ready(request, launched, config, trained) as (evaluator, make_loader),
    ):
        return evaluate_data(evaluator, make_loader, request.data)


def predict_model(
    request: EvaluationRequest, launched: Launched, config: Config, trained: TrainingRun | None
) -> list[Any]:
    """Return this rank's outputs, batch by batch."""
    with (
        launched.ranks.first_cause({"doing": "prediction"}),
        surroundings(launched.plan.settings),
        _ready(request, launched, config, trained) as (evaluator, make_loader),
    ):
        if isinstance(request.data, Mapping):
            raise InvalidArgument(
                f"data={{{', '.join(map(repr, request.data))}}} has several sets, and predict "
                "returns the outputs of one: call it once for each"
            )
        with closing(make_loader(request.data)) as loader:
            return evaluator.predict(loader)


@contextmanager
def _ready(
    request: EvaluationRequest, launched: Launched, config: Config, trained: TrainingRun | None
) -> Iterator[tuple[Evaluator, MakeLoader]]:
    if request.data is None:
        raise InvalidArgument("data=None: give the data to read, as val= of fit")
    check_functions(request, "loss", "eval_step")
    check_metric_names(request.metrics)
    check_metrics(request.metrics, launched.ranks.world_size)
    averages = check_weights(request.weights)
    if averages and trained is None:
        raise InvalidArgument("weights='average' is of a run: leave model= out after fit")
    evaluator, make_loader = _evaluator(request, launched, config, trained)
    with averaged(trained.wiring) if averages and trained is not None else nullcontext():
        yield evaluator, make_loader


def _evaluator(
    request: EvaluationRequest, launched: Launched, config: Config, trained: TrainingRun | None
) -> tuple[Evaluator, MakeLoader]:
    run: TrainingRun | EvaluationRun
    if trained is None:
        evaluator, make_loader, run = _fresh(request, launched, config)
    else:
        wiring, run = trained.wiring, trained
        evaluator, make_loader = wiring.evaluator, wiring.make_loader
        if request.init_weights is not None:
            raise InvalidArgument(
                "init_weights= is for another model than the trained one: give model="
            )
    if request.eval_step is not None:
        evaluator = replace(evaluator, forward=partial(request.eval_step, run))
    if request.loss is not None:
        evaluator = replace(evaluator, loss=request.loss)
    if request.metrics:
        evaluator = replace(evaluator, metrics=request.metrics)
    return evaluator, make_loader


def _fresh(
    request: EvaluationRequest, launched: Launched, config: Config
) -> tuple[Evaluator, MakeLoader, EvaluationRun]:
    if request.model is None:
        raise InvalidArgument("model=None: nothing was trained yet; give the model to evaluate")
    if isinstance(request.model, Mapping):
        raise InvalidArgument(
            f"model={{{', '.join(request.model)}}} was not trained by this Trainer: several models "
            "are evaluated after prepare, with model=None; else evaluate one that contains them"
        )
    console = Console(speaks=launched.ranks.rank == 0, quiet=config.extras.barebones)
    fit_request = FitRequest(
        request.model, loss=request.loss or _no_loss, init_weights=request.init_weights
    )
    remade = remake(launched, fit_request, config, console)
    last = wants_channels_last(remade.parts)
    ready = set_up(remade, console)
    console.open(headline(launched.plan, launched.ranks.env))
    handle, env = Handle(ready.prepared, remade.parts.model), launched.ranks.env
    evaluator = Evaluator(
        handle,
        ready.prepared.evaluate_is_collective,
        launched.ranks,
        bind_forward(ready.prepared.evaluate),
        request.loss,
        request.metrics,
        bind_transform(env.device, False, remade.parts.input_transforms),
        remade.parts.model,
    )
    make_loader = partial(evaluation_loader, launched, channels_last=last)
    return evaluator, make_loader, EvaluationRun(handle, env, launched.plan)


def _no_loss(_outputs: Any, _targets: Any) -> Any:
    """Stands for the loss that training would have, so that surgeries of it can be planned."""
    raise InvalidArgument("evaluate() was given no loss=")
