"""One cell of the matrix, trained twice: by a Trainer, and by a loop in plain PyTorch.

Both are jobs for ``torchweld.testing.run_ranks``. The loop by hand is torch's DDP (a bare model in
one process) with the pieces that the surgeries hand out, called in the order of the plan.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tests.composer.small_nets import (
    HandRun,
    algorithm,
    border,
    make_sgd,
    seed_all,
    surgery_of,
)
from tests.together.matrix_choices import (
    ELSEWHERE,
    LEAVE_PARAMETERS_OUT,
    SAMPLES,
    SETTINGS,
    STRATEGIES,
    SURGERIES,
    Cell,
)
from torchweld import Trainer, use
from torchweld.checkpoint import load_weights
from torchweld.errors import PlanError, RunError
from torchweld.interfaces import Parts
from torchweld.plan import Plan
from torchweld.planning import make_plan
from torchweld.registry import Registry

EPOCHS = 2
GLOBAL_BATCH = 8
SEED = 3


@dataclass
class Outcome:
    """What became of a cell on one rank.

    Attributes:
        verdict: ok, ordered, adjusted or refused, as the plan says once all is known.
        why: reasons of the plan, one sentence each.
        keys: what ``allow=`` would have to name.
        order: keys of the surgeries in running order.
        clip: norm at which gradients are clipped, after what surgeries ask for.
        same_plan: the reversed listing has the same digest.
        start: parameters before training, on rank 0; by hand only.
        weights: parameters (and, by a Trainer, buffers) after training, on rank 0.
        val_loss: of the evaluation at the end.
        average_loss: of the same with averaged weights, where somebody keeps them.
    """

    verdict: str = ""
    why: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    clip: float | None = None
    same_plan: bool = True
    start: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    val_loss: float = float("nan")
    average_loss: float | None = None


# ---- by a Trainer --------------------------------------------------------------------------------


def by_trainer(cell: Cell, cache: str, allow: Sequence[str] = ()) -> Outcome:
    """Plan and train a cell; a refusal is an answer, anything else that is raised is not."""
    be_quiet()
    trainer = _trainer(cell, cache, allow)
    mirror = _trainer(replace(cell, surgeries=cell.surgeries[::-1]), cache, allow)
    task = cell.task
    try:
        result = trainer.fit(
            task.make_model(), task.make_data(), task.make_data(), loss=task.loss,
            optimizer=make_sgd,
        )  # fmt: skip
    except PlanError as error:
        return _refused(error)
    except RunError as error:
        if "this run is on 'cpu'" not in str(error):  # of the device, before anything is built
            raise
        return Outcome("refused", (str(error),))
    plan = trainer.plan
    return Outcome(
        _verdict(plan),
        _reasons(plan),
        order=_order(plan, cell),
        clip=plan.settings.gradient_clip_val,
        same_plan=mirror.plan.digest == _trainer(cell, cache, allow).plan.digest,
        weights=exported(trainer),
        val_loss=result.metrics["val_loss"],
        average_loss=result.metrics.get("val_loss/average"),
    )


def chosen(name: str) -> Any:
    """What a user gives as ``surgery=``: our own name, or Composer's object."""
    if name not in SURGERIES:
        return name
    kind, arguments = SURGERIES[name]
    ours = {"BlurPool", "ChannelsLast", "CutMix", "LabelSmoothing"}
    return use(component_of(name), **arguments) if kind in ours else algorithm(kind, **arguments)


def _trainer(cell: Cell, cache: str, allow: Sequence[str]) -> Trainer:
    strategies = {**STRATEGIES, **ELSEWHERE}
    name, options = strategies.get(cell.strategy, (cell.strategy, {}))
    source: dict[str, Any] = {"cache_dir": cache} if cell.data == "ffcv" else {}
    size = GLOBAL_BATCH // cell.world_size
    return Trainer(
        strategy=use(name, **options),
        data=use(cell.data, batch_size=size, shuffle=False, **source),
        surgery=[chosen(each) for each in cell.surgeries],
        precision=cell.precision,
        max_epochs=EPOCHS,
        check_val_every_n_epoch=EPOCHS,
        seed=SEED,
        accelerator="cpu",
        barebones=True,
        allow=allow,
        **SETTINGS.get(cell.setting, {}),
    )


