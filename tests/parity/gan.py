"""A small GAN twice: by hand in plain PyTorch, and through torchweld's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.parity.training import windows
from torchweld import Trainer, use
from torchweld.loop.run import TrainingRun

BATCH, EPOCHS, SEED = 4, 2, 7
OPTIMIZERS: Mapping[str, Any] = {
    # With 1e-8, Adam divides the rounding noise of small gradients by their own size.
    "g": partial(Adam, lr=0.01, betas=(0.5, 0.999), eps=1e-4),
    "d": partial(SGD, lr=0.1, momentum=0.9),
}
EXACT: Mapping[str, Any] = {"g": partial(SGD, lr=1024.0), "d": partial(SGD, lr=1024.0)}
"""One step of these shows the gradients, as ``(before - after) / 1024``."""


def halve(optimizer: torch.optim.Optimizer, _total: int) -> LRScheduler:
    """Halve the learning rate every third step; of the generator alone."""
    return StepLR(optimizer, 3, gamma=0.5)


def make_data(num_samples: int) -> TensorDataset:
    """Real samples, and noise to make false ones of."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(num_samples, 6, generator=generator)
    return TensorDataset(real, torch.randn(num_samples, 5, generator=generator))


def make_models() -> dict[str, nn.Module]:
    """BatchNorm and dropout in the generator: state of its own, and random numbers."""
    torch.manual_seed(1)
    generator = nn.Sequential(
        nn.Linear(5, 17), nn.BatchNorm1d(17), nn.ReLU(), nn.Dropout(0.2), nn.Linear(17, 6)
    )
    critic = nn.Sequential(
        nn.Linear(6, 19), nn.LeakyReLU(0.2), nn.Linear(19, 13), nn.LeakyReLU(0.2), nn.Linear(13, 1)
    )
    return {"g": generator, "d": critic}


def loss_of_d(real: Tensor, fake: Tensor) -> Tensor:
    """Real samples are to be called real, false ones false."""
    right, wrong = torch.ones_like(real), torch.zeros_like(fake)
    bce = F.binary_cross_entropy_with_logits
    return bce(real, right) + bce(fake, wrong)


def loss_of_g(fake: Tensor) -> Tensor:
    """False samples are to be called real."""
    return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """What one writes by hand before the generator's pass through the critic."""
    model.requires_grad_(False)
    yield
    model.requires_grad_(True)


def by_hand(
    g: nn.Module,
    d: nn.Module,
    loader: DataLoader[Any],
    *,
    accumulate: int = 1,
    freezes: bool = True,
) -> None:
    """Train as one would write it; for modules and for their DDP wrappers.

    Args:
        freezes: whether the critic is frozen during the generator's pass.
    """
    optimizers = {"g": OPTIMIZERS["g"](g.parameters()), "d": OPTIMIZERS["d"](d.parameters())}
    schedule = halve(optimizers["g"], 0)
    for epoch in range(EPOCHS):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for window in windows(iter(loader), accumulate):
            for place, batch in enumerate(window):
                share = len(window), place == len(window) - 1
                _one_batch({"g": g, "d": d}, optimizers, batch, share, freezes=freezes)
            schedule.step()


def _one_batch(
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    batch: Any,
    share: tuple[int, bool],
    *,
    freezes: bool,
) -> None:
    """Both passes over one batch; ``share`` is the window's size, and whether it ends there."""
    (real, noise), (size, is_last) = batch, share
    for model in models.values():
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = is_last
    fake = models["g"](noise)
    loss = loss_of_d(models["d"](real), models["d"](fake.detach()))
    (loss / size).backward()
    if is_last:
        optimizers["d"].step()
        optimizers["d"].zero_grad()
    with frozen(models["d"]) if freezes else nullcontext():
        loss = loss_of_g(models["d"](fake))
        (loss / size).backward()
    if is_last:
        optimizers["g"].step()
        optimizers["g"].zero_grad()


def loop(
    run: TrainingRun, *, stop_after: int | None = None, scale: float = 1.0, every: int = 1
) -> None:
    """The loop as a user writes it; the generator is trained with ``every`` so many batches."""
    g, d = run.models["g"], run.models["d"]
    for number, (real, noise) in enumerate(run.batches(), start=1):
        fake = g(noise)
        with d.alone():
            d.backward(loss_of_d(d(real), d(fake.detach())) * scale)
        d.step()
        if number % every == 0:
            with g.alone():
                g.backward(loss_of_g(d(fake)) * scale)
            g.step()
        if number == stop_after:
            run.save()
            break


