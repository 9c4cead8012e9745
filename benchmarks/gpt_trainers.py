"""What ``fsdp.py`` measures: torchweld, FSDP2 and DDP by hand, Lightning, Accelerate."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks.overhead import OFF, as_is
from examples.gpt import CONTEXT, GPT, nats_per_byte

CUDA = torch.cuda.is_available()
DEVICE = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if CUDA else torch.device("cpu")
)
PRECISION: Any = "bf16-mixed" if CUDA else "32-true"
WARMUP = 5  # steps before the clock starts


@dataclass
class Meter:
    """Measures the steps between two fetches.

    Attributes:
        steps: how many are measured, after ``WARMUP``.
        counts: whether Python calls are counted instead of time.
        seconds: CPU time of this process; the time on the clock where a GPU does the work.
        peak: bytes of GPU memory allocated at most meanwhile.
    """

    steps: int
    counts: bool
    fetches: int = 0
    calls: int = 0
    seconds: float = 0.0
    peak: int = 0

    def tick(self) -> None:
        """Notice that a batch is fetched."""
        self.fetches += 1
        if self.fetches == WARMUP:
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            self.seconds = -self._now()
            if self.counts:
                sys.setprofile(self._count)
        elif self.fetches == WARMUP + self.steps:
            sys.setprofile(None)
            self.seconds += self._now()
            self.peak = torch.cuda.max_memory_allocated() if CUDA else 0

    def _now(self) -> float:
        if not CUDA:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self.calls += event == "call"


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Random bytes, handed out a batch at a time; every fetch is a tick of the meter."""

    def __init__(self, meter: Meter, batch: int) -> None:
        # Some batches more than are measured: some trainers fetch the next ones early.
        count = (WARMUP + meter.steps + 4) * batch * dist.get_world_size()
        generator = torch.Generator().manual_seed(0)
        self.windows = torch.randint(256, (count, CONTEXT + 1), generator=generator)
        self.meter = meter

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.windows[index, :-1], self.windows[index, 1:]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch."""
        self.meter.tick()
        windows = self.windows[indices]
        return windows[:, :-1], windows[:, 1:]


@dataclass
class Job:
    """What every trainer is given.

    Attributes:
        held: bytes of parameters, gradients and optimizer state on this rank in the last step;
            filled in where ``weighs`` is True.
    """

    model: GPT
    data: Windows
    batch: int
    folder: Path
    weighs: bool = False
    held: int = 0
    loader: DataLoader[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.loader = DataLoader(self.data, self.batch, shuffle=True, collate_fn=as_is)

    def my_part(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this rank, for loops by hand."""
        sampler: DistributedSampler[Any] = DistributedSampler(self.data)
        for batch in DataLoader(self.data, self.batch, sampler=sampler, collate_fn=as_is):
            inputs, targets = (tensor.to(DEVICE, non_blocking=True) for tensor in batch)
            yield inputs, targets

    def optimizer(self, parameters: Any, **more: Any) -> AdamW:
        """The optimizer of every trainer."""
        made = AdamW(parameters, lr=1e-3, **more)
        if self.weighs:
            made.register_step_pre_hook(self._weigh)
        return made

    def _weigh(self, optimizer: Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [v for state in optimizer.state.values() for v in state.values()]
        tensors = [*parameters, *(p.grad for p in parameters), *states]
        self.held = sum(map(local_bytes, tensors))


def local_bytes(tensor: Any) -> int:
    """What this rank holds of a tensor."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.nbytes if isinstance(local, Tensor) else 0


def autocast() -> AbstractContextManager[None]:
    """bf16 on GPUs, nothing on CPUs."""
    return torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext()


def shard(model: GPT, **where: Any) -> None:
    """FSDP2 as one writes it: every block, then the rest."""
    for block in model.blocks:
        fully_shard(block, **where)
    fully_shard(model, **where)


def loop(job: Job, model: nn.Module, optimizer: Optimizer) -> None:
    """The loop that everything is compared with."""
    for inputs, targets in job.my_part():
        with autocast():
            loss = nats_per_byte(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def fsdp_by_hand(job: Job, **options: Any) -> None:
    """FSDP2 by hand."""
    shard(job.model.to(DEVICE))
    loop(job, job.model, job.optimizer(job.model.parameters(), **options))


def ddp_by_hand(job: Job) -> None:
    """DDP by hand."""
    model = DistributedDataParallel(job.model.to(DEVICE), gradient_as_bucket_view=True)
    loop(job, model, job.optimizer(model.parameters()))


def torchweld_fit(job: Job, strategy: Any, *, barebones: bool) -> None:
    """``Trainer.fit``."""
    from torchweld import Trainer

    trainer = Trainer(
        strategy=strategy, precision=PRECISION, barebones=barebones, default_root_dir=job.folder
    )
    trainer.fit(job.model, train=job.loader, loss=nats_per_byte, optimizer=job.optimizer)


def torchweld_own_loop(job: Job) -> None:
    """``Trainer.prepare`` with everything on."""
    from torchweld import Trainer

    trainer = Trainer(strategy="fsdp", precision=PRECISION, default_root_dir=job.folder)
    with trainer.prepare(
        job.model, train=job.loader, loss=nats_per_byte, optimizer=job.optimizer
    ) as run:
        for inputs, targets in run.batches():
            run.backward(run.loss(run.model(inputs), targets))
            run.step()


def lightning(job: Job) -> None:
    """Lightning's FSDP2, extras off."""
    import lightning as pl
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def configure_model(self) -> None:
            shard(self.model, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nats_per_byte(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> AdamW:
            return job.optimizer(self.parameters())

    world_size = dist.get_world_size()
    trainer = pl.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1),
        accelerator="cuda" if CUDA else "cpu",
        devices=world_size,
        precision=PRECISION,
        max_epochs=1,
        default_root_dir=job.folder,
        **OFF,
    )
    trainer.fit(Module(), job.loader)


def accelerate(job: Job) -> None:
    """Accelerate's FSDP2; on CPUs it would be DDP without a word."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    if not CUDA:
        raise ImportError("Accelerate shards on GPUs only")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )
    own = Accelerator(fsdp_plugin=plugin, mixed_precision="bf16")
    model, optimizer, loader = own.prepare(
        job.model, job.optimizer(job.model.parameters()), job.loader
    )
    for inputs, targets in loader:
        own.backward(nats_per_byte(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
    own.free_memory()


TRAINERS: dict[str, Callable[[Job], None]] = {
    "FSDP2 by hand": fsdp_by_hand,
    "FSDP2 by hand, AdamW(foreach=True)": partial(fsdp_by_hand, foreach=True),
    "torchweld fsdp, fit, extras on (the default)": partial(
        torchweld_fit, strategy="fsdp", barebones=False
    ),
    "torchweld fsdp, fit, barebones": partial(torchweld_fit, strategy="fsdp", barebones=True),
    "torchweld fsdp, own loop, extras on": torchweld_own_loop,
    "Lightning FSDP2, extras off": lightning,
    "Accelerate FSDP2": accelerate,
    "DDP by hand": ddp_by_hand,
    "torchweld ddp, fit, extras on": partial(torchweld_fit, strategy="ddp", barebones=False),
}
