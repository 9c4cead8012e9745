"""A run of a few steps on every launched process, in which one of them comes to harm.

    train_and_fail.py PLACE HARM WHO ROOT [CKPT_PATH]

PLACE and HARM are names below; WHO is the rank that it happens to, or ``all``. The strategy is that
of the variable STRATEGY. A run that ends well prints a digest of its weights.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.data import Dataset

from torchweld import Trainer, use
from torchweld.callbacks import ModelCheckpoint
from torchweld.interfaces import Border, Run

AT_STEP = 5
Act = Callable[[str], None]


# ---- harms ---------------------------------------------------------------------------------------


def raise_error() -> None:
    """An exception."""
    raise ValueError("the sample is broken")


def raise_and_stay() -> None:
    """An exception that the script catches, and goes on with something else."""
    raise ArithmeticError("the sample is broken")


def leave() -> None:
    """A script that ends itself."""
    sys.exit(3)


def die() -> None:
    """What ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """Ctrl-C that reaches one process only."""
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    """What SLURM, torchrun and Kubernetes do before they kill."""
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_launcher() -> None:
    """SIGTERM to torchrun, which hands it on; waits until it has come here."""
    os.kill(os.getppid(), signal.SIGTERM)
    handler: Any = signal.getsignal(signal.SIGTERM)
    while not handler.__self__.number:
        time.sleep(0.05)


def warn_by_slurm() -> None:
    """What SLURM does for ``--signal=USR1@120``."""
    os.kill(os.getpid(), signal.SIGUSR1)


def wait() -> None:
    """Stay until something comes from outside."""
    for _ in range(600):
        time.sleep(0.1)


def fill_disk() -> None:
    """No room is left where the run writes."""
    with suppress(OSError), Path("runs/filled").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def block_checkpoints() -> None:
    """A place for the next checkpoint that cannot be written."""
    for run in Path("runs").glob("*-*"):
        (run / f"step-{AT_STEP + 1}").write_text("a file where a directory has to be")


_ALL = (
    raise_error, raise_and_stay, leave, die, interrupt, terminate, terminate_launcher,
    warn_by_slurm, wait, fill_disk, block_checkpoints,
)  # fmt: skip
HARMS: dict[str, Callable[[], None]] = {harm.__name__: harm for harm in _ALL}


def make_act(place: str, harm: str, who: str) -> Act:
    """Return ``act(place)``, which comes to harm if it is this process's turn and place."""
    rank = os.environ.get("RANK", "0")

    def act(here: str) -> None:
        if here == place and who in {rank, "all"}:
            Path(f"harmed-{rank}").write_text(str(time.time()))
            HARMS[harm]()

    return act


# ---- the run -------------------------------------------------------------------------------------


class Data(Dataset[Any]):
    """Counts the samples that it has given."""

    def __init__(self, act: Act) -> None:
        self.given, self.act = 0, act

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.given += 1
        if self.given == 4 * AT_STEP:
            self.act("data")
        return torch.full((6,), index / 64), index % 3


class Net(nn.Module):
    """Counts its forward passes."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.seen, self.act = 0, act

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += torch.is_grad_enabled()
        if self.seen == AT_STEP and torch.is_grad_enabled():
            self.act("forward")
        if not self.training:
            self.act("validation")
        out: torch.Tensor = self.layers(inputs)
        return out


class Harm:
    """A callback, called before the checkpoint is written."""

    def __init__(self, act: Act) -> None:
        self.act = act

    def next_due(self, progress: Any) -> int:
        return int(progress.step) + 1

    def at(self, border: Border, run: Run) -> None:
        if border.progress.step in {AT_STEP, AT_STEP + 1}:
            self.act(f"callback at step {border.progress.step}")


def main(place: str, harm: str, who: str, root: str, ckpt_path: str | None = None) -> None:
    """Train, with a checkpoint every second step."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    act = make_act(place, harm, who)
    act("before")
    model = Net(act)
    trainer = Trainer(
        strategy=os.environ.get("STRATEGY", "auto"),
        data=use("torch", batch_size=4),
        default_root_dir=root,
        callbacks=[Harm(act), ModelCheckpoint(every_n_train_steps=2)],
        logger=bool(os.environ.get("LOGGER")),
        log_every_n_steps=1,
        max_epochs=2,
        seed=3,
    )
    try:
        trainer.fit(
            model,
            Data(act),
            Data(act) if place == "validation" else None,
            loss=F.cross_entropy,
            optimizer=partial(SGD, lr=0.1, momentum=0.9),
            ckpt_path=ckpt_path,
        )
    except ArithmeticError:
        wait()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    print("weights", digest.hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
