"""The contracts between core, plugins and users: protocols and records, torch for types only.

The settled sketch is explained in docs/contracts.md; what is different here from a plain reading
of PyTorch has its reason beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Union

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from torchweld.components import Settings
    from torchweld.plan import Plan

Batch = Any
"""A pair ``(inputs, targets)``, a mapping, or whatever ``step=`` and ``eval_step=`` accept."""

ParamGroup = dict[str, Any]
"""``{"params": [...], "names": [...], **hyper-parameters}``, frozen parameters included.

The names are authoritative: a strategy may replace or flatten ``"params"``."""

GroupRule = Callable[[str, "nn.Module", "nn.Parameter"], Mapping[str, object]]
"""``(canonical name, owning module, parameter) -> hyper-parameters``, asked on the whole model."""

OptimizerFactory = Callable[[list[ParamGroup]], "Optimizer"]
SchedulerFactory = Callable[["Optimizer", int], Any]
"""``(optimizer, total optimizer steps) -> scheduler``."""

Transform = Callable[[Batch], Batch]


@dataclass(frozen=True)
class Env:
    """This process among the others; core makes (or takes over) store and process group.

    Attributes:
        group: the data-parallel group, or None for one process without a group.
        store: the key-value store of the launch, or None for one process without one.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    group: Any | None = None
    store: Any | None = None


@dataclass(frozen=True)
class RunFacts:
    """Numbers of this run, for ``torchweld_check_plan``; None where nobody can know."""

    world_size: int
    batch_size: int | None
    last_batch_size: int | None
    steps_per_epoch: int | None
    total_steps: int | None


class Bindable(Protocol):
    """A transform, after-step or callback that needs the run; bound once, before step 1."""

    def bind(self, run: Run) -> Any:
        """Return the callable to use in this run."""