def be_quiet() -> None:
    """What libraries say in between is not what is asked here."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def exported(trainer: Trainer) -> dict[str, Tensor]:
    """The whole weights on rank 0, by the names they have after surgery."""
    with tempfile.TemporaryDirectory() as folder:
        place = [folder]
        if dist.is_initialized():
            dist.broadcast_object_list(place)  # a directory that every rank of the job sees
        path = trainer.export(Path(place[0]) / "weights.safetensors")
        found = load_weights(path) if int(os.environ["RANK"]) == 0 else {}
        if dist.is_initialized():
            dist.barrier()
    return {name: tensor.float() for name, tensor in found.items()}


def _refused(error: PlanError) -> Outcome:
    why = tuple(problem.why or problem.what for problem in error.problems)
    keys = tuple(problem.key for problem in error.problems)
    return Outcome("refused", why, keys=keys)


def _reasons(plan: Plan) -> tuple[str, ...]:
    warned = [problem.why for problem in plan.problems if problem.severity == "warning"]
    return (*(text for _, text in plan.adjusted), *(edge.reason for edge in plan.edges), *warned)


def _order(plan: Plan, cell: Cell) -> tuple[str, ...]:
    running = [one.name for one in plan.surgeries]
    return tuple(sorted(cell.surgeries, key=lambda key: running.index(component_of(key))))


def component_of(key: str) -> str:
    """Name of the component that a key of ``SURGERIES`` becomes."""
    return key.split(" ", maxsplit=1)[0].rstrip(",")


def _verdict(plan: Plan) -> str:
    if plan.adjusted:
        return "adjusted"
    return "ordered" if plan.edges else "ok"


# ---- by hand -------------------------------------------------------------------------------------


def by_hand(cell: Cell, clip: float | None) -> Outcome:
    """Train the same in a loop in plain PyTorch, under DDP where there are two ranks.

    Nothing is compiled or computed twice: that is not to change what is trained.

    Args:
        cell: its surgeries are applied and called in this order.
        clip: norm at which gradients are clipped.
    """
    task, precision = cell.task, cell.precision
    be_quiet()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo")
    model = task.make_model()
    seed_all(SEED)
    parts = operated_in_order(cell.surgeries, Parts(model, loss=task.loss))
    parts = replace(parts, model=_cast(parts.model, precision))
    if cell.setting == "sync_batchnorm":
        parts = replace(parts, model=nn.SyncBatchNorm.convert_sync_batchnorm(parts.model))
    start = _parameters(parts.model)
    wrapped: nn.Module = parts.model
    if world_size > 1:
        unused = bool(LEAVE_PARAMETERS_OUT & set(cell.surgeries))
        wrapped = DistributedDataParallel(wrapped, find_unused_parameters=unused)
    optimizer: Any = make_sgd(parts.model.parameters())
    for wrap in parts.optimizer_wrappers:
        optimizer = wrap(optimizer)
    seed_all(SEED + rank)
    data = task.make_data()
    train = _loader(Transformed(data, parts.sample_transforms), rank, world_size)
    forward: Any = partial(forward_under, wrapped, precision)
    run: Any = HandRun(forward, optimizer, steps=EPOCHS * len(train), per_epoch=len(train))
    loop = HandLoop(parts, wrapped, optimizer, run, precision, clip)
    loop.train(train)
    loop.parts = replace(loop.parts, loss=task.loss)  # of the data's own targets
    val_loss, average = loop.evaluate(_loader(data, rank, world_size), len(train) * EPOCHS)
    weights = _parameters(parts.model)
    ended = Outcome(start=start, weights=weights, val_loss=val_loss, average_loss=average)
    return ended if rank == 0 else Outcome()


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def operated_in_order(order: Sequence[str], parts: Parts) -> Parts:
    """What the surgeries hand out, one after the other."""
    for key in order:
        if key in SURGERIES:
            kind, arguments = SURGERIES[key]
            surgery = surgery_of(algorithm(kind, **arguments))
        else:
            surgery = surgery_of_a_stranger(key)
        parts = surgery.apply(parts) if hasattr(surgery, "apply") else surgery(parts)
    return parts


def surgery_of_a_stranger(name: str) -> Any:
    """What the component of this name builds, whoever offers it."""
    registry = Registry.installed()
    plan = make_plan(registry, strategy="single", data="torch", surgery=name)
    return plan.surgeries[0].make()


def forward_under(model: nn.Module, precision: str, *inputs: Tensor, **named: Tensor) -> Any:
    """Outputs (or a loss, of what is named) in fp32, computed under the precision."""
    if precision == "bf16-true":
        inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision)
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        outputs = model(*inputs, **named)
    return outputs["loss"].float() if named else outputs.float()


def _cast(model: nn.Module, precision: str) -> nn.Module:
    return model.bfloat16() if precision == "bf16-true" else model


class Transformed(Dataset[Any]):
    """Samples that go through transforms."""

    def __init__(self, data: Any, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.data, self.transforms = data, transforms

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        sample = self.data[index]
        for transform in self.transforms:
            sample = transform(sample)
        return sample


def _loader(data: Any, rank: int, world_size: int) -> DataLoader[Any]:
    sampler: DistributedSampler[Any] = DistributedSampler(
        data, num_replicas=world_size, rank=rank, shuffle=False
    )
    return DataLoader(data, batch_size=GLOBAL_BATCH // world_size, sampler=sampler)


class HandLoop:
    """The loop that a user would write around the pieces."""

    def __init__(
        self, parts: Any, model: nn.Module, optimizer: Any, run: Any, precision: str,
        clip: float | None,
    ) -> None:  # fmt: skip
        def bound(pieces: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(p.bind(run) if hasattr(p, "bind") else p for p in pieces)

        self.parts = replace(
            parts,
            batch_transforms=bound(parts.batch_transforms),
            target_transforms=bound(parts.target_transforms),
            after_step=bound(parts.after_step),
            callbacks=bound(parts.callbacks),
            loss=bound([parts.loss])[0],
        )
        self.model, self.optimizer, self.run = model, optimizer, run
        self.precision, self.clip = precision, clip
        self.scaler = torch.amp.GradScaler("cpu", enabled=precision == "16")

    def train(self, loader: DataLoader[Any]) -> None:
        step = 0
        self.model.train()
        border(self.parts, self.run, step, "fit_start")
        for _ in range(EPOCHS):
            for given in loader:
                batch: Any = given if isinstance(given, Mapping) else tuple(given)
                for transform in self.parts.batch_transforms:
                    batch = transform(batch)
                self.step(batch)
                step += 1
                for act in self.parts.after_step:
                    act()
            border(self.parts, self.run, step, "epoch_end")

    def step(self, batch: Any) -> None:
        if getattr(self.optimizer, "needs_closure", False):
            self.optimizer.step(lambda: self.gradients(batch))
        else:
            self.gradients(batch)
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def gradients(self, batch: Any) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.loss(batch)
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        named = list(self.parts.model.named_parameters())
        for change in self.parts.grad_transforms:
            change(named)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parts.model.parameters(), self.clip)
        return loss

    def loss(self, batch: Any) -> Any:
        """The mean over the batch, of changed targets in training."""
        if isinstance(batch, Mapping):
            return forward_under(self.model, self.precision, **batch)
        outputs, targets = forward_under(self.model, self.precision, batch[0]), batch[1]
        for transform in self.parts.target_transforms if self.model.training else ():
            targets = transform(outputs, targets)
        return self.parts.loss(outputs, targets)

    def evaluate(self, loader: DataLoader[Any], step: int) -> tuple[float, float | None]:
        """The mean loss over all samples: with the weights, and with averaged ones if any."""
        border(self.parts, self.run, step, "eval_start")
        loss, average = self.mean_loss(loader), None
        for owner in self.parts.callbacks:
            if hasattr(owner, "averaged"):
                with owner.averaged():
                    average = self.mean_loss(loader)
        border(self.parts, self.run, step, "fit_end")
        return loss, average

    def mean_loss(self, loader: DataLoader[Any]) -> float:
        """Over all samples of all ranks, with rank 0's buffers."""
        self.model = self.parts.model.eval()
        if dist.is_initialized():
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        total = torch.zeros(())
        with torch.no_grad():
            for batch in loader:
                first = batch["labels"] if isinstance(batch, Mapping) else batch[0]
                total += self.loss(batch) * len(first)
        if dist.is_initialized():
            dist.all_reduce(total)
        return float(total) / SAMPLES
