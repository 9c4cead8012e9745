"""One cell of the matrix, trained twice: by a Trainer, and by a loop in plain PyTorch.

Both are jobs for ``torchweld.testing.run_ranks``. The loop by hand is torch's DDP (a bare model in
one process) with the pieces that the surgeries hand out, called in the order of the plan.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
from torchweld import Trainer, use
from torchweld.checkpoint import load_weights
from torchweld.errors import PlanError
from torchweld.interfaces import Parts
from torchweld.plan import Plan
from torchweld.planning import make_plan
from torchweld.registry import Registry

EPOCHS = 2
SAMPLES = 16
GLOBAL_BATCH = 8
SEED = 3

STRATEGIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "single": ("single", {}),
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fairscale_oss": ("fairscale_oss", {}),
    "fairscale_sdp": ("fairscale_sdp", {}),
    # Below so many elements a parameter stays whole at stage 3; here most are cut.
    **{
        f"deepspeed stage {stage}": (
            "deepspeed",
            {"stage": stage, **({"persistence_threshold": 100} if stage == 3 else {})},
        )
        for stage in (1, 2, 3)
    },
}
SURGERIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "blurpool": ("BlurPool", {}),
    "channels_last": ("ChannelsLast", {}),
    "cutmix": ("CutMix", {}),
    "label_smoothing": ("LabelSmoothing", {}),
    "cutmix by loss": ("CutMix", {"interpolate_loss": True}),
    "mixup": ("MixUp", {}),
    "cutout": ("CutOut", {}),
    "colout": ("ColOut", {}),
    "progressive_resizing": ("ProgressiveResizing", {"delay_fraction": 0.2}),
    "selective_backprop": ("SelectiveBackprop", {"start": 0.0, "end": 1.0}),
    "ema": ("EMA", {"half_life": "2ba"}),
    "swa": ("SWA", {"swa_start": "0.3dur", "swa_end": "0.8dur", "update_interval": "1ba"}),
    "sam": ("SAM", {}),
    "squeeze_excite": ("SqueezeExcite", {"min_channels": 8}),
    "factorize": (
        "Factorize",
        {"min_channels": 8, "latent_channels": 0.25, "min_features": 4, "latent_features": 2},
    ),
    "ghost_batchnorm": ("GhostBatchNorm", {"ghost_batch_size": 2}),
    "weight_standardization": ("WeightStandardization", {}),
    "stochastic_depth": (
        "StochasticDepth",
        {
            "target_layer_name": "ResNetBottleneck",
            "stochastic_method": "sample",
            "drop_rate": 0.5,
        },
    ),
    "stochastic_depth of blocks": (
        "StochasticDepth",
        {"target_layer_name": "ResNetBottleneck", "stochastic_method": "block", "drop_rate": 0.5},
    ),
    "layer_freezing": ("LayerFreezing", {"freeze_start": 0.0, "freeze_level": 1.0}),
    "gradient_clipping": (
        "GradientClipping",
        {"clipping_type": "norm", "clipping_threshold": 0.05},
    ),
    "gradient_clipping by value": (
        "GradientClipping",
        {"clipping_type": "value", "clipping_threshold": 0.01},
    ),
    "gradient_clipping, adaptive": (
        "GradientClipping",
        {"clipping_type": "adaptive", "clipping_threshold": 0.01},
    ),
    "gyro_dropout": ("GyroDropout", {"sigma": 4, "tau": 2}),
    "low_precision_layernorm": ("LowPrecisionLayerNorm", {}),
}
LEAVE_PARAMETERS_OUT = {"stochastic_depth of blocks", "layer_freezing"}


@dataclass(frozen=True)
class Cell:
    """What is chosen, in the order in which the user lists it.

    Attributes:
        strategy: a key of ``STRATEGIES``, or the name of a component.
        data: ``torch`` or ``ffcv``.
        surgeries: keys of ``SURGERIES``, or names of components.
        precision: as the Trainer takes it.
        processes: None: one for ``single``, two for everything else.
    """

    strategy: str = "ddp"
    data: str = "torch"
    surgeries: tuple[str, ...] = ()
    precision: str = "32"
    processes: int | None = None

    @property
    def world_size(self) -> int:
        """How many processes run it."""
        return self.processes or (1 if self.strategy == "single" else 2)


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


class Images(Dataset[Any]):
    """Small pictures in four classes, as the article's data: uint8 pixels and a transform."""

    def __init__(self, num_samples: int = SAMPLES) -> None:
        from torchvision.transforms import v2

        random = torch.Generator().manual_seed(7)
        shape = (num_samples, 3, 8, 8)
        self.pixels = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        self.labels = torch.randint(4, (num_samples,), generator=random).tolist()
        self.transform: Any = v2.ToDtype(torch.float32, scale=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.pixels[index]  # ffcv stores them and makes the transform its own
        return self.transform(pixels) if self.transform else pixels, self.labels[index]


def make_net() -> nn.Module:
    """Something for every surgery: strided and wide convolutions, pooling, BatchNorm, a block."""
    from torchvision.models.resnet import Bottleneck

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Bottleneck(16, 4),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.GroupNorm(1, 16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Dropout(0.1),
        nn.Linear(16, 4),
    )


# ---- by a Trainer --------------------------------------------------------------------------------


def by_trainer(cell: Cell, cache: str, allow: Sequence[str] = ()) -> Outcome:
    """Plan and train a cell; a refusal is an answer, anything else that is raised is not."""
    be_quiet()
    trainer = _trainer(cell, cache, allow)
    mirror = _trainer(replace(cell, surgeries=cell.surgeries[::-1]), cache, allow)
    try:
        result = trainer.fit(
            make_net(), Images(), Images(), loss=F.cross_entropy, optimizer=make_sgd
        )
    except PlanError as error:
        return _refused(error)
    plan = trainer.plan
    return Outcome(
        _verdict(plan),
        _reasons(plan),
        order=_order(plan, cell),
        clip=plan.settings.gradient_clip_val,
        same_plan=mirror.plan.digest == _trainer(cell, cache, allow).plan.digest,
        weights=exported(trainer),
        val_loss=result.metrics["val_loss"],
    )


def chosen(name: str) -> Any:
    """What a user gives as ``surgery=``: our own name, or Composer's object."""
    if name not in SURGERIES:
        return name
    kind, arguments = SURGERIES[name]
    ours = {"BlurPool", "ChannelsLast", "CutMix", "LabelSmoothing"}
    return use(component_of(name), **arguments) if kind in ours else algorithm(kind, **arguments)


def _trainer(cell: Cell, cache: str, allow: Sequence[str]) -> Trainer:
    name, options = STRATEGIES.get(cell.strategy, (cell.strategy, {}))
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


def by_hand(order: Sequence[str], precision: str, clip: float | None) -> Outcome:
    """Train the same in a loop in plain PyTorch, under DDP where there are two ranks.

    Args:
        order: keys of ``SURGERIES``; applied and called in this order.
        precision: as the Trainer takes it.
        clip: norm at which gradients are clipped.
    """
    be_quiet()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo")
    model = make_net()
    seed_all(SEED)
    parts = operated_in_order(order, model)
    parts = replace(parts, model=_cast(parts.model, precision))
    start = _parameters(parts.model)
    wrapped: nn.Module = parts.model
    if world_size > 1:
        unused = bool(LEAVE_PARAMETERS_OUT & set(order))
        wrapped = DistributedDataParallel(wrapped, find_unused_parameters=unused)
    optimizer: Any = make_sgd(parts.model.parameters())
    for wrap in parts.optimizer_wrappers:
        optimizer = wrap(optimizer)
    seed_all(SEED + rank)
    loader = _loader(rank, world_size)
    forward: Any = partial(forward_under, wrapped, precision)
    run: Any = HandRun(forward, optimizer, steps=EPOCHS * len(loader), per_epoch=len(loader))
    loop = HandLoop(parts, wrapped, optimizer, run, precision, clip)
    loop.train(loader)
    val_loss = loop.evaluate(loader, len(loader) * EPOCHS)
    weights = _parameters(parts.model)
    return Outcome(start=start, weights=weights, val_loss=val_loss) if rank == 0 else Outcome()


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def operated_in_order(order: Sequence[str], model: nn.Module) -> Parts:
    """What the surgeries hand out, one after the other."""
    parts = Parts(model, loss=F.cross_entropy)
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


def forward_under(model: nn.Module, precision: str, inputs: Tensor) -> Tensor:
    """Outputs in fp32, computed under the precision."""
    if precision == "bf16-true":
        inputs = inputs.bfloat16()
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with autocast:
        outputs: Tensor = model(inputs)
    return outputs.float()


def _cast(model: nn.Module, precision: str) -> nn.Module:
    return model.bfloat16() if precision == "bf16-true" else model


def _loader(rank: int, world_size: int) -> DataLoader[Any]:
    data = Images()
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

    def train(self, loader: DataLoader[Any]) -> None:
        step = 0
        self.model.train()
        border(self.parts, self.run, step, "fit_start")
        for _ in range(EPOCHS):
            for given in loader:
                batch: Any = tuple(given)
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
            self.optimizer.step()

    def gradients(self, batch: Any) -> Tensor:
        self.optimizer.zero_grad()
        outputs, targets = forward_under(self.model, self.precision, batch[0]), batch[1]
        for transform in self.parts.target_transforms:
            targets = transform(outputs, targets)
        loss: Tensor = self.parts.loss(outputs, targets)
        loss.backward()
        named = list(self.parts.model.named_parameters())
        for change in self.parts.grad_transforms:
            change(named)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parts.model.parameters(), self.clip)
        return loss

    def evaluate(self, loader: DataLoader[Any], step: int) -> float:
        """The mean loss over all samples, with rank 0's buffers and the averaged weights."""
        border(self.parts, self.run, step, "eval_start")
        self.model = self.parts.model.eval()
        if dist.is_initialized():
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        total = torch.zeros(())
        with torch.no_grad():
            for inputs, targets in loader:
                outputs = forward_under(self.model, self.precision, inputs)
                total += F.cross_entropy(outputs, targets, reduction="sum")
        if dist.is_initialized():
            dist.all_reduce(total)
        border(self.parts, self.run, step, "fit_end")
        return float(total) / SAMPLES