@dataclass(frozen=True)
class Parts:
    """All that a surgery may change; it returns a changed copy (``dataclasses.replace``).

    Attributes:
        model: on the CPU or as the strategy's ``construct`` made it, not wrapped, no optimizer
            yet.
        loss: ``(outputs, targets) -> scalar`` or a mapping with ``"loss"``; None: the model's, or
            ``step=``.
        sample_transforms: handed to the data source; training only.
        input_transforms: on the device, ``inputs -> inputs``; training, evaluation and prediction.
            One with the attribute ``memory_format = torch.channels_last`` asks the data source for
            images in that format, and has to leave those alone that come so.
        batch_transforms: on the device, ``batch -> batch``; training only.
        target_transforms: ``(outputs, targets) -> targets``; training only, in plan order.
        param_groups: rule for the optimizer's groups.
        optimizer: factory, called once after wrapping.
        optimizer_wrappers: ``optimizer -> optimizer``, in plan order (SAM and its kind).
        grad_transforms: called with ``(name, parameter with .grad)`` pairs, before clipping.
        after_step: called after every applied optimizer step.
        callbacks: called at borders.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Any] | None = None
    sample_transforms: tuple[Callable[[Any], Any], ...] = ()
    input_transforms: tuple[Callable[[Any], Any], ...] = ()
    batch_transforms: tuple[Transform, ...] = ()
    target_transforms: tuple[Callable[[Any, Any], Any], ...] = ()
    param_groups: GroupRule | None = None
    optimizer: OptimizerFactory | None = None
    optimizer_wrappers: tuple[Callable[[Any], Any], ...] = ()
    grad_transforms: tuple[Callable[[Iterable[tuple[str, Any]]], None], ...] = ()
    after_step: tuple[Bindable | Callable[[], None], ...] = ()
    callbacks: tuple[Callback, ...] = ()


class Surgery(Protocol):
    """Changes parts before anything is wrapped; core reports the difference. A function will do."""

    def apply(self, parts: Parts) -> Parts:
        """Return the changed parts; the model may be changed in place."""


@dataclass(frozen=True)
class SetupRequest:
    """All that a strategy needs beside the model; without an optimizer, for evaluation only."""

    groups: Sequence[ParamGroup]
    optimizer: OptimizerFactory | None
    optimizer_wrappers: Sequence[Callable[[Any], Any]]
    grad_transforms: Sequence[Callable[[Iterable[tuple[str, Any]]], None]]
    env: Env
    settings: Settings


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of a model that need not exist: what an estimate of memory is made of.

    Attributes:
        shape: of the whole tensor.
        dtype: as the model was built; the precision may ask for another one.
        trained: whether it has a gradient and optimizer state.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool = True


@dataclass(frozen=True)
class Shard:
    """A piece of one state tensor; over all ranks the pieces of a name cover it exactly once.

    Replicated values (buffers, Adam's step, replicated weights) come from one rank.

    Attributes:
        name: ``"model/<canonical name>"`` or ``"optim/<canonical name>/<key>"``.
        local: the piece; it aliases live memory, core copies.
        global_shape: of the whole tensor.
        start: an int is a position in the flattened tensor, a tuple the corner of a box.
    """

    name: str
    local: Tensor
    global_shape: tuple[int, ...]
    start: int | tuple[int, ...]


class ShardReader(Protocol):
    """A checkpoint opened by core: checksums verified, any number of writers."""

    def names(self) -> Iterable[str]:
        """Names of all tensors in it."""

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Global shape and dtype, from which missing optimizer state is made."""

    def fill(self, name: str, local: Tensor, start: int | Sequence[int]) -> None:
        """Copy a piece into ``local``; a hole or another shape is an error, never zeros."""


@dataclass(frozen=True)
class Prepared:
    """One model under one strategy: bound callables, looked up once. Several may live in one run.

    Attributes:
        forward: casts floating inputs as the precision asks, returns floating outputs in fp32.
        evaluate: the forward for evaluation.
        evaluate_is_collective: then every rank must call it equally often.
        mode: train(True/False); ``mode(False)`` is collective: every rank takes rank 0's buffers.
        optimizer: the one whose ``param_groups`` decide the next step; None for evaluation only.
        backward: once a micro-batch, scaled by the window and by what the back end needs.
        step: unscale, grad_transforms, clip, step, zero; False when the step was skipped (fp16).
        step_closure: None where ``step.closure`` is not provided.
        window: ``(last, size)``, before *forward* of the first and of the last micro-batch;
            None where nothing has to be told.
        grad_norm: full norm of the last step, a plain tensor equal on all ranks; None where
            nobody needed it.
        frozen: no parameter of this model takes a gradient meanwhile: the passes of another model
            of the run go through it (GAN).
        named_parameters: canonical names.
        shards: collective; core writes, hashes, renames.
        restore: collective; clears optimizer state first.
        bytes_per_rank: bytes held now as ``parameters`` and ``optimizer`` (its tensors are made in
            the first step), and those of ``gradients`` between backward and step.
        optimizer_names: names in each of the optimizer's groups, where it holds other tensors than
            ``named_parameters`` gives (pieces, copies); None: core finds them by identity.
        loss_scaler: of fp16, with ``state_dict`` and ``load_state_dict``: it goes into checkpoints.
        notes: what was decided or repaired here, one line each; shown when the run starts.
        working_copies: weights and buffers as ``forward`` uses them, where ``shards`` yields others
            (pieces that are stepped); an average is exported from here. None: ``shards`` does.
    """

    forward: Callable[..., Any]
    evaluate: Callable[..., Any]
    evaluate_is_collective: bool
    mode: Callable[[bool], None]
    optimizer: Optimizer | None
    backward: Callable[[Tensor], None]
    step: Callable[[], bool]
    step_closure: Callable[[Callable[[], Tensor]], bool] | None
    window: Callable[[bool, int], None] | None
    grad_norm: Callable[[], Tensor | None]
    frozen: Callable[[], AbstractContextManager[None]]
    named_parameters: Callable[[], Iterable[tuple[str, Any]]]
    shards: Callable[[], Iterable[Shard]]
    restore: Callable[[ShardReader], None]
    bytes_per_rank: Callable[[], Mapping[str, int]]
    optimizer_names: Sequence[Sequence[str]] | None = None
    loss_scaler: Any | None = None
    notes: Sequence[str] = ()
    working_copies: Callable[[], Iterable[Shard]] | None = None


class Strategy(Protocol):
    """Where a model lives and how its gradients are exchanged; makes Prepared, holds no model.

    ``backend`` names the process-group backend a device type needs, e.g. ``{"cpu": "gloo",
    "cuda": "nccl"}``; empty: no process group.
    """

    backend: Mapping[str, str]

    def construct(self, make: Callable[[], nn.Module], env: Env, settings: Settings) -> nn.Module:
        """Build the model where the user gave a callable: ``make()`` will do.

        What it leaves on the meta device is filled by ``setup``, with the values that ``make()``
        would have given it.
        """

    def units(self, model: nn.Module) -> Sequence[nn.Module]:
        """What core compiles and checkpoints one by one; ``(model,)`` will do."""

    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        """Move and wrap the model, then make the optimizer."""

    def estimate(
        self,
        shapes: Mapping[str, ParameterShape],
        optimizer_slots: int,
        world_size: int,
        settings: Settings,
    ) -> Mapping[str, int]:
        """Bytes on the rank with most: ``parameters``, ``gradients``, ``optimizer``, and more.

        Args:
            shapes: canonical names; tied parameters once.
            optimizer_slots: tensors kept for each trained parameter, of its shape (Adam 2).
            world_size: number of processes.
            settings: ``precision="bf16-true"`` casts the parameters.
        """

    def teardown(self) -> None:
        """Release what ``setup`` took; the process group is core's."""


class Loader(Protocol):
    """One loader a split and fit. A batch is valid until the next one unless ``owns_batches``.

    Attributes:
        sharded: every rank sees its own part.
        on_device: batches come on the device already.
        batch_size: samples a process and batch, None when unknown.
        num_batches: in one epoch, equal on every rank; None needs ``max_steps``.
        num_samples: in one epoch over all ranks when every sample comes exactly once, else None;
            with it core weights an uneven last batch by its real count.
    """

    sharded: bool
    owns_batches: bool
    on_device: bool
    batch_size: int | None
    num_batches: int | None
    num_samples: int | None

    def __iter__(self) -> Iterator[Batch]:
        """Start (or, after ``load_state_dict``, continue) the epoch set last."""

    def samples(self, batch: Batch) -> int:
        """Real samples of the batch just yielded; 0 for one that only keeps ranks in step."""

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next ``iter`` that epoch's, from that batch on."""

    def state_dict(self) -> Mapping[str, object]:
        """What is needed, beside epoch and batch, to continue: seed, no worker state."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take the state of an interrupted epoch."""

    def close(self) -> None:
        """Stop workers and threads."""


@dataclass(frozen=True)
class LoaderRequest:
    """What core tells a data source; options such as ``batch_size`` are the component's own.

    Attributes:
        sample_transforms: of surgeries; for training only.
        channels_last: the model's convolutions have the NHWC memory format, or an input transform
            gives it to the images: they are best made in it, where that costs nothing.
    """

    data: Any
    train: bool
    env: Env
    seed: int
    sample_transforms: Sequence[Callable[[Any], Any]] = ()
    channels_last: bool = False


class DataSource(Protocol):
    """Builds loaders after the process group and after surgery, before the strategy's setup."""

    def build(self, request: LoaderRequest) -> Loader:
        """Return the loader of one split."""


@dataclass(frozen=True)
class Progress:
    """Counts of optimizer steps, like every step-valued setting; ``samples`` over all ranks."""

    step: int = 0
    epoch: int = 0
    samples: int = 0
    steps_per_epoch: int | None = None
    total_steps: int | None = None


@dataclass(frozen=True)
class Border:
    """Where the inner loop stopped; the only place where callbacks and loggers are called.

    Attributes:
        kind: some of fit_start, due, epoch_end, eval_start, eval_end, checkpoint, fit_end.
        metrics: the newest value of everything that was measured up to now.
        measured: names of those that were measured at this very step.
    """

    kind: frozenset[str]
    progress: Progress
    metrics: Mapping[str, float]
    measured: frozenset[str] = frozenset()


class Callback(Protocol):
    """Only ``at`` is needed; the others are used where they exist.

    ``next_due(progress) -> step`` asks for a border, ``extra_metrics(run) -> mapping`` adds to what
    is logged, ``state_dict`` and ``load_state_dict`` go into checkpoints, and ``needs_directory =
    True`` says that it writes into the directory of the run.
    """

    def at(self, border: Border, run: Run) -> None:
        """Act at a border; every rank calls it."""


class Logger(Protocol):
    """Lightning's names; ``log_hyperparams`` and ``finalize`` are used if there. Rank 0 only."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one border."""


class ModelHandle(Protocol):
    """One of the run's models. Calling it is forward."""

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer whose ``param_groups`` decide the next step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The prepared forward."""

    @property
    def backward(self) -> Callable[[Tensor], None]:
        """Gradients of this model's parameters, scaled by the window."""

    @property
    def step(self) -> Callable[[], None]:
        """Nothing inside an accumulation window."""

    def mark_forward_method(self, name: str) -> Callable[..., Any]:
        """A method other than forward, as something that runs under the strategy."""

    def alone(self) -> AbstractContextManager[None]:
        """Freeze the other models meanwhile."""

    def named_parameters(self) -> Iterable[tuple[str, Any]]:
        """Canonical names."""

    def bytes_per_rank(self) -> Mapping[str, int]:
        """Bytes that this rank holds now: of ``parameters``, ``optimizer`` and ``gradients``."""


class Run(Protocol):
    """The own-loop door: whatever fit does is here under a name, and fit is written with it."""

    @property
    def models(self) -> Mapping[str, ModelHandle]:
        """By name; ``"model"`` where there is one."""

    @property
    def model(self) -> ModelHandle:
        """The only one; where there are several, using it is an error that lists them."""

    @property
    def plan(self) -> Plan:
        """With the facts of fit."""

    @property
    def progress(self) -> Progress:
        """Counts up to now."""

    @property
    def env(self) -> Env:
        """This process among the others."""

    @property
    def batches(self) -> Callable[[], Iterator[Batch]]:
        """Up to max_epochs or max_steps, transforms applied; between two the border work."""

    @property
    def loss(self) -> Callable[[Any, Any], Any]:
        """Target transforms, then the loss."""

    @property
    def backward(self) -> Callable[[Tensor], None]:
        """Once a batch."""

    @property
    def step(self) -> Callable[[], None]:
        """Once a batch, after backward."""

    @property
    def directory(self) -> Path | None:
        """Where this run writes; None where it writes nothing."""

    def say(self, line: str) -> None:
        """Print a line on rank 0, above the bar."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Scalars of the last batch, whose means over all samples the next border logs.

        A mean over samples: a value counts as much as its batch has, which leaves a constant what
        it is. Tensors stay on the device until the border.
        """

    def evaluate(self, data: Any = None) -> Mapping[str, float]:
        """Evaluate on ``data``, a set or a mapping of several, or on what was given as ``val``."""

    def gather(self, value: Any) -> Any:
        """The values of all ranks, stacked; of one shape and dtype, and without gradients."""

    def save(self) -> Path:
        """Write a checkpoint now; an error inside an accumulation window."""

    def async_save(self) -> Future[Path]:
        """Copy the state now, write it beside the next steps; the future has the path once done."""

    def export(self, path: str | Path) -> Path:
        """Write the consolidated weights."""

    def stop(self) -> None:
        """At the next border, on all ranks."""

    def close(self) -> None:
        """Finish border work; also a context manager."""


@dataclass(frozen=True)
class Result:
    """What ``fit`` returns.

    Attributes:
        metrics: the newest value of everything that was measured.
        progress: where the run ended.
        checkpoint: the newest complete one; None where none was written.
        plan: with everything that only the run could decide.
        best_checkpoint: the best by the first ``ModelCheckpoint(monitor=…)``; None without one.
        directory: where the run wrote; None for nowhere.
    """

    metrics: Mapping[str, float]
    progress: Progress
    checkpoint: Path | None
    plan: Plan
    best_checkpoint: Path | None = None
    directory: Path | None = None


Metric = Union[Callable[[Any, Any], tuple[Any, Any]], Any]
"""``(outputs, targets) -> (sum, count)``, or an object with ``update``, ``compute``, ``reset``."""
