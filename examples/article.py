"""DeepSpeed, FSDP, FFCV and Composer in one training, beside the same in plain PyTorch.

Start it with two processes, on a laptop or on GPUs::

    torchrun --standalone --nproc-per-node 2 examples/article.py

It writes handwritten digits over photographs into a folder of JPEG files, which are converted once;
prints the plan; trains half under DeepSpeed's ZeRO-2; resumes that checkpoint under FSDP2; exports
the weights, and reads them into a model without any of this. Then it trains the same network on the
same files with DistributedDataParallel and a DataLoader, and prints what each of them came to.

All of it lies below ``--root``, which may be deleted. Started again, also after an interruption, it
takes the images and the converted files that are there, and trains anew.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from torchweld import Trainer, apply_surgery, use
from torchweld.interfaces import Border, Run

SIDE = 192  # pixels of a written image
SIZE = 32  # pixels of what is trained on
BATCH = 32  # images a process and step
LEARNING_RATE = 6e-3
FEWEST, MOST = 250, 1797  # images: with fewer not every digit is in both folders; so many there are
RANK = int(os.environ.get("RANK", "0"))

# The order does not matter: the plan finds the right one, and says why.
SURGERY = ["label_smoothing", "channels_last", use("cutmix", alpha=0.3), "blurpool"]


# ---- images --------------------------------------------------------------------------------------


def pictures(count: int) -> Iterator[tuple[Image.Image, int]]:
    """Digits, each in white over another part of a photograph."""
    digits, photographs = load_digits(), load_sample_images().images
    random = np.random.default_rng(0)
    for index in random.permutation(len(digits.images))[:count]:
        photograph = photographs[random.integers(len(photographs))]
        top, left = (random.integers(0, size - SIDE) for size in photograph.shape[:2])
        behind = photograph[top : top + SIDE, left : left + SIDE].astype(np.float32)
        ink = Image.fromarray((digits.images[index] * 255 / 16).astype(np.uint8))
        share = np.asarray(ink.resize((SIDE, SIDE), Image.Resampling.BICUBIC))[..., None] / 255.0
        mixed = share * 255 + (1 - share) * 0.6 * behind
        yield Image.fromarray(mixed.astype(np.uint8)), int(digits.target[index])


def write_images(root: Path, count: int) -> tuple[Path, Path]:
    """Make two folders of JPEG files with a folder a class; the first process for all of them."""
    folder = root / f"jpeg-{count}"
    partial_folder = root / f"{folder.name}.partial"
    if RANK == 0 and not folder.exists():
        shutil.rmtree(partial_folder, ignore_errors=True)  # of a run that was interrupted
        for index, (picture, digit) in enumerate(pictures(count)):
            split = "val" if index % 5 == 0 else "train"
            path = partial_folder / split / str(digit) / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=90)
        partial_folder.rename(folder)
    while not folder.exists():  # if the first process fails, torchrun ends this one
        time.sleep(0.1)
    return folder / "train", folder / "val"


def load_images(train: Path, val: Path) -> tuple[ImageFolder, ImageFolder]:
    """The usual data sets of torchvision: FFCV takes them over, and so does a DataLoader."""
    floats = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.3] * 3),
    ]
    cut = v2.RandomResizedCrop(SIZE, scale=(0.6, 1.0), antialias=True)
    whole = [v2.Resize(SIZE, antialias=True), v2.CenterCrop(SIZE)]
    return (
        ImageFolder(str(train), transform=v2.Compose([cut, *floats])),
        ImageFolder(str(val), transform=v2.Compose([*whole, *floats])),
    )


def load_data(root: str | Path, count: int = MOST) -> tuple[ImageFolder, ImageFolder]:
    """Training and validation; the files are written if they are not there."""
    return load_images(*write_images(Path(root), count))


# ---- the model -----------------------------------------------------------------------------------


def make_model() -> nn.Module:
    """Convolutions and BatchNorm; the strided ones are what blurpool replaces."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def accuracy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Right answers, and how many there could have been."""
    return (outputs.argmax(dim=1) == targets).sum(), len(targets)


