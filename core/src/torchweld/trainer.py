"""The Trainer: choose, look at the plan, train; and the door for an own loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchweld.components import CheckpointingOptions, Choice, CompileOptions, Settings
from torchweld.errors import InvalidArgument
from torchweld.interfaces import Result
from torchweld.loop.console import Console
from torchweld.loop.metric_objects import as_metrics
from torchweld.planning import auto_strategy, make_plan, per_unit
from torchweld.processes.agree import agree_on
from torchweld.processes.ending import heard_signals
from torchweld.processes.ranks import launched_world_size
from torchweld.registry import Registry
from torchweld.setup import elsewhere
from torchweld.setup.agreeing import what_is_asked
from torchweld.setup.evaluating import EvaluationRequest, evaluate_model, predict_model
from torchweld.setup.flags import (
    Duration,
    Extras,
    as_callbacks,
    bare,
    clip_value,
    dry,
    parse_accelerator,
    parse_deterministic,
    parse_devices,
    parse_max_time,
    parse_precision,
    parse_seed,
    positive,
    timed,
)
from torchweld.setup.launching import Launched, start
from torchweld.setup.opening import open_run
from torchweld.setup.requests import Config, FitRequest
from torchweld.setup.setting_up import bind_one, wire
from torchweld.setup.several import bind_several
from torchweld.setup.surroundings import surroundings
from torchweld.setup.versions import headline
from torchweld.spelling import named_arguments

if TYPE_CHECKING:
    from torchweld.loop.run import TrainingRun
    from torchweld.plan import Plan


class Trainer:
    """Composes a strategy, a data source and surgeries, and trains with them.

    Making one makes the plan and starts nothing: ``print(trainer.plan.explain())``. It never raises
    on what the plan found; ``fit``, ``prepare``, ``evaluate`` and ``predict`` do, on every rank.

    Args:
        strategy: name, ``use(…)``, or component; ``"auto"`` is ``ddp`` when several processes were
            launched, else ``single``.
        data: data source of training, and of the other splits unless ``val_data`` is given.
        val_data: data source of validation, evaluation and prediction.
        surgery: changes to model, loss and batches, in any order.
        precision: ``"32"``, ``"bf16"`` and ``"16"`` (autocast), ``"bf16-true"`` (cast parameters).
        devices: number of processes that must have been launched; they are started by torchrun.
        max_epochs: 1 where neither this nor ``max_steps`` is given.
        max_steps: optimizer steps, like every step-valued setting.
        max_time: ``"DD:HH:MM:SS"``, a timedelta or its arguments; the run ends at the border at
            which it is used up. A resumed run counts on.
        gradient_clip_val: largest gradient norm (or value, by ``gradient_clip_algorithm``).
        limit_train_batches: batches (int) or fraction (float) of an epoch; the same for validation.
        val_check_interval: optimizer steps of the run (int), or a fraction of each epoch (float).
        logger: True or ``"tensorboard"``, ``"csv"``, False, loggers with Lightning's method names,
            or a list of these.
        barebones: no bar, logs, checkpoints, summary.
        overfit_batches: train on the first batches (int, or a fraction of an epoch) again and
            again, the same ones in the same order; validation reads as many.
        fast_dev_run: one training step and one validation batch (or so many), nothing written.
        seed: None leaves the random state alone; else the same on every rank through set-up, then
            ``seed + rank``.
        deterministic: let torch choose deterministic algorithms during the run; ``"warn"`` where
            there is none. Without ``seed`` random numbers are still other ones each time.
        sync_batchnorm: BatchNorm over the batches of all processes; on GPUs only.
        compile: compile each unit of the model in place; a mapping for ``torch.compile``'s options.
        activation_checkpointing: compute the activations of each unit again in the backward pass
            instead of keeping them; a mapping for options, see ``CheckpointingOptions``.
        allow: keys of findings to accept, e.g. ``"TW302:cutmix+mixup"``; they stay in the plan.
        strict: warnings of the plan, and surgeries that change nothing, become errors.
        registry: what can be chosen; everything installed by default.

    Raises:
        InvalidArgument: an argument that cannot work whatever the choices are.
    """

    @named_arguments("Trainer", elsewhere.TRAINER)
    def __init__(
        self,
        *,
        strategy: Choice = "auto",
        data: Choice = "torch",
        val_data: Choice | None = None,
        surgery: Choice | Sequence[Choice] = (),
        accelerator: str = "auto",
        devices: int | str | None = None,
        precision: str | int = "32",
        max_epochs: int | None = None,
        max_steps: int | None = None,
        max_time: str | timedelta | Mapping[str, float] | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        log_every_n_steps: int = 50,
        val_check_interval: int | float | None = None,
        check_val_every_n_epoch: int | None = 1,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        overfit_batches: int | float | None = None,
        enable_progress_bar: bool = True,
        enable_checkpointing: bool = True,
        enable_model_summary: bool = True,
        logger: Any = True,
        callbacks: Any = (),
        default_root_dir: str | Path = "runs",
        barebones: bool = False,
        fast_dev_run: bool | int = False,
        seed: int | None = None,
        deterministic: bool | Literal["warn"] = False,
        sync_batchnorm: bool = False,
        compile: bool | Mapping[str, Any] = False,
        activation_checkpointing: bool | Mapping[str, Any] = False,
        allow: Sequence[str] = (),
        strict: bool = False,
        registry: Registry | None = None,
    ) -> None:
        settings = Settings(
            precision=parse_precision(precision),
            accumulate_grad_batches=positive("accumulate_grad_batches", accumulate_grad_batches),
            gradient_clip_val=clip_value(gradient_clip_val, gradient_clip_algorithm),
            gradient_clip_algorithm=gradient_clip_algorithm,
            accelerator=parse_accelerator(accelerator),
            seed=parse_seed(seed),
            compile=per_unit("compile", CompileOptions, compile),
            activation_checkpointing=per_unit(
                "activation_checkpointing", CheckpointingOptions, activation_checkpointing
            ),
            deterministic=parse_deterministic(deterministic),
            sync_batchnorm=bool(sync_batchnorm),
        )
        duration = Duration(
            max_epochs=max_epochs,
            max_steps=max_steps,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            val_check_interval=val_check_interval,
            check_val_every_n_epoch=check_val_every_n_epoch,
            overfit_batches=overfit_batches,
        )
        extras = Extras(
            log_every_n_steps=log_every_n_steps,
            progress_bar=enable_progress_bar,
            checkpointing=enable_checkpointing,
            model_summary=enable_model_summary,
            logger=logger,
            callbacks=as_callbacks(callbacks),
            root=Path(default_root_dir),
        )
        if fast_dev_run:
            few = int(fast_dev_run)
            duration = Duration(max_steps=few, limit_train_batches=few, limit_val_batches=few)
            extras = dry(extras)
        registry = registry if registry is not None else Registry.installed()
        plan = make_plan(
            registry,
            strategy=auto_strategy(launched_world_size()) if strategy == "auto" else strategy,
            data=data,
            val_data=val_data,
            surgery=surgery,
            settings=settings,
            allow=allow,
            strict=strict,
        )
        self._config = Config(
            plan,
            registry,
            duration,
            timed(bare(extras) if barebones else extras, parse_max_time(max_time)),
            parse_devices(devices),
        )
        self._launched: Launched | None = None
        self._run: TrainingRun | None = None
        self._given_model: Any = None

    @property
    def plan(self) -> Plan:
        """The plan: after a ``fit`` with everything that only it could decide."""
        if self._run is not None:
            return self._run.plan
        return self._launched.plan if self._launched is not None else self._config.plan

    # ---- training --------------------------------------------------------------------------------

    @named_arguments("fit", elsewhere.FIT)
    def fit(
        self,
        model: Any,
        train: Any,
        val: Any = None,
        *,
        loss: Any = None,
        step: Any = None,
        eval_step: Any = None,
        metrics: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        param_groups: Any = None,
        init_weights: Any = None,
        ckpt_path: str | Path | None = None,
        hparams: Mapping[str, Any] | None = None,
    ) -> Result:
        """Train ``model`` to the end; every rank calls it.

        Args:
            model: an ``nn.Module``, or a function that builds one; or a mapping of several by name.
                Then ``optimizer``, ``lr_scheduler``, ``param_groups`` and ``init_weights`` are
                mappings with the same names, and a model with ``optimizer={…: None}`` is frozen.
            train: a Dataset (with a batch size in ``data=``), a DataLoader, or batches.
            val: validation data, or a mapping of several.
            loss: ``(outputs, targets) -> scalar``, the mean over samples, or a mapping with
                ``"loss"``. None: the model returns its loss, or ``step`` does.
            step: ``(run, batch) -> loss`` in place of forward and loss; it calls ``run.model``.
            eval_step: ``(run, batch) -> (outputs, targets)`` in place of evaluation's forward.
            metrics: ``(outputs, targets) -> (sum, count)`` by name, or objects with ``update``,
                ``compute`` and ``reset`` such as those of torchmetrics; a MetricCollection may be
                given as it is.
            optimizer: ``groups -> optimizer``, e.g. ``partial(SGD, lr=0.1)``; or a fresh instance
                with one group.
            lr_scheduler: ``(optimizer, total_steps) -> scheduler``, stepped after each step; or an
                ``LRSchedule`` by epoch or by a metric.
            param_groups: ``(name, module, parameter) -> hyper-parameters``.
            init_weights: safetensors file or mapping to start from.
            ckpt_path: ``"last"``, ``"best"``, or the path of a checkpoint to go on from.
            hparams: kept in checkpoints and logs.

        Raises:
            TorchweldError: see ``torchweld.errors``; before step 1 wherever possible.
            Preempted: SIGTERM ended the run, a checkpoint is written; exit code 75.
        """
        request = FitRequest(
            model, train, val, loss, step, eval_step, as_metrics(metrics), optimizer, lr_scheduler,
            param_groups, init_weights, ckpt_path, hparams or {},
        )  # fmt: skip
        with self._opened(request) as (run, compute), run:
            if compute is not None:
                run.train(compute)
        return run.result()

    @named_arguments("prepare", elsewhere.PREPARE)
    def prepare(
        self,
        model: Any,
        train: Any,
        val: Any = None,
        *,
        loss: Any = None,
        eval_step: Any = None,
        metrics: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        param_groups: Any = None,
        init_weights: Any = None,
        ckpt_path: str | Path | None = None,
        hparams: Mapping[str, Any] | None = None,
    ) -> TrainingRun:
        """Prepare a run for an own loop: ``with trainer.prepare(…) as run``; as :meth:`fit`.

        The body reads ``run.batches()`` and calls ``run.backward(loss)`` and ``run.step()`` exactly
        once for each batch; logging, validation and checkpoints happen between two batches. Of
        several models each has its own: ``run.models["g"].backward(loss)``. Without
        ``with``, ``run.close()`` does the work of the last border.
        """
        request = FitRequest(
            model, train, val, loss, None, eval_step, as_metrics(metrics), optimizer, lr_scheduler,
            param_groups, init_weights, ckpt_path, hparams or {}, own_loop=True,
        )  # fmt: skip
        with ExitStack() as stack:
            run, _ = stack.enter_context(self._opened(request))
            if run.wiring.is_closure:
                name = type(run.model.optimizer).__name__
                raise InvalidArgument(f"{name} evaluates the loss itself: use fit, not an own loop")
            run.guard = stack.pop_all()
        return run

    @contextmanager
    def _opened(self, request: FitRequest) -> Iterator[tuple[TrainingRun, Any]]:
        request.check()
        launched = self._launch()
        where: dict[str, Any] = {"doing": "set-up"}
        with launched.ranks.first_cause(where), surroundings(launched.plan.settings):
            agree_on(launched.ranks, "run", what_is_asked(request, self._config))
            console = self._console(launched)
            bind = bind_several if request.names else bind_one
            wiring = wire(launched, request, self._config, console, bind)
            directory = [str(wiring.directory)] if wiring.directory is not None else []
            console.open("   ".join([headline(wiring.plan, wiring.ranks.env), *directory]))
            # Before the first batch: worker processes that it starts inherit the handlers.
            with heard_signals() as asked:
                run, compute = open_run(wiring, request, where)
                run.end_asked = asked
                self._run, self._given_model = run, request.model
                yield run, compute

    def _launch(self) -> Launched:
        if self._launched is None:
            self._launched = start(self._config.plan, self._config.devices)
        return self._launched

    def _console(self, launched: Launched) -> Console:
        extras = self._config.extras
        return Console(
            speaks=launched.ranks.rank == 0, quiet=extras.barebones, bar=extras.progress_bar
        )

    # ---- afterwards ------------------------------------------------------------------------------

    @named_arguments("evaluate", elsewhere.EVALUATE)
    def evaluate(
        self,
        model: Any = None,
        data: Any = None,
        *,
        loss: Any = None,
        eval_step: Any = None,
        metrics: Any = None,
        init_weights: Any = None,
        weights: str = "trained",
    ) -> dict[str, float]:
        """Return loss and metrics over ``data``, every sample once; every rank calls it.

        Args:
            model: None for the one that was trained last, with its loss and metrics.
            data: as ``val`` of :meth:`fit`; of several sets the values are ``"loss/<set>"``.
            weights: ``"average"`` for those that a surgery of the run keeps.
        """
        found = as_metrics(metrics)
        request = EvaluationRequest(model, data, loss, eval_step, found, init_weights, weights)
        return evaluate_model(request, self._launch(), self._config, self._trained(model))

    @named_arguments("predict", elsewhere.EVALUATE)
    def predict(
        self,
        model: Any = None,
        data: Any = None,
        *,
        eval_step: Any = None,
        init_weights: Any = None,
    ) -> list[Any]:
        """Return this rank's outputs, in order, batch by batch; every rank calls it."""
        request = EvaluationRequest(model, data, None, eval_step, {}, init_weights)
        return predict_model(request, self._launch(), self._config, self._trained(model))

    def export(self, path: str | Path, *, weights: str = "trained") -> Path:
        """Write the trained weights, or ``"average"``, as one safetensors file, on every rank.

        Of several models ``path`` is a directory with one file each: ``path/<name>.safetensors``.
        """
        if self._run is None:
            raise InvalidArgument("export() writes what was trained: call fit first")
        return self._run.export(path, weights=weights)

    def _trained(self, model: Any) -> TrainingRun | None:
        """The last run, if ``model`` means its model."""
        same = self._run is not None and (model is None or model is self._given_model)
        return self._run if same else None
