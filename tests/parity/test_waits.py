"""Nothing waits for the device, and nothing is communicated, between two borders: counted."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader

from tests.parity.training import make_data, make_model
from torchweld import CSVLogger, EarlyStopping, LearningRateMonitor, Trainer
from torchweld.testing import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


class Reads:
    """Counts the ways to read a tensor's value, each of which waits for a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, read: Any) -> Any:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return read(tensor, *args, **kwargs)

        return counted


def _fit(max_steps: int, log_every: int, **settings: Any) -> None:
    trainer = Trainer(
        max_steps=max_steps,
        log_every_n_steps=log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    loader = DataLoader(make_data(400), 4)
    trainer.fit(make_model(), loader, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))


def _reads(monkeypatch: pytest.MonkeyPatch, max_steps: int, log_every: int) -> int:
    _fit(1, 100, logger=False)  # what torch reads only once in a process is not counted
    with monkeypatch.context() as patched:
        reads = Reads(patched)
        _fit(max_steps, log_every, logger=False)
    return reads.count


def test_steps_between_borders_read_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    few = _reads(monkeypatch, 20, 100)

    many = _reads(monkeypatch, 90, 100)

    assert many == few


def test_a_border_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    without = _reads(monkeypatch, 90, 100)

    with_eight_more = _reads(monkeypatch, 90, 10)

    assert with_eight_more - without == 8


def test_a_border_reads_once_with_everything_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Losses, norm, rates, throughput and memory: the losses are read together with the norm."""

    def reads(log_every: int) -> int:
        with monkeypatch.context() as patched:
            counted = Reads(patched)
            _fit(
                90, log_every, logger=CSVLogger(tmp_path), gradient_clip_val=1.0,
                callbacks=[LearningRateMonitor(), EarlyStopping("train_loss")],
            )  # fmt: skip
        return counted.count

    reads(100)  # what torch reads only once in a process is not counted

    assert reads(10) - reads(100) == 8


def _collectives(max_steps: int, log_every: int) -> int:
    count = 0
    names = ("all_reduce", "broadcast", "all_gather", "barrier", "reduce", "all_gather_object")
    originals = {name: getattr(dist, name) for name in names}

    def counting(call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return call(*args, **kwargs)

        return counted

    for name, call in originals.items():
        setattr(dist, name, counting(call))
    _fit(max_steps, log_every, logger=False, strategy="ddp")
    for name, call in originals.items():
        setattr(dist, name, call)
    return count


def test_only_borders_communicate_beside_the_strategy() -> None:
    few = run_ranks(_collectives, 2, 20, 100)

    many = run_ranks(_collectives, 2, 45, 100)
    with_four_borders_more = run_ranks(_collectives, 2, 45, 10)

    assert many == few
    assert [more - less for more, less in zip(with_four_borders_more, many, strict=True)] == [4, 4]