def one_cycle(optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The learning rate rises and falls once over the run."""
    return OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=total_steps)


make_optimizer = partial(AdamW, lr=LEARNING_RATE, weight_decay=0.05)


# ---- with torchweld ------------------------------------------------------------------------------


@dataclass
class Figures:
    """A row of the table; as a callback it fills itself in, and may stop the run.

    Attributes:
        name: what ran.
        stop_after: epochs, as a time limit on a cluster would have it; 0 for all.
        rates: images a second of every epoch, of all processes, without validation.
        held: bytes of weights and optimizer state on this process.
        accuracy: of the last validation.
    """

    name: str
    stop_after: int = 0
    rates: list[float] = field(default_factory=list)
    held: int = 0
    accuracy: float = 0.0
    since: float = 0.0
    samples: int = 0

    def at(self, border: Border, run: Run) -> None:
        """Callbacks act at borders between steps, never in every step."""
        now, samples = time.perf_counter(), border.progress.samples
        if "eval_start" in border.kind:  # the training of an epoch is over
            self.rates.append((samples - self.samples) / (now - self.since))
        if border.kind & {"fit_start", "epoch_end"}:
            self.since, self.samples = now, samples
        if "epoch_end" in border.kind:
            self.accuracy = border.metrics["val_accuracy"]
            held = run.model.bytes_per_rank()
            self.held = held["parameters"] + held["optimizer"]
            if border.progress.epoch == self.stop_after:
                run.stop()

    def __str__(self) -> str:
        # Code is compiled and files are read for the first time in the first epoch.
        rate = statistics.median(self.rates[1:] or self.rates)
        return f"{self.name:46}{self.accuracy:8.3f}{rate:10,.0f}{self.held / 1e6:10.2f} MB"


def fit(strategy: Any, figures: Figures, data: Any, options: Any, resume: str | None) -> Trainer:
    """Train under one strategy, from the start or from the last checkpoint."""
    trainer = Trainer(
        strategy=strategy,
        data=use("ffcv", batch_size=BATCH, cache_dir=str(options.root / "converted")),
        surgery=SURGERY,
        max_epochs=options.epochs,
        default_root_dir=options.root / "runs",
        log_every_n_steps=1000,
        callbacks=figures,
        seed=1,
    )
    if RANK == 0 and resume is None:
        print(trainer.plan.explain(), flush=True)
    train, val = data
    trainer.fit(
        make_model,  # a function is called after seeding, so every run starts alike
        train,
        val,
        loss=F.cross_entropy,
        metrics={"accuracy": accuracy},
        optimizer=make_optimizer,
        lr_scheduler=one_cycle,
        ckpt_path=resume,
    )
    return trainer


# ---- by hand -------------------------------------------------------------------------------------


def fit_by_hand(data: tuple[ImageFolder, ImageFolder], epochs: int) -> Figures:
    """The same network on the same files in plain PyTorch, in the processes that are there."""
    figures = Figures("DistributedDataParallel, DataLoader")
    train, val = data
    sampler: DistributedSampler[Any] = DistributedSampler(train, seed=1)
    loader = DataLoader(train, BATCH, sampler=sampler, num_workers=1, persistent_workers=True)
    torch.manual_seed(1)
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else "cpu"
    )
    model = DistributedDataParallel(make_model().to(device))
    optimizer = make_optimizer(model.parameters())
    scheduler = one_cycle(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        model.train()
        since = time.perf_counter()
        for inputs, targets in loader:
            F.cross_entropy(model(inputs.to(device)), targets.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        figures.rates.append(len(train) / (time.perf_counter() - since))
    state = [value for each in optimizer.state.values() for value in each.values()]
    tensors = [*model.parameters(), *(value for value in state if value.dim() > 0)]
    figures.held = sum(each.nbytes for each in tensors)
    figures.accuracy = accuracy_by_hand(model.module, val)
    return figures


@torch.no_grad()
def accuracy_by_hand(model: nn.Module, val: ImageFolder) -> float:
    """Of a whole model in one process, on images that Pillow reads."""
    device = next(model.parameters()).device
    model.eval()
    right = sum(
        int(accuracy(model(inputs.to(device)), targets.to(device))[0])
        for inputs, targets in DataLoader(val, batch_size=100)
    )
    return right / len(val)


def read_options() -> argparse.Namespace:
    """What is on the command line; ends the program on what cannot be."""
    parser = argparse.ArgumentParser(description="four libraries in one training")
    parser.add_argument("--epochs", type=int, default=12, help="2 or more; half for each strategy")
    parser.add_argument("--images", type=int, default=MOST, help=f"{FEWEST} to {MOST}")
    parser.add_argument(
        "--root", type=Path, default=Path("runs/article"), help="folder for all that is written"
    )
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error(f"--epochs {options.epochs}: two strategies train half each; give 2 or more")
    if not FEWEST <= options.images <= MOST:
        parser.error(f"--images {options.images}: give a number from {FEWEST} to {MOST}")
    try:
        options.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--root {options.root}: {error.strerror}; give a folder that can be written")
    if not os.access(options.root, os.W_OK):
        parser.error(f"--root {options.root} cannot be written; give another folder")
    return options


def main() -> None:
    """Write images, train half, resume elsewhere, export; then the same by hand."""
    options = read_options()
    data = load_data(options.root, options.images)

    half = options.epochs // 2
    first = Figures(f"DeepSpeed ZeRO-2, FFCV, Composer: epochs 1-{half}", stop_after=half)
    second = Figures(f"FSDP2, FFCV, Composer: epochs {half + 1}-{options.epochs}")
    fit(use("deepspeed", stage=2), first, data, options, None)
    trainer = fit("fsdp", second, data, options, "last")
    weights = trainer.export(options.root / "article.safetensors")
    by_hand = fit_by_hand(data, options.epochs)

    if RANK == 0:
        model = apply_surgery(make_model(), SURGERY)
        model.load_state_dict(load_file(weights))
        exported = accuracy_by_hand(model, data[1])
        print(f"\n{len(data[0])} JPEG files to train on, {len(data[1])} to validate")
        print(f"{'':46}{'accuracy':>8}{'images/s':>10}{'a process':>13}")
        print(first, second, by_hand, sep="\n")
        print(f"{weights} in a plain model: accuracy {exported:.3f}")


if __name__ == "__main__":
    main()
