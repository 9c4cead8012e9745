"""A method other than forward under the strategies: like a model whose forward it is, bitwise."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from tests.parity.training import different
from torchweld import Trainer, use
from torchweld.errors import InvalidArgument
from torchweld.testing import run_ranks

STRATEGIES = ["ddp", "fsdp", use("deepspeed", stage=3, persistence_threshold=10)]


class Coder(nn.Module):
    """Encodes; its forward does something else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 9), nn.Linear(9, 4)

    def encode(self, inputs: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        """Returns a mapping, as many methods do."""
        return {"code": self.outer(torch.tanh(self.inner(inputs))) * scale}

    def forward(self, _inputs: Tensor) -> Tensor:
        """Not what is trained."""
        raise NotImplementedError


class Encoder(Coder):
    """The same with ``encode`` for a forward."""

    forward = Coder.encode  # type: ignore[assignment]  # the point


def _train(model: nn.Module, strategy: Any, *, marked: bool, precision: str = "32") -> Any:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*(torch.randn(24, n, generator=generator) for n in (6, 4)))
    trainer = Trainer(
        strategy=strategy, data=use("torch", batch_size=4), seed=3, barebones=True,
        precision=precision,
    )  # fmt: skip
    with trainer.prepare(model, data, optimizer=partial(SGD, lr=0.1, momentum=0.9)) as run:
        encode = run.model.mark_forward_method("encode") if marked else run.model
        for inputs, targets in run.batches():
            code = encode(inputs, scale=2.0)["code"]
            assert code.dtype is torch.float32
            run.backward(F.mse_loss(code, targets))
            run.step()
        return run


def _weights(run: Any) -> dict[str, Tensor]:
    shards = run.wiring.prepared.shards()
    return {s.name: s.local.clone() for s in shards if s.name.startswith("model/")}


def _trained_on_ranks() -> list[list[str]]:
    """Names of what differs, under each strategy, of this rank's part."""
    found = []
    for strategy in STRATEGIES:
        expected = _weights(_train(Encoder(), strategy, marked=False))
        found.append(different(expected, _weights(_train(Coder(), strategy, marked=True))))
    return found


@pytest.mark.slow
def test_a_marked_method_is_trained_like_a_forward_under_every_strategy() -> None:
    for differences in run_ranks(_trained_on_ranks, 2, timeout_seconds=300):
        assert differences == [[], [], []]


@pytest.mark.parametrize("precision", ["32", "bf16", "bf16-true"])
def test_a_marked_method_runs_under_the_precision(precision: str) -> None:
    expected, model = Encoder(), Coder()

    _train(expected, "single", marked=False, precision=precision)
    _train(model, "single", marked=True, precision=precision)

    assert different(expected.state_dict(), model.state_dict()) == []
    with pytest.raises(NotImplementedError):
        model(torch.ones(1, 6))  # the module is left as it was


def test_a_method_that_is_none_is_refused_with_what_was_meant() -> None:
    trainer = Trainer(data=use("torch", batch_size=4), barebones=True)
    data = TensorDataset(torch.ones(4, 6), torch.ones(4, 4))

    run = trainer.prepare(Coder(), data, optimizer=partial(SGD, lr=0.1))

    with pytest.raises(InvalidArgument, match="no method of Coder; did you mean 'encode'"):
        run.model.mark_forward_method("encod")
    with pytest.raises(InvalidArgument, match="a submodule of Coder"):
        run.model.mark_forward_method("inner")