def make_trainer(strategy: Any, **settings: Any) -> Trainer:
    """A Trainer for the same training."""
    return Trainer(
        **{
            "strategy": strategy,
            "data": use("torch", batch_size=BATCH),
            "max_epochs": EPOCHS,
            "barebones": True,
            "seed": SEED,
            **settings,
        }
    )


def train(
    strategy: Any,
    num_samples: int,
    folder: Path,
    *,
    resumes_after: int | None = None,
    every: int = 1,
    **settings: Any,
) -> dict[str, Tensor]:
    """Train through torchweld; returns what was exported, names begin with the model's.

    Args:
        folder: to export into, and for checkpoints.
        resumes_after: interrupt after so many batches and go on in a new Trainer.
        every: the generator is trained with every so many batches.
    """
    if resumes_after is not None:
        quiet = {"enable_progress_bar": False, "logger": False, "barebones": False}
        settings = {**settings, **quiet, "default_root_dir": folder / "runs"}
        with _prepare(make_trainer(strategy, **settings), num_samples) as run:
            loop(run, stop_after=resumes_after)
    trainer = make_trainer(strategy, **settings)
    ckpt_path = "last" if resumes_after is not None else None
    with _prepare(trainer, num_samples, ckpt_path=ckpt_path) as run:
        loop(run, every=every)
    return exported(trainer, folder / "export")


def _prepare(trainer: Trainer, num_samples: int, **more: Any) -> TrainingRun:
    data = make_data(num_samples)
    return trainer.prepare(
        make_models(), data, optimizer=OPTIMIZERS, lr_scheduler={"g": halve}, **more
    )


def gradients(strategy: Any, folder: Path) -> dict[str, Tensor]:
    """The gradients of both models in the first step, with norms above 10, as the weights moved."""
    trainer = make_trainer(strategy, max_epochs=None, max_steps=1)
    models = make_models()
    before = {f"{n}.{k}": v.clone() for n, m in models.items() for k, v in m.state_dict().items()}
    with trainer.prepare(models, make_data(2 * BATCH), optimizer=EXACT) as run:
        loop(run, scale=1000.0)
    after = exported(trainer, folder / "gradients")
    return {n: (before[n].double() - t.double()) / 1024 for n, t in after.items() if "1." not in n}


def exported(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    """The weights of both models, out of their files."""
    trainer.export(folder)
    files = {name: load_file(folder / f"{name}.safetensors") for name in ("g", "d")}
    return {f"{n}.{k}": v.clone() for n, tensors in files.items() for k, v in tensors.items()}


def hand_single(num_samples: int, **settings: Any) -> dict[str, Tensor]:
    """One process by hand."""
    torch.manual_seed(SEED)
    models = make_models()
    torch.manual_seed(SEED)
    data = make_data(num_samples)
    sampler: DistributedSampler[Any] = DistributedSampler(data, 1, 0, seed=SEED)
    by_hand(models["g"], models["d"], DataLoader(data, BATCH, sampler=sampler), **settings)
    return weights(models)


def hand_ddp(num_samples: int, windows: Sequence[int]) -> list[dict[str, Tensor]]:
    """Several processes by hand, once for each size of a window, in the group of this job."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return [_hand_ddp(num_samples, accumulate) for accumulate in windows]


def _hand_ddp(num_samples: int, accumulate: int) -> dict[str, Tensor]:
    models = make_models()
    g, d = DistributedDataParallel(models["g"]), DistributedDataParallel(models["d"])
    torch.manual_seed(SEED + dist.get_rank())
    data = make_data(num_samples)
    sampler: DistributedSampler[Any] = DistributedSampler(data, seed=SEED)
    by_hand(g, d, DataLoader(data, BATCH, sampler=sampler), accumulate=accumulate)
    return weights(models)


def weights(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers, copied, under the names that a checkpoint gives them."""
    return {f"{n}.{k}": v.clone() for n, m in models.items() for k, v in m.state_dict().items()}
